"""The command with lips at tiny size: train, quantize, score."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import ROOT, finished

from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.packing import read_packed, save_packed

for needed in ("espeakng_loader", "pyroomacoustics", "pesq", "cv2"):
    pytest.importorskip(needed)

TINY = {
    "utterances": "{train: 8, valid: 8, test: 8}",
    "rooms": "{train: 25, valid: 25, test: 25}",
    "mixtures": "{train: 8, valid: 2, test: 4}",
    "number_of_epochs": 1,
    "calibration_mixtures": 2,
    "chunk_seconds": 1.0,
    "batch_size": 4,
    "examples": 0,
    "workers": 1,
    "against": "[]",
    "separator_file": ROOT / "tests/data/separator_av_tiny.yaml",
}


def run(line):
    """Run a command of the repository; its output is returned."""
    return finished([sys.executable, *line])


def experiment(folder, hparams, **options):
    """Run an experiment; its folder of results."""
    options = {
        **TINY,
        "data_folder": folder / "data",
        "results_folder": folder / "results",
        **options,
    }
    line = ["train.py", f"hparams/{hparams}", "--device=cpu"]
    run(line + [part for k, v in options.items() for part in (f"--{k}", v)])
    return next((folder / "results").glob(f"{Path(hparams).stem}*/1234"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a packed audio-only separator in it."""
    folder = tmp_path_factory.mktemp("lips")
    file = ROOT / "tests/data/separator_tiny.yaml"
    separator = build_separator(file)
    fold_norms_(separator)
    save_packed(separator, folder / "audio")
    shutil.copy(file, folder / "audio/hyperparams.yaml")
    return folder


def compare(folder, packed, monkeypatch, capsys):
    """Lines that the comparison of lips prints, by their first word."""
    path = ROOT / "benchmarks/lips.py"
    spec = importlib.util.spec_from_file_location("lips_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = f"data_folder: {folder / 'data'}\n"
    sizes = f"rooms: {TINY['rooms']}\nmixtures: {TINY['mixtures']}\nworkers: 1"
    line = [str(packed), "--overrides", data + sizes]
    line += ["--audio_only", str(folder / "audio")]
    line += ["--only", "own lips", "perfect lips", "no lips"]  # for time
    line += ["--camera", "True"]
    monkeypatch.setattr(sys, "argv", ["lips.py", *line])
    monkeypatch.chdir(ROOT)
    capsys.readouterr()
    module.main()
    printed = capsys.readouterr().out
    return {row[:20].strip(): row for row in printed.splitlines()}


def test_train_quantize_and_compare(folder, monkeypatch, capsys):
    trained = experiment(
        folder, "pretrain_av.yaml", pretrained_separator=folder / "audio"
    )
    kl = experiment(
        folder,
        "kl_4bit.yaml",
        pretrained_separator=trained / "packed",
        number_of_epochs=0,
        estimator="!name:speechbrain_mpq.PostTraining",
    )
    plan = json.loads((kl / "plan.json").read_text())
    clusters = plan["clusters"]
    assert "mask_net.fusion.views" in clusters
    assert "mask_net.visual.front_end.conv_3d" in clusters
    assert plan["average_bits"] < 4.05  # whole bytes of tiny tensors
    quantized, _ = read_packed(kl / "packed")
    assert "mask_net.visual.tcn.0.conv_1x1_in.weight" in quantized
    rows = compare(folder, kl / "packed", monkeypatch, capsys)
    assert {"audio only", "own lips", "perfect lips", "no lips"} <= set(rows)
    # Panorama, faces, track, direction and lips, separation
    found = next(row for row in rows.values() if row.startswith("Camera: "))
    assert int(found.split()[1]) >= 3  # of 4 targets
    assert "through the camera" in rows
    shown = ("own lips", "perfect lips", "no lips")
    assert len({rows[name][20:] for name in shown}) > 1  # pictures matter
    roles = ("target", "interferer", "nobody")
    faces = [row.split() for row in rows.values() if row.startswith(roles)]
    assert sum(int(row[1]) for row in faces) == 4
