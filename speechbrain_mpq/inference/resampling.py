"""Sampling-rate conversion of signals that come in pieces."""

import math

import torch

FILTER_ZEROS = 6  # of the low-pass filter, to either side
ROLLOFF = 0.99  # of half the lower rate


class BlockResampler:
    """`torchaudio.functional.resample` on pieces, without seams.

    Arguments
    ---------
    rate : int
        Of the input in Hz.
    new_rate : int
        Of the output in Hz.

    Example
    -------
    >>> resampler = BlockResampler(48000, 16000)
    >>> first = resampler.push(torch.ones(4800, 2))
    >>> rest = resampler.push(torch.ones(4800, 2), last=True)
    >>> len(first) + len(rest)
    3200
    """

    def __init__(self, rate, new_rate):
        common = math.gcd(rate, new_rate)
        self.up, self.down = new_rate // common, rate // common
        cutoff = min(self.up, self.down) * ROLLOFF
        width = math.ceil(FILTER_ZEROS * self.down / cutoff) + 1  # samples
        # Whole periods, so that every piece meets the same filter phases
        self.context = self.down * math.ceil(width / self.down)
        self._kept = None
        self._done = 0  # samples of `_kept` whose output has been given

    def push(self, signal, last=False):
        """Take samples, give those whose surroundings are known.

        Arguments
        ---------
        signal : torch.Tensor
            [samples, channels].
        last : bool
            The signal ends here.

        Returns
        -------
        resampled : torch.Tensor
            [samples, channels].
        """
        if self._kept is not None:
            signal = torch.cat([self._kept, signal])
        known = len(signal) - self.context
        end = len(signal) if last else known // self.down * self.down
        if end <= self._done:
            self._kept = signal
            return signal[:0]
        resampled = self._resample(signal)
        begin, stop = self._output(self._done), self._output(end)
        start = max(0, end - self.context)
        self._kept, self._done = signal[start:].clone(), end - start
        return resampled[begin:stop]

    def _output(self, samples):
        """Output samples of so many input samples."""
        return -(-samples * self.up // self.down)

    def _resample(self, signal):
        """A whole signal, [samples, channels]."""
        from torchaudio.functional import resample

        channels = resample(
            signal.T,
            self.down,
            self.up,
            lowpass_filter_width=FILTER_ZEROS,
            rolloff=ROLLOFF,
        )
        return channels.T.contiguous()
