"""Second moments: damping, regression and output errors."""

import pytest
import torch

from speechbrain_mpq.quantization.moments import (
    damped_moment,
    output_error,
    regressed_weight,
)


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
