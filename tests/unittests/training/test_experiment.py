"""A results folder belongs to one set of settings."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq.training.experiment import (
    Experiment,
    digest,
    overrides_for,
    resolved_text,
    run_baselines,
    run_prototypes,
    settings_of,
    text_digest,
)

HPARAMS = """
seed: 1 # of everything
bits: 32
results_folder: results
output_folder: !ref <results_folder>/kl/<seed>
save_folder: !ref <output_folder>/save
against: [fp32.yaml]
examples: 4
workers: 2
lr: 0.001
sizes:
    train: 8
counts: !name:collections.Counter
    log: !ref <output_folder>/log.txt
"""


@pytest.fixture
def begin(tmp_path):
    """Begins an experiment, with overrides, in a folder of its own."""
    file = tmp_path / "kl.yaml"
    file.write_text(HPARAMS)
    weights = tmp_path / "weights"
    weights.write_bytes(b"trained")

    def experiment(results="results", **changes):
        changes = {"results_folder": str(tmp_path / results), **changes}
        overrides = yaml.safe_dump(changes)
        with open(file, encoding="utf-8") as source:
            hparams = load_hyperpyyaml(source, overrides)
        return Experiment(hparams, file, overrides, [weights])

    experiment.file, experiment.weights = file, weights
    return experiment


def leave_hash(experiment, text, inputs):
    """What a run of an older version left: a hash, and its settings' text."""
    experiment.folder.mkdir(parents=True)
    content = {"sha256": text_digest(text, inputs)}
    (experiment.folder / "settings.json").write_text(json.dumps(content))
    saved = f"# Generated today from:\n# kl.yaml\n# yamllint disable\n{text}"
    (experiment.folder / "hyperparams.yaml").write_text(saved)


def test_what_cannot_change_the_result_is_no_setting(begin):
    first = begin()
    first.start()
    again = begin(against=[], examples=9, workers=0)
    assert again.report_differs == ["against", "examples"]
    assert begin(workers=0).report_differs == []


def test_results_of_nobody_are_refused(begin):
    folder = begin().folder
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="no settings.json(.|\n)*Delete it"):
        begin()


def test_what_can_is_refused_by_name_finished_or_not(begin):
    begin().start()
    (begin().folder / "metrics.json").write_text("{}")
    for finished in (True, False):
        assert begin().finished == finished
        with pytest.raises(ValueError, match=r"other settings: lr\. Delete"):
            begin(lr=0.1)
        with pytest.raises(ValueError, match="settings: lr, sizes"):
            begin(lr=0.1, sizes={"train": 9}, against=[])
        (begin().folder / "metrics.json").unlink(missing_ok=True)


def test_other_weights_are_refused(begin):
    begin().start()
    begin.weights.write_bytes(b"trained more")
    with pytest.raises(ValueError, match="weights or architecture"):
        begin()


def test_a_finished_report_of_other_baselines_is_told(begin):
    experiment = begin()
    experiment.start()
    assert experiment.state == f"{experiment.folder} is finished already"
    assert "another against: delete its metrics.json" in begin(against=[]).state
    begin(against=[]).start()  # scored and written again
    assert begin(against=[]).report_differs == []


def test_results_may_be_moved_and_comments_changed(begin, tmp_path):
    begin().start()
    (tmp_path / "results").rename(tmp_path / "archive")
    begin.file.write_text(HPARAMS.replace("of everything", "of all"))
    moved = begin("archive")
    assert (moved.folder / "settings.json").exists()
    with pytest.raises(ValueError, match="settings: seed"):
        begin("archive", output_folder=str(tmp_path / "archive/kl/1"), seed=2)


@pytest.mark.parametrize("stored", ["[fp32.yaml]", "[]"])
def test_a_hash_of_an_older_version_still_counts(begin, stored):
    folder = Path(begin().folder).parents[1]
    overrides = f"results_folder: {folder}\nagainst: {stored}\n"
    text = resolved_text(begin.file, overrides)
    leave_hash(begin(), text, [begin.weights])
    assert begin().report_differs == (["against"] if stored == "[]" else [])
    with pytest.raises(ValueError, match="settings: lr"):
        begin(lr=0.1)
    begin.weights.write_bytes(b"other")
    with pytest.raises(ValueError, match="other settings or weights"):
        begin()


def test_an_older_hash_of_other_settings_is_refused(begin):
    """Even where the text that lies beside it is the one asked for."""
    folder = Path(begin().folder).parents[1]
    text = resolved_text(begin.file, f"results_folder: {folder}\n")
    leave_hash(begin(), text, [begin.weights])
    begin()
    path = begin().folder / "settings.json"
    path.write_text(json.dumps({"sha256": digest([], begin="other")}))
    with pytest.raises(ValueError, match="other settings or weights"):
        begin()


def test_settings_keep_types_and_tags():
    text = "a: 1\nb: '1'\nc: !new:X {d: [1.5, null, true]}\ne: &e [1]\nf: *e\n"
    assert settings_of(text) == {
        "a": 1,
        "b": "1",
        "c": {"!new:X": {"d": [1.5, None, True]}},
        "e": [1],
        "f": [1],
    }
    block = "f:\n- 1\ne: [1]\nc: !new:X\n  d:\n  - 1.5\n  -\n  - true\n"
    assert settings_of(block + 'b: "1"\na: 1\n') == settings_of(text)


def test_prototypes_do_not_inherit_the_list_of_baselines(begin):
    shared = overrides_for(begin.file, "against: []\nlr: 0.1\nother: 3", 4)
    assert yaml.safe_load(shared) == {"lr": 0.1, "bits": 4}


def test_baselines_and_prototypes_are_run_with_what_they_share(begin):
    asked = []

    def run(file, overrides):
        asked.append(yaml.safe_load(overrides))
        return Path("results", str(asked[-1]["bits"]))

    overrides = "against: []\nlr: 0.1\nscores: {candidate_bits: [2, 4]}"
    hparams = {
        "against": [begin.file],
        "bits": 2.5,
        "prototypes": begin.file,
        "scores": SimpleNamespace(candidate_bits=(2, 4)),
    }
    assert run_baselines(run, hparams, overrides) == [Path("results/32")]
    assert run_prototypes(run, hparams, overrides) == {
        2: Path("results/2/packed"),
        4: Path("results/4/packed"),
    }
    assert asked == [{"lr": 0.1, "bits": bits} for bits in (32, 2, 4)]
    assert run_prototypes(run, {"prototypes": None}, overrides) == {}


def test_prototypes_need_scores(begin):
    hparams = {"prototypes": begin.file, "scores": None}
    with pytest.raises(ValueError, match="set prototypes to null"):
        run_prototypes(None, hparams, "")


def test_admm_keeps_its_own_optimizer(begin):
    overrides = "lr: 0.1\nseed: 2\n"
    text = begin.file.read_text()
    begin.file.write_text(text + "admm:\n")
    shared = overrides_for(begin.file, overrides, 4)
    assert yaml.safe_load(shared) == {"lr": 0.1, "seed": 2, "bits": 4}
    begin.file.write_text(text + "admm: !name:collections.Counter\n")
    shared = overrides_for(begin.file, overrides, 4)
    assert yaml.safe_load(shared) == {"seed": 2, "bits": 4}
