"""The recipe with the separator as front end, at tiny size."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.packing import read_packed, save_packed

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/Embedded/ASR/front_end"
TINY = ROOT / "tests/data/separator_tiny.yaml"
COUNTS = {"train": 4, "valid": 4, "test": 4}
OPTIONS = {
    "skip_prep": True,
    "mixtures": COUNTS,
    "rooms": dict.fromkeys(COUNTS, 1),
    "batch_size": 2,
    "warmup_steps": 0,
    "model": "{channels: 8}",
}


@pytest.fixture(scope="module")
def recipe():
    """The recipe's script, which is in no package."""
    path = RECIPE / "train.py"
    spec = importlib.util.spec_from_file_location("front_end_train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_data(folder):
    """Noise for voices, and one room with directions of every bucket."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        manifest = {}
        for index in range(count):
            wav = folder / f"{split}_{index}.wav"
            seconds = 0.5 + 0.1 * index
            voice = rng.standard_normal(int(16000 * seconds))
            soundfile.write(wav, 0.1 * voice, 16000)
            manifest[wav.stem] = {
                "wav": str(wav),
                "length": seconds,
                "words": "go on",
                "speaker": str(index),
            }
        path = folder / f"{split}_speech.json"
        path.write_text(json.dumps(manifest))
        doa = np.array([10.0, 20.0, 50.0, 110.0, 175.0])
        rirs = np.zeros((5, 2, 40), np.float16)
        rirs[:, 0, 8] = rirs[np.arange(5), 1, [2, 3, 5, 12, 15]] = 1
        room = folder / "rooms" / split / "00000.npz"
        room.parent.mkdir(parents=True)
        np.savez(room, rirs_0=rirs, doa_0=doa, info_0=np.ones(8))


def write_models(folder):
    """A separator and a recognizer as they are published, untrained."""
    torch.manual_seed(0)
    separator = build_separator(TINY)
    fold_norms_(separator)
    save_packed(separator, folder / "separator")
    shutil.copy(TINY, folder / "separator/hyperparams.yaml")
    with open(
        ROOT / "recipes/Embedded/ASR/CTC/hparams/inference.yaml",
        encoding="utf-8",
    ) as source:
        model = load_hyperpyyaml(source, {"channels": 8})
    (folder / "recognizer").mkdir()
    torch.save(model["asr"].state_dict(), folder / "recognizer/asr.ckpt")
    tokenizer = ROOT / "pretrained/asr_mini/tokenizer.ckpt"
    shutil.copy(tokenizer, folder / "recognizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("front_end")
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "excepthook", sys.excepthook)  # SpeechBrain changes it
    write_data(folder)
    write_models(folder)
    yield folder
    patch.undo()


def run(recipe, folder, file, name, **options):
    """Run the recipe; its output folder, and weights before and after."""
    output = folder / name
    options = {
        **OPTIONS,
        "data_folder": folder,
        "separator_folder": folder / "separator",
        "recognizer_folder": folder / "recognizer",
        "output_folder": output,
        **options,
    }
    line = [str(RECIPE / "hparams" / file), "--device=cpu", "--noprogressbar"]
    for key, value in options.items():
        line += [f"--{key}", str(value)]
    recipe.main(line)
    return output


def moved(output, folder):
    """Whether training has moved the separator and the recognizer."""
    checkpoint = next((output / "save").glob("CKPT*"))
    separator = torch.load(checkpoint / "front_end.ckpt")
    _, before = read_packed(folder / "separator")
    changed = [
        not torch.equal(value, separator[f"separator.{name}"])
        for name, value in before.items()
    ]
    asr = torch.load(checkpoint / "asr.ckpt")
    start = torch.load(folder / "recognizer/asr.ckpt")
    heard = [not torch.equal(asr[name], value) for name, value in start.items()]
    return any(changed), any(heard)


def test_joint_training_moves_both(recipe, folder):
    output = run(recipe, folder, "train.yaml", "joint")
    assert moved(output, folder) == (True, True)
    metrics = json.loads((output / "metrics.json").read_text())
    assert [b["n"] for b in metrics["buckets"].values()] == [1, 1, 1, 1]
    assert {item["reference"] for item in metrics["items"]} == {"go on"}
    assert metrics["average"]["wer"] >= 0
    log = (output / "train_log.txt").read_text()
    assert "epoch: 1" in log and "test wer" in log


def test_frozen_front_end_stays(recipe, folder):
    options = {"freeze_front_end": True, "si_snr_weight": 0}
    output = run(recipe, folder, "train.yaml", "back_end", **options)
    assert moved(output, folder) == (False, True)


def test_no_epochs_train_nothing(recipe, folder):
    output = run(recipe, folder, "train.yaml", "clean", number_of_epochs=0)
    assert not list((output / "save").glob("CKPT*"))
    assert (output / "metrics.json").exists()


def test_four_bits_for_both_together(recipe, folder):
    """Six lines of YAML: bits chosen, trained, packed."""
    options = {"choose_bits": "{batches: 1, candidate_bits: [2, 4, 8]}"}
    output = run(recipe, folder, "train_4bit.yaml", "joint_4bit", **options)
    quantized, floats = read_packed(output / "packed")
    homes = {name.split(".")[0] for name in quantized}
    assert homes == {"front_end", "asr"}
    metrics = json.loads((output / "metrics.json").read_text())
    assert 2 <= metrics["average_bits"] <= 4.01
    stored = (output / "packed/model.safetensors").stat().st_size
    assert metrics["model_bytes"] == stored


def test_the_quantized_file_differs_by_its_block():
    plain, quantized = (
        (RECIPE / "hparams" / name).read_text().splitlines()
        for name in ("train.yaml", "train_4bit.yaml")
    )
    added = [line for line in quantized if line not in plain]
    taken = [line for line in plain if line not in quantized]
    settings = [line for line in added if line and not line.startswith("#")]
    assert len(taken) == 2  # the command, and the output folder
    assert len(settings) == 1 + 6
