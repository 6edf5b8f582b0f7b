"""Language models at few bits: every method of the paper, one command a row.

> python recipes/SOTU/LM/train.py recipes/SOTU/LM/hparams/lstm.yaml \
    --data_folder data/sotu
> python benchmarks/quality/language_models.py \
    recipes/SOTU/LM/hparams/lstm.yaml --data_folder data/sotu \
    --start_from results/lm_lstm/1234

Each row is what `python -m speechbrain_mpq.run train.py ...` does, in this
process, which does not import everything again for each; `--commands` prints
them instead. Results are kept in `benchmarks/results/language_models`, rows
that are there are not run again. `--only` names rows by patterns.

Post-training rows need no training. The others take some 200 steps on every
eighth sentence of the training text, and so does the model in full precision
that they are compared with (`longer`). Calibrated rounding looks at the first
128 validation sentences; with another --seed at others, drawn by it.
"""

import argparse
import random
import sys
import time
import traceback
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from speechbrain_mpq.evaluation.task import markdown_table
from speechbrain_mpq.utils import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "benchmarks/results/language_models"
EQUAL = (1, 2, 4, 8)
BUDGETS = (2, 4)
EVERY = 8  # of the training sentences, one is trained on again
BATCH = 32  # validation sentences that scores look at, always the first
FULL = "full"  # the row that others are compared with
MODEL_FILE = "model.safetensors"
COLUMNS = (
    "system",
    "asked",
    "in the file",
    "PPL",
    "PPL of known words",
    "bytes",
    "smaller",
)
COMMON = (
    *("--float_vectors", "--gates", "--batches", "1", "--min_bits", "1"),
    *("--candidate_bits", "1", "2", "4", "8", "--rounding", "nearest"),
)
CALIBRATED = ("--rounding", "calibrated", "--batches", "4")
SEED = 1234  # that takes the first validation sentences
TRAINING = (
    *("--lr", "0.001", "--number_of_epochs", "1"),
    *("--training_steps", "220", "--warmup_steps", "20"),
)
# In full precision: the same steps once more, and the bytes of two bits.
PLAIN = ("longer", "smaller")
SMALLER = {  # by the name of the hparams
    "lstm": (
        *("--size", "19", "--dropout", "0"),
        *("--number_of_epochs", "2"),
    ),
    "transformer": (
        *("--size", "24", "--width", "48", "--dropout", "0"),
        *("--number_of_epochs", "1"),
    ),
}
SCORES = {
    "kl": "kl",
    "hessian": "hessian:probes=50",
    "nas": "nas",
    "reversed": "reversed",
    **{f"random{seed}": f"random:seed={seed}" for seed in range(3)},
}
METHODS = {
    "rounded": "post_training",
    "calibrated": "post_training",
    "ste": "straight_through",
    "step": "log_step",
    "admm": "admm",
    "global": "admm:global_table=True",
    "printed": "admm_printed",
}


@dataclass(frozen=True)
class Row:
    """One system of the table.

    Arguments
    ---------
    method : str
        A key of `METHODS`.
    bits : float
        That are asked for, on average.
    scores : str
        A key of `SCORES`, or "uniform".
    options : tuple of str
        More of them.
    kind : str
        What they are called in the row's name.
    prototypes : str
        Method whose uniform systems it begins with, if any.
    """

    method: str
    bits: float
    scores: str = "uniform"
    options: tuple = ()
    kind: str = ""
    prototypes: str = ""

    @property
    def name(self):
        """A name for its folder."""
        parts = [self.method, self.kind, self.scores, f"{self.bits:g}"]
        if self.prototypes:
            parts.insert(1, f"from_{self.prototypes}")
        return "_".join(part for part in parts if part)

    @property
    def trains(self):
        """Whether it takes steps of training."""
        return METHODS[self.method] != "post_training"

    @property
    def calibrates(self):
        """Whether sentences have a say in its rounding."""
        return self.method == "calibrated"

    def arguments(self, setting):
        """What `speechbrain_mpq.run` is given.

        Arguments
        ---------
        setting : Setting
        """
        begin = ()
        if self.prototypes:
            begin = [
                f"{bits}={setting.folder(Row(self.prototypes, bits))}/packed"
                for bits in EQUAL
            ]
            begin = ("--prototypes", *begin)
        return [
            *(setting.script, setting.hparams, *COMMON, *begin),
            *("--weights", str(setting.start / "save")),
            *("--bits", f"{self.bits:g}", "--method", METHODS[self.method]),
            *("--scores", SCORES.get(self.scores, self.scores)),
            *(CALIBRATED if self.calibrates else ()),
            *self.options,
            *setting.recipe_options(self.name, self.trains, self.calibrates),
        ]


NODE_MIDRISE = {
    "options": ("--granularity", "channel", "--codebook", "midrise"),
    "kind": "node_midrise",
}
NODE = {"options": ("--granularity", "channel"), "kind": "node"}
ENTROPY = {"options": ("--codebook", "entropy"), "kind": "entropy"}
MIDRISE = {"options": ("--codebook", "midrise"), "kind": "midrise"}
ROWS = (
    *(Row("rounded", bits) for bits in EQUAL),
    *(Row("rounded", bits, **NODE) for bits in EQUAL),
    Row("rounded", 2, **MIDRISE),
    *(Row("rounded", bits, **ENTROPY) for bits in (1, 2, 4)),
    *(Row("rounded", 2, name) for name in SCORES),
    *(Row("rounded", 4, name) for name in ("kl", "hessian", "nas")),
    *(Row("calibrated", bits) for bits in (1, 2, 4)),
    Row("calibrated", 2, **MIDRISE),
    Row("calibrated", 2, "kl", **MIDRISE),
    Row("calibrated", 2, **NODE_MIDRISE),
    *(Row("calibrated", bits, **ENTROPY) for bits in (1, 1.6, 2, 4)),
    *(Row("calibrated", bits, "kl", **ENTROPY) for bits in (1.5, 1.9, 2)),
    Row("calibrated", 2, "hessian", **ENTROPY),
    *(Row("ste", bits) for bits in EQUAL),
    *(Row("ste", bits, "kl") for bits in BUDGETS),
    *(Row("step", bits) for bits in (1, 2)),
    Row("ste", 2, **MIDRISE),
    *(Row("ste", bits, **ENTROPY) for bits in (1, 2)),
    *(Row("admm", bits) for bits in EQUAL),
    *(Row("global", bits) for bits in EQUAL),
    Row("printed", 2),
    *(Row("admm", bits, **NODE) for bits in EQUAL),
    *(Row("ste", bits, "hessian") for bits in BUDGETS),
    *(Row("ste", bits, "nas", prototypes="admm") for bits in BUDGETS),
    Row("ste", 2, "reversed"),
    Row("ste", 2, "random0"),
)


@dataclass(frozen=True)
class Setting:
    """What all rows have in common."""

    hparams: str
    data: Path
    start: Path
    results: Path
    seed: int

    @property
    def script(self):
        """The recipe."""
        return str(Path(self.hparams).parents[1] / "train.py")

    def folder(self, name):
        """Output folder of a row."""
        name = name.name if isinstance(name, Row) else name
        return self.results / f"{name}_{self.seed}"

    def recipe_options(self, name, trains, calibrates=False):
        """Arguments of the recipe itself."""
        data = few_sentences(self.data) if trains else self.data
        if calibrates and self.seed != SEED:
            data = other_sentences(data, self.seed)
        return [
            *("--data_folder", str(data), "--skip_prep", "True"),
            *("--output_folder", str(self.folder(name))),
            *("--seed", str(self.seed), "--noprogressbar", "--device=cpu"),
            *(TRAINING if trains else ()),
        ]

    def plain(self, name):
        """Arguments of train.py for a row of `PLAIN`, in full precision."""
        longer = name == "longer"
        start = ("--start_from", str(self.start))
        if not longer:
            start = SMALLER.get(Path(self.hparams).stem, SMALLER["lstm"])
        return [
            *(self.script, self.hparams, *start),
            *self.recipe_options(name, longer),
        ]


def few_sentences(data):
    """A folder with one training sentence in `EVERY`, and the same test.

    Of validation, which is no more than looked at, it has the beginning.

    Arguments
    ---------
    data : Path
        Prepared corpus.

    Returns
    -------
    Path
    """
    folder = data.with_name(f"{data.name}_{EVERY}")
    if folder.exists():
        return folder
    folder.mkdir()
    for path in data.iterdir():
        content = path.read_bytes()
        lines = content.splitlines(keepends=True)
        if path.name == "train.txt":
            content = b"".join(lines[::EVERY])
        elif path.name == "valid.txt":
            content = b"".join(lines[: max(BATCH, len(lines) // EVERY)])
        (folder / path.name).write_bytes(content)
    return folder


def other_sentences(data, seed):
    """A folder with the validation sentences in another order.

    Arguments
    ---------
    data : Path
        Prepared corpus.
    seed : int

    Returns
    -------
    Path
    """
    folder = data.with_name(f"{data.name}_order_{seed}")
    if folder.exists():
        return folder
    folder.mkdir()
    for path in data.iterdir():
        lines = path.read_bytes().splitlines(keepends=True)
        if path.name == "valid.txt":
            random.Random(seed).shuffle(lines)
        (folder / path.name).write_bytes(b"".join(lines))
    return folder


def result_of(folder):
    """What the table says of an output folder of the recipe.

    Arguments
    ---------
    folder : Path

    Returns
    -------
    dict
    """
    plan = folder / "plan.json"
    average = read_json(plan)["average_bits"] if plan.exists() else 32.0
    result = published_result(folder / "published")
    return {**result, "average_bits": average}


def published_result(folder):
    """What the table says of a packed folder.

    Arguments
    ---------
    folder : Path

    Returns
    -------
    dict
    """
    config = read_json(folder / "quantization_config.json")
    test = config["metadata"]["test"]
    return {
        "ppl": test["PPL"],
        "ppl_known": test["PPL_known"],
        "bytes": (folder / MODEL_FILE).stat().st_size,
        "tensors": len(config.get("tensors", {})),
    }


def in_recipe(arguments, main):
    """Run a script's main under its own command line."""
    before = sys.argv
    sys.argv = arguments
    try:
        return main(arguments)
    finally:
        sys.argv = before


def run_row(row, setting):
    """Run one row; returns its result."""
    if isinstance(row, Row):
        from speechbrain_mpq.run import main

        arguments = row.arguments(setting)
    else:
        import runpy

        arguments = setting.plain(row)

        def main(arguments):
            return runpy.run_path(arguments[0], run_name="__main__")

    folder = setting.folder(row)
    started = time.process_time()
    if not (folder / "published" / MODEL_FILE).exists():
        in_recipe(arguments, main)
    result = result_of(folder)
    result["cpu_seconds"] = round(time.process_time() - started)
    return result


def wanted_rows(patterns):
    """Rows whose names fit a pattern; all of them for none."""
    every = [*PLAIN, *ROWS]
    return [
        row
        for row in every
        if not patterns
        or any(fnmatch(getattr(row, "name", row), p) for p in patterns)
    ]


def in_order(results):
    """Results in the order of the rows.

    Arguments
    ---------
    results : dict
        Row -> result.

    Returns
    -------
    dict
    """
    names = [FULL, *(getattr(row, "name", row) for row in wanted_rows(()))]
    return {name: results[name] for name in names if name in results}


def table(results, errors=None):
    """The results as a table in Markdown.

    Arguments
    ---------
    results : dict
        Of one model: row -> result.
    errors : dict or None
        Word errors by `rescoring.py`: row -> result.

    Returns
    -------
    str
    """
    sets = list(errors[FULL]["sets"]) if errors else []
    full, rows = results[FULL], []
    for name, row in results.items():
        found = errors.get(name, {}).get("sets", {}) if errors else {}
        rows.append(
            [
                name,
                *perplexity_cells(row, full),
                *(cell for key in sets for cell in word_cells(found.get(key))),
                *byte_cells(row.get("bytes"), full["bytes"]),
            ]
        )
    heads = [head for name in sets for head in (f"WER {name}", "p")]
    columns = (*COLUMNS[:-2], *heads, *COLUMNS[-2:])
    return markdown_table(columns, rows).rstrip()


def perplexity_cells(row, full):
    """Bits and perplexity, as they stand in the table."""
    if "ppl" not in row:
        return ("",) * 4
    more = 100 * (row["ppl"] / full["ppl"] - 1)
    change = "" if row is full else f" ({more:+.1f} %)"
    average = row.get("average_bits")
    return (
        "" if average is None else f"{average:.2f}",
        f"{32 * row['bytes'] / full['bytes']:.2f}",
        f"{row['ppl']:.1f}{change}",
        f"{row['ppl_known']:.1f}",
    )


def byte_cells(count, full):
    """Bytes and how many times fewer than in full precision these are."""
    if count is None:
        return "", ""
    return f"{count:,}", f"{full / count:.1f}"


def word_cells(result):
    """Word error rate and p of a set, as they stand in tables."""
    if result is None:
        return "", ""
    p = result.get("p")
    if p is None:
        return f"{result['wer']:.2f}", ""
    return f"{result['wer']:.2f}", "< 0.001" if p < 0.001 else f"{p:.3f}"


def read_options():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hparams", help="recipes/SOTU/LM/hparams/...")
    parser.add_argument("--data_folder", type=Path, required=True)
    parser.add_argument("--start_from", type=Path, required=True)
    parser.add_argument("--results_folder", type=Path, default="results/rows")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--name", help="of the results (default: the hparams)")
    parser.add_argument("--only", nargs="+", metavar="PATTERN")
    parser.add_argument("--commands", action="store_true")
    return parser.parse_args()


def main():
    """Run the rows that are asked for and print the table."""
    options = read_options()
    name = options.name or Path(options.hparams).stem
    setting = Setting(
        options.hparams,
        options.data_folder,
        options.start_from,
        options.results_folder / name,
        options.seed,
    )
    rows = wanted_rows(options.only)
    if options.commands:
        for row in rows:
            own = isinstance(row, Row)
            words = row.arguments(setting) if own else setting.plain(row)
            print("python", "-m speechbrain_mpq.run " * own + " ".join(words))
        return 0
    kept = KEPT / f"{name}_{options.seed}.json"
    results = read_json(kept) if kept.exists() else {}
    kept.parent.mkdir(parents=True, exist_ok=True)
    if setting.start.exists() or FULL not in results:
        results[FULL] = result_of(setting.start)
    failed = []
    for row in rows:
        own = getattr(row, "name", row)
        if own in results:
            continue
        try:
            results[own] = run_row(row, setting)
        except Exception:  # one row must not cost the others
            traceback.print_exc()
            failed.append(own)
            continue
        write_json(kept, results)
        print(f"{own}: PPL {results[own]['ppl']:.2f}", flush=True)
    print(table(in_order(results)))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
