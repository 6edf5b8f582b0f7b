"""Codebooks and the fitted scale.

The quantization tables: bits and levels.

The search for a scale, against the exact solution.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from speechbrain_mpq.quantization.admm import ADMM
from speechbrain_mpq.quantization.codebook import (
    MIDRISE_BITS,
    ROUND_UP,
    check_bits,
    codebook,
    dequantize,
    entropy_rate,
    fit_scale,
    has_zero,
    largest_level,
    nearest_levels,
    quantize_to_integers,
    scale_shape,
    search_scales,
    table_bits,
)
from speechbrain_mpq.quantization.fake_quant import (
    LearnedStep,
    LogStep,
    StraightThrough,
)
from speechbrain_mpq.quantization.packing import (
    load_packed_,
    packed_file_bytes,
    read_model,
    save_packed,
)
from speechbrain_mpq.quantization.plan import Scheme, bit_plan
from speechbrain_mpq.quantization.quant_api import fake_quantize, quantize_

TABLES = ("midtread", "midrise")  # those of 2^n levels


def squared_error(weight, bits, alpha, kind="midtread"):
    """What the fit minimises, in float64."""
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    integers = quantize_to_integers(weight.double(), bits, alpha, kind)
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


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("bits", [1, 1.6, 2, 3, 5, 6])
def test_integers_are_the_nearest_table_entries(bits, kind):
    weight = weights("normal")
    alpha = torch.tensor(0.3)
    table = codebook(bits, 0.3, kind)
    nearest = table[(weight[:, None] - table).abs().argmin(1)]
    integers = quantize_to_integers(weight, bits, alpha, kind)
    torch.testing.assert_close(dequantize(integers, alpha), nearest)


@pytest.mark.parametrize("bits", [1.6, *range(1, 17)])
def test_table_values_are_preserved(bits):
    for kind in TABLES:
        levels = codebook(bits, kind=kind)[:: max(1, int(2**bits) // 100)]
        integers = quantize_to_integers(levels * 0.013, bits, 0.013, kind)
        assert torch.equal(integers, levels.int())


@pytest.mark.parametrize("bits", [1.6, *range(1, 17)])
def test_quantizing_twice_changes_nothing(bits):
    for kind in TABLES:
        weight = weights("laplace")
        alpha = fit_scale(weight, bits, codebook=kind)
        integers = quantize_to_integers(weight, bits, alpha, kind)
        once = dequantize(integers, alpha)
        again = quantize_to_integers(once, bits, alpha, kind)
        assert torch.equal(again, integers)


@pytest.mark.parametrize("bits, kind", [(1, "midtread"), (2, "midrise")])
def test_tables_without_zero_treat_signs_alike_and_zero_as_positive(bits, kind):
    weight = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0])
    integers = quantize_to_integers(weight, bits, 1.0, kind)
    top = 3 if bits == 2 else 1
    assert integers.tolist() == [1, 1, 1, -1, top, -top]


def test_broken_weights_stay_visible_in_every_table():
    weight = torch.tensor([float("nan"), 1.0])
    for bits, kind in itertools.product((1, 1.6, 2, 8), TABLES):
        levels = nearest_levels(weight, bits, torch.tensor(1.0), kind)
        assert levels.isnan().tolist() == [True, False]


def test_three_levels_are_those_of_the_2_bit_table():
    weight = weights("laplace")
    alpha = fit_scale(weight, 2)
    for kind in TABLES:
        assert torch.equal(fit_scale(weight, 1.6, codebook=kind), alpha)
        integers = quantize_to_integers(weight, 1.6, alpha, kind)
        assert torch.equal(integers, quantize_to_integers(weight, 2, alpha))


@pytest.mark.parametrize(
    "bits, kind, levels",
    [
        (1.6, "midtread", 3),
        (2, "midrise", 4),
        (3, "midtread", 7),
        (3, "midrise", 8),
        (4, "midtread", 15),
        (4, "midrise", 16),
    ],
)
def test_noise_of_normal_weights_is_that_of_the_best_uniform_table(
    bits, kind, levels
):
    """Against the integral of the error, minimised over the step."""
    cdf = torch.special.ndtr

    def noise(step):
        table = (torch.arange(levels) - (levels - 1) / 2).double() * step
        inner = (table[1:] + table[:-1]) / 2
        ends = inner.new_tensor([-20, 20])
        borders = torch.cat([ends[:1], inner, ends[1:]])
        density = torch.exp(-borders.square() / 2) / math.sqrt(2 * math.pi)
        mass = cdf(borders).diff()
        first, second = -density.diff(), mass - (borders * density).diff()
        return (second - 2 * table * first + table**2 * mass).sum().item()

    best = min(noise(step) for step in np.linspace(0.1, 2, 2000))
    count = 2**15  # a normal distribution without sampling noise
    weight = torch.special.ndtri((torch.arange(count) + 0.5).double() / count)
    alpha = fit_scale(weight, bits, codebook=kind)
    measured = squared_error(weight, bits, alpha, kind) / count
    assert 10 * math.log10(measured / best) == pytest.approx(0, abs=0.03)  # dB


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
@pytest.mark.parametrize(
    "bits, table",
    [(bits, "midtread") for bits in range(2, 17)]
    + [(bits, "midrise") for bits in range(2, 7)],
)
def test_fit_is_never_worse_than_the_largest_magnitude(kind, bits, table):
    weight = weights(kind)
    largest = weight.abs().max() / largest_level(bits, table)
    alpha = fit_scale(weight, bits, codebook=table)
    error = squared_error(weight, bits, alpha, table)
    # A squared rounding of alpha to float32 is all that may be lost.
    slack = 1e-13 * weight.double().square().sum().item()
    assert error <= squared_error(weight, bits, largest, table) + slack


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


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("bits", [1, 1.6, 2, 4, 8, 16])
def test_zeros_and_single_values_are_exact(bits, kind):
    zeros = torch.zeros(5)
    alpha = fit_scale(zeros, bits, codebook=kind)
    integers = quantize_to_integers(zeros, bits, alpha, kind)
    assert alpha == 0
    assert torch.equal(dequantize(integers, alpha), zeros)
    assert set(integers.tolist()) <= set(codebook(bits, kind=kind).tolist())
    single = torch.tensor([-0.25])
    alpha = fit_scale(single, bits, codebook=kind)
    integers = quantize_to_integers(single, bits, alpha, kind)
    value = dequantize(integers, alpha)
    torch.testing.assert_close(value, single, rtol=1e-6, atol=0)


def test_fit_ignores_sign_and_scales_with_the_weights():
    weight = weights("laplace")
    alpha = fit_scale(weight, 3)
    assert torch.equal(fit_scale(-weight, 3), alpha)
    assert torch.equal(fit_scale(4 * weight, 3), 4 * alpha)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("bits", [1, 1.6, 3, 8])
def test_channel_scales_are_those_of_the_rows(bits, kind):
    weight = weights("normal", 240).reshape(6, 20, 2)
    weight[2] = 0
    alpha = fit_scale(weight, bits, "channel", kind)
    assert alpha.shape == (6, 1, 1)
    rows = [fit_scale(row, bits, codebook=kind) for row in weight]
    rows = torch.stack(rows)
    torch.testing.assert_close(alpha[:, 0, 0], rows)
    assert scale_shape((6,), "channel") == ()


def test_unknown_codebooks_are_refused():
    with pytest.raises(ValueError, match="codebook must be one of.*midrise"):
        fit_scale(torch.ones(2), 4, codebook="uniform")
    with pytest.raises(ValueError, match="codebook must be one of"):
        quantize_to_integers(torch.ones(2), 4, 1.0, "uniform")


def test_unknown_granularity_and_broken_weights_are_refused():
    with pytest.raises(ValueError, match="granularity"):
        fit_scale(torch.ones(2), 4, "row")
    with pytest.raises(ValueError, match="NaN"):
        fit_scale(torch.tensor([1.0, float("nan")]), 4)


@pytest.mark.parametrize("bits", [1.6, *range(1, 17)])
def test_tables_are_symmetric_and_evenly_spaced(bits):
    for kind in TABLES:
        table = codebook(bits, 0.5, kind)
        assert torch.equal(table, -table.flip(0))
        assert table.max() == 0.5 * largest_level(bits, kind)
        assert len(table.diff().unique()) == 1
        assert (0 in table) == has_zero(bits, kind)


@pytest.mark.parametrize("bits", range(1, 17))
def test_the_default_has_the_papers_levels(bits):
    assert len(codebook(bits)) == (2 if bits == 1 else 2**bits - 1)
    assert has_zero(bits) == (bits > 1)


@pytest.mark.parametrize("bits", MIDRISE_BITS)
def test_midrise_uses_all_names_that_the_bits_have(bits):
    table = codebook(bits, kind="midrise")
    assert len(table) == 2**bits
    assert (table % 2 == 1).all() and table.max() <= 127  # int8


@pytest.mark.parametrize("bits", [1, 1.6, *range(7, 17)])
def test_other_bits_have_one_table(bits):
    assert torch.equal(codebook(bits), codebook(bits, kind="midrise"))


def test_three_levels():
    assert codebook(1.6).tolist() == [-1, 0, 1]
    assert table_bits(1.6) == 2


@pytest.mark.parametrize(
    "bits", [0, 17, -1, True, 4.0, 1.5, 1.61, float("nan"), "4", "1.6", None]
)
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="integer from 1 to 16 or 1.6"):
        codebook(bits)


def test_numpy_numbers_are_bits():
    assert len(codebook(np.int64(2))) == 3
    assert type(check_bits(np.int64(2))) is int
    assert type(check_bits(np.float64(1.6))) is float


def test_an_unknown_codebook_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="midtread.*midrise.*'mid-rise'"):
        largest_level(2, "mid-rise")


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


SCHEME = Scheme(codebook="entropy")
RATES = (1, 1.6, 2, 3, 4, 5, 6, 8)


def laplacian(count=20000, seed=0):
    """Weights with a long tail."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.laplace(0, 0.1, count)).float()


def entropy(levels):
    """Bits a value, counted the slow way."""
    counts = {}
    for level in levels.tolist():
        counts[level] = counts.get(level, 0) + 1
    shares = [count / levels.numel() for count in counts.values()]
    return -sum(share * math.log2(share) for share in shares)


@pytest.mark.parametrize("bits", RATES)
def test_the_step_has_the_rate_that_is_asked_for(bits):
    weight = laplacian()
    alpha = fit_scale(weight, bits, codebook="entropy")
    levels = nearest_levels(weight, bits, alpha, "entropy")
    assert entropy(levels) == pytest.approx(bits, abs=0.05)
    assert levels.abs().max() <= largest_level(bits, "entropy")


def test_levels_round_down_a_little_more_often():
    steps = torch.tensor([0.52, 0.54, -0.52, -0.54, 1.5, 2.6])
    levels = nearest_levels(steps, 4, torch.tensor(1.0), "entropy")
    assert ROUND_UP == 0.47
    assert levels.tolist() == [0, 1, 0, -1, 1, 3]
    again = nearest_levels(levels, 4, torch.tensor(1.0), "entropy")
    assert torch.equal(again, levels)


def test_the_rate_counts_signs_and_frequencies():
    steps = torch.tensor([0.0] * 500 + [1.0] * 300 + [2.0] * 200)
    signed = steps * torch.tensor([1.0, -1.0]).repeat(500)
    told = 4 / 2 / 1000 / math.log(2)  # five levels, a thousand values
    assert entropy_rate(steps) == pytest.approx(entropy(signed) + told)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_less_noise_than_the_best_table_of_as_many_bits(bits):
    for weight in (laplacian(), torch.randn(20000)):
        errors = {
            codebook: (fake_quantize(weight, bits, Scheme(codebook=codebook))
                       - weight).square().mean()
            for codebook in ("midtread", "midrise", "entropy")
        }  # fmt: skip
        others = min(errors["midtread"], errors["midrise"])
        assert errors["entropy"] < 0.85 * others


def test_tensors_of_few_values_are_kept_finely():
    for weight in (torch.tensor([0.25]), torch.tensor([0.1, -0.7, 0.3])):
        quantized = fake_quantize(weight, 4, SCHEME)
        torch.testing.assert_close(quantized, weight, rtol=0.02, atol=0.004)
    assert fake_quantize(torch.zeros(7), 4, SCHEME).abs().sum() == 0


def network(seed=0):
    """Some layers with weights like trained ones."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(8, 96, 5), torch.nn.PReLU(), torch.nn.Conv1d(96, 96, 3)
    )
    for parameter in model.parameters():
        values = torch.distributions.Laplace(0.0, 0.1).sample(parameter.shape)
        parameter.data.copy_(values)
    return model


@pytest.mark.parametrize("bits", [1, 1.6, 2, 4, 8])
@pytest.mark.parametrize("rows", [None, 32])
def test_a_file_is_the_model_and_has_the_bytes_of_its_rate(
    tmp_path, bits, rows
):
    model = network()
    plan = quantize_(model, bits, codebook="entropy", rows=rows)
    assert bit_plan(model) == plan and plan.codebook == "entropy"
    path = save_packed(model, tmp_path)
    packed = read_model(tmp_path)
    assert packed.version == 5 and packed.header["codebook"] == "entropy"
    assert path.stat().st_size == packed_file_bytes(model)
    asked = packed_file_bytes(network(), plan)
    assert path.stat().st_size == pytest.approx(asked, rel=0.06, abs=200)
    sound = torch.randn(2, 8, 30)
    loaded = load_packed_(network(1), tmp_path)
    assert torch.equal(loaded(sound), model(sound))


def test_straight_through_keeps_the_step_and_checkpoints_the_codebook():
    model, other = network(), network()
    for each in (model, other):
        quantize_(each, 2, codebook="entropy", estimator=StraightThrough)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 8, 30)).square().mean().backward()
    optimizer.step()
    other.load_state_dict(model.state_dict())
    sound = torch.randn(2, 8, 30)
    assert torch.equal(other(sound), model(sound))
    midtread = network()
    quantize_(midtread, 2)
    with pytest.raises(ValueError, match="another plan.*entropy"):
        from speechbrain_mpq.training.checkpoints import guard_loading

        guard_loading(midtread)
        midtread.load_state_dict(model.state_dict())


@pytest.mark.parametrize("estimator", [LearnedStep, LogStep, ADMM])
def test_estimators_that_move_scales_are_refused(estimator):
    model = network()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="StraightThrough"):
        quantize_(model, 2, codebook="entropy", estimator=estimator)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_one_scale_a_tensor():
    with pytest.raises(ValueError, match="granularity"):
        Scheme("channel", "entropy")
