"""What each part of `best` brings when it is added alone, at equal bytes.

> python benchmarks/each_alone.py
> python benchmarks/each_alone.py --bits 2.5 --only base midrise rows

All start from the mask-error scores with the paper's candidates and codebook
and calibrated rounding, without training; every variant changes one thing.
Options that are not known here go to train.py as they are. What is finished
is kept; the table goes to benchmarks/results/each_alone_<bits>bit.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from speechbrain_mpq.evaluation.task import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ALL = "1.6, 2, 3, 4, 5, 6, 8, 16"
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def candidates(bits):
    """Options for a list of candidate bits."""
    return ("--scores", f"{{candidate_bits: [{bits}]}}")


PAPER = candidates("2, 4, 8, 16")
TERNARY = ("--min_bits", "1.6")
MIDRISE = ("--codebook", "midrise")
# From 1 bit on there is a level each side of zero: only midrise tables do it.
ONE_BIT = (*MIDRISE, "--min_bits", "1")
VARIANTS = {
    "base": PAPER,
    "3 bits": candidates("2, 3, 4, 8, 16"),
    "3, 5 and 6 bits": candidates("2, 3, 4, 5, 6, 8, 16"),
    "1.6 bits": (*candidates("1.6, 2, 4, 8, 16"), *TERNARY),
    "midrise": (*PAPER, *MIDRISE),
    "midrise, 1 bit": (*candidates("1, 2, 4, 8, 16"), *ONE_BIT),
    "rows of 32": (*PAPER, "--rows", "32"),
    "equalized inputs": (*PAPER, "--equalize_inputs", "True"),
    "best": (
        *(*candidates(ALL), *TERNARY, *MIDRISE),
        *("--equalize_inputs", "True"),
    ),
    "best, rows of 32": (
        *(*candidates(ALL), *TERNARY, *MIDRISE, "--rows", "32"),
        *("--equalize_inputs", "True"),
    ),
}


def measured(name, bits, folder, overrides):
    """Run one variant where it has no metrics yet; return its row."""
    system = "alone_" + "".join(c if c.isalnum() else "_" for c in name)
    command = [
        *(sys.executable, "train.py", "hparams/mask_error_4bit.yaml"),
        *("--system", system, "--bits", str(bits)),
        *("--results_folder", str(folder), "--seed", "1234"),
        *("--estimator", "!name:speechbrain_mpq.PostTraining"),
        *("--round_calibrated", "True", "--against", "[]"),
        *("--examples", "0", *VARIANTS[name], *overrides),
    ]
    print(name, flush=True)
    environment = {**ENVIRONMENT, **os.environ}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    path = ROOT / folder / f"{system}_{bits}bit" / "1234" / "metrics.json"
    metrics = json.loads(path.read_text())
    kept = {key: round(metrics["average"][key], 3) for key in ("si_snr", "wer")}
    return {"variant": name, "bytes": metrics["model_bytes"], **kept}


def table(rows):
    """Markdown: a row for each variant, with its gain over the first."""
    base = rows[0]
    cells = [
        (
            row["variant"],
            f"{row['bytes'] / 1000:.0f}",
            f"{row['si_snr']:.2f}",
            f"{row['si_snr'] - base['si_snr']:+.2f}",
            f"{row['wer']:.1f}",
        )
        for row in rows
    ]
    header = ("variant", "kB", "SI-SNR dB", "gain", "WER %")
    return markdown_table(header, cells).rstrip()


def main():
    """Run the variants in turn, write and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bits", default="3", help="budget; default: 3")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME")
    parser.add_argument("--results_folder", default="results/alone")
    options, overrides = parser.parse_known_args()
    rows = [
        measured(name, options.bits, options.results_folder, overrides)
        for name in options.only or VARIANTS
    ]
    kept = RESULTS / f"each_alone_{options.bits}bit.json"
    kept.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
