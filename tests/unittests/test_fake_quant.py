"""Fake quantization: forward, gradient and checkpoints."""

import copy

import pytest
import torch

from speechbrain_mpq.quantization.codebook import (
    dequantize,
    quantize_to_integers,
)
from speechbrain_mpq.quantization.fake_quant import (
    FakeQuantize,
    attach,
    detach,
)


def quantized_linear(bits=4):
    """A linear layer with a quantized weight, and its float weight."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    weight = layer.weight.detach().clone()
    attach(layer, "weight", FakeQuantize(bits, 0.05))
    return layer, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.half])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_forward_is_the_dequantized_integers(bits, dtype):
    torch.manual_seed(0)
    weight = torch.randn(40).to(dtype)
    quantizer = FakeQuantize(bits, 0.3)
    integers = quantize_to_integers(weight, bits, quantizer.alpha)
    expected = dequantize(integers, quantizer.alpha, dtype)
    assert torch.equal(quantizer(weight), expected)
    assert quantizer(weight).dtype == dtype


@pytest.mark.parametrize("bits", [1, 1.6, 2, 4, 8])
def test_the_quantizer_knows_its_table(bits):
    torch.manual_seed(0)
    weight = torch.randn(40)
    quantizer = FakeQuantize(bits, 0.3, "midrise")
    integers = quantize_to_integers(weight, bits, quantizer.alpha, "midrise")
    assert torch.equal(quantizer(weight), dequantize(integers, 0.3))
    assert torch.equal(quantizer.levels(weight).int(), integers)
    assert quantizer.stored_bits == bits and quantizer.codebook == "midrise"
    assert f"bits={bits}, scales=1, codebook=midrise" in repr(quantizer)
    quantizer.set_codebook("midtread")
    expected = FakeQuantize(bits, 0.3)(weight)
    assert torch.equal(quantizer(weight), expected)


def test_an_unknown_codebook_is_refused():
    with pytest.raises(ValueError, match="codebook must be one of"):
        FakeQuantize(2, 0.3, "other")


def test_gradient_passes_unchanged_also_where_the_table_clips():
    weight = torch.tensor([0.1, -0.7, 30.0], requires_grad=True)
    upstream = torch.tensor([1.0, -2.0, 3.0])
    FakeQuantize(2, 0.5)(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_broken_weights_stay_visible():
    weight = torch.tensor([float("nan"), 1.0])
    assert FakeQuantize(1, 0.5)(weight).isnan().tolist() == [True, False]
    assert FakeQuantize(4, 0.5)(weight).isnan().tolist() == [True, False]


def test_training_moves_the_float_weight():
    layer, weight = quantized_linear(bits=2)
    original = layer.parametrizations.weight.original
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(original.detach(), weight - 0.1)


def test_detach_restores_the_float_or_keeps_the_quantized_weight():
    layer, weight = quantized_linear()
    quantized = layer.weight.detach().clone()
    assert not torch.equal(quantized, weight)
    kept = copy.deepcopy(layer)
    detach(layer, "weight")
    assert torch.equal(layer.weight, weight)
    assert type(layer) is torch.nn.Linear
    detach(kept, "weight", keep_quantized=True)
    assert torch.equal(kept.weight, quantized)


def test_assigning_a_weight_sets_the_float_weight():
    layer, _ = quantized_linear(bits=2)
    layer.weight = torch.full((3, 5), 0.04)
    assert torch.equal(layer.weight, torch.full((3, 5), 0.05))


def test_quantized_checkpoint_restores_bits_scale_and_output():
    layer, _ = quantized_linear(bits=3)
    other = torch.nn.Linear(5, 3)
    attach(other, "weight", FakeQuantize(8, 1.0))
    other.load_state_dict(layer.state_dict())
    assert int(other.parametrizations.weight[0].bits) == 3
    inputs = torch.randn(2, 5)
    assert torch.equal(other(inputs), layer(inputs))


def test_checkpoints_carry_the_table():
    state = FakeQuantize(1.6, 0.1).state_dict()
    other = FakeQuantize(8, 1.0, "midrise")
    other.load_state_dict(state)
    assert (other.stored_bits, other.codebook) == (1.6, "midtread")
    other.load_state_dict(FakeQuantize(3, 0.1, "midrise").state_dict())
    assert (other.stored_bits, other.codebook) == (3, "midrise")


def test_checkpoints_from_before_there_was_a_choice_have_the_papers_table():
    layer, _ = quantized_linear(bits=3)
    inside = "parametrizations.weight.0."
    state = layer.state_dict()
    old = {k: v for k, v in state.items() if k[len(inside) :] != "ternary"}
    old.pop(f"{inside}midrise")
    assert len(old) == len(state) - 2
    other = torch.nn.Linear(5, 3)
    attach(other, "weight", FakeQuantize(1.6, 1.0, "midrise"))
    other.load_state_dict(old)
    assert torch.equal(other.weight, layer.weight)


def test_full_precision_checkpoint_loads_into_a_quantized_layer():
    layer, _ = quantized_linear()
    model = torch.nn.Sequential(layer)
    plain = torch.nn.Sequential(torch.nn.Linear(5, 3)).state_dict()
    keys = list(plain)
    result = model.load_state_dict(plain)
    assert not result.missing_keys and not result.unexpected_keys
    assert list(plain) == keys, "the caller's dictionary must stay as it is"
    original = layer.parametrizations.weight.original
    assert torch.equal(original, plain["0.weight"])


def test_quantized_checkpoint_is_refused_by_a_plain_layer():
    layer, _ = quantized_linear()
    with pytest.raises(RuntimeError, match="parametrizations.weight.original"):
        torch.nn.Linear(5, 3).load_state_dict(layer.state_dict())


def test_detached_layer_loads_plain_checkpoints_again():
    layer, _ = quantized_linear()
    detach(layer, "weight")
    plain = torch.nn.Linear(5, 3)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight)
    assert not layer._load_state_dict_pre_hooks


def test_speechbrain_checkpoints_carry_the_quantizer(tmp_path):
    checkpoints = pytest.importorskip("speechbrain.utils.checkpoints")
    layer, _ = quantized_linear(bits=3)
    keeper = checkpoints.Checkpointer(tmp_path, {"layer": layer})
    expected = layer.weight.detach().clone()
    keeper.save_checkpoint()
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
        layer.parametrizations.weight[0].alpha.fill_(9.0)
    keeper.recover_if_possible()
    assert torch.equal(layer.weight, expected)
