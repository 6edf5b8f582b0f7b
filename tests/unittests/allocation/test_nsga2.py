"""NSGA-II and its baselines on plans whose best front is known."""

import json
import sys
from dataclasses import fields, replace

import numpy as np
import pytest

from speechbrain_mpq.allocation import nsga2

GENES = [f"gene{number}" for number in range(6)]
WEIGHTS = [1.0, 8.0, 2.0, 1.0, 4.0, 0.5]
EVOLUTION = {field.name for field in fields(nsga2.Evolution)}


def evaluate(plan):
    """An error that grows with weights, a size that counts all alike."""
    error = sum(w * 4.0 ** -plan[g] for w, g in zip(WEIGHTS, GENES))
    return error, sum(plan.values())


def small(**options):
    """A search of a few generations."""
    settings = {"population": 10, "generations": 8, "seed": 3}
    settings |= {n: options.pop(n) for n in EVOLUTION & options.keys()}
    evolution = nsga2.Evolution(**settings)
    return nsga2.search(
        evaluate, GENES, evolution=evolution, progress=False, **options
    )


def test_fronts_of_seventeen_genes():
    rng = np.random.default_rng(0)
    harm, weight = np.exp(rng.normal(0, 1.2, (2, 17)))
    genes = [f"gene{number}" for number in range(17)]

    def saturating(plan):
        bits = np.array([plan[gene] for gene in genes])
        return 1 - np.exp(-2 * harm @ 4.0**-bits), weight @ bits

    def volume(evaluations):
        return nsga2.hypervolume(evaluations.all(), (1, 8 * weight.sum()))

    same = nsga2.homogeneous(saturating, genes)
    plans = [item.plan for item in same.all()]
    evolution = nsga2.Evolution(generations=20, mutation=(1, 3))
    options = {"initial": plans, "progress": False}
    found = nsga2.search(saturating, genes, evolution=evolution, **options)
    budget = len(found)
    assert 400 < budget <= 500
    random = nsga2.random_search(saturating, genes, budget)
    assert volume(found) > max(volume(random), volume(same))
    # What is lost all but adds up here, which is what these two build on
    greedy = nsga2.greedy_descent(saturating, genes, 4 * budget)
    additive = nsga2.additive_search(saturating, genes, budget=130)
    assert volume(additive) > 0.95 * volume(greedy)


def test_seeds_repeat_and_leave_the_global_one_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    first, second, other = small(), small(), small(seed=4)
    assert first.all() == second.all()
    assert first.all() != other.all()
    assert np.random.get_state()[1].tolist() == before


def test_plans_that_do_not_work_are_left():
    def useful(evaluations):
        return sum(item.error <= 0.1 for item in evaluations.all())

    assert useful(small(largest_error=0.1)) > 1.5 * useful(small())


def test_counts_and_bounds():
    found = small(candidate_bits=(2, 4, 8))
    assert len(found) <= 80
    assert {b for e in found.all() for b in e.plan.values()} == {2, 4, 8}
    assert all(type(b) is int for e in found.all() for b in e.plan.values())


def test_initial_plans_are_evaluated():
    plans = [dict.fromkeys(GENES, bits) for bits in (8, 2)]
    found = small(initial=plans, generations=1)
    assert [item.plan for item in found.all()[:2]] == plans


def test_interrupted_search_goes_on(tmp_path):
    path = tmp_path / "search.json"
    calls = []

    def interrupted(plan):
        calls.append(plan)
        if len(calls) == 35:
            raise KeyboardInterrupt
        return evaluate(plan)

    evolution = nsga2.Evolution(population=10, generations=8, seed=3)
    options = {"checkpoint": path, "progress": False, "evolution": evolution}
    with pytest.raises(KeyboardInterrupt):
        nsga2.search(interrupted, GENES, **options)
    kept = len(json.loads(path.read_text())["evaluations"])
    assert kept == 30  # three generations
    found = nsga2.search(interrupted, GENES, **options)
    assert found.all() == small().all()
    # The fourth generation's plans are kept as well; one is made again, to see
    # that it comes out as it did.
    assert len(calls) == 35 + len(found) - (kept + 4) + 1
    options["evolution"] = replace(evolution, generations=9)
    longer = nsga2.search(evaluate, GENES, **options)
    assert longer.all()[: len(found)] == found.all()


def test_checkpoints_of_others_are_refused(tmp_path):
    path = tmp_path / "search.json"
    small(checkpoint=path, settings={"task": "digits"})
    with pytest.raises(ValueError, match="its task differ"):
        small(checkpoint=path, settings={"task": "words"})
    with pytest.raises(ValueError, match="its seed differ"):
        small(checkpoint=path, seed=9)
    with pytest.raises(ValueError, match="its genes differ"):
        nsga2.search(
            lambda plan: (1, 1), ["another"], checkpoint=path, progress=False
        )
    for content in ("", "[]", "{}", '{"settings": {}, "evaluations": [1]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="no checkpoint of a search"):
            small(checkpoint=path)


def test_clear_errors(monkeypatch):
    with pytest.raises(ValueError, match="for the plan"):
        nsga2.homogeneous(lambda plan: (float("nan"), 1), ["a"])
    with pytest.raises(ValueError, match="candidate bits rise"):
        small(candidate_bits=(8, 2))
    with pytest.raises(ValueError, match="plan of another network"):
        small(initial=[{"gene0": 2}])
    with pytest.raises(ValueError, match="scores alone take 37"):
        nsga2.additive_search(evaluate, GENES, budget=30)
    with pytest.raises(ValueError, match="none twice"):
        nsga2.homogeneous(evaluate, ["a", "a"])
    monkeypatch.setitem(sys.modules, "pymoo.algorithms.moo.nsga2", None)
    with pytest.raises(ImportError, match=r"speechbrain_mpq\[search\]"):
        small()


def test_hypervolume_is_what_counting_gives():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 20, (8, 2))
    items = [nsga2.Evaluation({}, *map(int, point)) for point in points]
    cells = [
        any(e <= x and s <= y for e, s in points)
        for x in range(20)
        for y in range(20)
    ]
    assert nsga2.hypervolume(items, (20, 20)) == sum(cells)
    assert nsga2.hypervolume([], (1, 1)) == 0


def test_plots(tmp_path):
    found = small()
    nsga2.plot_fronts({"NSGA-II": found.all()}, tmp_path / "fronts.png")
    nsga2.plot_genomes(found.front(), tmp_path / "genomes.svg")
    assert (tmp_path / "fronts.png").stat().st_size > 1000
    assert (tmp_path / "genomes.svg").stat().st_size > 1000
    with pytest.raises(ValueError, match="two plans"):
        nsga2.plot_genomes(found.front()[:1], tmp_path / "none.png")


def test_knows_no_task():
    """The search imports nothing of models or speech."""
    import ast
    from pathlib import Path

    tree = ast.parse(Path(nsga2.__file__).read_text(encoding="utf-8"))
    modules = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    }
    assert modules == {"utils", "sharing"}


def test_scores_of_another_loss_are_what_is_added_up():
    """An `Evaluations` without any yet counts as no score nowhere."""
    scores = nsga2.Evaluations(lambda plan: (0.0, plan["gene0"]), GENES)
    found = nsga2.additive_search(evaluate, GENES, 40, score=scores)
    assert len(scores) == 1 + 6 * len(GENES)
    assert len(found) <= 40 - len(scores)


def test_smallest_within():
    found = small()
    chosen = nsga2.smallest_within(found.all(), 0.2)
    assert chosen in found.front() and chosen.error <= 0.2
    assert nsga2.smallest_within(found.all(), -1) is None


def test_evaluations_until_a_volume():
    found, corner = small().all(), (1.0, 48)
    whole = nsga2.hypervolume(found, corner)
    count = nsga2.evaluations_until(whole, found, corner)
    assert nsga2.hypervolume(found[:count], corner) == whole
    assert nsga2.hypervolume(found[: count - 1], corner) < whole
    assert nsga2.evaluations_until(0, found, corner) == 0
    assert nsga2.evaluations_until(whole + 1, found, corner) is None
