"""SpeechBrain datasets of mixtures that are made when they are asked for."""

import numpy as np
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.data_pipeline import provides, takes

from .device_mixing import scene_of
from .mixtures import SAMPLE_RATE

DRY_KEYS = ["id", "voices", "scene", "doa"]
OUTPUT_KEYS = ["id", "mixture", "targets", "doa"]


def training_mixtures(maker, seconds, count=None, videos=None, dry=False):
    """Mixtures of a fixed length, both talkers being targets.

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

    @takes("id")
    @provides("voices", "scene", "doa")
    def place(key):
        drawn = maker.draw(key)
        yield torch.from_numpy(maker.voices(drawn).T.copy())
        yield scene_of(drawn)
        yield torch.tensor([drawn["doa_given"], drawn["doa_interferer"]])

    @takes("id")
    @provides("mixture", "targets", "doa")
    def render(key):
        drawn = maker.draw(key)
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
        drawn = maker.draw(key)
        spare = max(0, videos.samples(drawn) - samples)
        start = round(drawn["cut"] * spare)
        return torch.from_numpy(videos.render(drawn, start, samples))

    keys = sorted(maker.speech)[:count]
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
    """The mixtures of a list, at full length.

    Arguments
    ---------
    maker : MixtureMaker
    mixtures : dict
        From `mixtures.fixed_mixtures`.
    videos : LipVideos or None
        Of the same maker.

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
