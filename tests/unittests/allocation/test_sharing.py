"""Work that processes share, and that a kill does not lose.

Run as a script under torchrun, this file is one of the processes.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from speechbrain.utils.distributed import ddp_init_group
from torch.utils.data import DataLoader

from speechbrain_mpq.allocation import sharing
from speechbrain_mpq.allocation.analysis import write_additivity
from speechbrain_mpq.allocation.baselines import WeightErrorScores
from speechbrain_mpq.allocation.hessian import HessianScores
from speechbrain_mpq.allocation.nsga2 import (
    Evolution,
    additive_search,
    greedy_descent,
    homogeneous,
    random_search,
    search,
)
from speechbrain_mpq.allocation.output_scores import (
    KLScores,
    LossScores,
    OutputErrorScores,
    RefinedScores,
    WeightedErrorScores,
)
from speechbrain_mpq.allocation.plan_search import PlanObjectives
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.training.calibration import calibration_batches
from speechbrain_mpq.utils import read_json

BITS = (2, 4, 8)
ROOT = Path(__file__).parents[3]
SCORERS = {
    "kl": KLScores(BITS, chunk=2),
    "kl given a plan": KLScores(BITS, chunk=2, given=3),
    "refined": RefinedScores(KLScores(BITS, chunk=3), 3.5, rounds=1),
    "output_error": OutputErrorScores(BITS, chunk=1),
    "weighted_error": WeightedErrorScores(BITS, chunk=2),
    "loss": LossScores(BITS, chunk=2),
    "hessian": HessianScores(BITS, probes=3),
    "differences": HessianScores(
        BITS, probes=3, differences=True, distribution="rademacher"
    ),
    "weight_error": WeightErrorScores(BITS),
}
SEARCHES = {
    "nsga2": search,
    "random": lambda *given, **more: random_search(*given[:2], 20, **more),
    "greedy": lambda *given, **more: greedy_descent(*given[:2], 20, **more),
    "additive": lambda *given, **more: additive_search(*given[:2], 40),
    "homogeneous": lambda *given, **more: homogeneous(*given[:2]),
}


def problem(seed=1):
    """A network, and what scorers need; it is smooth, but in one place."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv1d(4, 6, 1), nn.PReLU(), nn.Conv1d(6, 6, 3, padding=1)),
        *(nn.Tanh(), nn.Conv1d(6, 4, 1)),
    )
    torch.manual_seed(seed)
    targets = torch.randn(7, 4, 9)

    def loss(output, items):
        return (output - targets[items]).square().sum()

    return network, {
        "inputs": torch.randn(7, 4, 9),
        "weights": torch.rand(7, 2, 9),
        "loss": loss,
    }


def table(name, folder=None, seed=1):
    """What a scorer finds, but for how long it took."""
    network, values = problem(seed)
    scorer = SCORERS[name]
    needed = [values[need] for need in scorer.needs]
    found = scorer(network, *needed, progress=False, folder=folder)
    found.details.pop("seconds", None)
    return [found.scores, found.details]


def searched(name, folder=None):
    """All plans that a search evaluates, with their values."""
    network, values = problem()
    wanted = network(values["inputs"]).detach()

    def measure(model):
        return (model(values["inputs"]) - wanted).square().mean().item()

    objectives = PlanObjectives(network, measure, BITS)
    options = {} if folder is None else {"checkpoint": folder / f"{name}.json"}
    if name == "nsga2":
        options["evolution"] = Evolution(population=6, generations=4)
    found = SEARCHES[name](objectives, objectives.genes, BITS, **options)
    return [list(item) for item in found.all()]


def additivity(folder):
    """Measured scores of whole plans beside what the table predicts."""
    network, values = problem()
    scorer = SCORERS["kl"]
    given = network, values["inputs"]
    found = scorer(*given, progress=False)
    plan = allocate_bits(found, average_bits=3.5)
    folder.mkdir(exist_ok=True)
    write_additivity(folder, found, plan, scorer, network, given[1:])


def as_json(value):
    """What it is in a file: keys are strings."""
    return json.loads(json.dumps(value))


def on_two_processes(folder, kill_after=0):
    """Run this file on two processes."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "KILL_AFTER": str(kill_after),
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc_per_node=2", "--rdzv_backend=c10d"),
            *("--rdzv_endpoint=localhost:0", __file__, str(folder)),
        ],
        capture_output=True,
        text=True,
        env=environment,
    )


def is_process(folder):
    """What each of the processes does."""
    ddp_init_group({"distributed_backend": "gloo"})
    torch.set_num_threads(1)
    rank, count = sharing.process()
    assert count == 2
    kill_after = int(os.environ["KILL_AFTER"])
    if kill_after:
        return killed(folder, kill_after)
    found = {name: table(name, folder / name) for name in SCORERS}
    found |= {name: searched(name, folder) for name in SEARCHES}
    additivity(folder / "plans")
    # Each has other data, and all look at the main process's.
    batches = calibration_batches(None, DataLoader([rank] * 3), 2)
    found["batches"] = [int(batch) for batch in batches]
    try:
        table("kl", seed=2 + rank)
    except ValueError as error:
        found["refusal"] = str(error)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    sharing.leave()
    assert not torch.distributed.is_initialized()


def killed(folder, after):
    """The second process is killed when it has found some results."""
    plain = sharing.ResultLog.add

    def add(log, *result):
        plain(log, *result)
        add.count += 1
        if sharing.process()[0] == 1 and add.count == after:
            os.kill(os.getpid(), signal.SIGKILL)

    add.count = 0
    sharing.ResultLog.add = add
    table("kl", folder)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two processes have found and left."""
    folder = tmp_path_factory.mktemp("shared")
    done = on_two_processes(folder)
    assert not done.returncode, done.stderr[-3000:]
    ranks = [
        json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)
    ]
    return folder, *ranks


@pytest.mark.parametrize("name", SCORERS)
def test_two_processes_find_the_table_of_one(name, shared):
    _, *ranks = shared
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = as_json(table(name))
    torch.set_num_threads(threads)
    assert ranks[0][name] == expected
    assert ranks[1][name] == expected


def test_two_processes_measure_plans_as_one(shared, tmp_path):
    folder, *_ = shared
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    additivity(tmp_path)
    torch.set_num_threads(threads)
    expected = read_json(tmp_path / "additivity.json")
    assert len(expected) == 1 + len(BITS)
    assert read_json(folder / "plans" / "additivity.json") == expected


@pytest.mark.parametrize("name", SEARCHES)
def test_two_processes_evaluate_the_plans_of_one(name, shared):
    _, *ranks = shared
    expected = as_json(searched(name))
    assert len(expected) > 2
    assert ranks[0][name] == expected
    assert ranks[1][name] == expected


@pytest.mark.parametrize("name", ["kl", "loss", "kl given a plan"])
def test_each_process_does_half(name, shared):
    folder, *_ = shared
    files = sorted((folder / name).glob("*.jsonl"))
    counts = [len(path.read_text().splitlines()) for path in files]
    # Four chunks: two witnesses, which both compute, and all else once.
    assert len(counts) == 2
    assert sum(counts) == 4 * (1 + 4) + 2
    assert min(counts) >= 5  # how many depends on what each one takes


def test_calibration_batches_are_those_of_the_main_process(shared):
    _, *ranks = shared
    assert [rank["batches"] for rank in ranks] == [[0, 0], [0, 0]]


def test_other_data_in_a_process_is_refused(shared):
    _, *ranks = shared
    for rank in ranks:
        assert "find other results" in rank["refusal"]
        assert "the same data" in rank["refusal"]


def test_a_killed_process_loses_nothing(tmp_path, monkeypatch):
    done = on_two_processes(tmp_path, kill_after=6)
    assert done.returncode
    kept = {
        line.rpartition("],")[0]
        for path in tmp_path.glob("*.jsonl")
        for line in path.read_text().splitlines()
    }
    own = next(tmp_path.glob("*.1.jsonl")).read_text().splitlines()
    assert len(own) == 6
    added, plain = [], sharing.ResultLog.add

    def add(log, name, result):
        added.append(name)
        plain(log, name, result)

    monkeypatch.setattr(sharing.ResultLog, "add", add)
    found = table("kl", tmp_path)
    assert len(added) == 4 * (1 + 4) - len(kept)
    monkeypatch.undo()
    assert found == table("kl")


def test_shares_are_even_and_of_neighbours():
    costs = {number: 1.0 + number % 3 for number in range(50)}
    for count in (1, 2, 3, 7):
        parts = sharing.shares(costs, count)
        assert [name for part in parts for name in part] == list(costs)
        sums = [sum(costs[name] for name in part) for part in parts]
        assert max(sums) - min(sums) <= 2 * 3.0
    assert sharing.shares({"a": 0.0}, 2) == [["a"], []]
    assert sharing.shares({}, 2) == [[], []]


def test_a_line_that_was_cut_short_is_made_again(tmp_path):
    log = sharing.ResultLog(tmp_path, 0)
    values = [0.1 + 0.2, 1e-300, float("inf"), float("nan")]
    log.add("a", values)
    log.add((1, "b"), "text")
    log.close()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    log = sharing.ResultLog(tmp_path, 0)
    assert list(log.known) == ["a"]
    assert repr(log.known["a"]) == repr(values)
    log.add((1, "b"), "text")
    log.close()
    assert path.read_bytes() == whole
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="delete it"):
        sharing.ResultLog(tmp_path, 0)
    sharing.ResultLog(tmp_path, 1).add("a", 0)
    assert len(list(tmp_path.iterdir())) == 2


def test_results_of_other_data_are_made_anew(tmp_path, caplog):
    first = table("differences", tmp_path)
    added = []

    class Log(sharing.ResultLog):
        def add(self, name, result):
            added.append(name)
            super().add(name, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speechbrain_mpq.allocation.hessian.ResultLog", Log)
        assert table("differences", tmp_path) == first
        assert not added
        other = table("differences", tmp_path, seed=5)
    assert "of other weights or data" in caplog.text
    assert other == table("differences", seed=5) != first
    assert len(added) > 30


if __name__ == "__main__":
    is_process(Path(sys.argv[1]))
