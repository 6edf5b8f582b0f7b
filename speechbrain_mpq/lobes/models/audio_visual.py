"""The lip stream of an audio-visual separator, and how it meets the audio.

Front ends look at the pictures: a small network, or ResNet-18. Both begin
with a convolution over space and time and go on picture by picture; their
norms are BatchNorm1d over the flattened places, which computes what
BatchNorm2d and 3d do and folds like the norms of the TCN. A TCN makes an
embedding of each picture, and factorised attention lets the lips decide which
views of the audio count, between two TCN blocks of the mask network. The form
is that of the audio-visual multichannel recognizer that the paper's
experiments build on (https://arxiv.org/abs/2011.07755).

Layout: pictures in [batch, 1, pictures, height, width], out [batch, channels,
pictures]; audio [batch, channels, frames].
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .lips import PERIOD, normalise, split, upsample
from .tcn import (
    ConvBlock,
    block_place,
    fold_norms_,
    mask_network,
    receptive_field,
)

BEGIN_SMALL = 0.1  # factor on the first weights of a residual fusion
VISUAL_STAGES = ("visual", "fusion")


def over_places(norm, x):
    """Apply a norm over all places (and times) of each channel.

    Arguments
    ---------
    norm : torch.nn.Module
        Takes [batch, channels, places].
    x : torch.Tensor
        [batch, channels, ...].
    """
    return norm(x.flatten(2)).view_as(x)


def _picture_by_picture(x):
    """[B, channels, pictures, h, w] as [B * pictures, channels, h, w]."""
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
        x = _picture_by_picture(x)
        x = self.prelu_0(over_places(self.norm_0, self.conv_0(x)))
        x = self.prelu_1(over_places(self.norm_1, self.conv_1(x)))
        x = x.flatten(1).unflatten(0, (batch, -1))  # [B, pictures, values]
        return self.project(x.transpose(1, 2))


class _ResidualBlock(nn.Module):
    """The basic block of ResNet-18."""

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
                module = _ResidualBlock(inputs, outputs, stride)
                self.add_module(f"block_{stage}_{block}", module)
                inputs = outputs
        self.project = nn.Conv1d(inputs, channels, 1)

    def forward(self, x):
        """Apply to [batch, 1, pictures, height, width]."""
        batch = len(x)
        x = F.relu(over_places(self.norm_3d, self.conv_3d(x)))
        x = self.pool(_picture_by_picture(x))
        for name, block in self.named_children():
            if name.startswith("block_"):
                x = block(x)
        x = x.mean((2, 3)).unflatten(0, (batch, -1))  # [B, pictures, values]
        return self.project(x.transpose(1, 2))


class FactorisedAttention(nn.Module):
    """Fuses audio and visual embeddings frame by frame.

    K views a_k = P_k A of the audio embedding A are weighted by v =
    softmax(P^V V) of the visual embedding V. As published, the fused
    embedding is sigmoid(sum_k v_k a_k). The residual form A + sum_k v_k
    (a_k + b_k) begins near the audio alone, so that a trained audio-only
    network can go on from there.

    Arguments
    ---------
    audio_channels, visual_channels : int
        Channels of the two embeddings.
    factors : int
        K, views of the audio.
    residual : bool
        Which of the forms.

    Example
    -------
    >>> fusion = FactorisedAttention(8, 4, factors=3)
    >>> fusion(torch.randn(2, 8, 5), torch.randn(2, 4, 5)).shape
    torch.Size([2, 8, 5])
    """

    def __init__(
        self, audio_channels, visual_channels, factors=10, residual=False
    ):
        super().__init__()
        self.factors = factors
        self.residual = residual
        self.views = nn.Conv1d(
            audio_channels, factors * audio_channels, 1, bias=residual
        )
        self.weights = nn.Conv1d(visual_channels, factors, 1, bias=False)
        if residual:
            with torch.no_grad():
                self.views.weight *= BEGIN_SMALL
                self.views.bias *= BEGIN_SMALL

    def forward(self, audio, visual):
        """Fuse.

        Arguments
        ---------
        audio : torch.Tensor
            [batch, audio_channels, frames].
        visual : torch.Tensor
            [batch, visual_channels, frames].

        Returns
        -------
        fused : torch.Tensor
            [batch, audio_channels, frames].
        """
        views = self.views(audio).unflatten(1, (self.factors, -1))
        weights = self.weights(visual).softmax(1)[:, :, None]  # [B, K, 1, T]
        fused = (views * weights).sum(1)
        return audio + fused if self.residual else torch.sigmoid(fused)


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
    def receptive_field(self):
        """Pictures to either side that an embedding depends on."""
        at_once = self.front_end.conv_3d.kernel_size[0]
        return (at_once - 1) // 2 + receptive_field(self.tcn)

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


class AudioVisualNetwork(nn.Module):
    """From joined features and pictures to the mask.

    The stages of the audio-only network keep their names, so that its weights
    load, and patterns and plans that name them go on working.

    Arguments
    ---------
    stages : iterable of (str, torch.nn.Module)
        In order; "visual" before "fusion".
    hop : int
        Samples from one audio frame to the next.

    Example
    -------
    >>> import torch
    >>> network = audio_visual_network(
    ...     6,
    ...     4,
    ...     256,
    ...     {"front_end": "light", "height": 8, "width": 8},
    ...     channels=8,
    ...     hidden=16,
    ...     blocks=2,
    ...     layers=1,
    ... )
    >>> [name for name, _ in network.named_children()]
    ['conv_in', 'tcn_0_0', 'visual', 'fusion', 'tcn_1_0', 'conv_out']
    >>> network(torch.rand(1, 6 + 8 * 8, 10)).shape
    torch.Size([1, 4, 10])
    """

    def __init__(self, stages, hop):
        super().__init__()
        self.hop = hop
        for name, stage in stages:
            self.add_module(name, stage)

    @property
    def period(self):
        """Audio frames after which a picture begins with a frame again."""
        return PERIOD // math.gcd(PERIOD, self.hop)

    @property
    def context_frames(self):
        """Audio frames to either side that an output frame depends on."""
        hearing = receptive_field(self) - receptive_field(self.visual)
        pictures = self.visual.receptive_field + 1  # and the one that follows
        return hearing + math.ceil(pictures * PERIOD / self.hop)

    def forward(self, x, pictures=None):
        """Map to [batch, outputs, frames].

        Arguments
        ---------
        x : torch.Tensor
            [batch, inputs, frames]; or joined with the pictures, as whatever
            scores or rounds a network gives it (see `lips.join`).
        pictures : torch.Tensor or None
            [batch, pictures, height, width]; None: joined.
        """
        if pictures is None:
            x, pictures = split(x, self.visual.size, self.hop)
        for name, stage in self.named_children():
            if name == "visual":
                lips = upsample(stage(pictures), x.shape[-1], self.hop)
            elif name == "fusion":
                x = stage(x, lips)
            else:
                x = stage(x)
        return x


def audio_visual_network(inputs, outputs, hop, visual, **size):
    """Build the mask network of Fig. 1 with a lip stream.

    Arguments
    ---------
    inputs, outputs : int
        Features and mask values per audio frame.
    hop : int
        Samples from one audio frame to the next.
    visual : dict
        Of a `VisualStream`; "factors" and "residual" of the fusion, and
        "after", the TCN block that it follows (1).
    **size : dict
        As for `mask_network`.
    """
    visual = dict(visual)
    after = visual.pop("after", 1)
    fusion = {k: visual.pop(k) for k in ("factors", "residual") if k in visual}
    stream = VisualStream(**visual)
    chain = mask_network(inputs, outputs, **size)
    stages = list(chain.named_children())
    ends = {  # where each TCN block ends
        block_place(name)[0]: number
        for number, (name, _) in enumerate(stages, 1)
        if block_place(name)
    }
    if after - 1 not in ends:
        raise ValueError(
            f"fusion after TCN block {after}: the network has {len(ends)}"
        )
    at, channels = ends[after - 1], chain.conv_in.out_channels
    lips = {
        "visual": stream,
        "fusion": FactorisedAttention(channels, stream.channels, **fusion),
    }
    return AudioVisualNetwork([*stages[:at], *lips.items(), *stages[at:]], hop)


def begin_with_audio_(network, audio_network):
    """Copy the weights of an audio-only network.

    The norms of the audio stages become the affine maps that the audio-only
    network has; those of the lip stream go on learning.
    """
    for name, stage in network.named_children():
        if name not in VISUAL_STAGES:
            fold_norms_(stage)
    own = network.state_dict()
    source = audio_network.state_dict()
    audio = {n for n in own if n.split(".")[0] not in VISUAL_STAGES}
    different = sorted(audio ^ set(source)) or sorted(
        name for name in audio if own[name].shape != source[name].shape
    )
    if different:
        raise ValueError(
            f"the audio-only network is of another size: {different[0]} "
            "differs; give both model files the same channels, hidden, "
            "blocks, layers and features"
        )
    network.load_state_dict(source, strict=False)
