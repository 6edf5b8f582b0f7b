"""Packed files whose checksum fits and whose configuration lies."""

import pytest
import torch
from helpers import forge, refused_file

from speechbrain_mpq.quantization import header
from speechbrain_mpq.quantization.container import (
    read_container,
    write_container,
)
from speechbrain_mpq.quantization.packing import read_model, save_packed
from speechbrain_mpq.quantization.quant_api import quantize_


def put(*keys, value):
    """A change of the configuration."""

    def change(config, tensors):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


def scale(value):
    """A change of a scale."""

    def change(config, tensors):
        tensors["scales"][1] = value

    return change


@pytest.mark.parametrize(
    "change, match",
    [
        (put("bits", 0, value=0), "bits must be an integer from 1 to 16"),
        (put("bits", 0, value=17), "bits must be an integer from 1 to 16"),
        (put("bits", 0, value=True), "bits must be an integer from 1 to 16"),
        (put("bits", 0, value=4.0), "bits must be an integer from 1 to 16"),
        (put("bits", 0, value="4"), "bits must be an integer from 1 to 16"),
        (put("bits", 0, value=[4]), "1 slices"),
        (put("bits", 0, value=[4] * 9), "9 slices"),
        (put("bits", 0, value=9), "integers"),
        (put("bits", value=[4]), "one entry of bits for every shape"),
        (put("bits", value={}), "one entry of bits for every shape"),
        (put("granularity", value="block"), "granularity must be one of"),
        (put("granularity", value="channel"), "no integers or scales left"),
        (put("codebook", value="log"), "codebook must be one of"),
        (put("shapes", "0", "weight", value=[3, 2**40]), "no integers"),
        (put("shapes", "0", "weight", value=[2**60]), "shape that is none"),
        (put("shapes", "0", "weight", value=[3, -5]), "shape that is none"),
        (put("shapes", "0", "weight", value=[3, 4]), "integers"),
        (put("shapes", "0", "weight", value=7), "shape that is none"),
        (put("shapes", "0", "weight", value={}), "branch without tensors"),
        (put("shapes", "0", "../x", value=[1]), "bits|no part of a name"),
        (put("shapes", value={"a": {"..": [3], "b": [3], "c": [3]}}), "name"),
        (put("shapes", value={"a/a/b": [3]}), "described twice"),
        (put("shapes", value={"a\\b": [1], "c": [1], "d": [1]}), "no name"),
        (put("shapes", value={"a[0:2]": [1], "c": [1], "d": [1]}), "no name"),
        (put("shapes", value=[]), "no JSON object"),
        (put("tensors", value={}), "not what format 3 has"),
        (scale(float("nan")), "scales must be finite"),
        (scale(float("inf")), "scales must be finite"),
        (scale(-0.5), "scales must be finite and not negative"),
        (scale(1e38), "scales must be finite"),  # times 7 it is not
        (
            lambda c, t: t.update({"0.weight": torch.ones(3, 5)}),
            "0.weight is stored twice",
        ),
        (lambda c, t: t.update(scales=t["scales"].double()), "not float32"),
        (lambda c, t: t.update(packed=t["packed"].char()), "not uint8"),
        (lambda c, t: t.update(packed=t["packed"][None]), "no vector"),
        (lambda c, t: t.update(packed=t["packed"][:-1]), "no integers"),
        (lambda c, t: t.update({"../a": torch.ones(1)}), "no name"),
        (lambda c, t: t.pop("scales"), "inconsistent"),
        (lambda c, t: t["packed"].fill_(0), "not in the 4-bit codebook"),
    ],
)
def test_forged_configurations_are_refused(tmp_path, change, match):
    forge(tmp_path / "f", lambda config, tensors: None)
    assert len(read_model(tmp_path / "f").quantized) == 3
    forge(tmp_path / "f", change)
    refused_file(tmp_path / "f", match)


def test_a_short_tree_that_names_very_many_tensors(tmp_path):
    def bomb(config, tensors):
        tree = [1]
        for _ in range(40):
            tree = {"/".join("abcdefghij"): tree}
        config["shapes"] = tree

    forge(tmp_path / "f", bomb)
    refused_file(tmp_path / "f", "one entry of bits for every shape")

    def hollow(config, tensors):
        tree = {}
        for _ in range(40):
            tree = {"/".join("abcdefghij"): tree}
        config["shapes"] = tree

    forge(tmp_path / "f", hollow)
    refused_file(tmp_path / "f", "branch without tensors")


def test_unused_bits_of_a_last_byte_must_be_zero(tmp_path):
    """One model, one file: nothing can hide there."""

    def change(config, tensors):
        tensors["packed"][-1] |= 0x80

    def sizes(config, tensors):
        config["bits"] = [[4, 4, 4]] * 3  # three slices have three scales

    forge(tmp_path / "f", sizes)
    refused_file(tmp_path / "f", "scales left|slices|integers")
    model = torch.nn.Linear(3, 1, bias=False)
    quantize_(model, 3)  # 9 bits in two bytes
    path = save_packed(model, tmp_path)
    container = read_container(path)
    change({}, container.tensors)
    write_container(path, container.tensors, container.config, "1")
    refused_file(path, "a last byte with more than the last integers")


def test_a_long_name_that_comes_again_very_often(tmp_path, monkeypatch):
    def bomb(config, tensors):
        names = "/".join(f"{i:x}" for i in range(2000))
        config.update(shapes={"n" * 990: {names: [0]}}, bits=[4] * 2000)
        tensors.update(packed=tensors["packed"][:0], scales=torch.zeros(2000))

    forge(tmp_path / "f", bomb)
    assert (tmp_path / "f").stat().st_size < 2**15
    assert len(read_model(tmp_path / "f").quantized) == 2000
    assert header.MAX_NAMED <= 2**27
    monkeypatch.setattr(header, "MAX_NAMED", 2**20)
    refused_file(tmp_path / "f", "more names than a model has")
