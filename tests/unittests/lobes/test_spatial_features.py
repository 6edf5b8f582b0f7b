"""Array geometry, and features against plane waves and plain formulas."""

import math

import numpy as np
import pytest
import torch

from speechbrain_mpq.lobes.models.separator import Separator
from speechbrain_mpq.lobes.models.spatial_features import (
    MINI_PAIRS,
    PAPER_PAIRS,
    PHASES,
    SpatialFeatures,
    check_doa,
    linear_array,
    pair_phase,
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


@pytest.mark.parametrize("doa", [-0.1, 360.5, float("nan")])
def test_direction_out_of_the_full_circle_is_refused(doa):
    check_doa(torch.tensor([0.0, 270.0, 360.0]), planar=True)
    with pytest.raises(ValueError, match="0 to 360 degrees"):
        check_doa(torch.tensor([90.0, doa]), planar=True)


SQUARE = [(0.0, 0.0), (6.0, 0.0), (6.0, 4.0), (0.0, 4.0)]


@pytest.mark.parametrize(
    "positions, message",
    [
        ([(0, 0), (1, 1)], "three microphones or more"),
        ([0, 1, 2], "three microphones or more"),
        ([(0, 0), (1, 1), (3, 3)], "give spacings_cm instead"),
        ([(0, 0), (1, 1), (0, 0)], "two microphones in one place"),
        ([(0, 0), (1, 1), (0, float("inf"))], "finite"),
    ],
)
def test_positions_that_are_no_planar_array(positions, message):
    with pytest.raises(ValueError, match=message):
        SpatialFeatures([(1, 2)], positions_cm=positions)


def test_an_array_is_linear_or_planar():
    with pytest.raises(ValueError, match="give one of them"):
        SpatialFeatures([(1, 2)], spacings_cm=[5], positions_cm=SQUARE)
    with pytest.raises(ValueError, match="the array has 4"):
        SpatialFeatures([(1, 5)], positions_cm=SQUARE)


def test_a_planar_array_on_a_line_is_the_linear_one():
    """Bit by bit, in front of it; all is the same from behind."""
    pairs, generator = [(3, 1), (2, 3)], torch.Generator().manual_seed(0)
    linear = SpatialFeatures(pairs, spacings_cm=[5, 7])
    # The fourth microphone makes it planar and is not used
    planar = SpatialFeatures(
        pairs, positions_cm=[(0, 0), (5, 0), (12, 0), (0, 3)]
    )
    assert "positions_cm" not in linear.settings
    spectra = linear.stft(torch.randn(1, 8000, 3, generator=generator))
    for doa in (10.0, 90.0, 150.0):
        features = linear(spectra, torch.tensor([[doa]]))
        ahead = planar(spectra, torch.tensor([[doa]]))
        behind = planar(spectra, torch.tensor([[360 - doa]]))
        torch.testing.assert_close(ahead, features, atol=1e-4, rtol=0)
        torch.testing.assert_close(behind, features, atol=1e-4, rtol=0)


@pytest.mark.parametrize("doa", [0.0, 77.0, 180.0, 301.0])
def test_planar_features_see_the_full_circle(doa):
    """A plane wave has an angle feature of 1 in its direction alone."""
    angle = math.radians(doa)
    advance = np.array(SQUARE) / 100 @ [math.cos(angle), math.sin(angle)] / 343
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.standard_normal(16000))
    frequencies = np.fft.rfftfreq(16000, 1 / 16000)
    turned = spectrum * np.exp(2j * np.pi * advance[:, None] * frequencies)
    waves = torch.from_numpy(np.fft.irfft(turned, 16000).T).float()[None]
    features = SpatialFeatures(
        [(1, 2), (1, 3), (2, 4), (1, 4)], positions_cm=SQUARE
    )
    spectra = features.stft(waves)
    around = torch.arange(0.0, 360.0, 15.0) + doa % 15
    maps = torch.cat([features(spectra, d[None, None]) for d in around])
    fit = maps[:, 0, -features.bins :].mean((1, 2))
    assert around[fit.argmax()] == doa and fit.max() > 0.99
    others = fit[(around - doa).abs() > 20]
    assert others.max() < 0.95


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


def angle_feature(features, spectra, doa):
    """The last of the maps, [batch, targets, bins, frames]."""
    return features(spectra, doa).unflatten(2, (-1, features.bins))[:, :, -1]


@pytest.mark.parametrize("pairs", [MINI_PAIRS, PAPER_PAIRS])
@pytest.mark.parametrize("doa", [0.0, 25.0, 90.0, 160.0])
def test_angle_feature_is_one_towards_the_source_only(pairs, doa):
    features = SpatialFeatures(pairs)
    spectra = features.stft(plane_wave(doa, features.microphones))
    away = 180.0 - doa if abs(doa - 90) > 20 else doa + 60
    directions = torch.tensor([[doa, away]])
    towards, other = angle_feature(features, spectra, directions)[0]
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
    towards, still, late = angle_feature(features, spectra, directions[None])[0]
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


def plain_maps(features, spectra, doa):
    """All maps by Eqs. 1 to 3, each [batch, targets, maps, bins, frames]."""
    shape = (*doa.shape[:2], -1, -1, -1)
    ratio = spectra[:, features.first] * spectra[:, features.second].conj()
    ratio = torch.polar(torch.ones_like(ratio.real), ratio.angle())
    phase = pair_phase(doa, features.distances, features.frequencies)
    phase = phase.movedim(2, -1) if doa.dim() == 3 else phase[..., None]
    turned = ratio[:, None] * torch.polar(torch.ones_like(phase), -phase)
    power = torch.log10(spectra[:, :1].abs().square() + 1e-8)
    return {
        "lps": power[:, None].expand(shape),
        "ipd": ratio.angle()[:, None].expand(shape),
        "cosine": turned.real,
        "sine": turned.imag,
        "af": turned.real.mean(2, keepdim=True),
    }


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
    expected = plain_maps(features, spectra, doa)["af"][0, 0, 0]
    torch.testing.assert_close(maps[7], expected, atol=1e-5, rtol=1e-5)


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
def test_features_are_those_of_the_plain_formulas(phase, moving):
    features = SpatialFeatures(phase=phase)
    torch.manual_seed(0)
    spectra = features.stft(torch.randn(2, 256 * 150, 7))  # over one block
    frames = spectra.shape[-1]
    doa = torch.rand(2, 3, frames) * 180 if moving else torch.rand(2, 3) * 180
    maps = plain_maps(features, spectra, doa)
    kinds = {"steered": ("cosine", "sine")}.get(phase, (phase,))
    expected = torch.cat([maps[k] for k in ("lps", *kinds, "af")], dim=2)
    result = features(spectra, doa)
    assert result.shape == (2, 3, features.inputs, frames)
    difference = result.unflatten(2, (-1, features.bins)) - expected
    if phase == "ipd":  # angles next to the cut may fall on either side
        turns = difference[:, :, 1:-1]
        turns -= 2 * math.pi * torch.round(turns / (2 * math.pi))
    assert difference.abs().max() < 1e-5


def test_no_frames_give_no_features():
    features = SpatialFeatures()
    spectra = torch.zeros(1, 7, 257, 0, dtype=torch.complex64)
    assert features(spectra, torch.tensor([[9.0]])).shape == (1, 1, 3598, 0)


@pytest.mark.parametrize("hop", [256, 128, 200])
@pytest.mark.parametrize("samples", [513, 1000, 16001])
def test_transforms_are_those_of_torch(hop, samples):
    features = SpatialFeatures(hop=hop)
    mics = len(features.microphones)
    waveforms = torch.randn(2, samples, mics)
    spectra = features.stft(waveforms)
    flat = waveforms.transpose(1, 2).reshape(-1, samples)
    options = {"n_fft": 512, "hop_length": hop, "window": features.window}
    expected = torch.stft(
        flat, **options, return_complex=True, pad_mode="constant"
    )
    assert torch.equal(spectra.flatten(0, 1), expected)
    turned = spectra[:, 0] * torch.randn_like(spectra[:, 0])
    signal = features.istft(turned, samples)
    expected = torch.istft(turned, **options, length=samples)
    assert torch.allclose(signal, expected, atol=1e-6)
    if hop == 256:  # two addends: their order is no matter
        assert torch.equal(signal, expected)


def test_transforms_have_gradients():
    features = SpatialFeatures()
    mics = len(features.microphones)
    waveforms = torch.randn(1, 1000, mics, requires_grad=True)
    spectra = features.stft(waveforms)
    features.istft(spectra[:, 0], 1000).square().sum().backward()
    given = waveforms.grad[..., 0]
    assert torch.allclose(given, 2 * waveforms[..., 0], atol=1e-5)


def test_separators_have_the_gradients_of_torchs_inverse(monkeypatch):
    """To the last digit: published trainings depend on them."""

    def inverse(self, spectrum, samples):
        own = {"window": self.window, "length": samples}
        return torch.istft(spectrum, self.n_fft, self.hop, **own)

    def gradients():
        torch.manual_seed(0)
        separator = Separator(SpatialFeatures([(8, 1)]), 8, 16, 3, 1, 2)
        waveforms, target = torch.randn(2, 8000, 2), torch.randn(2, 8000)
        estimate = separator(waveforms, torch.tensor([[60.0], [30.0]]))[:, 0]
        (estimate - target).square().mean().backward()
        return [p.grad for p in separator.parameters()]

    actual = gradients()
    monkeypatch.setattr(SpatialFeatures, "istft", inverse)
    assert all(map(torch.equal, actual, gradients()))
