"""What calibrated rounding is worth where `choose_bits` quantizes a Brain.

> python benchmarks/plug_in.py

The recognizer pretrained/asr_mini inside a Brain with nothing but a
`compute_forward`. Validation utterances are what `choose_bits` is given; clean
test utterances are what words and KL are counted on. KL scores are made once,
by the first call, and serve all budgets. The table of docs/plug-in.md.

Needs the corpus in data/embedded (`make demo` makes it).
"""

import argparse
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.inference.ASR import EncoderASR

from speechbrain_mpq import Quantizer, choose_bits
from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.ptq.calibration_data import (
    batch_of,
    evenly_spaced,
    read_items,
    read_manifest,
)
from speechbrain_mpq.ptq.interface_outputs import CTCOutputs
from speechbrain_mpq.ptq.pretrained_folder import load_interface
from speechbrain_mpq.ptq.task_metrics import WordErrorRate, divergence
from speechbrain_mpq.quantization.quant_api import dequantize_
from speechbrain_mpq.training.rounding import ROUNDINGS
from speechbrain_mpq.utils import write_json

ROOT = Path(__file__).parents[1]
CODEBOOK = "midrise"
CANDIDATES = (1.6, 2, 3, 4, 6)
BATCH = 4  # utterances
RATE = 16000  # Hz


class Recognizer(sb.Brain):
    """As little of a Brain as `choose_bits` needs."""

    def compute_forward(self, batch, stage):
        """Log-probabilities of the characters, and lengths."""
        wavs, lengths = batch
        return self.modules.encoder(wavs, lengths), lengths


@dataclass
class KeptScores:
    """A score table that is there already, as an object that scores.

    Arguments
    ---------
    table : ScoreTable
        What it gives.
    codebook : str
        Of the table.
    """

    table: ScoreTable
    codebook: str = CODEBOOK
    needs = ()

    def __call__(self, network, **options):
        """The table, whatever is asked."""
        return self.table


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--source", default=ROOT / "pretrained/asr_mini")
    parser.add_argument("--data", type=Path, default=ROOT / "data/embedded")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--test_items", type=int, default=100)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/plug_in.json"
    )
    return parser.parse_args(arguments)


def setting():
    """What a figure needs beside it: command, day, machine."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line.split(":")[1] for line in lines if "model name" in line]
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": (names or [platform.processor()])[0].strip(),
        "cores": len(names),
        "torch": torch.__version__,
    }


def items_of(options, split, count):
    """Utterances of a split, evenly spread."""
    entries = read_manifest(options.data / f"{split}_speech.json")
    return read_items(evenly_spaced(entries, count), RATE)


def batches_of(items):
    """A loader of the utterances, in their order."""
    audio = [item.audio for item in items]
    starts = range(0, len(audio), BATCH)
    batches = [batch_of(audio[start : start + BATCH]) for start in starts]
    return torch.utils.data.DataLoader(batches, batch_size=None)


def quantized(options, loader, scores, bits, rounding, folder=None):
    """A recognizer that `choose_bits` has quantized; plan, CPU seconds."""
    interface, _ = load_interface(EncoderASR, options.source)
    modules = {"encoder": interface.mods.encoder}
    brain = Recognizer(modules, run_opts={"device": "cpu"})
    started = time.process_time()
    plan = choose_bits(
        brain,
        loader,
        scores,
        bits,
        quantizer=Quantizer(modules, bits=None, codebook=CODEBOOK),
        batches=len(loader),
        candidate_bits=CANDIDATES,
        min_bits=min(CANDIDATES),
        rounding=rounding,
        folder=folder,
        progress=False,
    )
    seconds = time.process_time() - started
    dequantize_(interface.mods, keep_quantized=True)
    return interface, plan, seconds


def score_table(options, loader):
    """KL scores of all clusters, and the CPU seconds that they took."""
    with tempfile.TemporaryDirectory() as folder:
        place = options, loader, "kl", options.bits[0], "nearest", folder
        _, _, seconds = quantized(*place)
        return ScoreTable.load(Path(folder) / "scores.json"), seconds


def measure(interface, comparison, items):
    """Word error rate in %, mean divergence in nats."""
    words = WordErrorRate()(interface, items, progress=False)
    return {"wer": words.value, "kl": divergence(comparison, interface)}


def measure_all(options, loader, table, items):
    """Every system, full precision first."""
    reference, _ = load_interface(EncoderASR, options.source)
    comparison = CTCOutputs(reference, items)
    full = {"bits": 32, **measure(reference, comparison, items)}
    yield full
    kinds = {"uniform": "uniform", "kl": KeptScores(table)}
    for bits in options.bits:
        for name, scores in kinds.items():
            for rounding in reversed(ROUNDINGS):
                place = options, loader, scores, bits, rounding
                interface, plan, seconds = quantized(*place)
                yield {
                    "bits": bits,
                    "scores": name,
                    "rounding": rounding,
                    "average_bits": plan.average_bits,
                    "bytes": plan.bytes,
                    "seconds": round(seconds, 1),
                    **measure(interface, comparison, items),
                }


def main(arguments=None):
    """Score once, measure all, print and write."""
    options = parse(arguments)
    torch.set_num_threads(1)
    loader = batches_of(items_of(options, "valid", options.items))
    items = items_of(options, "test", options.test_items)
    table, seconds = score_table(options, loader)
    report = {
        **setting(),
        "utterances": {"valid": options.items, "test": len(items)},
        "words": sum(len(item.entry["words"].split()) for item in items),
        "scoring_seconds": round(seconds, 1),
        "systems": [],
    }
    for system in measure_all(options, loader, table, items):
        report["systems"].append(system)
        name = f"{system.get('scores', 'full')} {system.get('rounding', '')}"
        print(f"{system['bits']:3} {name:20}", end="")
        print(f"{system['wer']:7.2f} %{system['kl']:9.5f} nats", end="")
        print(f"{system.get('seconds', 0):6} s", flush=True)
        write_json(options.out, report)


if __name__ == "__main__":
    main()
