"""Systems with several seeds: grouping, means, differences at equal bytes."""

import numpy as np
import pytest

from speechbrain_mpq.evaluation.comparisons import (
    by_system,
    choose_baselines,
    mean_and_spread,
    paired_differences,
)
from speechbrain_mpq.evaluation.results_table import results_table
from speechbrain_mpq.evaluation.signal_tasks import BUCKET_NAMES

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
