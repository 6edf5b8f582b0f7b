"""The published classifier of digits: whole, small, and integers only."""

import json
from pathlib import Path

import torch

from speechbrain_mpq import SpokenWordClassifier
from speechbrain_mpq.__main__ import main
from speechbrain_mpq.inference.verification import check_folder

FOLDER = Path(__file__).parents[3] / "pretrained/gru_digits"
DIGITS = "zero one two three four five six seven eight nine".split()


def test_folder_is_whole_and_small():
    assert check_folder(FOLDER) == []
    assert (FOLDER / "model.safetensors").stat().st_size < 12_000


def test_digits_of_many_bits():
    classifier = SpokenWordClassifier.from_pretrained(FOLDER)
    assert classifier.labels == DIGITS and classifier.sample_rate == 8000
    integer = classifier.network.integer
    assert len(set(integer.plan.values())) > 2
    for cell in integer.cells.values():
        tensors = cell.state_dict().values()
        assert not any(tensor.is_floating_point() for tensor in tensors)
    torch.manual_seed(0)
    scores = classifier.classify_batch(torch.randn(9, 8000) / 9)[0]
    assert scores.dtype == torch.int32 and len(scores.unique(dim=0)) == 9


def test_card_tells_what_was_measured():
    config = json.loads((FOLDER / "quantization_config.json").read_text())
    card = (FOLDER / "README.md").read_text()
    assert config["metadata"] == {"corpus": "fsdd", "seed": 1234}
    assert "license: cc-by-sa-4.0" in card and "accuracy %" in card


def test_inspect(capsys):
    assert main(["inspect", str(FOLDER)]) == 0
    text = capsys.readouterr().out
    assert "an integer GRU" in text and "l0.old_part" in text
    assert main(["inspect", str(FOLDER), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["labels"] == DIGITS
    assert content["bytes"] == (FOLDER / "model.safetensors").stat().st_size
    assert main(["verify", str(FOLDER)]) == 0
