"""Slices of output channels: names, quantizing, checkpoints."""

import copy

import pytest
import torch
from speechbrain.nnet.RNN import GRU, LSTM

from speechbrain_mpq.inference.folder import cluster_bits, coverage_rows
from speechbrain_mpq.quantization.fake_quant import FakeQuantize, LearnedStep
from speechbrain_mpq.quantization.groups import (
    RowGroups,
    count_slices,
    row_slices,
    slice_name,
    split_name,
)
from speechbrain_mpq.quantization.packing import (
    load_packed_,
    packed_file_bytes,
    read_model,
    save_packed,
)
from speechbrain_mpq.quantization.plan import (
    BitPlan,
    ClusterBits,
    Scheme,
    bit_plan,
)
from speechbrain_mpq.quantization.quant_api import (
    cluster_quantized,
    clusters,
    coverage,
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


LAYERS = {
    "lstm": lambda: torch.nn.LSTM(4, 6, num_layers=2),
    "gru": lambda: torch.nn.GRU(4, 6, bidirectional=True),
    "no_bias": lambda: torch.nn.LSTM(4, 6, bias=False),
    "projected": lambda: torch.nn.LSTM(4, 6, proj_size=3),
    "speechbrain_lstm": lambda: LSTM(hidden_size=6, input_size=4),
    "speechbrain_gru": lambda: GRU(hidden_size=6, input_size=4),
}


def network(kind="lstm"):
    """A recurrent layer and a linear one."""
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {"rnn": LAYERS[kind](), "out": torch.nn.Linear(6, 5)}
    )


def gate_plan(model, **options):
    """Bits that differ from gate to gate."""
    plan = quantize_(copy.deepcopy(model), 4, gates=True, **options)
    widths = (1, 2, 4, 8)
    entries = {
        name: {**vars(entry), "bits": widths[i % 4]}
        for i, (name, entry) in enumerate(plan.clusters.items())
    }
    kind = type(next(iter(plan.clusters.values())))
    made = {name: kind(**entry) for name, entry in entries.items()}
    return BitPlan(made, plan.rest_parameters, plan.codebook)


def outputs(model):
    """What the recurrent layer puts out."""
    torch.manual_seed(1)
    with torch.no_grad():
        return model["rnn"](torch.randn(3, 5, 4))[0]


def test_each_gate_of_each_layer_is_a_cluster():
    found = clusters(network(), gates=True)
    assert list(found) == [
        *(f"rnn.{gate}_l0" for gate in ("input", "forget", "cell", "output")),
        *(f"rnn.{gate}_l1" for gate in ("input", "forget", "cell", "output")),
        "out",
    ]
    assert found["rnn.cell_l1"] == [
        "rnn.weight_ih_l1[12:18]",
        "rnn.weight_hh_l1[12:18]",
        "rnn.bias_ih_l1[12:18]",
        "rnn.bias_hh_l1[12:18]",
    ]
    assert found["out"] == ["out.weight", "out.bias"]


def test_directions_projections_and_wrappers():
    found = clusters(network("gru"), gates=True)
    assert set(found) == {
        *(f"rnn.{g}_l0" for g in ("reset", "update", "new")),
        *(f"rnn.{g}_l0_reverse" for g in ("reset", "update", "new")),
        "out",
    }
    # A projection is behind the gates.
    assert clusters(network("projected"), gates=True)["rnn"] == [
        "rnn.weight_hr_l0"
    ]
    assert "rnn.rnn.update_l0" in clusters(
        network("speechbrain_gru"), gates=True
    )


def test_a_layer_that_is_the_whole_model():
    found = clusters(torch.nn.LSTM(4, 6), gates=True)
    assert list(found) == ["input_l0", "forget_l0", "cell_l0", "output_l0"]
    plan = quantize_(torch.nn.GRUCell(4, 6), 2, gates=True)
    assert list(plan.clusters) == ["reset", "update", "new"]
    again = torch.nn.GRUCell(4, 6)
    assert quantize_(again, plan) == plan == bit_plan(again)


def test_without_the_option_nothing_changes():
    assert list(clusters(network())) == ["rnn", "out"]
    assert "rnn[0:6]" in clusters(network(), rows=6)


@pytest.mark.parametrize("wrong", [1, "yes", None])
def test_gates_is_true_or_false(wrong):
    with pytest.raises(ValueError, match="gates must be true or false"):
        Scheme(gates=wrong)


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_gate_is_quantized_as_a_matrix_of_its_own(kind, granularity):
    model = network(kind)
    plain = copy.deepcopy(model)
    quantize_(model, gate_plan(model, granularity=granularity), gates=True)
    plan = bit_plan(model)
    inner = "rnn.rnn." if kind.startswith("speechbrain") else "rnn."
    gate = inner + ("update" if "gru" in kind else "forget") + "_l0"
    bits = plan.clusters[gate].bits
    path = f"{inner}weight_hh_l0"
    weight = plain.get_parameter(path).data[6:12]
    alone = torch.nn.Linear(*weight.shape[::-1], bias=False)
    alone.weight.data.copy_(weight)
    quantize_(alone, bits)
    module, _, attribute = path.rpartition(".")
    quantized = getattr(model.get_submodule(module), attribute)[6:12]
    assert torch.equal(quantized, alone.weight)


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("architecture", [None, {"class": "net"}])
def test_packed_and_unpacked_bit_for_bit(kind, architecture, tmp_path):
    model = network(kind)
    fresh = copy.deepcopy(model)
    plan = gate_plan(model)
    assert quantize_(model, plan) == plan
    expected = outputs(model)
    size = packed_file_bytes(fresh, plan, architecture=architecture)
    path = save_packed(model, tmp_path, architecture=architecture)
    assert path.stat().st_size == size
    assert packed_file_bytes(model, architecture=architecture) == size
    assert read_model(path).version == (3 if architecture else 2)
    load_packed_(fresh, tmp_path)
    assert torch.equal(outputs(fresh), expected)


def test_one_table_a_row_comes_back(tmp_path):
    model, fresh = network(), network()
    quantize_(model, 2, granularity="channel", gates=True)
    expected = outputs(model)
    save_packed(model, tmp_path)
    load_packed_(fresh, tmp_path)
    assert torch.equal(outputs(fresh), expected)


def test_a_plan_goes_through_its_file(tmp_path):
    model = network()
    plan = gate_plan(model)
    plan.save(tmp_path / "plan.json")
    again = BitPlan.load(tmp_path / "plan.json")
    assert again == plan and again.gated == {
        f"rnn.{kind}_{side}_l{layer}"
        for kind in ("weight", "bias")
        for side in ("ih", "hh")
        for layer in (0, 1)
    }
    quantize_(model, again)
    assert bit_plan(model) == plan
    assert {row["cluster"] for row in coverage(model)} == set(plan.clusters)


def test_undone_and_changed_for_one_gate_only():
    model, plain = network(), network()
    quantize_(model, 2, gates=True)
    dequantize_(model)
    assert torch.equal(outputs(model), outputs(plain))
    with cluster_quantized(model, "rnn.forget_l1", 1, gates=True):
        changed = [
            name
            for name, value in model.named_parameters()
            if not torch.equal(value, plain.get_parameter(name))
        ]
        weight = model["rnn"].weight_ih_l1.data
        other = plain["rnn"].weight_ih_l1.data
        assert torch.equal(weight[:6], other[:6])
        assert not torch.equal(weight[6:12], other[6:12])
        assert torch.equal(weight[12:], other[12:])
    assert changed == [
        f"rnn.{kind}_{side}_l1"
        for kind in ("weight", "bias")
        for side in ("ih", "hh")
    ]
    assert torch.equal(outputs(model), outputs(plain))


def test_checkpoints_and_copies():
    model, fresh = network(), network()
    plan = gate_plan(model)
    quantize_(model, plan)
    quantize_(fresh, plan)
    fresh["rnn"].parametrizations.weight_hh_l0.original.data.normal_()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh), outputs(model))
    assert bit_plan(copy.deepcopy(model)) == plan


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_file_has_the_clusters_of_its_plan(kind, tmp_path):
    model = network(kind)
    plan = quantize_(model, gate_plan(model))
    path = save_packed(model, tmp_path)
    found = cluster_bits(coverage_rows(read_model(path)))
    expected = {
        name: {"bits": entry.bits, "parameters": entry.parameters}
        for name, entry in plan.clusters.items()
    }
    assert found == expected
