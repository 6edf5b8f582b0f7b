"""Bit plans: size, average and plan.json."""

import json

import pytest

from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits

MIXED = BitPlan(
    {
        "conv": ClusterBits(2, 1000, ("conv.weight",)),
        "norm": ClusterBits(16, 20, ("norm.weight", "norm.bias")),
        "prelu": ClusterBits(4, 1, ("prelu.weight",)),
    },
    rest_parameters=7,
)


def test_bytes_count_bits_scales_and_the_rest():
    assert MIXED.bytes == (250 + 4) + (40 + 8) + (1 + 4) + 4 * 7
    assert MIXED.average_bits == (2000 + 320 + 4) / 1021


def test_uniform_plan_has_the_same_clusters():
    plan = BitPlan.uniform(MIXED.clusters, 8, rest_parameters=7)
    assert plan.average_bits == 8
    assert plan.bytes == (1000 + 4) + (20 + 8) + (1 + 4) + 28
    assert plan.clusters["norm"].tensors == ("norm.weight", "norm.bias")


def test_channel_scales_are_counted():
    assert ClusterBits(4, 64, ("w",), scales=8).bytes == 32 + 32


@pytest.mark.parametrize("parameters", [1, 5, 6, 35, 10**6, 10**6 + 1])
def test_three_levels_take_a_fifth_of_a_byte(parameters):
    full, rest = divmod(parameters, 5)
    assert ClusterBits(1.6, parameters, ("w",)).bytes == full + bool(rest) + 4


def test_1_6_bits_and_the_codebook_survive_the_file(tmp_path):
    clusters = {"a": ClusterBits(1.6, 10, ("a.weight[0:2]",))}
    plan = BitPlan(clusters, codebook="midrise")
    plan.save(tmp_path / "plan.json")
    loaded = BitPlan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.tensors == ["a.weight[0:2]"]
    assert loaded.average_bits == 1.6
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["codebook"] == "midrise"
    assert content["clusters"]["a"]["bits"] == 1.6
    uniform = BitPlan.uniform(clusters, 2, codebook="midrise")
    assert (uniform.codebook, uniform.average_bits) == ("midrise", 2)


def test_the_papers_codebook_is_not_written_out():
    assert "codebook" not in MIXED.to_dict() and MIXED.codebook == "midtread"


def test_plan_survives_its_file(tmp_path):
    path = tmp_path / "plan.json"
    MIXED.save(path)
    assert BitPlan.load(path) == MIXED
    content = json.loads(path.read_text())
    assert content["version"] == 1
    assert content["bytes"] == MIXED.bytes
    assert content["clusters"]["conv"] == {
        "bits": 2,
        "parameters": 1000,
        "tensors": ["conv.weight"],
    }
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.pop("clusters"), "clusters"),
        (lambda c: c.update(clusters={}), "at least one"),
        (lambda c: c.update(codebook="other"), "codebook must be one of"),
        (lambda c: c["clusters"]["conv"].update(bits=4.0), "conv.*1 to 16"),
        (lambda c: c["clusters"]["conv"].pop("parameters"), "conv.*parameters"),
        (lambda c: c["clusters"]["conv"].update(tensors="w"), "conv.*list"),
        (lambda c: c["clusters"]["conv"].update(tensors=[3]), "conv.*list"),
        (lambda c: c["clusters"]["conv"].update(tensors=[{}]), "conv.*list"),
        (
            lambda c: c["clusters"]["conv"].update(parameters="72"),
            "conv.*number of values",
        ),
        (lambda c: c["clusters"]["conv"].update(parameters=0), "conv.*least"),
        (lambda c: c["clusters"]["conv"].update(bits=3), "bytes"),
        (lambda c: c["clusters"].update(norm=3), "norm"),
        (lambda c: c.update(rest_parameters=-1), "rest_parameters"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, change, message):
    content = MIXED.to_dict()
    change(content)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"plan.json.*{message}"):
        BitPlan.load(path)


def test_a_file_cut_short_is_refused_by_name(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(MIXED.to_dict())[:50])
    with pytest.raises(ValueError, match="plan.json is no bit plan"):
        BitPlan.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="plan.json is no bit plan"):
        BitPlan.load(path)
