"""Sound out of files, manifests, and jobs in several processes."""

import json
import shutil
import sys

import numpy as np
import pytest
import soundfile

from speechbrain_mpq.simulation import recordings


def have_ffmpeg():
    """Whether sound can be decoded here."""
    try:
        recordings.ffmpeg_program()
    except ImportError:
        return False
    return True


needs_ffmpeg = pytest.mark.skipif(
    not have_ffmpeg(), reason="no ffmpeg program and no imageio-ffmpeg"
)


def test_missing_program_names_the_fix(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match="pip install imageio-ffmpeg"):
        recordings.ffmpeg_program()


@needs_ffmpeg
def test_stereo_of_another_rate_becomes_mono_at_16_khz(tmp_path):
    time = np.arange(44100) / 44100
    left = 0.4 * np.sin(2 * np.pi * 440 * time)
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([left, 0 * left], 1), 44100)
    samples = recordings.read_sound(path)
    assert samples.dtype == np.int16 and len(samples) == 16000
    expected = 0.2 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    inner = slice(200, -200)  # the filter rings at the ends
    error = samples[inner] / 2**15 - expected[inner]
    assert np.abs(error).max() < 2e-3


@needs_ffmpeg
@pytest.mark.parametrize("content", ["text", "silence", "no sound"])
def test_what_holds_no_sound_is_named(tmp_path, content):
    path = tmp_path / "a.wav"
    if content == "text":
        path.write_text("Text:  HELLO")
    elif content == "silence":
        soundfile.write(path, np.zeros(16000), 16000)
    else:
        soundfile.write(path, np.zeros(0), 16000)
    with pytest.raises(ValueError, match="a.wav .*copy it again"):
        recordings.read_sound(path)


def test_audio_is_written_whole(tmp_path):
    samples = np.arange(-800, 800, dtype=np.int16)
    path = tmp_path / "new/folder/a.flac"
    recordings.write_flac(path, samples)
    stored, rate = soundfile.read(path, dtype="int16")
    np.testing.assert_array_equal(stored, samples)
    assert rate == 16000 and recordings.seconds_of(path) == 0.1
    with pytest.raises(ValueError):
        recordings.write_flac(path, np.array(["no", "samples"]))
    assert [p.name for p in path.parent.iterdir()] == ["a.flac"]
    assert recordings.seconds_of(path) == 0.1


def test_unreadable_audio_counts_as_missing(tmp_path):
    path = tmp_path / "a.flac"
    path.write_bytes(b"fLaC")
    assert recordings.seconds_of(path) is None


def odd(job):
    """Fails for even numbers."""
    if job % 2 == 0:
        raise ValueError(f"{job} is even")


def test_jobs_go_on_after_a_failure():
    failures = recordings.run_jobs(odd, list(range(9)), 2, "numbers")
    assert failures == {n: f"{n} is even" for n in range(0, 9, 2)}
    assert recordings.run_jobs(odd, [], 2, "numbers") == {}


def entry(speaker):
    """What a manifest needs."""
    return {"wav": "a.flac", "words": "a", "speaker": speaker, "length": 1.0}


def test_manifests_are_written_all_or_none(tmp_path):
    good = {"b": entry("one"), "a": entry("two")}
    recordings.write_manifests(tmp_path, {"train": good, "test": good})
    text = (tmp_path / "test_speech.json").read_text()
    assert json.loads(text) == good and text.index('"a"') < text.index('"b"')
    alone = {"a": entry("one")}
    wordless = {**good, "c": {**entry("one"), "words": ""}}
    for bad, said in (
        (alone, "two speakers, the valid split"),
        (wordless, "valid: c has no .'words'"),
    ):
        splits = {"train": {"c": entry("one"), **good}, "valid": bad}
        with pytest.raises(ValueError, match=said):
            recordings.write_manifests(tmp_path, splits)
    assert json.loads((tmp_path / "train_speech.json").read_text()) == good
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("test_speech.json", "train_speech.json"),
    ]
