"""One budget for separator and recognizer together, against one for each.

> python benchmarks/joint_budget.py --bits 4 3 2.5

Five ways to spend the same bytes on both models, without any training:

  uniform   every cluster of both has the same bits (whole numbers only)
  own       each model has the same average bits, and clusters scored by its
            own output: the mask's error, the recognizer's KL
  end       the same shares, all clusters scored by the recognizer's KL
  joint     one allocation over all clusters of both, scored by that KL
  weighed   the same with a weight for the recognizer's scores, chosen by the
            KL that whole plans have, rounded, on the calibration mixtures

Each is rounded to nearest, most by calibration too, and scored on the test
mixtures. KL is that of the whole plan on the calibration mixtures.
What the output file holds already is not measured again. Options that are not
known here override the hyper-parameters, as those of train.py.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import speechbrain as sb
from joint_bench import Bench
from joint_chain import separator_stages
from joint_plans import plans_of, shares, weighed_plan
from joint_table import table, with_metrics

from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.training.experiment import read_hparams
from speechbrain_mpq.utils import read_json, write_json

ROUNDINGS = {  # which plans are rounded how
    "nearest": ("uniform", "own", "end", "joint", "weighed"),
    "calibrated": ("uniform", "own", "joint", "weighed"),
}


def measure_all(bench, budgets, tables, results, save):
    """Measure what is missing among the results.

    Arguments
    ---------
    bench : Bench
    budgets : sequence of float
        Average bits.
    tables : dict
        From `Bench.scores`.
    results : dict
        "full" and "systems"; filled.
    save : callable
        Called after each system.
    """
    if "full" not in results:
        results["full"] = {"items": bench.measure(bench.chain)}
        save()
    known = {(s["plan"], s["bits"], s["rounding"]) for s in results["systems"]}
    for rounding, names in ROUNDINGS.items():
        for bits in budgets:
            for name in names:
                fractional = name == "uniform" and bits != int(bits)
                if fractional or (name, bits, rounding) in known:
                    continue
                system = measure_one(bench, tables, name, bits, rounding)
                results["systems"].append(system)
                save()


def measure_one(bench, tables, name, bits, rounding):
    """Plan, round and test one system.

    Arguments
    ---------
    bench : Bench
    tables : dict
        From `Bench.scores`.
    name : str
        Of the plan.
    bits : float
        Average bits.
    rounding : str
        One of `ROUNDINGS`.

    Returns
    -------
    system : dict
    """
    stages = separator_stages(bench.chain)
    estimated = partial(bench.estimated, calibrated=rounding == "calibrated")
    system = {"plan": name, "bits": bits, "rounding": rounding}
    if name == "weighed":
        plan, system["weight"] = weighed_plan(
            tables["end"],
            stages,
            bits,
            lambda plan: bench.divergence(estimated(plan)),
        )
    else:
        plan = plans_of(tables, stages, bits)[name]
    chain = estimated(plan)
    system |= {**shares(plan, stages), "kl": bench.divergence(chain)}
    return {**system, "items": bench.measure(chain)}


def read_options(arguments=None):
    """Options of this script, and overrides of the hyper-parameters."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--hparams", default="hparams/best_4bit.yaml")
    parser.add_argument("--bits", nargs="+", type=float, default=[4, 3, 2.5])
    parser.add_argument("--calibration", type=int, default=12)
    parser.add_argument(
        "--candidate_bits", nargs="+", type=int, default=[2, 3, 4, 6, 8]
    )
    parser.add_argument("--work", default="results/joint_budget")
    parser.add_argument("--out", default="benchmarks/results/joint_budget.json")
    return parser.parse_known_args(arguments)


def main(arguments=None):
    """Measure what the command line asks for and print the table."""
    options, extra = read_options(arguments)
    path, _, overrides = sb.parse_arguments([options.hparams, *extra])
    folder = Path(options.work)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(read_hparams(path, overrides), options.calibration)
    tables, seconds = score_tables(bench, folder, options.candidate_bits)
    kept = folder / "items.json"
    results = read_json(kept) if kept.exists() else {"systems": []}
    measure_all(
        bench, options.bits, tables, results, lambda: write_json(kept, results)
    )
    rows = with_metrics(results)
    settings = {
        "command": " ".join(["python", *sys.argv]),
        "calibration": options.calibration,
        "candidate_bits": options.candidate_bits,
        "scoring_seconds": seconds,
    }
    write_json(options.out, {**settings, "systems": rows})
    print(table(rows))


def score_tables(bench, folder, candidate_bits):
    """Score tables from their files, or new ones; seconds that they took.

    Arguments
    ---------
    bench : Bench
    folder : Path
    candidate_bits : sequence of int

    Returns
    -------
    tables : dict
    seconds : dict
    """
    files = {name: folder / f"{name}_scores.json" for name in ("end", "own")}
    if not all(file.exists() for file in files.values()):
        started = time.process_time()
        for name, made in bench.scores(candidate_bits).items():
            made.save(files[name])
        print(f"scored in {time.process_time() - started:.0f} CPU seconds")
    tables = {name: ScoreTable.load(file) for name, file in files.items()}
    return tables, {n: t.details["seconds"] for n, t in tables.items()}


if __name__ == "__main__":
    main()
