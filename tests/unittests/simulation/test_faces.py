"""Mouth shapes from phonemes, drawn mouths and faces, corrupted pictures."""

import dataclasses

import numpy as np
import pytest
from panorama import Panorama

from speechbrain_mpq.simulation.faces import (
    CANVAS,
    REST_STRENGTH,
    SHAPES,
    _draw_face,
    _mouth_symbols,
    draw_look,
    draw_mouths,
    draw_talker,
    mouth_shapes,
    still,
    targets,
)
from speechbrain_mpq.simulation.lip_videos import (
    PERFECT,
    TRAINING,
    Corruption,
    LipVideos,
    _corrupt,
    _draw_span,
    draw_pose,
)
from speechbrain_mpq.simulation.mixtures import MixtureMaker
from speechbrain_mpq.vision.camera import PanoramaCamera
from speechbrain_mpq.vision.face_tracking import centers
from speechbrain_mpq.vision.video import mouth_pictures

# All phonemes of espeak-ng that the embedded corpus has
PHONEMES = (
    "p l 'eI s D @2 g r 'i: n b '0 k I# z h ,aI d j 'u: w 'V _: oU f 'i@ m v "
    "tS 'I V @ 'A@ 3 I 'aU t 'o@ S a# 'E 'a @L I2 'oU T i w# 'aI ,V r- 'O@ dZ "
    "; N ,i@3 t# _ 0 '3: 'O2 ,u: 'VR ,U 'aI2 'A: e@ U@ OI ? 3: O: eI"
).split()


@pytest.mark.parametrize("phoneme", PHONEMES)
def test_every_phoneme_has_a_mouth(phoneme):
    symbols = _mouth_symbols(phoneme)
    assert (phoneme == ";") == (not symbols)
    assert set(symbols) <= set(SHAPES)


def test_an_unknown_phoneme_is_named():
    with pytest.raises(ValueError, match="'q@'"):
        _mouth_symbols("q@")


def test_weighted_mean_against_a_slow_one():
    phonemes = [(0.0, 0.1, "p"), (0.1, 0.3, "'aI"), (0.3, 0.4, "n")]
    times = np.array([0.03, 0.2, 0.35])
    found = mouth_shapes(phonemes, times)
    rest = np.array(SHAPES["_"][0])
    for time, shape in zip(times, found):
        total, weights = REST_STRENGTH * rest, REST_STRENGTH
        for centre, target, strength, width in zip(*targets(phonemes)):
            pull = strength * np.exp(-abs(time - centre) / width)
            total, weights = total + pull * target, weights + pull
        expected = total / weights
        np.testing.assert_allclose(
            shape, np.clip(expected, [0, -1, 0, 0, 0], 1), atol=1e-12
        )


@pytest.mark.parametrize("lips", "pbm")
def test_lips_close_between_open_vowels(lips):
    phonemes = [(0.0, 0.2, "A:"), (0.2, 0.28, lips), (0.28, 0.5, "A:")]
    opening = mouth_shapes(phonemes, np.array([0.1, 0.24, 0.4]))[:, 0]
    assert opening[1] == 0 and min(opening[0], opening[2]) > 0.6


def test_rounding_begins_before_the_vowel():
    round_ = [(0.0, 0.1, "t"), (0.1, 0.3, "u:")]
    spread = [(0.0, 0.1, "t"), (0.1, 0.3, "i:")]
    now = np.array([0.07])
    assert (mouth_shapes(round_, now) - mouth_shapes(spread, now))[0, 2] > 0.05


def test_it_rests_long_before_and_after():
    shapes = mouth_shapes([(1.0, 1.2, "A:")], np.array([-5.0, 9.0]))
    assert np.abs(shapes).max() < 0.05
    assert np.abs(mouth_shapes([], np.array([0.0]))).max() < 0.05


def open_mouth(opening, look, size=(48, 64), **more):
    """One picture, its mouth opened so far."""
    shape = {"width": 0.0, "rounding": 0.0, "teeth": 0.0, "tongue": 0.0} | more
    shapes = np.array([[opening, *shape.values()]])
    return draw_mouths(shapes, look, still(1), size)[0]


@pytest.fixture
def look():
    look = draw_look(np.random.default_rng(0))
    return dataclasses.replace(look, skin=0.7, lips=0.45, light=(0, 0), beard=0)


def test_the_dark_of_an_open_mouth_grows(look):
    dark = [(open_mouth(o, look) < 0.2).sum() for o in (0, 0.3, 0.6, 1.0)]
    assert dark[0] == 0 and dark == sorted(dark) and dark[3] > 100


def test_rounded_lips_are_narrower_and_teeth_are_bright(look):
    lips = [
        (open_mouth(0.1, look, rounding=r, width=-r) < 0.6).any(0).sum()
        for r in (0.0, 1.0)
    ]
    assert lips[1] < 0.85 * lips[0]
    assert open_mouth(0.8, look, teeth=1.0).max() > 0.75  # above the skin
    assert open_mouth(0.8, look).max() < 0.71


def test_size_only_changes_the_resolution(look):
    coarse, fine = (open_mouth(0.7, look, s) for s in ((24, 32), (96, 128)))
    pooled = fine.reshape(24, 4, 32, 4).mean((1, 3))
    assert np.abs(pooled - coarse).mean() < 0.01


def test_perfect_is_only_rounded_to_bytes():
    pictures = np.random.default_rng(0).uniform(0.01, 1, (5, 4, 6))
    found = _corrupt(pictures.astype(np.float32), rng(), PERFECT)
    assert np.abs(found / 255 - pictures).max() < 0.0021
    pose = draw_pose(rng(), 5, PERFECT.jitter)
    assert not pose.x.any() and (pose.scale == 1).all()


def rng():
    """The same generator every time."""
    return np.random.default_rng(7)


@pytest.mark.parametrize("name", ["dropped", "frozen", "occluded", "absent"])
def test_each_fault_does_what_it_is_called(name):
    pictures = np.random.default_rng(0).uniform(0.1, 1, (75, 8, 8))
    pictures = pictures.astype(np.float32)
    faults = dataclasses.replace(PERFECT, **{name: 1.0})
    found = _corrupt(pictures.copy(), rng(), faults)
    changed = (found != _corrupt(pictures.copy(), rng(), PERFECT)).any((1, 2))
    lasts = changed.sum()
    if name == "absent":
        assert not found.any()
        return
    assert 1 <= lasts <= 30
    assert np.ptp(np.flatnonzero(changed)) == lasts - 1  # one stretch
    missing = ~found.any((1, 2))
    assert (
        (missing == changed).all() if name == "dropped" else not missing.any()
    )
    if name == "frozen":
        assert (np.diff(found.astype(int), axis=0) == 0).all(
            (1, 2)
        ).sum() == lasts


def test_dark_pictures_are_not_taken_for_missing_ones():
    black = np.zeros((3, 4, 4), np.float32)
    assert _corrupt(black, rng(), Corruption(dropped=0.0)).min() == 1


def test_the_same_seed_gives_the_same_clip():
    pictures = np.full((20, 6, 8), 0.5, np.float32)
    first, again = (
        _corrupt(pictures.copy(), rng(), TRAINING) for _ in range(2)
    )
    assert (first == again).all()


@pytest.mark.parametrize("pictures", [1, 2, 5, 75])
def test_spans_lie_inside(pictures):
    generator = rng()
    for _ in range(50):
        span = _draw_span(generator, pictures)
        assert 0 <= span.start < span.stop <= pictures


MIXTURE = {
    "target": "u0",
    "interferer": "u1",
    "overlap": 1.0,
    "target_first": True,
    "room": 0,
    "talkers": [0, 1],
    "doa": 40.0,
    "doa_interferer": 120.0,
}


DISTANCES = [1.2, 3.0]


class Bank:
    """Stands in for a RoomBank."""

    doa = [np.array([MIXTURE["doa"], MIXTURE["doa_interferer"]])]
    info = [np.array([0.3, 0.3, 5.0, 4.0, 3.0, *DISTANCES])]

    def __len__(self):
        return 1

    def pairs(self, bucket):
        return [(0, 0, 1)]


@pytest.fixture(scope="module")
def videos():
    speech = {
        f"u{i}": {
            "wav": "none",
            "words": "a",
            "speaker": f"s{i}",
            "length": 1.0,
            "phonemes": [[0.0, 0.5, "_:"], [0.5, 1.0, "A:"]],
        }
        for i in range(2)
    }
    return LipVideos(MixtureMaker(speech, Bank()), (24, 32), PERFECT)


@pytest.fixture(scope="module")
def scene(videos):
    return Panorama(videos).render(MIXTURE)


def test_faces_stand_at_the_direction_of_their_talker(scene):
    frames, boxes = scene
    assert frames.shape == (25, 320, 1920) and frames.dtype == np.uint8
    points = centers(boxes)
    doas = PanoramaCamera(1920).doa(points[..., 0], points[..., 1])
    assert np.abs(doas[0] - 40).max() < 3
    assert np.abs(doas[1] - 120).max() < 3


def test_nearer_faces_are_larger(scene):
    near, far = scene[1][:, 0, 2]
    assert near / far == pytest.approx(DISTANCES[1] / DISTANCES[0], rel=0.2)


def test_the_way_back_shows_the_mouth_opening(scene):
    frames, boxes = scene
    for face in boxes:
        pictures = mouth_pictures(frames, face, (24, 32))
        assert pictures.shape == (25, 24, 32)
        dark = pictures[:, 8:16, 10:22].min((1, 2)).astype(int)
        assert dark[:8].min() > dark[17:].max()


def test_the_same_mixture_gives_the_same_pictures(videos):
    panorama = Panorama(videos, width=600, height=120)
    first, again = (panorama.render(MIXTURE)[0] for _ in range(2))
    assert first.shape == (25, 120, 600) and (first == again).all()


@pytest.mark.parametrize("size", [24, 48, 131])
def test_a_face_fills_its_canvas_and_hides_what_is_behind(size):
    rng = np.random.default_rng(0)
    face, cover = _draw_face(draw_look(rng), rng, size)
    assert face.shape == cover.shape == (round(CANVAS * size),) * 2
    assert 0 <= face.min() and face.max() <= 1
    middle = round(CANVAS * size / 2)
    assert cover[middle, middle] == 1 and cover[0, 0] == 0


def test_only_the_mouth_moves():
    rng = np.random.default_rng(1)
    shapes = np.array([[0.0] * 5, [1.0, 0, 0, 0, 0]])
    (closed, open_), _ = draw_talker(shapes, draw_look(rng), rng, 100)
    rows, columns = np.nonzero(np.abs(closed - open_) > 0.01)
    assert 90 < rows.min() and rows.max() < 125  # of 150
    assert 50 < columns.min() and columns.max() < 100


def test_a_detector_of_real_faces_finds_them(scene):
    pytest.importorskip("cv2")
    from speechbrain_mpq.vision.video import CascadeDetector

    frames, boxes = scene
    found = CascadeDetector()(frames[12])
    assert len(found) == 2
    for face in boxes[:, 12]:
        offset = np.abs(centers(found) - centers(face)).max(1).min()
        assert offset < 0.2 * face[2]
