"""Scales that are trained: gradients, packing, checkpoints."""

import pytest
import torch

from speechbrain_mpq.quantization.fake_quant import FakeQuantize, LearnedStep
from speechbrain_mpq.quantization.packing import load_packed_, save_packed
from speechbrain_mpq.quantization.quantizer import quantize_, requantize_
from speechbrain_mpq.quantization.tables import largest_level


@pytest.mark.parametrize("kind", ["midtread", "midrise"])
@pytest.mark.parametrize("bits", [1, 1.6, 2, 3, 8])
def test_gradients_are_those_of_the_paper_one_weight_at_a_time(bits, kind):
    """Esser et al., Eq. 3 and 5, written out as a loop."""
    torch.manual_seed(0)
    weight = torch.randn(50, requires_grad=True)
    upstream = torch.randn(50)
    alpha, largest = 0.3, largest_level(bits, kind)
    learned = LearnedStep(bits, alpha, kind)
    quantized = learned(weight)
    quantized.backward(upstream)

    expected_scale = 0.0
    for i in range(50):
        steps = weight[i].item() / alpha
        level = round(quantized[i].item() / alpha)
        inside = abs(steps) <= largest
        slope = level - steps if inside else level
        expected_scale += upstream[i].item() * slope
        expected = upstream[i].item() if inside else 0.0
        assert weight.grad[i].item() == pytest.approx(expected)
    # The trained parameter is the relative scale.
    measured = learned.stretch.grad.item() / alpha
    assert measured == pytest.approx(expected_scale, rel=1e-4)


def test_starts_where_fixed_scales_are():
    torch.manual_seed(0)
    weight = torch.randn(30)
    learned, fixed = LearnedStep(3, 0.4), FakeQuantize(3, 0.4)
    assert torch.equal(learned(weight), fixed(weight))


def test_training_lowers_the_error_of_a_bad_scale():
    torch.manual_seed(0)
    weight = torch.randn(200)
    learned = LearnedStep(3, 2.0)
    before = (learned(weight) - weight).square().mean()
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        error = (learned(weight) - weight).square().mean()
        error.backward()
        optimizer.step()
    assert error < 0.2 * before
    assert learned.alpha > 0


def test_trained_scales_are_packed_and_saved(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    quantize_(layer, 3, estimator=LearnedStep, codebook="midrise")
    layer.parametrizations.weight[0].stretch.data.fill_(1.3)
    x = torch.randn(2, 6)
    expected = layer(x)
    save_packed(layer, tmp_path)
    assert torch.equal(
        load_packed_(torch.nn.Linear(6, 4), tmp_path)(x), expected
    )

    again = torch.nn.Linear(6, 4)
    quantize_(again, 3, estimator=LearnedStep)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), expected)

    requantize_(again)
    assert again.parametrizations.weight[0].stretch == 1
    assert not torch.equal(again(x), expected)
