"""The search for a scale, against the exact solution."""

import pytest
import torch

from speechbrain_mpq.quantization.scale_search import search_scales


def levels_of(largest, zero):
    """Magnitudes of a table."""
    first, step = (0, 1) if zero else (1, 2)
    return torch.arange(first, largest + 1, step).double()


def error_of(row, scale, levels):
    """Squared error with every magnitude at its nearest level."""
    distance = (row[:, None] - scale * levels).abs()
    return distance.amin(1).square().sum().item()


def least_error(row, levels):
    """The least error of all scales, exactly.

    Between two scales at which a magnitude changes its level the levels q
    stay, and the best scale for them leaves <w, w> - <w, q>^2 / <q, q>.
    """
    borders = (levels[1:] + levels[:-1]) / 2
    changes = (row[:, None] / borders).flatten().sort().values
    inner = (changes[1:] + changes[:-1]) / 2
    scales = torch.cat([changes[:1] / 2, inner, changes[-1:] * 2])
    best = row.square().sum()  # all at level 0
    for scale in scales:
        nearest = (row[:, None] - scale * levels).abs().argmin(1)
        q = levels[nearest]
        if q.any():
            left = row.square().sum() - (row @ q) ** 2 / (q @ q)
            best = torch.minimum(best, left)
    return best.item()


def magnitudes(kind, count, seed):
    """Test magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator).double()
    if kind == "heavy":
        return normal.abs() ** 3
    return normal.abs()


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("count", [2, 20, 60])
@pytest.mark.parametrize(
    "largest, zero", [(1, True), (3, True), (7, True), (3, False), (7, False)]
)
def test_close_to_the_exact_solution(largest, zero, count, kind):
    levels = levels_of(largest, zero)
    found, exact = 0.0, 0.0
    for seed in range(5):
        row = magnitudes(kind, count, seed)
        scale = search_scales(row[None], largest, zero)[0]
        error, least = error_of(row, scale, levels), least_error(row, levels)
        assert error >= least - 1e-9
        assert error <= 1.2 * least + 1e-9
        found, exact = found + error, exact + least
    assert found <= 1.02 * exact + 1e-9


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("count", [20, 2000])  # rounds; looks borders up
def test_the_scale_is_the_best_for_its_own_levels(count, zero):
    row = magnitudes("normal", count, 1)
    levels = levels_of(7, zero)
    scale = search_scales(row[None], 7, zero)[0]
    q = levels[(row[:, None] - scale * levels).abs().argmin(1)]
    assert scale == pytest.approx(((row @ q) / (q @ q)).item(), rel=1e-4)


@pytest.mark.parametrize("zero", [True, False])
def test_both_ways_of_the_search_agree(zero):
    row = magnitudes("heavy", 40, 0)
    once = search_scales(row[None], 7, zero)
    many = search_scales(row.repeat(20)[None], 7, zero)
    torch.testing.assert_close(many, once, rtol=1e-4, atol=0)


def test_a_lattice_of_odd_multiples_is_found():
    generator = torch.Generator().manual_seed(0)
    odd = 2 * torch.randint(0, 4, (3, 50), generator=generator) + 1
    scales = torch.tensor([0.37, 1.0, 5.0]).double()
    for largest in (7, 15):  # all levels are used, or the lower half
        found = search_scales(odd * scales[:, None], largest, zero=False)
        torch.testing.assert_close(found, scales)


def test_rows_of_zeros_have_no_scale():
    rows = torch.tensor([[0.0, 0.0], [1.0, 3.0]]).double()
    assert search_scales(rows, 3, zero=False).tolist() == [0, 1]
