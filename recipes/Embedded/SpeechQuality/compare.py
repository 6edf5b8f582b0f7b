"""The table of several trainings: correlations, intervals, bytes.

To run it, do the following:
> python compare.py results/quality results/quality_binary

Folders hold one output folder for each seed. The systems of the first one are
what the others are compared with: intervals of 95 % by paired bootstrap of
the clips, means over the seeds. --energy adds a control: a regression on the
quantiles of the frames' energy, without any network.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import numpy as np
import soundfile

from speechbrain_mpq.evaluation.runs import gather
from speechbrain_mpq.evaluation.significance import (
    mse,
    paired_bootstrap,
    pcc,
    srcc,
)
from speechbrain_mpq.evaluation.task import markdown_table

QUANTILES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
RIDGE = 1.0
SETS = {"test": False, "test_unseen": True}  # whether noise is held out
HEADER = ("system", "seeds", "bits", "PCC", "difference", "SRCC", "MSE")
COUNTS = ("all maps", "largest map", "32-bit input", "8-bit input")


def energy_features(waveform, window=640, hop=320):
    """Quantiles of the frames' energy.

    Arguments
    ---------
    waveform : numpy.ndarray
        [samples].
    window, hop : int
        Samples.

    Returns
    -------
    numpy.ndarray
        dB, [quantiles].
    """
    views = np.lib.stride_tricks.sliding_window_view(waveform, window)[::hop]
    energy = 10 * np.log10(np.square(views).mean(1) + 1e-9)
    return np.quantile(energy, QUANTILES)


def energy_control(data_folder, label="pesq"):
    """Scores of a ridge regression on energies, as items of a run.

    Arguments
    ---------
    data_folder : str or Path
        With the clips of `prepare_quality`.
    label : str

    Returns
    -------
    list of dict
    """
    folder = Path(data_folder)

    def load(split):
        entries = json.loads((folder / f"{split}_quality.json").read_text())
        rows = []
        for entry in entries.values():
            path = entry["wav"].format(data_root=folder)
            rows.append(energy_features(soundfile.read(path)[0]))
        return np.array(rows), [e[label] for e in entries.values()], entries

    rows, labels, _ = load("train")
    mean, std = rows.mean(0), rows.std(0) + 1e-9

    def expanded(rows):
        scaled = (rows - mean) / std
        pairs = [scaled[:, [i]] * scaled[:, i:] for i in range(len(mean))]
        return np.hstack([np.ones((len(rows), 1)), scaled, *pairs])

    x = expanded(rows)
    inner = x.T @ x + RIDGE * np.eye(x.shape[1])
    weights = np.linalg.solve(inner, x.T @ np.array(labels))
    items = []
    for split, held_out in SETS.items():
        rows, labels, entries = load(split)
        scores = (expanded(rows) @ weights).tolist()
        items += [
            {"id": key, "score": score, "label": label, "held_out": held_out}
            for key, score, label in zip(entries, scores, labels)
        ]
    return items


def scores_of(runs, held_out):
    """Scores [seeds, clips] and labels [clips], in the order of the ids."""
    chosen = [
        sorted(
            (item for item in run["items"] if item["held_out"] == held_out),
            key=lambda item: item["id"],
        )
        for run in runs
    ]
    clips = [[(item["id"], item["label"]) for item in own] for own in chosen]
    if any(own != clips[0] for own in clips):
        raise ValueError(
            "runs with other clips or labels cannot be compared: give runs of "
            "one data folder and one --label"
        )
    labels = [item["label"] for item in chosen[0]]
    return [[item["score"] for item in items] for items in chosen], labels


def row_of(name, runs, reference, held_out):
    """Cells of a system."""
    scores, labels = scores_of(runs, held_out)
    # the same seeds of the reference, where it has them
    seeds = {run.get("seed") for run in runs}
    same = [run for run in reference if run.get("seed") in seeds] or reference
    cells = {
        f: fmean(f(row, labels) for row in scores) for f in (pcc, srcc, mse)
    }
    change = "-"
    if runs is not reference:
        first, _ = scores_of([*same, *runs], held_out)
        first = first[: len(same)]
        interval = paired_bootstrap(first, scores, labels)
        change = "{:+.3f} ({:+.3f} to {:+.3f})".format(*interval)
    bits = runs[0].get("average_bits")
    return (
        name,
        str(len(runs)),
        "-" if bits is None else f"{bits:.2f}",
        f"{cells[pcc]:.3f}",
        change,
        f"{cells[srcc]:.3f}",
        f"{cells[mse]:.3f}",
    )


def memory_row(name, run, reference):
    """Bytes by four counts, and how many times smaller than another system."""
    pairs = [(run["memory"][k][1], reference["memory"][k][1]) for k in COUNTS]
    return (
        name,
        f"{run['model_bytes']:,}",
        *(f"{own:,.0f} ({other / own:.1f})" for own, other in pairs),
    )


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--energy", metavar="DATA_FOLDER")
    options = parser.parse_args()
    systems = {}
    for folder in options.folders:
        for run in gather(folder):
            systems.setdefault(run["system"], []).append(run)
    reference = next(iter(systems.values()))
    control = {}
    if options.energy:
        control["energy alone"] = [{"items": energy_control(options.energy)}]
    for name, held_out in SETS.items():
        rows = [
            row_of(system, runs, reference, held_out)
            for system, runs in {**systems, **control}.items()
        ]
        print(f"\n{name}\n\n{markdown_table(HEADER, rows)}", end="")
    rows = [
        memory_row(name, runs[0], reference[0])
        for name, runs in systems.items()
    ]
    header = ("system", "weights", *COUNTS)
    print(f"\n{markdown_table(header, rows)}", end="")


if __name__ == "__main__":
    main()
