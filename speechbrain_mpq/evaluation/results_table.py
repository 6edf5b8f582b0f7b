"""Compare systems, and lay out their results as in the paper's Table 1.

Columns are the measures of the task by condition; rows are systems, and their
mean and standard deviation where there are several seeds.

The paper's Table 1 marks a system that does not differ significantly in WER
from full precision, from uniform 4-bit and from uniform 8-bit precision (its
systems 1, 3 and 4). Runs are compared with the baseline's run of the same
seed, by the significance test of their task.
"""

import re
import textwrap
from itertools import combinations
from statistics import fmean, stdev

from .runs import (
    FULL_PRECISION,
    KIB,
    MIB,
    bits_text,
    by_test_set,
    check_same_test_set,
    full_label,
    label,
    significance,
    system_key,
    task_of,
)
from .significance import SIGNIFICANCE_LEVEL

MARKS = "*†‡§¶#"
_PAPER_BASELINES = (("fp32", 32), ("uniform", 4), ("uniform", 8))


def compare(run, baseline):
    """Test the difference between two runs, as their task tests it.

    It is computed where both hold their items, else taken from the metrics.

    Arguments
    ---------
    run : dict
        Metrics of the system.
    baseline : dict
        Metrics of the baseline.

    Returns
    -------
    dict | None
        `{"against", "z", "p", "segments"}`, or None where it was not tested.

    Example
    -------
    >>> test = {"against": "fp32", "z": 0.8, "p": 0.42, "segments": 90}
    >>> kl = {"system": "kl", "bits": 4, "mapsswe": test}
    >>> compare(kl, {"system": "fp32", "bits": 32})["p"]
    0.42
    >>> compare(kl, {"system": "uniform", "bits": 4}) is None
    True
    """
    task = task_of(run)
    if task.tested is None:
        return None
    if run.get("items") and baseline.get("items"):
        items = run["items"], baseline["items"]
        return significance(*items, baseline["system"], task)
    test = run.get(task.tested.test.key)
    # Only full precision is sure to be the one system of its name.
    is_tested = test and baseline["bits"] >= FULL_PRECISION
    return test if is_tested and test["against"] == baseline["system"] else None


def choose_baselines(runs, against=None):
    """Choose the systems that the others are tested against."""
    known = list(dict.fromkeys(map(system_key, runs)))
    if against is None:
        paper = [[k for k in known if k[:2] == row] for row in _PAPER_BASELINES]
        systems = [keys[0] for keys in paper if keys]
    else:
        systems = [_one_named(name, known) for name in against]
    if len(systems) > len(MARKS):
        raise ValueError(f"at most {len(MARKS)} baselines can be marked")
    return dict(zip(MARKS, systems))


def significance_marks(run, runs, baselines):
    """Mark the baselines that a run does not differ from significantly.

    Example
    -------
    >>> fp32 = {"system": "fp32", "bits": 32, "seed": 1}
    >>> test = {"against": "fp32", "z": 0.8, "p": 0.42, "segments": 90}
    >>> kl = {"system": "kl", "bits": 4, "seed": 1, "mapsswe": test}
    >>> significance_marks(kl, [fp32, kl], {"*": ("fp32", 32, None)})
    {'*': True}
    """
    marks = {}
    for mark, key in baselines.items():
        if system_key(run) == key:
            break
        test = None
        for other in runs:
            same_seed = other.get("seed") == run.get("seed")
            if system_key(other) == key and same_seed:
                test = compare(run, other)
        marks[mark] = None if test is None else test["p"] >= SIGNIFICANCE_LEVEL
    return marks


def _one_named(name, keys):
    """The one system of a name such as "fp32" or "uniform_4bit"."""
    matching = [key for key in keys if name in _names(*key)]
    if len(matching) == 1:
        return matching[0]
    problem = "names several systems" if matching else "is not there"
    there = ", ".join(_names(*key)[-1] for key in keys)
    raise ValueError(f"the baseline {name!r} {problem}; choose from: {there}")


def _names(system, bits, estimator, variant=None):
    """Names that a system is called by, the longest last."""
    names = [system, f"{system}_{bits:g}bit"]
    if estimator:
        names.append(f"{names[1]}_{estimator}")
    if variant:
        suffix = re.sub(r"[ ,]+", "_", variant)
        names = [f"{name}_{suffix}" for name in names]
    return names


EQUAL_BYTES = 0.01  # largest relative difference of sizes called equal


def by_system(runs):
    """Group runs by system, in the order of their first run."""
    systems = {}
    for run in runs:
        others = systems.setdefault(system_key(run), [])
        for other in others:
            if other.get("seed") == run.get("seed"):
                raise ValueError(
                    f"two runs of {label(run)} have the seed "
                    f"{run.get('seed')}{_places(other, run)}: leave one out, "
                    "or run it again with a --system name of its own"
                )
        others.append(run)
    return list(systems.values())


def mean_and_spread(runs):
    """Average a system's runs over its seeds, with standard deviations."""
    return tuple(_over_seeds(runs, merge) for merge in (fmean, stdev))


def paired_differences(runs, tolerance=EQUAL_BYTES):
    """Compare systems of equal bytes, seed by seed."""
    pairs = []
    for first, second in combinations(by_system(runs), 2):
        theirs = {run.get("seed"): run for run in first}
        common = [
            (run, theirs[run.get("seed")])
            for run in second
            if run.get("seed") in theirs
        ]
        if len(common) < 2 or not all(
            _equal_bytes(*pair, tolerance) for pair in common
        ):
            continue
        row = {"system": full_label(second[0], runs), "n": len(common)}
        row["against"] = full_label(first[0], runs)
        for key in task_of(second[0]).keys:
            row[key] = _difference_of(common, key)
        pairs.append(row)
    return pairs


def _places(*runs):
    """Where runs were read, as far as it is known."""
    folders = [str(run["folder"]) for run in runs if run.get("folder")]
    return f" ({' and '.join(folders)})" if folders else ""


def _over_seeds(runs, merge):
    """Numbers of the table, each merged over the runs."""

    def merged(*path):
        values = []
        for run in runs:
            for key in path:
                run = (run or {}).get(key)
            values.append(run)
        return None if None in values else merge(values)

    keys = task_of(runs[0]).keys
    return {
        "buckets": {
            name: {key: merged("buckets", name, key) for key in keys}
            for name in runs[0]["buckets"]
        },
        "average": {key: merged("average", key) for key in keys},
        "model_bytes": merged("model_bytes"),
        "seconds_per_hour": merged("seconds_per_hour"),
    }


def _equal_bytes(run, other, tolerance):
    """Whether the files of two runs are of one size."""
    sizes = [run.get("model_bytes"), other.get("model_bytes")]
    return all(sizes) and max(sizes) - min(sizes) <= tolerance * max(sizes)


def _difference_of(pairs, key):
    """(mean, standard deviation) of first minus second, or None."""
    values = [(a["average"][key], b["average"][key]) for a, b in pairs]
    if any(None in pair for pair in values):
        return None
    differences = [a - b for a, b in values]
    return fmean(differences), stdev(differences)


TERMINAL = 80  # columns, of tables that are not wide
NOTHING = "-"  # shown where a value is not known
SEEDS = ("all", "mean")  # rows of every run, or of every system only


def table_cells(runs, against=None, seeds="all", wide=True):
    """Lay out the cells of the results table.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files on one test set, in order.
    """
    if seeds not in SEEDS:
        raise ValueError(f"seeds must be one of {SEEDS}, not {seeds!r}")
    check_same_test_set(runs)
    layout = _Layout(runs, against, wide)
    rows = []
    if layout.task.unprocessed:
        rows.append(layout.input_row(runs[0]))
    for number, system in enumerate(by_system(runs), 1):
        several = len(system) > 1
        if seeds == "all" or not several:
            rows += [layout.run_row(number, run) for run in system]
        if several:
            rows += layout.seed_rows(number, system)
    return layout.groups, layout.header, rows


def difference_cells(runs):
    """Lay out the differences between systems of equal bytes.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files.

    Example
    -------
    >>> average = {"si_snr": 7.0, "pesq": 2.0, "wer": 30.0}
    >>> runs = [
    ...     {"system": s, "bits": 4, "seed": n, "average": average}
    ...     for s in ("uniform", "kl")
    ...     for n in (1, 2)
    ... ]
    >>> _, rows = difference_cells([{**r, "model_bytes": 500} for r in runs])
    >>> rows[0][:2]
    ['kl 4 bit - uniform 4 bit', '+0.00 ± 0.00']
    """
    measures = task_of(runs[0]).measures
    titles = [f"{m.name} {m.difference_unit}".strip() for m in measures]
    header = ["same size, by seed", *titles, "seeds"]
    rows = []
    for pair in paired_differences(runs):
        cells = [f"{pair['system']} - {pair['against']}"]
        for measure in measures:
            cells.append(_plus_minus(pair[measure.key], measure.decimals))
        rows.append([*cells, str(pair["n"])])
    return header, rows


class _Layout:
    """Columns of one table, and the rows that fill them."""

    def __init__(self, runs, against, wide):
        self.runs = runs
        self.task = task_of(runs[0])
        self.names = self.task.condition_names if wide else ()
        self.speed = self.task.speed if wide else None
        self.baselines = choose_baselines(runs, against)
        self.with_estimation = any(run.get("estimator") for run in runs)
        self.with_seed = len({run.get("seed") for run in runs}) > 1
        sizes = [run["model_bytes"] for run in runs if run.get("model_bytes")]
        small = max(sizes, default=0) < MIB
        self.unit, unit_name = (KIB, "KiB") if small else (MIB, "MiB")
        full = [r for r in runs if r["bits"] >= FULL_PRECISION]
        self.full_bytes = full[0].get("model_bytes") if full else None
        lead = self._lead("sys", "system", "estimation", "#bit", "seed")
        tail = [unit_name, "ratio"]
        if self.speed:
            tail.append(self.speed)
        titles = [self._title(measure) for measure in self.task.columns]
        if self.task.conditions and self.names:
            names = [*self.names, "avg."]
            columns = names * len(titles)
        else:
            names, columns = [""], titles
            titles = [""] * len(titles)
        self.header = [*lead, *columns, *tail]
        self.groups = [
            ("", len(lead)),
            *((title, len(names)) for title in titles),
            ("", len(tail)),
        ]

    def _title(self, measure):
        """Head of a measure's columns, with what is beside it."""
        beside = [f" ({m.title})" for m in self.task.beside(measure)]
        return measure.title + "".join(beside)

    def _blocks(self, run):
        """Blocks of numbers of a run, one for every column of a measure."""
        names = self.names if self.task.conditions else ()
        return [*(run["buckets"][name] for name in names), run["average"]]

    def input_row(self, run):
        """Cells of the unprocessed input."""
        cells = []
        for measure in self.task.columns:
            key = measure.unprocessed
            names = self.task.condition_names
            values = [run["buckets"][name].get(key) for name in names]
            shown = [*values, _mean(values)]
            if not (self.task.conditions and self.names):
                shown = shown[-1:]
            row = [_number(value, measure.decimals) for value in shown]
            if measure.test:
                row[-1] = self._marked(row[-1], {})
            cells += row
        return [
            *self._lead("", self.task.unprocessed, "", NOTHING, ""),
            *cells,
            *[NOTHING] * self.groups[-1][1],
        ]

    def run_row(self, number, run):
        """Cells of one run."""
        marks = significance_marks(run, self.runs, self.baselines)
        lead = self._lead_of(number, run, str(run.get("seed", "?")))
        size = run.get("model_bytes")
        full = self.full_bytes or run.get("fp32_bytes")
        return self._cells(lead, run, marks, size and full and full / size)

    def seed_rows(self, number, system):
        """Cells of the mean and of the standard deviation over the seeds."""
        mean, spread = mean_and_spread(system)
        tests = [
            significance_marks(run, self.runs, self.baselines) for run in system
        ]
        marks = {mark: all(test[mark] for test in tests) for mark in tests[0]}
        size = mean["model_bytes"]
        full = self.full_bytes or system[0].get("fp32_bytes")
        lead = self._lead_of(number, system[0], "mean")
        below = self._lead("", "", "", "", "± sd")
        return [
            self._cells(lead, mean, marks, size and full and full / size),
            self._cells(below, spread, {}, None),
        ]

    def _lead_of(self, number, run, seed):
        """The cells that say which system a row is about."""
        estimation = run.get("estimator") or NOTHING
        bits = bits_text(run)
        return self._lead(str(number), run["system"], estimation, bits, seed)

    def _lead(self, number, system, estimation, bits, seed):
        """The first cells, without the columns that would say nothing."""
        return [
            number,
            system,
            *([estimation] if self.with_estimation else []),
            bits,
            *([seed] if self.with_seed else []),
        ]

    def _cells(self, lead, run, marks, ratio):
        """Cells of the numbers of a run, or of several merged to one."""
        numbers = []
        for measure in self.task.columns:
            row = [self._cell(measure, block) for block in self._blocks(run)]
            if measure.test:
                row[-1] = self._marked(row[-1], marks)
            numbers += row
        size = run.get("model_bytes")
        decimals = 1 if self.unit == KIB else 2
        tail = [
            _number(None if size is None else size / self.unit, decimals),
            _number(ratio or None, 1),
        ]
        if self.speed:
            tail.append(_number(run.get("seconds_per_hour"), 1))
        return [*lead, *numbers, *tail]

    def _cell(self, measure, block):
        """A number, with those beside it in parentheses."""
        cell = _number(block[measure.key], measure.decimals)
        for other in self.task.beside(measure):
            if block[other.key] is not None:
                cell += f"({block[other.key]:.{other.decimals}f})"
        return cell

    def _marked(self, number, marks):
        """A tested average with its marks, the digits in one column."""
        shown = "".join(mark for mark, same in marks.items() if same)
        return number + shown.ljust(len(self.baselines))


def _plus_minus(mean_and_sd, decimals):
    """A difference with its standard deviation, or a dash."""
    if mean_and_sd is None:
        return NOTHING
    mean, sd = mean_and_sd
    return f"{mean:+.{decimals}f} ± {sd:.{decimals}f}"


def _number(value, decimals):
    """A number as text, or a dash."""
    return NOTHING if value is None else f"{value:.{decimals}f}"


def _mean(values):
    """Mean, or None where one is None."""
    return None if None in values else fmean(values)


_TO_THE_LEFT = ("sys", "system", "estimation", "same size, by seed")


def results_table(runs, against=None, seeds="all", wide=True):
    """Lay out systems scored on one test set as plain text.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files, in the order of the rows.
    against : sequence of str | None
        Baselines that marks refer to, see `choose_baselines`.
    seeds : str
        "all" or "mean", see `table_cells`.
    wide : bool
        False: averages only, in 80 columns.

    Returns
    -------
    str
        The task's measures by condition, size, compression ratio and time;
        below it what the marks say and, where systems have several seeds, the
        differences between those of equal bytes.
    """
    groups, header, rows = table_cells(runs, against, seeds, wide)
    lines = _aligned(header, rows)
    if not wide and len(lines[0]) > TERMINAL:
        lines = _aligned(header, rows, gap=" ")
    if any(title for title, _ in groups):
        lines.insert(0, _group_line(groups, _widths(header, rows)))
    notes = table_notes(runs, against, seeds)
    for note in notes:
        indent = {"subsequent_indent": "  "}
        lines += [note] if wide else textwrap.wrap(note, TERMINAL, **indent)
    header, rows = difference_cells(runs)
    if rows:
        lines += ["", *_aligned(header, rows)]
    return "\n".join(lines)


def tables_of(runs, against=None):
    """Split runs by what they were scored on, each with its baselines.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files.

    Example
    -------
    >>> run = {"system": "kl", "bits": 4}
    >>> tables_of([run]) == [([run], None)]
    True
    """
    groups = []
    for group in by_test_set(runs):
        own = against
        if groups:
            try:
                choose_baselines(group, against)
            except ValueError:
                own = None
        groups.append((group, own))
    return groups


def table_notes(runs, against=None, seeds="all"):
    """Explain the marks of a table, in lines below it.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files.

    Returns
    -------
    list[str]
        One line for each baseline that something was tested against, and one
        on the rows over several seeds.

    Example
    -------
    >>> test = {"against": "fp32", "z": 0.8, "p": 0.42, "segments": 90}
    >>> kl = {"system": "kl", "bits": 4, "mapsswe": test}
    >>> table_notes([kl, {"system": "fp32", "bits": 32}])
    ['* no significant WER difference from sys 2, fp32 (MAPSSWE, p >= 0.05)']
    """
    tested = task_of(runs[0]).tested
    baselines = choose_baselines(runs, against)
    marks = [significance_marks(run, runs, baselines) for run in runs]
    systems = by_system(runs)
    numbers = {system_key(s[0]): n for n, s in enumerate(systems, 1)}
    names = {key: full_label(s[0], runs) for key, s in zip(numbers, systems)}
    notes = []
    for mark, key in baselines.items():
        outcomes = [own[mark] for own in marks if mark in own]
        if set(outcomes) <= {None}:
            continue
        note = (
            f"{mark} no significant {tested.name} difference from sys "
            f"{numbers[key]}, {names[key]} ({tested.test.name}, p >= "
            f"{SIGNIFICANCE_LEVEL})"
        )
        untested = [
            names[system_key(run)]
            for run, own in zip(runs, marks)
            if own.get(mark, True) is None
        ]
        if untested:
            note += f"; not tested: {', '.join(dict.fromkeys(untested))}"
        notes.append(note)
    for number, (run, *_) in enumerate(systems, 1):
        if run.get("variant"):
            notes.append(f"sys {number}: {run['variant']}")
    if len(systems) < len(runs):
        over = "mean and standard deviation over the seeds of a system"
        marked = "; marked if no seed differs" if notes else ""
        notes.append(f"mean, ± sd: {over}{marked}")
    return notes


def _aligned(header, rows, gap="  "):
    """Lines of a table with its columns aligned, ruled below the header."""
    widths = _widths(header, rows)
    left = [title in _TO_THE_LEFT for title in header]
    lines = [
        gap.join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left)
        )
        for row in (header, *rows)
    ]
    lines.insert(1, "-" * len(lines[0]))
    return lines


def _widths(header, rows):
    """Width of every column."""
    return [max(map(len, column)) for column in zip(header, *rows)]


def _group_line(groups, widths):
    """Titles over the columns they span."""
    parts, first = [], 0
    for title, columns in groups:
        span = widths[first : first + columns]
        parts.append(title.center(sum(span) + 2 * (columns - 1)))
        first += columns
    return "  ".join(parts).rstrip()
