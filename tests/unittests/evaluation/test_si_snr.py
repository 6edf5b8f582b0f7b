"""SI-SNR against closed forms and SpeechBrain's own."""

import math

import pytest
import torch
from speechbrain.nnet.losses import cal_si_snr

from speechbrain_mpq.evaluation.si_snr import si_snr


def orthogonal_pair(n=64):
    time = torch.arange(n) * (2 * math.pi / n)
    return torch.sin(3 * time), torch.sin(7 * time)


@pytest.mark.parametrize("ratio", [-6.0, 0.0, 13.5])
def test_orthogonal_noise_gives_the_energy_ratio(ratio):
    target, noise = orthogonal_pair()
    estimate = target + 10 ** (-ratio / 20) * noise
    assert si_snr(estimate, target).item() == pytest.approx(ratio, abs=1e-4)


def test_scale_and_mean_do_not_matter():
    generator = torch.Generator().manual_seed(1)
    estimate, target = torch.randn(2, 500, generator=generator)
    plain = si_snr(estimate, target)
    assert torch.allclose(si_snr(-7 * estimate, 0.3 * target), plain, atol=1e-4)
    assert torch.allclose(si_snr(estimate + 3, target - 2), plain, atol=1e-3)
    with_mean = si_snr(estimate + 3, target - 2, zero_mean=False)
    assert not torch.allclose(with_mean, plain, atol=1e-1)


def test_agrees_with_speechbrain():
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(4, 800, generator=generator)
    estimate = target + torch.randn(4, 800, generator=generator)
    theirs = -cal_si_snr(
        target.T.unsqueeze(-1).clone(), estimate.T.unsqueeze(-1).clone()
    )
    assert torch.allclose(si_snr(estimate, target), theirs.flatten(), atol=1e-4)


def test_silent_signals_stay_finite_and_low():
    loud, silent = torch.ones(100).cumsum(0), torch.zeros(100)
    assert si_snr(loud, silent) < si_snr(0.1 * loud, silent) < -50
    assert si_snr(silent, loud).item() == pytest.approx(0.0)
    assert si_snr(silent, silent).item() == pytest.approx(0.0)


def test_gradient_climbs():
    target, noise = orthogonal_pair()
    estimate = (target + noise).requires_grad_()
    si_snr(estimate, target).backward()
    better = estimate.detach() + 0.1 * estimate.grad
    assert si_snr(better, target) > si_snr(estimate, target)


def test_gradient_is_finite_for_silence():
    estimate = torch.zeros(50, requires_grad=True)
    si_snr(estimate, torch.randn(50)).backward()
    assert torch.isfinite(estimate.grad).all()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="cut both"):
        si_snr(torch.zeros(2, 10), torch.zeros(2, 9))
    with pytest.raises(ValueError, match="without a sample"):
        si_snr(torch.zeros(2, 0), torch.zeros(2, 0))
