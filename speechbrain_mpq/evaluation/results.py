"""What an experiment leaves behind: items, examples, metrics, report."""

import json
from pathlib import Path

import soundfile

from .files import load_metrics, write_json
from .metrics import significance, summarise
from .report import write_report
from .table import results_table
from .verdict import label


def write_results(folder, system, scored, baselines=()):
    """Write test_items.json, examples/, report.html and metrics.json.

    metrics.json comes last: where it is, everything else is.

    Arguments
    ---------
    folder : str or Path
        Output folder of the experiment; plan.json and scores.json in it are
        shown in the report.
    system : dict
        What metrics.json says of the system beside its scores: "system",
        "bits", "average_bits", "model_bytes", "fp32_bytes", "corpus", "seed",
        "wall_seconds".
    scored : scoring.Scored
    baselines : sequence of str or Path
        Output folders of finished experiments on the same test set; the first
        is the one that MAPSSWE compares with.

    Returns
    -------
    metrics : dict
    """
    folder = Path(folder)
    write_json(folder / "test_items.json", scored.items)
    metrics = {
        **system,
        **summarise(scored.items),
        "seconds_per_hour": scored.seconds_per_hour,
    }
    if baselines:
        reference = load_metrics(Path(baselines[0], "metrics.json"))
        metrics["mapsswe"] = significance(
            scored.items, _items(baselines[0]), reference["system"]
        )
    _write_examples(folder, scored.examples)
    others = [load_metrics(Path(path, "metrics.json")) for path in baselines]
    systems = dict(zip([folder, *map(Path, baselines)], [metrics, *others]))
    write_report(
        folder / "report.html",
        [{**m, "items": _items(path)} for path, m in systems.items()],
        plan=_optional(folder / "plan.json"),
        scores=_optional(folder / "scores.json"),
        examples=[_shown(example, systems) for example in scored.examples],
    )
    write_json(folder / "metrics.json", metrics)
    return metrics


def show_results(folders):
    """The table of some finished experiments, as text.

    Arguments
    ---------
    folders : sequence of str or Path

    Returns
    -------
    table : str
    """
    return results_table(
        [load_metrics(Path(path, "metrics.json")) for path in folders]
    )


def _items(folder):
    """Results of every test mixture of a finished experiment."""
    path = Path(folder, "test_items.json")
    return json.loads(path.read_text(encoding="utf-8"))


def _optional(path):
    """Content of a JSON file, or None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def _example_file(folder, key):
    """Where the separated speech of a test mixture is kept."""
    return Path(folder, "examples", f"{key}.flac")


def _write_examples(folder, examples):
    """Keep the estimates, for this report and those of other systems."""
    (folder / "examples").mkdir(exist_ok=True)
    for example in examples:
        estimate = example["signals"]["estimate"].clip(-1, 1)
        path = _example_file(folder, example["id"])
        soundfile.write(path, estimate, example["sample_rate"])


def _shown(example, systems):
    """An example with the estimates and words of several systems."""
    signals = {name: example["signals"][name] for name in ("mixture", "target")}
    hypotheses, ratios = {}, {}
    for folder, metrics in systems.items():
        item = next(i for i in _items(folder) if i["id"] == example["id"])
        hypotheses.setdefault("mixture", item["hypothesis_mixture"])
        hypotheses.setdefault("target", item["hypothesis_target"])
        ratios.setdefault("mixture", item["si_snr_mixture"])
        name = label(metrics)
        signals[name], _ = soundfile.read(_example_file(folder, item["id"]))
        hypotheses[name], ratios[name] = item["hypothesis"], item["si_snr"]
    return {
        **example,
        "signals": signals,
        "hypotheses": hypotheses,
        "si_snr": ratios,
    }
