"""ADMM's steps and the parametrization that holds their state."""

import itertools

import pytest
import torch

from speechbrain_mpq.quantization.admm import (
    ADMM,
    augmented_gradient,
    codebook_step,
    dual_step,
    iterate_with_one_table,
    proximal_step,
    relative_distance,
    start_with_one_table,
)
from speechbrain_mpq.quantization.codebook import (
    codebook,
    fit_scale,
    largest_level,
)
from speechbrain_mpq.quantization.packing import load_packed_, save_packed
from speechbrain_mpq.quantization.quant_api import (
    dequantize_,
    quantize_,
    requantize_,
)
from speechbrain_mpq.quantization.tensors import named_tensors


def squared_error(target, alpha, levels):
    """What the codebook step lowers."""
    return (target - alpha * levels).double().square().sum().item()


def test_augmented_gradient_is_that_of_the_augmented_lagrangian():
    torch.manual_seed(0)
    weight = torch.randn(7, requires_grad=True)
    target, projection, dual = torch.randn(3, 7)
    loss = (weight - target).square().sum()
    gradient = torch.autograd.grad(loss, weight)[0]
    penalty = 0.3 / 2 * (weight - projection + dual).square().sum()
    penalty = penalty - 0.3 / 2 * dual.square().sum()
    loss = (weight - target).square().sum() + penalty
    expected = torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(
        augmented_gradient(gradient, weight, projection, dual, 0.3), expected
    )


def test_proximal_step_is_where_the_gradient_vanishes():
    torch.manual_seed(0)
    weight, projection, dual = torch.randn(3, 7, dtype=torch.double)
    x = proximal_step(weight, projection, dual, 0.3)
    gradient = (x - weight) + 0.3 * (x - projection + dual)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("bits", [1, 2, 3, 6])
@pytest.mark.parametrize("start", [0.01, 0.3, 1.0, 50.0])
def test_codebook_step_is_the_alternation_one_weight_at_a_time(bits, start):
    torch.manual_seed(bits)
    target = torch.randn(60, dtype=torch.double)
    peak = target.abs().max().item()
    alpha = min(start, peak)
    for _ in range(100):
        table = codebook(bits).tolist()
        levels = [
            min(table, key=lambda entry: abs(weight - alpha * entry))
            for weight in target.tolist()
        ]
        if any(levels):
            cross = sum(w * v for w, v in zip(target.tolist(), levels))
            alpha = cross / sum(v * v for v in levels)
    start = torch.tensor(start, dtype=torch.double)
    fitted, found = codebook_step(target, bits, start, rounds=100)
    assert fitted.item() == pytest.approx(alpha, rel=1e-9)
    assert found.tolist() == levels


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_best_of_many_starts_is_the_best_of_all_assignments(bits):
    """Every assignment of levels, each with its exact best scale."""
    torch.manual_seed(bits)
    levels = torch.tensor(
        list(itertools.product(codebook(bits).tolist(), repeat=4))
    )
    levels = levels[levels.any(1)]
    for _ in range(5):
        target = torch.randn(4)
        alpha = (levels @ target) / levels.square().sum(1)
        errors = (target - alpha[:, None] * levels).square().sum(1)
        peak = target.abs().max()
        found = min(
            squared_error(target, *codebook_step(target, bits, start))
            for start in peak * torch.linspace(0.02, 1, 50)
        )
        assert found == pytest.approx(errors.min().item(), abs=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_no_round_raises_the_error(bits):
    torch.manual_seed(0)
    target = torch.randn(500)
    start = torch.tensor(0.7) / largest_level(bits)
    errors = [
        squared_error(target, *codebook_step(target, bits, start, rounds))
        for rounds in range(1, 12)
    ]
    assert all(
        after <= before * (1 + 1e-6)
        for before, after in zip(errors, errors[1:])
    )
    assert errors[-1] <= squared_error(
        target, start, codebook_step(target, bits, start, 0)[1]
    )


def test_channels_are_fitted_each_on_its_own():
    torch.manual_seed(0)
    target = torch.randn(5, 3, 4) * torch.arange(5.0).view(5, 1, 1)
    start = torch.full((5, 1, 1), 0.5)
    alpha, levels = codebook_step(target, 3, start)
    assert alpha.shape == start.shape
    for row in range(5):
        one, own = codebook_step(target[row], 3, torch.tensor(0.5))
        torch.testing.assert_close(alpha[row, 0, 0], one)
        assert torch.equal(levels[row], own)


def residuals_without_a_task(penalty, iterations=40, steps=10):
    """Primal residual of each outer iteration where only g moves weights."""
    weight = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    admm, found = ADMM(4, fit_scale(weight, 4)), []
    admm.start(weight)
    for _ in range(iterations):
        for _ in range(steps):
            weight = proximal_step(weight, admm.projection, admm.dual, penalty)
        admm.iterate(weight)
        found.append(relative_distance([weight], [admm.projection]))
    return found


def test_small_penalties_go_round_in_a_cycle_and_large_ones_settle():
    assert max(residuals_without_a_task(0.02)[-8:]) > 0.05
    assert residuals_without_a_task(0.2)[-1] < 1e-6


def test_zero_tensors_stay_zero_and_can_leave_it():
    alpha, levels = codebook_step(torch.zeros(3), 4, torch.tensor(1.0))
    assert alpha == 0 and not levels.any()
    alpha, levels = codebook_step(torch.tensor([0.75, -1.0]), 2, alpha)
    assert alpha == 0.875 and levels.tolist() == [1, -1]


def test_relative_distance_of_parts_is_that_of_the_whole():
    torch.manual_seed(0)
    x, y = torch.randn(2, 30)
    expected = (torch.linalg.norm(x - y) / torch.linalg.norm(x)).item()
    parts = relative_distance(x.split(7), y.split(7))
    assert parts == pytest.approx(expected, rel=1e-6)
    zero = [torch.zeros(2)]
    assert relative_distance(zero, zero) == 0
    assert relative_distance(zero, [torch.ones(2)]) == float("inf")


def layer_in_admm(bits=2, rounds=3):
    """A layer whose float weights and projections differ."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5)
    quantize_(layer, bits, estimator=ADMM)
    for tensor in named_tensors(layer).values():
        tensor.fake_quantize.start(tensor.parameter)
        for _ in range(rounds):
            tensor.fake_quantize.iterate(tensor.parameter)
    return layer


def test_training_reads_floats_and_evaluation_the_projection():
    layer = layer_in_admm()
    admm = layer.parametrizations.weight[0]
    original = layer.parametrizations.weight.original
    assert torch.equal(layer.train().weight, original)
    assert torch.equal(layer.eval().weight, admm.projection)
    levels = admm.projection / admm.alpha
    assert len(levels.round().unique()) <= 3
    torch.testing.assert_close(levels, levels.round())


def test_iterations_follow_the_formulas():
    torch.manual_seed(0)
    weight = torch.randn(40)
    admm = ADMM(3, fit_scale(weight, 3))
    admm.start(weight)
    alpha, levels = codebook_step(weight, 3, fit_scale(weight, 3))
    torch.testing.assert_close(admm.projection, alpha * levels)
    dual = torch.zeros(40)
    for _ in range(4):
        admm.iterate(weight)
        alpha, levels = codebook_step(weight + dual, 3, alpha)
        dual = dual_step(dual, weight, alpha * levels)
        torch.testing.assert_close(admm.projection, alpha * levels)
        torch.testing.assert_close(admm.dual, dual)
        weight = weight + 0.1 * torch.randn(40)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_finish_packs_what_was_evaluated(tmp_path, bits):
    layer = layer_in_admm(bits)
    x = torch.randn(3, 6)
    expected = layer.eval()(x)
    if bits <= 4:  # the projection is not what rounding T would give
        admm = layer.parametrizations.weight[0]
        original = layer.parametrizations.weight.original
        assert (original - admm.projection).abs().max() > 0.5 * admm.alpha
    for tensor in named_tensors(layer).values():
        tensor.fake_quantize.finish(tensor.parameter)
    assert torch.equal(layer(x), expected)
    save_packed(layer, tmp_path)
    fresh = load_packed_(torch.nn.Linear(6, 5), tmp_path)
    assert torch.equal(fresh(x), expected)
    dequantize_(layer, keep_quantized=True)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "bits, least, most",
    [(1, 1.0, 1.0), (2, 1.0, 1.01), (3, 1.0, 1.01), (8, 100.0, 1000.0)],
)
def test_the_papers_first_scale_is_good_up_to_three_bits(bits, least, most):
    torch.manual_seed(0)
    weight = 0.1 * torch.randn(3000)
    errors = []
    for first_alpha in (None, 1.0):
        admm = ADMM(bits, fit_scale(weight, bits), first_alpha=first_alpha)
        admm.start(weight)
        error = admm.eval()(weight) - weight
        errors.append(error.square().sum().item())
    assert least - 1e-6 <= errors[1] / errors[0] <= most + 1e-6


def test_state_travels_in_checkpoints():
    layer = layer_in_admm()
    again = torch.nn.Linear(6, 5)
    quantize_(again, 2, estimator=ADMM)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(again.eval()(x), layer.eval()(x))
    for model in (layer, again):
        for tensor in named_tensors(model).values():
            tensor.fake_quantize.iterate(tensor.parameter)
    assert torch.equal(again(x), layer(x))


def test_new_values_start_again():
    layer = layer_in_admm().eval()
    layer.weight = torch.randn(5, 6)
    admm = layer.parametrizations.weight[0]
    assert not admm.started and not admm.dual.any()

    layer = layer_in_admm().eval()
    plain = torch.nn.Linear(6, 5)
    layer.load_state_dict(plain.state_dict())
    requantize_(layer)
    quantize_(plain, 2)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("first_alpha", [None, 1.0])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_one_table_is_that_of_the_whole_as_one_tensor(bits, first_alpha):
    torch.manual_seed(bits)
    weights = [torch.randn(5, 6), 3 * torch.randn(8), torch.randn(2, 3)]
    parts = [ADMM(bits, 0.1, first_alpha=first_alpha) for _ in weights]
    joined = torch.cat([weight.flatten() for weight in weights])
    whole = ADMM(bits, fit_scale(joined, bits), first_alpha=first_alpha)
    start_with_one_table(parts, weights)
    whole.start(joined)
    for shift in (0.0, 0.1, -0.2):
        moved = [weight + shift for weight in weights]
        iterate_with_one_table(parts, moved)
        whole.iterate(joined + shift)
        for name in ("projection", "dual"):
            found = [getattr(part, name).flatten() for part in parts]
            torch.testing.assert_close(torch.cat(found), getattr(whole, name))
        assert [part.alpha for part in parts] == [whole.alpha] * 3


def test_tables_are_those_of_equal_bits():
    torch.manual_seed(0)
    weights = [torch.randn(9), 2 * torch.randn(9), torch.randn(9)]
    parts = [ADMM(bits, 1.0) for bits in (2, 2, 4)]
    start_with_one_table(parts, weights)
    alone = ADMM(4, fit_scale(weights[2], 4))
    alone.start(weights[2])
    assert parts[0].alpha == parts[1].alpha != parts[2].alpha
    assert torch.equal(parts[2].projection, alone.projection)
