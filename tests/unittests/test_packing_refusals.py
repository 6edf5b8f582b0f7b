"""Packed models that cannot be loaded, and models that they do not fit."""

import copy
import json

import pytest
import torch
from packed_modules import net, packed

from speechbrain_mpq.quantization.container import PackedModelError
from speechbrain_mpq.quantization.packing import load_packed_


def test_a_quantized_model_cannot_be_loaded_into(tmp_path):
    _, model = packed(tmp_path)
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
    path, _ = packed(tmp_path)
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
    path, _ = packed(tmp_path)
    content = path.read_bytes()
    keep = int(keep * len(content)) if isinstance(keep, float) else keep
    path.write_bytes(content[:keep])
    refused(tmp_path, net(), "model.safetensors: damaged.*download")


def test_a_missing_file_is_named(tmp_path):
    refused(tmp_path, net(), "model.safetensors: no such file.*save_packed")


def test_another_architecture_is_refused(tmp_path):
    packed(tmp_path)
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
    path, _ = packed(tmp_path, bits, **arguments)
    assert f'"mpq_version":"{version}"'.encode() in path.read_bytes()
    text = (tmp_path / "quantization_config.json").read_text()
    assert json.loads(text)["version"] == version


def test_a_version_that_was_changed_is_noticed(tmp_path):
    path, _ = packed(tmp_path)
    content = path.read_bytes()
    wrong = content.replace(b'"mpq_version":"1"', b'"mpq_version":"2"')
    path.write_bytes(wrong)
    refused(tmp_path, net(), "damaged")


def test_a_later_format_is_refused(tmp_path):
    path, _ = packed(tmp_path)
    content = path.read_bytes()
    wrong = content.replace(b'"mpq_version":"1"', b'"mpq_version":"9"')
    path.write_bytes(wrong)
    refused(tmp_path, net(), "version '9' is not in .*; install")
