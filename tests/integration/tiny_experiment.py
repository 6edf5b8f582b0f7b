"""train.py at tiny size, for the tests beside this file."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/data/separator_tiny.yaml"
SIZES = """
utterances: {train: 24, valid: 8, test: 12}
rooms: {train: 25, valid: 25, test: 25}
mixtures: {train: 16, valid: 4, test: 8}
number_of_epochs: 2
calibration_mixtures: 2
chunk_seconds: 1.0
batch_size: 4
examples: 2
workers: 1
"""


def command(folder, hparams, **options):
    """The command line, with tiny sizes."""
    options = {
        **dict(line.split(": ", 1) for line in SIZES.strip().splitlines()),
        "separator_file": TINY,
        "data_folder": folder / "data",
        "results_folder": folder / "results",
        **options,
    }
    line = [sys.executable, "train.py", f"hparams/{hparams}", "--device=cpu"]
    for key, value in options.items():
        line += [f"--{key}", str(value)]
    return line


def run(folder, hparams, **options):
    """Run the command to its end; its output is returned."""
    return finished(command(folder, hparams, **options))


def finished(line):
    """Output of a command line that ends well."""
    done = subprocess.run(
        list(map(str, line)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(folder, hparams, **options):
    """Run the command, which must fail; its output is returned."""
    line = command(folder, hparams, **options)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stdout + done.stderr


def quality(path):
    """metrics.json without what depends on the machine's speed."""
    metrics = json.loads((path / "metrics.json").read_text())
    for key in ("wall_seconds", "seconds_per_hour"):
        metrics.pop(key)
    return metrics


def train_losses(folder):
    """Training loss of each epoch in a folder of results."""
    log = (folder / "1234/train_log.txt").read_text()
    return [
        float(line.split("train loss: ")[1].split()[0])
        for line in log.splitlines()
    ]
