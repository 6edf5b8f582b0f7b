"""Make datasets of mixtures, as an experiment's hparams file asks for them.

Mixtures are made when they are asked for. Convolving every channel is most of
the work: a loader that does it starves a GPU. So the loader may read, place
and pad the voices only, and the device, which holds all impulse responses,
does the rest; its mixtures are those of `MixtureMaker.render`, up to rounding.
"""

import sys

import numpy as np
import scipy.fft
import torch
from speechbrain.dataio.batch import PaddedData
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.data_pipeline import provides, takes
from speechbrain.utils.logger import get_logger

from ..lobes.models.spatial_features import linear_array
from ..utils import SAMPLE_RATE
from .lip_videos import videos_of_splits
from .mixtures import (
    PEAK,
    MixtureMaker,
    fixed_mixtures,
    load_corpora,
    load_speech,
)
from .rooms import RoomBank, prepare_rooms

SCENE = ("room", "talker", "other", "sir", "mirrored", "cut")


def _scene_of(mixture):
    """What a device has to know of a drawn mixture, beside the voices."""
    room, talkers = mixture["room"], mixture["talkers"]
    rest = [mixture[name] for name in SCENE[3:]]
    return torch.tensor([room, *talkers, *rest], dtype=torch.float64)


def mix_batch_(mixer, batch, device):
    """Mix a batch of voices in place."""
    voices, shares = batch.voices
    lengths = (shares * voices.shape[1]).round().long()
    mixed = mixer(*(t.to(device) for t in (voices, lengths, batch.scene.data)))
    for name, signals in zip(("mixture", "targets"), mixed):
        setattr(batch, name, PaddedData(signals, torch.ones(len(signals))))


class DeviceMixer(torch.nn.Module):
    """Convolve and add up batches of two voices each, on one device.

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
            [batch, 6], see `_scene_of`.

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
        reverberant = torch.fft.irfft(spectra[:, :, 0], n_fft)[..., :longest]
        reverberant = (
            reverberant * talking[:, None]
        )  # [B, 2, samples], at the reference
        target, interferer = reverberant.square().sum(2).unbind(1)
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
            self._cut(reverberant * gains * scale, start),
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


DRY_KEYS = ["id", "voices", "scene", "doa"]
OUTPUT_KEYS = ["id", "mixture", "targets", "doa"]


def training_mixtures(maker, seconds, count=None, videos=None, dry=False):
    """Make a dataset of mixtures of a fixed length, both talkers targets.

    What is drawn depends on `maker.epoch`; set it before the loader of an
    epoch is started.

    Arguments
    ---------
    maker : MixtureMaker
    seconds : float
        Length: longer mixtures are cut at random, shorter ones padded.
    count : int or None
        Mixtures per epoch; None: one for each utterance.
    videos : LipVideos or None
        Of the same maker.
    dry : bool
        Leave the mixing to a `DeviceMixer`.

    Returns
    -------
    dataset : DynamicItemDataset
        "mixture" [samples, mics], "targets" [samples, 2], "doa" [2]; with
        videos "lips" [2, pictures, height, width], uint8. If dry, "voices"
        [samples of the whole mixture, 2] and "scene" instead of the first
        two.
    """
    samples = int(seconds * SAMPLE_RATE)
    mixed = maker.shares is not None  # targets are drawn, corpus by share

    def draw(key):
        if not mixed:
            return maker.draw(key)
        return maker.draw(maker.draw_target(key), key=key)

    @takes("id")
    @provides("voices", "scene", "doa")
    def place(key):
        drawn = draw(key)
        yield torch.from_numpy(maker.voices(drawn).T.copy())
        yield _scene_of(drawn)
        yield torch.tensor([drawn["doa_given"], drawn["doa_interferer"]])

    @takes("id")
    @provides("mixture", "targets", "doa")
    def render(key):
        drawn = draw(key)
        signals = maker.render(drawn)
        targets = np.stack([signals["target"], signals["interferer"]], axis=1)
        spare = max(0, len(targets) - samples)
        start = round(drawn["cut"] * spare)
        yield _fit(signals["mixture"], start, samples)
        yield _fit(targets, start, samples)
        yield torch.tensor([drawn["doa_given"], drawn["doa_interferer"]])

    @takes("id")
    @provides("lips")
    def show(key):
        drawn = draw(key)
        spare = max(0, videos.samples(drawn) - samples)
        start = round(drawn["cut"] * spare)
        return torch.from_numpy(videos.render(drawn, start, samples))

    keys = sorted(maker.speech)[:count]
    if mixed:
        keys = [f"mixture_{i}" for i in range(count or len(maker.speech))]
    if count is not None and len(keys) < count:
        raise ValueError(
            f"{count} mixtures per epoch asked for, the manifest has "
            f"{len(keys)} utterances"
        )
    data = {key: {} for key in keys}
    if dry:
        return _dataset(data, place, DRY_KEYS, videos and show)
    return _dataset(data, render, OUTPUT_KEYS, videos and show)


def listed_mixtures(maker, mixtures, videos=None):
    """Make a dataset of listed mixtures, at full length.

    Returns
    -------
    dataset : DynamicItemDataset
        "mixture" [samples, mics], "targets" [samples, 1], "doa" [1], "drawn";
        with videos "lips" [1, pictures, height, width], uint8.
    """

    @takes("drawn")
    @provides("mixture", "targets", "doa")
    def render(drawn):
        signals = maker.render(drawn)
        yield torch.from_numpy(signals["mixture"])
        yield torch.from_numpy(signals["target"])[:, None]
        yield torch.tensor([drawn["doa_given"]])

    @takes("drawn")
    @provides("lips")
    def show(drawn):
        return torch.from_numpy(videos.render(drawn)[:1])

    data = {key: {"drawn": drawn} for key, drawn in mixtures.items()}
    return _dataset(data, render, [*OUTPUT_KEYS, "drawn"], videos and show)


def _dataset(data, render, keys, show):
    """Dataset of what `render` provides and, where given, `show`."""
    if not show:
        return DynamicItemDataset(data, [render], keys)
    return DynamicItemDataset(data, [render, show], [*keys, "lips"])


def _fit(signal, start, samples):
    """Cut or zero-pad [samples, channels] to a length."""
    signal = torch.from_numpy(np.ascontiguousarray(signal[start:][:samples]))
    return torch.nn.functional.pad(signal, (0, 0, 0, samples - len(signal)))


logger = get_logger(__name__)


def prepare_data(hparams):
    """Synthesize the corpus and simulate the rooms, where missing."""
    folder, seed = hparams["data_folder"], hparams["corpus_seed"]
    show = sys.stderr.isatty()
    if not hparams["skip_prep"]:
        from .corpus import prepare_speech

        counts = hparams["utterances"]
        prepare_speech(folder, **counts, seed=seed, progress=show)
    prepare_rooms(
        folder,
        hparams["rooms"],
        hparams["microphones"],
        seed,
        progress=show,
        positions=hparams.get("array_positions"),
    )


def _is_symmetric(positions, microphones):
    """Whether a linear array's used microphones look alike from both ends."""
    if positions is None:
        positions = linear_array()
    used = np.asarray(positions)[np.array(microphones) - 1]
    return used.ndim == 1 and np.allclose(used + used[::-1], used[0] + used[-1])


def dataio_prep(hparams):
    """Make the datasets of the three splits."""
    folder = hparams["data_folder"]
    positions = hparams.get("array_positions")
    planar = positions is not None and positions.ndim == 2
    symmetric = _is_symmetric(positions, hparams["microphones"])
    makers = {}
    for split, count in hparams["rooms"].items():
        training = split == "train"
        shares = hparams.get("train_corpora", {}) if split != "test" else {}
        shares = {folder: share for folder, share in shares.items() if share}
        speech = (
            load_corpora(shares, split)
            if shares
            else load_speech(hparams[f"{split}_speech"], folder)
        )
        makers[split] = MixtureMaker(
            speech,
            RoomBank(folder, split, count),
            seed=hparams["seed" if training else "corpus_seed"],
            doa_error=hparams["doa_error"],
            mirror=training and symmetric,
            planar=planar,
            augmentation=hparams.get("augmentation") if training else None,
            shares=shares or None,
        )
    nominal, measured = makers["test"].rooms.mean_t60()
    logger.info(
        f"Test rooms: T60 {nominal:.2f} s asked for, {measured:.2f} s measured"
    )
    videos = videos_of_splits(makers, hparams.get("lips_size"))
    datasets = {
        split: listed_mixtures(
            makers[split],
            fixed_mixtures(makers[split], hparams["mixtures"][split]),
            videos[split],
        )
        for split in ("valid", "test")
    }
    datasets |= {
        name: training_mixtures(
            makers["train"],
            hparams["chunk_seconds"],
            hparams["mixtures"]["train"],
            videos["train"],
            dry=name == "voices",
        )
        for name in ("train", "voices")
    }
    return datasets, makers["train"]


def device_mixer(hparams, rooms, device):
    """Make the mixer of a device; None where the loader mixes."""
    on_device = hparams["mix_on_device"]
    if hparams.get("augmentation"):  # the loader's work, whatever mixes
        on_device = False
    if on_device is None:
        on_device = torch.device(device).type == "cuda"
    if not on_device:
        return None
    logger.info(f"Mixtures for the training are made on {device}")
    return DeviceMixer(rooms, hparams["chunk_seconds"]).to(device)
