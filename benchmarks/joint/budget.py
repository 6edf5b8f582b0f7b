"""One budget for separator and recognizer together, against one for each.

> python benchmarks/joint/budget.py --bits 4 3 2.5

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
from dataclasses import replace
from functools import partial
from pathlib import Path

import speechbrain as sb
from chain import CODEBOOK, Bench, separator_stages

from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.evaluation.runs import significance, summarise
from speechbrain_mpq.quantization.plan import BitPlan
from speechbrain_mpq.training.experiment import read_hparams
from speechbrain_mpq.utils import read_json, write_json

WEIGHTS = (1, 2, 4, 8, 16)  # of the recognizer's scores
ROUNDINGS = {  # which plans are rounded how
    "nearest": ("uniform", "own", "end", "joint", "weighed"),
    "calibrated": ("uniform", "own", "joint", "weighed"),
}
COLUMNS = (
    *("bits", "plan", "rounding", "separator", "recognizer", "KiB"),
    *("KL", "SI-SNR dB", "WER %", "p full", "p own"),
)
TO_THE_LEFT = ("plan", "rounding")


def part_of(table, names):
    """The rows of some stages of a score table, as a table of their own.

    Arguments
    ---------
    table : ScoreTable
    names : set of str
        First parts of cluster names.

    Returns
    -------
    part : ScoreTable
    """
    chosen = [c for c in table.scores if _stage(c) in names]
    return ScoreTable(
        scores={c: table.scores[c] for c in chosen},
        tensors={c: table.tensors[c] for c in chosen},
        scales={c: table.scales[c] for c in chosen},
        method=table.method,
        codebook=table.codebook,
    )


def plans_of(tables, stages, bits):
    """The plans that are compared, all within the same bytes.

    Arguments
    ---------
    tables : dict
        "end": score table of the chain; "own": that of the mask network.
    stages : sequence of str
        Stages of the separator.
    bits : float
        Average bits.

    Returns
    -------
    plans : dict
        Name -> BitPlan; "uniform" only at whole bits.
    """
    end, stages = tables["end"], set(stages)
    others = {_stage(c) for c in end.scores} - stages
    recognizer = allocate_bits(part_of(end, others), average_bits=bits)
    plans = {}
    for name in ("own", "end"):
        half = allocate_bits(part_of(tables[name], stages), average_bits=bits)
        both = half.clusters | recognizer.clusters
        plans[name] = BitPlan(both, end.rest_parameters, CODEBOOK)
    plans["joint"] = allocate_bits(end, average_bits=bits)
    if bits == int(bits):
        same = BitPlan.uniform(
            plans["joint"].clusters, int(bits), end.rest_parameters, CODEBOOK
        )
        plans = {"uniform": same, **plans}
    return plans


def weighed_plan(end, stages, bits, measure, weights=WEIGHTS):
    """The joint plan whose divergence is least when it is measured.

    Losses do not add up in the same way in both models: measured together,
    those of a separator's clusters come to less than their sum, those of a
    recognizer's to more. So the recognizer's scores get a weight, and the
    weight is chosen by measuring whole plans.

    Arguments
    ---------
    end : ScoreTable
        Of the chain.
    stages : sequence of str
        Stages of the separator.
    bits : float
        Average bits.
    measure : callable
        Maps a plan to its divergence.
    weights : sequence of float

    Returns
    -------
    plan : BitPlan
    weight : float

    Example
    -------
    >>> rows = {"mask": {2: 1.0, 4: 0.0}, "words": {2: 0.9, 4: 0.0}}
    >>> sizes = {"mask": {"mask.w": 80}, "words": {"words.w": 80}}
    >>> table = ScoreTable(rows, sizes, codebook="midrise")
    >>> measure = lambda plan: 4 - plan.clusters["words"].bits
    >>> plan, weight = weighed_plan(table, ["mask"], 3, measure)
    >>> weight, plan.clusters["mask"].bits, plan.clusters["words"].bits
    (2, 2, 4)
    """
    plans = {}
    for weight in weights:
        scores = {
            cluster: {
                width: score if _stage(cluster) in stages else weight * score
                for width, score in row.items()
            }
            for cluster, row in end.scores.items()
        }
        weighed = replace(end, scores=scores)
        plans[weight] = allocate_bits(weighed, average_bits=bits)
    best = min(plans, key=lambda weight: measure(plans[weight]))
    return plans[best], best


def shares(plan, stages):
    """Average bits and bytes of each model in a plan.

    Arguments
    ---------
    plan : BitPlan
    stages : sequence of str
        Stages of the separator.

    Returns
    -------
    shares : dict
        "separator_bits", "recognizer_bits", "bytes".
    """
    halves = {"separator": {}, "recognizer": {}}
    for name, cluster in plan.clusters.items():
        mine = _stage(name) in stages
        halves["separator" if mine else "recognizer"][name] = cluster
    averages = {
        f"{model}_bits": BitPlan(clusters).average_bits
        for model, clusters in halves.items()
    }
    return averages | {"bytes": plan.bytes}


def _stage(cluster):
    """Stage of the chain that a cluster is in."""
    return cluster.split(".")[0]


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


def table(rows):
    """Plain table: a row for each system, budget after budget.

    Arguments
    ---------
    rows : list of dict
        From `with_metrics`.

    Returns
    -------
    table : str

    Example
    -------
    >>> full = {"plan": "full precision", "bits": 32, "si_snr": 9, "wer": 22}
    >>> print(table([full]).splitlines()[-1])
      32  full precision...9.00   22.0
    """
    lines = [COLUMNS, *[_cells(row) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "  ".join(
            cell.ljust(width) if name in TO_THE_LEFT else cell.rjust(width)
            for name, cell, width in zip(COLUMNS, line, widths)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def _cells(row):
    """The cells of one row."""
    cells = [f"{row['bits']:g}", row["plan"], row.get("rounding", "")]
    for model in ("separator", "recognizer"):
        bits = row.get(f"{model}_bits")
        cells.append("" if bits is None else f"{bits:.2f}")
    size = row.get("bytes")
    cells.append("" if size is None else f"{size / 1024:.0f}")
    cells.append(f"{row['kl']:.3f}" if "kl" in row else "")
    cells += [f"{row['si_snr']:.2f}", f"{row['wer']:.1f}"]
    for rival in ("full", "own"):
        test = row.get(f"against_{rival}")
        itself = rival == row["plan"]
        cells.append("" if test is None or itself else f"{test['p']:.3f}")
    return cells


def with_metrics(results):
    """Averages and significance of every system, without its items.

    Arguments
    ---------
    results : dict
        From `measure_all`.

    Returns
    -------
    rows : list of dict
    """
    full = results["full"]["items"]
    own = {
        (s["bits"], s["rounding"]): s["items"]
        for s in results["systems"]
        if s["plan"] == "own"
    }
    rows = [{"plan": "full precision", "bits": 32, **_averages(full)}]
    for system in sorted(results["systems"], key=_order):
        items = system["items"]
        row = {key: system[key] for key in system if key != "items"}
        row |= _averages(items)
        row["against_full"] = significance(items, full)
        rival = own[system["bits"], system["rounding"]]
        row["against_own"] = significance(items, rival, "own")
        rows.append(row)
    return rows


def _averages(items):
    """WER by bucket; averages of WER and SI-SNR."""
    summary = summarise(items)
    buckets = {k: b["wer"] for k, b in summary["buckets"].items()}
    average = summary["average"]
    return {"si_snr": average["si_snr"], "wer": average["wer"], "by": buckets}


def _order(system):
    """Budget after budget, the plainer rounding first."""
    return -system["bits"], system["rounding"] != "nearest"


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


if __name__ == "__main__":
    main()
