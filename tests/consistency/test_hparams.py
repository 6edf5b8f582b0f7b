"""The hyper-parameter files: a base and what is different, no idle key."""

import ast
import json
import re
import textwrap
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
    *("separator_file", "train_corpora", "augmentation"),
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


def references(node):
    """Keys that the values in a tree of YAML refer to."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag in ("!ref", "!copy"):
            yield from re.findall(r"<(\w+)", node.value)
        return
    for child in node.value:
        mapping = isinstance(node, yaml.MappingNode)
        yield from references(child[1] if mapping else child)


def is_hparams(node):
    """Whether an expression is somebody's hparams."""
    return "hparams" in (getattr(node, "id", ""), getattr(node, "attr", ""))


def texts(node, loops):
    """Patterns of the strings that an expression may be."""
    if isinstance(node, ast.Constant):
        return {re.escape(str(node.value))}
    if isinstance(node, ast.IfExp):
        return texts(node.body, loops) | texts(node.orelse, loops)
    if isinstance(node, ast.Name):
        return loops.get(node.id, set())
    if isinstance(node, ast.JoinedStr):
        parts = [
            re.escape(part.value) if isinstance(part, ast.Constant) else r"\w+"
            for part in node.values
        ]
        return {"".join(parts)}
    return set()


def keys_read(source):
    """Patterns of the keys that a program takes from what it calls hparams."""
    tree, loops = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.comprehension | ast.For):
            if isinstance(node.iter, ast.Tuple) and hasattr(node.target, "id"):
                found = [texts(part, {}) for part in node.iter.elts]
                loops.setdefault(node.target.id, set()).update(*found)
    keys = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_hparams(node.value):
            keys.add(node.attr)
        elif isinstance(node, ast.Subscript) and is_hparams(node.value):
            keys |= texts(node.slice, loops)
        elif isinstance(node, ast.Call):
            owner = getattr(node.func, "value", None)  # hparams.get(key)
            words = [owner, *node.args]
            if getattr(node.func, "id", "") == "getattr":
                words = node.args
            elif getattr(node.func, "attr", "") != "get":
                continue
            if is_hparams(words[0]):
                keys |= texts(words[1], loops)
    return keys


def test_keys_are_found_however_they_are_read():
    source = """
        hparams["a"], self.hparams.b, brain.hparams.get("c"), bits, "bits"
        hparams["d" if x else "e"], getattr(hparams, "f"), hparams[f"{x}_g"]
        {key: hparams[key] for key in ("h", "i")}, other.get("j"), other["k"]
    """
    found = keys_read(textwrap.dedent(source))
    assert found - {"get"} == {*"abcdefhi", r"\w+_g"}
    root = yaml.compose("a: !ref <b>\nc:\n- d: !ref <e> * <f[g]>\nh: <i>")
    assert set(references(root)) == {*"bef"}


@pytest.fixture(scope="module")
def read():
    """Patterns of all keys that an experiment reads."""
    package = ROOT / "speechbrain_mpq"
    readers = [
        *(ROOT / "train.py", package / "simulation/dataio.py"),
        *package.glob("training/*.py"),
        *package.glob("experiments/*.py"),
    ]
    sources = (file.read_text(encoding="utf-8") for file in readers)
    return set().union(*map(keys_read, sources))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_key_is_used(path, read):
    used = set(references(yaml.compose(hparams_text(path))))
    for key in entries(path):
        assert (
            key.startswith("__")
            or key in used
            or any(re.fullmatch(pattern, key) for pattern in read)
        ), f"{path.name}: nothing uses {key}"


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


@pytest.mark.parametrize(
    "path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes"))
)
def test_recipes_save_checkpoints_whole(path):
    assert "utils.checkpoints.Checkpointer" not in hparams_text(path)


@pytest.mark.parametrize(
    "path",
    sorted(ROOT.glob("recipes/*/**/train.py")),
    ids=lambda path: str(path.parent.relative_to(ROOT / "recipes")),
)
def test_recipes_keep_others_out_of_their_results(path):
    text = path.read_text(encoding="utf-8")
    if "sb.create_experiment_directory" in text and not path.is_symlink():
        before, _, _ = text.partition("sb.create_experiment_directory")
        assert 'hold_results(hparams["output_folder"])' in before
