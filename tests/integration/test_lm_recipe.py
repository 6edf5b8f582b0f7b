"""The language models' recipe: trained, quantized by gates, rescoring."""

import json

import pytest
import torch
from helpers import ROOT, read_rows, run_row, start_row

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.inference.language_model import LanguageModel
from speechbrain_mpq.quantization.packing import read_model
from speechbrain_mpq.quantization.plan import BitPlan
from speechbrain_mpq.run import main as run_recipe

ROWS = [row for row in read_rows("SOTU") if row["Task"] == "LM"]
GATES = {
    f"model.rnn.rnn.{gate}_l{layer}"
    for gate in ("input", "forget", "cell", "output")
    for layer in (0, 1)
}


def test_table_lists_every_file():
    folder = ROOT / "recipes/SOTU/LM"
    found = {p.relative_to(ROOT).as_posix() for p in folder.rglob("*.yaml")}
    assert found == {row["Hparam_file"] for row in ROWS}
    readme = (folder / "README.md").read_text()
    for row in ROWS:
        assert row["Hparam_file"].removeprefix("recipes/SOTU/LM/") in readme


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder in the place of tests/tmp."""
    return tmp_path_factory.mktemp("lm")


@pytest.fixture(scope="module")
def trained(shared):
    """Output folder of each row."""
    return {row["Hparam_file"]: run_row(row, shared) for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["Hparam_file"])
def test_published_model_has_the_logged_perplexity(row, trained, shared):
    output = trained[row["Hparam_file"]]
    lm = LanguageModel.from_pretrained(output / "published")
    lines = (shared / "sotu/test.txt").read_text().splitlines()
    found = lm.perplexity(lines)
    log = (output / "train_log.txt").read_text().splitlines()[-1]
    logged = float(log.split("test PPL: ")[1].split(",")[0])
    assert found["ppl"] == pytest.approx(logged, rel=0.01)
    config = json.loads(
        (output / "published/quantization_config.json").read_text()
    )
    assert config["metadata"]["test"]["words"] == found["words"]
    assert config["metadata"]["test"]["PPL"] == pytest.approx(
        found["ppl"], rel=1e-5
    )


def test_a_run_begins_with_the_weights_of_another(trained, shared, tmp_path):
    row, first = ROWS[0], trained[ROWS[0]["Hparam_file"]]
    flags = row["test_debug_flags"]
    for old, new in (("--lr 0.03", "--lr 0"), ("epochs 3", "epochs 1")):
        assert old in flags
        flags = flags.replace(old, new)
    row = {**row, "test_debug_flags": f"{flags} --start_from {first}"}
    second = start_row(row, shared, tmp_path / "second")
    one, other = (
        LanguageModel.from_pretrained(folder / "published").model.state_dict()
        for folder in (first, second)
    )
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
    missing = {**row, "test_debug_flags": f"{flags} --start_from {tmp_path}"}
    with pytest.raises(ValueError, match="no trained checkpoint"):
        start_row(missing, shared, tmp_path / "third")


def test_sentences_without_positions_are_refused_at_once(shared, tmp_path):
    row = ROWS[1]
    flags = f"{row['test_debug_flags']} --max_length 8"
    row = {**row, "test_debug_flags": flags}
    told = "and the model takes 7 at most: give --max_length "
    with pytest.raises(ValueError, match=told):
        start_row(row, shared, tmp_path / "long")
    assert not list((tmp_path / "long").rglob("*.ckpt"))


def quantized(trained, shared, name, *options):
    """Quantize the LSTM by its gates, with an untouched recipe."""
    row = ROWS[0]
    line = row["test_debug_flags"].replace("tests/tmp", str(shared))
    line = line.replace("number_of_epochs 3", "number_of_epochs 1")
    folder = shared / name
    run_recipe(
        [
            *(str(ROOT / row[k]) for k in ("Script_file", "Hparam_file")),
            *line.replace("tests/data", str(ROOT / "tests/data")).split(),
            *("--device=cpu", "--noprogressbar"),
            f"--output_folder={folder}",
            f"--weights={trained[row['Hparam_file']] / 'save'}",
            *("--gates", "--float_vectors", "--min_bits", "1"),
            *("--candidate_bits", "1", "2", "4", "8"),
            *("--batches", "1"),
            *options,
        ]
    )
    return folder


@pytest.mark.parametrize(
    "name, options",
    [
        ("kl", ("--scores", "kl", "--method", "straight_through")),
        ("hessian", ("--scores", "hessian", "--method", "learned_step")),
        ("nas", ("--scores", "nas", "--method", "log_step")),
        ("admm", ("--scores", "kl", "--method", "admm")),
        ("one_stage", ("--method", "one_stage")),
        (
            "rows",
            ("--method", "post_training", "--scores", "kl")
            + ("--granularity", "channel"),
        ),
    ],
)
def test_every_scorer_and_method_takes_gates(name, options, trained, shared):
    folder = quantized(trained, shared, name, "--bits", "2", *options)
    plan = BitPlan.load(folder / "plan.json")
    assert GATES < set(plan.clusters)
    assert plan.average_bits <= 2
    packed = read_model(folder / "published")
    assert packed.version == 3
    # Both files are of the same weights.
    other = read_model(folder / "packed")
    for tensor, stored in packed.quantized.items():
        twin = other.quantized[f"model.{tensor}"]
        assert torch.equal(stored.packed, twin.packed)
    lm = LanguageModel.from_pretrained(folder / "published")
    lines = (shared / "sotu/test.txt").read_text().splitlines()
    log = (folder / "train_log.txt").read_text().splitlines()[-1]
    logged = float(log.split("test PPL: ")[1].split(",")[0])
    assert lm.perplexity(lines)["ppl"] == pytest.approx(logged, rel=0.01)


def test_lists_are_rescored(trained, capsys):
    folder = trained[ROWS[0]["Hparam_file"]]
    nbest = folder / "nbest.json"
    lists = {"the navy has grown": "navy the grown has"}
    rows = [
        {"id": f"u{i}", "hypotheses": [bad, good], "scores": [-1, -1.1]}
        for i, (good, bad) in enumerate(lists.items())
    ]
    nbest.write_text("\n".join(map(json.dumps, rows)))
    assert main(["rescore", str(nbest), "--lm", str(folder / "published")]) == 0
    assert capsys.readouterr().out == "u0 the navy has grown\n"


def test_another_vocabulary_than_the_hparams(shared, trained):
    with pytest.raises(ValueError, match="vocabulary of 50, the hparams one"):
        row = dict(ROWS[0])
        row["test_debug_flags"] = row["test_debug_flags"].replace(
            "--vocabulary 50", "--vocabulary 51 --skip_prep True"
        )
        start_row(row, shared, shared / "other")
