"""Calibrated rounding of networks: what it gains, keeps and refuses."""

import copy

import pytest
import torch
import torch.nn as nn

from speechbrain_mpq.brains.rounding import round_calibrated_
from speechbrain_mpq.quantization.codebook import quantize_to_integers
from speechbrain_mpq.quantization.fake_quant import LearnedStep
from speechbrain_mpq.quantization.packing import (
    load_packed_,
    read_packed,
    save_packed,
)
from speechbrain_mpq.quantization.quantizer import quantize_
from speechbrain_mpq.quantization.rounding import PostTraining
from speechbrain_mpq.quantization.tensors import named_tensors
from speechbrain_mpq.separation.tcn import ChannelAffine, ConvBlock


class Residual(nn.Module):
    """A stage of a network, and a part that is no matrix."""

    def __init__(self):
        super().__init__()
        self.block = ConvBlock(6, 8, dilation=2)
        self.gru = nn.GRU(6, 6, batch_first=True)

    def forward(self, x):
        return self.block(x) + 0.1 * self.gru(x.mT)[0].mT


def network():
    """A model with a network in it, in eval mode with some statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(5, 6, 1), Residual(), nn.Conv1d(6, 4, 3))
    net(inputs())
    return nn.ModuleDict({"net": net}).eval()


def inputs(items=12):
    """[items, channels, frames], channels correlated."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(5, 5, generator=generator)
    return mixing @ torch.randn(items, 5, 40, generator=generator)


@torch.no_grad()
def error(model, plain):
    """Relative squared error of the outputs."""
    expected = plain["net"](inputs())
    found = model["net"](inputs())
    return ((found - expected).square().sum() / expected.square().sum()).item()


WAYS = {
    "tensor": {},
    "channel": {"granularity": "channel"},
    "midrise": {"codebook": "midrise"},
    "row groups": {"rows": 2},
    "learned step": {"estimator": LearnedStep},
    "no biases": {"exclude": ["*.bias", "*norm*"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_outputs_come_closer_and_are_packed_as_they_are(way, tmp_path):
    bits = 3
    plain = network()
    model = copy.deepcopy(plain)
    plan = quantize_(model, bits, **WAYS[way])
    nearest = error(model, plain)
    names = round_calibrated_(model, "net", inputs(), progress=False)
    assert error(model, plain) < 0.7 * nearest
    assert names[0] == "0" and names[1] == "1.block.conv_1x1_in"
    assert names[-1] == "2" and len(names) == 7

    save_packed(model, tmp_path)
    packed, _ = read_packed(tmp_path)
    for name, tensor in named_tensors(model).items():
        if tensor.fake_quantize:
            quantizer = tensor.fake_quantize
            integers = quantize_to_integers(
                tensor.weight, bits, quantizer.alpha, quantizer.codebook
            )
            assert torch.equal(packed[name].integers, integers)
    loaded = network()
    load_packed_(loaded, tmp_path)
    with torch.no_grad():
        expected = model["net"](inputs())
        assert torch.equal(loaded["net"](inputs()), expected)
    assert plan.average_bits == bits


def test_matrix_makes_up_for_a_coarse_norm_before_it():
    """A 2-bit scale is wrong by a factor that the next layer can undo."""
    torch.manual_seed(0)
    net = nn.Sequential(ChannelAffine(5), nn.Conv1d(5, 4, 1, bias=False))
    net[0].weight.data.uniform_(1, 2)
    model = nn.ModuleDict({"net": net})
    plain = copy.deepcopy(model)
    quantize_(net[0], 2, exclude=["bias"])
    quantize_(net[1], 16)
    nearest = error(model, plain)
    round_calibrated_(model, "net", inputs(), (1e-6,), progress=False)
    assert nearest > 0.01
    assert error(model, plain) < 1e-2 * nearest


def test_biases_and_norms_in_float_take_the_mean():
    plain = network()
    model = copy.deepcopy(plain)
    quantize_(model, 2, exclude=["*.bias", "*norm*"])
    round_calibrated_(model, "net", inputs(), progress=False)
    with torch.no_grad():
        difference = model["net"](inputs()) - plain["net"](inputs())
    assert difference.mean((0, 2)).abs().max() < 1e-5
    norms = model["net"][1].block.norm_in, plain["net"][1].block.norm_in
    assert not torch.equal(norms[0].weight, norms[1].weight)


def test_untouched_are_other_layers_bits_modes_and_float_matrices():
    model = network()
    model["net"][1].train()
    quantize_(model, 3, exclude=["net.2.weight"], granularity="channel")
    before = copy.deepcopy(model.state_dict())
    round_calibrated_(model, "net", inputs(), progress=False)
    after = model.state_dict()
    assert model["net"][1].block.training and not model["net"][0].training
    for name, value in before.items():
        kept = "gru" in name or "prelu" in name or name.endswith("bits")
        if kept or name == "net.2.weight":
            assert torch.equal(after[name], value), name
    assert not torch.equal(
        after["net.2.parametrizations.bias.original"],
        before["net.2.parametrizations.bias.original"],
    )
    assert not model["net"][0]._forward_pre_hooks


def test_shared_weights_keep_nearest_rounding():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    net[2].weight = net[0].weight
    quantize_(net, 3)
    before = net[0].weight.detach().clone()
    round_calibrated_(net, "", torch.randn(9, 5), progress=False)
    assert torch.equal(net[0].weight, before)


def test_layer_that_is_used_twice_is_rounded_once():
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    quantize_(net, 3)
    assert round_calibrated_(net, "", torch.randn(9, 5), progress=False) == [
        "0"
    ]


def test_dead_inputs():
    net = nn.Sequential(nn.ReLU(), nn.Linear(5, 5))
    quantize_(net, 4)
    before = net[1].weight.detach().clone()
    round_calibrated_(net, "", -torch.ones(9, 5), progress=False)
    torch.testing.assert_close(net[1].weight, before, rtol=0.15, atol=0.1)


def test_result_is_deterministic_and_one_damping_needs_no_choice():
    models = [network(), network(), network()]
    for model, dampings in zip(models, [(0.1, 1.0), (0.1, 1.0), (0.1,)]):
        quantize_(model, 4, estimator=PostTraining)
        round_calibrated_(model, "net", inputs(), dampings, progress=False)
    assert error(models[0], models[1]) == 0
    assert error(models[2], network()) < 0.1


def test_bad_input_is_refused_and_changes_nothing():
    model = network()
    with pytest.raises(ValueError, match="call quantize_ first"):
        round_calibrated_(model, "net", inputs())
    quantize_(model, 4)
    before = copy.deepcopy(model.state_dict())
    broken = inputs()
    broken[3, 2, 1] = float("nan")
    for bad in (broken, inputs(1), inputs(0)):
        with pytest.raises(ValueError, match="two items of input"):
            round_calibrated_(model, "net", bad)
    with pytest.raises(ValueError, match="damping must be positive"):
        round_calibrated_(model, "net", inputs(), (0.0,), progress=False)
    with pytest.raises(ValueError, match="at least one damping"):
        round_calibrated_(model, "net", inputs(), (), progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value)


def test_half_precision_that_cannot_hold_the_levels_is_refused():
    net = nn.Sequential(nn.Linear(5, 3)).to(torch.bfloat16)
    quantize_(net, 16)
    given = torch.randn(9, 5).to(torch.bfloat16)
    with pytest.raises(ValueError, match="quantize a float32 model"):
        round_calibrated_(net, "", given, progress=False)
