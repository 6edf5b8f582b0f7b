"""What is wrong with a packed folder, one thing at a time."""

import hashlib
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from speechbrain_mpq.inference.engines import activations
from speechbrain_mpq.inference.engines.activations import read_ranges
from speechbrain_mpq.inference.engines.lowered import lower
from speechbrain_mpq.inference.exporting import write_exports
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.quantization.container import (
    read_container,
    write_container,
)

ROOT = Path(__file__).parents[3]

GOLDEN = Path(__file__).parents[2] / "data/packed/3"


CONFIG, YAML = "quantization_config.json", "hyperparams.yaml"


RANGES = "activations.json"
NAME = "mask_net.conv_in.weight[0:2]"


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden folder."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "folder"))


def test_a_sound_folder_has_no_problems(folder):
    assert check_folder(folder) == []


def edit(name, change):
    """A change of a JSON file in a folder."""

    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def write_ranges(folder, weights=None):
    """Activation ranges of nothing, for these weights or others."""
    content = (folder / "model.safetensors").read_bytes()
    ranges = {
        "version": 1,
        "weights_sha256": weights or hashlib.sha256(content).hexdigest(),
        "layers": {"x": {"scale": -1, "zero_point": 999}},
    }
    (folder / RANGES).write_text(json.dumps(ranges))


def nested(folder):
    """A module in a folder below."""
    (folder / "below").mkdir()
    return folder / "below" / "custom.py"


def pipe(path):
    """Something that nobody will ever write to, in a file's place."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def hook(folder):
    """What git runs when something is committed."""
    (folder / ".git" / "hooks").mkdir(parents=True)
    return folder / ".git" / "hooks" / "pre-commit"


def first_cluster(config):
    """Some cluster of the plan."""
    return next(iter(config["plan"]["clusters"].values()))


def test_what_git_and_the_hub_leave_is_tolerated(folder):
    (folder / ".gitattributes").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").touch()
    assert check_folder(folder) == []


def test_exports_are_tied_to_the_weights(folder):
    file = folder / "mask_network_weights.onnx"
    file.write_bytes(b"a model")
    write_exports(folder, [file])
    assert check_folder(folder) == []
    file.write_bytes(b"another")
    (problem,) = check_folder(folder)
    assert "was changed since the export" in problem
    file.unlink()
    assert "gone" in check_folder(folder)[0]
    file.write_bytes(b"a model")
    content = json.loads((folder / "exports.json").read_text())
    content["sources"]["model.safetensors"] = "0"
    (folder / "exports.json").write_text(json.dumps(content))
    assert "of other weights" in check_folder(folder)[0]
    write_exports(folder, [file])
    assert check_folder(folder) == []


def test_ranges_of_nothing_though_sealed(tmp_path):
    folder = Path(
        shutil.copytree("pretrained/separator_mini_4bit", tmp_path / "folder")
    )
    assert check_folder(folder) == []
    network = lower(folder)
    ranges = {
        name: replace(unit, scale=np.float32(1000 * unit.scale))
        for name, unit in read_ranges(folder, network).items()
    }
    activations.write_ranges(folder, ranges, 1.0)
    (problem,) = check_folder(folder)
    assert "dB from the network without rounding" in problem


def test_a_model_that_puts_out_no_numbers(folder):
    """Its checksum is right: somebody has packed what had diverged."""
    path = folder / "model.safetensors"
    container = read_container(path)
    tensors = {**container.tensors}
    tensors["scales"] = torch.full_like(tensors["scales"], 1e30)
    write_container(path, tensors, container.config, "3")
    (problem,) = check_folder(folder)
    assert "puts out NaN or infinity" in problem


@pytest.mark.parametrize("size", [1e8, 1e30])
def test_weights_that_nobody_has_trained(folder, size):
    path = folder / "model.safetensors"
    container = read_container(path)
    tensors = {**container.tensors}
    name = "mask_net.conv_out.bias"
    tensors[name] = torch.full_like(tensors[name], size)
    write_container(path, tensors, container.config, "3")
    (problem,) = check_folder(folder)
    assert f"{name} has values up to {size:.3g}" in problem


def pickled(path, before=b""):
    """A pickle under another name."""
    path.write_bytes(before + pickle.dumps({"a": os.getcwd}))


def moved(folder, name):
    """A file that is a link to one elsewhere, in its place."""
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def hub(folder):
    """Where the hub's client keeps its notes."""
    path = folder / ".cache/huggingface"
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    "change, match",
    [
        (edit(CONFIG, lambda c: c.update(version=2)), "'version' is not what"),
        (
            edit(CONFIG, lambda c: c["tensors"][NAME].update(bits=8)),
            "'tensors' is not what",
        ),
        (
            edit(CONFIG, lambda c: c["architecture"].clear()),
            "'architecture' is not what",
        ),
        (
            edit(CONFIG, lambda c: first_cluster(c).update(bits=16)),
            "'plan' has other bits",
        ),
        (edit(CONFIG, lambda c: c.update(plan=[1])), "'plan' is none"),
        (
            edit(CONFIG, lambda c: c["plan"].update(average_bits=2.0)),
            "'plan' says 'average_bits' otherwise",
        ),
        (
            edit(CONFIG, lambda c: c["plan"].update(bytes=9)),
            "'plan' says 'bytes' otherwise",
        ),
        (
            edit(CONFIG, lambda c: c["plan"].update(ratio=99.0)),
            "'plan' says 'ratio' otherwise",
        ),
        (
            edit(CONFIG, lambda c: first_cluster(c).update(parameters=9)),
            "'plan' counts other parameters",
        ),
        (
            edit(
                CONFIG,
                lambda c: c["plan"].update(rest_parameters=0, bytes=431 - 88),
            ),
            "0 parameters stay in float, which are 22",
        ),
        (lambda f: (f / CONFIG).write_text("[]"), "no JSON object"),
        (lambda f: (f / CONFIG).write_text('{"a":1,"a":1}'), "twice"),
        (lambda f: (f / CONFIG).unlink(), "not readable"),
        (lambda f: (f / YAML).unlink(), "not readable"),
        (lambda f: (f / YAML).write_text("a: !new:os.x"), "from_hparams"),
        (lambda f: (f / "README.md").unlink(), "no model card"),
        (lambda f: (f / "sample.flac").write_bytes(b"RIFF"), "no FLAC"),
        (lambda f: (f / "README.md").write_bytes(b"a\0b"), "no text"),
        (lambda f: (f / "custom.py").touch(), "can execute code"),
        (lambda f: (f / "weights.joblib").touch(), "can execute code"),
        (lambda f: (f / "notes.txt").touch(), "does not belong here"),
        (lambda f: (f / "data").write_bytes(b""), "does not belong here"),
        (lambda f: (f / "x").symlink_to("/tmp"), "a link out of the folder"),
        (lambda f: moved(f, "README.md"), "a link out of the folder"),
        (lambda f: moved(f, "model.safetensors"), "a link out of the folder"),
        (lambda f: (f / "sample.flac").write_bytes(b"fLaC"), "no FLAC"),
        (lambda f: pickled(f / "sample.flac", b"fLaC"), "no FLAC"),
        (lambda f: pickled(f / "train_log.txt"), "no text"),
        (lambda f: pickled(f / ".gitignore"), "no text"),
        (lambda f: pipe(f / "train_log.txt"), "no text"),
        (lambda f: pickled(f / ".in_use"), "can execute code"),
        (lambda f: pickled(hub(f) / "a"), "can execute code"),
        (lambda f: (hub(f) / "a").write_text("#!/bin/sh"), "can execute code"),
        (lambda f: (f / "mask_network.bin").touch(), "nothing tells which"),
        (lambda f: (f / "exports.json").write_text("["), "not readable"),
        (lambda f: (f / RANGES).write_text("{}"), "unusable"),
        (lambda f: write_ranges(f, weights="00"), "made for another"),
        (lambda f: write_ranges(f), "other layers than the model's"),
        (lambda f: nested(f).touch(), "can execute code"),
        (lambda f: (f / "model.safetensors").unlink(), "no such file"),
        (lambda f: pipe(f / "model.safetensors"), "no such file"),
        (lambda f: hook(f).touch(), "can execute code"),
    ],
)
def test_what_is_wrong_is_told(folder, change, match):
    change(folder)
    (problem,) = check_folder(folder)
    assert match in problem and str(folder) in problem


@pytest.mark.parametrize(
    "folder",
    sorted(
        path.parent
        for path in (ROOT / "pretrained").glob("*/model.safetensors")
        if path.stat().st_size < 2**22  # large ones take seconds
    ),
    ids=lambda folder: folder.name,
)
def test_what_is_shipped_is_whole(folder):
    assert check_folder(folder) == []
