"""The lip stream: pictures of the mouth in, an embedding of each out."""

import torch
import torch.nn as nn

from .lip_reading import LightFrontEnd, ResNet18FrontEnd
from .lips import normalise
from .tcn import ConvBlock, reach

FRONT_ENDS = {"light": LightFrontEnd, "resnet18": ResNet18FrontEnd}


class VisualStream(nn.Module):
    """Front end and visual TCN blocks, at 25 embeddings a second.

    Where there is no picture, a learned embedding takes its place.

    Arguments
    ---------
    front_end : str
        "light" or "resnet18", see `lip_reading`.
    height, width : int
        Of a picture.
    channels, hidden, kernel_size : int
        Of the visual ConvBlocks.
    blocks : int
        Visual ConvBlocks, with dilations 1, 2, 4, ...
    filters : int or None
        Of the front end's first convolution; None: its own default.

    Example
    -------
    >>> visual = VisualStream("light", 24, 32, channels=32, hidden=48).eval()
    >>> pictures = torch.rand(2, 10, 24, 32)
    >>> visual(pictures).shape
    torch.Size([2, 32, 10])
    >>> visual.size
    (24, 32)
    """

    def __init__(
        self,
        front_end="resnet18",
        height=112,
        width=112,
        channels=256,
        hidden=512,
        kernel_size=3,
        blocks=5,
        filters=None,
    ):
        super().__init__()
        if front_end not in FRONT_ENDS:
            raise ValueError(
                f"front_end must be one of {list(FRONT_ENDS)}, not "
                f"{front_end!r}"
            )
        self.size = (height, width)
        self.channels = channels
        more = {} if filters is None else {"filters": filters}
        self.front_end = FRONT_ENDS[front_end](height, width, channels, **more)
        self.absent = nn.Parameter(torch.zeros(channels))
        self.tcn = nn.Sequential(
            *(
                ConvBlock(channels, hidden, kernel_size, 2**block)
                for block in range(blocks)
            )
        )

    @property
    def reach(self):
        """Pictures to either side that an embedding depends on."""
        at_once = self.front_end.conv_3d.kernel_size[0]
        return (at_once - 1) // 2 + reach(self.tcn)

    def forward(self, pictures):
        """Embed.

        Arguments
        ---------
        pictures : torch.Tensor
            [batch, pictures, height, width], 0 to 1; zeros: none.

        Returns
        -------
        embedding : torch.Tensor
            [batch, channels, pictures].
        """
        present = pictures.flatten(2).amax(2)[:, None] > 0  # [B, 1, pictures]
        seen = self.front_end(normalise(pictures)[:, None])
        return self.tcn(torch.where(present, seen, self.absent[:, None]))
