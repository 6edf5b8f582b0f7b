"""Score separated speech, and write what an experiment leaves behind.

SI-SNR, PESQ and the words of a recognizer; then items, examples, metrics and
report.
"""

import re
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np
import soundfile
import torch
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from ..utils import SAMPLE_RATE, read_json, write_json
from .report import Evidence, write_report
from .results_table import results_table
from .runs import (
    full_label,
    label,
    load_run,
    significance,
    summarise,
    system_key,
    table_order,
    task_of,
    told_apart,
)
from .signal_quality import pesq_many, si_snr
from .signal_tasks import SEPARATION

logger = get_logger(__name__)
# Files of an experiment that the report shows where they are there.
_SHOWN = ("plan", "scores", "ceiling", "pareto", "additivity", "admm")
# A number in a line of SpeechBrain's FileTrainLogger.
_LOGGED = re.compile(r"(\w[\w ]*): (-?[\d.]+(?:e[-+]?\d+)?)")


def __getattr__(name):
    """`Recognizer`, which stood here."""
    if name != "Recognizer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"{__package__.rpartition('.')[0]}.inference.speech_recognition"
    return import_module(home).Recognizer


@dataclass
class Scored:
    """Scores of a test set, with examples and speed."""

    # list of dict: one for each mixture, see `runs.summarise`
    items: list = field(default_factory=list)
    # list of dict: waveforms of some of them, see `report.write_report`
    examples: list = field(default_factory=list)
    # seconds of computing for an hour of mixtures, features included
    seconds_per_hour: float = 0.0


def score_separation(
    separate, dataset, recognize, workers=2, keep=4, progress=None
):
    """Separate and score every mixture of a test set.

    Arguments
    ---------
    separate : callable
        Maps waveforms [1, samples, mics], DOA [1, 1] and, where the test set
        has them, lips [1, 1, pictures, height, width] to [1, 1, samples].
    """
    scored, pairs = Scored(), []
    seconds = audio = 0.0
    hidden = None if progress is None else not progress
    for item in tqdm(dataset, desc="test", unit="mix", disable=hidden):
        start = time.perf_counter()
        with torch.no_grad():
            estimate = separate(*_given(item))
        estimate = estimate[0, 0].cpu()
        seconds += time.perf_counter() - start
        audio += len(estimate) / SAMPLE_RATE
        signals = {
            "mixture": item["mixture"][:, 0],
            "target": item["targets"][:, 0],
            "estimate": estimate,
        }
        pairs.append((estimate.numpy(), signals["target"].numpy()))
        scored.items.append(_item(item, signals, recognize))
        if len(scored.examples) < keep:
            scored.examples.append(_example(item, signals))
    pesq = pesq_many(pairs, SAMPLE_RATE, workers, skip_undefined=True)
    for result, value in zip(scored.items, pesq):
        result["pesq"] = value
    scored.seconds_per_hour = 3600 * seconds / audio
    return scored


def _given(item):
    """What the separator takes, as a batch of one."""
    names = [n for n in ("mixture", "doa", "lips") if n in item]
    return [item[name][None] for name in names]


def _item(item, signals, recognize):
    """Scores of one mixture, PESQ left open."""
    drawn, target = item["drawn"], signals["target"]
    return {
        "id": item["id"],
        "angle": drawn["angle"],
        "si_snr": si_snr(signals["estimate"], target).item(),
        "si_snr_mixture": si_snr(signals["mixture"], target).item(),
        "pesq": None,
        "reference": drawn["words"],
        "hypothesis": recognize(signals["estimate"]),
        "hypothesis_mixture": recognize(signals["mixture"]),
        "hypothesis_target": recognize(target),
    }


def _example(item, signals):
    """Waveforms and directions of one mixture."""
    drawn = item["drawn"]
    return {
        "id": item["id"],
        "doa_target": drawn["doa"],
        "doa_interferer": drawn["doa_interferer"],
        "angle": drawn["angle"],
        "reference": drawn["words"],
        "sample_rate": SAMPLE_RATE,
        "signals": {
            name: np.ascontiguousarray(signal, dtype=np.float32)
            for name, signal in signals.items()
        },
    }


def write_results(
    folder, system, scored, baselines=(), results_folder=None, task=SEPARATION
):
    """Write test_items.json, examples/, report.html and metrics.json.

    metrics.json comes last: where it is, everything else is.

    Arguments
    ---------
    folder : str or Path
        Folder of the experiment.
    system : dict
        What metrics.json says of the system beside its scores: "system",
        "bits", "average_bits", "estimator", "model_bytes", "fp32_bytes",
        "corpus", "seed", "wall_seconds".
    scored : Scored
        Test items, examples and speed.
    baselines : sequence[str or Path]
        Folders of finished runs on the same test set; the system is tested
        against the first.
    results_folder : str or Path or None
        Where other finished runs lie, shown beside this one by their size.
    task : Task
        What is scored.

    Returns
    -------
    dict
        Content of metrics.json.
    """
    folder = Path(folder)
    write_json(folder / "test_items.json", scored.items)
    metrics = {**system, **summarise(scored.items, task)}
    if task.speed:
        metrics["seconds_per_hour"] = scored.seconds_per_hour
    others = [load_run(path, with_items=True) for path in baselines]
    if others and task.tested:
        metrics[task.tested.test.key] = significance(
            scored.items, others[0]["items"], others[0]["system"], task
        )
    _write_examples(folder, scored.examples)
    run = {**metrics, "items": scored.items, "folder": folder}
    runs = told_apart([run, *others])
    files = [folder / f"{name}.json" for name in _SHOWN]
    evidence = Evidence(
        examples=[_shown(example, runs) for example in scored.examples],
        training_curve=_training_curve(folder / "train_log.txt"),
        neighbours=_neighbours(results_folder, runs),
        **{path.stem: read_json(path) for path in files if path.exists()},
    )
    write_report(folder / "report.html", runs, evidence)
    write_json(folder / "metrics.json", metrics)
    return metrics


def show_results(folders, wide=True):
    """Lay out the table of some finished experiments as text.

    Arguments
    ---------
    folders : sequence[str or Path]
        Folders with metrics.json, all on one test set.
    wide : bool
        Whether to show every condition, see `results_table`.

    Returns
    -------
    str
        The table.
    """
    return results_table(told_apart(map(load_run, folders)), wide=wide)


def _training_curve(path):
    """Losses of every epoch in SpeechBrain's log; the last of repeated ones."""
    if not path.exists():
        return None
    epochs = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = {key: float(value) for key, value in _LOGGED.findall(line)}
        row.pop("lr", None)
        if "epoch" in row:
            epochs[row["epoch"]] = row
    return list(epochs.values()) or None


def _neighbours(results_folder, runs):
    """Finished runs on the same test set, except those given."""
    if results_folder is None:
        return []
    folders = {Path(run["folder"]).resolve() for run in runs}
    names = {(system_key(run), run.get("seed")) for run in runs}
    neighbours = []
    for path in sorted(Path(results_folder).glob("*/*/metrics.json")):
        if path.parent.resolve() in folders:
            continue
        try:
            if _task_name(path) != runs[0].get("task"):
                continue
            run = load_run(path.parent)
        except ValueError as error:
            # Not fatal: this experiment's own results are sound.
            logger.warning(f"Left out of the report: {error}")
            continue
        name = system_key(run), run.get("seed")
        if name in names:
            logger.warning(
                f"Left out of the report: {path.parent}, a second run of "
                f"{label(run)} with seed {run.get('seed')}"
            )
            continue
        names.add(name)
        if run.get("test_set") == runs[0]["test_set"]:
            neighbours.append(run)
    return sorted(neighbours, key=table_order)


def _task_name(path):
    """What a metrics.json says of its task; None: separation."""
    metrics = read_json(path)
    return metrics.get("task") if isinstance(metrics, dict) else None


def _example_file(folder, key):
    """Where the separated speech of a test mixture is kept."""
    return Path(folder, "examples", f"{key}.flac")


def _write_examples(folder, examples):
    """Keep the estimates, for this report and those of other systems."""
    if not examples:
        return
    (folder / "examples").mkdir(exist_ok=True)
    for example in examples:
        estimate = example["signals"]["estimate"].clip(-1, 1)
        path = _example_file(folder, example["id"])
        soundfile.write(path, estimate, example["sample_rate"])


def _shown(example, runs):
    """An example with the estimates and words of several systems."""
    key = task_of(runs[0]).measures[0].key
    signals = {
        name: signal
        for name, signal in example["signals"].items()
        if name != "estimate"
    }
    inputs = list(signals)  # the same for all systems
    hypotheses, quality = {}, {}
    for run in runs:
        item = next(i for i in run["items"] if i["id"] == example["id"])
        for name in inputs:
            if f"hypothesis_{name}" in item:
                hypotheses.setdefault(name, item[f"hypothesis_{name}"])
            if f"{key}_{name}" in item:
                quality.setdefault(name, item[f"{key}_{name}"])
        name = full_label(run, runs)
        path = _example_file(run["folder"], item["id"])
        signals[name], _ = soundfile.read(path)
        hypotheses[name], quality[name] = item.get("hypothesis"), item[key]
    return {
        **example,
        "signals": signals,
        "hypotheses": hypotheses,
        key: quality,
    }
