"""A task that is not separation, from its items to table, report and card."""

import json
import math

import numpy as np
import pytest

from speechbrain_mpq.evaluation import task as tasks
from speechbrain_mpq.evaluation.report import write_table
from speechbrain_mpq.evaluation.results import (
    Scored,
    show_results,
    write_results,
)
from speechbrain_mpq.evaluation.results_table import results_table
from speechbrain_mpq.evaluation.runs import load_run, significance, summarise
from speechbrain_mpq.evaluation.task import (
    WER,
    CardText,
    ItemField,
    Measure,
    Task,
    count_word_errors,
    find_task,
    register_task,
)
from speechbrain_mpq.inference.card import model_card

pytestmark = pytest.mark.usefixtures("planned_pictures")


def average(items):
    """Perplexity and WER of sentences together."""
    words = count_word_errors(items)
    tokens = sum(item["tokens"] for item in items)
    nats = sum(item["nats"] for item in items)
    return {
        "n": len(items),
        "ppl": math.exp(nats / tokens) if tokens else None,
        "wer": words.rate if words.words else None,
    }


def card(config):
    """What a language model's card says."""
    return CardText(
        title="Language model",
        about="Predicts the next word.",
        use='## How to use\n\n```python\nrescore({sample}, {"beam": 4})\n```\n',
        tags=("language-modeling",),
        pipeline_tag="text-generation",
    )


LANGUAGE = Task(
    name="rescoring",
    measures=(
        Measure("ppl", "PPL", "perplexity", higher_is_better=False),
        WER,
    ),
    fields=(
        ItemField("nats"),
        ItemField("tokens"),
        ItemField("reference", str, plural="references"),
        ItemField("hypothesis", str, plural="hypotheses"),
    ),
    summarise=average,
    card=card,
    items="sentences",
)


@pytest.fixture
def language(monkeypatch):
    """The task, registered for one test."""
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    return register_task(LANGUAGE)


def make_sentences(nats, wrong):
    """Ten sentences, the first ones with a wrong word or, in turn, two."""
    spoiled = ("a b x d e", "a b x y e")
    return [
        {
            "id": f"s{index}",
            "nats": nats,
            "tokens": 10,
            "reference": "a b c d e",
            "hypothesis": spoiled[index % 2] if index < wrong else "a b c d e",
        }
        for index in range(10)
    ]


def finish(folder, system, bits, sentences, **more):
    """Write the results of one language model."""
    folder = folder / f"{system}_{bits}bit" / "1"
    folder.mkdir(parents=True)
    about = {"system": system, "bits": bits, "seed": 1, "model_bytes": 4000}
    write_results(folder, about, Scored(sentences), task=LANGUAGE, **more)
    return folder


def test_from_items_to_table_report_and_card(language, tmp_path):
    full = finish(tmp_path, "fp32", 32, make_sentences(20.0, 0))
    finish(tmp_path, "uniform", 4, make_sentences(24.0, 8))
    folder = finish(
        tmp_path,
        "kl",
        4,
        make_sentences(23.0, 8),
        baselines=[full],
        results_folder=tmp_path,
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["task"] == "rescoring"
    assert metrics["average"]["ppl"] == pytest.approx(math.exp(2.3))
    assert metrics["average"]["wer"] == pytest.approx(24.0)
    assert metrics["mapsswe"]["z"] > 2 and metrics["mapsswe"]["p"] < 0.05
    assert not (folder / "examples").exists()  # nothing to listen to
    table = show_results([full, folder]).splitlines()
    assert table[0].split() == [
        *("sys", "system", "#bit", "PPL", "WER", "%", "KiB", "ratio")
    ]
    rows = [line.split() for line in table[2:]]
    assert rows == [
        ["1", "fp32", "32", "7.39", "0.0", "3.9", "1.0"],
        ["2", "kl", "4", "9.97", "24.0", "3.9", "1.0"],
        [*"* no significant WER difference from sys 1, fp32".split()]
        + ["(MAPSSWE,", "p", ">=", "0.05)"],
    ]
    html = (folder / "report.html").read_text("utf-8")
    for shown in (
        *("Rescoring report", "significantly more word errors"),
        *("+24.0 points WER, +2.59 PPL", "10 sentences", "<h2>Results</h2>"),
        "Size against quality",
    ):
        assert shown in html, shown
    for hidden in ("SI-SNR", "angle", "mixture", "Look and listen"):
        assert hidden not in html, hidden
    other = load_run(full)
    text = model_card({}, 4000, metrics, other, task=language)
    assert "# Language model, 32 bits" in text
    assert 'rescore("recording.wav", {"beam": 4})' in text
    assert "| this model | 32 | 3.9 | 9.97 | 24.0 |" in text
    assert "Word errors against fp32 (MAPSSWE)" in text
    assert "angle" not in text and "SI-SNR" not in text


def test_runs_of_other_tasks_are_no_neighbours(language, tmp_path, caplog):
    folder = tmp_path / "x_4bit" / "1"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"task": "never heard of"}')
    run = finish(
        tmp_path, "kl", 4, make_sentences(23.0, 1), results_folder=tmp_path
    )
    assert "Left out" not in caplog.text
    assert "Size against" not in (run / "report.html").read_text("utf-8")


def test_runs_are_read_and_checked_by_their_task(language, tmp_path):
    folder = finish(tmp_path, "kl", 4, make_sentences(23.0, 1))
    run = load_run(folder)
    assert run["items"] == make_sentences(23.0, 1)
    write_table(tmp_path / "table.html", [run])
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["average"]["ppl"] = 1.0
    path.write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="`ppl` of average is 1.0"):
        load_run(folder)


def test_tasks_are_not_mixed_and_broken_items_named(language):
    items = make_sentences(20.0, 0)
    run = {"system": "a", "bits": 4, **summarise(items, language)}
    with pytest.raises(ValueError, match="different tasks.*rescoring"):
        results_table([run, {**run, "task": "separation"}])
    with pytest.raises(ValueError, match="'s0': nats is nan"):
        summarise([{**items[0], "nats": math.nan}], language)
    with pytest.raises(ValueError, match="'s0' lacks hypothesis"):
        summarise([{k: items[0][k] for k in list(items[0])[:4]}], language)
    with pytest.raises(ValueError, match="different test sets"):
        significance(items, items[1:], task=language)


def test_a_task_without_a_test_marks_nothing(language, monkeypatch, tmp_path):
    plain = Task(
        name="regression",
        measures=(Measure("pcc", "PCC", decimals=3),),
        fields=(ItemField("reference"), ItemField("prediction")),
        summarise=lambda items: {"n": len(items), "pcc": 0.5},
        card=card,
    )
    register_task(plain)
    items = [{"id": "a", "reference": 1.0, "prediction": 2.0}]
    about = {"system": "kl", "bits": 4, "seed": 1}
    for name, bits in (("fp32", 32), ("kl", 4)):
        folder = tmp_path / name
        folder.mkdir()
        about |= {"system": name, "bits": bits}
        write_results(folder, about, Scored(items), task=plain)
    folder = tmp_path / "again"
    folder.mkdir()
    baselines = [tmp_path / "fp32"]
    metrics = write_results(folder, about, Scored(items), baselines, task=plain)
    assert "mapsswe" not in metrics
    html = (folder / "report.html").read_text("utf-8")
    assert "kl 4 bit: PCC +0.000" in html and "not tested" not in html
    table = show_results([tmp_path / "fp32", folder])
    assert "0.500" in table and "significant" not in table


def test_sounds_without_words_are_shown(language, tmp_path):
    denoising = register_task(
        Task(
            name="dereverberation",
            measures=(Measure("mos", "DNSMOS", unprocessed="mos_noisy"),),
            fields=(ItemField("mos"), ItemField("mos_noisy")),
            summarise=lambda items: {"n": 1, "mos": 3.0, "mos_noisy": 2.0},
            card=card,
            items="clips",
            reference="id",
            unprocessed="noisy",
        )
    )
    items = [{"id": "a", "mos": 3.0, "mos_noisy": 2.0}]
    signals = dict.fromkeys(("noisy", "estimate"), np.ones(1600))
    example = {"id": "a", "sample_rate": 16000, "signals": signals}
    about = {"system": "kl", "bits": 4, "seed": 1}
    write_results(tmp_path, about, Scored(items, [example]), task=denoising)
    html = (tmp_path / "report.html").read_text("utf-8")
    assert html.count("<audio") == 2 and "said:" not in html
    assert "takes the DNSMOS from 2.00 in the noisy to 3.00." in html
    table = results_table([load_run(tmp_path)]).splitlines()
    assert table[2].split()[:3] == ["noisy", "-", "2.00"]


def test_names_are_taken_once(language):
    assert register_task(LANGUAGE) is LANGUAGE
    assert find_task("rescoring") is LANGUAGE
    other = Task("separation", (), (), average, card)
    with pytest.raises(ValueError, match="another task named 'separation'"):
        register_task(other)
