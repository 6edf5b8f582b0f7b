"""Render the lips of both talkers of a mixture, in time with the sound.

They are drawn from the phoneme times of the manifest, or taken from files that
hold pictures, and corrupted as a camera and its cable do. What is drawn
depends on (seed, epoch, mixture) alone.
"""

import dataclasses
import zlib

import numpy as np

from ..lobes.models.lips import FPS, PERIOD
from ..utils import SAMPLE_RATE
from .faces import Pose, draw_look, draw_mouths, mouth_shapes
from .mixtures import place


@dataclasses.dataclass(frozen=True)
class Corruption:
    """How often and how badly pictures go wrong; default: an ordinary call.

    Example
    -------
    >>> Corruption().absent, TRAINING.absent, PERFECT.noise
    (0.0, 0.15, 0.0)
    """

    # seconds by which the video comes late; negative: early
    lag: tuple = (-0.04, 0.1)
    jitter: float = 0.02  # deviation of the mouth's place, in picture widths
    noise: float = 0.06  # deviation of the pixels' noise; drawn up to this
    flicker: float = 0.03  # deviation of the brightness from picture to picture
    # occluded, dropped, frozen: share of clips in which a hand covers the mouth
    # for a while, pictures are missing, the picture stands still
    occluded: float = 0.15
    dropped: float = 0.15
    frozen: float = 0.1
    # share of clips without any picture (video dropout of training)
    absent: float = 0.0
    swapped: float = 0.0  # share of clips that show someone else's speech


TRAINING = Corruption(
    dropped=0.25, frozen=0.15, occluded=0.2, absent=0.15, swapped=0.05
)


PERFECT = Corruption((0.0, 0.0), *[0.0] * 8)


def draw_pose(rng, pictures, jitter):
    """Draw the pose of a mouth that is framed somehow and moves a little."""
    place = rng.normal(0, jitter, (4, 1))
    sway = _smooth(rng.normal(0, jitter / 2, (4, pictures)))
    x, y, scale, angle = place + sway
    return Pose(x, y, np.exp(4 * scale), 3 * angle)


def _smooth(values, width=9):
    """Moving average over the last axis, of the same deviation."""
    taps = np.ones(width) / np.sqrt(width)
    padded = np.pad(values, [(0, 0), (width // 2, width // 2)], mode="wrap")
    rows = [np.convolve(row, taps, mode="valid") for row in padded]
    return np.stack(rows)


def _corrupt(pictures, rng, faults):
    """Add noise, flicker, a hand, missing and frozen pictures."""
    count, height, width = pictures.shape
    # Drawn whether used or not: one fault does not change the others
    chance = rng.uniform(size=4)
    spans = [_draw_span(rng, count) for _ in range(3)]
    noise = rng.standard_normal(pictures.shape, np.float32)
    light = 1 + faults.flicker * rng.standard_normal((count, 1, 1), np.float32)
    cover = rng.uniform(size=4)
    pictures = pictures * light + noise * np.float32(faults.noise * cover[3])
    if chance[0] < faults.occluded:
        _cover_(pictures[spans[0]], cover)
    pictures = np.clip(np.rint(pictures * 255), 1, 255).astype(np.uint8)
    if chance[1] < faults.frozen:
        pictures[spans[1]] = pictures[spans[1].start]
    if chance[2] < faults.dropped:
        pictures[spans[2]] = 0
    if chance[3] < faults.absent:
        pictures[:] = 0
    return pictures


def _draw_span(rng, pictures, shortest=2, longest=30):
    """Draw a stretch of pictures during which something lasts."""
    length = min(int(rng.integers(shortest, longest + 1)), pictures)
    start = int(rng.integers(pictures - length + 1))
    return slice(start, start + length)


def _cover_(pictures, drawn):
    """Something grey before the lower or upper part, in place."""
    height = pictures.shape[1]
    edge = max(1, round(height * (0.3 + 0.5 * drawn[0])))
    rows = slice(edge - height, None) if drawn[1] < 0.5 else slice(0, edge)
    pictures[:, rows] = 0.2 + 0.7 * drawn[2]


ROLES = ("target", "interferer")
LONGEST_HELD = 0.5  # seconds that the last picture of a file is held at most
SHOWN = ("own", "none", "frozen", "other", "interferer")


class LipVideos:
    """Render the lips that belong to the mixtures of a maker.

    Arguments
    ---------
    maker : MixtureMaker
        Or any object with its `speech`, `seed` and `epoch`. The manifest
        needs "length" and "phonemes" of every utterance; or, instead of
        phonemes, "lips": a .npy file [pictures, height, width], uint8, 25 a
        second.
    size : (int, int)
        Height and width of a picture.
    faults : Faults
        What goes wrong on the way.
    shown : str
        "own": the lips of each talker. Controls: "none", "frozen" (one
        picture all along), "other" (the lips of another utterance),
        "interferer" (those of the talker beside).

    Example
    -------
    >>> videos = LipVideos(maker, (24, 32))  # doctest: +SKIP
    >>> videos.render(maker.draw("utterance_0"))  # doctest: +SKIP
    """

    def __init__(self, maker, size, faults=None, shown="own"):
        if shown not in SHOWN:
            raise ValueError(f"shown must be one of {SHOWN}, not {shown!r}")
        for key, entry in maker.speech.items():
            if "length" not in entry or not {"phonemes", "lips"} & set(entry):
                raise ValueError(
                    f"{key} needs a length and either phonemes or lips in its "
                    "manifest: prepare it with simulation.corpus, or name "
                    "files of pictures"
                )
        self.maker = maker
        self.size = tuple(size)
        self.faults = faults or Corruption()
        self.shown = shown
        self._ids = sorted(maker.speech)

    def render(self, mixture, start=0, samples=None):
        """Render the pictures of both talkers.

        Arguments
        ---------
        mixture : dict
            From `MixtureMaker.draw`.
        start : int
            First sample of the mixture that is used.
        samples : int or None
            How many are; None: all.

        Returns
        -------
        pictures : numpy.ndarray
            [2, pictures, height, width], uint8: target, then interferer.
            Zeros: no picture.
        """
        clips = [
            self._clip(mixture, role, self.times(mixture, role, start, samples))
            for role in ROLES
        ]
        if self.shown == "interferer":
            clips.reverse()
        return np.stack(clips)

    def utterance(self, key, start=0, pictures=None):
        """Render the pictures of a talker alone.

        Arguments
        ---------
        key : str
            Utterance.
        start : int
            First sample that is used.
        pictures : int or None
            How many; None: until the end.

        Returns
        -------
        pictures : numpy.ndarray
            [pictures, height, width], uint8.
        """
        alone = {"target": key, "interferer": key}
        if pictures is None:
            samples = self.maker.speech[key]["length"] * SAMPLE_RATE - start
            pictures = -(-round(samples) // PERIOD)
        times = (start + PERIOD * np.arange(pictures)) / SAMPLE_RATE
        return self._clip(alone, "target", times)

    def times(self, mixture, role, start=0, samples=None):
        """Compute when pictures are taken, on the clock of an utterance.

        Arguments
        ---------
        mixture : dict
            From `MixtureMaker.draw`.
        role : str
            "target" or "interferer".
        start : int
            First sample of the mixture that is used.
        samples : int or None
            How many are; None: all.

        Returns
        -------
        times : numpy.ndarray
            [pictures], seconds from the start of the talker's utterance.
        """
        if samples is None:
            samples = self.samples(mixture) - start
        first = start - self._spans(mixture)[role][0]
        pictures = np.arange(-(-samples // PERIOD))
        return (first + PERIOD * pictures) / SAMPLE_RATE

    def samples(self, mixture) -> int:
        """Count the samples of a whole mixture.

        Arguments
        ---------
        mixture : dict
            From `MixtureMaker.draw`.
        """
        return max(end for _, end in self._spans(mixture).values())

    def _spans(self, mixture):
        """Role -> first sample of its utterance, and the one after its last."""
        lengths = [
            round(self.maker.speech[mixture[role]]["length"] * SAMPLE_RATE)
            for role in ROLES
        ]
        offsets = place(lengths, mixture["overlap"], mixture["target_first"])
        return {
            role: (offset, offset + length)
            for role, offset, length in zip(ROLES, offsets, lengths)
        }

    def _clip(self, mixture, role, times):
        """Pictures of one talker at times of the utterance."""
        name = f"{mixture['target']} {mixture['interferer']} {role}"
        seeds = [self.maker.seed, self.maker.epoch, zlib.crc32(name.encode())]
        rng = np.random.default_rng(seeds)
        if self.shown == "none":
            return np.zeros((len(times), *self.size), np.uint8)
        other = self._other(mixture[role], rng)
        swapped = rng.uniform() < self.faults.swapped or self.shown == "other"
        key = other if swapped else mixture[role]
        times = times - rng.uniform(*self.faults.lag)
        if self.shown == "frozen":
            times = np.full_like(times, times[int(rng.integers(len(times)))])
        if "lips" in self.maker.speech[key]:
            pictures = self._stored(key, times)
        else:
            who = self.maker.speech[mixture[role]]["speaker"]
            pictures = self._drawn(key, who, times, rng)
        clip = _corrupt(pictures, rng, self.faults)
        if self.shown == "frozen":
            clip[:] = clip[0]
        return clip

    def _other(self, key, rng):
        """Another utterance; where there is no other, the same."""
        ids = self._ids
        index = int(rng.integers(len(ids)))
        return ids[index] if ids[index] != key else ids[(index + 1) % len(ids)]

    def _drawn(self, key, speaker, times, rng):
        """Pictures of an utterance, drawn with a speaker's mouth."""
        look = draw_look(np.random.default_rng(zlib.crc32(speaker.encode())))
        pose = draw_pose(rng, len(times), self.faults.jitter)
        shapes = mouth_shapes(self.maker.speech[key]["phonemes"], times)
        return draw_mouths(shapes, look, pose, self.size)

    def _stored(self, key, times):
        """Pictures of an utterance from its file; its ends are held."""
        path = self.maker.speech[key]["lips"]
        try:
            pictures = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): crop it again with "
                "vision.video, or take `lips` out of the manifest"
            ) from error
        if pictures.dtype != np.uint8 or pictures.shape[1:] != self.size:
            raise ValueError(
                f"{path} holds {pictures.dtype} {pictures.shape}, expected "
                f"uint8 [pictures, {self.size[0]}, {self.size[1]}]: crop it "
                "again with vision.video"
            )
        missing = self.maker.speech[key]["length"] - len(pictures) / FPS
        if missing > LONGEST_HELD:
            raise ValueError(
                f"{path} ends {missing:.1f} s before the sound of {key}: crop "
                "it again from the whole video"
            )
        index = np.clip(np.rint(times * FPS), 0, len(pictures) - 1)
        return pictures[index.astype(int)].astype(np.float32) / 255


def videos_of_splits(makers, size):
    """Make the lip videos of every split, corrupted in training most.

    Example
    -------
    >>> videos_of_splits({"train": None, "test": None}, size=None)
    {'train': None, 'test': None}
    """
    if size is None:
        return dict.fromkeys(makers)
    faults = {"train": TRAINING, "valid": Corruption(), "test": Corruption()}
    return {
        split: LipVideos(maker, size, faults[split])
        for split, maker in makers.items()
    }
