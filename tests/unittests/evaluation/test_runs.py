"""Finished runs: their files read and written, gathered from folders."""

import json

import numpy as np
import pytest
from helpers import make_items, make_metrics, write_run

from speechbrain_mpq.evaluation.runs import gather, load_metrics, load_run
from speechbrain_mpq.utils import write_json, write_text


def test_files_come_back_as_written(tmp_path):
    path = tmp_path / "metrics.json"
    metrics = make_metrics(seed=np.int64(1234))
    write_json(path, metrics)
    assert load_metrics(path) == metrics
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="metrics.json is not written"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(ValueError, match="object has no place"):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda m: [], "holds a list"),
        (lambda m: {"a": 1}, "`system` is missing"),
        (lambda m: {**m, "bits": "4"}, "`bits` is '4'"),
        (lambda m: {**m, "buckets": {}}, "bucket 0-15 is missing"),
        (lambda m: {**m, "average": {"wer": 1}}, "`si_snr` of average"),
        (lambda m: {**m, "average": 3}, "average holds"),
        (lambda m: {**m, "buckets": [1]}, "buckets holds"),
        (lambda m: {**m, "test_set": 5}, "`test_set` is 5"),
        (lambda m: {**m, "task": 5}, "`task` is 5"),
        (lambda m: {**m, "task": "singing"}, "no task 'singing', only separ"),
        (lambda m: {**m, "system": 5}, "`system` is 5"),
        (lambda m: {**m, "estimator": ["x"]}, "`estimator` is"),
        (lambda m: {**m, "model_bytes": "9"}, "`model_bytes` is '9'"),
        (lambda m: {**m, "seed": True}, "`seed` is True"),
        (lambda m: {**m, "mapsswe": {"p": 1}}, "`z` of mapsswe is missing"),
        (lambda m: {**m, "mapsswe": [1]}, "mapsswe holds a list"),
        (
            lambda m: {**m, "average": {**m["average"], "wer": 1.0}},
            "`wer` of average is 1.0, that of its buckets",
        ),
    ],
)
def test_foreign_files_are_named(tmp_path, spoil, reason):
    path = tmp_path / "metrics.json"
    write_json(path, spoil(make_metrics()))
    with pytest.raises(ValueError, match=reason) as caught:
        load_metrics(path)
    assert str(path) in str(caught.value)


def test_broken_and_missing_files_are_named(tmp_path):
    path = tmp_path / "metrics.json"
    with pytest.raises(FileNotFoundError, match="run the experiment"):
        load_metrics(path)
    path.write_text('{"system": "kl", ')
    with pytest.raises(ValueError, match="evaluate again"):
        load_metrics(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="evaluate again"):
        load_metrics(path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(tmp_path, number):
    path = tmp_path / "metrics.json"
    write_json(path, make_metrics())
    metrics = json.loads(path.read_text())
    metrics["buckets"]["15-45"]["si_snr"] = "HERE"
    path.write_text(json.dumps(metrics).replace('"HERE"', number))
    match = f"metrics.json is no JSON .*{number} is no.*evaluate again"
    with pytest.raises(ValueError, match=match):
        gather(tmp_path)


def test_items_are_read_with_the_run(tmp_path):
    items = make_items()
    write_run(tmp_path / "kl", items)
    assert load_run(tmp_path / "kl")["items"] == items
    path = tmp_path / "kl" / "test_items.json"
    path.unlink()
    assert "items" not in load_run(tmp_path / "kl")
    with pytest.raises(FileNotFoundError, match="test_items.json"):
        load_run(tmp_path / "kl", with_items=True)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("[{", "no JSON"),
        ("[]", "no test items"),
        ('{"a": 1}', "no test items"),
        ('[{"id": 1}]', "no test items"),
        (json.dumps(make_items(seed=5)), "different test sets"),
        (
            json.dumps([{**i, "hypothesis": None} for i in make_items()]),
            "lacks hypotheses",
        ),
    ],
)
def test_foreign_items_are_named(tmp_path, content, reason):
    write_run(tmp_path / "kl", make_items())
    path = tmp_path / "kl" / "test_items.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason) as caught:
        gather(tmp_path)
    assert str(path) in str(caught.value)


def test_a_run_below_two_folders_comes_once(tmp_path):
    write_run(tmp_path / "a" / "kl", make_items(), seed=1)
    write_run(tmp_path / "b" / "kl", make_items(), seed=2)
    runs = gather(tmp_path, tmp_path / "a", tmp_path / "b" / ".." / "b")
    assert [run["seed"] for run in runs] == [1, 2]
    with pytest.raises(FileNotFoundError, match="none"):
        gather(tmp_path, tmp_path / "none")


def test_gather_orders_systems(tmp_path):
    with pytest.raises(FileNotFoundError, match="run an experiment"):
        gather(tmp_path)
    written = (
        *(("kl", 4), ("uniform", 8), ("fp32", 32), ("kl", 2)),
        *(("uniform", 4), ("nas", 4), ("mine", 4), ("hes", 8)),
    )
    for system, bits in written:
        folder = tmp_path / f"{system}_{bits}bit" / "1234"
        folder.mkdir(parents=True)
        write_json(folder / "metrics.json", make_metrics(system, bits))
    found = [(m["system"], m["bits"]) for m in gather(tmp_path)]
    assert found == [  # as in the paper, what it has not at the end
        *(("fp32", 32), ("uniform", 4), ("uniform", 8), ("hes", 8)),
        *(("kl", 2), ("kl", 4), ("nas", 4), ("mine", 4)),
    ]
