"""A results folder belongs to one set of settings."""

import json
from pathlib import Path

import pytest
import yaml

from speechbrain_mpq.locks import IN_USE, folder_in_use
from speechbrain_mpq.training.experiment import (
    Experiment,
    digest,
    overrides_for,
    plan_steps,
    text_digest,
)
from speechbrain_mpq.training.hparams_source import (
    HparamsSource,
    hparams_text,
    settings_of,
    unread,
    with_blocks,
)

ROOT = Path(__file__).parents[3]
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
optimizer: !name:collections.Counter
    lr: !ref <lr>
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
        source = HparamsSource(file, yaml.safe_dump(changes))
        return Experiment(source, [weights])

    experiment.file, experiment.weights = file, weights
    return experiment


def finish(experiment):
    """Runs it, as far as its folder shows."""
    experiment.start()
    (experiment.folder / "metrics.json").write_text("{}")
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
    assert again.folder == first.folder and not again.makes_room


def test_results_of_nobody_are_refused(begin):
    folder = begin().folder
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="no settings.json(.|\n)*Delete it"):
        begin()


def test_beside_a_finished_run_others_get_folders_of_their_own(begin):
    plain = finish(begin())
    other = begin(lr=0.1)
    assert other.folder == plain.folder.parents[1] / "kl-lr_0.1/1"
    assert other.variant == "lr 0.1" and "other lr: this one" in other.note
    finish(other)
    assert begin(lr=0.1).finished and begin(lr=0.1).folder == other.folder
    both = begin(lr=0.1, sizes={"train": 9})
    assert both.folder.parent.name.startswith("kl-lr_0.1-sizes_")
    assert begin().folder == plain.folder and begin().variant == ""


def test_a_folder_that_was_asked_for_is_refused_by_name(begin):
    folder = str(finish(begin()).folder)
    with pytest.raises(ValueError, match="other lr: leave out --output_folder"):
        begin(lr=0.1, output_folder=folder)


def test_an_unfinished_run_makes_room(begin, caplog):
    begin().start()
    other = begin(lr=0.1)
    assert other.makes_room and other.folder == begin().folder
    other.start()  # nothing was lost
    assert not list(other.folder.parent.glob("*unfinished*"))
    (other.folder / "scores.json").write_text("{}")
    other._lock.close()  # its process is killed
    begin(lr=0.2).start()
    kept = other.folder.with_name("1_unfinished_1")
    assert (kept / "scores.json").exists() and str(kept) in caplog.text
    stored = json.loads((other.folder / "settings.json").read_text())
    assert stored["settings"]["lr"] == 0.2


def test_a_run_of_another_process_is_left_alone(begin):
    fcntl = pytest.importorskip("fcntl")
    first = begin()
    first.start()
    first._lock.close()
    with open(first.folder / ".in_use", "w") as held:  # as another would
        fcntl.flock(held, fcntl.LOCK_EX)
        assert begin(lr=0.1).folder != first.folder
        with pytest.raises(BlockingIOError, match="another process is at work"):
            begin().start()
        late = begin()
        late.makes_room = True  # it was planned before the other began
        with pytest.raises(BlockingIOError, match="another process is at work"):
            late.start()
        assert (first.folder / "settings.json").exists()
    assert begin(lr=0.1).folder == first.folder


def test_a_process_may_come_back_to_its_folder_and_leaves_no_lock(begin):
    first, again = begin(), begin()
    first.start()
    again.start()
    del first
    assert folder_in_use(again.folder)
    (again.folder / "scores.json").write_text("{}")
    again._lock.close()
    other = begin(lr=0.2)
    other.start()
    aside = other.folder.with_name(other.folder.name + "_unfinished_1")
    folder = other.folder
    del again, other
    left = [path.name for path in (*aside.iterdir(), *folder.iterdir())]
    assert IN_USE not in left


def test_other_weights_get_a_folder_too(begin):
    first = finish(begin())
    begin.weights.write_bytes(b"trained more")
    other = begin()
    assert other.folder != first.folder and "weights" in other.variant


def test_a_finished_report_of_other_baselines_is_told(begin):
    experiment = finish(begin())
    assert experiment.state == f"{experiment.folder} is finished already"
    assert "another against: delete its metrics.json" in begin(against=[]).state
    begin(against=[]).start()  # scored and written again
    assert begin(against=[]).report_differs == []


def test_results_may_be_moved_and_comments_changed(begin, tmp_path):
    finish(begin())
    (tmp_path / "results").rename(tmp_path / "archive")
    begin.file.write_text(HPARAMS.replace("of everything", "of all"))
    moved = begin("archive")
    assert moved.finished and not moved.variant
    with pytest.raises(ValueError, match="other seed: leave out"):
        begin("archive", output_folder=str(tmp_path / "archive/kl/1"), seed=2)


@pytest.mark.parametrize("stored", ["[fp32.yaml]", "[]"])
def test_a_hash_of_an_older_version_still_counts(begin, stored):
    folder = Path(begin().folder).parents[1]
    overrides = f"results_folder: {folder}\nagainst: {stored}\n"
    text = HparamsSource(begin.file, overrides).resolved
    leave_hash(begin(), text, [begin.weights])
    assert begin().report_differs == (["against"] if stored == "[]" else [])
    (begin().folder / "metrics.json").write_text("{}")
    assert begin(lr=0.1).variant == "lr 0.1"
    begin.weights.write_bytes(b"other")
    with pytest.raises(ValueError, match="other settings or weights"):
        begin()


def test_an_older_hash_of_other_settings_is_refused(begin):
    """Even where the text that lies beside it is the one asked for."""
    folder = Path(begin().folder).parents[1]
    text = HparamsSource(begin.file, f"results_folder: {folder}\n").resolved
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


def test_a_base_lends_its_lines_and_layout(tmp_path):
    base = "# head\n\na: 1 # one\nb: !new:X\n    c: 2\n\n### Banner\nd: 3\n"
    (tmp_path / "base.yaml").write_text(base)
    own = tmp_path / "own.yaml"
    own.write_text("# own head\nbase: base.yaml\n\nb: null # none\n")
    expected = "# head\n\na: 1 # one\nb: null # none\n\n### Banner\nd: 3\n"
    assert hparams_text(own) == expected
    assert with_blocks(base, {"e": "e: 4\n"}).endswith("d: 3\ne: 4\n")


def test_an_object_of_the_command_line_takes_the_place_of_the_files(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("n: 3\nscores: !new:A\n    form: x\n    n: !ref <n>\n")
    settings = HparamsSource(file, "scores: {form: y}").settings
    assert settings["scores"] == {"!new:A": {"form": "y", "n": 3}}
    settings = HparamsSource(file, "scores: !new:B {m: !ref <n>}").settings
    assert settings["scores"] == {"!new:B": {"m": 3}}


def full_settings(file, overrides):
    """Settings of a published file."""
    return HparamsSource(ROOT / "hparams" / file, overrides).settings


@pytest.mark.parametrize(
    "file, overrides, read, not_read",
    [
        ("fp32.yaml", "", {"doa_error", "seed"}, {"lr", "rows", "scores"}),
        ("fp32.yaml", "number_of_epochs: 3", {"lr", "distillation"}, {"rows"}),
        ("uniform_4bit.yaml", "", {"lr", "rows"}, {"min_bits"}),
        ("best_4bit.yaml", "", {"rows", "calibration_mixtures"}, {"lr"}),
        (
            "uniform_4bit.yaml",
            "estimator: !name:speechbrain_mpq.PostTraining",
            {"rows", "round_calibrated"},
            {"lr", "number_of_epochs", "calibration_mixtures"},
        ),
        ("admm_4bit.yaml", "", {"lr", "number_of_epochs"}, set()),
    ],
)
def test_what_a_run_reads(file, overrides, read, not_read):
    found = unread(full_settings(file, overrides))
    assert not_read <= found and not read & found


def shared(file, overrides, bits):
    """What a baseline inherits, as plain values."""
    return yaml.load(
        overrides_for(ROOT / "hparams" / file, overrides, bits), yaml.BaseLoader
    )


@pytest.mark.parametrize(
    "setting",
    [
        "rows: 32",
        "round_calibrated: True",
        "estimator: !name:speechbrain_mpq.PostTraining",
        "scores: {form: one_sided}",
        "codebook: midrise",
        "distillation: 0",
        "number_of_epochs: 4",
        "prototypes: hparams/admm_4bit.yaml",
        "calibration_mixtures: 64",
    ],
)
def test_full_precision_inherits_nothing_of_quantization(setting):
    assert shared("fp32.yaml", setting, 32) == {"bits": "32"}


def test_a_baseline_inherits_what_it_depends_on():
    asked = "doa_error: 5\nrows: 32\ndistillation: 0.5\nresults_folder: here"
    places = {"doa_error": "5", "results_folder": "here"}
    assert shared("fp32.yaml", asked, 32) == {"bits": "32", **places}
    expected = {"bits": "3", "rows": "32", **places}  # distillation as it is
    assert shared("uniform_4bit.yaml", asked, 3) == expected
    asked = "lr: 0.1\nseed: 2\nestimator: !name:speechbrain_mpq.StraightThrough"
    expected = {"bits": "4", "seed": "2"}  # ADMM has an optimizer of its own
    assert shared("admm_4bit.yaml", asked, 4) == expected


def planned(file, overrides=""):
    """System, bits and estimator of each experiment of a command line."""
    steps = plan_steps(HparamsSource(ROOT / "hparams" / file, overrides))
    return [
        (
            step.hparams["system"],
            step.hparams["bits"],
            step.hparams["bits"] != 32 and step.hparams["estimator"].__name__,
        )
        for step in steps
    ]


def test_baselines_come_first_and_once(monkeypatch):
    monkeypatch.chdir(ROOT)
    fp32 = ("fp32", 32, False)
    uniform = [("uniform", bits, "LearnedStep") for bits in (2, 3, 4, 8, 16)]
    assert planned("kl_4bit.yaml", "bits: 2.5") == [
        *(fp32, *uniform[:2], ("kl", 2.5, "LearnedStep"))
    ]
    assert planned("kl_4bit.yaml", "against: []\nrows: 8") == [
        ("kl", 4, "LearnedStep")
    ]
    nas = planned("nas_4bit.yaml")
    assert nas[0] == fp32 and nas[-1][0] == "nas" and len(nas) == 6
    assert set(nas[1:-1]) == {uniform[i] for i in (0, 2, 3, 4)}


def test_uniform_precision_is_there_in_the_systems_own_estimation(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert planned("best_4bit.yaml") == [
        ("fp32", 32, False),
        ("uniform", 4, "LearnedStep"),
        ("uniform", 4, "PostTraining"),
        ("best", 4, "PostTraining"),
    ]
    steps = plan_steps(
        HparamsSource(
            "hparams/kl_4bit.yaml",
            "round_calibrated: True\n"
            "estimator: !name:speechbrain_mpq.PostTraining",
        )
    )
    assert len(steps[-1].baselines) == 2  # none of them twice


def test_planning_leaves_no_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert len(planned("kl_4bit.yaml")) == 3
    assert not list(tmp_path.iterdir())


def test_prototypes_need_scores(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="set prototypes to null"):
        planned("uniform_4bit.yaml", "prototypes: hparams/uniform_4bit.yaml")
