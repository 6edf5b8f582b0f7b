"""Manifests of a made-up folder in the DNS Challenge's layout."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechbrain_mpq.simulation.augmentation import NoisySpeech
from speechbrain_mpq.simulation.noise import NoiseFolder

SCRIPT = Path(__file__).parents[3] / "recipes/DNS/dns_prepare.py"


@pytest.fixture
def prepare():
    """The script's function."""
    spec = importlib.util.spec_from_file_location("dns_prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.prepare_dns


@pytest.fixture
def dns(tmp_path):
    """Sixty readers of two files, and some noises."""
    rng = np.random.default_rng(0)
    names = [
        f"clean/book_1_chp_2_reader_{reader:05d}_{take}_seg_0.wav"
        for reader in range(60)
        for take in range(2)
    ]
    names += [f"noise/{n}.wav" for n in range(30)]
    for name in names:
        path = tmp_path / "dns/datasets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(17000), 16000)
    return tmp_path / "dns"


def test_readers_are_in_one_split(prepare, dns, tmp_path):
    prepare(dns, tmp_path / "data")
    splits = {
        split: json.loads((tmp_path / f"data/{split}_speech.json").read_text())
        for split in ("train", "valid", "test")
    }
    readers = [
        {entry["speaker"] for entry in entries.values()}
        for entries in splits.values()
    ]
    assert sum(map(len, splits.values())) == 120
    assert sum(map(len, readers)) == 60 == len(set.union(*readers))
    clips = NoisySpeech(splits["train"], NoiseFolder(dns, "train"), seconds=1)
    noisy, _, drawn = clips.draw(next(iter(splits["train"])))
    assert noisy.shape == (16000,) and drawn["noise"].endswith(".wav")
    prepare(dns, tmp_path / "few", limit=5)
    few = json.loads((tmp_path / "few/train_speech.json").read_text())
    assert len(few) == 5


def test_folders_of_another_kind(prepare, dns, tmp_path):
    with pytest.raises(ValueError, match="has none of datasets/clean"):
        prepare(tmp_path, tmp_path / "data")
    for path in (dns / "datasets/noise").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="holds no audio"):
        prepare(dns, tmp_path / "data")
