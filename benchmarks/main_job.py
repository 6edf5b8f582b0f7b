"""Time and memory of the main job on this machine.

> python benchmarks/main_job.py

Everything is made anew in a temporary folder: import, preparation of the test
set, the whole of `train.py hparams/kl_4bit.yaml` with its baselines. Prints a
table; the limits beside the figures are those that the project set itself for
two cores.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from speechbrain_mpq.evaluation.task import markdown_table

ROOT = Path(__file__).parents[1]
COUNTS = {"train": 0, "valid": 0}


def import_seconds(repeats=5):
    """Median seconds that importing everything public adds to torch."""
    everything = (
        "import speechbrain_mpq as m; [getattr(m, n) for n in m.__all__]"
    )
    added = []
    for _ in range(repeats):
        code = (
            "import time, torch; start = time.perf_counter(); "
            f"{everything}; print(time.perf_counter() - start)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True
        )
        added.append(float(done.stdout))
    return statistics.median(added)


def preparation_seconds(folder):
    """Seconds to make speech and rooms of the test set."""
    from speechbrain_mpq.lobes.models.separator import build_separator
    from speechbrain_mpq.simulation.corpus import prepare_speech
    from speechbrain_mpq.simulation.rooms import prepare_rooms

    separator = build_separator(ROOT / "hparams/models/separator_mini.yaml")
    start = time.perf_counter()
    prepare_speech(folder, **COUNTS, test=400, progress=False)
    microphones = separator.features.microphones
    prepare_rooms(folder, {"test": 100}, microphones, progress=False)
    return time.perf_counter() - start


def process_tree_bytes(root):
    """Proportional memory of a process and its descendants, in bytes."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            tasks = Path(f"/proc/{pid}/task").iterdir()
            for task in tasks:
                waiting += (task / "children").read_text().split()
        except OSError:  # ended meanwhile
            continue
        line = next(x for x in rollup.splitlines() if x.startswith("Pss:"))
        total += 1024 * int(line.split()[1])
    return total


def main_job(folder):
    """Wall seconds, peak bytes and stage times of the main job."""
    command = [sys.executable, "train.py", "hparams/kl_4bit.yaml"]
    command += ["--device=cpu", "--results_folder", f"{folder}/results"]
    command += ["--data_folder", f"{folder}/data"]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    ended = threading.Event()
    threading.Thread(target=lambda: (process.wait(), ended.set())).start()
    while not ended.wait(0.5):
        peak = max(peak, process_tree_bytes(process.pid))
    if process.returncode:
        raise SystemExit(f"the main job failed with {process.returncode}")
    times = json.loads(
        Path(folder, "results/kl_4bit/1234/times.json").read_text()
    )
    return time.perf_counter() - start, peak, times


def main():
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [("import beyond torch, s", import_seconds(), 0.3)]
        seconds = preparation_seconds(f"{folder}/test")
        rows.append(("preparation of the test set, s", seconds, 180))
        wall, peak, times = main_job(folder)
        rows.append(("main job with preparation and baselines, s", wall, 720))
        rows.append(("peak memory, GiB", peak / 2**30, 4))
        rows.append(("scoring, s", times["scores"], 60))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    )
    rows = [(name, f"{value:.2f}", limit) for name, value, limit in rows]
    print(markdown_table(("what", "measured", "limit"), rows), end="")


if __name__ == "__main__":
    main()
