"""WER with the separator as front end: three systems, full and quantized.

> python benchmarks/front_end.py

Runs recipes/Embedded/ASR/front_end/train.py where its results are missing,
prints a table and writes it as JSON. Options that are not known here go to
the recipe, such as --device=cpu. The systems at 4 bits begin with the same
weights: the first one chooses the bits, the others take its plan.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from speechbrain_mpq.evaluation.runs import significance
from speechbrain_mpq.evaluation.signal_tasks import BUCKET_NAMES
from speechbrain_mpq.quantization.packing import read_packed
from speechbrain_mpq.utils import read_json, write_json

ROOT = Path(__file__).parents[1]
RECIPE = Path("recipes/Embedded/ASR/front_end")
SYSTEMS = {
    "clean": ["--number_of_epochs", "0"],
    "back_end": ["--freeze_front_end", "True", "--si_snr_weight", "0"],
    "joint": [],
}
FILES = {"": "train.yaml", "_4bit": "train_4bit.yaml"}
PLAN = ("plan.json", "chosen.json", "scores.json")


def command(system, kind, seed, extra=()):
    """Command line of one system, from the repository's root.

    Arguments
    ---------
    system : str
        One of `SYSTEMS`.
    kind : str
        "" or "_4bit".
    seed : int
    extra : sequence of str
        Further options of the recipe.

    Returns
    -------
    command : list of str

    Example
    -------
    >>> command("joint", "", 1234)[2:]
    ['recipes/.../hparams/train.yaml', '--system', 'joint', '--seed', '1234']
    """
    script, file = RECIPE / "train.py", RECIPE / "hparams" / FILES[kind]
    own = ["--system", system, "--seed", str(seed), *SYSTEMS[system]]
    return ["python", str(script), str(file), *own, *extra]


def run(system, kind, seed, folder, extra):
    """Run one system where its results are missing.

    Arguments
    ---------
    system, kind, seed
        As for `command`.
    folder : Path
        results/front_end.
    extra : sequence of str
        Further options of the recipe.

    Returns
    -------
    metrics : dict
        Its metrics.json.
    """
    home = folder / f"{system}{kind}" / str(seed)
    chosen = folder / f"{next(iter(SYSTEMS))}{kind}" / str(seed)
    if not (home / "metrics.json").exists():
        if kind and home != chosen:
            home.mkdir(parents=True, exist_ok=True)
            for name in PLAN:
                shutil.copy(chosen / name, home)
        line = command(system, kind, seed, extra)
        subprocess.run([sys.executable, *line[1:]], cwd=ROOT, check=True)
    return read_json(home / "metrics.json")


def row_of(system, kind, metrics, full, packed):
    """What the table and the JSON file say of one system.

    Arguments
    ---------
    system, kind : str
    metrics : dict
        Its metrics.json.
    full : dict
        That of the same system in full precision.
    packed : Path
        A packed folder of the same two models, for their size.

    Returns
    -------
    row : dict
    """
    quantized, floats = read_packed(packed)
    tensors = [tensor.integers for tensor in quantized.values()]
    parameters = sum(t.numel() for t in [*tensors, *floats.values()])
    row = {
        "system": system,
        "average_bits": metrics.get("average_bits", 32),
        "bytes": metrics.get("model_bytes", 4 * parameters),
        "si_snr": metrics["average"]["si_snr"],
        "wer": metrics["average"]["wer"],
        "by_angle": {k: metrics["buckets"][k]["wer"] for k in BUCKET_NAMES},
    }
    if kind:
        items = metrics["items"], full["items"]
        row["mapsswe"] = significance(*items, f"{system} in full precision")
    return row


def table(rows):
    """Plain table: a row for each system.

    Arguments
    ---------
    rows : list of dict
        From `row_of`.

    Returns
    -------
    table : str

    Example
    -------
    >>> angles = dict.fromkeys(BUCKET_NAMES, 20.0)
    >>> row = {"system": "joint", "average_bits": 32, "bytes": 2**20}
    >>> row |= {"si_snr": 9.0, "wer": 20.0, "by_angle": angles}
    >>> print(table([row]).splitlines()[-1])
    joint         32.00   1.00        9.00   20.0   20.0   20.0   20.0   20.0
    """
    head = f"{'system':<12}{'#bit':>7}{'MiB':>7}{'SI-SNR dB':>12}"
    head += "".join(f"{name:>7}" for name in BUCKET_NAMES)
    head += f"{'WER %':>7}{'p full':>8}"
    lines = [head, "-" * len(head)]
    for row in rows:
        line = f"{row['system']:<12}{row['average_bits']:>7.2f}"
        line += f"{row['bytes'] / 2**20:>7.2f}{row['si_snr']:>12.2f}"
        line += "".join(f"{row['by_angle'][k]:>7.1f}" for k in BUCKET_NAMES)
        test = row.get("mapsswe")
        line += f"{row['wer']:>7.1f}"
        line += f"{test['p']:>8.3f}" if test else ""
        lines.append(line)
    return "\n".join(lines)


def main(arguments=None):
    """Run what is missing, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--out", default="benchmarks/results/front_end.json")
    options, extra = parser.parse_known_args(arguments)
    folder = ROOT / "results/front_end"
    metrics = {
        (system, kind): run(system, kind, options.seed, folder, extra)
        for kind in FILES
        for system in SYSTEMS
    }
    rows = []
    for (system, kind), found in metrics.items():
        packed = folder / f"{system}_4bit" / str(options.seed) / "packed"
        full = metrics[system, ""]
        row = row_of(system, kind, found, full, packed)
        line = command(system, kind, options.seed, extra)
        rows.append({**row, "command": " ".join(line)})
    write_json(options.out, {"seed": options.seed, "systems": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
