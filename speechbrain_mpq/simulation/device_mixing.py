"""Mixtures made on the device that trains, from voices and a bank of rooms.

Convolving every channel is most of the work of a mixture: a loader that does
it starves a GPU. Here the loader reads, places and pads the voices, and the
device, which holds all impulse responses, does the rest. The mixtures are
those of `MixtureMaker.render`, up to rounding.
"""

import scipy.fft
import torch
from speechbrain.dataio.batch import PaddedData

from .mixing import PEAK

SCENE = ("room", "talker", "other", "sir", "mirrored", "cut")


def scene_of(mixture):
    """What a device has to know of a drawn mixture, beside the voices.

    Arguments
    ---------
    mixture : dict
        From `MixtureMaker.draw`.

    Returns
    -------
    scene : torch.Tensor
        [6], float64, as named in `SCENE`.
    """
    room, talkers = mixture["room"], mixture["talkers"]
    rest = [mixture[name] for name in SCENE[3:]]
    return torch.tensor([room, *talkers, *rest], dtype=torch.float64)


def mix_batch_(mixer, batch, device):
    """Give a batch of voices its mixtures and targets.

    Arguments
    ---------
    mixer : DeviceMixer
    batch : speechbrain.dataio.batch.PaddedBatch
        With "voices" and "scene" (see `datasets.training_mixtures`);
        "mixture" and "targets" are added.
    device : str or torch.device
    """
    voices, shares = batch.voices
    lengths = (shares * voices.shape[1]).round().long()
    mixed = mixer(*(t.to(device) for t in (voices, lengths, batch.scene.data)))
    for name, signals in zip(("mixture", "targets"), mixed):
        setattr(batch, name, PaddedData(signals, torch.ones(len(signals))))


class DeviceMixer(torch.nn.Module):
    """Convolves and adds up batches of two voices each.

    Arguments
    ---------
    rooms : RoomBank
        Its responses are held in half precision, as on disk, and as long as
        the longest: 1,500 rooms with 7 microphones take 1 GB.
    seconds : float
        Length of the mixtures: longer ones are cut where they say, shorter
        ones padded.

    Example
    -------
    >>> mixer = DeviceMixer(rooms, seconds=3.0).to("cuda")  # doctest: +SKIP
    >>> mixture, targets = mixer(voices, lengths, scenes)  # doctest: +SKIP
    """

    def __init__(self, rooms, seconds):
        super().__init__()
        self.samples = int(seconds * 16000)
        talkers = [range(len(doa)) for doa in rooms.doa]
        parts = [
            torch.from_numpy(rooms.rirs(room, who)).half()
            for room, who in enumerate(talkers)
        ]
        taps = max(part.shape[2] for part in parts)
        shape = len(parts), max(map(len, talkers)), parts[0].shape[1], taps
        responses = torch.zeros(shape, dtype=torch.float16)
        for whole, part in zip(responses, parts):
            whole[: len(part), :, : part.shape[2]] = part
        self.register_buffer("responses", responses, persistent=False)

    @torch.no_grad()
    def forward(self, voices, lengths, scenes):
        """Mix a batch.

        Arguments
        ---------
        voices : torch.Tensor
            [batch, samples, 2], target and interferer where they begin, zeros
            behind each mixture's own length.
        lengths : torch.Tensor
            [batch], samples of each mixture.
        scenes : torch.Tensor
            [batch, 6], see `scene_of`.

        Returns
        -------
        mixture : torch.Tensor
            [batch, samples, mics].
        targets : torch.Tensor
            [batch, samples, 2]: both talkers at the reference microphone.
        """
        longest = voices.shape[1]
        talking = torch.arange(longest, device=voices.device) < lengths[:, None]
        room, *talkers = scenes[:, :3].long().T
        sir, mirrored, cut = scenes[:, 3:].T
        rirs = self.responses[room[:, None], torch.stack(talkers, 1)].float()
        flipped = (mirrored > 0)[:, None, None, None]
        rirs = torch.where(flipped, rirs.flip(2), rirs)  # [B, 2, mics, taps]

        n_fft = scipy.fft.next_fast_len(longest + rirs.shape[3], real=True)
        dry = torch.fft.rfft(voices.transpose(1, 2), n_fft)  # [B, 2, bins]
        spectra = dry[:, :, None] * torch.fft.rfft(rirs, n_fft)
        heard = torch.fft.irfft(spectra[:, :, 0], n_fft)[..., :longest]
        heard = heard * talking[:, None]  # [B, 2, samples], at the reference
        target, interferer = heard.square().sum(2).unbind(1)
        gain = (target / interferer.clamp_min(1e-12)).sqrt()
        gain = gain * 10 ** (-sir.float() / 20)
        total = spectra[:, 0] + gain[:, None, None] * spectra[:, 1]
        mixture = torch.fft.irfft(total, n_fft)[..., :longest]
        mixture = mixture * talking[:, None]  # [B, mics, samples]

        peak = mixture.abs().amax((1, 2)).clamp_min(1e-12)
        scale = (PEAK / peak)[:, None, None]
        gains = torch.stack([torch.ones_like(gain), gain], 1)[..., None]
        start = (cut * (lengths - self.samples).clamp_min(0)).round().long()
        return (
            self._cut(mixture * scale, start),
            self._cut(heard * gains * scale, start),
        )

    def _cut(self, signals, start):
        """[batch, samples, channels] of [batch, channels, longest]."""
        missing = max(0, self.samples - signals.shape[2])
        signals = torch.nn.functional.pad(signals, (0, missing))
        index = start[:, None] + torch.arange(
            self.samples, device=signals.device
        )
        index = index[:, None].expand(-1, signals.shape[1], -1)
        return signals.gather(2, index).transpose(1, 2)
