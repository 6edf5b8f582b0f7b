"""Utterances in noise."""

import numpy as np
import pytest
import soundfile

from speechbrain_mpq.simulation.noise import NoiseMaker
from speechbrain_mpq.simulation.noisy_speech import NoisySpeech, Voices

RATE = 16000


@pytest.fixture
def speech(tmp_path):
    """Manifest of a short and a long utterance."""
    entries = {}
    for name, samples in (("short", 5000), ("long", 30000)):
        path = tmp_path / f"{name}.flac"
        waveform = 0.1 * np.sin(np.arange(samples) / 3)
        soundfile.write(path, waveform, RATE)
        entries[name] = {"wav": str(path)}
    return entries


def test_clips(speech):
    noise = NoiseMaker(Voices(speech))
    clips = NoisySpeech(speech, noise, seconds=1, snr=(0, 10))
    for key in speech:
        noisy, clean, drawn = clips.draw(key)
        again, _, _ = clips.draw(key)
        later, _, _ = clips.draw(key, epoch=1)
        assert noisy.shape == clean.shape == (RATE,)
        assert np.array_equal(noisy, again)
        assert not np.array_equal(noisy, later)
        assert 0 <= drawn["snr"] <= 10 and drawn["noise"] in noise.types
    _, clean, _ = clips.draw("short")
    assert np.count_nonzero(clean) <= 5000
    assert clips.draw("short", kind="wind")[2]["noise"] == "wind"


def test_whole_utterances_and_gain(speech):
    clips = NoisySpeech(speech, NoiseMaker(), snr=(60, 60), gain=(-20, -20))
    noisy, clean, _ = clips.draw("long")
    assert noisy.shape == (30000,)
    assert np.std(clean) == pytest.approx(0.01 / 2**0.5, rel=0.01)


def test_a_pause_is_no_clip(tmp_path):
    waveform = np.zeros(20 * RATE)
    waveform[-100:] = 0.5
    path = tmp_path / "late.flac"
    soundfile.write(path, waveform, RATE)
    clips = NoisySpeech({"a": {"wav": path}}, NoiseMaker(), seconds=1)
    assert all(clips.draw("a", epoch)[1].any() for epoch in range(5))


def test_bad_speech(tmp_path):
    for waveform, rate, said in (
        (np.ones(100) / 2, 8000, "has 8000 Hz"),
        (np.ones((100, 2)) / 2, RATE, "one channel"),
        (np.zeros(100), RATE, "is silent"),
    ):
        path = tmp_path / "a.wav"
        soundfile.write(path, waveform, rate)
        with pytest.raises(ValueError, match=said):
            Voices({"a": {"wav": path}})[0]
    with pytest.raises(ValueError, match="no utterances"):
        NoisySpeech({}, NoiseMaker())
