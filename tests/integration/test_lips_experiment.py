"""The command with lips at tiny size: train, quantize, score."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import ROOMS, ROOT, TINY, call, run

from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.packing import read_packed, save_packed

for needed in ("pesq", "cv2"):
    pytest.importorskip(needed)

SIZES = {
    "mixtures": {"train": 8, "valid": 2, "test": 4},
    "utterances": {"train": 8, "valid": 8, "test": 8},
    "number_of_epochs": 1,
    "against": "[]",
    "separator_file": ROOT / "tests/data/separator_av_tiny.yaml",
}


def experiment(folder, hparams, **options):
    """Run an experiment; its folder of results."""
    run(folder, hparams, **SIZES, **options)
    return next((folder / "results").glob(f"{Path(hparams).stem}*/1234"))


@pytest.fixture
def audio(tmp_path):
    """A packed audio-only separator."""
    separator = build_separator(TINY)
    fold_norms_(separator)
    save_packed(separator, tmp_path / "audio")
    shutil.copy(TINY, tmp_path / "audio/hyperparams.yaml")
    return tmp_path / "audio"


def compare(folder, packed, audio):
    """Lines that the comparison of lips prints, by their first word."""
    overrides = {"data_folder": str(folder / "data"), "rooms": ROOMS}
    overrides |= {"mixtures": SIZES["mixtures"], "workers": 1}
    line = [packed, "--overrides", overrides, "--audio_only", audio]
    line += ["--only", "own lips", "perfect lips", "no lips"]  # for time
    line += ["--camera", "True"]
    printed = call("benchmarks/lips.py", *line, LOOKS=6)
    return {row[:20].strip(): row for row in printed.splitlines()}


def test_train_quantize_and_compare(folder, audio):
    trained = experiment(folder, "pretrain_av.yaml", pretrained_separator=audio)
    options = {
        "pretrained_separator": trained / "packed",
        "estimator": "!name:speechbrain_mpq.PostTraining",
    }
    kl = experiment(folder, "kl_4bit.yaml", **options)
    plan = json.loads((kl / "plan.json").read_text())
    clusters = plan["clusters"]
    assert "mask_net.fusion.views" in clusters
    assert "mask_net.visual.front_end.conv_3d" in clusters
    assert plan["average_bits"] < 4.05  # whole bytes of tiny tensors
    quantized, _ = read_packed(kl / "packed")
    assert "mask_net.visual.tcn.0.conv_1x1_in.weight" in quantized
    rows = compare(folder, kl / "packed", audio)
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
