"""What looks at the pictures: a small network, and ResNet-18.

Both begin with a convolution over space and time and go on picture by
picture. Layout: in [batch, 1, pictures, height, width], out [batch, channels,
pictures]. Norms are BatchNorm1d over the flattened places, which computes
what BatchNorm2d and 3d do and folds like the norms of the TCN.
"""

import torch.nn as nn
import torch.nn.functional as F


def over_places(norm, x):
    """A norm over all places (and times) of each channel.

    Arguments
    ---------
    norm : torch.nn.Module
        Takes [batch, channels, places].
    x : torch.Tensor
        [batch, channels, ...].

    Returns
    -------
    x : torch.Tensor
        Same shape.

    Example
    -------
    >>> import torch
    >>> x = torch.randn(4, 3, 5, 6)
    >>> flat = over_places(nn.BatchNorm1d(3), x)
    >>> torch.allclose(flat, nn.BatchNorm2d(3)(x), atol=1e-6)
    True
    """
    return norm(x.flatten(2)).view_as(x)


def picture_by_picture(x):
    """[batch, channels, pictures, h, w] as [batch * pictures, channels, h, w].

    Arguments
    ---------
    x : torch.Tensor
        Of a convolution over space and time.

    Returns
    -------
    x : torch.Tensor

    Example
    -------
    >>> import torch
    >>> picture_by_picture(torch.zeros(2, 8, 5, 3, 4)).shape
    torch.Size([10, 8, 3, 4])
    """
    return x.transpose(1, 2).flatten(0, 1)


class LightFrontEnd(nn.Module):
    """Three small convolutions, for pictures of about 24 x 32 pixels.

    Arguments
    ---------
    height, width : int
        Of a picture.
    channels : int
        Of the output.
    filters : int
        Of the first convolution; the others have two and four times as many.

    Example
    -------
    >>> import torch
    >>> front_end = LightFrontEnd(24, 32, channels=48)
    >>> front_end(torch.randn(2, 1, 10, 24, 32)).shape
    torch.Size([2, 48, 10])
    """

    def __init__(self, height, width, channels, filters=8):
        super().__init__()
        counts = filters, 2 * filters, 4 * filters
        self.conv_3d = nn.Conv3d(
            1, filters, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False
        )
        self.norm_3d = nn.BatchNorm1d(filters)
        self.prelu_3d = nn.PReLU()
        for i in (0, 1):
            conv = nn.Conv2d(*counts[i : i + 2], 3, 2, 1, bias=False)
            self.add_module(f"conv_{i}", conv)
            self.add_module(f"norm_{i}", nn.BatchNorm1d(counts[i + 1]))
            self.add_module(f"prelu_{i}", nn.PReLU())
        places = -(-height // 8) * -(-width // 8)
        self.project = nn.Conv1d(counts[2] * places, channels, 1)

    def forward(self, x):
        """Apply to [batch, 1, pictures, height, width]."""
        batch = len(x)
        x = self.prelu_3d(over_places(self.norm_3d, self.conv_3d(x)))
        x = picture_by_picture(x)
        x = self.prelu_0(over_places(self.norm_0, self.conv_0(x)))
        x = self.prelu_1(over_places(self.norm_1, self.conv_1(x)))
        x = x.flatten(1).unflatten(0, (batch, -1))  # [B, pictures, values]
        return self.project(x.transpose(1, 2))


class ResidualBlock(nn.Module):
    """The basic block of ResNet-18.

    Arguments
    ---------
    inputs, outputs : int
        Channels.
    stride : int
        Of the first convolution.

    Example
    -------
    >>> import torch
    >>> ResidualBlock(4, 8, stride=2)(torch.randn(1, 4, 6, 6)).shape
    torch.Size([1, 8, 3, 3])
    """

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm_in = nn.BatchNorm1d(outputs)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_out = nn.BatchNorm1d(outputs)
        self.has_shortcut = stride != 1 or inputs != outputs
        if self.has_shortcut:
            self.conv_skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.norm_skip = nn.BatchNorm1d(outputs)

    def forward(self, x):
        """Apply to [batch, channels, height, width]."""
        y = F.relu(over_places(self.norm_in, self.conv_in(x)))
        y = over_places(self.norm_out, self.conv_out(y))
        if self.has_shortcut:
            x = over_places(self.norm_skip, self.conv_skip(x))
        return F.relu(x + y)


class ResNet18FrontEnd(nn.Module):
    """Conv3D and ResNet-18, the front end of lip reading networks.

    Arguments
    ---------
    height, width : int
        Of a picture (112 x 112); any size from 32 x 32 works.
    channels : int
        Of the output.
    filters : int
        Of the first stage (64); the others have two, four and eight times as
        many.

    Example
    -------
    >>> import torch
    >>> front_end = ResNet18FrontEnd(112, 112, channels=256)
    >>> round(sum(p.numel() for p in front_end.parameters()) / 1e6, 1)
    11.3
    """

    def __init__(self, height, width, channels, filters=64):
        super().__init__()
        if min(height, width) < 32:
            raise ValueError(
                f"ResNet-18 sees nothing in pictures of {height} x {width}: "
                "give 32 x 32 or more, or take the light front end"
            )
        self.conv_3d = nn.Conv3d(
            1, filters, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False
        )
        self.norm_3d = nn.BatchNorm1d(filters)
        self.pool = nn.MaxPool2d(3, 2, 1)
        inputs = filters
        for stage in range(4):
            outputs = filters * 2**stage
            for block in (0, 1):
                stride = 2 if stage and not block else 1
                module = ResidualBlock(inputs, outputs, stride)
                self.add_module(f"block_{stage}_{block}", module)
                inputs = outputs
        self.project = nn.Conv1d(inputs, channels, 1)

    def forward(self, x):
        """Apply to [batch, 1, pictures, height, width]."""
        batch = len(x)
        x = F.relu(over_places(self.norm_3d, self.conv_3d(x)))
        x = self.pool(picture_by_picture(x))
        for name, block in self.named_children():
            if name.startswith("block_"):
                x = block(x)
        x = x.mean((2, 3)).unflatten(0, (batch, -1))  # [B, pictures, values]
        return self.project(x.transpose(1, 2))
