"""Tables over the tasks and seeds of finished runs, in Markdown.

To run it, do the following:
> python summary.py results
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from speechbrain_mpq.evaluation.task import markdown_table

METHODS = ("NSGA-II", "random", "greedy", "scores", "scores, whole hull")
SMALLER = "NSGA-II, smaller"
SEARCHES = ("NSGA-II", "random", "greedy")
COLUMNS = (
    "task",
    "system",
    "% of 8 bits",
    "test error %, 8 bits",
    "test error %",
    "more than 8 bits, 95 % interval of each seed",
    "McNemar p",
)


def main(arguments=None):
    """Read results.json of all runs below a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="of runs: <task>/<seed>/results.json")
    folder = Path(parser.parse_args(arguments).folder)
    tasks = defaultdict(list)
    for path in sorted(folder.glob("*/*/results.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        tasks[content["task"]].append(content)
    if not tasks:
        raise SystemExit(
            f"{folder} has no <task>/<seed>/results.json: run train.py first"
        )
    parts = {
        "Hypervolumes, on the sequences that are searched with:": volumes,
        "The same after some of the evaluations:": grown,
        "Evaluations until the hypervolume of `scores`, each seed:": reached,
        "Plans on the test set:": chosen,
    }
    print(
        "\n\n".join(f"{head}\n\n{part(tasks)}" for head, part in parts.items())
    )


def volumes(tasks):
    """Hypervolumes of the fronts, on what the searches saw."""
    rows = []
    for task, runs in tasks.items():
        cells = [
            spread([run["hypervolumes"][name] for run in runs], 3)
            for name in METHODS
        ]
        rows.append((task, len(runs), *cells))
    return markdown_table(("task", "seeds", *METHODS), rows).rstrip()


def grown(tasks):
    """Hypervolumes after some of the evaluations."""
    runs = [run for per_task in tasks.values() for run in per_task]
    counts = sorted(map(int, runs[0]["hypervolumes_of_the_first"]["random"]))
    rows = []
    for task, per_task in tasks.items():
        for name in SEARCHES:
            cells = [
                spread(
                    [
                        run["hypervolumes_of_the_first"][name][str(count)]
                        for run in per_task
                    ],
                    3,
                )
                for count in counts
            ]
            cells.append(spread([r["hypervolumes"][name] for r in per_task], 3))
            rows.append((task, name, *cells))
    return markdown_table(("task", "search", *counts, "all"), rows).rstrip()


def reached(tasks):
    """Evaluations until the hypervolume of scores and knapsack."""
    rows = []
    for task, runs in tasks.items():
        cells = [
            ", ".join(
                str(
                    run["evaluations_until_scores"][name]
                    or f"not in {run['evaluations'][name]}"
                )
                for run in runs
            )
            for name in SEARCHES
        ]
        few = ", ".join(str(score_evaluations(run)) for run in runs)
        rows.append((task, few, *cells))
    return markdown_table(("task", "scores", *SEARCHES), rows).rstrip()


def score_evaluations(run):
    """Evaluations of scores and knapsack: each gene's bits alone, and plans."""
    alone = 1 + len(run["plan"]) * (len(homogeneous_rows(run)) - 1)
    return alone + run["evaluations"]["scores"]


def homogeneous_rows(run):
    """Rows of the same bits for all."""
    return [name for name in by_name(run) if name.split()[1:] == ["bits"]]


def chosen(tasks):
    """Plans that validation chose, on the test set, against 8 bits."""
    lines = []
    for task, runs in tasks.items():
        names = [f"{name}, chosen" for name in METHODS]
        names += [f"{n}, trained again" for n in ("NSGA-II", SMALLER)]
        for name in names:
            rows = [by_name(run).get(name) for run in runs]
            pairs = [(r, by_name(s)["8 bits"]) for r, s in zip(rows, runs) if r]
            if not pairs:
                continue
            size = spread([100 * r["size_of_8_bits"] for r, _ in pairs], 1)
            eight = spread([100 * e["test_error"] for _, e in pairs], 1)
            error = spread([100 * r["test_error"] for r, _ in pairs], 1)
            between = ", ".join(
                f"{100 * r['more_test_errors']:+.1f} "
                f"[{100 * r['interval'][0]:.1f}, {100 * r['interval'][1]:.1f}]"
                for r, _ in pairs
            )
            p = ", ".join(f"{r['p']:.2f}" for r, _ in pairs)
            lines.append((task, name, size, eight, error, between, p))
    return markdown_table(COLUMNS, lines).rstrip()


def by_name(run):
    """Rows of a run by their systems."""
    return {row["system"]: row for row in run["rows"]}


def spread(values, digits):
    """Mean, and the standard deviation over seeds where there are several."""
    text = f"{fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text


if __name__ == "__main__":
    main()
