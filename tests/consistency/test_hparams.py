"""The hyper-parameter files: no drift between them, no key without use."""

import re
from pathlib import Path

import pytest
import yaml
from hyperpyyaml import load_hyperpyyaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "hparams").glob("*.yaml"))
RECIPES = sorted(
    path
    for path in ROOT.glob("recipes/*/**/hparams/*.yaml")
    if not path.name.startswith("inference")  # folders of models have these
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
    text = path.read_text(encoding="utf-8")
    node = yaml.compose(text)
    return {
        key.value: text[key.start_mark.index : value.end_mark.index].strip()
        for key, value in node.value
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_differ_only_in_the_method(path):
    reference = entries(ROOT / "hparams/kl_4bit.yaml")
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
def test_every_key_is_used(path):
    text = path.read_text(encoding="utf-8")
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
    with open(path, encoding="utf-8") as source:
        load_hyperpyyaml(source, {"output_folder": str(tmp_path)})
