"""The runner of all systems: order, failures, what is finished already."""

import importlib.util
import json
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


STUB = """
import json, os, sys
from pathlib import Path

file, *options = sys.argv[1:]
given = dict(zip(options[::2], options[1::2]))
name = Path(file).stem.split("_")[0]
bits, seed = int(given["--bits"]), int(given["--seed"])
results = Path(given["--results_folder"])
with open(results / "calls.txt", "a") as calls:
    calls.write(f"{name} {bits} {seed} {given.get('--lr', '')}\\n")
if "--refuse" in given and name == given["--refuse"]:
    print("unknown option --refuse")
    sys.exit(2)
if name == given.get("--fail") or os.environ["OMP_NUM_THREADS"] != "1":
    sys.exit("broken on purpose")
folder = results / f"{name}_{bits}bit" / str(seed)
folder.mkdir(parents=True, exist_ok=True)
if (folder / "metrics.json").exists():
    sys.exit()
block = {"si_snr": 8.0, "pesq": 2.0, "wer": 25.0}
bucket = {**block, "n": 1, "si_snr_mixture": 0.0, "words": 4}
buckets = dict.fromkeys(["0-15", "15-45", "45-90", "90-180"], bucket)
metrics = {"system": name, "bits": bits, "seed": seed, "test_set": "abc",
           "buckets": buckets, "average": block}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture(scope="module")
def table1():
    spec = importlib.util.spec_from_file_location(
        "table1", ROOT / "benchmarks/table1.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["table1"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["table1"]


@pytest.fixture
def run(table1, tmp_path, monkeypatch):
    """Run the script with a stub in place of train.py."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments):
        program = (sys.executable, str(stub))
        folder = ["--results_folder", str(tmp_path)]
        return table1.main([*folder, *arguments], program)

    return run


def test_all_systems_of_the_paper_in_order(run, tmp_path, capsys):
    assert run("--seed", "7", "--lr", "0.1") == 0
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert calls == [
        f"{system} {bits} 7 0.1"
        for system, widths in (
            ("fp32", [32]),
            ("uniform", [2, 4, 8, 16]),
            ("hes", [4, 8]),
            ("kl", [4, 8]),
            ("nas", [4, 8]),
        )
        for bits in widths
    ]
    lines = capsys.readouterr().out.splitlines()
    assert "[ 1/11] fp32_32bit, seed 7: done in" in lines[0]
    assert lines[-1].split()[:3] == ["11", "nas", "8"]
    assert run("--seed", "7") == 0
    assert "seed 7: finished already" in capsys.readouterr().out


def test_a_failing_system_does_not_stop_the_others(run, tmp_path, capsys):
    assert run("--jobs", "3", "--fail", "uniform") == 1
    printed = capsys.readouterr()
    assert "4 of 11 failed: uniform_2bit (seed 1234)" in printed.err
    assert printed.out.count("FAILED with status 1") == 4
    assert printed.out.splitlines()[-1].split()[:3] == ["7", "nas", "8"]
    log = tmp_path / "logs" / "uniform_4bit_1234.log"
    assert "broken on purpose" in log.read_text()


def test_what_is_refused_stops_all_with_its_reason(run, tmp_path, capsys):
    assert run("--refuse", "uniform") == 2
    assert capsys.readouterr().err == "stopped: unknown option --refuse\n"
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert [call.split()[:2] for call in calls] == [
        ["fp32", "32"],
        ["uniform", "2"],
    ]


def test_a_broken_result_is_a_failure(run, table1, tmp_path, capsys):
    assert run() == 0
    (tmp_path / "stub.py").write_text("")  # does nothing, and leaves this:
    broken = tmp_path / "kl_4bit" / "1234" / "metrics.json"
    broken.write_text(json.dumps({"system": "kl"}))
    assert run() == 1
    assert f"{broken} is not a metrics file" in capsys.readouterr().out


def test_what_others_need_has_ended_before(table1):
    """With several at a time, nothing starts before what it waits for."""
    jobs = table1.all_jobs([1, 2])
    lock, ended, running, most = threading.Lock(), set(), set(), []

    def start(job):
        with lock:
            running.add(job)
            most.append(len(running))
            for other in jobs:
                earlier = other.stage < job.stage and other.seed == job.seed
                assert other in ended or not earlier
            assert jobs[0] in ended or job == jobs[0]
        threading.Event().wait(0.01)
        with lock:
            running.discard(job)
            ended.add(job)
        return True, ""

    assert table1.run_all(jobs, start, 4, lambda line: None) == []
    assert ended == set(jobs) and max(most) == 4


def test_after_a_failure_one_runs_at_a_time(table1):
    """Two must not run the failed baseline again at once."""
    jobs = table1.all_jobs([1])
    running, most = set(), []

    def start(job):
        running.add(job)
        if job.stage == 2:
            most.append(len(running))
        threading.Event().wait(0.01)
        running.discard(job)
        return job.bits != 16, ""

    failed = table1.run_all(jobs, start, 4, lambda line: None)
    assert [job.name for job in failed] == ["uniform_16bit"]
    assert most == [1] * 6


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--bits", "3"], "--bits is set for every system"),
        (["--output_folder=here"], "--output_folder is set"),
        (["--jobs", "0"], "at least 1"),
        (["--seed", "1", "1"], "twice"),
    ],
)
def test_options_that_make_no_sense(table1, capsys, arguments, reason):
    with pytest.raises(SystemExit):
        table1.read_options(arguments)
    assert reason in capsys.readouterr().err


def test_every_hyper_parameter_file_exists(table1):
    for path in table1.FILES.values():
        assert (ROOT / path).is_file()
