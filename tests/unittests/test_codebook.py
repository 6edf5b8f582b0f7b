"""Codebooks and the fitted scale."""

import numpy as np
import pytest
import torch

from speechbrain_mpq.quantization.codebook import (
    codebook,
    dequantize,
    fit_scale,
    largest_level,
    quantize_to_integers,
    scale_shape,
)


def squared_error(weight, bits, alpha):
    """What the fit minimises, in float64."""
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    integers = quantize_to_integers(weight.double(), bits, alpha)
    value = dequantize(integers, alpha, torch.float64)
    return (weight.double() - value).square().sum().item()


def weights(kind, count=300):
    """Test weights of several shapes of distribution."""
    rng = np.random.default_rng(7)
    draw = {
        "normal": lambda: rng.normal(size=count),
        "laplace": lambda: rng.laplace(size=count),
        "uniform": lambda: rng.uniform(-1, 1, size=count),
        "outlier": lambda: np.append(rng.normal(size=count - 1), 50),
        "lattice": lambda: 0.37 * rng.integers(-3, 4, size=count),
    }
    return torch.tensor(draw[kind](), dtype=torch.float32)


@pytest.mark.parametrize("bits", range(1, 17))
def test_codebook_is_symmetric_and_has_the_papers_levels(bits):
    table = codebook(bits, 0.5)
    assert torch.equal(table, -table.flip(0))
    assert table.max() == 0.5 * largest_level(bits)
    assert len(table) == (2 if bits == 1 else 2**bits - 1)


@pytest.mark.parametrize("bits", [0, 17, -1, True, 4.0, "4", None])
def test_bits_that_are_no_integers_from_1_to_16_are_refused(bits):
    with pytest.raises(ValueError, match="integer from 1 to 16"):
        codebook(bits)


def test_numpy_integers_are_bits():
    assert len(codebook(np.int64(2))) == 3


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_integers_are_the_nearest_table_entries(bits):
    weight = weights("normal")
    alpha = torch.tensor(0.3)
    table = codebook(bits, 0.3)
    nearest = table[(weight[:, None] - table).abs().argmin(1)]
    integers = quantize_to_integers(weight, bits, alpha)
    torch.testing.assert_close(dequantize(integers, alpha), nearest)


@pytest.mark.parametrize("bits", range(1, 17))
def test_table_values_are_preserved(bits):
    top = largest_level(bits)
    levels = torch.unique(torch.linspace(-top, top, 101).round())
    levels = levels[levels != 0] if bits == 1 else levels
    integers = quantize_to_integers(levels * 0.013, bits, 0.013)
    assert torch.equal(integers, levels.int())


@pytest.mark.parametrize("bits", range(1, 17))
def test_quantizing_twice_changes_nothing(bits):
    weight = weights("laplace")
    alpha = fit_scale(weight, bits)
    integers = quantize_to_integers(weight, bits, alpha)
    once = dequantize(integers, alpha)
    assert torch.equal(quantize_to_integers(once, bits, alpha), integers)


@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "outlier"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_fit_is_as_good_as_a_dense_search(kind, bits):
    weight = weights(kind)
    top = weight.abs().max().item()
    error = squared_error(weight, bits, fit_scale(weight, bits))
    dense = np.linspace(top / 3000, top, 3000)
    if bits > 3:  # the optimum lies near the no-clipping scale
        dense = dense / largest_level(bits) * 1.5
    best = min(squared_error(weight, bits, alpha) for alpha in dense)
    assert error <= 1.01 * best


@pytest.mark.parametrize("kind", ["normal", "laplace", "outlier", "lattice"])
@pytest.mark.parametrize("bits", range(2, 17))
def test_fit_is_never_worse_than_the_largest_magnitude(kind, bits):
    weight = weights(kind)
    largest = weight.abs().max() / largest_level(bits)
    error = squared_error(weight, bits, fit_scale(weight, bits))
    # A squared rounding of alpha to float32 is all that may be lost.
    slack = 1e-13 * weight.double().square().sum().item()
    assert error <= squared_error(weight, bits, largest) + slack


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_fit_finds_a_lattice_that_uses_few_levels(bits):
    weight = weights("lattice")
    power = weight.square().sum().item()
    assert squared_error(weight, bits, fit_scale(weight, bits)) < 1e-12 * power


def test_sixteen_bits_are_nearly_lossless():
    weight = torch.randn(131072, generator=torch.Generator().manual_seed(1))
    error = squared_error(weight, 16, fit_scale(weight, 16))
    assert error < 1e-8 * weight.square().sum().item()


def test_long_and_short_tensors_take_the_same_search():
    # The long one looks levels up, the short one rounds every weight.
    weight = weights("normal")
    repeated = weight.repeat(10)
    torch.testing.assert_close(
        fit_scale(repeated, 6), fit_scale(weight, 6), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_zeros_and_single_values_are_exact(bits):
    zeros = torch.zeros(5)
    alpha = fit_scale(zeros, bits)
    assert alpha == 0
    assert torch.equal(
        dequantize(quantize_to_integers(zeros, bits, alpha), alpha), zeros
    )
    single = torch.tensor([-0.25])
    alpha = fit_scale(single, bits)
    value = dequantize(quantize_to_integers(single, bits, alpha), alpha)
    torch.testing.assert_close(value, single, rtol=1e-6, atol=0)


def test_fit_ignores_sign_and_scales_with_the_weights():
    weight = weights("laplace")
    alpha = fit_scale(weight, 3)
    assert torch.equal(fit_scale(-weight, 3), alpha)
    assert torch.equal(fit_scale(4 * weight, 3), 4 * alpha)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_channel_scales_are_those_of_the_rows(bits):
    weight = weights("normal", 240).reshape(6, 20, 2)
    weight[2] = 0
    alpha = fit_scale(weight, bits, "channel")
    assert alpha.shape == (6, 1, 1)
    rows = torch.stack([fit_scale(row, bits) for row in weight])
    torch.testing.assert_close(alpha[:, 0, 0], rows)
    assert scale_shape((6,), "channel") == ()


def test_unknown_granularity_and_broken_weights_are_refused():
    with pytest.raises(ValueError, match="granularity"):
        fit_scale(torch.ones(2), 4, "row")
    with pytest.raises(ValueError, match="NaN"):
        fit_scale(torch.tensor([1.0, float("nan")]), 4)
