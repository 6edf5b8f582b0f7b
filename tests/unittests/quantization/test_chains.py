"""Scales follow what others write to the float values."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from speechbrain_mpq.quantization.admm import ADMM
from speechbrain_mpq.quantization.fake_quant import (
    FakeQuantize,
    LearnedStep,
    LogStep,
)
from speechbrain_mpq.quantization.packing import load_packed_, save_packed
from speechbrain_mpq.quantization.quant_api import (
    dequantize_,
    quantize_,
    watch_scales,
)

ESTIMATORS = (FakeQuantize, LearnedStep, LogStep)


def network(estimator=LogStep, bits=4, **options):
    """A quantized network of two layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    quantize_(model, bits, estimator=estimator, **options)
    return model


def originals(model):
    """The float values of all weights."""
    pairs = model.named_parameters()
    return [p for name, p in pairs if name.endswith("original")]


def misfit(model):
    """The largest relative error of a quantized weight."""
    layers = [m for m in model.modules() if hasattr(m, "parametrizations")]
    chains = [(m, n, c) for m in layers for n, c in m.parametrizations.items()]
    return max(
        ((getattr(m, n) - c.original).norm() / c.original.norm()).item()
        for m, n, c in chains
    )


def train(model, steps=5, after=lambda: None):
    """Some steps of an optimizer."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        after()


@torch.no_grad()
def clip(model):
    """What a Wasserstein critic does after each step."""
    for parameter in model.parameters():
        parameter.data.clamp_(-0.01, 0.01)


@torch.no_grad()
def draw(model):
    """What many recipes do with all parameters."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter, gain=20)
        elif parameter.dim():
            nn.init.constant_(parameter, -5.0)


@torch.no_grad()
def replace(model):
    """Give parameters other memory."""
    for original in originals(model):
        original.data = torch.randn_like(original) * 30


@pytest.mark.parametrize("read", ["forward", "weight", "state", "packed"])
@pytest.mark.parametrize("write", [clip, draw, replace])
def test_scales_fit_what_is_written_to_all_parameters(write, read, tmp_path):
    options = {"rows": 4} if read == "forward" else {}
    model = network(bits=8, **options)
    train(model)
    write(model)
    if read == "forward":
        model(torch.zeros(1, 8))
    elif read == "weight":
        assert model[0].weight.any() and model[0].bias.any()
        assert model[2].weight.any() and model[2].bias.any()
    elif read == "state":
        again = network(bits=8)
        again.load_state_dict(copy.deepcopy(model.state_dict()))
        model = again
    else:
        plain = network(bits=8)
        dequantize_(plain)
        load_packed_(plain, save_packed(model, tmp_path).parent)
        assert torch.equal(plain[0].weight, model[0].weight)
    assert misfit(model) < 0.02


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_weights_that_are_clipped_after_each_step_are_not_lost(estimator):
    model = network(estimator)
    train(model, after=lambda: clip(model))
    assert model[0].weight.abs().max() > 0.005
    assert misfit(model) < 0.2


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_set_that_is_swapped_in_and_out_leaves_no_trace(estimator, bits):
    model, x = network(estimator, bits), torch.randn(3, 8)
    train(model)
    before, state = model(x), copy.deepcopy(model.state_dict())
    kept = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.data.mul_(7).add_(0.1)
    assert not torch.equal(model(x), before)
    model.state_dict()
    for parameter, values in zip(model.parameters(), kept):
        parameter.data.copy_(values)
    assert torch.equal(model(x), before)
    again = model.state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_steps_of_optimizers_leave_the_scale_to_them(estimator, monkeypatch):
    model, refits = network(estimator), []
    plain = FakeQuantize.refit
    monkeypatch.setattr(
        FakeQuantize, "refit", lambda *a: refits.append(0) or plain(*a)
    )
    optimizer = torch.optim.SGD(model.parameters(), 50.0)  # a jump, too
    model(torch.randn(4, 8)).square().mean().backward()
    before = [original.norm() for original in originals(model)]
    optimizer.step()
    model(torch.randn(4, 8))
    after = [original.norm() for original in originals(model)]
    assert max(b / a for a, b in zip(before, after)) > 1.5
    assert not refits


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hooks_of_an_optimizer_may_look_at_the_model(estimator):
    """These run before torch's hooks of all optimizers."""
    states = []
    for looks in (True, False):
        model = network(estimator, bits=16)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        if looks:
            optimizer.register_step_post_hook(
                lambda *_, layer=model[0]: layer.weight
            )
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(4, 8)).square().mean().backward()
            optimizer.step()
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_hooks_behind_a_step_write_is_followed(estimator, looks):
    model = network(estimator)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)

    def clipped(*_):
        clip(model)
        if looks:
            model(torch.zeros(1, 8))

    optimizer.register_step_post_hook(clipped)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    assert model[0].weight.abs().max() > 0.005
    assert misfit(model) < 0.2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_that_fails_is_over(estimator):
    model = network(estimator)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fail)
    draw(model)
    model(torch.zeros(1, 8))
    assert misfit(model) < 0.2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_closures_see_what_their_optimizer_does(estimator, monkeypatch):
    model, refits = network(estimator), []
    monkeypatch.setattr(FakeQuantize, "refit", lambda *_: refits.append(0))
    optimizer = torch.optim.LBFGS(model.parameters(), 20.0, max_iter=4)
    x, target = torch.randn(4, 8), 9 * torch.randn(4, 4)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        return loss

    before = [original.norm() for original in originals(model)]
    for _ in range(2):
        optimizer.step(closure)
    after = [original.norm() for original in originals(model)]
    assert max(b / a for a, b in zip(before, after)) > 1.5
    assert not refits


def test_values_that_were_put_on_the_levels_keep_their_scale():
    model = network(bits=2)
    for layer in (model[0], model[2]):
        chain = layer.parametrizations.weight
        alpha = chain[0].alpha.clone()
        chain.original.data.copy_(alpha * torch.randn_like(layer.weight).sign())
        assert torch.equal(layer.weight.abs(), alpha.expand_as(layer.weight))


def test_admm_fits_its_own():
    model = network(ADMM, 4)
    scale = model[0].parametrizations.weight[0].alpha.clone()
    draw(model)
    model(torch.zeros(1, 8))
    assert torch.equal(model[0].parametrizations.weight[0].alpha, scale)


def test_full_precision_loads_without_a_guard():
    model, plain = network(bits=8), nn.Linear(8, 16)
    plain.weight.data.mul_(50)
    model[0].load_state_dict(plain.state_dict())
    torch.testing.assert_close(
        model[0].weight, plain.weight, atol=0.2, rtol=0.0
    )
    state = plain.state_dict()
    state["weight"] = state["weight"] * torch.nan
    with pytest.raises(ValueError, match="weight has NaN"):
        model[0].load_state_dict(state)


def test_what_is_assigned_gets_a_scale_that_fits():
    layer = parametrizations.weight_norm(nn.Linear(8, 6))
    quantize_(layer, 8)
    values = torch.randn(6, 8) * 30
    layer.weight = values
    assert (layer.weight - values).norm() < 0.02 * values.norm()


def test_another_parameter_is_refused_with_what_to_do():
    model = network()
    with pytest.raises(ValueError, match=r"weight.data.copy_"):
        model[0].weight = nn.Parameter(torch.ones(16, 8))
    dequantize_(model)
    model[0].weight = nn.Parameter(torch.ones(16, 8))
    assert model[0](torch.zeros(1, 8)).shape == (1, 16)


def test_parametrizations_come_before_quantizers():
    model = network()
    parametrizations.spectral_norm(model[0])
    with pytest.raises(ValueError, match="register it first"):
        model(torch.zeros(1, 8))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_tables_that_write_to_themselves_train_and_pack(
    kind, estimator, tmp_path
):
    torch.manual_seed(0)
    table, tokens = kind(9, 4, max_norm=0.5), torch.arange(6).view(2, 3)
    quantize_(table, 4, estimator=estimator)
    before = table.weight.detach().clone()
    train_table = torch.optim.SGD(table.parameters(), 1.0)
    for _ in range(3):
        train_table.zero_grad()
        (table(tokens) - 0.1).square().sum().backward()
        train_table.step()
    assert not torch.equal(table.weight, before)
    output = table.eval()(tokens)
    assert output.norm(dim=-1).max() < 0.501
    plain = kind(9, 4, max_norm=0.5).eval()
    load_packed_(plain, save_packed(table, tmp_path).parent)
    assert torch.equal(plain(tokens), output)


def test_weights_without_values_are_refused():
    layer = nn.Linear(4, 4, device="meta")
    with pytest.raises(ValueError, match="weight is on the meta device"):
        quantize_(layer, 4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_copied_after_training(kind):
    model = nn.ModuleDict({"rnn": kind(8, 4)})
    quantize_(model, 4)
    x = torch.randn(3, 2, 8)
    expected, _ = model["rnn"](x)
    expected.sum().backward()
    again = copy.deepcopy(model)
    assert torch.equal(again["rnn"](x)[0], expected)
    again["rnn"].weight_ih_l0.data.zero_()
    assert not torch.equal(again["rnn"](x)[0], expected)
    assert torch.equal(model["rnn"](x)[0], expected)
    dequantize_(again)
    assert torch.equal(copy.deepcopy(again)["rnn"](x)[0], again["rnn"](x)[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_has_no_scale_to_be_trained_is_named(estimator, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[1].bias)
    quantize_(model, 4, estimator=estimator)
    watch_scales(model)
    train(nn.Linear(8, 4), 1)  # another model's
    assert "stays zero" not in caplog.text
    train(model, 3)
    named = "0.bias, 1.bias: all zero" in caplog.text
    assert named == (estimator is not LogStep)
    assert caplog.text.count("all zero") == named
    assert named != bool(model[0].bias.any())
