"""Packed models: what is stored, and what is loaded again.

Packed models that cannot be loaded, and models that they do not fit.
"""

import copy
import json
import shutil

import pytest
import torch
from helpers import net, packed_net
from safetensors.torch import load_file

from speechbrain_mpq.quantization.container import PackedModelError
from speechbrain_mpq.quantization.packing import (
    load_packed_,
    read_packed,
    save_packed,
)
from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits
from speechbrain_mpq.quantization.quant_api import (
    dequantize_,
    named_tensors,
    quantize_,
)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"granularity": "channel"},
        {"codebook": "midrise"},
        {"rows": 4},
        {"granularity": "channel", "codebook": "midrise", "rows": 5},
    ],
    ids=lambda arguments: "-".join(arguments),
)
@pytest.mark.parametrize("bits", [1, 1.6, 2, 3, 4, 8, 11, 16])
def test_loaded_forward_is_bit_identical(tmp_path, bits, arguments):
    _, model = packed_net(tmp_path, bits, **arguments)
    inputs = torch.randn(2, 3, 9)
    other = net(seed=1)
    assert load_packed_(other, tmp_path) is other
    assert torch.equal(other(inputs), model(inputs))
    dequantize_(model, keep_quantized=True)
    state, expected = other.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types_are_packed_too(tmp_path, dtype):
    model = net().to(dtype)
    quantize_(model, 4, exclude="norm.*")
    save_packed(model, tmp_path)
    other = net(seed=1).to(dtype)
    load_packed_(other, tmp_path)
    assert torch.equal(other.conv.weight, model.conv.weight)
    assert torch.equal(other.norm.weight, model.norm.weight)


def test_parameters_left_alone_and_buffers_stay_float(tmp_path):
    path, model = packed_net(tmp_path, include=["conv.*"])
    names = set(load_file(path))
    assert {"packed", "scales", "window", "norm.running_mean"} < names
    assert "lstm.weight_ih_l0" in names and "conv.weight" not in names
    inputs = torch.randn(2, 3, 9)
    assert torch.equal(
        load_packed_(net(seed=1), tmp_path)(inputs), model(inputs)
    )


def test_tied_parameters_are_stored_once(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Embedding(7, 5), torch.nn.Linear(5, 7)
        )
        model[1].weight = model[0].weight
        return model

    model, other = tied(0), tied(1)
    quantize_(model, 4)
    save_packed(model, tmp_path)
    load_packed_(other, tmp_path)
    tokens = torch.tensor([3, 1])
    assert torch.equal(other(tokens), model(tokens))
    assert other[1].weight is other[0].weight
    assert set(read_packed(tmp_path)[0]) == {"0.weight", "1.bias"}


def test_stored_integers_are_readable_without_a_model(tmp_path):
    _, model = packed_net(tmp_path, 3)
    quantized, floats = read_packed(tmp_path)
    assert set(quantized) == set(named_tensors(model))
    tensor = quantized["conv.weight"]
    assert tensor.bits == 3 and tensor.integers.abs().max() <= 3
    assert torch.equal(tensor.integers * tensor.alpha, model.conv.weight)
    assert set(floats) == {
        "window",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }


def test_the_same_weights_give_the_same_bytes(tmp_path):
    first, _ = packed_net(tmp_path / "a")
    second, _ = packed_net(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "model.safetensors",
        "quantization_config.json",
    ]


def test_the_file_is_the_plans_bytes_and_a_small_header(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    for block in range(16):  # 7 sublayers a block, as in the paper
        layers = [torch.nn.Conv1d(16, 32, 1, bias=False), torch.nn.PReLU()]
        layers += [torch.nn.LayerNorm(32), torch.nn.Conv1d(32, 32, 3)]
        layers += [torch.nn.PReLU(), torch.nn.LayerNorm(32)]
        layers += [torch.nn.Conv1d(32, 16, 1, bias=False)]
        model.add_module(f"tcn_{block}", torch.nn.Sequential(*layers))
    plan = quantize_(model, 2)
    assert len(plan.clusters) == 112
    size = save_packed(model, tmp_path).stat().st_size
    assert plan.bytes < size < plan.bytes + 5000


def test_readable_copy_tells_what_was_done(tmp_path):
    model = net()
    plan = quantize_(model, 4)
    save_packed(model, tmp_path, metadata={"corpus": "embedded"})
    text = (tmp_path / "quantization_config.json").read_text()
    config = json.loads(text)
    assert config["quant_method"] == "speechbrain_mpq"
    assert config["version"] == 1
    assert config["tensors"]["conv.weight"] == {"bits": 4, "shape": [6, 3, 3]}
    assert config["plan"] == plan.to_dict()
    assert config["metadata"] == {"corpus": "embedded"}


def test_saving_leaves_the_model_quantized(tmp_path):
    path, model = packed_net(tmp_path)
    inputs = torch.randn(1, 3, 4)
    expected = model(inputs)
    save_packed(model, tmp_path / "again")
    assert torch.equal(model(inputs), expected)


def test_a_full_precision_model_is_packed_as_it_is(tmp_path):
    model, other = net(), net(seed=1)
    save_packed(model, tmp_path)
    assert read_packed(tmp_path)[0] == {}
    load_packed_(other, tmp_path)
    inputs = torch.randn(1, 3, 4)
    assert torch.equal(other(inputs), model(inputs))


def test_slices_are_read_by_their_names_and_cost_little(tmp_path):
    _, model = packed_net(tmp_path / "rows", 3, rows=2)
    path, _ = packed_net(tmp_path / "whole", 3)
    quantized, _ = read_packed(tmp_path / "rows")
    names = [f"conv.weight[{i}:{i + 2}]" for i in (0, 2, 4)]
    assert set(names) < set(quantized) and "conv.weight" not in quantized
    pieces = [
        quantized[name].integers * quantized[name].alpha for name in names
    ]
    assert torch.equal(torch.cat(pieces), model.conv.weight)
    more = len(quantized) - len(read_packed(tmp_path / "whole")[0])
    size = (tmp_path / "rows" / path.name).stat().st_size
    # A scale, what the last byte leaves empty and a number in the header.
    assert size - path.stat().st_size <= more * (4 + 1 + 2) + 32


def test_more_than_ten_slices_come_back_in_order(tmp_path):
    def large(seed):
        torch.manual_seed(seed)
        return torch.nn.Linear(3, 130)

    model, other = large(0), large(1)
    clusters = {
        f".[{i}:{i + 10}]": ClusterBits(
            1 + i // 10, 30, [f"weight[{i}:{i + 10}]"]
        )
        for i in range(0, 130, 10)
    }
    plan = quantize_(model, BitPlan(clusters))
    assert plan.clusters == clusters
    save_packed(model, tmp_path)
    load_packed_(other, tmp_path)
    assert torch.equal(other.weight, model.weight)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, model = packed_net(tmp_path)
    content = path.read_bytes()
    shutil.copytree(tmp_path, tmp_path / "copy")

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        save_packed(model, tmp_path)
    assert path.read_bytes() == content
    assert not list(tmp_path.glob(".*.partial"))


def test_a_quantized_model_cannot_be_loaded_into(tmp_path):
    _, model = packed_net(tmp_path)
    with pytest.raises(ValueError, match="dequantize_"):
        load_packed_(model, tmp_path)


def refused(folder, model, match):
    """Loading fails with a message and leaves the model as it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PackedModelError, match=match):
        load_packed_(model, folder)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_any_flipped_byte_is_noticed(tmp_path):
    path, _ = packed_net(tmp_path)
    content = path.read_bytes()
    model = net(seed=1)
    header = int.from_bytes(content[:8], "little") + 8
    places = list(range(0, header, 41)) + list(range(header, len(content), 29))
    for place in places:
        broken = bytearray(content)
        broken[place] ^= 0x10
        path.write_bytes(broken)
        refused(tmp_path, model, "model.safetensors: .*; ")


@pytest.mark.parametrize("keep", [0, 5, 8, 300, 0.5, -1])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path, _ = packed_net(tmp_path)
    content = path.read_bytes()
    keep = int(keep * len(content)) if isinstance(keep, float) else keep
    path.write_bytes(content[:keep])
    refused(tmp_path, net(), "model.safetensors: damaged.*download")


def test_a_missing_file_is_named(tmp_path):
    refused(tmp_path, net(), "model.safetensors: no such file.*save_packed")


def test_another_architecture_is_refused(tmp_path):
    packed_net(tmp_path)
    refused(tmp_path, net(hidden=7), r"conv.*\(6,.*\(7,.*architecture")
    larger = net()
    larger.extra = torch.nn.Linear(2, 2)
    refused(tmp_path, larger, "lacks extra.bias, extra.weight")
    smaller = net()
    del smaller.gru
    refused(tmp_path, smaller, "adds gru.bias_hh_l0.*and 1 more")
    refused(tmp_path, net().double(), "torch.float32.*torch.float64")


def test_another_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"conv.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    refused(tmp_path, net(), "not a packed model.*save_packed")


@pytest.mark.parametrize(
    "bits, arguments, version",
    [
        (2, {}, 1),
        (8, {"granularity": "channel"}, 1),
        (1.6, {}, 2),
        (2, {"codebook": "midrise"}, 2),
        (2, {"rows": 3}, 2),
    ],
)
def test_old_readers_refuse_only_what_they_would_misread(
    tmp_path, bits, arguments, version
):
    path, _ = packed_net(tmp_path, bits, **arguments)
    assert f'"mpq_version":"{version}"'.encode() in path.read_bytes()
    text = (tmp_path / "quantization_config.json").read_text()
    assert json.loads(text)["version"] == version


def test_a_version_that_was_changed_is_noticed(tmp_path):
    path, _ = packed_net(tmp_path)
    content = path.read_bytes()
    wrong = content.replace(b'"mpq_version":"1"', b'"mpq_version":"2"')
    path.write_bytes(wrong)
    refused(tmp_path, net(), "damaged")


def test_a_later_format_is_refused(tmp_path):
    path, _ = packed_net(tmp_path)
    content = path.read_bytes()
    wrong = content.replace(b'"mpq_version":"1"', b'"mpq_version":"9"')
    path.write_bytes(wrong)
    refused(tmp_path, net(), "version '9' is not in .*; install")
