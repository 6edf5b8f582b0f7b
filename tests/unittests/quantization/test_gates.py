"""Gates of recurrent layers as clusters of their own."""

import copy

import pytest
import torch
from speechbrain.nnet.RNN import GRU, LSTM

from speechbrain_mpq.inference.folder import cluster_bits, coverage_rows
from speechbrain_mpq.quantization.packing import (
    load_packed_,
    packed_file_bytes,
    read_model,
    save_packed,
)
from speechbrain_mpq.quantization.plan import BitPlan, bit_plan
from speechbrain_mpq.quantization.quant_api import (
    cluster_quantized,
    clusters,
    coverage,
    dequantize_,
    quantize_,
)
from speechbrain_mpq.quantization.scheme import Scheme

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


def mixed_plan(model, **options):
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
    quantize_(model, mixed_plan(model, granularity=granularity), gates=True)
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
    plan = mixed_plan(model)
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
    plan = mixed_plan(model)
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
    plan = mixed_plan(model)
    quantize_(model, plan)
    quantize_(fresh, plan)
    fresh["rnn"].parametrizations.weight_hh_l0.original.data.normal_()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh), outputs(model))
    assert bit_plan(copy.deepcopy(model)) == plan


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_file_has_the_clusters_of_its_plan(kind, tmp_path):
    model = network(kind)
    plan = quantize_(model, mixed_plan(model))
    path = save_packed(model, tmp_path)
    found = cluster_bits(coverage_rows(read_model(path)))
    expected = {
        name: {"bits": entry.bits, "parameters": entry.parameters}
        for name, entry in plan.clusters.items()
    }
    assert found == expected
