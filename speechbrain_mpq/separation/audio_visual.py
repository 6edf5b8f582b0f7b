"""The mask network with a lip stream between its TCN blocks."""

import math
from collections import OrderedDict

import torch.nn as nn

from .fusion import FactorisedAttention
from .lips import PERIOD, split, upsample
from .tcn import fold_norms_, mask_network, reach
from .visual import VisualStream

VISUAL_STAGES = ("visual", "fusion")


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
        hearing = reach(self) - reach(self.visual)
        pictures = self.visual.reach + 1  # and the one that follows
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


def audio_visual_network(
    inputs,
    outputs,
    hop,
    visual,
    channels=256,
    hidden=512,
    kernel_size=3,
    blocks=4,
    layers=8,
    scale_inputs=False,
):
    """The mask network of Fig. 1 with a lip stream.

    Arguments
    ---------
    inputs, outputs, channels, hidden, kernel_size, blocks, layers : int
        See `tcn.mask_network`.
    hop : int
        Samples from one audio frame to the next.
    visual : dict
        Arguments of `VisualStream`, and of the fusion: "after", the number of
        TCN blocks before it (1), "factors" (10) and "residual" (False), see
        `FactorisedAttention`.
    scale_inputs : bool
        See `equalize_inputs_`.

    Returns
    -------
    network : AudioVisualNetwork
    """
    visual = dict(visual)
    after = visual.pop("after", 1)
    if not 1 <= after <= blocks:
        raise ValueError(
            f"fusion after TCN block {after}: the network has {blocks}"
        )
    fusion = {k: visual.pop(k) for k in ("factors", "residual") if k in visual}
    stream = VisualStream(**visual)
    chain = mask_network(
        inputs,
        outputs,
        channels,
        hidden,
        kernel_size,
        blocks,
        layers,
        scale_inputs,
    )
    stages = OrderedDict(chain.named_children())
    lips = {
        "visual": stream,
        "fusion": FactorisedAttention(channels, stream.channels, **fusion),
    }
    at = list(stages).index(f"tcn_{after - 1}_{layers - 1}") + 1
    ordered = list(stages.items())
    return AudioVisualNetwork(
        [*ordered[:at], *lips.items(), *ordered[at:]], hop
    )


def begin_with_audio_(network, audio_network):
    """Give an audio-visual network the weights of an audio-only one.

    The norms of the audio stages become the affine maps that the audio-only
    network has; those of the lip stream go on learning.

    Arguments
    ---------
    network : AudioVisualNetwork
        With new weights; changed in place.
    audio_network : torch.nn.Module
        From `tcn.mask_network`, trained, its norms folded.

    Example
    -------
    >>> visual = {"front_end": "light", "height": 8, "width": 8}
    >>> size = {"channels": 8, "hidden": 16, "blocks": 1, "layers": 1}
    >>> audio = mask_network(6, 4, **size)
    >>> _ = fold_norms_(audio)
    >>> network = audio_visual_network(6, 4, 256, visual, **size)
    >>> begin_with_audio_(network, audio)
    >>> bool((network.conv_in.weight == audio.conv_in.weight).all())
    True
    """
    for name, stage in network.named_children():
        if name not in VISUAL_STAGES:
            fold_norms_(stage)
    own = network.state_dict()
    given = audio_network.state_dict()
    audio = {n for n in own if n.split(".")[0] not in VISUAL_STAGES}
    different = sorted(audio ^ set(given)) or sorted(
        name for name in audio if own[name].shape != given[name].shape
    )
    if different:
        raise ValueError(
            f"the audio-only network is of another size: {different[0]} "
            "differs; give both model files the same channels, hidden, "
            "blocks, layers and features"
        )
    network.load_state_dict(given, strict=False)
