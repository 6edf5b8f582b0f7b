"""Rounding by what a Brain's own layers put out; layers as matrices."""

import copy
import json
import logging
import re

import pytest
import speechbrain as sb
import torch
import torch.nn as nn
from helpers import (
    TINY_RECIPE,
    brain_of,
    fit,
    hparams_of,
    needs_bf16_lstm,
    script,
)
from speechbrain.nnet.linear import Linear

from speechbrain_mpq import choose_bits
from speechbrain_mpq.lobes.models.tcn import ChannelAffine, ConvBlock
from speechbrain_mpq.quantization.codebook import quantize_to_integers
from speechbrain_mpq.quantization.fake_quant import LearnedStep
from speechbrain_mpq.quantization.gptq import PostTraining
from speechbrain_mpq.quantization.packing import (
    load_packed_,
    read_packed,
    save_packed,
)
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.quantization.tensors import named_tensors
from speechbrain_mpq.run import main
from speechbrain_mpq.training import pipeline
from speechbrain_mpq.training.matrix_rounding import (
    input_matrix,
    is_matrix_layer,
    output_matrix,
    round_layer_,
    weight_matrix,
)
from speechbrain_mpq.training.pipeline import PlanStore
from speechbrain_mpq.training.rounding import (
    round_calibrated_,
    tensors_by_owner,
)

LAYERS = {
    "linear": nn.Linear(6, 4),
    "1x1": nn.Conv1d(6, 4, 1),
    "ordinary": nn.Conv1d(6, 4, 3, stride=2, dilation=2, padding=3),
    "depthwise": nn.Conv1d(6, 6, 3, groups=6, padding=2, dilation=2),
    "grouped": nn.Conv1d(6, 4, 3, groups=2, padding="same"),
    "multiplier": nn.Conv1d(6, 12, 3, groups=6),
    "reflecting": nn.Conv1d(6, 4, 4, padding="same", padding_mode="reflect"),
    "batch norm": nn.BatchNorm1d(6).eval(),
    "layer norm": nn.LayerNorm(6),
    "group norm": nn.GroupNorm(2, 6),
    "affine": ChannelAffine(6),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_matrix_product_is_the_layers_output(name):
    torch.manual_seed(0)
    layer = LAYERS[name]
    for value in layer.parameters():
        value.normal_()
    last = isinstance(layer, nn.Linear | nn.LayerNorm)
    inputs = torch.randn(3, 11, 6) if last else torch.randn(3, 6, 11)
    outputs = output_matrix(layer, layer(inputs))
    weight = weight_matrix(layer, layer.weight)
    found = weight @ input_matrix(layer, inputs)
    found += layer.bias.reshape(*weight.shape[:2], 1)
    torch.testing.assert_close(found, outputs, rtol=1e-4, atol=1e-5)
    assert is_matrix_layer(layer)


@torch.no_grad()
def test_two_dimensional_inputs():
    layer = nn.BatchNorm1d(6).eval()
    inputs = torch.randn(5, 6)
    assert input_matrix(layer, inputs).shape == (6, 1, 5)
    assert input_matrix(nn.Linear(6, 2), inputs).shape == (1, 6, 5)


def test_what_is_no_matrix():
    others = nn.PReLU(6), nn.LSTM(4, 4), nn.ReLU(), nn.Conv2d(2, 2, 3)
    assert not any(is_matrix_layer(layer) for layer in others)
    assert not is_matrix_layer(nn.LayerNorm([4, 5]))


class Curve(nn.Module):
    """Has the parameters of a norm, but does something else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.bias = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (x * self.weight[:, None] + self.bias[:, None]).tanh()


@torch.no_grad()
def test_layer_that_only_looks_like_a_norm_is_refused():
    with pytest.raises(ValueError, match="Curve .* does not scale and shift"):
        input_matrix(Curve(), torch.randn(2, 3, 4))


LOADER = {"batch_size": 4}
QUIET = {"loader_kwargs": LOADER, "progress": False}


class Scaled(nn.Module):
    """Looks like a norm and is none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 2.0))
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return (x * self.weight).tanh() + self.bias


class Tagger(sb.Brain):
    """A tag for every frame; items pass one by one, in place at times."""

    def compute_forward(self, batch, stage):
        """Log-probabilities of the items after one another."""
        nets, outputs = self.modules, []
        for feats in batch:  # [frames, 8]
            hidden = nets.conv(feats.mT[None])[0].mT
            hidden = nets.norm(hidden.relu_())
            hidden = hidden + 0.1 * nets.rnn(nets.scaled(hidden))[0]
            hidden = nets.linear(input=hidden[None])[0].relu_()
            outputs.append(nets.output(hidden))
        return torch.cat(outputs).log_softmax(-1)


def tagger():
    """A Brain before fit, in full precision; the same every time."""
    torch.manual_seed(0)
    modules = {
        "conv": nn.Conv1d(8, 8, 3, padding=1),
        "norm": nn.LayerNorm(8),
        "scaled": Scaled(),
        "rnn": nn.GRU(8, 8),
        "linear": nn.Linear(8, 16),
        "output": Linear(input_size=16, n_neurons=5),
    }
    return Tagger(modules, run_opts={"device": "cpu"})


def batches(seed=0):
    """Batches of items of many lengths, features correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, 8, generator=generator)
    return [
        [torch.randn(n, 8, generator=generator) @ mixing for n in lengths]
        for lengths in ((20, 31), (25,), (40, 12, 9), (33, 30))
    ]


def loader(data):
    """The batches as they are."""
    return torch.utils.data.DataLoader(data, batch_size=None)


@torch.no_grad()
def divergence(brain, reference):
    """Mean KL divergence from another Brain's distributions, by torch."""
    found, expected = (
        torch.cat([b.compute_forward(x, None) for x in batches()])
        for b in (brain, reference)
    )
    return torch.nn.functional.kl_div(
        found, expected, log_target=True, reduction="batchmean"
    ).item()


def state(brain):
    """All tensors of the modules, copied."""
    return copy.deepcopy(brain.modules.state_dict())


def assert_equal_states(one, other):
    """Bit-identical, and of the same names."""
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("bits", [2, 3])
def test_calibrated_rounding_keeps_the_distribution(bits):
    lost = {}
    for method in ("nearest", "calibrated"):
        brain = tagger()
        choose_bits(brain, loader(batches()), "uniform", bits, rounding=method)
        lost[method] = divergence(brain, tagger())
        weight = brain.modules["conv"].weight
        assert len(weight.unique()) < 2**bits
    assert lost["calibrated"] < 0.5 * lost["nearest"]


def test_the_log_says_what_stays_nearest(caplog):
    nearest, brain = tagger(), tagger()
    with caplog.at_level(logging.INFO):
        choose_bits(nearest, [], "uniform", 3, rounding="nearest")
        assert "Nearest rounding stays" not in caplog.text
        choose_bits(brain, loader(batches()), "uniform", 3, progress=False)
    assert "Fitted 5 quantized layers" in caplog.text
    assert "Nearest rounding stays (no matrix): scaled" in caplog.text
    before, after = (b.modules.scaled.state_dict() for b in (nearest, brain))
    assert_equal_states(before, after)
    for name in ("conv", "norm", "rnn", "linear", "output"):
        before, after = (b.modules[name].state_dict() for b in (nearest, brain))
        assert any(not torch.equal(before[k], after[k]) for k in before)


def test_layers_that_the_quantized_model_uses_otherwise(caplog):
    """As in a search whose length depends on what is found."""

    class Searching(Tagger):
        def compute_forward(self, batch, stage):
            found = super().compute_forward(batch, stage)
            if "parametrizations" in str(self.modules["linear"]._modules):
                self.modules.linear(torch.zeros(1, 7, 8))
            self.modules.linear(torch.zeros(1, 3, 8))
            return found

    brain = tagger()
    brain.__class__ = Searching
    with caplog.at_level(logging.INFO):
        choose_bits(brain, loader(batches()), "uniform", 3, progress=False)
    assert "(used otherwise once quantized): linear" in caplog.text
    assert "Fitted 4 quantized layers" in caplog.text


def test_one_item_says_nothing_about_another(caplog):
    with caplog.at_level(logging.INFO):
        choose_bits(tagger(), loader([[torch.ones(9, 8)]]), "uniform", 3)
    assert "(a single item goes in: give more batches)" in caplog.text


def test_several_uses_are_as_good_as_one():
    """Against one use of all items in a row."""
    torch.manual_seed(0)
    given, wanted = torch.randn(9, 7, 6), torch.randn(9, 7, 4)
    uses = list(zip(given.split([1, 3, 5]), wanted.split([1, 3, 5])))
    layers = []
    for pairs in (uses, [(given, wanted)]):
        torch.manual_seed(1)
        layer = nn.Linear(6, 4)
        plain = copy.deepcopy(layer)
        quantize_(layer, 3)
        with torch.no_grad():
            round_layer_(tensors_by_owner(layer), layer, plain, pairs)
        layers.append(layer)
    for one, other in zip(*(layer.parameters() for layer in layers)):
        torch.testing.assert_close(one, other)


def test_resumed_calls_round_to_the_same(tmp_path, monkeypatch):
    data = script().dataset(8, seed=2)

    def started(**options):
        hparams = hparams_of("uniform", tmp_path, epochs=1)
        brain = brain_of(hparams)
        options = {**QUIET, **options}
        choose_bits(brain, data, "kl", 3.5, **options)
        return brain, hparams

    first, second = started()[0], started()[0]  # chooses; finds the plan
    assert_equal_states(state(first), state(second))
    with pytest.raises(ValueError, match="another output_folder"):
        started(rounding="nearest")
    brain, hparams = started()
    fit(brain, hparams)

    def unneeded(*_):
        raise AssertionError("rounds what a checkpoint replaces")

    monkeypatch.setattr(pipeline, "CalibratedRounding", unneeded)
    again, hparams = started()
    fit(again, hparams)  # all epochs are done: it loads
    assert_equal_states(state(brain), state(again))
    del again.checkpointer.recoverables["encoder"]
    store = PlanStore(tmp_path, again.checkpointer)
    assert not store.weights_follow(again.modules)


def test_plans_from_before_there_was_a_choice_are_nearest(tmp_path):
    def plan(**options):
        brain = brain_of(hparams_of("plain", tmp_path))
        return choose_bits(brain, [], "size", 4, **options)

    first = plan(rounding="nearest")
    path = tmp_path / "chosen.json"
    settings = json.loads(path.read_text())
    assert settings.pop("rounding") == "nearest"
    path.write_text(json.dumps(settings))
    assert plan(rounding="nearest") == first
    with pytest.raises(ValueError, match="another output_folder"):
        plan()


@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("bf16", marks=needs_bf16_lstm)]
)
def test_training_goes_on_from_calibrated_weights(tmp_path, precision):
    data = script().dataset(8, seed=2)
    hparams = hparams_of("uniform", tmp_path, epochs=3)
    options = {"precision": precision, "eval_precision": precision}
    brain = brain_of(hparams, **options)
    before = torch.get_rng_state()
    choose_bits(brain, data, "uniform", 3, **QUIET)
    assert torch.equal(torch.get_rng_state(), before)
    fit(brain, hparams)
    log = (tmp_path / "train_log.txt").read_text()
    losses = [float(loss) for loss in re.findall(r"train loss: (\S+)", log)]
    assert losses[-1] < 0.9 * losses[0]


def test_unknown_rounding():
    with pytest.raises(ValueError, match="'up' is none of"):
        choose_bits(tagger(), [], rounding="up")


def test_runner_hands_the_rounding_on(tmp_path):
    lines = (TINY_RECIPE / "train.py", TINY_RECIPE / "train.yaml")
    places = (f"--output_folder={tmp_path}", "--device=cpu", "--epochs=1")
    asked = ("--scores", "uniform", "--rounding", "nearest")
    main([str(word) for word in (*lines, *places, *asked)])
    settings = json.loads((tmp_path / "chosen.json").read_text())
    assert settings["rounding"] == "nearest"


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
    assert names[-2:] == ["1.gru", "2"] and len(names) == 8

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
        kept = "prelu" in name or name.endswith("bits")
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
