"""The recipes of the edge models at tiny size, through their own scripts."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from speechbrain_mpq.lobes.models.nsnet2 import EarlyExitNsNet2

pytest.importorskip("espeakng_loader")
pytest.importorskip("pesq")

ROOT = Path(__file__).parents[2]
UTTERANCES = "{train: 16, valid: 4, test: 2}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of a tiny corpus; the first run makes it."""
    return tmp_path_factory.mktemp("embedded")


def load_script(recipe, monkeypatch):
    """A recipe's train.py as a module."""
    folder = ROOT / "recipes/Embedded" / recipe
    monkeypatch.syspath_prepend(folder)
    name = f"{recipe}_train"
    spec = importlib.util.spec_from_file_location(name, folder / "train.py")
    module = importlib.util.module_from_spec(spec)
    # the experiment's folder copies the file of this module
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(corpus, monkeypatch):
    """Runs a recipe's script as its command line would."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(ROOT)

    def run_recipe(recipe, output, **flags):
        script = load_script(recipe, monkeypatch)
        hparams = Path(script.__file__).parent / "hparams/train.yaml"
        flags = {"data_folder": corpus, "utterances": UTTERANCES, **flags}
        arguments = [str(hparams), "--device=cpu", "--noprogressbar"]
        arguments.append(f"--output_folder={output}")
        for flag, value in flags.items():
            arguments += [f"--{flag}", str(value)]
        script.main(arguments)
        return json.loads((output / "metrics.json").read_text())

    yield run_recipe
    torch.set_num_threads(threads)


def last_loss(output, epoch):
    """Training loss of an epoch."""
    log = (output / "train_log.txt").read_text().splitlines()
    line = next(line for line in log if line.startswith(f"epoch: {epoch},"))
    return float(line.split("train loss: ")[1].split(",")[0].split(" ")[0])


def test_enhancement(run, tmp_path):
    metrics = run(
        "Enhancement",
        tmp_path,
        number_of_epochs=2,
        batch_size=8,
        seconds=0.5,
        side=8,
        exits="[0, 1, 5]",
        mac_shares="[0.5]",
        stream_utterances=1,
    )
    assert last_loss(tmp_path, 2) < last_loss(tmp_path, 1)
    names = ["noisy", "exit 0", "exit 1", "exit 5"]
    assert list(metrics["test"]) == list(metrics["test_unseen"]) == names
    macs = [metrics["test"][name]["macs"] for name in names[1:]]
    assert macs == sorted(macs)
    streams = metrics["streams"]
    assert set(streams) == {
        *("fixed exit 0", "fixed exit 1", "fixed exit 5"),
        *("listening, 50% of the MACs", "chance, 50% of the MACs"),
    }
    assert macs[0] <= streams["listening, 50% of the MACs"]["macs"] <= macs[2]


def test_exits_one_after_the_other(monkeypatch):
    network = EarlyExitNsNet2(bins=9, side=4)
    hparams = {"network": network, "train_exits": [3], "start_from": None}
    load_script("Enhancement", monkeypatch).begin(hparams)
    frozen = {p for part in network.parts_of(1) for p in part.parameters()}
    for parameter in network.parameters():
        assert parameter.requires_grad == (parameter not in frozen)


def test_speech_quality(run, tmp_path):
    flags = {
        "clips": "{train: 8, valid: 3, test: 3, test_unseen: 3}",
        "number_of_epochs": 2,
        "lr": 0.003,
        "batch_size": 4,
        "dropout": 0.0,
    }
    plain = run("SpeechQuality", tmp_path / "float", **flags)
    assert last_loss(tmp_path / "float", 2) < last_loss(tmp_path / "float", 1)
    assert "bits" not in plain
    assert round(plain["memory"]["all maps"][2], 1) == 25.8
    flags["start_from"] = tmp_path / "float"
    binary = run("SpeechQuality", tmp_path / "bits", binary_maps=True, **flags)
    assert binary["bits"]["same_scores"]
    assert binary["bits"]["bytes"] < 4 * 45_697
    predictions = tmp_path / "bits/predictions_test_unseen.json"
    assert len(json.loads(predictions.read_text())) == 3
