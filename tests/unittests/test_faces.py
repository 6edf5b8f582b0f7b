"""Drawn faces, panoramas, and the way back from them to the mouth."""

import numpy as np
import pytest

from speechbrain_mpq.simulation.camera_faults import PERFECT
from speechbrain_mpq.simulation.faces import CANVAS, draw_face, draw_talker
from speechbrain_mpq.simulation.lip_videos import LipVideos
from speechbrain_mpq.simulation.mixtures import MixtureMaker
from speechbrain_mpq.simulation.mouths import draw_look
from speechbrain_mpq.simulation.panorama import Panorama
from speechbrain_mpq.vision.camera import PanoramaCamera
from speechbrain_mpq.vision.linking import centers
from speechbrain_mpq.vision.mouth import mouth_pictures

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
    face, cover = draw_face(draw_look(rng), rng, size)
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
    from speechbrain_mpq.vision.detector import CascadeDetector

    frames, boxes = scene
    found = CascadeDetector()(frames[12])
    assert len(found) == 2
    for face in boxes[:, 12]:
        offset = np.abs(centers(found) - centers(face)).max(1).min()
        assert offset < 0.2 * face[2]
