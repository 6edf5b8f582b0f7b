"""What microphones do wrong is told, and offsets that move are taken off."""

import logging

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq.inference.audio import AudioFile
from speechbrain_mpq.inference.microphones import Drift, OffsetFilter

TIME = np.arange(48000)[:, None] / 16000


def heard(channels=3):
    """A tone above all offsets, and some noise of each microphone."""
    rng = np.random.default_rng(0)
    noise = 0.001 * rng.standard_normal((len(TIME), channels))
    return 0.1 * np.sin(2 * np.pi * 440 * TIME) + noise


def slow():
    """A voice at 110 Hz, as three microphones 18 cm apart hear it."""
    delays = np.arange(3) * 0.18 / 343
    return 0.1 * np.sin(2 * np.pi * 110 * (TIME - delays))


def opened(path, signal, rate=16000):
    """A file of three microphones of an array of 15."""
    held = np.repeat(signal, rate // 16000, axis=0)
    soundfile.write(path, held, rate, "FLOAT")
    return AudioFile(path, [1, 4, 15], array_size=15)


@pytest.mark.parametrize("rate", [16000, 48000])
@pytest.mark.parametrize(
    "offset",
    [np.sin(2 * np.pi * 0.1 * TIME), 0.5 * TIME, 1.0 * (TIME > 1.5)],
    ids=["swings", "grows", "jumps"],
)
def test_an_offset_that_moves_is_taken_off(offset, rate, tmp_path):
    signal = heard()
    gains = np.array([0.3, -0.2, 0.25])
    audio = opened(tmp_path / "a.wav", signal + offset * gains, rate)
    stats = audio.scan()
    (warning,) = stats.warnings
    assert "offset moves" in warning
    assert abs(stats.rms / signal[:, 0].std() - 1) < 0.05
    blocks = torch.cat(list(audio.blocks(5000)))
    assert len(blocks) == audio.samples
    assert torch.equal(torch.cat(list(audio.blocks(16001))), blocks)
    wanted = opened(tmp_path / "b.wav", signal, rate)
    assert not wanted.scan().warnings
    rest = blocks - torch.cat(list(wanted.blocks()))
    assert rest.std() < 0.4 * (offset * gains).std()


def test_a_constant_offset_is_no_moving_one(tmp_path):
    signal = heard()
    audio = opened(tmp_path / "a.wav", signal + [5.0, -3.0, 0.5])
    assert not [w for w in audio.scan().warnings if "moves" in w]
    plain = torch.cat(list(audio.blocks()))
    wanted = torch.from_numpy(signal - signal.mean(0)).float()
    assert torch.allclose(plain, wanted, atol=1e-6)


def test_blocks_do_not_change_what_is_followed():
    signal = torch.from_numpy(heard() + TIME)
    once = OffsetFilter(256).push(signal, last=True)
    follower = OffsetFilter(256)
    pieces = [follower.push(piece) for piece in signal.split(999)]
    pieces.append(follower.push(signal[:0], last=True))
    assert torch.equal(torch.cat(pieces), once)


def test_each_microphone_that_is_odd_is_told(tmp_path, caplog):
    signal = heard()
    for change, told in (
        (lambda x: x * [1, 1, 0], "microphone 15 is silent"),
        (lambda x: x * [1, 0.003, 1], "microphone 4 is 50 dB softer than"),
        (lambda x: x * [9, 0.3, 0.3], "microphone 1 is 30 dB louder than"),
        (lambda x: x[:, [0, 1, 1]], "microphones 4 and 15 have one signal"),
        (lambda x: slow() + x * [1, -1, 1], None),  # fast alone: a direction
        (
            lambda x: (slow() + x) * [1, -1, 1],
            "microphone 4 has the opposite polarity",
        ),
        (
            lambda x: (slow() + x) * [-1, 1, 1] + 0.1,
            "microphone 1 has the opposite polarity",
        ),
        (lambda x: x * [1, 3, 0.3], None),
    ):
        audio = opened(tmp_path / "a.wav", change(signal))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            audio.log_warnings()
        assert len(caplog.messages) == bool(told), caplog.messages
        assert not told or told in caplog.text


def test_channels_of_no_array_may_have_any_level(tmp_path):
    soundfile.write(tmp_path / "a.wav", heard() * [1, 0.001, 0], 16000)
    (warning,) = AudioFile(tmp_path / "a.wav").scan().warnings
    assert warning.endswith("channel 3 is silent")


@pytest.mark.parametrize("more", [0, 1, 20, 2000])
@pytest.mark.parametrize("seed", range(8))
def test_a_last_block_of_a_few_samples_is_no_offset(more, seed):
    chance = np.random.default_rng(seed)
    time = np.arange(48000 + more)[:, None] / 16000
    tone = np.sin(2 * np.pi * chance.uniform(120, 130) * time + seed)
    tone *= 1 + np.sin(2 * np.pi * 3 * time + chance.uniform(0, 6))
    drift = Drift(16000)
    for start in range(0, len(tone), 48000):
        drift.update(tone[start : start + 48000])
    assert not drift.is_heard()
