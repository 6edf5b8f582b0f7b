"""The hyper-parameter files: a base and what is different, no idle key."""

import json
import re
from pathlib import Path

import pytest
import yaml

from speechbrain_mpq.training.hparams_source import HparamsSource, hparams_text

ROOT = Path(__file__).parents[2]
BASE = ROOT / "hparams/base.yaml"
FILES = [path for path in sorted(BASE.parent.glob("*.yaml")) if path != BASE]
RECIPES = sorted(
    path
    for path in ROOT.glob("recipes/*/**/hparams/*.yaml")
    # folders of models have inference*.yaml; the base is no experiment
    if not path.name.startswith(("inference", "base"))
)
METHOD_KEYS = {
    *("system", "bits", "against", "scores", "number_of_epochs"),
    *("prototypes", "calibration_mixtures", "one_stage"),
    *("estimator", "admm", "lr", "opt_class"),
    *("equalize_inputs", "min_bits", "codebook", "round_calibrated"),
}
# Training from nothing needs more data and another schedule.
TRAINING_KEYS = METHOD_KEYS | {
    *("pretrained_separator", "utterances", "rooms", "mixtures", "lr"),
    "separator_file",
    *("patience", "warmup_steps", "total_steps", "distillation"),
}


def entries(path):
    """Top-level key -> its text, tags and all."""
    text = hparams_text(path)
    node = yaml.compose(text)
    return {
        key.value: text[key.start_mark.index : value.end_mark.index].strip()
        for key, value in node.value
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_differ_only_in_the_method(path):
    reference = entries(BASE)
    training = path.name.startswith("pretrain")
    allowed = TRAINING_KEYS if training else METHOD_KEYS
    mine = entries(path)
    assert set(mine) == set(reference)
    differing = {
        key
        for key in mine
        if re.sub(r"\s*#.*", "", mine[key])
        != re.sub(r"\s*#.*", "", reference[key])
    }
    assert differing <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_hold_what_is_different(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    (base,) = re.findall(r"^base: (.*)$", text, re.MULTILINE)
    usual = entries(path.parent / base)
    for key, node in entries(path).items():
        said = re.search(rf"^{key}:", text, re.MULTILINE)
        assert not said or key == "system" or node != usual[key], key


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_header_states_what_to_expect(path):
    """The numbers of docs/results.md, and what it takes."""
    header = path.read_text(encoding="utf-8").partition("\nbase:")[0]
    quality, words, size = re.search(
        r"# Expect: SI-SNR (\S+) dB, WER (\S+) %, (\S+) MiB", header
    ).groups()
    assert re.search(r"\d (minutes?|s)\b", header)
    found = [(ROOT / "docs/results.md").read_text(encoding="utf-8")]
    for results in (ROOT / "benchmarks/results/lips").rglob("metrics.json"):
        metrics = json.loads(results.read_text(encoding="utf-8"))
        average, stored = metrics["average"], metrics["model_bytes"] / 2**20
        found.append(
            f"{average['si_snr']:.2f} {average['wer']:.1f} {stored:.2f}"
        )
    assert any(
        quality in text and words in text and size in text for text in found
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_key_is_used(path):
    text = hparams_text(path)
    package = ROOT / "speechbrain_mpq"
    readers = [
        *(ROOT / "train.py", package / "simulation/dataio.py"),
        *package.glob("training/*.py"),
        *package.glob("experiments/*.py"),
    ]
    sources = "".join(file.read_text(encoding="utf-8") for file in readers)
    for key in entries(path):
        used = (
            key.startswith("__")
            or f"!ref <{key}" in text
            or f"<{key}>" in text
            or f'"{key}"' in sources
            or f"hparams.{key}" in sources
            or re.fullmatch("(train|valid|test)_speech", key)
        )
        assert used, f"{path.name}: nothing uses {key}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_header_states_the_command(path):
    assert f"python train.py hparams/{path.name}" in path.read_text()
    assert "precision" not in entries(path)  # a run option of SpeechBrain


@pytest.mark.parametrize(
    "path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes"))
)
def test_recipes_load_as_they_are(path, monkeypatch, tmp_path):
    # Their tests override sizes and with them, maybe, what is wrong here
    monkeypatch.chdir(ROOT)
    HparamsSource(path).read(output_folder=str(tmp_path))
