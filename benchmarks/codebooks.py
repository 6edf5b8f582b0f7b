"""Tables of 2^n levels against levels by entropy, at equal bytes.

> python benchmarks/codebooks.py --bits 1.5 2 2.5 3 4
> python benchmarks/codebooks.py --plans results/best_*bit/1234/plan.json

For each codebook the clusters of `best` are scored once; for each budget the
separator gets its best plan, is rounded by calibration, packed, and its SI-SNR
averaged over the 60 validation mixtures, without training. Plans that there are
already need no scores. Tables of 2^n levels are packed as they are, and
entropy-coded: the same weights in fewer bytes. Budgets below 1.6 bits let
clusters have one bit.

What the output file holds already is not measured again. Options that are not
known here override the hyper-parameters, as those of train.py.
"""

import argparse
import copy
import sys
import tempfile
from functools import cache
from pathlib import Path

import speechbrain as sb
from plans import Bench

from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.quantization.codebook import TERNARY_BITS
from speechbrain_mpq.quantization.packing import save_packed
from speechbrain_mpq.quantization.plan import BitPlan
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.training.experiment import read_hparams
from speechbrain_mpq.training.rounding import round_calibrated_
from speechbrain_mpq.utils import read_json, write_json

HPARAMS = "hparams/best_4bit.yaml"
CANDIDATES = "{candidate_bits: [1, 1.6, 2, 3, 4, 5, 6, 8, 16]}"
CODEBOOKS = ("midrise", "entropy")


def plan_of(bench, scorer, codebook, bits, folder):
    """The best plan of some average bits; what is scored is kept."""
    file = Path(folder) / f"{codebook}.json"
    if file.exists():
        table = ScoreTable.load(file)
    else:
        table = bench.score(scorer)
        file.parent.mkdir(parents=True, exist_ok=True)
        table.save(file)
    least = TERNARY_BITS if bits >= TERNARY_BITS else 1
    return allocate_bits(table, average_bits=bits, min_bits=least)


def measured(bench, plan):
    """Bytes of the files of a plan, and the SI-SNR of their separator."""
    separator = copy.deepcopy(bench.separator)
    quantize_(separator, plan, *bench.patterns, codebook=plan.codebook)
    inputs = bench.calibration["inputs"]
    round_calibrated_(separator, "mask_net", inputs, progress=False)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, coded in (("bytes", False), ("coded_bytes", True)):
            path = save_packed(separator, folder, entropy_coded=coded)
            found[name] = path.stat().st_size
    return found | {"si_snr": round(bench.si_snr(separator), 3)}


def main():
    """Measure what is missing and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", nargs="+", type=float, default=[])
    parser.add_argument("--codebooks", nargs="+", default=list(CODEBOOKS))
    parser.add_argument("--plans", nargs="+", default=[])
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    parser.add_argument("--folder", default="results/codebooks")
    options, overrides = parser.parse_known_args()
    out = Path(options.folder) / f"{options.split}.json"
    rows = read_json(out) if out.exists() else []

    @cache
    def bench_of(codebook):
        given = [HPARAMS, "--codebook", codebook, "--scores", CANDIDATES]
        path, run_opts, text = sb.parse_arguments([*given, *overrides])
        hparams = read_hparams(path, text)
        bench = Bench(hparams, run_opts, options.split)
        if not rows:
            full = round(bench.si_snr(bench.separator), 3)
            rows.append({"codebook": "full", "bits": 32, "si_snr": full})
        return bench, hparams["scores"]

    def measure(codebook, bits, find_plan):
        """A row, where it is missing."""
        row = {"codebook": codebook, "bits": bits}
        if any(row.items() <= known.items() for known in rows):
            return
        bench, scorer = bench_of(codebook)
        rows.append(row | measured(bench, find_plan(bench, scorer)))
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, rows)
        print(rows[-1], file=sys.stderr, flush=True)

    for path in options.plans:
        plan = BitPlan.load(path)
        bits = round(2 * plan.average_bits) / 2  # what was asked for
        measure(plan.codebook, bits, lambda *_, plan=plan: plan)
    for codebook in options.codebooks:
        for bits in options.bits:
            measure(
                codebook,
                bits,
                lambda *given, c=codebook, b=bits: plan_of(
                    *given, c, b, options.folder
                ),
            )


if __name__ == "__main__":
    main()
