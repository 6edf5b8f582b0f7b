"""The results table: rows, marks, and test sets that differ."""

import random

import numpy as np
import pytest
from helpers import make_items, make_metrics, write_run

from speechbrain_mpq.evaluation.results_table import (
    by_system,
    choose_baselines,
    mean_and_spread,
    paired_differences,
    results_table,
    table_cells,
)
from speechbrain_mpq.evaluation.runs import gather
from speechbrain_mpq.evaluation.signal_tasks import BUCKET_NAMES


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
    two = make_metrics("kl", 4, items=make_items())
    del two["test_set"]
    two["items"] = make_items()
    assert results_table([one, two])
    with pytest.raises(ValueError, match="at least one"):
        results_table([])


def test_other_mixtures_of_the_same_words_are_not_tabulated():
    items = make_items()
    one = make_metrics("fp32", 32, items)
    in_other_rooms = [
        {**item, "si_snr_mixture": item["si_snr_mixture"] + 0.5}
        for item in items
    ]
    two = make_metrics("kl", 4, in_other_rooms)
    assert one["test_set"] == two["test_set"]
    with pytest.raises(ValueError, match="fp32.*and kl 4 bit.*other mixtures"):
        results_table([one, two])


def test_different_test_sets_in_a_folder_are_named(tmp_path):
    write_run(tmp_path / "one", make_items(), system="fp32", bits=32)
    write_run(tmp_path / "two", make_items(seed=1))
    with pytest.raises(ValueError, match="different test sets") as caught:
        results_table(gather(tmp_path))
    for name in ("one", "two"):
        assert str(tmp_path / name) in str(caught.value)


KEYS = ("si_snr", "pesq", "wer")


def make_run(system, seed, values, size=1000, bits=4, **more):
    """A run whose buckets and average all have the same three numbers."""
    block = dict(zip(KEYS, values))
    bucket = {**block, "n": 1, "si_snr_mixture": 0.0, "words": 9}
    return {
        "system": system,
        "bits": bits,
        "seed": seed,
        "model_bytes": size,
        "test_set": "abc",
        "buckets": dict.fromkeys(BUCKET_NAMES, bucket),
        "average": block,
        **more,
    }


UNIFORM = [(8.0, 1.7, 28.0), (8.2, 1.6, 29.5), (7.9, 1.7, 28.9)]
KL = [(8.6, 1.7, 25.0), (8.7, 1.8, 26.0), (8.8, 1.6, 24.1)]


def make_runs():
    uniform = [make_run("uniform", s, v) for s, v in enumerate(UNIFORM)]
    kl = [make_run("kl", s, v, size=1005) for s, v in enumerate(KL)]
    return [*uniform, *reversed(kl)]


def test_mean_and_spread_are_those_of_the_seeds():
    mean, spread = mean_and_spread(make_runs()[:3])
    for column, key in enumerate(KEYS):
        values = np.array(UNIFORM)[:, column]
        for merged, expected in (
            (mean, values.mean()),
            (spread, values.std(ddof=1)),
        ):
            assert merged["average"][key] == pytest.approx(expected)
            assert merged["buckets"]["45-90"][key] == pytest.approx(expected)
    assert mean["model_bytes"] == 1000
    assert mean["seconds_per_hour"] is None


def test_differences_are_paired_by_seed():
    (pair,) = paired_differences(make_runs())
    assert pair["system"] == "kl 4 bit" and pair["against"] == "uniform 4 bit"
    assert pair["n"] == 3
    differences = np.array(KL) - np.array(UNIFORM)
    for column, key in enumerate(KEYS):
        mean, sd = pair[key]
        assert mean == pytest.approx(differences[:, column].mean())
        assert sd == pytest.approx(differences[:, column].std(ddof=1))
    # Only seeds that both have count.
    assert paired_differences(make_runs()[:-1])[0]["n"] == 2


def test_other_sizes_and_single_seeds_are_not_paired():
    runs = make_runs()
    larger = [{**run, "model_bytes": 1011} for run in runs[3:]]
    assert not paired_differences([*runs[:3], *larger])
    assert paired_differences([*runs[:3], *larger], tolerance=0.02)
    assert not paired_differences([runs[0], runs[5]])
    unknown = [{**run, "model_bytes": None} for run in runs]
    assert not paired_differences(unknown)


def test_a_number_that_is_not_known_has_no_difference():
    runs = make_runs()
    runs[1]["average"] = {**runs[1]["average"], "pesq": None}
    pair = paired_differences(runs)[0]
    assert pair["pesq"] is None and pair["wer"] is not None


def test_differences_stand_below_the_table():
    lines = results_table(make_runs()).splitlines()
    assert lines[-3].startswith("same size, by seed")
    assert lines[-1].split("  ")[0] == "kl 4 bit - uniform 4 bit"
    assert "+0.67 ± 0.21" in lines[-1] and "-3.8 ± 0.9" in lines[-1]


def test_estimators_are_systems_of_their_own():
    runs = [
        make_run("uniform", seed, values, estimator=estimator)
        for estimator in ("ADMM", "LearnedStep")
        for seed, values in enumerate(UNIFORM)
    ]
    assert [len(system) for system in by_system(runs)] == [3, 3]
    (pair,) = paired_differences(runs)
    assert pair["system"] == "uniform 4 bit LearnedStep"
    assert pair["wer"] == (0, 0)
    with pytest.raises(ValueError, match="names several systems"):
        choose_baselines(runs, ["uniform"])
    assert choose_baselines(runs, ["uniform_4bit_ADMM"]) == {
        "*": ("uniform", 4, "ADMM")
    }
    with pytest.raises(ValueError, match="is not there; choose from: uni"):
        choose_baselines(runs, ["fp32"])


def test_the_same_seed_twice_is_refused():
    runs = [
        make_run("kl", 1, KL[0], folder=folder) for folder in ("here", "there")
    ]
    with pytest.raises(ValueError, match="seed 1 .here and there.: leave one"):
        results_table(runs)
