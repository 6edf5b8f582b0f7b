"""Digit strings of the FSDD recipe, from made-up recordings."""

import doctest
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechbrain_mpq.simulation.recordings import RMS

SCRIPT = Path(__file__).parents[3] / "recipes/FSDD/fsdd_prepare.py"


spec = importlib.util.spec_from_file_location("fsdd_prepare", SCRIPT)
fsdd = importlib.util.module_from_spec(spec)


spec.loader.exec_module(fsdd)


SPEAKERS = ("ann", "bob", "cid", "dot")
COUNTS = {"train": 8, "valid": 4, "test": 6}
RATE = 8000


def tone(digit, speaker):
    """Hz: every digit of every speaker is another one."""
    return 300 + 200 * digit + 40 * SPEAKERS.index(speaker)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Tones of 0.2 s instead of digits, in the data set's names."""
    folder = tmp_path_factory.mktemp("recordings")
    time = np.arange(RATE // 5) / RATE
    for speaker in SPEAKERS:
        for digit in range(10):
            for take in (0, 1, 5, 6):
                samples = 0.3 * np.sin(2 * np.pi * tone(digit, speaker) * time)
                path = folder / f"{digit}_{speaker}_{take}.wav"
                soundfile.write(path, samples, RATE)
    return folder


@pytest.fixture(scope="module")
def data(recordings, tmp_path_factory):
    """The prepared folder."""
    folder = tmp_path_factory.mktemp("data")
    fsdd.prepare_fsdd(
        recordings, folder, ("cid", "dot"), **COUNTS, speed=0, rooms={}
    )
    return folder


def manifest(data, split):
    """Entries of a split."""
    return json.loads((data / f"{split}_speech.json").read_text())


def test_examples():
    failed, tried = doctest.testmod(fsdd)
    assert tried and not failed


def test_splits_share_no_test_speaker(data):
    people = {
        split: {entry["speaker"] for entry in manifest(data, split).values()}
        for split in COUNTS
    }
    assert people["train"] == people["valid"] == {"ann", "bob"}
    assert people["test"] == {"cid", "dot"}


def test_strings_say_what_their_transcript_says(data):
    """Every digit is found by the frequency of its tone, in order."""
    for entry in manifest(data, "test").values():
        path = entry["wav"].replace("{data_root}", str(data))
        samples, rate = soundfile.read(path)
        assert rate == 16000
        assert len(samples) / rate == pytest.approx(entry["length"])
        loud = np.abs(samples) > 0.01
        edges = np.flatnonzero(np.diff(np.flatnonzero(loud)) > 0.04 * rate)
        places = np.flatnonzero(loud)
        groups = np.split(places, edges + 1)
        heard = []
        for group in groups:
            piece = samples[group[0] : group[-1]]
            spectrum = np.abs(np.fft.rfft(piece, rate))
            hertz = int(spectrum.argmax())
            heard.append(round((hertz - tone(0, entry["speaker"])) / 200))
            assert np.std(piece) == pytest.approx(RMS, rel=0.05)
        assert " ".join(fsdd.DIGITS[d] for d in heard) == entry["words"]
        assert 4 <= len(heard) <= 7


def test_nothing_is_above_four_kilohertz(data):
    entry = manifest(data, "test")["test_000000"]
    samples, _ = soundfile.read(entry["wav"].replace("{data_root}", str(data)))
    power = np.abs(np.fft.rfft(samples)) ** 2
    assert power[len(power) // 2 :].sum() < 1e-4 * power.sum()


def test_training_and_validation_use_other_takes(recordings):
    pools = fsdd.split_takes(fsdd.find_takes(recordings), ("cid", "dot"))
    for speaker in ("ann", "bob"):
        for digit in range(10):
            train = set(pools["train"][speaker][digit])
            valid = set(pools["valid"][speaker][digit])
            assert len(train) == len(valid) == 2 and not train & valid


def test_more_strings_extend_fewer(data, recordings, tmp_path):
    counts = {**COUNTS, "test": 9}
    fsdd.prepare_fsdd(
        recordings, tmp_path, ("cid", "dot"), **counts, speed=0, rooms={}
    )
    more, fewer = manifest(tmp_path, "test"), manifest(data, "test")
    assert len(more) == 9
    assert all(more[key] == entry for key, entry in fewer.items())


def test_speed_changes_pitch_and_length():
    time = np.arange(16000) / 16000
    samples = 0.5 * np.sin(2 * np.pi * 400 * time)
    fast = fsdd.play_faster(samples, 0.1)
    assert len(fast) == pytest.approx(16000 / 1.1, abs=2)
    spectrum = np.abs(np.fft.rfft(fast, 16000))
    assert spectrum.argmax() == pytest.approx(440, abs=1)


@pytest.mark.parametrize(
    ("speakers", "said"),
    [
        (("cid", "eve"), "no recordings of .'eve'.*'ann', 'bob'"),
        (("cid",), "mixtures need two speakers in test"),
        (("bob", "cid", "dot"), "two others in training"),
    ],
)
def test_bad_speakers_are_named(recordings, speakers, said):
    with pytest.raises(ValueError, match=said):
        fsdd.split_takes(fsdd.find_takes(recordings), speakers)


def test_missing_recordings_are_named(recordings, tmp_path):
    with pytest.raises(FileNotFoundError, match="7_jackson_32.wav"):
        fsdd.find_takes(tmp_path)
    takes = fsdd.find_takes(recordings)
    takes = {key: path for key, path in takes.items() if key[:2] != (3, "ann")}
    with pytest.raises(ValueError, match=r"ann has no \[3\] for train"):
        fsdd.split_takes(takes, ("cid", "dot"))


def test_broken_recording_is_named(tmp_path):
    path = tmp_path / "3_ann_0.wav"
    path.write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="3_ann_0.wav cannot be read"):
        fsdd.read_take(path)
    soundfile.write(path, np.zeros(800), RATE)
    with pytest.raises(ValueError, match="silent"):
        fsdd.read_take(path)
