"""Calibrated rounding of a matrix, against every possible rounding.

Second moments: damping, regression and output errors.
"""

import itertools

import pytest
import torch

from speechbrain_mpq.quantization.codebook import nearest_levels
from speechbrain_mpq.quantization.gptq import (
    BLOCK,
    PostTraining,
    calibrated_levels,
    calibrated_scale,
    damped_moment,
    feedback_levels,
    output_error,
    regressed_weight,
)

TABLES = [(1, "midtread"), (2, "midtread"), (2, "midrise"), (4, "midtread")]


def problem(rows=6, columns=9, samples=30, seed=0, batch=()):
    """Weights and the moment of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*batch, rows, columns, generator=generator).double()
    mixing = torch.randn(*batch, columns, columns, generator=generator)
    inputs = mixing @ torch.randn(*batch, columns, samples, generator=generator)
    return weight, damped_moment(inputs @ inputs.mT)


def fed_back_slowly(weight, moment, bits, alpha):
    """GPTQ as published: one column at a time, inverses from scratch.

    Once columns i, i+1, ... are rounded, the others go to the best float
    values given these.
    """
    weight, levels = weight.clone(), torch.zeros_like(weight)
    for i in reversed(range(weight.shape[1])):
        levels[:, i] = nearest_levels(weight[:, i], bits, alpha)
        error = weight[:, i : i + 1] - levels[:, i : i + 1] * alpha
        free = slice(0, i)
        inverse = torch.linalg.inv(moment[free, free])
        weight[:, free] += error * (inverse @ moment[free, i])
    return levels


def test_two_columns_by_hand():
    # Inputs that are nearly equal: only the sum of the weights matters. The
    # last column of the most active comes first, 0.4 -> 0, and hands 0.9 x
    # 0.4 on: 0.4 + 0.36 -> 1. Nearest rounding gives 0 and 0.
    weight = torch.tensor([[0.4, 0.4]])
    moment = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    levels = feedback_levels(weight, moment, 2, torch.tensor(1.0))
    assert levels.tolist() == [[1.0, 0.0]]
    moment[0, 0] = 1.1  # now the first column comes first
    levels = feedback_levels(weight, moment, 2, torch.tensor(1.0))
    assert levels.tolist() == [[0.0, 1.0]]
    levels = feedback_levels(
        weight, moment, 2, torch.tensor(1.0), by_activity=False
    )
    assert levels.tolist() == [[1.0, 0.0]]


def test_feedback_over_several_blocks_is_the_published_one():
    weight, moment = problem(4, 2 * BLOCK + 5, 400)
    levels = feedback_levels(
        weight, moment, 3, torch.tensor(0.4), by_activity=False
    )
    expected = fed_back_slowly(weight, moment, 3, torch.tensor(0.4).double())
    assert torch.equal(levels, expected)


def test_feedback_on_independent_inputs_is_nearest_rounding():
    weight, _ = problem()
    alpha = torch.tensor(0.3)
    levels = feedback_levels(weight, torch.eye(9), 4, alpha)
    assert torch.equal(levels, nearest_levels(weight, 4, alpha))


@pytest.mark.parametrize("bits, codebook", TABLES)
@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_nearest(bits, codebook, seed):
    weight, moment = problem(20, seed=seed)
    alpha = torch.tensor(1.0 / bits)
    levels = calibrated_levels(weight, moment, bits, alpha, codebook)
    nearest = nearest_levels(weight, bits, alpha, codebook)
    found = output_error(weight, levels * alpha, moment)
    assert (found <= output_error(weight, nearest * alpha, moment)).all()
    assert torch.equal(
        nearest_levels(levels, bits, torch.tensor(1.0), codebook), levels
    )


def test_close_to_the_best_of_all_roundings():
    """Of 7^4 roundings of each row; nearest rounding is far from the best."""
    weight, moment = problem(50, 4)
    alpha = torch.tensor(0.6)
    every = torch.tensor(list(itertools.product(range(-3, 4), repeat=4)))
    every = every * alpha.double()
    errors = output_error(weight[:, None], every[None], moment)
    best = errors.min(1).values
    levels = calibrated_levels(weight, moment, 3, alpha)
    found = output_error(weight, levels * alpha, moment)
    nearest = nearest_levels(weight, 3, alpha) * alpha
    nearest = output_error(weight, nearest, moment)
    assert (found >= best * (1 - 1e-9)).all()
    assert found.sum() < 1.3 * best.sum()
    assert nearest.sum() > 2 * best.sum()


def test_batch_is_one_problem_after_the_other():
    weight, moment = problem(batch=(3,))
    alpha = torch.rand(3, 6, 1) + 0.2
    levels = calibrated_levels(weight, moment, 3, alpha)
    # The order of the columns is common to the batch.
    for i in range(3):
        one = feedback_levels(weight[i], moment[i], 3, alpha[i])
        found = output_error(weight[i], levels[i] * alpha[i], moment[i])
        nearest = nearest_levels(weight[i], 3, alpha[i]) * alpha[i]
        assert (found <= output_error(weight[i], nearest, moment[i])).all()
        assert one.shape == levels[i].shape


@pytest.mark.parametrize("per_row", [False, True])
def test_scale_is_the_best_of_the_grid(per_row):
    weight, moment = problem(batch=(2,))
    start = torch.rand(2, 6, 1) + 0.3 if per_row else torch.tensor(0.4)
    best = calibrated_scale(weight, moment, 3, start)
    assert best.shape == start.shape

    def error(alpha):
        levels = calibrated_levels(weight, moment, 3, alpha)
        rows = output_error(weight, levels * alpha, moment)
        return rows if per_row else rows.sum()

    for factor in (0.6, 0.8, 1.0, 1.2, 1.4):
        assert (error(best) <= error(start.double() * factor) + 1e-9).all()


def test_tensor_of_zeros_stays_zero():
    weight, moment = torch.zeros(2, 9), problem()[1]
    alpha = calibrated_scale(weight, moment, 4, torch.tensor(0.0))
    assert alpha == 0
    assert not calibrated_levels(weight, moment, 4, alpha).any()


def test_moment_without_damping_is_refused():
    weight = torch.randn(2, 3)
    with pytest.raises(ValueError, match="damping"):
        calibrated_levels(weight, torch.zeros(3, 3), 4, torch.tensor(1.0))


def test_post_training_estimator_does_not_train():
    assert PostTraining.trains is False


def test_output_error_is_that_of_the_outputs():
    torch.manual_seed(0)
    weight, rounded = torch.randn(2, 3, 4)
    inputs = torch.randn(4, 50)
    error = ((weight - rounded) @ inputs).square().sum(1)
    found = output_error(weight, rounded, inputs @ inputs.mT)
    torch.testing.assert_close(found, error)


@pytest.mark.parametrize("damping", [1e-9, 0.3])
def test_regression_solves_the_stacked_least_squares_problem(damping):
    """Ridge regression is least squares with the ridge as more samples."""
    torch.manual_seed(0)
    weight, outputs = torch.randn(3, 4).double(), torch.randn(3, 40).double()
    inputs = torch.randn(4, 40).double()
    moment = inputs @ inputs.mT
    ridge = (damping * moment.diagonal().mean()).sqrt()
    samples = torch.cat([inputs, ridge * torch.eye(4).double()], 1)
    targets = torch.cat([outputs, ridge * weight], 1)
    expected = torch.linalg.lstsq(samples.mT, targets.mT).solution.mT
    found = regressed_weight(weight, outputs @ inputs.mT, moment, damping)
    torch.testing.assert_close(found, expected)


def test_regression_on_the_own_outputs_changes_nothing():
    torch.manual_seed(0)
    weight, inputs = torch.randn(3, 4).double(), torch.randn(4, 2).double()
    moment = inputs @ inputs.mT  # of rank 2
    found = regressed_weight(weight, weight @ moment, moment, 0.01)
    torch.testing.assert_close(found, weight)


def test_dead_inputs_can_be_factorized():
    moment = torch.zeros(2, 3, 3)
    moment[0, 0, 0] = 6.0  # two dead columns; the second matrix is all dead
    damped = damped_moment(moment, 0.5)
    assert torch.equal(
        damped[0], torch.diag(torch.tensor([7.0, 1, 1])).double()
    )
    assert torch.equal(damped[1], torch.eye(3).double())


@pytest.mark.parametrize("damping", [0, -1.0, float("nan")])
def test_damping_must_be_positive(damping):
    with pytest.raises(ValueError, match="damping must be positive"):
        damped_moment(torch.eye(2), damping)


def test_broken_inputs_and_outputs_are_refused():
    broken = torch.full((2, 2), float("nan"))
    with pytest.raises(ValueError, match="inputs have NaN"):
        damped_moment(broken)
    with pytest.raises(ValueError, match="outputs .* have NaN"):
        regressed_weight(torch.eye(2), broken, torch.eye(2))
