"""Splits and mixtures of the recipes for the embedded corpus."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "recipes/Embedded"


def script(folder):
    """A recipe's train.py as a module."""
    path = FOLDER / folder / "train.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_speaker_is_in_every_split(tmp_path):
    entries = {
        f"{n}": {"wav": f"{n}.flac", "length": 1.0, "speaker": "ab"[n % 2]}
        for n in range(20)
    }
    manifest = tmp_path / "speech.json"
    manifest.write_text(json.dumps(entries))
    speaker = script("Speaker")
    speaker.prepare_speakers(manifest, tmp_path, held_out=5)
    found = {
        split: json.loads((tmp_path / f"{split}.json").read_text())
        for split in ("train", "valid", "test")
    }
    counts = {
        split: Counter(entry["speaker"] for entry in share.values())
        for split, share in found.items()
    }
    assert counts["train"] == {"a": 6, "b": 6}
    assert counts["valid"] == counts["test"] == {"a": 2, "b": 2}
    assert set().union(*found.values()) == set(entries)
    with pytest.raises(ValueError, match="leaves nothing to train with"):
        speaker.prepare_speakers(manifest, tmp_path, held_out=2)


def test_one_speaker_makes_no_mixtures():
    hparams = {"seconds": 1.0, "sample_rate": 16000}
    mixer = script("separation_1ch").Mixer
    mixer({"1": {"speaker": "a"}, "2": {"speaker": "b"}}, True, hparams)
    with pytest.raises(ValueError, match="two speakers in every split"):
        mixer({"1": {"speaker": "a"}, "2": {"speaker": "a"}}, True, hparams)
