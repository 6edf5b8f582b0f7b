"""train.py's command line: mistakes in one line, costs before work."""

import importlib.util
from pathlib import Path

import pytest

from speechbrain_mpq.experiments import talker_separation as stages
from speechbrain_mpq.experiments.command_line import (
    REFUSED,
    Cost,
    Refusal,
    chatter_to_log,
    cost_of,
    guarded,
    read_command_line,
    tell_plan,
)
from speechbrain_mpq.training.choose import SCORERS

ROOT = Path(__file__).parents[3]
KL = "hparams/kl_4bit.yaml"
FREE = Cost(["test only"], 1.0, True)


def read(*arguments, check=lambda *_: FREE):
    """What a command line asks for, without its models."""
    return read_command_line(list(arguments), check)


@pytest.mark.parametrize(
    "arguments, answer",
    [
        ([], "The file comes first: python train.py"),
        (["--bits", "3"], "The file comes first"),
        (["hparams/kl_4bits.yaml"], "did you mean hparams/kl_4bit.yaml?"),
        (["hparams/qqqqqq.txt"], "there are hparams/admm_4bit.yaml, "),
        ([KL, "bits", "3"], "what is 'bits'? Options are --key value"),
        ([KL, "--bit", "3"], "unknown option --bit: did you mean --bits?"),
        ([KL, "--test"], "unknown option --test"),  # of --test_only
        ([KL, "--optimizer", "x"], "unknown option --optimizer"),
        ([KL, "--precision", "bf61"], "argument --precision: invalid choice"),
        ([KL, "--device", "cuda:9"], "no GPU for --device cuda:9"),
        ([KL, "--bits", "four"], "--bits four: a number is needed"),
        ([KL, "--bits", "3 4"], "--bits 3 4: a number is needed"),
        ([KL, "--bits", "20"], "bits must lie in 1 to 16"),
        ([KL, "--bits"], "a number is needed"),
        ([KL, "--number_of_epochs", "1.5"], "a whole number is needed"),
        ([KL, "--lr", "-1"], "--lr -1: it cannot be below 0"),
        ([KL, "--round_calibrated", "Ture"], "did you mean True?"),
        ([KL, "--codebook", "midrice"], "did you mean midrise?"),
        (
            [KL, "--scores", "hesian"],
            "'hesian': did you mean hessian?",
        ),
        ([KL, "--scores", "{from: one_sided}"], "did you mean form?"),
        ([KL, "--scores", "{form: x"], "is no YAML: look at its brackets"),
        ([KL, "--estimator", "LearntStep"], "did you mean LearnedStep?"),
        ([KL, "--estimator", "!name:speechbrain_mpq.X"], "speechbrain_mpq.X"),
        ([KL, "--one_stage", "{interval: 2}"], "use hparams/one_stage_4bit"),
        ([KL, "--rooms", "5"], 'say which, as --rooms "{train: ..}"'),
        ([KL, "--rooms", "{trian: 5}"], "did you mean train?"),
        ([KL, "--against", "hparams/fp32.yaml"], "a list is needed"),
        ([KL, "--against", "[hparams/fp23.yaml]"], "mean hparams/fp32.yaml?"),
        (
            [KL, "--prototypes", "hparams/adm_4bit.yaml"],
            "mean hparams/admm_4bit",
        ),
        (
            [KL, "--separator_file", "hparams/models/separator_minni.yaml"],
            "mean",
        ),
        ([KL, "--pretrained_separator", "nowhere"], "hparams/pretrain.yaml"),
        (
            ["hparams/uniform_4bit.yaml", "--prototypes", KL],
            "set prototypes to null",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_in_one_line(
    arguments, answer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # from any directory
    with pytest.raises(Refusal) as caught:
        read(*arguments)
    said = str(caught.value)
    assert answer in said and "\n" not in said and len(said) < 400
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, answer",
    [
        (["--bits", "1"], "1 bits on average cannot be reached"),
        (["--bits", "3", "--min_bits", "4"], "raise --bits"),
        (["--rows", "0"], "rows"),
        (["--calibration_mixtures", "0"], "taken from the 1600"),
        (["--skip_prep", "True"], "leave out --skip_prep"),
        (["--train_corpora", "data/voices"], "maps folders to shares"),
        (["--train_corpora", "{data/voices: -1}"], "has share -1"),
        (["--train_corpora", "{nowhere: 1}"], "prepare that corpus first"),
        (
            [
                *("--augmentation", "!new:speechbrain_mpq.Augmentation"),
                *("--mix_on_device", "True"),
            ],
            "train without --augmentation",
        ),
        (["--quantize_exclude", "['x*']"], "x\\*"),
        (["--codebook", "entropy"], "LearnedStep trains scales.*PostTraining"),
    ],
)
def test_what_cannot_be_done_is_refused_before_baselines(
    options, answer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=answer):
        read(KL, *options, check=stages.check)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "word", [*sorted({*SCORERS} - {"table"}), "mask_error"]
)
def test_scores_are_words(word):
    hparams = read(KL, "--scores", word, "--rows", "8").steps[-1].hparams
    scorer = SCORERS.get(word)
    name = getattr(scorer, "func", scorer).__name__ if scorer else ""
    assert type(hparams["scores"]).__name__ in (name, "WeightedErrorScores")
    assert hparams["scores"].candidate_bits == (2, 4, 8, 16)


def test_words_of_what_a_file_has_change_nothing():
    words = ["--scores", "kl", "--estimator", "LearnedStep"]
    plain, said = read(KL).steps[-1], read(KL, *words).steps[-1]
    assert plain.source.settings == said.source.settings
    assert read(KL, "--scores", "uniform").steps[-1].hparams["scores"] is None


def test_costs_and_idle_options_are_told_before_work(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    line = read("hparams/best_4bit.yaml", "--lr", "0.1", "--dry_run")
    assert line.dry_run and not line.wide
    tell_plan(line, lambda *_: ())
    printed = capsys.readouterr().out
    assert "[1/4] fp32: test only, about 1 min (measured)" in printed
    assert "[4/4] best, 4 bit, PostTraining: " in printed
    assert "--lr changes nothing here: nothing is trained" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert not list(tmp_path.iterdir())


def test_costs_grow_with_the_work():
    hparams = read(KL).steps[-1].hparams
    small = cost_of(hparams, 930_000, True)
    assert "(estimated)" in str(small) and "400 training steps" in str(small)
    large = cost_of(hparams, 9_160_000, True)
    assert large.seconds > 2 * small.seconds
    untrained = cost_of(hparams, 930_000, False)
    assert untrained.seconds < small.seconds


def test_exit_status_tells_refusals_failures_and_interrupts(capsys):
    def fails(error):
        raise error

    assert guarded(fails, Refusal("no")) == REFUSED
    assert guarded(fails, OSError(2, "No such file", "x.json")) == 1
    assert capsys.readouterr().err == "no\nx.json: No such file\n"
    assert guarded(fails, KeyboardInterrupt()) == 130
    assert guarded(fails, ZeroDivisionError()) == 1  # a defect: all of it
    assert "Traceback" in capsys.readouterr().err


def test_what_c_prints_goes_to_the_log(tmp_path, capfd):
    import os

    log = tmp_path / "log.txt"
    with chatter_to_log() as into:
        into(log)
        os.write(1, b"solver\n")
        print("seen")
    os.write(1, b"after\n")
    printed = capfd.readouterr().out
    assert "after" in printed
    if log.exists():
        assert log.read_text() == "solver\n" and "seen" in printed


def test_works_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = read(KL).steps[-1]
    for key in ("separator_file", "pretrained_separator", "asr_source"):
        assert Path(step.hparams[key]).exists(), key
    assert step.source.output_folder == Path("results/kl_4bit/1234")
    monkeypatch.chdir(ROOT)
    assert read(KL).steps[-1].source.settings == step.source.settings


def test_train_py_shows_what_is_refused(capsys, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    monkeypatch.chdir(tmp_path)
    assert guarded(train.main, ["hparams/fp32.yaml", "--bit", "3"]) == REFUSED
    printed = capsys.readouterr()
    assert printed.err == "unknown option --bit: did you mean --bits?\n"
