"""Geometry of the array, and features against simulated plane waves."""

import math

import numpy as np
import pytest
import torch

from speechbrain_mpq.lobes.models.spatial_features import (
    MINI_PAIRS,
    PAPER_PAIRS,
    PHASES,
    SpatialFeatures,
    check_doa,
    interchannel_phase,
    linear_array,
    log_power,
    pair_phase,
    steer,
    used_microphones,
)


def test_paper_array_is_symmetric_and_56_cm_long():
    positions = linear_array()
    assert positions.mul(100).round().tolist() == [
        *(0, 7, 13, 18, 22, 25, 27, 28, 29, 31, 34, 38, 43, 49, 56)
    ]
    mirrored = positions[-1] - positions.flip(0)
    torch.testing.assert_close(mirrored, positions)


def test_pair_phase_is_frequency_times_path_difference():
    phase = pair_phase(
        torch.tensor([60.0]), torch.tensor([0.2]), torch.tensor([1000.0])
    )
    path = 0.2 * 0.5  # metres: distance times cos(60 degrees)
    assert phase.item() == pytest.approx(2 * math.pi * 1000 * path / 343)


def test_used_microphones_include_the_reference():
    assert used_microphones([(3, 2)], reference=1) == [1, 2, 3]


@pytest.mark.parametrize("doa", [-0.1, 180.5, float("nan")])
def test_direction_out_of_range_is_refused(doa):
    with pytest.raises(ValueError, match="0 to 180 degrees"):
        check_doa(torch.tensor([90.0, doa]))


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


def moving_wave(doa, microphones):
    """Tones from a talker whose direction is given for every sample."""
    rng = np.random.default_rng(0)
    tones = rng.uniform(100, 7900, (150, 1, 1))  # Hz
    starts = rng.uniform(0, 2 * np.pi, (150, 1, 1))
    positions = linear_array().numpy()[np.array(microphones) - 1]
    advance = positions * np.cos(np.radians(doa))[:, None] / 343.0
    times = np.arange(len(doa))[:, None] / 16000 + advance  # [samples, mics]
    wave = sum(
        np.sin(2 * np.pi * tone * times + start)
        for tone, start in zip(tones, starts)
    )
    return torch.from_numpy(wave).float()[None]


def test_angle_feature_follows_a_moving_talker():
    path = np.linspace(40, 130, 16000)  # degrees, within a second
    features = SpatialFeatures()
    spectra = features.stft(moving_wave(path, features.microphones))
    frames = spectra.shape[-1]
    followed = torch.from_numpy(path[:: features.hop].copy()).float()
    assert len(followed) == frames
    late = followed.roll(20)
    directions = torch.stack([followed, torch.full((frames,), 85.0), late])
    towards, still, late = features.angle_feature(spectra, directions[None])[0]
    assert towards[:, 2:-2].mean() > 0.93
    assert still[:, 2:-2].mean() < 0.5 and late[:, 2:-2].mean() < 0.4


@pytest.mark.parametrize("phase", PHASES)
def test_moving_features_are_the_fixed_ones_where_nothing_moves(phase):
    torch.manual_seed(0)
    features = SpatialFeatures(phase=phase)
    spectra = features.stft(torch.randn(2, 6000, 7))
    frames = spectra.shape[-1]
    doa = torch.tensor([[10.0, 80.0], [90.0, 170.0]])
    first, second = features(spectra, doa), features(spectra, doa.flip(1))
    still = doa[..., None].expand(-1, -1, frames)
    assert torch.equal(features(spectra, still), first)
    jump = torch.where(torch.arange(frames) < 9, still, still.flip(1))
    both = features(spectra, jump)
    assert torch.equal(both[..., :9], first[..., :9])
    assert torch.equal(both[..., 9:], second[..., 9:])


def test_directions_that_fit_no_frame_are_refused():
    features = SpatialFeatures()
    spectra = features.stft(torch.randn(1, 6000, 7))  # 24 frames
    for shape in ((1, 1, 23), (1, 1, 1, 24), (1,)):
        with pytest.raises(ValueError, match=r"\[batch, targets, 24\]"):
            features(spectra, torch.full(shape, 90.0))
    moving = torch.full((1, 1, 24), 90.0)
    for wrong in (float("nan"), 180.5):
        moving[..., 7] = wrong
        with pytest.raises(ValueError, match="0 to 180"):
            features(spectra, moving)


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
        SpatialFeatures(phase="tangent")
    with pytest.raises(ValueError, match="microphone 16"):
        SpatialFeatures(pairs=[(1, 16)])


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("moving", [False, True])
def test_forward_is_its_public_parts_together(phase, moving):
    features = SpatialFeatures(phase=phase)
    torch.manual_seed(0)
    spectra = features.stft(torch.randn(2, 256 * 150, 7))  # over one block
    frames = spectra.shape[-1]
    doa = torch.rand(2, 3, frames) * 180 if moving else torch.rand(2, 3) * 180
    ratio = interchannel_phase(spectra, features.first, features.second)
    expected = pair_phase(doa, features.distances, features.frequencies)
    expected = expected.movedim(2, -1) if moving else expected[..., None]
    cosine, sine = steer(ratio, expected)
    lps = log_power(spectra[:, :1])[:, None].expand(2, 3, 1, -1, -1)
    angle = ratio.angle()[:, None].expand(2, 3, -1, -1, -1)
    phases = {"steered": [cosine, sine], "cosine": [cosine], "ipd": [angle]}
    maps = torch.cat([lps, *phases[phase], cosine.mean(2, keepdim=True)], dim=2)
    given = features(spectra, doa)
    assert given.shape == (2, 3, features.inputs, frames)
    given = given.unflatten(2, (-1, features.bins))
    difference = given - maps
    if phase == "ipd":  # angles next to the cut may fall on either side
        turns = difference[:, :, 1:-1]
        turns -= 2 * math.pi * torch.round(turns / (2 * math.pi))
    assert difference.abs().max() < 1e-5
    assert torch.equal(features.angle_feature(spectra, doa), cosine.mean(2))


def test_no_frames_give_no_features():
    features = SpatialFeatures()
    spectra = torch.zeros(1, 7, 257, 0, dtype=torch.complex64)
    assert features(spectra, torch.tensor([[9.0]])).shape == (1, 1, 3598, 0)
