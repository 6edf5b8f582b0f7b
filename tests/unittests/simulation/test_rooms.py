"""The room bank: geometry, reverberation, storage."""

import json
import os

import numpy as np
import pytest

from speechbrain_mpq.lobes.models.spatial_features import (
    SPEED_OF_SOUND,
    linear_array,
)
from speechbrain_mpq.simulation import rooms
from speechbrain_mpq.simulation.rooms import RoomBank, prepare_rooms

MICROPHONES = (1, 8, 15)


@pytest.fixture(scope="module", autouse=True)
def small_bank():
    """Two rooms a shard, so that a bank takes a second."""
    pytest.importorskip("pyroomacoustics")
    patch = pytest.MonkeyPatch()
    patch.setattr("speechbrain_mpq.simulation.rooms.ROOMS_PER_SHARD", 2)
    patch.setattr(rooms, "T60", (0.05, 0.15))
    yield
    patch.undo()


def test_drawn_rooms_are_as_in_the_paper():
    for index in range(20):
        room = rooms._draw_room(np.random.default_rng([7, index]))
        assert (room["dimensions"] >= rooms.SMALLEST_ROOM).all()
        assert (room["dimensions"] <= rooms.LARGEST_ROOM).all()
        assert (room["talkers"] > 0).all()
        assert (room["talkers"] < room["dimensions"]).all()
        assert ((room["doa"] >= 0) & (room["doa"] <= 180)).all()
        assert (room["distance"] > 0.9).all() and (room["distance"] < 5.1).all()


def test_direct_sound_arrives_in_the_order_of_the_distances():
    room = rooms._draw_room(np.random.default_rng(3))
    rirs = rooms.simulate(room, MICROPHONES)
    along = linear_array().numpy()[np.array(MICROPHONES) - 1]
    along = along - linear_array()[-1].item() / 2
    for talker, position in enumerate(room["talkers"]):
        mics = room["centre"] + along[:, None] * room["axis"]
        delay = np.linalg.norm(mics - position, axis=1) / SPEED_OF_SOUND
        measured = np.abs(rirs[talker]).argmax(axis=1) / 16000
        np.testing.assert_allclose(
            measured - measured[0], delay - delay[0], atol=1.6e-4
        )


CIRCLE = 0.05 * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])


def test_planar_arrays_hear_talkers_from_all_around():
    doas = []
    for index in range(20):
        room = rooms._draw_room(np.random.default_rng([7, index]), planar=True)
        ray = room["talkers"] - room["centre"]
        x, y = ray @ room["axis"], ray @ room["front"]
        angle = np.degrees(np.arctan2(y, x)) % 360
        np.testing.assert_allclose(room["doa"], angle)
        doas += room["doa"].tolist()
    assert min(doas) < 30 and max(doas) > 330
    rirs = rooms.simulate(room, [1, 2, 3, 4], CIRCLE)
    for talker, doa in enumerate(np.radians(room["doa"])):
        delay = np.abs(rirs[talker]).argmax(axis=1) / 16000
        advance = CIRCLE @ [np.cos(doa), np.sin(doa)] / SPEED_OF_SOUND
        np.testing.assert_allclose(
            delay.mean() - delay, advance - advance.mean(), atol=8e-5
        )


def test_banks_of_other_arrays_are_told_apart(tmp_path):
    options = {"workers": 1, "progress": False}
    counts, microphones = {"test": 1}, [1, 2, 4]
    usual = linear_array()
    prepare_rooms(tmp_path / "a", counts, microphones, **options)
    prepare_rooms(
        tmp_path / "a", counts, microphones, positions=usual, **options
    )
    options["positions"] = CIRCLE
    with pytest.raises(ValueError, match="choose another data_folder"):
        prepare_rooms(tmp_path / "a", counts, microphones, **options)
    prepare_rooms(tmp_path / "b", counts, microphones, **options)
    settings = json.loads((tmp_path / "b/rooms/settings.json").read_text())
    assert settings["positions_cm"][1] == [0.0, 5.0]
    bank = RoomBank(tmp_path / "b", "test", 1)
    assert bank.rirs(0, (0,)).shape[1] == 3
    with pytest.raises(ValueError, match="an array 5.00 m wide"):
        prepare_rooms(
            tmp_path / "c", counts, [1, 2], positions=np.array([0.0, 5.0])
        )


def test_angles_are_taken_the_short_way():
    bank = RoomBank.__new__(RoomBank)
    bank.doa = [np.array([350.0, 5.0])]
    assert bank.pairs((15, 45)) == [(0, 0, 1), (0, 1, 0)]


def test_absorption_and_order_follow_the_reverberation_time():
    room = (6.0, 5.0, 3.0)
    assert rooms._eyring_absorption(room, 0.2) > rooms._eyring_absorption(
        room, 0.6
    )
    assert rooms._image_order(room, 0.6) > rooms._image_order(room, 0.2)


def test_bank_is_repeatable_resumable_and_grows(tmp_path):
    def first_rir(folder, count):
        return RoomBank(folder, "train", count).rirs(0, (0, 1))

    kwargs = {"microphones": MICROPHONES, "workers": 1, "progress": False}
    prepare_rooms(tmp_path / "a", {"train": 2}, **kwargs)
    before = first_rir(tmp_path / "a", 2)
    stamp = (tmp_path / "a/rooms/train/00000.npz").stat().st_mtime_ns
    prepare_rooms(tmp_path / "a", {"train": 4}, **kwargs)
    assert (tmp_path / "a/rooms/train/00000.npz").stat().st_mtime_ns == stamp
    half = tmp_path / "b/rooms/train/.00000.npz.0.partial"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"of a run that was killed")
    os.utime(half, (0, 0))
    prepare_rooms(tmp_path / "b", {"train": 2}, **kwargs)
    assert not half.exists()
    np.testing.assert_array_equal(first_rir(tmp_path / "b", 2), before)
    np.testing.assert_array_equal(first_rir(tmp_path / "a", 4), before)
    prepare_rooms(tmp_path / "c", {"train": 1}, **kwargs)  # half a shard
    np.testing.assert_array_equal(first_rir(tmp_path / "c", 1), before)
    with pytest.raises(FileNotFoundError, match="too few rooms"):
        RoomBank(tmp_path / "c", "train", 2)
    prepare_rooms(tmp_path / "c", {"train": 2}, **kwargs)
    one, other = (RoomBank(tmp_path / name, "train", 2) for name in "bc")
    assert len(one) == len(other) == 2
    np.testing.assert_array_equal(one.rirs(1, (2,)), other.rirs(1, (2,)))

    with pytest.raises(ValueError, match="data_folder"):
        prepare_rooms(tmp_path / "a", {"train": 2}, (1, 2))
    with pytest.raises(FileNotFoundError, match="prepare_rooms"):
        RoomBank(tmp_path / "a", "test", 2)


def test_talkers_at_both_ends_of_the_axis_are_in_the_last_bucket_only():
    bank = RoomBank.__new__(RoomBank)
    bank.doa = [np.array([0.0, 180.0])]
    pairs = [bank.pairs(b) for b in ((0, 15), (15, 45), (45, 90), (90, 180))]
    assert pairs == [[], [], [], [(0, 0, 1), (0, 1, 0)]]


def test_pairs_lie_in_their_bucket(tmp_path):
    prepare_rooms(tmp_path, {"test": 2}, MICROPHONES, workers=1, progress=False)
    bank = RoomBank(tmp_path, "test", 2)
    buckets = [bank.pairs(b) for b in ((0, 15), (15, 45), (45, 90), (90, 180))]
    assert sum(map(len, buckets)) == 2 * 4 * 3  # ordered pairs of 4 talkers
    for room, a, b in buckets[2]:
        assert 45 <= abs(bank.doa[room][a] - bank.doa[room][b]) < 90
    nominal, measured = bank.mean_t60()
    assert 0.05 <= nominal <= 0.15 and 0 < measured < 0.4
    json.loads((tmp_path / "rooms/settings.json").read_text())
