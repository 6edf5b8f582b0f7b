"""The compiled loop of features against PyTorch's, which is the witness."""

import logging
import math

import pytest
import torch

from speechbrain_mpq.inference.engines import fused_features
from speechbrain_mpq.inference.engines.fused_features import (
    FusedFeatures,
    fused,
)
from speechbrain_mpq.lobes.models.separator import Separator, build_separator
from speechbrain_mpq.lobes.models.spatial_features import (
    BLOCK_FRAMES,
    PHASES,
    SpatialFeatures,
)

compiled = pytest.mark.skipif(
    fused_features.numba is None, reason="the extra fast is not installed"
)
RECIPES = (
    *("mini", "mini_ipd", "paper", "large", "linear4", "circular6"),
    *("av_mini", "av_paper"),
)
SMALL = {"pairs": [(2, 1), (3, 1), (2, 3)], "spacings_cm": [4, 6]}


def noise(features, batch=1, frames=5, seed=0):
    """Random spectra, as the STFT lays them in memory."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch, len(features.microphones), frames, features.bins
    spectra = torch.randn(shape, generator=generator, dtype=torch.complex64)
    return spectra.transpose(2, 3)


def directions(*shape):
    """Random directions on half a circle."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 180


def differences(features, given, wanted):
    """Largest differences: of levels, of phases as points of a circle."""
    given, wanted = (
        x.unflatten(2, (-1, features.bins)).movedim(2, 0)
        for x in (given, wanted)
    )
    phases = [x[1:-1] for x in (given, wanted)]
    if features.phase == "ipd":
        phases = [torch.cat([x.cos(), x.sin()]) for x in phases]
    pairs = (
        (given[0], wanted[0]),
        phases,
        (given[-1], wanted[-1]),
    )
    return [(one - other).abs().max().item() for one, other in pairs]


@compiled
@pytest.mark.parametrize("name", RECIPES)
def test_every_geometry_of_the_recipes(name):
    model = build_separator(f"hparams/models/separator_{name}.yaml")
    plain, fast = model.features, fused(model.features)
    assert isinstance(fast, FusedFeatures) and fast.maps == plain.maps
    spectra, doa = noise(plain, batch=2), directions(2, 3)
    given, wanted = fast(spectra, doa), plain(spectra, doa)
    assert given.shape == wanted.shape and given.stride() == wanted.stride()
    assert max(differences(plain, given, wanted)) < 1e-5


@compiled
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("frames", [1, BLOCK_FRAMES, BLOCK_FRAMES + 1, 75])
def test_any_number_of_frames_and_moving_talkers(phase, frames):
    plain = SpatialFeatures(phase=phase, n_fft=32, hop=16, **SMALL)
    fast, spectra = fused(plain), noise(plain, 2, frames)
    for doa in (directions(2, 1), directions(2, 2, frames)):
        given, wanted = fast(spectra, doa), plain(spectra, doa)
        assert max(differences(plain, given, wanted)) < 1e-5


@compiled
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("hop", [256, 128, 200])
@pytest.mark.parametrize("samples", [512, 513, 1000, 12000])
def test_waveforms_are_analysed_as_by_pytorch(phase, hop, samples):
    plain = SpatialFeatures(phase=phase, hop=hop, **SMALL)
    generator = torch.Generator().manual_seed(2)
    waveforms = torch.randn(2, samples, 3, generator=generator)
    level = torch.tensor([[0.5], [2.0]])
    rows = waveforms.transpose(1, 2).contiguous().transpose(1, 2)
    wanted, reference = plain.analyse(waveforms, level, directions(2, 2))
    for lying in (waveforms, rows):
        given, own = fused(plain).analyse(lying, level, directions(2, 2))
        assert given.shape == wanted.shape
        assert torch.allclose(own, reference, atol=1e-4)
        # Bins that hold next to nothing have phases of their rounding
        assert max(differences(plain, given, wanted)) < 0.02
        assert (given - wanted).abs().median() < 1e-6


@compiled
@pytest.mark.parametrize("phase", PHASES)
def test_silence_and_tiny_powers_have_the_phases_of_pytorch(phase):
    plain = SpatialFeatures(phase=phase, n_fft=32, hop=16, **SMALL)
    spectra = noise(plain, frames=4)
    spectra[..., 0] = 0
    spectra[..., 1] *= 1e-12
    spectra[0, 1, :, 2] = complex(-0.0, 0.0)
    spectra = torch.complex(spectra.real, spectra.imag)
    spectra.imag[:, :, [0, -1]] = 0  # as real signals have them: phase 0 or pi
    given, wanted = (
        f(spectra, directions(1, 1)) for f in (fused(plain), plain)
    )
    assert torch.allclose(given, wanted, atol=1e-5)
    assert math.isfinite(given.sum())


@compiled
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay_where_they_are(phase, value):
    plain = SpatialFeatures(phase=phase, n_fft=32, hop=16, **SMALL)
    spectra = noise(plain)
    torch.view_as_real(spectra)[0, 1, 3, 2, 1] = value
    given, wanted = (
        f(spectra, directions(1, 1)) for f in (fused(plain), plain)
    )
    assert wanted.isnan().any()
    assert torch.equal(given.isnan(), wanted.isnan())
    assert torch.allclose(given, wanted, atol=1e-5, equal_nan=True)


@compiled
def test_pieces_of_a_stream_are_the_whole_to_the_bit():
    fast = FusedFeatures(**SMALL)
    spectra, doa = noise(fast, frames=70), directions(1, 2)
    whole = fast(spectra, doa)
    pieces = [fast(spectra[..., a:b], doa) for a, b in ((0, 3), (3, 70))]
    assert torch.equal(torch.cat(pieces, dim=3), whole)
    moving = doa[..., None].expand(-1, -1, 70)
    assert torch.equal(fast(spectra, moving), whole)


@compiled
def test_other_types_and_gradients_are_those_of_pytorch():
    plain, fast = SpatialFeatures(**SMALL), FusedFeatures(**SMALL)
    spectra = noise(plain).to(torch.complex128)
    doa = directions(1, 1)
    assert torch.equal(fast(spectra, doa), plain(spectra, doa))
    waveforms = torch.randn(1, 1000, 3, requires_grad=True)
    level = torch.ones(1, 1)
    given, wanted = (f.analyse(waveforms, level, doa) for f in (fast, plain))
    assert all(map(torch.equal, given, wanted)) and given[0].requires_grad


@compiled
def test_no_frames_and_directions_that_do_not_fit():
    fast = FusedFeatures(**SMALL)
    empty = noise(fast, frames=0)
    assert fast(empty, directions(1, 1)).shape == (1, 1, 8 * 257, 0)
    for doa in (directions(1, 1, 4), directions(1)):
        with pytest.raises(ValueError, match="expected DOAs"):
            fast(noise(fast), doa)
        with pytest.raises(ValueError, match="expected DOAs"):
            fast.analyse(torch.zeros(1, 9000, 3), torch.ones(1, 1), doa)
    with pytest.raises(ValueError, match="0 to 180"):
        fast(noise(fast), directions(1, 1) + 181)


@compiled
def test_a_separator_gives_the_same_with_either():
    torch.manual_seed(0)
    separator = Separator(SpatialFeatures(**SMALL), 8, 16, 3, 1, 2).eval()
    waveforms, doa = torch.randn(2, 12000, 3), directions(2, 2)
    with torch.no_grad():
        wanted = separator(waveforms, doa)
        separator.features = fused(separator.features)
        given = separator(waveforms, doa)
    assert isinstance(separator.features, FusedFeatures)
    assert torch.allclose(given, wanted, atol=1e-5)
    assert wanted.abs().max() > 1e-3


@compiled
def test_where_no_folder_can_be_written_it_is_compiled_anew():
    """Numba finds no place for the cache of a function without a file."""
    names = {}
    exec("def double(x):\n    return 2 * x", names)
    with pytest.raises(RuntimeError, match="cannot cache"):
        fused_features.numba.njit(cache=True)(names["double"])
    assert fused_features._compiled(names["double"])(21) == 42


def test_without_numba_features_are_those_of_pytorch(monkeypatch, caplog):
    monkeypatch.setattr(fused_features, "numba", None)
    monkeypatch.setattr(
        fused_features, "_why", "No module named 'numba'", raising=False
    )
    features = SpatialFeatures(**SMALL)
    with caplog.at_level(logging.INFO):
        assert fused(features) is features
    assert "No module named 'numba'" in caplog.text
    assert "speechbrain_mpq[fast]" in caplog.text
    assert fused_features._compiled(len) is len
