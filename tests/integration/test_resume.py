"""The main job as processes: killed and started again, and two at once."""

import json
import os
import signal
import subprocess
import time

import pytest
from helpers import ROOT, command, finished, quality, run

from speechbrain_mpq.inference.verification import check_folder


@pytest.mark.parametrize("within_epoch", [False, True])
def test_killed_run_ends_like_an_uninterrupted_one(
    folder, shipped, kl, within_epoch
):
    options = {"pretrained_separator": shipped, "against": "[]"}
    options["results_folder"] = folder / f"again_{within_epoch}"
    if within_epoch:
        options["ckpt_interval_steps"] = 1
    process = subprocess.Popen(
        command(folder, "kl_4bit.yaml", **options),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    other = options["results_folder"] / "kl_4bit/1234"
    deadline = time.time() + 120
    wanted = f"end-of-epoch: {'false' if within_epoch else 'true'}"
    while not any(
        wanted in meta.read_text()
        for meta in other.glob("save/CKPT*/CKPT.yaml")
    ):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (other / "metrics.json").exists()
    run(folder, "kl_4bit.yaml", **options)
    assert (other / "plan.json").read_text() == ((kl / "plan.json").read_text())
    ours, theirs = quality(other), quality(kl)
    theirs.pop("mapsswe")
    assert ours == theirs


def test_two_processes_choose_the_same_bits(folder, shipped, kl):
    line = command(
        folder,
        "kl_4bit.yaml",
        system="two",
        pretrained_separator=shipped,
        against="[]",
        distributed_backend="gloo",
    )
    start = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    start += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    finished([line[0], *start, *line[1:]])
    two = folder / "results/two_4bit/1234"
    assert (two / "plan.json").read_text() == ((kl / "plan.json").read_text())
    scores, expected = (
        json.loads((path / "scores.json").read_text()) for path in (two, kl)
    )
    assert scores["clusters"] == expected["clusters"]
    assert check_folder(two / "packed") == []
    assert json.loads((two / "metrics.json").read_text())["system"] == "two"
