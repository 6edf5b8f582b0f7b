"""The separator as a front end: several microphones in, one channel out."""

import torch.nn as nn

from .separator import MIN_RMS, Separator, build_separator


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
