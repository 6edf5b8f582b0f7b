"""Networks and spectra on signals that come in pieces.

What comes out, put together, is what the whole signal gives. A convolution of
kernel k and dilation d needs d (k - 1) / 2 frames to either side:
`StatefulNetwork` lets each one keep what its next frames need, so that no
frame is computed twice. `WindowedNetwork` runs any network on windows that
overlap by as many frames as an output depends on, with no seams to fade over.

Layout: waveforms are [batch, samples, mics], spectra [batch, mics, bins,
frames], features and masks [batch, channels, frames].
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..lobes.models.spatial_features import overlap_add
from ..lobes.models.tcn import ChannelScale, ConvBlock, receptive_field

WINDOW_CONTEXTS = 6  # new frames of a window, in multiples of its context


def is_streamable(network):
    """Tell whether `StatefulNetwork` can run a network."""
    return isinstance(network, nn.Sequential) and all(
        isinstance(stage, ChannelScale | ConvBlock)
        or (isinstance(stage, nn.Conv1d) and stage.kernel_size == (1,))
        for stage in network
    )


class StatefulNetwork:
    """A chain of layers that remembers what its next frames need.

    Arguments
    ---------
    network : torch.nn.Sequential
        In eval mode; 1x1 convolutions, factors and ConvBlocks.

    Example
    -------
    >>> network = nn.Sequential(ConvBlock(4, 8, dilation=2)).eval()
    >>> streaming, inputs = StatefulNetwork(network), torch.randn(1, 4, 9)
    >>> first = streaming.push(inputs[..., :5])
    >>> rest = streaming.push(inputs[..., 5:], last=True)
    >>> first.shape[2], rest.shape[2]  # two frames wait for what follows
    (3, 6)
    """

    def __init__(self, network):
        self._stages = [
            _StatefulBlock(stage)
            if isinstance(stage, ConvBlock)
            else _Pointwise(stage)
            for stage in network
        ]

    def push(self, inputs, last=False):
        """Process frames, as far as their context is there.

        Arguments
        ---------
        inputs : torch.Tensor
            [batch, inputs, frames].

        Returns
        -------
        outputs : torch.Tensor
            [batch, outputs, frames]; frames may be 0.
        """
        for stage in self._stages:
            inputs = stage.push(inputs, last)
        return inputs


class _Pointwise:
    """A layer that sees one frame at a time."""

    def __init__(self, layer):
        self.layer = layer

    def push(self, x, last):
        """Apply to [batch, channels, frames]."""
        if x.shape[2]:
            return self.layer(x)
        channels = getattr(self.layer, "out_channels", x.shape[1])
        return x.new_zeros(len(x), channels, 0)


class _StatefulBlock:
    """A ConvBlock whose input comes in pieces."""

    def __init__(self, block):
        conv = block.d_conv
        self.block = block
        self.span = conv.dilation[0] * (conv.kernel_size[0] - 1)
        self.margin = conv.padding[0]
        self.kept = None  # inputs of the depthwise convolution
        self.skip = None  # inputs of the block, around it

    def push(self, x, last):
        """As `ConvBlock.forward`, on what has come so far."""
        block = self.block
        y = self._convolve(self._widen(x), last)
        skip = x if self.skip is None else torch.cat([self.skip, x], dim=2)
        passed = skip[..., : y.shape[2]]
        self.skip = skip[..., y.shape[2] :].clone()
        if not y.shape[2]:
            return passed
        y = block.norm_out(block.prelu_out(y))
        return passed + block.conv_1x1_out(y)

    def _widen(self, x):
        """What comes before the depthwise convolution."""
        block = self.block
        if not x.shape[2]:
            return x.new_zeros(len(x), block.d_conv.in_channels, 0)
        return block.norm_in(block.prelu_in(block.conv_1x1_in(x)))

    def _convolve(self, y, last):
        """The depthwise convolution, padded at the signal's ends only."""
        zeros = y.new_zeros(*y.shape[:2], self.margin)
        pieces = [zeros if self.kept is None else self.kept, y]
        y = torch.cat(pieces + [zeros] * last, dim=2)
        self.kept = y[..., max(0, y.shape[2] - self.span) :].clone()
        if y.shape[2] <= self.span:
            return y[..., :0]
        conv = self.block.d_conv
        return F.conv1d(
            y,
            conv.weight,
            conv.bias,
            dilation=conv.dilation,
            groups=conv.groups,
        )


class FrameAnalysis:
    """Spectra of a signal that comes in pieces of any length.

    Arguments
    ---------
    features : SpatialFeatures
        For its window and hop.

    Example
    -------
    >>> from speechbrain_mpq import SpatialFeatures
    >>> analysis = FrameAnalysis(SpatialFeatures())
    >>> analysis.push(torch.zeros(1, 500, 7)).shape  # the window reaches back
    torch.Size([1, 7, 257, 1])
    >>> analysis.push(torch.zeros(1, 524, 7), last=True).shape
    torch.Size([1, 7, 257, 4])
    """

    def __init__(self, features):
        self.features = features
        self._kept = None  # samples that a later frame needs

    def push(self, waveforms, last=False):
        """Analyse samples; return the frames that are complete.

        Arguments
        ---------
        waveforms : torch.Tensor
            [batch, samples, mics].

        Returns
        -------
        spectra : torch.Tensor
            [batch, mics, bins, frames], complex; frames may be 0.
        """
        n_fft, hop = self.features.n_fft, self.features.hop
        batch, _, mics = waveforms.shape
        margin = waveforms.new_zeros(batch, n_fft // 2, mics)
        kept = margin if self._kept is None else self._kept
        pieces = [kept, waveforms, margin] if last else [kept, waveforms]
        signal = torch.cat(pieces, dim=1)
        frames = max(0, (signal.shape[1] - n_fft) // hop + 1)
        self._kept = signal[:, frames * hop :].clone()
        if not frames:
            shape = batch, mics, self.features.bins, 0
            return waveforms.new_zeros(shape, dtype=torch.complex64)
        return self._stft(signal[:, : (frames - 1) * hop + n_fft])

    def _stft(self, signal):
        """Frames without padding at the ends."""
        batch, samples, mics = signal.shape
        flat = signal.transpose(1, 2).reshape(batch * mics, samples)
        spectra = self.features.frame_spectra(flat).transpose(1, 2)
        return spectra.view(batch, mics, *spectra.shape[1:])


class FrameSynthesis:
    """Waveform of spectra that come in pieces: overlap and add.

    Arguments
    ---------
    features : SpatialFeatures
        For its window and hop.

    Example
    -------
    >>> from speechbrain_mpq import SpatialFeatures
    >>> features, signal = SpatialFeatures(), torch.ones(1, 1000)
    >>> spectrum = features.stft(signal[..., None])[:, 0]
    >>> synthesis = FrameSynthesis(features)
    >>> pieces = [synthesis.push(spectrum), synthesis.finish(1000)]
    >>> [len(piece[0]) for piece in pieces]
    [768, 232]
    >>> torch.allclose(torch.cat(pieces, dim=1), signal, atol=1e-6)
    True
    """

    def __init__(self, features):
        self.features = features
        self._sums = None  # signal and window energy that later frames add to
        self._given = -(features.n_fft // 2)  # samples; the STFT padded first

    def push(self, spectrum):
        """Synthesise frames; return the samples that are complete.

        Arguments
        ---------
        spectrum : torch.Tensor
            [batch, bins, frames], complex.

        Returns
        -------
        waveform : torch.Tensor
            [batch, samples]; samples may be 0.
        """
        hop, frames = self.features.hop, spectrum.shape[2]
        if not frames:
            return spectrum.real.new_zeros(len(spectrum), 0)
        sums = self._overlap_add(spectrum)
        if self._sums is not None:
            kept = self._sums.shape[-1]
            sums[..., :kept] += self._sums
        self._sums = sums[..., frames * hop :].clone()
        return self._give(sums[..., : frames * hop])

    def finish(self, samples):
        """Return the rest, up to the length of the whole signal.

        Returns
        -------
        waveform : torch.Tensor
            [batch, samples].
        """
        return self._give(self._sums)[:, : samples - max(0, self._start)]

    def _overlap_add(self, spectrum):
        """[2, batch, samples]: frames times window, window squared."""
        window, hop = self.features.window, self.features.hop
        signal = torch.fft.irfft(spectrum.transpose(1, 2), n=len(window))
        signal = signal * window  # [batch, frames, n_fft]
        energy = window.square().expand_as(signal)
        return torch.stack([overlap_add(signal, hop), overlap_add(energy, hop)])

    def _give(self, sums):
        """Finished sums as samples, without those of the padding."""
        self._start = self._given
        self._given += sums.shape[-1]
        signal, energy = sums[..., max(0, -self._start) :]
        return signal / energy.clamp_min(torch.finfo(energy.dtype).tiny)


def context_frames(network) -> int:
    """Compute the receptive field of a network, to either side.

    Arguments
    ---------
    network : torch.nn.Module or callable
        A chain of convolutions, or anything with an attribute
        `context_frames`.

    Example
    -------
    >>> from speechbrain_mpq.lobes.models.tcn import mask_network
    >>> context_frames(mask_network(8, 4, 4, 4, blocks=4, layers=8))
    1020
    """
    if hasattr(network, "context_frames"):
        return network.context_frames
    modules = getattr(network, "modules", tuple)()
    if not any(isinstance(module, nn.Conv1d) for module in modules):
        raise ValueError(
            f"cannot tell how many frames {type(network).__name__} looks "
            "ahead: give it an attribute context_frames"
        )
    return receptive_field(network)


class WindowedNetwork:
    """Any network on frames that come in pieces, by windows that overlap.

    Arguments
    ---------
    network : callable
        Maps [batch, inputs, frames] to [batch, outputs, frames]. With an
        attribute `period` windows begin at multiples of so many frames.
    history : int or None
        Frames before the new ones that a window has; None: all that matter.
    look_ahead : int or None
        Frames behind them; None: all that matter. With fewer the network
        takes the future for silence, as at the end of a signal.
    step : int or None
        New frames of a window; None: six times the context, which costs a
        third more work than one window over all.

    Example
    -------
    >>> windowed = WindowedNetwork(nn.Conv1d(1, 1, 3, padding=1), step=4)
    >>> windowed.push(torch.zeros(1, 1, 6)).shape[2]  # 4, one looks ahead
    4
    >>> windowed.push(torch.zeros(1, 1, 0), last=True).shape[2]
    2
    """

    def __init__(self, network, history=None, look_ahead=None, step=None):
        self.network = network
        context = 0
        if None in (history, look_ahead):
            context = context_frames(network)
        period = getattr(network, "period", 1)

        def whole(frames):
            """So many frames or a few more: periods."""
            return -(-frames // period) * period

        self.history = whole(context if history is None else history)
        self.look_ahead = context if look_ahead is None else look_ahead
        self.step = whole(step or max(1, WINDOW_CONTEXTS * context))
        self._pieces = []  # history, then frames that are not done
        self._frames = 0  # in them
        self._done = 0  # frames of history in them

    def push(self, inputs, last=False):
        """Process frames; return those whose window is complete.

        Arguments
        ---------
        inputs : torch.Tensor
            [batch, inputs, frames].

        Returns
        -------
        outputs : torch.Tensor
            [batch, outputs, frames]; frames may be 0.
        """
        self._pieces.append(inputs)
        self._frames += inputs.shape[2]
        outputs = []
        while self._frames - self._done >= self.step + self.look_ahead:
            kept, end = self._joined(), self._done + self.step
            mask = self.network(kept[..., : end + self.look_ahead])
            outputs.append(mask[..., self._done : end])
            self._forget(kept, end)
        if last and self._frames > self._done:
            outputs.append(self.network(self._joined())[..., self._done :])
        if not outputs:
            return inputs[:, :0, :0]
        return torch.cat(outputs, dim=2)

    def _joined(self):
        """All pieces as one; only whole windows are worth the copy."""
        if len(self._pieces) > 1:
            self._pieces = [torch.cat(self._pieces, dim=2)]
        return self._pieces[0]

    def _forget(self, kept, end):
        """Drop what no later window needs."""
        self._done = min(self.history, end)
        # A copy: a view would keep the whole window in memory
        self._pieces = [kept[..., end - self._done :].clone()]
        self._frames = self._pieces[0].shape[2]


def in_pieces(network):
    """Choose the cheapest exact way to stream a network."""
    if is_streamable(network):
        return StatefulNetwork(network)
    return WindowedNetwork(network)
