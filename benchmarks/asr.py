"""The recognizer at mixed and uniform precision of the same bytes.

> python benchmarks/asr.py --bits 8 4 3 2.5 2

Post-training, by the steps of `speechbrain-mpq quantize`: KL scores on clean
training utterances, the best plan for an average of so many bits, calibrated
rounding. Each plan has a uniform one of the same bytes (where the bits are
whole) with the same tables and rounding. Words are counted on the clean test
utterances and on the same ones in unseen rooms, one by one, and compared with
full precision and with each other by MAPSSWE.

Needs the corpus in data/embedded (`make demo` makes it). What is in the
output file already is not measured again.
"""

import argparse
import importlib.util
import time
from pathlib import Path

import numpy as np
import torch

from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.evaluation.significance import mapsswe
from speechbrain_mpq.ptq.calibration_data import (
    Example,
    evenly_spaced,
    read_items,
    read_manifest,
)
from speechbrain_mpq.ptq.interface_outputs import CTCOutputs
from speechbrain_mpq.ptq.pretrained import (
    CANDIDATES,
    InterfaceCalibration,
)
from speechbrain_mpq.ptq.pretrained_folder import (
    find_class,
    load_interface,
    packable,
)
from speechbrain_mpq.ptq.task_metrics import WordErrorRate, divergence
from speechbrain_mpq.quantization.plan import BitPlan, Scheme, Selection
from speechbrain_mpq.quantization.quant_api import dequantize_, quantize_
from speechbrain_mpq.simulation.rooms import RoomBank
from speechbrain_mpq.training.choose import scorer_of
from speechbrain_mpq.training.rounding import CalibratedRounding
from speechbrain_mpq.utils import read_json, write_json

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/Embedded/ASR/CTC/train.py"
CODEBOOK = "midrise"
RATE = 16000
SEED = 1234  # of the recipe, whose reverberant test set this is


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--bits", type=float, nargs="+", default=[8, 4, 3, 2.5, 2]
    )
    parser.add_argument("--source", default=ROOT / "pretrained/asr_mini")
    parser.add_argument("--data", type=Path, default=ROOT / "data/embedded")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--test-items", type=int)
    parser.add_argument("--rooms", type=int, default=100)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/asr.json"
    )
    return parser.parse_args()


def test_sets(options):
    """Items by name: clean, and reverberant as in the recipe."""
    entries = read_manifest(options.data / "test_speech.json")
    clean = read_items(evenly_spaced(entries, options.test_items), RATE)
    spec = importlib.util.spec_from_file_location("ctc_recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    bank = RoomBank(options.data, "test", options.rooms)
    augment = recipe.RoomAugment(bank, False, {"seed": SEED})
    reverberant = []
    for item in clean:
        audio = augment(item.audio.numpy(), item.key, True)
        audio = torch.from_numpy(audio.astype(np.float32))
        reverberant.append(Example(item.key, audio, item.entry))
    return {"clean": clean, "reverberant": reverberant}


def load(options):
    """The recognizer, and its comparison on calibration items."""
    interface, _ = load_interface(find_class("EncoderASR"), options.source)
    entries = read_manifest(options.data / "train_speech.json")
    items = read_items(evenly_spaced(entries, options.items), RATE)
    return interface, CTCOutputs(interface, items)


def score(options):
    """The score table; kept beside the results."""
    path = options.out.with_name("asr_scores.json")
    if path.exists():
        return ScoreTable.load(path)
    interface, comparison = load(options)
    modules, _ = packable(interface)
    calibration = InterfaceCalibration(comparison, modules)
    selection = Selection(calibration.chosen_names())
    scheme = Scheme(codebook=CODEBOOK)
    scorer, network, values = calibration.prepared(
        scorer_of("kl", scheme, CANDIDATES)
    )
    table = scorer.score(network, values, selection)
    table = calibration.completed(table, scorer)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.save(path)
    return table


def plans(table, bits):
    """System name -> plan; None is full precision."""
    found = {"full precision": None}
    for average in bits:
        mixed = allocate_bits(
            table, average_bits=average, min_bits=min(CANDIDATES)
        )
        found[f"mixed {average:g}"] = mixed
        if average == int(average):
            found[f"uniform {average:g}"] = BitPlan.uniform(
                mixed.clusters, int(average), mixed.rest_parameters, CODEBOOK
            )
    return found


def measure(options, plan, tests):
    """All numbers of one system."""
    interface, comparison = load(options)
    entry, started = {"bits": 32, "kl": 0.0}, time.perf_counter()
    if plan:
        reference, _ = load_interface(type(interface), options.source)
        rounding = CalibratedRounding(
            InterfaceCalibration(comparison, interface.mods)
        )
        quantize_(interface.mods, plan)
        rounding.apply_()
        dequantize_(interface.mods, keep_quantized=True)
        entry["bits"] = plan.average_bits
        entry["bytes"] = plan.bytes
        entry["kl"] = divergence(comparison.of(reference), interface)
        entry["rounding_seconds"] = round(time.perf_counter() - started, 1)
    for name, items in tests.items():
        quality = WordErrorRate()(interface, items)
        wrong = {
            key: hypothesis
            for key, (reference, hypothesis) in quality.pairs.items()
            if hypothesis != reference
        }
        entry[name] = {"wer": quality.value, "wrong": wrong}
    return entry


def significance(results, tests, first, second):
    """p values of two systems by test set."""
    found = {}
    for name, items in tests.items():
        one, two = (results[s][name]["wrong"] for s in (first, second))
        references = {item.key: item.entry["words"] for item in items}
        found[name] = mapsswe(
            (words, one.get(key, words), two.get(key, words))
            for key, words in references.items()
        ).p
    return found


def compare(results, tests):
    """Add what MAPSSWE says of every system."""
    for system, entry in results.items():
        against = {"full precision": "full precision"}
        if system.startswith("mixed"):
            against["uniform"] = system.replace("mixed", "uniform")
        entry["p"] = {
            label: significance(results, tests, system, other)
            for label, other in against.items()
            if other in results and other != system
        }


def show(results):
    """Print the table."""
    print(f"{'system':16} {'bits':>5} {'bytes':>8} {'KL':>8} ", end="")
    print(f"{'clean':>6} {'p':>6} {'rev.':>6} {'p':>6} {'p uniform':>12}")
    for system, entry in results.items():
        p = entry["p"].get("full precision", {})
        uniform = entry["p"].get("uniform", {})
        cells = [f"{uniform[k]:.2g}" for k in uniform]
        print(
            f"{system:16} {entry['bits']:5.2f} {entry.get('bytes', 0):8d} "
            f"{entry['kl']:8.5f} {entry['clean']['wer']:6.2f} "
            f"{p.get('clean', 1):6.2g} {entry['reverberant']['wer']:6.2f} "
            f"{p.get('reverberant', 1):6.2g} {' / '.join(cells):>12}"
        )


def main():
    """Score, plan, measure, compare."""
    options = parse()
    torch.set_num_threads(1)
    tests = test_sets(options)
    results = read_json(options.out) if options.out.exists() else {}
    for system, plan in plans(score(options), options.bits).items():
        if system not in results:
            results[system] = measure(options, plan, tests)
            write_json(options.out, results)
    compare(results, tests)
    write_json(options.out, results)
    show(results)


if __name__ == "__main__":
    main()
