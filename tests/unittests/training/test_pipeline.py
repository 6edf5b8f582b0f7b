"""Inheriting clusters from uniform prototypes."""

import pytest
import torch

from speechbrain_mpq.quantization.packing import save_packed
from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.training.pipeline import inherit_, load_prototype


def network(channels=4):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv1d(3, channels, 1, bias=False),
        torch.nn.PReLU(),
        torch.nn.Conv1d(channels, 2, 1),
    )


@pytest.fixture
def prototypes(tmp_path):
    """Packed 2- and 8-bit systems whose biases differ."""
    folders = {}
    for bits in (2, 8):
        model = network()
        quantize_(model, bits, exclude=["*.bias"])
        model[2].bias.data.fill_(bits)
        folders[bits] = tmp_path / str(bits)
        save_packed(model, folders[bits])
    return {bits: load_prototype(path) for bits, path in folders.items()}


def plan(**bits):
    sizes = {"0": 12, "1": 1, "2": 8}
    return BitPlan(
        {
            name: ClusterBits(bits[f"c{name}"], size, (f"{name}.weight",))
            for name, size in sizes.items()
        },
        rest_parameters=2,
    )


def test_each_cluster_comes_from_the_prototype_of_its_bits(prototypes):
    model = network()
    inherit_(model, plan(c0=2, c1=8, c2=8), prototypes)
    assert torch.equal(model[0].weight, prototypes[2]["0.weight"])
    assert torch.equal(model[1].weight, prototypes[8]["1.weight"])
    assert torch.equal(model[2].weight, prototypes[8]["2.weight"])
    assert len(model[0].weight.unique()) <= 3


def test_the_rest_comes_from_where_most_parameters_do(prototypes):
    model = network()
    inherit_(model, plan(c0=2, c1=8, c2=8), prototypes)
    assert torch.equal(model[2].bias, torch.full((2,), 2.0))
    inherit_(model, plan(c0=8, c1=8, c2=2), prototypes)
    assert torch.equal(model[2].bias, torch.full((2,), 8.0))


def test_inherited_weights_quantize_to_the_prototype_itself(prototypes):
    model = network()
    inherit_(model, plan(c0=2, c1=2, c2=2), prototypes)
    quantize_(model, 2, exclude=["*.bias"])
    for index in (0, 2):
        expected = prototypes[2][f"{index}.weight"]
        torch.testing.assert_close(model[index].weight, expected)


def test_missing_prototypes_are_named(prototypes, tmp_path):
    with pytest.raises(ValueError, match=r"uses \[4\] bits"):
        inherit_(network(), plan(c0=2, c1=4, c2=8), prototypes)
    with pytest.raises(FileNotFoundError, match="uniform_4bit.yaml --bits"):
        load_prototype(tmp_path / "nowhere")


def test_another_architecture_is_refused_before_anything_changes(prototypes):
    model = network(channels=5)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="another architecture: 0.weight"):
        inherit_(model, plan(c0=2, c1=2, c2=2), prototypes)
    assert torch.equal(model[0].weight, before)
