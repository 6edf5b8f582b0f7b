"""The comparison of plans: what is measured, what is kept, the table."""

import doctest
import importlib
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from speechbrain_mpq.allocation.baselines import SizeScores
from speechbrain_mpq.allocation.output_scores import KLScores

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def plans():
    """The script, which is in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("plans")


class StubBench:
    """Scores a tiny network; a plan's quality is its average bits."""

    def __init__(self):
        self.scored = 0
        self.network = torch.nn.Sequential(
            torch.nn.Conv1d(2, 16, 1), torch.nn.Conv1d(16, 2, 1)
        )

    def score(self, scores):
        self.scored += 1
        return scores(self.network, progress=False)

    def measure(self, plan_or_bits):
        bits = getattr(plan_or_bits, "average_bits", plan_or_bits)
        return {"bytes": 1000, "average_bits": bits, "si_snr": 2.0 * bits}


def test_scores_by_name_and_settings(plans):
    scores = plans.make_scores("KLScores:form=one_sided", (2, 4))
    assert isinstance(scores, KLScores) and scores.method == "one_sided_kl"
    home = "speechbrain_mpq.allocation.baselines"
    scores = plans.make_scores(f"{home}.SizeScores:largest_first=false", (2, 3))
    assert isinstance(scores, SizeScores) and not scores.largest_first
    for name in ("NoScores", "no.such.Scores"):
        with pytest.raises(ValueError, match=f"no scores '{name}'"):
            plans.make_scores(name, (2, 4))


def test_only_what_is_missing_is_measured(plans, monkeypatch):
    home = "speechbrain_mpq.allocation.baselines"
    random = f"{home}.RandomScores"
    monkeypatch.setattr(plans, "RANDOM", random)
    monkeypatch.setattr(sys.modules["plans_table"], "RANDOM", random)
    options = Namespace(
        scores=[f"{home}.SizeScores"],
        bits=[3, 3.5],
        draws=2,
        candidate_bits=(2, 3, 4, 8),
    )
    bench, points, saved = StubBench(), [], []
    plans.measure_all(bench, options, points, lambda: saved.append(len(points)))
    assert bench.scored == 3 and len(points) == 1 + 2 * 3
    assert [p["bits"] for p in points if p["scores"] == "uniform"] == [3]
    assert saved == [1, 3, 5, 7]
    options.bits = [3, 3.5, 4]
    plans.measure_all(bench, options, points, lambda: None)
    assert bench.scored == 6 and len(points) == 1 + 2 * 3 + 4
    plans.measure_all(bench, options, points, lambda: None)
    assert bench.scored == 6
    shown = plans.table(points, [3, 3.5, 4], 9.0)
    assert "random, mean of 2" in shown
    assert shown.splitlines()[3].split() == [
        *("uniform", "6.00", "(1.0)", "-", "8.00", "(1.0)")
    ]


def test_table_example(plans):
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner()
    for example in finder.find(plans.table, "table", globs=vars(plans)):
        runner.run(example)
    assert runner.tries and not runner.failures


def test_what_a_score_lacks_is_named(plans):
    bench = object.__new__(plans.Bench)
    bench.calibration = {"inputs": 0}
    needy = Namespace(needs=("inputs", "prototypes"))
    with pytest.raises(ValueError, match="needs prototypes.*leave it out"):
        bench.score(needy)


def test_plot_is_written(plans, tmp_path):
    points = [
        {"scores": s, "bits": 4, "bytes": 2048, "si_snr": 8.0}
        for s in ("uniform", f"{plans.RANDOM}:seed=0")
    ]
    plans.plot(tmp_path / "plans.png", points, 9.0)
    assert (tmp_path / "plans.png").stat().st_size > 1000
