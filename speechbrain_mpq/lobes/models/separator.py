"""The multichannel separator: waveforms and a direction in, one talker out.

It may stand before a recognizer's features, as a front end.
"""

from pathlib import Path

import torch
import torch.nn as nn
from hyperpyyaml import load_hyperpyyaml

from .audio_visual import audio_visual_network
from .lips import as_grey, fit_pictures, frame_of_pictures, join
from .tcn import mask_network

MIN_RMS = 1e-6  # full scale = 1; below this the reference channel is silent


class Separator(nn.Module):
    """Complex-mask separator of Fig. 2: features, TCN, mask, inverse STFT.

    Arguments
    ---------
    features : SpatialFeatures
        Front end; it knows the array.
    channels, hidden, kernel_size, blocks, layers : int
        Size of the TCN, see `tcn.mask_network`.
    scale_inputs : bool
        Begin with a factor for each input: the form that
        `tcn.equalize_inputs_` gives it.
    visual : dict or None
        Settings of a lip stream, see `audio_visual_network`; None: audio
        only.

    Example
    -------
    >>> from speechbrain_mpq import SpatialFeatures
    >>> separator = Separator(SpatialFeatures(), channels=16, hidden=32)
    >>> mixture = torch.randn(2, 16000, 7)
    >>> separator(mixture, torch.tensor([30.0, 120.0])).shape
    torch.Size([2, 16000])
    """

    def __init__(
        self,
        features,
        channels=256,
        hidden=512,
        kernel_size=3,
        blocks=4,
        layers=8,
        scale_inputs=False,
        visual=None,
    ):
        super().__init__()
        self.settings = {  # what builds it again, the features aside
            "channels": channels,
            "hidden": hidden,
            "kernel_size": kernel_size,
            "blocks": blocks,
            "layers": layers,
            "visual": visual,
        }
        self.features = features
        ends = features.inputs, 2 * features.bins
        size = {k: v for k, v in self.settings.items() if k != "visual"}
        size["scale_inputs"] = scale_inputs
        if visual is None:
            self.mask_net = mask_network(*ends, **size)
        else:
            self.mask_net = audio_visual_network(
                *ends, features.hop, visual, **size
            )

    @property
    def lips_size(self):
        """Height and width of a picture of the lips; None: audio only."""
        visual = getattr(self.mask_net, "visual", None)
        return None if visual is None else visual.size

    def forward(self, waveforms, doa, lips=None):
        """Separate the talkers at `doa`.

        Arguments
        ---------
        waveforms : torch.Tensor
            [batch, samples, mics], 16 kHz; the channels are
            `features.microphones`, reference first.
        doa : torch.Tensor
            [batch] or [batch, targets], degrees from the array's axis; or
            [batch, targets, frames] for talkers who move: one for each frame
            of the spectrogram, samples // hop + 1.
        lips : torch.Tensor or None
            [batch, pictures, height, width] or [batch, targets, pictures,
            height, width] as `doa`: the mouths at 25 pictures a second, uint8
            or 0 to 1; zeros, or None for all: no picture. See
            `lips.fit_pictures` for videos of another length.

        Returns
        -------
        estimate : torch.Tensor
            [batch, samples] or [batch, targets, samples], at the level that
            the talker has in the reference channel.
        """
        inputs, reference = self._analyse(waveforms, doa, lips)
        mask = self.mask_net(*inputs)  # [B * K, 2 * bins, frames]
        estimate = apply_mask(mask, reference)  # [B * K, bins, frames]
        samples = waveforms.shape[1]
        signal = self.features.istft(estimate, samples)
        signal = signal.view(len(doa), -1, samples)  # [B, K, samples]
        signal = match_level(signal, waveforms[:, None, :, 0])
        return signal.view(*doa.shape[:2], samples)

    def analyse(self, waveforms, doa, lips=None):
        """Analyse a mixture: everything in front of the mask network.

        Arguments
        ---------
        waveforms : torch.Tensor
            [batch, samples, mics].
        doa : torch.Tensor
            [batch], [batch, targets] or [batch, targets, frames], degrees.
        lips : torch.Tensor or None
            As `forward` takes them.

        Returns
        -------
        inputs : torch.Tensor
            [batch * targets, inputs, frames]; with a lip stream, the pixels
            stand below them (see `lips.join`).
        reference : torch.Tensor
            [batch * targets, bins, frames], complex spectrum of the reference
            channel at unit RMS.
        """
        inputs, reference = self._analyse(waveforms, doa, lips)
        if self.lips_size is None:
            return inputs[0], reference
        return join(*inputs, self.features.hop), reference

    def _analyse(self, waveforms, doa, lips):
        """As `analyse`, features and pictures apart: no copy of them."""
        self._check(waveforms, doa)
        self.check_lips(lips, doa)
        if doa.dim() == 1:
            doa = doa[:, None]  # [B, K]
        level = waveforms[..., 0].square().mean(1, keepdim=True).sqrt()
        level = level.clamp_min(MIN_RMS)  # [B, 1]
        features, reference = self.features.analyse(waveforms, level, doa)
        inputs = [features.flatten(0, 1)]
        if self.lips_size is not None:
            inputs.append(self._pictures(inputs[0], lips))
        return inputs, reference.repeat_interleave(doa.shape[1], dim=0)

    def _pictures(self, inputs, lips):
        """One picture for each that the frames last, or its absence."""
        frames, hop = inputs.shape[-1], self.features.hop
        pictures = len(frame_of_pictures(frames, hop))
        if lips is None:
            return inputs.new_zeros(len(inputs), pictures, *self.lips_size)
        lips = as_grey(lips).to(inputs)
        lips = lips.reshape(len(inputs), *lips.shape[-3:])
        return fit_pictures(lips, pictures)

    def check_lips(self, lips, doa):
        """Raise ValueError on lips that do not fit the model or the DOAs.

        Arguments
        ---------
        lips : torch.Tensor or None
            [batch, targets, pictures, height, width], or without targets as
            `doa`.
        doa : torch.Tensor
            [batch], [batch, targets] or [batch, targets, frames].
        """
        if lips is None:
            return
        if self.lips_size is None:
            raise ValueError(
                "this separator has no lip stream: leave lips out, or build "
                "it with `visual` (hparams/models/separator_av_mini.yaml)"
            )
        expected = [*doa.shape[:2], "pictures", *self.lips_size]
        shape = list(lips.shape)
        if len(shape) != len(expected) or any(
            isinstance(e, int) and e != f for e, f in zip(expected, shape)
        ):
            raise ValueError(
                f"expected lips {expected} for DOAs {list(doa.shape)}, got "
                f"{shape}: pictures of {self.lips_size[0]} x "
                f"{self.lips_size[1]} pixels, by vision.video, for each target"
            )

    def _check(self, waveforms, doa):
        """Raise ValueError on input that would give a wrong answer."""
        microphones = self.features.microphones
        if waveforms.dim() != 3 or waveforms.shape[2] != len(microphones):
            raise ValueError(
                f"expected waveforms [batch, samples, {len(microphones)}] of "
                f"microphones {microphones}, got {list(waveforms.shape)}"
            )
        if doa.dim() not in (1, 2, 3) or len(doa) != len(waveforms):
            raise ValueError(
                f"expected DOAs [{len(waveforms)}], [{len(waveforms)}, "
                f"targets] or [{len(waveforms)}, targets, frames], got shape "
                f"{list(doa.shape)}"
            )
        if waveforms.shape[1] < self.features.n_fft:
            raise ValueError(
                f"{waveforms.shape[1]} samples are shorter than one window of "
                f"{self.features.n_fft}"
            )
        # NaN stays in a sum, which is fast; of huge samples it may overflow
        if (
            not waveforms.sum().isfinite()
            and not torch.isfinite(torch.stack(waveforms.aminmax())).all()
        ):
            raise ValueError("waveforms hold NaN or infinite samples")


def apply_mask(mask, reference):
    """Apply the complex mask to the reference channel (Eq. 4).

    Arguments
    ---------
    mask : torch.Tensor
        [batch, 2 * bins, frames], real parts then imaginary parts.
    reference : torch.Tensor
        [batch, bins, frames], complex.

    Returns
    -------
    estimate : torch.Tensor
        [batch, bins, frames], complex.
    """
    real, imag = mask.chunk(2, dim=1)
    return torch.complex(real.float(), imag.float()) * reference


def match_level(estimate, mixture):
    """Scale an estimate to the level that it has in the mixture.

    SI-SNR leaves the level of the output open. As talkers are uncorrelated,
    the scale that explains most of the mixture is the talker's own.

    Arguments
    ---------
    estimate : torch.Tensor
        [..., samples], of any level.
    mixture : torch.Tensor
        [..., samples], reference channel.
    """
    common = (estimate * mixture).sum(-1, keepdim=True)
    energy = estimate.square().sum(-1, keepdim=True)
    return estimate * matching_gain(common, energy)


def matching_gain(common, energy):
    """Compute the gain of `match_level` from sums over the samples."""
    return common / energy.clamp_min(1e-12)


def build_separator(path, **overrides) -> Separator:
    """Build the separator that a YAML file describes.

    Arguments
    ---------
    path : str or Path
        YAML file with a key `separator`, such as
        hparams/models/separator_mini.yaml.
    **overrides
        Keys of that file to change.

    Example
    -------
    >>> path = "hparams/models/separator_mini.yaml"
    >>> build_separator(path, channels=16, hidden=32).mask_net.conv_in
    Conv1d(3598, 16, kernel_size=(1,), stride=(1,))
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"no model file {path}: name one such as "
            "hparams/models/separator_mini.yaml with --separator_file"
        )
    with open(path, encoding="utf-8") as source:
        hparams = load_hyperpyyaml(source, overrides)
    separator = hparams.get("separator")
    if not isinstance(separator, Separator):
        raise ValueError(f"{path} has no key `separator: !new:...Separator`")
    return separator


class SeparatorFrontEnd(nn.Module):
    """What a recognizer listens through: put it before any features.

    Level: the separator works at unit level inside and gives every talker the
    level that it has in the first microphone, so that what a recognizer was
    trained on (features, normalization) stays as it is. With `rms` every
    utterance is brought to one level instead, for recognizers that expect one.

    Arguments
    ---------
    separator : Separator or str or Path
        A separator, from `load_separator` for one that is trained already; or
        a YAML file that describes one, which then has new weights.
    frozen : bool
        The weights get no gradient, and the separator stays in eval mode
        whatever the mode of the model around it.
    rms : float or None
        Level of the output, full scale being 1. None: that of the talker in
        the first microphone.

    Example
    -------
    >>> import torch
    >>> from .spatial_features import SpatialFeatures
    >>> separator = Separator(SpatialFeatures(), channels=4, hidden=8)
    >>> front_end = SeparatorFrontEnd(separator, rms=0.05)
    >>> waveforms = torch.randn(2, 16000, 7)
    >>> speech = front_end(waveforms, torch.tensor([30.0, 120.0]))
    >>> speech.shape, round(speech[1].std().item(), 3)
    (torch.Size([2, 16000]), 0.05)
    >>> half = front_end(
    ...     waveforms, torch.tensor([30.0, 120.0]), torch.tensor([1.0, 0.5])
    ... )
    >>> half[1, 8000:].abs().max().item()
    0.0
    """

    def __init__(self, separator, frozen=True, rms=None):
        super().__init__()
        if not isinstance(separator, nn.Module):
            separator = build_separator(separator)
        if not isinstance(separator, Separator):
            raise TypeError(
                f"a front end needs a Separator, not a "
                f"{type(separator).__name__}: name a YAML file that builds "
                "one, or give it the result of load_separator"
            )
        if rms is not None and not rms > 0:
            raise ValueError(f"rms must be above 0 or null, not {rms!r}")
        self.separator = separator
        self.frozen = frozen
        self.rms = rms
        if frozen:
            separator.requires_grad_(False)
            separator.eval()

    @property
    def microphones(self):
        """Numbers of the microphones that the channels must come from."""
        return self.separator.features.microphones

    def forward(self, waveforms, doa, lengths=None):
        """Separate one talker from every item of a batch.

        Arguments
        ---------
        waveforms : torch.Tensor
            [batch, samples, mics], 16 kHz, reference microphone first.
        doa : torch.Tensor
            [batch], degrees from the array's axis.
        lengths : torch.Tensor or None
            [batch], what share of `samples` is no padding, as SpeechBrain's
            batches have it. Each item is then separated without its padding:
            the result does not depend on what else is in the batch. Items of
            one length go together.

        Returns
        -------
        speech : torch.Tensor
            [batch, samples], zero where there was padding.
        """
        if doa.shape != waveforms.shape[:1]:
            raise ValueError(
                f"expected one direction for each of {len(waveforms)} items, "
                f"got shape {list(doa.shape)}"
            )
        if lengths is None:
            return self._separated(waveforms, doa)
        samples = waveforms.shape[1]
        valid = (lengths * samples).round().long().to(waveforms.device)
        speech = waveforms.new_zeros(len(waveforms), samples)
        for length in valid.unique().tolist():
            items = valid == length
            cut = self._separated(waveforms[items, :length], doa[items])
            speech[items, :length] = cut.to(speech.dtype)
        return speech

    def _separated(self, waveforms, doa):
        """Items without padding, at the level that was asked for."""
        speech = self.separator(waveforms, doa)  # [batch, samples]
        if self.rms is None:
            return speech
        level = speech.square().mean(1, keepdim=True).sqrt()
        return speech * (self.rms / level.clamp_min(MIN_RMS))

    def train(self, mode=True):
        """Train or evaluate; a frozen separator goes on evaluating."""
        super().train(mode)
        if self.frozen:
            self.separator.eval()
        return self
