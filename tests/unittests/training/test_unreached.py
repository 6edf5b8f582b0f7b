"""Weights that no loss reaches: what is said, and what is left behind."""

import gc
import logging

import pytest
import torch
from torch.optim import optimizer

from speechbrain_mpq import LearnedBits, Quantizer, learn_bits
from speechbrain_mpq.training import quantizer as quantizers


class Model(torch.nn.Module):
    """Owns a parameter itself, as class tokens are."""

    def __init__(self):
        super().__init__()
        self.token = torch.nn.Parameter(torch.rand(8))
        self.unused = torch.nn.Sequential(
            torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        )
        self.layers = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.layers(x)


def step(model, learning=torch.optim.SGD, **options):
    """One step of an optimizer."""
    learner = learning(model.parameters(), lr=0.1, **options)
    model(torch.rand(3, 8)).sum().backward()
    learner.step()
    return learner


def hooks():
    """How many there are in torch's global list."""
    return len(optimizer._global_optimizer_post_hooks)


def test_the_advice_excludes_what_is_not_reached_and_nothing_else():
    model = Model()
    Quantizer({"net": model})
    with pytest.raises(ValueError, match="no loss reaches net.token") as said:
        step(model)
    assert 'exclude: ["net.token", "net.unused.*"]' in str(said.value)
    model = Model()
    quantizer = Quantizer({"net": model}, exclude=["net.token", "net.unused.*"])
    step(model)
    assert list(quantizer.plan.tensors) == [
        "net.layers.weight",
        "net.layers.bias",
    ]


@pytest.mark.parametrize("learned", [False, True])
def test_no_hook_is_left_where_a_model_is_gone(learned):
    gc.collect()
    before = hooks()
    for _ in range(3):
        model = torch.nn.Linear(8, 8)
        if learned:
            quantizer = LearnedBits({"m": model}, bits=4, interval=9)
            options = {"opt_class": torch.optim.SGD, "quantizer": quantizer}
            step(model, learn_bits, **options)
        else:
            quantizer = Quantizer({"m": model}, bits=4)
            step(model)
    del model, quantizer
    options = None  # the last reference to it
    gc.collect()
    assert hooks() == before


def test_no_hook_is_left_where_all_is_known():
    gc.collect()
    before, model = hooks(), torch.nn.Linear(8, 8)
    quantizer = Quantizer({"m": model}, bits=4)
    step(model)
    model(torch.rand(1, 8))
    assert hooks() == before
    assert quantizer.plan.average_bits == 4


def test_a_yaml_block_is_logged_once_there_is_a_log(caplog):
    name = quantizers.__name__
    with caplog.at_level(logging.WARNING, name):
        model = torch.nn.Linear(8, 8)
        Quantizer({"m": model}, bits=4)
        model(torch.rand(1, 8))
    assert not caplog.records
    with caplog.at_level(logging.INFO, name):
        model(torch.rand(1, 8))
        model(torch.rand(1, 8))
    (record,) = [r for r in caplog.records if r.name == name]
    assert "Quantized 2 tensors in 1 clusters to 4.000 bits" in record.message


def test_vectors_stay_in_float_whatever_they_are_called():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4, bias=False), torch.nn.PReLU()
    )
    quantizer = Quantizer({"m": model}, vectors=False)
    assert list(quantizer.plan.tensors) == ["m.0.weight"]


def test_torchscript_is_refused_with_what_to_do():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    quantizer = Quantizer({"m": model})
    with pytest.raises(ValueError, match="leave out --jit"):
        torch.jit.script(model)
    quantizer.dequantize()
    assert torch.jit.script(model)(torch.ones(1, 4)).shape == (1, 4)
