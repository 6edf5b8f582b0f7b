"""The classification task: accuracy, McNemar, and tables made of it."""

import json

import pytest

from speechbrain_mpq.evaluation.results import (
    Scored,
    show_results,
    write_results,
)
from speechbrain_mpq.evaluation.task import find_task
from speechbrain_mpq.evaluation.word_tasks import CLASSIFICATION


def items_of(right, count=20):
    """Items of which the first are right."""
    return [
        {
            "id": f"{i:02d}",
            "reference": "yes",
            "hypothesis": "yes" if i < right else "no",
        }
        for i in range(count)
    ]


def test_found_by_its_name():
    assert find_task("classification") is CLASSIFICATION


def test_accuracy():
    assert CLASSIFICATION.summarise(items_of(15))["accuracy"] == 75
    assert CLASSIFICATION.summarise([]) == {"n": 0, "accuracy": None}


def test_more_errors_have_a_positive_z():
    run = CLASSIFICATION.tested.test.run
    result = run(list(zip(items_of(10), items_of(18))))
    assert result["z"] > 2 and result["items"] == 20
    assert result["p"] == pytest.approx(2 / 2**8)
    assert run(list(zip(items_of(5), items_of(5)))) == {
        "z": 0.0,
        "p": 1.0,
        "items": 20,
    }


def test_results_and_table(tmp_path):
    pytest.importorskip("matplotlib")
    folders = []
    for name, bits, right in (("fp32", 32, 18), ("nsga2", 4, 10)):
        folder = tmp_path / name
        folder.mkdir()
        system = {"system": name, "bits": bits, "average_bits": bits}
        system |= {"model_bytes": 1000 * bits, "fp32_bytes": 32000, "seed": 1}
        write_results(
            folder,
            {**system, "estimator": None, "corpus": "made up"},
            Scored(items_of(right)),
            folders,
            task=CLASSIFICATION,
        )
        folders.append(folder)
    metrics = json.loads((tmp_path / "nsga2/metrics.json").read_text())
    assert metrics["task"] == "classification"
    assert metrics["mcnemar"]["p"] < 0.01
    table = show_results(folders)
    assert "accuracy %" in table and "50.0" in table and "90.0" in table
    assert "McNemar" in (tmp_path / "nsga2/report.html").read_text()
