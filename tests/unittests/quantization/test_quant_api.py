"""Quantizing models in place, and undoing it.

The coverage table of slices and codebooks; the rest is with the zoo.
"""

import copy

import pytest
import torch

from speechbrain_mpq.quantization.codebook import codebook
from speechbrain_mpq.quantization.fake_quant import FakeQuantize
from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits
from speechbrain_mpq.quantization.quant_api import (
    bit_plan,
    cluster_quantized,
    clusters,
    coverage,
    dequantize_,
    quantize_,
    requantize_,
)


class Zoo(torch.nn.Module):
    """One of every kind of layer that speech models keep weights in."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(4, 8, 1, bias=False)
        self.depthwise = torch.nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.prelu = torch.nn.PReLU()
        self.norm = torch.nn.BatchNorm1d(8)
        self.lstm = torch.nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.gru = torch.nn.GRU(12, 8, num_layers=2, batch_first=True)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = torch.nn.Linear(8, 2)
        self.gain = torch.nn.Parameter(torch.tensor(1.5))
        self.register_buffer("window", torch.hann_window(4))

    def forward(self, x):
        """[batch, 4, time] to [batch, time, 2]."""
        x = self.norm(self.prelu(self.depthwise(self.conv(x))))
        x, _ = self.lstm(x.transpose(1, 2))
        x, _ = self.gru(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.linear(x) * self.gain + self.window.sum()


def zoo(seed=0):
    """The model in eval mode, and an input."""
    torch.manual_seed(seed)
    model, inputs = Zoo().eval(), torch.randn(2, 4, 5)
    return model, inputs


def parameter_names(model):
    """Names in the plain model."""
    return [name for name, _ in model.named_parameters()]


def test_clusters_are_the_owning_modules():
    model, _ = zoo()
    found = clusters(model)
    assert found["conv"] == ["conv.weight"]
    assert found["norm"] == ["norm.weight", "norm.bias"]
    assert len(found["lstm"]) == 8 and len(found["gru"]) == 8
    assert found["attention"] == [
        "attention.in_proj_weight",
        "attention.in_proj_bias",
    ]
    assert found["."] == ["gain"]
    names = sum(found.values(), [])
    assert sorted(names) == sorted(parameter_names(model))


@pytest.mark.parametrize(
    "bits, kind, rows",
    [
        (1, "midtread", None),
        (2, "midtread", None),
        (4, "midtread", None),
        (16, "midtread", None),
        (1.6, "midtread", None),
        (2, "midrise", None),
        (1.6, "midrise", 5),
    ],
)
def test_every_kind_of_layer_is_quantized_and_restored(bits, kind, rows):
    model, inputs = zoo()
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    expected = model(inputs)
    found = clusters(model, rows=rows)
    plan = quantize_(model, bits, codebook=kind, rows=rows)
    assert plan.average_bits == bits and plan.rest_parameters == 0
    assert plan.codebook == kind
    assert {n: list(c.tensors) for n, c in plan.clusters.items()} == found
    assert clusters(model) == found
    for name in before:
        owner, _, attribute = name.rpartition(".")
        value = getattr(model.get_submodule(owner), attribute)
        if name in dict(model.named_buffers()):
            continue
        assert not isinstance(value, torch.nn.Parameter)
        pieces = -(-len(value) // rows) if rows and value.dim() > 1 else 1
        levels = pieces * len(codebook(bits, kind=kind))
        assert len(value.unique()) <= levels
    changed = model(inputs)
    assert not torch.equal(changed, expected)
    dequantize_(model)
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(inputs), expected)


def test_kept_values_give_the_quantized_output():
    model, inputs = zoo()
    quantize_(model, 3)
    expected = model(inputs)
    dequantize_(model, keep_quantized=True)
    assert not any(isinstance(m, FakeQuantize) for m in model.modules())
    assert torch.equal(model(inputs), expected)


@torch.no_grad()  # torch refuses to copy a recurrent layer inside a graph
def test_a_copy_can_be_dequantized_on_its_own():
    model, inputs = zoo()
    quantize_(model, 3)
    expected = model(inputs)
    plain = copy.deepcopy(model)
    dequantize_(plain)
    assert torch.equal(model(inputs), expected)
    dequantize_(model)
    assert torch.equal(model(inputs), plain(inputs))


def test_every_layer_gets_a_gradient():
    model, inputs = zoo()
    quantize_(model, 2)
    model.train()(inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_optimizers_keep_their_parameters():
    model, _ = zoo()
    before = {id(parameter) for parameter in model.parameters()}
    quantize_(model, 4)
    assert {id(parameter) for parameter in model.parameters()} == before
    dequantize_(model)
    assert {id(parameter) for parameter in model.parameters()} == before


def test_quantized_values_are_a_fixed_point():
    model, inputs = zoo()
    quantize_(model, 4)
    once = model(inputs)
    dequantize_(model, keep_quantized=True)
    quantize_(model, 4)
    torch.testing.assert_close(model(inputs), once, rtol=1e-5, atol=1e-6)


def test_a_plan_gives_its_clusters_their_bits_and_leaves_the_rest():
    model, _ = zoo()
    plan = BitPlan(
        {
            "conv": ClusterBits(2, 32, ("conv.weight",)),
            "prelu": ClusterBits(8, 1, ("prelu.weight",)),
        }
    )
    done = quantize_(model, plan)
    assert done.clusters == plan.clusters
    count = sum(parameter.numel() for parameter in model.parameters())
    assert done.rest_parameters == count - 33
    bits = {r["tensor"]: r["asked_bits"] for r in coverage(model)}
    assert bits["conv.weight"] == 2 and bits["prelu.weight"] == 8
    assert bits["linear.weight"] is None
    assert bit_plan(model) == done


@pytest.mark.parametrize(
    "cluster, entry, message",
    [
        ("konv", ClusterBits(2, 32, ("konv.weight",)), "misses: conv.weight"),
        ("conv", ClusterBits(2, 33, ("conv.weight",)), "33 parameters.*32"),
        ("norm", ClusterBits(2, 8, ("norm.bias",)), "leave out"),
        ("gru", ClusterBits(2, 32, ("conv.weight",)), "lacks there"),
    ],
)
def test_a_plan_of_another_model_is_refused(cluster, entry, message):
    model, _ = zoo()
    with pytest.raises(ValueError, match=message):
        quantize_(model, BitPlan({cluster: entry}), exclude=["norm.bias"])
    assert not any(isinstance(m, FakeQuantize) for m in model.modules())


def test_patterns_choose_parameters():
    model, _ = zoo()
    plan = quantize_(model, 4, ["*weight*"], exclude=["norm.*", "gru.*"])
    assert "lstm" in plan.clusters and "norm" not in plan.clusters
    assert plan.clusters["lstm"].tensors[0] == "lstm.weight_ih_l0"
    assert all(
        "bias" not in n for c in plan.clusters.values() for n in c.tensors
    )


def test_a_pattern_that_matches_nothing_lists_near_misses():
    model, _ = zoo()
    with pytest.raises(ValueError, match="'depthwize.*'.*depthwise.weight"):
        quantize_(model, 4, include=["depthwize.*"])
    with pytest.raises(ValueError, match="'.*weigth'.*weight"):
        quantize_(model, 4, exclude="*.weigth")
    with pytest.raises(ValueError, match="leave no float parameter"):
        quantize_(model, 4, include="conv.*", exclude="*")


def test_a_quantized_model_is_refused():
    model, _ = zoo()
    quantize_(model, 4, include="conv.*")
    with pytest.raises(ValueError, match="dequantize_"):
        quantize_(model, 4)
    with pytest.raises(ValueError, match="dequantize_"):
        with cluster_quantized(model, "conv", 2):
            pass


def test_broken_weights_are_refused_by_name_and_nothing_is_changed():
    model, _ = zoo()
    with torch.no_grad():
        model.linear.bias[1] = float("nan")
    with pytest.raises(ValueError, match="linear.bias has NaN"):
        quantize_(model, 4)
    assert not any(isinstance(m, FakeQuantize) for m in model.modules())


@pytest.mark.parametrize("bits", [0, 4.0, True, "4"])
def test_bits_that_are_no_integers_are_refused(bits):
    model, _ = zoo()
    with pytest.raises(ValueError, match="integer from 1 to 16"):
        quantize_(model, bits)


@pytest.mark.parametrize("name", ["conv", "norm", "lstm", "attention", "."])
def test_one_cluster_is_quantized_for_a_while(name):
    model, inputs = zoo()
    before = copy.deepcopy(model.state_dict())
    plain = model(inputs)
    alone = copy.deepcopy(model)
    quantize_(alone, 3, include=clusters(model)[name])
    with cluster_quantized(model, name, 3):
        assert torch.equal(model(inputs), alone(inputs))
        changed = {
            key
            for key, value in model.state_dict().items()
            if not torch.equal(value, before[key])
        }
        # Norms of ones and zeros and single values quantize exactly.
        assert changed <= set(clusters(model)[name])
        assert changed or name in ("norm", ".")
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(inputs), plain)


def test_the_cluster_comes_back_after_an_error():
    model, _ = zoo()
    before = model.conv.weight.detach().clone()
    with pytest.raises(RuntimeError):
        with cluster_quantized(model, "conv", 2):
            raise RuntimeError
    assert torch.equal(model.conv.weight, before)


def test_an_unknown_cluster_lists_near_misses():
    model, _ = zoo()
    with pytest.raises(ValueError, match="'prelo'.*near misses: prelu"):
        with cluster_quantized(model, "prelo", 2):
            pass


@pytest.mark.parametrize("quantized", [False, True])
def test_coverage_has_every_tensor_once(quantized):
    model, _ = zoo()
    names = parameter_names(model)
    names += [name for name, _ in model.named_buffers()]
    if quantized:
        plan = quantize_(model, 4, exclude=["norm.*"])
        rows = coverage(model)
        stored = [r for r in rows if "buffer" not in r["reason"]]
        assert sum(row["bytes"] for row in stored) == plan.bytes
    rows = {row["tensor"]: row for row in coverage(model)}
    assert len(rows) == len(coverage(model))
    assert sorted(rows) == sorted(names)
    assert "buffer" in rows["window"]["reason"]
    assert rows["norm.weight"]["reason"] == "not selected"
    assert rows["conv.weight"]["bytes"] == (20 if quantized else 128)


def test_full_precision_weights_load_and_are_requantized():
    model, inputs = zoo()
    other, _ = zoo(seed=1)
    quantize_(model, 4)
    result = model.load_state_dict(other.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    requantize_(model)
    quantize_(other, 4)
    assert torch.equal(model(inputs), other(inputs))


def test_requantizing_keeps_bits_and_codebook():
    model, inputs = zoo()
    plan = quantize_(model, 1.6, include="conv.*", codebook="midrise")
    expected = model(inputs)
    requantize_(model)
    assert bit_plan(model) == plan
    assert torch.equal(model(inputs), expected)


def test_mixed_codebooks_are_refused():
    model, _ = zoo()
    quantize_(model, 2)
    model.conv.parametrizations.weight[0].set_codebook("midrise")
    with pytest.raises(ValueError, match="mixes the codebooks"):
        bit_plan(model)


def test_channel_scales_are_closer_and_cost_more():
    model, inputs = zoo()
    expected = model(inputs)

    def bytes_and_error(granularity):
        plan = quantize_(model, 4, granularity=granularity)
        error = (model(inputs) - expected).square().sum().item()
        requantize_(model)
        again = (model(inputs) - expected).square().sum().item()
        dequantize_(model)
        assert again == error
        return plan.bytes, error

    one, many = bytes_and_error("tensor"), bytes_and_error("channel")
    assert many[0] > one[0] and many[1] < one[1]


def test_tied_parameters_are_quantized_once_and_stay_tied():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(7, 5), torch.nn.Linear(5, 7))
    model[1].weight = model[0].weight
    tokens = torch.tensor([1, 2])
    plan = quantize_(model, 2, exclude="1.bias")
    assert plan.clusters["0"].parameters == 35 and "1" not in plan.clusters
    assert torch.equal(model[0].weight, model[1].weight)
    assert len(model[1].weight.unique()) <= 3
    expected = model(tokens)
    dequantize_(model, keep_quantized=True)
    assert model[0].weight is model[1].weight
    assert torch.equal(model(tokens), expected)


def test_weights_are_quantized_behind_their_own_parametrizations():
    weight_norm = torch.nn.utils.parametrizations.weight_norm
    model = torch.nn.Sequential(weight_norm(torch.nn.Conv1d(2, 2, 3)))
    full = model[0].weight.detach().clone()
    plan = quantize_(model, 2)
    assert set(plan.clusters["0"].tensors) == {"0.bias", "0.weight"}
    assert len(model[0].weight.unique()) <= 3
    model(torch.randn(1, 2, 9)).sum().backward()
    parts = model[0].parametrizations.weight
    assert parts.original0.grad is not None and parts.original1.grad is not None
    dequantize_(model)
    assert torch.equal(model[0].weight, full)
    quantize_(model, 2)
    quantized = model[0].weight.detach().clone()
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(model[0].weight, quantized)


def test_parts_of_a_parametrization_can_be_excluded():
    weight_norm = torch.nn.utils.parametrizations.weight_norm
    model = torch.nn.Sequential(weight_norm(torch.nn.Conv1d(2, 2, 1)))
    plan = quantize_(model, 4, exclude="*.parametrizations.*")
    assert plan.clusters["0"].tensors == ("0.bias",)
    assert len(coverage(model)) == 3


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_others_divide_by_is_refused_with_all_names():
    layers = [torch.nn.utils.weight_norm(torch.nn.Linear(2, 2)) for _ in "ab"]
    model = torch.nn.Sequential(*layers)
    with pytest.raises(ValueError, match="'0.weight_v', '1.weight_v'.*NaN"):
        quantize_(model, 2)
    quantize_(model, 2, exclude="*.weight_v")
    assert torch.isfinite(model(torch.randn(3, 2))).all()


def test_integer_parameters_stay_and_are_explained():
    model = torch.nn.Linear(2, 2)
    model.table = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    quantize_(model, 4)
    rows = {row["tensor"]: row for row in coverage(model)}
    assert "not a float" in rows["table"]["reason"]


def test_slices_and_tables_have_their_rows():
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.PReLU())
    plan = quantize_(model, 1.6, exclude="1.*", codebook="midrise", rows=3)
    rows = {row["tensor"]: row for row in coverage(model)}
    assert list(rows) == [
        "0.weight[0:3]",
        "0.weight[3:6]",
        "0.bias",
        "1.weight",
    ]
    piece = rows["0.weight[3:6]"]
    assert piece["cluster"] == "0[3:6]" and piece["shape"] == [3, 8]
    assert (piece["asked_bits"], piece["stored_bits"]) == (1.6, 1.6)
    assert piece["bytes"] == 5 + 4 and piece["codebook"] == "midrise"
    assert rows["1.weight"]["codebook"] is None
    assert sum(row["bytes"] for row in rows.values()) == plan.bytes


@pytest.mark.parametrize(
    "dtype, largest",
    [
        (torch.float32, 3.4e38),
        (torch.float64, 1e300),
        (torch.float16, 65504),
        (torch.bfloat16, 3.38e38),
    ],
)
def test_a_table_that_would_end_at_infinity(dtype, largest):
    layer = torch.nn.Linear(2, 2, bias=False, dtype=dtype)
    values = torch.tensor([[largest, 1.0], [2.0, -largest]], dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(values)
    with pytest.raises(ValueError, match="weight has values up to .*4 bits"):
        quantize_(layer, 4)
    assert torch.equal(layer.weight, values)
    with torch.no_grad():
        layer.weight.mul_(1e-3 if dtype != torch.float64 else 1e-270)
    quantize_(layer, 4)
    assert torch.isfinite(layer.weight).all()


def test_floats_that_nothing_computes_with_stay():
    layer = torch.nn.Linear(2, 2)
    small = torch.zeros(3, dtype=torch.float8_e4m3fn)
    layer.codes = torch.nn.Parameter(small, requires_grad=False)
    plan = quantize_(layer, 4)
    assert plan.tensors == ["weight", "bias"]
    (row,) = [row for row in coverage(layer) if row["tensor"] == "codes"]
    assert "float8_e4m3fn is not supported" in row["reason"]


def test_torchscript_is_refused_by_name():
    model = torch.nn.Sequential(torch.jit.script(torch.nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="^0 is TorchScript"):
        quantize_(model, 4)
