"""Quantizers in their place: what is written, what is computed how often."""

import copy

import pytest
import torch
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.RNN import LiGRU
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from speechbrain_mpq.quantization import parametrized
from speechbrain_mpq.quantization.fake_quant import (
    FakeQuantize,
    LearnedStep,
    LogStep,
)
from speechbrain_mpq.quantization.packing import load_packed_, save_packed
from speechbrain_mpq.quantization.quant_api import (
    cluster_quantized,
    dequantize_,
    quantize_,
)

ESTIMATORS = (FakeQuantize, LearnedStep, LogStep)
WRITES = {
    "copy_": lambda m: m.weight.data.copy_(torch.full((6, 8), 3.0)),
    "data": lambda m: setattr(m.weight, "data", torch.full((6, 8), 3.0)),
    "ones_": lambda m: nn.init.ones_(m.weight).detach().mul_(3),
    "constant_": lambda m: nn.init.constant_(m.weight, 3.0),
    "view": lambda m: m.weight.detach().view(-1).fill_(3.0),
    "index": lambda m: m.weight.detach()[:].fill_(3.0),
    "out": lambda m: torch.full((6, 8), 3.0, out=m.weight.detach()),
    "no_grad": torch.no_grad()(lambda m: m.weight.zero_().add_(3.0)),
}
DRAWS = {
    "uniform_": lambda w: nn.init.uniform_(w, 4, 5),
    "normal_": lambda w: nn.init.normal_(w, 5, 0.1),
    "trunc_normal_": lambda w: nn.init.trunc_normal_(w, 5, 0.1, 4.5, 5.5),
    "orthogonal_": lambda w: nn.init.orthogonal_(w, gain=9),
    "sparse_": lambda w: nn.init.sparse_(w, 0.5, 3.0),
    "kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w),
}


def layer(estimator=LogStep, bits=8, **options):
    """A quantized layer that has been read."""
    torch.manual_seed(0)
    module = nn.Linear(8, 6)
    quantize_(module, bits, estimator=estimator, **options)
    module(torch.randn(2, 8))
    return module


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_to_a_weight_is_the_weight(write, estimator):
    module = layer(estimator)
    WRITES[write](module)
    torch.testing.assert_close(module.weight, torch.full((6, 8), 3.0))
    dequantize_(module)
    assert torch.equal(module.weight, torch.full((6, 8), 3.0))


@pytest.mark.parametrize("options", [{}, {"rows": 2}], ids=["whole", "rows"])
@pytest.mark.parametrize("draw", DRAWS)
def test_initializations_take_and_scales_fit(draw, options):
    module, plain = layer(**options), nn.Linear(8, 6)
    for one in (module, plain):
        torch.manual_seed(1)
        DRAWS[draw](one.weight)
    error = (module.weight - plain.weight).norm() / plain.weight.norm()
    assert error < 0.01
    assert torch.equal(
        module.state_dict()["parametrizations.weight.original"], plain.weight
    )


def test_what_is_not_written_keeps_its_float_values():
    module = layer(bits=2)
    original = module.parametrizations.weight.original.detach().clone()
    module.weight.data[0].fill_(0.125)
    assert torch.equal(module.weight[0], module.weight[0][:1].expand(8))
    kept = module.parametrizations.weight.original.detach()
    assert torch.equal(kept[1:], original[1:])
    assert (kept[0] == 0.125).all()


def test_reading_is_no_writing():
    module = layer(bits=2)
    state = copy.deepcopy(module.state_dict())
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        weight = module.weight
        (weight.square().sum() + module.bias.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = module.parametrizations.weight.original.detach().clone()
    assert not torch.equal(kept, state["parametrizations.weight.original"])
    module.weight.detach().clone().mul_(2)
    assert torch.equal(module.parametrizations.weight.original, kept)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.Linear, nn.Bilinear])
def test_resetting_draws_weights_and_fits_scales(kind):
    torch.manual_seed(0)
    sizes = (4, 4, 4) if kind is nn.Bilinear else (4, 4)
    module = kind(*sizes)
    quantize_(module, 4, estimator=LogStep)
    chain = next(iter(module.parametrizations.values()))
    before = chain.original.detach().clone()
    module.reset_parameters()
    for chain in module.parametrizations.values():
        assert chain[0].log_stretch.item() == 0
        expected = chain[0].fitted.clone()
        chain[0].refit(chain.original.detach())
        assert torch.equal(chain[0].fitted, expected)
    assert not torch.equal(
        next(iter(module.parametrizations.values())).original, before
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_largest_norm_is_kept(estimator):
    torch.manual_seed(0)
    module = Linear(n_neurons=8, input_size=8, max_norm=0.1)
    quantize_(module, 8, estimator=estimator)
    for _ in range(2):
        module(torch.randn(2, 8))
    assert module.w.weight.norm(dim=1).max() < 0.101


def counted(model, monkeypatch):
    """How often weights are quantized in a training step."""
    count = [0]
    plain = FakeQuantize.forward

    def forward(self, weight):
        count[0] += 1
        return plain(self, weight)

    monkeypatch.setattr(FakeQuantize, "forward", forward)
    return count


def test_weights_are_computed_once_in_a_forward(monkeypatch):
    torch.manual_seed(0)
    net = LiGRU(hidden_size=4, input_shape=(2, 7, 3), num_layers=1)
    model = nn.ModuleDict({"rnn": net})
    plan = quantize_(model, 4)
    count = counted(model, monkeypatch)
    output, _ = model["rnn"](torch.randn(2, 7, 3))
    output.sum().backward()
    assert count[0] == len(plan.tensors)
    model["rnn"](torch.randn(2, 7, 3))
    assert count[0] == 2 * len(plan.tensors)
    dequantize_(model)
    assert not net._forward_hooks and not net._forward_pre_hooks


def test_what_is_computed_once_has_the_same_gradients(monkeypatch):
    def gradients(once):
        torch.manual_seed(0)
        model = LiGRU(hidden_size=4, input_shape=(2, 7, 3), num_layers=2)
        quantize_(model, 3, estimator=LogStep)
        if not once:
            parametrized.computed_always(model)
        torch.manual_seed(1)
        for _ in range(2):  # as in two losses of one step
            model(torch.randn(2, 7, 3))[0].square().sum().backward()
        return [p.grad for p in model.parameters()]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other)


def test_two_passes_have_graphs_of_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    quantize_(model, 4, estimator=LogStep)
    real, fake = (model(torch.randn(3, 4)).sum() for _ in range(2))
    real.backward()
    fake.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_steps_inside_of_a_forward_are_seen():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            first = self.linear(x)
            with torch.no_grad():
                self.linear.parametrizations.weight.original.mul_(0)
            return first, self.linear(x)

    net = Net()
    quantize_(net, 8)
    first, second = net(torch.ones(1, 2))
    assert torch.equal(second, net.linear.bias[None])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_segments_compute_what_they_need(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            x = self.linear(x).tanh()
            for _ in range(2):
                x = checkpoint(self.linear, x, use_reentrant=reentrant).tanh()
            return self.linear(x)

    net = Net()
    quantize_(net, 4, estimator=LogStep)
    net(torch.randn(2, 4)).sum().backward()
    assert net.linear.parametrizations.weight.original.grad.abs().sum() > 0


def test_frozen_and_trained_weights_say_so_without_gradients():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    quantize_(model, 4)
    with torch.no_grad():
        assert model[0].weight.requires_grad
        assert not model[1].weight.requires_grad


def test_a_copy_of_a_normed_layer_is_quantized_alone():
    model = parametrizations.weight_norm(nn.Conv1d(2, 2, 3))
    other = copy.deepcopy(model)
    quantize_(other, 2)
    assert model.bias is model._parameters["bias"]
    full = model.weight.detach().clone()
    dequantize_(other)
    assert torch.equal(other.weight, full)


def test_full_precision_of_a_normed_layer_loads_into_the_quantized_one():
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))

    full, model = build(0), build(1)
    quantize_(model, 8)
    result = model.load_state_dict(full.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    again = build(2)
    quantize_(again, 8)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again[0].weight, model[0].weight)


def test_a_loaded_normed_layer_can_lose_its_norm(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))

    model, other = build(0), build(1)
    quantize_(model, 3)
    save_packed(model, tmp_path / "a")
    load_packed_(other, tmp_path / "a")
    load_packed_(other, tmp_path / "a")
    save_packed(other, tmp_path / "b")
    again = load_packed_(build(2), tmp_path / "b")
    nn.utils.parametrize.remove_parametrizations(again[0], "weight")
    assert torch.equal(again[0].weight, model[0].weight)


def test_scores_overwrite_weights_behind_their_norms():
    norm = parametrizations.spectral_norm(nn.Linear(4, 3))
    model = nn.ModuleDict({"a": norm}).eval()
    full = norm.weight.detach().clone()
    with cluster_quantized(model, "a", 2):
        assert len(norm.weight.unique()) <= 3
    assert torch.equal(norm.weight, full)


@pytest.mark.parametrize("pattern", ["0.*", "*"])
def test_what_is_removed_from_a_copy_stays_in_the_model(pattern):
    """As SpeechBrain's HiFiGAN recipe does to listen to its generator."""
    model = torch.nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(2, 3, 3)),
        parametrizations.weight_norm(nn.Conv1d(3, 2, 3)),
    )
    quantize_(model, 3, include=[pattern])
    given = torch.randn(1, 2, 9)
    before = model(given)
    copied = copy.deepcopy(model)
    for layer in copied:
        parametrize.remove_parametrizations(layer, "weight")
        assert "weight" in layer._parameters
    assert torch.equal(copied(given), before)
    assert torch.equal(model(given), before)
    again = copy.deepcopy(copy.deepcopy(model))
    parametrize.remove_parametrizations(again[0], "weight")
    model(given).sum().backward()  # which still trains
    assert all(p.grad is not None for p in model.parameters())
