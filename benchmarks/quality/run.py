"""Every tool at several sizes, on one checkpoint and one test set.

> benchmarks/quality/.venv/bin/python benchmarks/quality/run.py
> benchmarks/quality/.venv/bin/python benchmarks/quality/run.py --only hqq

One JSON file for each tool and setting; what is there already is skipped, so
that an interrupted run goes on when started again. `plot.py` draws them.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path

from workbench import ROOT, Workbench, paired_interval

from speechbrain_mpq.evaluation.runs import significance, summarise

HERE = Path(__file__).parent
# The full-precision system first: the others are compared with it.
TOOLS = (
    *("full", "ours", "nncodec", "quanto", "hqq", "nncf", "modelopt", "parq"),
    "diffq",
)


def file_of(tool, setting):
    """Name of a point's files, without suffix.

    Arguments
    ---------
    tool, setting : str

    Returns
    -------
    str

    Example
    -------
    >>> file_of("ours", "kl 2.5 per tensor")
    'ours_kl_2.5_per_tensor'
    """
    return re.sub(r"[^\w.]+", "_", f"{tool} {setting}")


def measure(bench, tool, module, setting):
    """Build, score and describe one point.

    Arguments
    ---------
    bench : Workbench
    tool : str
    module : module
        The tool's file.
    setting : str
        One of its settings.

    Returns
    -------
    point : dict
        Content of the point's JSON file.
    items : list of dict
        Results of every mixture.
    """
    start = time.perf_counter()
    system = module.build(bench, **module.SETTINGS[setting])
    seconds = time.perf_counter() - start
    items = bench.score(system.separator)
    summary = summarise(items)
    point = {
        "tool": tool,
        "setting": setting,
        "post_training": module.POST_TRAINING,
        "stored_bytes": system.stored_bytes,
        "container_bytes": system.container_bytes,
        "stored_as": system.stored_as,
        "in_float32": module.LEAVES,
        **summary["average"],
        "items": len(items),
        "test_set": summary["test_set"],
        "details": system.details,
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in module.PACKAGES},
        "machine": f"{os.cpu_count()} x {processor()}",
        "date": datetime.date.today().isoformat(),
    }
    return point, items


def processor():
    """Name of this machine's processor."""
    names = re.findall(r"model name\s*: (.*)", _cpuinfo())
    return names[0] if names else platform.machine()


def _cpuinfo():
    """Linux' description of the processor; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def compare(point, items, full_items):
    """What a point loses against full precision.

    Arguments
    ---------
    point : dict
        The differences are added to it.
    items, full_items : list of dict
        Results of every mixture.
    """
    mean, low, high = paired_interval(items, full_items)
    point["si_snr_difference"] = {"mean": mean, "low": low, "high": high}
    point["mapsswe"] = significance(items, full_items)


def run_tool(bench, out, tool, match="", again=False):
    """Settings of one tool that are not measured yet.

    Arguments
    ---------
    bench : Workbench
    out : Path
        Folder of the points.
    tool : str
    match : str
        Only settings in which this regular expression is found.
    again : bool
        Also those that are measured.
    """
    module = importlib.import_module(f"peers.{tool}")
    for setting in filter(re.compile(match).search, module.SETTINGS):
        name = file_of(tool, setting)
        path, items_path = out / f"{name}.json", bench.work / f"{name}.json"
        if path.exists() and not again:
            continue
        point, items = measure(bench, tool, module, setting)
        if tool == "full":
            (bench.work / "full_items.json").write_text(json.dumps(items))
        else:
            full = json.loads((bench.work / "full_items.json").read_text())
            compare(point, items, full)
        items_path.write_text(json.dumps(items))
        path.write_text(json.dumps(point, indent=1) + "\n")
        print(
            f"{tool} {setting}: {point['stored_bytes']} bytes, "
            f"{point['si_snr']:.2f} dB, {point['wer']:.1f} % WER",
            flush=True,
        )


def main():
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--match", default="", help="settings, as a regex")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--again", action="store_true", help="overwrite")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # the paths in hparams are relative to it
    bench = Workbench(HERE / "work")
    failed = []
    if not (bench.work / "full_items.json").exists():
        run_tool(bench, out, "full", again=True)
    for tool in arguments.only:
        try:
            run_tool(bench, out, tool, arguments.match, arguments.again)
        except Exception:  # the other tools are worth having
            traceback.print_exc()
            failed.append(tool)
    if failed:
        sys.exit(f"failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
