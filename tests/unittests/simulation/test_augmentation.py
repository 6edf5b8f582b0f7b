"""Augmented voices, sources and microphones: what changes, and what stays."""

import numpy as np
import pytest
import soundfile

from speechbrain_mpq.simulation.augmentation import (
    EQUALIZER,
    Augmentation,
    NoisySpeech,
    Voices,
    change_speed,
    mu_law,
    shape_spectrum,
)
from speechbrain_mpq.simulation.noise import NoiseMaker

RATE = 16000


def vowel(pitch=125.0, formants=(700, 1200), seconds=1.0):
    """Harmonics under an envelope with peaks at the formants."""
    time = np.arange(round(seconds * RATE)) / RATE
    signal = np.zeros_like(time)
    for harmonic in np.arange(pitch, 7500, pitch):
        level = sum(np.exp(-(((harmonic - f) / 150) ** 2)) for f in formants)
        signal += (level + 0.003) * np.sin(2 * np.pi * harmonic * time)
    return signal / np.abs(signal).max()


def peaks(signal, low, high):
    """Frequency of the strongest component within a range, Hz."""
    power = np.abs(np.fft.rfft(signal * np.hanning(len(signal))))
    frequencies = np.fft.rfftfreq(len(signal), 1 / RATE)
    inside = (frequencies >= low) & (frequencies < high)
    return frequencies[inside][power[inside].argmax()]


def spacing(signal):
    """Pitch by the autocorrelation, Hz."""
    power = np.abs(np.fft.rfft(signal, 2 * len(signal))) ** 2
    correlation = np.fft.irfft(power)
    lags = np.arange(RATE // 400, RATE // 60)
    return RATE / lags[correlation[lags].argmax()]


@pytest.mark.parametrize("factor", [0.88, 1.12])
def test_formants_move_and_the_pitch_stays(factor):
    signal = vowel(formants=(1000, 3000))
    moved = shape_spectrum(signal, formants=factor)
    assert len(moved) == len(signal)
    assert spacing(moved) == pytest.approx(spacing(signal), rel=0.01)
    for formant in (1000, 3000):
        found = peaks(moved, 0.8 * formant, 1.25 * formant)
        assert found == pytest.approx(factor * formant, abs=130)


def test_nothing_asked_for_nothing_changed():
    signal = vowel()
    np.testing.assert_allclose(shape_spectrum(signal), signal, atol=1e-9)
    for count in (1, 100, 511, 4097):
        assert len(shape_spectrum(signal[:count], 1.1)) == count


def test_equalizer_has_the_levels_it_was_given():
    noise = np.random.default_rng(0).standard_normal(4 * RATE)
    levels = np.array([-6.0, 6, 0, -3, 4])
    shaped = shape_spectrum(noise, levels=levels)
    frequencies = np.fft.rfftfreq(len(noise), 1 / RATE)
    gain = np.abs(np.fft.rfft(shaped)) / np.abs(np.fft.rfft(noise))
    for frequency, level in zip(EQUALIZER, levels):
        near = np.abs(frequencies / frequency - 1) < 0.05
        assert 20 * np.log10(np.median(gain[near])) == pytest.approx(
            level, abs=0.7
        )


def test_a_narrow_band_ends_where_it_should():
    noise = np.random.default_rng(0).standard_normal(2 * RATE)
    power = np.abs(np.fft.rfft(shape_spectrum(noise, highest=3400))) ** 2
    frequencies = np.fft.rfftfreq(len(noise), 1 / RATE)
    assert power[frequencies > 3600].sum() < 1e-4 * power.sum()


def test_speed_moves_the_pitch():
    assert spacing(change_speed(vowel(), 1.1)) == pytest.approx(137.5, rel=0.01)


def test_mu_law_has_8_bits_and_is_the_standards_curve():
    samples = np.linspace(-1, 1, 20001)
    coded = mu_law(samples)
    assert len(np.unique(coded.round(9))) == 255  # -0 is 0
    # 1/256 of full scale is at 1/8 of the levels: y = ln(1 + mu x)/ln(1 + mu)
    assert np.abs(coded - samples).max() < 0.025
    error = samples - coded
    assert 10 * np.log10((samples**2).sum() / (error**2).sum()) > 35


def test_shares_decide_how_often():
    rng = np.random.default_rng(0)
    never = Augmentation(voice=0, noise=0, third_talker=0, microphones=0)
    signal = vowel().astype(np.float32)
    assert never.voice(rng, signal) is signal
    gains, offset = never.response(rng, 7)
    assert (gains == 1).all() and not offset.any()
    half = Augmentation(third_talker=0.5)
    drawn = [half.happens(rng, "third_talker") for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.04)


def test_microphones_differ_by_what_is_said():
    always = Augmentation(microphones=1)
    rng = np.random.default_rng(0)
    drawn = [always.response(rng, 7) for _ in range(2000)]
    gains = np.stack([gain for gain, _ in drawn])
    assert (gains[:, 0] == 1).all()
    dead = (gains == 0).any(1)
    assert dead.mean() == pytest.approx(1 / 50, abs=0.01)
    living = gains[:, 1:][gains[:, 1:] != 0]
    assert 20 * np.log10(np.abs(living)).std() == pytest.approx(1, abs=0.05)
    assert np.degrees(np.angle(living)).std() == pytest.approx(5, abs=0.2)
    assert all(not offset[gain == 0].any() for gain, offset in drawn)


def test_noise_ratio_lies_in_its_range():
    augmentation = Augmentation(snr=(3, 4))
    rng = np.random.default_rng(0)
    kinds = NoiseMaker().types
    for kind in kinds:
        noise, ratio = augmentation.noise(rng, 8000, (), kind)
        assert noise.shape == (8000,) and 3 <= ratio <= 4


def test_direction_stays_in_front_of_the_array():
    augmentation = Augmentation(doa=5, doa_share=1)
    rng = np.random.default_rng(0)
    for doa in (0.0, 90.0, 179.0):
        given = [augmentation.direction(rng, doa, 40) for _ in range(200)]
        assert 0 <= min(given) and max(given) <= 180
        assert 3 < np.abs(np.array(given) - doa).max() <= 5


def test_direction_is_never_nearer_to_the_other_talker():
    augmentation = Augmentation(doa=5, doa_share=1)
    rng = np.random.default_rng(0)
    given = [augmentation.direction(rng, 90, 6) for _ in range(200)]
    assert 1.5 < np.abs(np.array(given) - 90).max() <= 2


def test_half_of_the_directions_are_exact():
    rng = np.random.default_rng(0)
    given = [Augmentation().direction(rng, 90, 40) for _ in range(400)]
    assert 0.4 < np.mean(np.array(given) == 90) < 0.6


@pytest.mark.parametrize(
    "options", [{"voice": 1.5}, {"noise": -0.1}, {"snr": (5, 0)}, {"doa": -1}]
)
def test_impossible_shares_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Augmentation(**options)


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
