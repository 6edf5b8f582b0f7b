"""Slices of output channels: names, quantizing, checkpoints."""

import copy

import pytest
import torch

from speechbrain_mpq.quantization.fake_quant import FakeQuantize, LearnedStep
from speechbrain_mpq.quantization.groups import (
    RowGroups,
    count_slices,
    row_slices,
    slice_name,
    split_name,
)
from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits
from speechbrain_mpq.quantization.quant_api import (
    bit_plan,
    cluster_quantized,
    clusters,
    dequantize_,
    quantize_,
    requantize_,
)
from speechbrain_mpq.quantization.tensors import named_tensors


def net(seed=0):
    """A filter of 10 output channels, a depthwise one, a matrix, a PReLU."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv1d(3, 10, 1),
        torch.nn.Conv1d(10, 10, 3, groups=10, bias=False),
        torch.nn.PReLU(),
        torch.nn.Conv1d(10, 4, 1, bias=False),
    )


CLUSTERS = {
    "0[0:5]": ["0.weight[0:5]"],
    "0[5:10]": ["0.weight[5:10]"],
    "0": ["0.bias"],
    "1[0:5]": ["1.weight[0:5]"],
    "1[5:10]": ["1.weight[5:10]"],
    "2": ["2.weight"],
    "3": ["3.weight"],
}


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 10, 99])
@pytest.mark.parametrize("length", [1, 9, 10, 64])
def test_slices_tile_the_rows_and_are_about_equal(length, rows):
    count = count_slices((length, 2), rows)
    slices = row_slices(length, count)
    covered = [i for s in slices for i in range(s.start, s.stop)]
    assert covered == list(range(length))
    sizes = {s.stop - s.start for s in slices}
    assert max(sizes) <= rows and max(sizes) - min(sizes) <= 1
    assert len(slices) == -(-length // rows)


@pytest.mark.parametrize("rows", [0, -1, 2.0, True, "8"])
def test_rows_must_be_a_positive_number(rows):
    with pytest.raises(ValueError, match="rows must be a positive number"):
        clusters(net(), rows=rows)


@pytest.mark.parametrize("rows", [slice(0, 32), slice(100, 120), ...])
def test_names_come_apart_again(rows):
    assert split_name(slice_name("a.b.weight", rows)) == ("a.b.weight", rows)


def test_large_matrices_and_filters_are_cut_the_rest_stays():
    assert clusters(net(), rows=5) == CLUSTERS
    assert clusters(net(), rows=10) == clusters(net())
    assert clusters(net(), rows=None) == clusters(net())


def test_patterns_name_parameters_or_slices():
    found = clusters(net(), ["*.weight"], ["1.*", "0.weight[5:10]"], rows=5)
    assert set(found) == {"0[0:5]", "2", "3"}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("codebook", ["midtread", "midrise"])
def test_a_slice_is_quantized_as_a_tensor_of_its_own(granularity, codebook):
    model, plain = net(), net()
    arguments = {"granularity": granularity, "codebook": codebook}
    plan = quantize_(model, 3, rows=5, **arguments)
    assert {n: list(c.tensors) for n, c in plan.clusters.items()} == CLUSTERS
    for rows in (slice(0, 5), slice(5, 10)):
        alone = torch.nn.Linear(3, 5, bias=False)
        alone.weight.data = plain[0].weight.data[rows, :, 0]
        quantize_(alone, 3, **arguments)
        torch.testing.assert_close(model[0].weight[rows, :, 0], alone.weight)
    one_more = 1 if granularity == "tensor" else 0  # scales a cut tensor
    whole = quantize_(plain, 3, **arguments)
    scales = sum(c.scales for c in plan.clusters.values())
    before = sum(c.scales for c in whole.clusters.values())
    assert scales == before + 2 * one_more


def mixed_plan():
    """Other bits in every slice of the first filter."""
    return BitPlan(
        {
            "0[5:10]": ClusterBits(1.6, 15, ("0.weight[5:10]",)),
            "0[0:5]": ClusterBits(4, 15, ("0.weight[0:5]",)),
            "3": ClusterBits(2, 40, ("3.weight",)),
        },
        rest_parameters=10 + 30 + 1,
        codebook="midrise",
    )


def test_a_plan_brings_its_slices_and_its_codebook():
    model = net()
    done = quantize_(model, mixed_plan())
    assert done == mixed_plan() and done.bytes == mixed_plan().bytes
    assert bit_plan(model) == done
    weight = model[0].weight
    assert len(weight[:5].unique()) > 3 >= len(weight[5:].unique())
    assert 0 not in model[3].weight  # four levels, no zero
    dequantize_(model)
    done = quantize_(model, mixed_plan(), codebook="midtread")
    assert done.codebook == "midtread"


def test_a_plan_for_other_slices_is_refused():
    model = net()
    entry = ClusterBits(2, 12, ("0.weight[0:4]",))
    more = ClusterBits(2, 18, ("0.weight[4:10]",))
    with pytest.raises(ValueError, match=r"needs '0.weight\[0:4\]'.*lacks"):
        quantize_(model, BitPlan({"0[0:4]": entry, "0[4:10]": more}))
    entry = ClusterBits(2, 15, ("0.weight[0:5]",))
    with pytest.raises(ValueError, match=r"needs '0.weight\[0:5\]'.*lacks"):
        quantize_(model, BitPlan({"0[0:5]": entry}))
    assert not any(isinstance(m, FakeQuantize) for m in model.modules())


def test_half_a_tensor_cannot_be_quantized():
    model = net()
    with pytest.raises(ValueError, match="all slices of a tensor or none"):
        quantize_(model, 2, exclude=["0.weight[0:5]"], rows=5)
    assert not any(isinstance(m, RowGroups) for m in model.modules())


def test_dequantize_restores_or_keeps():
    model, plain = net(), net()
    quantize_(model, mixed_plan())
    values = model[0].weight.detach().clone()
    kept = copy.deepcopy(model)
    dequantize_(model)
    before, after = plain.state_dict(), model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    dequantize_(kept, keep_quantized=True)
    assert torch.equal(kept[0].weight, values)
    assert set(kept.state_dict()) == set(before)


def test_one_slice_is_quantized_for_a_while():
    model, plain, alone = net(), net(), net()
    quantize_(alone, 2, rows=5)
    name, arguments = "0[5:10]", {"include": ["0.*"], "rows": 5}
    with cluster_quantized(model, name, 2, **arguments):
        assert torch.equal(model[0].weight[:5], plain[0].weight[:5])
        assert torch.equal(model[0].weight[5:], alone[0].weight[5:])
        assert torch.equal(model[0].bias, plain[0].bias)
    assert torch.equal(model[0].weight, plain[0].weight)
    names = ["0.weight[5:10]"]  # how a cluster's tensors are listed
    with cluster_quantized(model, name, 2, names, rows=5):
        assert torch.equal(model[0].weight[5:], alone[0].weight[5:])
    with pytest.raises(ValueError, match=r"near misses: 0\["):
        with cluster_quantized(model, "0[0:4]", 2, rows=5):
            pass


def test_full_precision_weights_load_and_are_requantized():
    model, other = net(), net(seed=1)
    quantize_(model, mixed_plan())
    result = model.load_state_dict(other.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    requantize_(model)
    quantize_(other, mixed_plan())
    assert torch.equal(model[0].weight, other[0].weight)
    assert torch.equal(model[3].weight, other[3].weight)


def test_quantized_checkpoints_restore_every_slice():
    model, other = net(), net(seed=1)
    quantize_(model, mixed_plan())
    quantize_(other, 8, include=["0.weight", "3.weight"], rows=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].weight, model[0].weight)
    assert bit_plan(other) == mixed_plan()


def test_learned_steps_are_trained_in_every_slice():
    model = net()
    quantize_(model, mixed_plan(), estimator=LearnedStep)
    model(torch.randn(2, 3, 8)).square().sum().backward()
    steps = [m.stretch.grad for m in model.modules() if hasattr(m, "stretch")]
    assert len(steps) == 3 and all(step != 0 for step in steps)
    assert model[0].parametrizations.weight.original.grad.abs().sum() > 0


def test_tied_tensors_stay_tied():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(7, 5), torch.nn.Linear(5, 7))
    model[1].weight = model[0].weight
    plan = quantize_(model, 2, exclude="1.bias", rows=4)
    assert set(plan.clusters) == {"0[0:3]", "0[3:7]"}
    assert torch.equal(model[0].weight, model[1].weight)
    assert len(named_tensors(model)) == 3
    dequantize_(model, keep_quantized=True)
    assert model[0].weight is model[1].weight


def test_broken_weights_name_the_slice_and_nothing_is_changed():
    model = net()
    with torch.no_grad():
        model[0].weight[7] = float("nan")
    with pytest.raises(ValueError, match=r"0.weight\[5:10\] has NaN"):
        quantize_(model, 2, rows=5)
    assert not any(isinstance(m, FakeQuantize) for m in model.modules())
