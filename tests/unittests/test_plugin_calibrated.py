"""Rounding by what a Brain's own layers put out."""

import copy
import json
import logging

import pytest
import speechbrain as sb
import torch
import torch.nn as nn
from processor import needs_bf16_lstm
from speechbrain.nnet.linear import Linear
from tiny_recipe import FOLDER, brain_of, fit, hparams_of, script

from speechbrain_mpq import choose_bits, quantize_
from speechbrain_mpq.brains.layer_rounding import (
    round_layer_,
    tensors_by_owner,
)
from speechbrain_mpq.plugin import calibrated
from speechbrain_mpq.plugin.plan_files import PlanFiles
from speechbrain_mpq.run import main

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
    for rounding in ("nearest", "calibrated"):
        brain = tagger()
        choose_bits(
            brain, loader(batches()), "uniform", bits, rounding=rounding
        )
        lost[rounding] = divergence(brain, tagger())
        weight = brain.modules["conv"].weight
        assert len(weight.unique()) < 2**bits
    assert lost["calibrated"] < 0.5 * lost["nearest"]


def test_the_log_says_what_stays_nearest(caplog):
    nearest, brain = tagger(), tagger()
    with caplog.at_level(logging.INFO):
        choose_bits(nearest, [], "uniform", 3, rounding="nearest")
        assert "Nearest rounding stays" not in caplog.text
        choose_bits(brain, loader(batches()), "uniform", 3, progress=False)
    assert "Fitted 4 quantized layers" in caplog.text
    assert "Nearest rounding stays (no matrix): rnn, scaled" in caplog.text
    for name in ("rnn", "scaled"):
        before, after = (b.modules[name].state_dict() for b in (nearest, brain))
        assert_equal_states(before, after)
    for name in ("conv", "norm", "linear", "output"):
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
    assert "Fitted 3 quantized layers" in caplog.text


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

    monkeypatch.setattr(calibrated, "CalibratedRounding", unneeded)
    again, hparams = started()
    fit(again, hparams)  # all epochs are done: it loads
    assert_equal_states(state(brain), state(again))
    del again.checkpointer.recoverables["encoder"]
    files = PlanFiles(again, tmp_path, "kl")
    assert not files.weights_follow(again.modules)


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
    lines = (tmp_path / "train_log.txt").read_text().splitlines()
    losses = [
        float(line.split("train loss: ")[1].split(" ")[0]) for line in lines
    ]
    assert losses[-1] < 0.9 * losses[0]


def test_unknown_rounding():
    with pytest.raises(ValueError, match="'up' is none of"):
        choose_bits(tagger(), [], rounding="up")


def test_runner_hands_the_rounding_on(tmp_path):
    lines = (FOLDER / "train.py", FOLDER / "train.yaml")
    places = (f"--output_folder={tmp_path}", "--device=cpu", "--epochs=1")
    asked = ("--scores", "uniform", "--rounding", "nearest")
    main([str(word) for word in (*lines, *places, *asked)])
    settings = json.loads((tmp_path / "chosen.json").read_text())
    assert settings["rounding"] == "nearest"
