"""Draw and render mixtures of two talkers in a room.

A mixture is first drawn as a small dict (who, where, how loud, how much
overlap), then rendered from utterances and impulse responses. The draw depends
on (seed, epoch, key) alone: an epoch can be repeated exactly, and every epoch
is different.
"""

from pathlib import Path

import numpy as np
import scipy.fft
import soundfile

from ..utils import (
    BUCKETS,
    SAMPLE_RATE,
    read_text,
    refuse_parts,
    strict_json,
)
from .noise import draw_by
from .rooms import angle_between

PEAK = 0.9  # full scale = 1


def place(lengths, overlap, target_first):
    """Place two utterances so that the shorter one is overlapped by a share.

    Arguments
    ---------
    lengths : (int, int)
        Samples of target and interferer.
    overlap : float
        Share of the shorter utterance during which both talk.
    target_first : bool
        Who starts.

    Returns
    -------
    offsets : (int, int)
        First sample of target and interferer.

    Example
    -------
    >>> place((100, 60), overlap=0.5, target_first=True)
    (0, 70)
    >>> place((100, 60), overlap=0.5, target_first=False)
    (30, 0)
    """
    target, interferer = lengths
    common = round(overlap * min(lengths))
    if target_first:
        return 0, target - common
    return interferer - common, 0


def _at_offsets(voices, offsets):
    """Voices [2, samples] in one array, each where it begins."""
    samples = max(o + len(v) for o, v in zip(offsets, voices))
    placed = np.zeros((len(voices), samples), np.float32)
    for row, offset, voice in zip(placed, offsets, voices):
        row[offset : offset + len(voice)] = voice
    return placed


def mix(voices, rirs, sir, ratios=(), response=None):
    """Convolve two voices with their impulse responses and add them up.

    Arguments
    ---------
    voices : numpy.ndarray
        Target, interferer and further sources, [sources, samples], each where
        it begins.
    rirs : numpy.ndarray
        [sources, mics, taps].
    sir : float
        Signal-to-interference ratio at the reference microphone in dB, over
        the reverberant signals.
    ratios : sequence of float
        The same of target and each further source.
    response : (numpy.ndarray, numpy.ndarray) or None
        Complex gain and offset of each microphone, [mics]; the offset is of
        the mixture's highest sample.

    Returns
    -------
    signals : dict
        "mixture" [samples, mics], "target", "interferer" [samples], float32,
        scaled together so that no sample exceeds 0.9.

    Example
    -------
    >>> clicks = np.eye(2, dtype=np.float32)  # one after the other
    >>> rirs = np.ones((2, 3, 1), np.float32)
    >>> signals = mix(clicks, rirs, sir=0.0)
    >>> signals["mixture"].shape, f"{signals['target'][0]:.2f}"
    ((2, 3), '0.90')
    """
    samples = voices.shape[1]
    n_fft = scipy.fft.next_fast_len(samples + rirs.shape[2], real=True)
    dry = scipy.fft.rfft(voices[:, None], n_fft)
    spectra = dry * scipy.fft.rfft(rirs, n_fft)
    target, *others = scipy.fft.irfft(spectra[:, 0], n_fft)[:, :samples]
    total = spectra[0]
    gains = []
    for spectrum, other, decibels in zip(
        spectra[1:], others, (sir, *ratios), strict=True
    ):
        ratio = np.sum(target**2) / max(np.sum(other**2), 1e-12)
        gains.append(np.float32(np.sqrt(ratio * 10 ** (-decibels / 10))))
        total = total + gains[-1] * spectrum
    if response is not None:
        total = total * response[0][:, None]
    mixture = scipy.fft.irfft(total, n_fft)[:, :samples]
    if response is not None:
        offset = response[1] * np.abs(mixture).max()
        mixture = mixture + offset[:, None].astype(np.float32)
    scale = np.float32(PEAK / max(np.abs(mixture).max(), 1e-12))
    return {
        "mixture": np.ascontiguousarray(mixture.T) * scale,
        "target": target * scale,
        "interferer": others[0] * (gains[0] * scale),
    }


SIRS = (-6.0, 0.0, 6.0)  # dB
OVERLAP = (0.6, 1.0)  # of the shorter utterance
MIN_SAMPLES = 512  # one window of the separator


class MixtureMaker:
    """Draw and render mixtures of one split.

    Arguments
    ---------
    speech : dict
        Manifest of utterances (see `corpus.prepare_speech`), with absolute
        "wav" paths, "length", "words" and "speaker".
    rooms : RoomBank
        Impulse responses of the split.
    seed : int
    doa_error : float
        Standard deviation in degrees of the error with which the target's
        direction is known, as a camera would make. 0: exact.
    mirror : bool
        Augmentation: look at half of the scenes from the other end of the
        array (it must be linear, its microphones placed symmetrically).
    planar : bool
        Whether DOAs are those of a planar array, 0 to 360 degrees.
    augmentation : Augmentation or None
        What else is varied, for training.
    shares : dict or None
        Start of an utterance's id -> share of the targets, for corpora that
        are mixed (see `load_corpora`); None: every utterance alike.

    Example
    -------
    >>> maker = MixtureMaker(speech, rooms)  # doctest: +SKIP
    >>> mixture = maker.draw("utterance_0")  # doctest: +SKIP
    >>> signals = maker.render(mixture)  # doctest: +SKIP
    """

    def __init__(
        self,
        speech,
        rooms,
        seed=1234,
        doa_error=0.0,
        mirror=False,
        planar=False,
        augmentation=None,
        shares=None,
    ):
        if mirror and planar:
            raise ValueError("only linear arrays have a mirror image")
        self.planar = planar
        self.speech = speech
        self.rooms = rooms
        self.seed = seed
        self.doa_error = doa_error
        self.mirror = mirror
        self.augmentation = augmentation
        self.shares = shares
        self.epoch = 0
        self._ids = sorted(speech)
        self._corpora = shares and _by_corpus(self._ids, shares)
        self._pairs = [rooms.pairs(bucket) for bucket in BUCKETS]
        if len({entry["speaker"] for entry in speech.values()}) < 2:
            raise ValueError("mixtures need utterances of two speakers")
        for bucket, pairs in zip(BUCKETS, self._pairs):
            if not pairs:
                raise ValueError(
                    f"no two talkers {bucket} degrees apart in the room bank "
                    f"of {len(rooms)} rooms: prepare more rooms"
                )

    def draw_target(self, key):
        """Draw the utterance of a mixture where corpora are mixed by share."""
        # not what the rest of the mixture is drawn by
        rng = draw_by(self.seed, self.epoch, f"target of {key}")
        return self._draw_utterance(rng)

    def _draw_utterance(self, rng):
        """Any utterance, each corpus by its share."""
        if not self._corpora:
            return self._ids[int(rng.integers(len(self._ids)))]
        shares = [share for _, share in self._corpora]
        ids, _ = self._corpora[int(rng.choice(len(shares), p=shares))]
        return ids[int(rng.integers(len(ids)))]

    def listed_targets(self, count):
        """List utterances to be scored on, each corpus by its share."""
        if count > len(self._ids):
            raise ValueError(
                f"{count} mixtures asked for, the manifest has "
                f"{len(self._ids)} utterances"
            )
        if not self._corpora:
            return self._ids[:count]
        targets = []
        for ids, share in self._corpora:
            number = min(round(share * count), len(ids), count - len(targets))
            step = len(ids) / max(number, 1)  # from all of its talkers
            targets += [ids[int(i * step)] for i in range(number)]
        return targets

    def draw(self, target, bucket=None, key=None):
        """Draw the circumstances of one mixture.

        Arguments
        ---------
        target : str
            Utterance to be separated.
        key : str or None
            Of the mixture, which depends on it; None: the target.
        bucket : int or None
            Index of the angle bucket; None draws it evenly.

        Returns
        -------
        mixture : dict
            JSON-ready: "target", "interferer", "room", "talkers", "sir",
            "overlap", "target_first", "doa", "doa_interferer", "angle",
            "mirrored", "cut" (where training crops, 0 to 1), "doa_given" (with
            the camera's error); with an augmentation "variation", the seed
            of what is varied.
        """
        rng = draw_by(self.seed, self.epoch, key or target)
        if bucket is None:
            bucket = int(rng.integers(len(BUCKETS)))
        pairs = self._pairs[bucket]
        room, first, second = pairs[int(rng.integers(len(pairs)))]
        speaker = self.speech[target]["speaker"]
        while True:
            interferer = self._draw_utterance(rng)
            if self.speech[interferer]["speaker"] != speaker:
                break
        mirrored = self.mirror and bool(rng.integers(2))
        doa = self.rooms.doa[room]
        if mirrored:
            doa = 180 - doa
        error = self.doa_error * rng.standard_normal()
        drawn = {
            "target": target,
            "interferer": interferer,
            "room": room,
            "talkers": [first, second],
            "sir": float(rng.choice(SIRS)),
            "overlap": float(rng.uniform(*OVERLAP)),
            "target_first": bool(rng.integers(2)),
            "doa": float(doa[first]),
            "doa_interferer": float(doa[second]),
            "angle": float(angle_between(doa[first], doa[second])),
            "mirrored": mirrored,
            "cut": float(rng.uniform()),
            "doa_given": float(
                (doa[first] + error) % 360
                if self.planar
                else np.clip(doa[first] + error, 0, 180)
            ),
        }
        if self.augmentation:
            drawn["variation"] = int(rng.integers(2**31))
            for name in ("doa_given", "doa_interferer"):
                drawn[name] = self.augmentation.direction(
                    rng, drawn[name], drawn["angle"], self.planar
                )
        return drawn

    def render(self, mixture):
        """Make the waveforms of a drawn mixture.

        Arguments
        ---------
        mixture : dict
            From `draw`.

        Returns
        -------
        signals : dict
            "mixture" [samples, mics], "target" and "interferer" [samples]:
            the reverberant talkers at the reference microphone, which add up
            to the mixture's first channel (with an augmentation, other
            sources too). float32.
        """
        voices, places = self.voices(mixture), list(mixture["talkers"])
        ratios, response = [], None
        if "variation" in mixture:
            rng = np.random.default_rng([mixture["variation"], 1])
            sources = self._further_sources(rng, mixture, voices.shape[1])
            free = set(range(len(self.rooms.doa[mixture["room"]])))
            for (signal, ratio), place in zip(sources, free - set(places)):
                voices = np.concatenate([voices, signal[None]])
                ratios.append(ratio)
                places.append(place)
        rirs = self.rooms.rirs(mixture["room"], places)
        if mixture["mirrored"]:
            rirs = rirs[:, ::-1]
        if "variation" in mixture:
            response = self.augmentation.response(rng, rirs.shape[1])
        return mix(voices, rirs, mixture["sir"], ratios, response)

    def _further_sources(self, rng, mixture, samples):
        """A third talker and a noise, where they are drawn: (signal, ratio)."""
        sources = []
        if self.augmentation.happens(rng, "third_talker"):
            voice = self.augmentation.voice(
                rng, self._read(self._draw_utterance(rng))
            )
            voice = np.resize(voice, samples)
            sources.append((voice, float(rng.uniform(0, 12))))
        if self.augmentation.happens(rng, "noise"):
            voices = _Utterances(self._ids, self._read)
            sources.append(self.augmentation.noise(rng, samples, voices))
        return sources

    def voices(self, mixture):
        """Place the dry voices of a drawn mixture in time.

        Arguments
        ---------
        mixture : dict
            From `draw`.

        Returns
        -------
        voices : numpy.ndarray
            [2, samples], target and interferer, float32.
        """
        voices = [
            self._read(mixture[role]) for role in ("target", "interferer")
        ]
        if "variation" in mixture:
            rng = np.random.default_rng([mixture["variation"], 0])
            voices = [self.augmentation.voice(rng, v) for v in voices]
        offsets = place(
            [len(voice) for voice in voices],
            mixture["overlap"],
            mixture["target_first"],
        )
        return _at_offsets(voices, offsets)

    def _read(self, utterance):
        """Waveform of an utterance, float32."""
        path = self.speech[utterance]["wav"]
        try:
            waveform, rate = soundfile.read(path, dtype="float32")
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): make it again or remove it "
                "from the manifest"
            ) from error
        if rate != SAMPLE_RATE or waveform.ndim != 1:
            raise ValueError(
                f"{path}: expected mono {SAMPLE_RATE} Hz audio, got shape "
                f"{waveform.shape} at {rate} Hz: convert it first"
            )
        if len(waveform) < MIN_SAMPLES:
            raise ValueError(
                f"{path}: {len(waveform)} samples are less than one window of "
                f"{MIN_SAMPLES}: remove it from the manifest"
            )
        if not np.isfinite(waveform).all() or not waveform.any():
            raise ValueError(
                f"{path} is silent or holds NaN: remove it from the manifest"
            )
        return waveform


class _Utterances:
    """The utterances of a manifest as a sequence, read one by one."""

    def __init__(self, ids, read):
        self.ids, self.read = ids, read

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return self.read(self.ids[index])


def _by_corpus(ids, shares):
    """[(ids, share)] of corpora that are told apart by the ids' beginnings."""
    total = sum(shares.values())
    groups = []
    for name, share in shares.items():
        own = [key for key in ids if key.startswith(f"{name}/")]
        if not own or not 0 < share <= total:
            raise ValueError(
                f"corpus {name}: {len(own)} utterances, share {share}: give "
                "each a positive share, and utterances to take"
            )
        groups.append((own, share / total))
    return groups


def fixed_mixtures(maker, count):
    """List the mixtures that every system is scored on.

    Targets are taken in the manifest's order; the angle buckets take turns.

    Arguments
    ---------
    maker : MixtureMaker
    count : int
        Number of mixtures.

    Returns
    -------
    mixtures : dict
        id -> mixture, JSON-ready, SpeechBrain's manifest format.
    """
    return {
        f"mix_{i:04d}": {
            **maker.draw(target, bucket=i % len(BUCKETS)),
            "words": maker.speech[target]["words"],
        }
        for i, target in enumerate(maker.listed_targets(count))
    }


def load_corpora(shares, split):
    """Read the manifests of several prepared corpora as one.

    Arguments
    ---------
    shares : dict
        Folder of a corpus -> its share of the mixtures.
    split : str
        "train", "valid" or "test".

    Returns
    -------
    speech : dict
        "<folder>/<id>" -> entry, as `load_speech` gives them.
    """
    speech = {}
    for folder in shares:
        manifest = Path(folder) / f"{split}_speech.json"
        entries = load_speech(manifest, folder)
        speech |= {f"{folder}/{key}": entries[key] for key in entries}
    return speech


def load_speech(manifest, data_root):
    """Read a speech manifest and resolve its {data_root}.

    Arguments
    ---------
    manifest : str
        JSON file.
    data_root : str
        Folder that replaces "{data_root}".

    Returns
    -------
    speech : dict
        id -> {"wav", "length", "words", "speaker"}.
    """
    manifest = Path(manifest)
    if not manifest.exists():
        raise FileNotFoundError(
            f"no manifest {manifest}: prepare the corpus, or name yours"
        )
    try:
        entries = strict_json(read_text(manifest))
    except ValueError as error:
        raise ValueError(
            f"{manifest} is no JSON ({error}): write it again"
        ) from error
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) for entry in entries.values()
    ):
        raise ValueError(
            f'{manifest} is no manifest, which is {{"id": {{"wav": ...}}, ...}}'
        )
    for key, entry in entries.items():
        missing = {"wav", "words", "speaker"} - set(entry)
        if missing:
            raise ValueError(
                f"{manifest}: {key} has no {sorted(missing)}: every utterance "
                "needs wav, words and speaker"
            )
        try:
            refuse_parts(key, entry)
        except ValueError as error:
            raise ValueError(f"{manifest}: {error}") from error
        if not isinstance(entry["wav"], str):
            raise ValueError(f"{manifest}: wav of {key} is no file's name")
        entry["wav"] = entry["wav"].replace("{data_root}", str(data_root))
    return entries
