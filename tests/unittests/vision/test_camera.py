"""Cameras against talkers at known places in a room.

The witness is a scene in metres: the camera at the origin looks along y, x is
to its right and z up; the array lies along x.
"""

import math

import numpy as np
import pytest
import torch

from speechbrain_mpq.lobes.models.spatial_features import (
    linear_array,
    pair_phase,
)
from speechbrain_mpq.vision.camera import (
    FisheyeCamera,
    PanoramaCamera,
    PinholeCamera,
    _cone_angle,
)

LAST_AT_LEFT = np.array([-1.0, 0.0, 0.0])  # from microphone 1 to the last


def true_doa(place, axis=LAST_AT_LEFT):
    """Angle between the array's axis and a talker, by the dot product."""
    return np.degrees(np.arccos(place @ axis / np.linalg.norm(place)))


def into_camera(place, yaw):
    """Right, up and forward of a camera that is turned to its right."""
    turn = math.radians(yaw)
    right = np.array([math.cos(turn), -math.sin(turn), 0])
    forward = np.array([math.sin(turn), math.cos(turn), 0])
    return place @ right, place[2], place @ forward


def seen_by_pinhole(place, focal, center, yaw=0.0):
    right, up, forward = into_camera(place, yaw)
    return center[0] + focal * right / forward, center[1] - focal * up / forward


def seen_by_fisheye(place, focal, center, yaw=0.0):
    right, up, forward = into_camera(place, yaw)
    polar = math.atan2(math.hypot(right, up), forward)
    around = math.atan2(up, right)
    return (
        center[0] + focal * polar * math.cos(around),
        center[1] - focal * polar * math.sin(around),
    )


def test_paper_camera_is_proportional_and_reaches_both_ends():
    camera = PanoramaCamera(width=640)
    x = np.arange(641)
    np.testing.assert_allclose(camera.doa(x, 50), x / 640 * 180, atol=1e-5)
    assert camera.doa(0, 0) == 0 and camera.doa(640, 0) == 180


@pytest.mark.parametrize("x", [0, 100, 180, 330, 360])
def test_direction_is_that_of_the_array(x):
    """The path difference that the face's place causes, in `pair_phase`."""
    angle = math.radians((x / 360 - 0.5) * 180)  # of the talker, to the right
    talker = 1000 * np.array([math.sin(angle), math.cos(angle), 0])
    first, last = np.array([0.28, 0, 0]), np.array([-0.28, 0, 0])
    later = np.linalg.norm(talker - first) - np.linalg.norm(talker - last)
    doa = torch.from_numpy(np.atleast_1d(PanoramaCamera(360).doa(x, 0)))
    positions = linear_array()
    phase = pair_phase(
        doa, positions[-1:] - positions[:1], torch.tensor([500.0])
    )
    # The last microphone is ahead by the time that the first comes later
    assert phase.item() == pytest.approx(
        2 * math.pi * 500 * later / 343, abs=1e-3
    )


@pytest.mark.parametrize("yaw", [0.0, 25.0, -40.0])
@pytest.mark.parametrize("place", [(0.4, 1.5, 0.3), (-1.2, 2.0, -0.5)])
@pytest.mark.parametrize(
    "kind, seen",
    [(PinholeCamera, seen_by_pinhole), (FisheyeCamera, seen_by_fisheye)],
)
def test_calibrated_cameras_know_where_the_talker_is(kind, seen, place, yaw):
    place = np.array(place)
    x, y = seen(place, 300.0, (330.0, 235.0), yaw)
    camera = kind(focal=300.0, center=(330.0, 235.0), yaw=yaw)
    assert camera.doa(x, y) == pytest.approx(true_doa(place))
    turned = kind(focal=300.0, center=(330.0, 235.0), yaw=yaw, reverse=True)
    assert turned.doa(x, y) == pytest.approx(true_doa(place, -LAST_AT_LEFT))


def test_fisheye_sees_both_ends_and_behind():
    camera = FisheyeCamera(focal=100.0, center=(200.0, 150.0))
    quarter = 100 * math.pi / 2
    ends = camera.doa([200 - quarter, 200 + quarter], 150)
    np.testing.assert_allclose(ends, [0, 180], atol=1e-5)
    behind = np.array([-1.0, -0.5, 0.1])
    x, y = seen_by_fisheye(behind, 100.0, (200.0, 150.0))
    assert camera.doa(x, y) == pytest.approx(true_doa(behind))
    assert camera.doa(200, 150) == pytest.approx(90)


def test_elevation_makes_a_cone():
    place = np.array([-0.5, 1.0, 0.8])
    azimuth = math.degrees(math.atan2(1.0, 0.5))  # from the array's axis
    elevation = math.degrees(math.atan2(0.8, math.hypot(0.5, 1.0)))
    assert _cone_angle(azimuth, elevation) == pytest.approx(true_doa(place))


def test_yaw_past_the_end_comes_back_from_the_other_side():
    camera = PanoramaCamera(width=360, yaw=20.0)
    doas = camera.doa([180, 340, 350], 0)
    np.testing.assert_allclose(doas, [110, 170, 165], atol=1e-5)


def test_points_that_are_missing_stay_missing():
    points = np.array([np.nan, 180.0])
    for camera in (PanoramaCamera(360), FisheyeCamera(100.0, (180, 100))):
        assert np.isnan(camera.doa(points, points)).tolist() == [True, False]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: PanoramaCamera(0), "width"),
        (lambda: PanoramaCamera(360, field_of_view=400), "field_of_view"),
        (lambda: PinholeCamera(-1, (0, 0)), "focal"),
        (lambda: FisheyeCamera(float("nan"), (0, 0)), "focal"),
        (lambda: PinholeCamera(float("inf"), (0, 0)), "focal"),
        (lambda: PinholeCamera(9, (float("nan"), 0)), "center"),
        (lambda: PanoramaCamera(float("inf")), "width"),
        (lambda: PanoramaCamera(360, yaw=200), "yaw"),
        (lambda: FisheyeCamera(10, (0, 0)).doa(40, 0), "31"),
    ],
)
def test_impossible_cameras_and_points_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
