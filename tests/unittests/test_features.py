"""Features against plane waves that are simulated independently."""

import numpy as np
import pytest
import torch

from speechbrain_mpq.separation.array import linear_array
from speechbrain_mpq.separation.features import (
    MINI_PAIRS,
    PAPER_PAIRS,
    SpatialFeatures,
    interchannel_phase,
)


def plane_wave(doa, microphones, samples=16000):
    """Noise from a direction in free air: exact delays by FFT."""
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / 16000)
    positions = linear_array().numpy()[np.array(microphones) - 1]
    # A microphone further along the axis is nearer to a source at 0 degrees:
    # it hears it earlier.
    advance = positions * np.cos(np.radians(doa)) / 343.0
    shifted = spectrum * np.exp(2j * np.pi * advance[:, None] * frequencies)
    return torch.from_numpy(np.fft.irfft(shifted, samples).T).float()[None]


@pytest.mark.parametrize("pairs", [MINI_PAIRS, PAPER_PAIRS])
@pytest.mark.parametrize("doa", [0.0, 25.0, 90.0, 160.0])
def test_angle_feature_is_one_towards_the_source_only(pairs, doa):
    features = SpatialFeatures(pairs)
    spectra = features.stft(plane_wave(doa, features.microphones))
    away = 180.0 - doa if abs(doa - 90) > 20 else doa + 60
    directions = torch.tensor([[doa, away]])
    towards, other = features.angle_feature(spectra, directions)[0]
    assert towards[:, 2:-2].mean() > 0.95
    assert other[:, 2:-2].mean() < 0.4


def test_ipd_is_the_angle_of_the_ratio():
    torch.manual_seed(0)
    spectra = torch.randn(2, 3, 5, 4, dtype=torch.complex64)
    first, second = torch.tensor([0, 2]), torch.tensor([1, 0])
    ratio = interchannel_phase(spectra, first, second)
    expected = (spectra[:, [0, 2]] / spectra[:, [1, 0]]).angle()
    torch.testing.assert_close(ratio.angle(), expected)


def test_paper_features_are_2056_in_the_order_lps_ipd_af():
    features = SpatialFeatures(PAPER_PAIRS, phase="ipd")
    assert features.inputs == 2056
    spectra = features.stft(torch.randn(1, 8000, 12))
    doa = torch.tensor([[70.0]])
    maps = features(spectra, doa)[0, 0].unflatten(0, (8, 257))
    power = spectra[0, 0].abs().square()
    torch.testing.assert_close(maps[0], torch.log10(power + 1e-8))
    expected = spectra[0, features.first[2]] / spectra[0, features.second[2]]
    torch.testing.assert_close(maps[3].cos(), expected.angle().cos())
    torch.testing.assert_close(
        maps[7], features.angle_feature(spectra, doa)[0, 0]
    )


def test_several_targets_equal_one_at_a_time():
    features = SpatialFeatures()
    spectra = features.stft(torch.randn(2, 4000, 7))
    doa = torch.tensor([[10.0, 80.0], [90.0, 170.0]])
    both = features(spectra, doa)
    for target in range(2):
        alone = features(spectra, doa[:, target : target + 1])
        torch.testing.assert_close(both[:, target], alone[:, 0])


def test_silent_channels_give_finite_features():
    features = SpatialFeatures()
    spectra = features.stft(torch.zeros(1, 4000, 7))
    assert torch.isfinite(features(spectra, torch.tensor([[45.0]]))).all()


def test_stft_is_inverted_by_istft():
    features = SpatialFeatures()
    waveform = torch.randn(1, 5000, 7)
    spectra = features.stft(waveform)
    torch.testing.assert_close(
        features.istft(spectra[:, 3], 5000), waveform[..., 3]
    )


def test_unknown_phase_and_microphone_are_refused():
    with pytest.raises(ValueError, match="steered"):
        SpatialFeatures(phase="cosine")
    with pytest.raises(ValueError, match="microphone 16"):
        SpatialFeatures(pairs=[(1, 16)])
