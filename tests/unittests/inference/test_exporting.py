"""From recordings to a folder that an engine runs, by the command."""

import json
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq import quantize_
from speechbrain_mpq.__main__ import main
from speechbrain_mpq.inference.engines.activations import (
    read_ranges,
    write_ranges,
)
from speechbrain_mpq.inference.engines.engine import import_engine
from speechbrain_mpq.inference.engines.lowered import decibels, lower
from speechbrain_mpq.inference.exporting import (
    export,
    export_problems,
    write_exports,
)
from speechbrain_mpq.inference.folder import save_separator
from speechbrain_mpq.inference.separation import QuantizedSeparator
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.lobes.models.separator import Separator
from speechbrain_mpq.lobes.models.spatial_features import SpatialFeatures
from speechbrain_mpq.lobes.models.tcn import fold_norms_

SECONDS = 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed folder, and a calibration manifest of two recordings."""
    torch.manual_seed(0)
    size = {"channels": 8, "hidden": 16, "blocks": 1, "layers": 2}
    separator = Separator(SpatialFeatures(), **size).eval()
    fold_norms_(separator)
    quantize_(separator, 4)
    folder = save_separator(separator, tmp_path_factory.mktemp("packed"))
    audio = tmp_path_factory.mktemp("audio")
    manifest = {}
    for number in range(2):
        noise = np.random.default_rng(number).standard_normal((16000, 15))
        soundfile.write(audio / f"{number}.wav", 0.1 * noise, 16000)
        manifest[f"mix_{number}"] = {"wav": f"{number}.wav", "doa": 60}
    (audio / "manifest.json").write_text(json.dumps(manifest))
    return folder, audio / "manifest.json"


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_exported_folder_separates_like_pytorch(
    engine, packed, tmp_path, capsys
):
    pytest.importorskip(
        {"openvino": "openvino", "onnx": "onnxruntime"}[engine],
        reason=f"the extra {engine} is not installed",
    )
    folder, manifest = packed
    out = str(tmp_path / "fast")
    command = ["export", str(folder), "--engine", engine, "-o", out]
    assert main([*command, "--calibration", str(manifest)]) == 0
    assert "calibrated on 2.0 s" in capsys.readouterr().out
    assert main(command[:2] + ["-o", out, "--engine", engine]) == 1  # no ranges
    assert "--calibration" in capsys.readouterr().err
    assert main(["export", out, "--engine", engine]) == 0  # has them
    mixture = torch.randn(1, SECONDS * 16000, 7) / 10
    doa = torch.tensor([60.0])
    wanted = QuantizedSeparator.from_pretrained(folder)
    given = QuantizedSeparator.from_pretrained(out, engine=engine)
    wanted = wanted.separate_batch(mixture, doa)
    assert decibels(wanted, given.separate_batch(mixture, doa)) > 20
    left = {path.name for path in (tmp_path / "fast").iterdir()}
    assert {"activations.json", "exports.json"} < left
    assert not [name for name in left if name.startswith(".")]
    assert check_folder(out) == []
    ranges = tmp_path / "fast" / "activations.json"
    write_ranges(out, read_ranges(out, lower(out)), 9.0)  # measured again
    (problem,) = check_folder(out)
    assert "made of other weights or activation ranges" in problem
    assert main(["export", out, "--engine", engine]) == 0
    assert check_folder(out) == [] and ranges.exists()


def test_a_full_disk_is_told_by_the_file(packed, tmp_path, monkeypatch, capsys):
    engine = pytest.importorskip("openvino", reason="openvino is missing")

    def full(*arguments, **options):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(engine, "save_model", full)
    folder, manifest = packed
    command = ["export", str(folder), "-o", str(tmp_path / "out")]
    assert main([*command, "--calibration", str(manifest)]) == 1
    assert "mask_network.xml cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("files", [None, [], "x"])
def test_a_list_of_exports_that_is_none_is_written_anew(
    packed, tmp_path, files
):
    folder = tmp_path / "out"
    shutil.copytree(packed[0], folder)
    network = folder / "mask_network.onnx"
    network.write_bytes(b"network")
    path = write_exports(folder, [network])
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "files": files}))
    assert "no objects" in export_problems(folder)[0]
    write_exports(folder, [network])
    assert export_problems(folder) == []


def test_silence_calibrates_nothing(packed, tmp_path, capsys):
    pytest.importorskip("openvino", reason="the extra openvino is missing")
    folder, _ = packed
    still = np.full((16000, 15), 0.25)  # a constant is silence too
    soundfile.write(tmp_path / "still.wav", still, 16000)
    manifest = tmp_path / "manifest.json"
    manifest.write_text('{"a": {"wav": "still.wav", "doa": 60}}', "utf-8-sig")
    command = ["export", str(folder), "-o", str(tmp_path / "out")]
    assert main([*command, "--calibration", str(manifest)]) == 1
    said = capsys.readouterr().err
    assert "still.wav: silent for the first 1.0 s; calibrate" in said
    assert not (tmp_path / "out").exists()


def test_long_file_through_an_engine(packed, tmp_path):
    pytest.importorskip("openvino", reason="the extra openvino is missing")
    folder, manifest = packed
    out = str(tmp_path / "fast")
    arguments = ["--calibration", str(manifest), "-o", out]
    assert main(["export", str(folder), *arguments]) == 0
    model = QuantizedSeparator.from_pretrained(out, engine="openvino")
    path = manifest.parent / "0.wav"
    mixture, _ = soundfile.read(path, dtype="float32")
    used = [number - 1 for number in model.microphones]
    mixture = torch.from_numpy(mixture[None, :, used])
    whole = model.separate_batch(mixture, torch.tensor([60.0]))
    model.separate_file(
        path, doa=60.0, out=tmp_path / "out.wav", chunk_seconds=0.3
    )
    pieces, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert decibels(whole[0], torch.from_numpy(pieces)) > 40


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_missing_extra_names_the_pip_command(engine, monkeypatch):
    for name in list(sys.modules):
        if name.startswith(("speechbrain_mpq.inference.engines.o",)):
            monkeypatch.delitem(sys.modules, name)
    for name in ("openvino", "onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install"):
        import_engine(engine)


def test_what_is_not_exported_is_told_before_its_place(tmp_path):
    """A language model runs in ONNX Runtime without an export."""
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="a TiedRNNLM, which is not exported"):
        export("pretrained/lm_sotu_2bit", tmp_path / "no" / "x", "onnx")
    assert not list(tmp_path.iterdir())
