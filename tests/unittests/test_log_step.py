"""Fake quantization with a scale that is trained as a logarithm."""

import pytest
import torch

from speechbrain_mpq import LearnedStep, LogStep, quantize_
from speechbrain_mpq.quantization.codebook import fit_scale
from speechbrain_mpq.quantization.quantizer import requantize_

TABLES = [
    (1, "midtread"),
    (1.6, "midtread"),
    (2, "midtread"),
    (4, "midtread"),
    (16, "midtread"),
    (2, "midrise"),
    (4, "midrise"),
]


def weights(shape=(6, 50)):
    """Values inside, beyond and at the ends of the table."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "codebook"), TABLES)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_same_values_and_gradients_as_learned_step(bits, codebook, granularity):
    alpha = 0.8 * fit_scale(weights(), bits, granularity, codebook)
    results = []
    for kind in (LearnedStep, LogStep):
        weight = weights().requires_grad_()
        quantizer = kind(bits, alpha, codebook)
        output = quantizer(weight)
        (output * torch.linspace(-1, 2, 300).view(6, 50)).sum().backward()
        scale = next(quantizer.parameters())
        # At the start d alpha / d stretch = d alpha / d log_stretch.
        results.append((output.detach(), weight.grad, scale.grad))
    for learned, logged in zip(*results):
        assert torch.allclose(learned, logged, rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0][0], results[1][0])


def test_half_precision_weights_keep_their_type():
    weight = weights().bfloat16().requires_grad_()
    output = LogStep(4, 0.3)(weight)
    output.float().square().sum().backward()
    assert output.dtype == weight.grad.dtype == torch.bfloat16


def test_values_are_those_that_are_packed():
    quantizer = LogStep(4, 0.3)
    quantizer.log_stretch.data.fill_(0.123)
    levels = quantizer.levels(weights())
    assert torch.equal(quantizer(weights()), levels * quantizer.alpha)


def test_weight_decay_pulls_to_the_fitted_scale():
    quantizer = LogStep(4, 0.5)
    quantizer.log_stretch.data.fill_(1.0)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1, weight_decay=0.5)
    quantizer.log_stretch.grad = torch.zeros(())
    for _ in range(60):
        optimizer.step()
    assert quantizer.alpha.item() == pytest.approx(0.5)


def train_bias(kind, steps):
    """A layer whose bias begins at zero and has to become 1, -0.5."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    layer.bias.data.zero_()
    quantize_(layer, 6, estimator=kind)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    inputs = torch.randn(32, 2)
    for _ in range(steps):
        target = inputs + torch.tensor([1.0, -0.5])
        (layer(inputs) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer


def test_a_bias_that_begins_at_zero_is_trained():
    bias = train_bias(LogStep, 200).bias.detach()
    assert torch.allclose(bias, torch.tensor([1.0, -0.5]), atol=0.1)
    assert not train_bias(LearnedStep, 200).bias.any()


def test_late_scales_survive_a_checkpoint():
    one, other = train_bias(LogStep, 5), train_bias(LogStep, 0)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.bias, other.bias)
    assert other.parametrizations.bias[0].is_late
    assert not other.parametrizations.weight[0].is_late


def test_nothing_is_fitted_in_evaluation():
    layer = torch.nn.Linear(2, 2)
    layer.bias.data.zero_()
    quantize_(layer, 4, estimator=LogStep)
    layer.eval()
    layer.parametrizations.bias.original.data.fill_(1.0)
    assert not layer.bias.any()
    requantize_(layer)
    assert torch.allclose(layer.bias, torch.ones(2))


def test_bits_and_codebook_follow_what_is_loaded():
    quantizer, other = LogStep(4, 0.5), LogStep(2, 0.25, "midrise")
    assert (quantizer.stored_bits, quantizer.codebook) == (4, "midtread")
    quantizer.load_state_dict(other.state_dict())
    assert (quantizer.stored_bits, quantizer.codebook) == (2, "midrise")
