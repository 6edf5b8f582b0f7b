"""What a quantizer in the hparams costs in training, and to attach.

> python benchmarks/plug_in_cost.py

Steps of the recipe recipes/Embedded/ASR/CTC as its own Brain takes them, with
and without the YAML's block, in turns on the same batches. What is compared is
CPU time of the process, since others may run on the machine, and every step
with the plain one of its own turn; the median of these ratios is given with
its quartiles. Attaching to a Conformer of 104 M parameters happens in
processes of its own, without the settings of malloc that speed up this
repository's runs.

Needs the corpus in data/embedded (`make demo` makes it).
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from plug_in import setting
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR

from speechbrain_mpq import Quantizer
from speechbrain_mpq.utils import write_json

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/Embedded/ASR/CTC"
ROOMS = {"train": 25, "valid": 25, "test": 25}  # few suffice here
NOT_NORMS = {"exclude": ["*norm*", "*.bias"]}
BLOCKS = {  # name -> quantizer of the recipe's modules
    "plain": None,
    "weights": partial(Quantizer, bits=4, **NOT_NORMS),
    "all": partial(Quantizer, bits=4),
}
CONFORMER = {
    "tgt_vocab": 5000,
    "input_size": 640,
    "d_model": 512,
    "nhead": 8,
    "num_encoder_layers": 12,
    "num_decoder_layers": 6,
    "d_ffn": 2048,
    "encoder_module": "conformer",
    "attention_type": "RelPosMHAXL",
    "kernel_size": 31,
    "normalize_before": True,
}


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data/embedded")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--conformers", type=int, default=3)
    parser.add_argument("--one_conformer", action="store_true")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks/results/plug_in_cost.json",
    )
    return parser.parse_args(arguments)


def recipe_module():
    """The recipe's train.py as a module."""
    spec = importlib.util.spec_from_file_location("ctc", RECIPE / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_hparams(options, folder):
    """The recipe's hyper-parameters."""
    overrides = {
        "data_folder": str(options.data),
        "output_folder": folder,
        "rooms": ROOMS,
    }
    with open(RECIPE / "hparams/train.yaml", encoding="utf-8") as source:
        return load_hyperpyyaml(source, overrides)


def ready_brain(recipe, hparams, block):
    """The recipe's Brain, about to take a step."""
    if block:
        hparams["quantizer"] = block(hparams["modules"])
    brain = recipe.ASR(
        hparams["modules"], hparams["optimizer"], hparams, {"device": "cpu"}
    )
    brain.on_fit_start()
    brain.modules.train()
    return brain


def brains_and_batches(options, folder):
    """A Brain for every block, and batches that all can take."""
    recipe, brains = recipe_module(), {}
    for name, block in BLOCKS.items():
        hparams = read_hparams(options, folder)
        brains[name] = ready_brain(recipe, hparams, block)
    data = recipe.dataio_prep(hparams)["train"]  # of the last, as of all
    loading = recipe.train_loader_options(data, hparams)
    stage = sb.Stage.TRAIN
    loader = brains["plain"].make_dataloader(data, stage, None, **loading)
    return brains, [b for _, b in zip(range(options.batches), loader)]


def in_turns(calls, rounds):
    """CPU seconds of each call, in every round; the first one warms up.

    Arguments
    ---------
    calls : dict
        Name -> function.
    rounds : int
        Those that count.

    Returns
    -------
    seconds : dict
        Name -> list. The order is reversed from round to round.
    """
    seconds = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            started = time.process_time()
            calls[name]()
            if number:
                seconds[name].append(time.process_time() - started)
    return seconds


def compared(seconds):
    """Median seconds, and how much more than the first in %, with quartiles."""
    plain, rows = next(iter(seconds.values())), {}
    for name, own in seconds.items():
        more = [100 * (a / b - 1) for a, b in zip(own, plain, strict=True)]
        row = {"seconds": median(own), "more_percent": median(more)}
        low, _, high = quantiles(more)
        rows[name] = {**row, "quartiles": [low, high]}
    return rows


def training(brains, batches, rounds):
    """CPU seconds of a step, in turns, and what the blocks add."""
    seconds = {name: [] for name in brains}
    for batch in batches:
        calls = {
            name: partial(brain.fit_batch, batch)
            for name, brain in brains.items()
        }
        for name, own in in_turns(calls, rounds).items():
            seconds[name] += own
    return compared(seconds)


def mib(key):
    """Memory of this process: VmRSS is what it has, VmHWM the most so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = [x for x in status.splitlines() if x.startswith(f"{key}:")]
    return int(line.split()[1]) / 1024


def attach():
    """Quantize the Conformer; print CPU seconds and memory as JSON."""
    torch.set_num_threads(1)
    before = mib("VmRSS")
    model = TransformerASR(**CONFORMER)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    parameters = sum(p.numel() for p in model.parameters())
    started = time.process_time()
    plan = Quantizer({"asr": model}, bits=4).plan
    seconds = time.process_time() - started
    weights = 4 * parameters / 2**20
    row = {"parameters": parameters, "cpu_seconds": seconds}
    row |= {"weights_mib": weights, "plan_bytes": plan.bytes}
    print(json.dumps({**row, "times": (mib("VmHWM") - before) / weights}))


def attached(count):
    """Some processes that attach: medians."""
    kept = {k: v for k, v in os.environ.items() if "MALLOC" not in k}
    command = [sys.executable, __file__, "--one_conformer"]
    rows = []
    for _ in range(count):
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=kept
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: median(row[key] for row in rows) for key in rows[0]}


def main(arguments=None):
    """Measure, print, write."""
    options = parse(arguments)
    if options.one_conformer:
        return attach()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        brains, batches = brains_and_batches(options, folder)
        counts = {"rounds": options.rounds, "batches": len(batches)}
        rows = training(brains, batches, options.rounds)
    for name, row in rows.items():
        low, high = row["quartiles"]
        print(f"{name:9}{row['seconds']:7.3f} s CPU a step", end="")
        print(f"{row['more_percent']:+7.1f} % ({low:+.1f} to {high:+.1f})")
    report = {**setting(), **counts, "training": rows}
    report["conformer"] = attached(options.conformers)
    print("conformer", json.dumps(report["conformer"]))
    write_json(options.out, report)


if __name__ == "__main__":
    main()
