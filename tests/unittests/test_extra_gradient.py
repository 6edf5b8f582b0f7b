"""Optimizers that look ahead: Adam's direction, and steps in order."""

import pytest
import torch

from speechbrain_mpq.brains.extra_gradient import (
    AdamExtraGradient,
    ExtraGradient,
)


def test_adam_direction_is_torchs_and_steps_follow_the_tensor():
    torch.manual_seed(0)
    start, gradients = 3 * torch.randn(20), torch.randn(6, 20)
    ours = torch.nn.Parameter(start.clone())
    theirs = torch.nn.Parameter(start.clone())
    optimizer = AdamExtraGradient([ours], lr=0.06, extrapolation=0.5)
    adam = torch.optim.Adam([theirs], betas=(0.9, 0.99))
    for gradient in gradients:
        rms = theirs.detach().square().mean().sqrt().item()
        adam.param_groups[0]["lr"] = 0.01 * rms
        ours.grad = theirs.grad = gradient
        before = ours.detach().clone()
        optimizer.extrapolate()
        ahead = ours.detach() - before
        optimizer.step()
        adam.step()
        torch.testing.assert_close(ours, theirs)
        # The look-ahead is half of the step that the same gradient gives.
        torch.testing.assert_close(
            ahead, 0.5 * (ours.detach() - before), atol=1e-6, rtol=1e-3
        )


def test_a_step_without_its_look_ahead_is_refused():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.sum().backward()
    with pytest.raises(RuntimeError, match="extrapolate"):
        ExtraGradient([weight]).step()
