"""Averages by bucket, files of runs and the results table."""

import json
import random

import numpy as np
import pytest

from speechbrain_mpq.evaluation.files import write_json, write_text
from speechbrain_mpq.evaluation.metrics import (
    BUCKET_NAMES,
    bucket_of,
    significance,
    summarise,
)
from speechbrain_mpq.evaluation.runs import gather, load_metrics, load_run
from speechbrain_mpq.evaluation.table import results_table
from speechbrain_mpq.evaluation.table_cells import table_cells

ANGLES = (3.0, 20.0, 60.0, 180.0)


def make_items(seed=0, per_bucket=3):
    chance = random.Random(seed)
    items = []
    for angle in ANGLES * per_bucket:
        words = chance.choices(["red", "blue", "nine", "go"], k=4)
        heard = [word if chance.random() < 0.8 else "x" for word in words]
        items.append(
            {
                "id": f"{len(items):04d}",
                "angle": angle,
                "si_snr": chance.gauss(7, 3),
                "si_snr_mixture": chance.gauss(0, 3),
                "pesq": chance.uniform(1, 4),
                "reference": " ".join(words),
                "hypothesis": " ".join(heard),
            }
        )
    return items


def make_metrics(system="kl", bits=4, items=None, **more):
    return {
        "system": system,
        "bits": bits,
        **summarise(items or make_items()),
        **more,
    }


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
    with pytest.raises(ValueError, match="`si_snr` of bucket 15-45 is"):
        gather(tmp_path)


def write_run(folder, items, **more):
    """A finished run with its items."""
    folder.mkdir(parents=True)
    write_json(folder / "test_items.json", items)
    write_json(folder / "metrics.json", make_metrics(items=items, **more))


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
        ("[]", "lacks hypotheses"),
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


def test_table_shows_the_numbers():
    items = make_items()
    for item in items:
        item["hypothesis_mixture"] = "x"
    base = make_metrics("fp32", 32, items, model_bytes=2 * 2**20)
    same = {"against": "fp32", "z": 0.1, "p": 0.92, "segments": 9}
    mixed = make_metrics(
        items=items,
        average_bits=4.03,
        model_bytes=2**18,
        mapsswe=same,
        seconds_per_hour=40.25,
    )
    table = results_table([base, mixed])
    rows = [line.split() for line in table.splitlines()]
    assert rows[1][:7] == ["sys", "system", "#bit", *BUCKET_NAMES]
    assert [row[0] for row in rows[3:6]] == ["mixture", "1", "2"]
    bucket, average = mixed["buckets"]["45-90"], mixed["average"]
    assert rows[5][1:3] == ["kl", "4.03"]
    assert rows[5][5] == f"{bucket['si_snr']:.2f}({bucket['pesq']:.2f})"
    assert rows[5][10] == f"{bucket['wer']:.1f}"
    assert rows[5][12] == f"{average['wer']:.1f}*"
    assert rows[5][13:] == ["0.25", "8.0", "40.2"]
    assert rows[4][13:] == ["2.00", "1.0", "-"]
    assert float(rows[3][2]) == pytest.approx(
        mixed["buckets"]["0-15"]["si_snr_mixture"], abs=0.005
    )
    assert "* no significant WER difference from sys 1, fp32" in table
    lines = table.splitlines()
    assert len({len(line) for line in lines[1:6]}) == 1


def test_estimation_and_seed_are_shown_where_they_tell_something():
    runs = [
        make_metrics(seed=seed, estimator="ADMM", model_bytes=1000)
        for seed in (1, 2)
    ]
    _, header, rows = table_cells(runs)
    assert header[:5] == ["sys", "system", "estimation", "#bit", "seed"]
    assert [row[:5] for row in rows[1:]] == [
        ["1", "kl", "ADMM", "4", "1"],
        ["1", "kl", "ADMM", "4", "2"],
        ["1", "kl", "ADMM", "4", "mean"],
        ["", "", "", "", "± sd"],
    ]
    _, _, rows = table_cells(runs, seeds="mean")
    assert [row[4] for row in rows[1:]] == ["mean", "± sd"]
    assert rows[2][5] == "0.00(0.00)"
    with pytest.raises(ValueError, match="one of"):
        table_cells(runs, seeds="median")


def spoiled(items, rate):
    """Items with a share of their words misheard."""
    chance = random.Random(7)
    return [
        {
            **item,
            "hypothesis": " ".join(
                "y" if chance.random() < rate else word
                for word in item["reference"].split()
            ),
        }
        for item in items
    ]


def test_marks_against_several_baselines():
    """Marks come from the runs' items, for the run of the same seed."""
    items = make_items(per_bucket=12)
    perfect, awful = spoiled(items, 0), spoiled(items, 0.7)
    runs = [
        make_metrics("fp32", 32, perfect, seed=1),
        make_metrics("uniform", 4, awful, seed=1),
        make_metrics("uniform", 8, items, seed=1),
        make_metrics("kl", 4, items, seed=1),
        make_metrics("kl", 8, perfect, seed=1),
    ]
    for run, own in zip(runs, (perfect, awful, items, items, perfect)):
        run["items"] = own
    marked = {
        tuple(row[1:3]): row[12].lstrip("0123456789.").strip()
        for row in table_cells(runs)[2][1:]
    }
    assert marked == {
        ("fp32", "32"): "",
        ("uniform", "4"): "",  # differs from all
        ("uniform", "8"): "",
        ("kl", "4"): "‡",
        ("kl", "8"): "*",
    }
    marked = [row[12][-1] for row in table_cells(runs, ["kl_4bit"])[2][1:]]
    assert marked == [" ", " ", "*", " ", " "]


def test_a_mean_is_marked_only_if_no_seed_differs():
    items = make_items(per_bucket=12)
    perfect, awful = spoiled(items, 0), spoiled(items, 0.7)
    runs = []
    for seed, own in ((1, perfect), (2, awful)):
        runs.append(make_metrics("fp32", 32, perfect, seed=seed))
        runs[-1]["items"] = perfect
        runs.append(make_metrics("kl", 4, own, seed=seed))
        runs[-1]["items"] = own
    rows = table_cells(runs)[2]
    marks = {(row[1], row[3]): row[13][-1] for row in rows[1:]}
    assert marks[("kl", "1")] == "*"
    assert marks[("kl", "2")] == marks[("kl", "mean")] == " "
    assert "mean, ± sd" in results_table(runs)


def test_what_was_not_tested_is_said():
    items = make_items()
    base = make_metrics("fp32", 32, items)
    tested = make_metrics(
        mapsswe={"against": "fp32", "z": 3.0, "p": 0.003, "segments": 9}
    )
    table = results_table([base, tested, make_metrics("nas", 4)])
    assert table.splitlines()[-1].endswith("not tested: nas 4 bit")
    assert "*" not in table.splitlines()[5]
    # One test against a baseline that is not there marks nothing.
    assert "significant" not in results_table([tested])


def test_table_of_an_incomplete_run():
    table = results_table([make_metrics(items=make_items()[:1])])
    assert table.splitlines()[4].split()[-5:] == ["-"] * 5


def test_different_test_sets_are_not_tabulated():
    one = make_metrics("fp32", 32)
    two = make_metrics("kl", 4, make_items(seed=1))
    with pytest.raises(ValueError, match="different test sets.*kl 4 bit on"):
        results_table([one, two])
    del two["test_set"]
    with pytest.raises(ValueError, match="kl 4 bit tell no `test_set`"):
        results_table([one, two])
    two["items"] = make_items(seed=1)
    with pytest.raises(ValueError, match="different test sets"):
        results_table([one, two])
    two["items"] = make_items()
    assert results_table([one, two])
    with pytest.raises(ValueError, match="at least one"):
        results_table([])


def test_different_test_sets_in_a_folder_are_named(tmp_path):
    write_run(tmp_path / "one", make_items(), system="fp32", bits=32)
    write_run(tmp_path / "two", make_items(seed=1))
    with pytest.raises(ValueError, match="different test sets") as caught:
        results_table(gather(tmp_path))
    for name in ("one", "two"):
        assert str(tmp_path / name) in str(caught.value)
