"""What is packed is finite where it is used."""

import pytest
import torch
from torch import nn

from speechbrain_mpq import Quantizer
from speechbrain_mpq.quantization.finite import not_finite
from speechbrain_mpq.quantization.packing import load_packed_, save_packed
from speechbrain_mpq.quantization.quant_api import dequantize_, quantize_

SPREAD = torch.linspace(0.01, 1, 8)  # the least are zero at 2 bits


class Using(nn.Module):
    """A module with a weight of its own."""

    def __init__(self, weight, use):
        super().__init__()
        self.own = nn.Parameter(weight.clone())
        self.use = use

    def forward(self, x):
        """Use it."""
        return self.use(x, self.own)


class Both(Using):
    """The same with two inputs."""

    def forward(self, x, other):
        """Use it."""
        return self.use(x + other, self.own)


def snake(x, alpha):
    """The activation of vocoders."""
    return x + torch.sin(alpha * x).square() / alpha


def cosine(x, weight):
    """A product with rows of length one."""
    rows = weight / weight.norm(dim=1, keepdim=True)
    return nn.functional.linear(x, rows)


ROWS = SPREAD[:, None] * torch.ones(8, 8)
DIVIDED = {
    "divided": (SPREAD, lambda x, w: x / w),
    "scalar": (torch.tensor([0.01, 1.0]), lambda x, w: x / w[0] * w[1]),
    "logarithm": (SPREAD, lambda x, w: x + w.log()),
    "power": (SPREAD, lambda x, w: x * w**-0.5),
    "snake": (SPREAD[:, None], lambda x, w: snake(x.mT, w).mT),
    "rows": (ROWS, cosine),
}
MULTIPLIED = {
    "norm": (SPREAD, lambda x, w: nn.functional.layer_norm(x, (8,), w)),
    "product": (ROWS, nn.functional.linear),
    "guarded": (SPREAD, lambda x, w: x / w.clamp_min(0.001)),
}


def network(weight, use, kind=Using):
    """A layer, and the module behind it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), kind(weight, use))


@pytest.mark.parametrize("use", DIVIDED)
def test_what_others_divide_by_is_not_packed_as_zero(tmp_path, caplog, use):
    model = network(*DIVIDED[use])
    quantize_(model, 2)
    assert "1.own cannot be packed" in caplog.text  # before any training
    with pytest.raises(ValueError, match=r"1.own cannot.*exclude: \['1.own'"):
        save_packed(model, tmp_path)
    assert not list(tmp_path.iterdir())
    x = torch.randn(2, 5, 8)
    model.train()(x)  # training sees the loss itself
    with pytest.raises(ValueError, match=r"exclude: \['\*1.own'\]"):
        model.eval()(x)
    dequantize_(model)
    quantize_(model, 2, exclude=["*1.own"])
    save_packed(model, tmp_path)
    again = network(*DIVIDED[use]).eval()
    load_packed_(again, tmp_path)
    assert torch.equal(again(x), model.eval()(x))
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("use", MULTIPLIED)
def test_what_is_multiplied_may_be_zero(tmp_path, use):
    model = network(*MULTIPLIED[use])
    quantize_(model, 2)
    assert not model[1].own.all()
    save_packed(model, tmp_path)
    assert torch.isfinite(model.eval()(torch.randn(2, 5, 8))).all()


def test_more_bits_are_enough():
    model = network(*DIVIDED["divided"])
    quantize_(model, 8)
    assert not not_finite(model)
    model.eval()(torch.randn(2, 8))


def test_modules_of_two_inputs_are_tried():
    model = nn.ModuleDict({"both": network(*DIVIDED["divided"], Both)[1]})
    quantize_(model, 2)
    assert list(not_finite(model)) == ["both.own"]


def test_a_weight_of_torchs_that_a_parent_divides_by_is_seen_in_evaluation():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8, bias=False)
            self.norm.weight.data.copy_(SPREAD)

        def forward(self, x):
            return x / self.norm.weight

    model = nn.ModuleDict({"net": Parent()})
    Quantizer(model, bits=2)
    with pytest.raises(ValueError, match=r"exclude: \['\*norm.weight'\]"):
        model["net"].eval()(torch.randn(2, 8))


def test_what_is_not_finite_in_full_precision_either_is_let_pass():
    model = network(SPREAD, lambda x, w: (x * w).masked_fill(x < 0, -torch.inf))
    quantize_(model, 2)
    assert model.eval()(torch.randn(9, 8)).isinf().any()
    assert not not_finite(model)


def test_trying_leaves_no_trace():
    class Counting(Using):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = network(*MULTIPLIED["norm"], Counting)
    quantize_(model, 2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert not not_finite(model.train())
    assert model[1].calls == 0
    assert model[1].training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_diverged_weights_are_not_packed(tmp_path, name, value):
    model = nn.Linear(4, 4)
    quantize_(model, 4, exclude=["bias"])
    tensor = model.bias if name == "bias" else model.parametrizations.weight
    getattr(tensor, "original", tensor).data[0] = value
    with pytest.raises(ValueError, match=f"{name} cannot be packed.*diverged"):
        save_packed(model, tmp_path)
