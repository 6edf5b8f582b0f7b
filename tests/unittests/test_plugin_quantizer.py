"""The Quantizer of a YAML: what it attaches to, loads and refuses."""

import pytest
import torch

from speechbrain_mpq import (
    FakeQuantize,
    LearnedBits,
    Quantizer,
    dequantize_,
    learn_bits,
    quantize_,
)
from speechbrain_mpq.plugin.budget import parse_budget
from speechbrain_mpq.plugin.outputs import find_distribution, kind_of


def modules():
    """What a recipe calls its modules."""
    torch.manual_seed(0)
    return {
        "encoder": torch.nn.LSTM(4, 4),
        "output": torch.nn.Linear(4, 3),
    }


def weights_of(layers):
    """A full-precision checkpoint of other values."""
    return {
        name: {key: 3 * value + 0.1 for key, value in m.state_dict().items()}
        for name, m in layers.items()
    }


def test_modules_keep_their_identity_and_come_back():
    layers = modules()
    before = {n: m.state_dict() for n, m in modules().items()}
    quantizer = Quantizer(layers, bits=3)
    assert quantizer.model["output"] is layers["output"]
    assert len(layers["output"].weight.unique()) <= 7
    quantizer.dequantize()
    for name, layer in layers.items():
        assert list(layer.state_dict()) == list(before[name])
        assert all(
            torch.equal(value, before[name][key])
            for key, value in layer.state_dict().items()
        )
    layers["output"].load_state_dict(weights_of(layers)["output"])


@pytest.mark.parametrize("strict", [True, False])
def test_full_precision_weights_get_scales_that_fit(strict):
    layers, checkpoint = modules(), weights_of(modules())
    quantizer = Quantizer(layers, bits=4, granularity="channel")
    for name, layer in layers.items():
        layer.load_state_dict(checkpoint[name], strict=strict)
    fresh = modules()
    for name, layer in fresh.items():
        layer.load_state_dict(checkpoint[name])
    quantize_(torch.nn.ModuleDict(fresh), 4, granularity="channel")
    assert torch.equal(layers["output"].weight, fresh["output"].weight)
    for name in ("weight_ih_l0", "bias_hh_l0"):
        loaded, fitted = (
            getattr(m["encoder"], name) for m in (quantizer.model, fresh)
        )
        assert torch.equal(loaded, fitted)


def test_quantized_weights_keep_the_scales_that_they_bring():
    trained = modules()
    Quantizer(trained)
    scale = trained["output"].parametrizations.weight[0].log_stretch
    scale.data.fill_(0.3)
    layers = modules()
    Quantizer(layers)
    layers["output"].load_state_dict(trained["output"].state_dict())
    assert torch.equal(layers["output"].weight, trained["output"].weight)


def test_checkpoint_without_a_key():
    layers = modules()
    Quantizer(layers)
    checkpoint = weights_of(modules())["output"]
    del checkpoint["weight"]
    with pytest.raises(ValueError, match=r"lacks 'weight'.*targets"):
        layers["output"].load_state_dict(checkpoint, strict=False)


def test_checkpoint_of_another_estimator():
    trained, layers = modules(), modules()
    Quantizer(trained, estimator=FakeQuantize)
    Quantizer(layers)
    with pytest.raises(ValueError, match=r"in another way.*estimator"):
        layers["output"].load_state_dict(
            trained["output"].state_dict(), strict=False
        )


@pytest.mark.parametrize("options", [{"bits": 3}, {"codebook": "midrise"}])
def test_checkpoint_of_another_plan(options):
    trained, layers = modules(), modules()
    Quantizer(trained, **options)
    Quantizer(layers)
    with pytest.raises(ValueError, match="quantized to another plan"):
        layers["output"].load_state_dict(trained["output"].state_dict())


def test_learned_bits_take_those_of_the_checkpoint():
    trained, layers = modules(), modules()
    Quantizer(trained, bits=3)
    learning = LearnedBits(layers, bits=4)
    for name, layer in layers.items():
        layer.load_state_dict(trained[name].state_dict())
    assert learning.plan.average_bits == 3


def test_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=r"'\*norm\*' matches no parameter"):
        Quantizer(modules(), exclude=["*norm*"])
    with pytest.raises(ValueError, match=r"'enc\*' matches.*near misses"):
        Quantizer({"net": torch.nn.PReLU()}, bits=None, include=["enc*"])


def test_model_that_is_quantized_already():
    layers = modules()
    quantizer = Quantizer(layers)
    with pytest.raises(ValueError, match="quantized already"):
        Quantizer(layers, bits=2)
    assert quantizer.plan.average_bits == 4
    dequantize_(quantizer.model)
    quantizer.model["output"].load_state_dict(weights_of(modules())["output"])


def test_targets_that_are_no_modules():
    with pytest.raises(TypeError, match="target 'lr' is a float"):
        Quantizer({"lr": 0.1})


@pytest.mark.parametrize("unreached", ["skip", True])
def test_unknown_ways_of_unreached(unreached):
    with pytest.raises(ValueError, match="unreached must be one of"):
        Quantizer(modules(), unreached=unreached)


@pytest.mark.parametrize("bits", [1.5, 17, "900 KiB"])
def test_budget_beyond_the_candidates(bits):
    with pytest.raises(ValueError, match="bits must lie between 2 and 16"):
        LearnedBits(modules(), bits=bits)


def test_frozen_weights_cannot_learn_bits():
    layers = modules()
    layers["encoder"].requires_grad_(False)
    with pytest.raises(ValueError, match="encoder.weight_ih_l0 is frozen"):
        LearnedBits(layers)
    plain = [list(layer.state_dict()) for layer in modules().values()]
    assert [list(layer.state_dict()) for layer in layers.values()] == plain


def test_bits_are_not_decided_without_gradients():
    layers = modules()
    quantizer = LearnedBits(layers, interval=1, unreached="ignore")
    optimizer = learn_bits(
        quantizer.model.parameters(), quantizer, torch.optim.SGD, lr=0.1
    )
    layers["output"](torch.ones(4)).sum().backward()
    with pytest.raises(ValueError, match=r"encoder.* had no gradient in 1"):
        optimizer.step()


def test_batch_norm_under_torchrun(monkeypatch):
    """SpeechBrain makes synchronized ones of them, without quantizers."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    layers = {"bn": torch.nn.BatchNorm1d(3), "out": torch.nn.Linear(3, 3)}
    with pytest.raises(ValueError, match="bn.weight is of a batch norm"):
        Quantizer(layers)
    Quantizer(layers, exclude=["bn.*"])
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.ModuleDict(layers))


def test_second_optimizer_is_checked_by_itself():
    layers = modules()
    Quantizer(layers)
    first, second = (
        torch.optim.SGD(layers[name].parameters(), lr=0.1)
        for name in ("output", "encoder")
    )
    layers["output"](torch.ones(4)).sum().backward()
    first.step()
    with pytest.raises(ValueError, match="no loss reaches encoder"):
        second.step()


@pytest.mark.parametrize("budget", ["4 apples", "", True, 0, -3, None])
def test_budgets_that_say_nothing(budget):
    with pytest.raises(ValueError, match="not understood"):
        parse_budget(budget)


def test_distributions_come_before_masks_and_lengths():
    lengths = torch.tensor([[1.0], [0.5]])
    log_probs = torch.randn(2, 4, 3).log_softmax(-1)
    assert find_distribution([lengths, {"p": log_probs}]) is log_probs
    assert kind_of(torch.randn(2, 3).sigmoid().bfloat16()) == "sigmoid"
    assert kind_of(torch.zeros(2, 0)) == ""
    assert kind_of(torch.ones(2, 3, dtype=torch.int64)) == ""
