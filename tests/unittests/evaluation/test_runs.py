"""Finished runs: their metrics, files, and folders gathered."""

import json
import random
import re

import numpy as np
import pytest
from helpers import make_items, make_metrics, write_run

from speechbrain_mpq.evaluation.runs import (
    gather,
    load_metrics,
    load_run,
    significance,
    summarise,
)
from speechbrain_mpq.evaluation.signal_tasks import BUCKET_NAMES, bucket_of
from speechbrain_mpq.utils import write_json, write_text


def test_bucket_bounds():
    expected = {0: 0, 14.999: 0, 15: 1, 45: 2, 89.9: 2, 90: 3, 180: 3}
    for angle, index in expected.items():
        assert bucket_of(angle) == BUCKET_NAMES[index]
    for angle in (-0.1, 180.1, float("nan")):
        with pytest.raises(ValueError, match="0 to 180"):
            bucket_of(angle)


def test_average_is_the_unweighted_mean_of_the_buckets():
    items = make_items(per_bucket=2)
    items.append({**items[0], "id": "more", "si_snr": 40.0})
    summary = summarise(items)
    buckets = summary["buckets"]
    assert [buckets[name]["n"] for name in BUCKET_NAMES] == [3, 2, 2, 2]
    for key in ("si_snr", "pesq", "wer"):
        mean = np.mean([bucket[key] for bucket in buckets.values()])
        assert summary["average"][key] == pytest.approx(mean)
    assert summary["average"]["si_snr"] != pytest.approx(
        np.mean([item["si_snr"] for item in items])
    )


def test_word_error_rate_is_over_the_words_of_the_bucket():
    texts = [("a", "x"), ("a b c", "a b c"), ("a b", "b c d e")]
    items = [
        {**item, "angle": 5, "reference": said, "hypothesis": heard}
        for item, (said, heard) in zip(make_items(), texts)
    ]
    bucket = summarise(items)["buckets"]["0-15"]
    assert bucket["words"] == 6
    assert bucket["wer"] == pytest.approx(100 * 5 / 6)
    errors = [bucket[k] for k in ("substitutions", "deletions", "insertions")]
    assert errors == [3, 0, 2]
    assert "wer_mixture" not in bucket


def test_confusions_and_missing_pesq():
    items = [{**item, "angle": 5} for item in make_items()[:4]]
    for item, si_snr in zip(items, (-1.0, 0.0, 3.0, 4.0)):
        item["si_snr"] = si_snr
        item["hypothesis_mixture"] = item["reference"]
    items[0]["pesq"] = None
    summary = summarise(items)
    bucket = summary["buckets"]["0-15"]
    assert bucket["confusions"] == 0.25
    assert bucket["pesq_n"] == 3
    assert bucket["pesq"] == np.mean([item["pesq"] for item in items[1:]])
    assert bucket["wer_mixture"] == 0
    assert "wer_target" not in bucket
    assert summary["buckets"]["15-45"]["si_snr"] is None
    assert summary["average"] == {"si_snr": None, "pesq": None, "wer": None}


def test_broken_items_are_named():
    items = make_items()
    del items[3]["pesq"]
    with pytest.raises(ValueError, match="'0003' lacks pesq"):
        summarise(items)
    items = make_items()
    items[1]["si_snr"] = float("nan")
    with pytest.raises(ValueError, match="'0001': si_snr is nan"):
        summarise(items)
    with pytest.raises(ValueError, match="occur twice: 0000"):
        summarise(make_items()[:1] * 2)


def test_significance_is_of_the_same_mixtures():
    items = make_items()
    other = [{**item} for item in items]
    other[3]["si_snr_mixture"] += 0.1
    with pytest.raises(ValueError, match="0003 was another mixture when fp32"):
        significance(items, other)


def test_significance_pairs_items_by_id():
    items = make_items(per_bucket=10)
    perfect = [{**item, "hypothesis": item["reference"]} for item in items]
    shuffled = random.Random(1).sample(perfect, len(perfect))
    test = significance(items, shuffled, against="fp32")
    assert test["against"] == "fp32"
    assert test["z"] > 0 and 0 < test["p"] < 1
    assert significance(shuffled, items)["z"] == -test["z"]
    with pytest.raises(ValueError, match="different test sets"):
        significance(items, perfect[1:])


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


def _without_count(metrics):
    """A metrics file that does not tell how many items a bucket has."""
    metrics["buckets"]["0-15"]["n"] = None
    return metrics


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
        (_without_count, "`n` of bucket 0-15 is None"),
        (lambda m: {**m, "test_set": 5}, "`test_set` is 5"),
        (lambda m: {**m, "task": 5}, "`task` is 5"),
        (lambda m: {**m, "task": "singing"}, "no task 'singing', only class"),
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
        *(
            (
                json.dumps([{**i, "si_snr_mixture": x} for i in make_items()]),
                re.escape(f"si_snr_mixture is {x!r}"),
            )
            for x in (None, "1.5", True, [1.5])
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
