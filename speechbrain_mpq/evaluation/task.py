"""Describe a task: its measures, conditions and texts.

Tables, reports, plots and model cards are made from a `Task`, so that
perplexity or accuracy fit in as SI-SNR does. A registered task is found again
by the name in metrics.json; a file without one is of the separation task.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from statistics import fmean

from ..utils import is_number
from .significance import mapsswe
from .wer import WordErrors, word_errors

DEFAULT_TASK = "separation"  # of metrics.json files that name none
NO_CONDITION = "all"  # the one block of a task without conditions
_HOMES = {  # modules that register a task
    "classification": "word_tasks",
    "separation": "signal_tasks",
    "language modelling": "word_tasks",
    "speech quality": "signal_tasks",
    "speech recognition": "word_tasks",
    "noise suppression": "signal_tasks",
}
_TASKS = {}


@dataclass(frozen=True)
class SignificanceTest:
    """A comparison of two systems on the same test items."""

    key: str  # where metrics.json has the outcome
    name: str  # in notes and sentences
    counted: str  # what the test counts, in words: "word errors"
    samples: str  # what is paired, in words: "segments"; key of their number
    # Maps pairs (item of the system, item of the baseline) to a dict of "z",
    # "p" and `samples`; z > 0: the system has more of what is counted.
    run: Callable


@dataclass(frozen=True)
class Measure:
    """One number that a system is judged by.

    Arguments
    ---------
    key : str
        Where the averages of metrics.json have it.
    name : str
        Name in tables.
    long_name : str
        Name in sentences; empty for `name`.
    unit : str
        Unit, or nothing; differences in "%" are "points".
    decimals : int
        Digits that are shown.
    higher_is_better : bool
        Which way is better.
    unprocessed : str or None
        Where a block has the same number of the unprocessed input.
    beside : str or None
        Key of the measure whose cells show this one in parentheses.
    test : SignificanceTest or None
        How differences are tested; one measure of a task has it at most.
    axis : str
        Title of its plots; empty for name and unit.
    least_span : float
        Least height of an axis, lest a tie look like a difference.

    Example
    -------
    >>> accuracy = Measure("accuracy", "accuracy", unit="%", decimals=1)
    >>> accuracy.title, accuracy.difference_unit
    ('accuracy %', 'points')
    >>> accuracy.axis_title
    'accuracy, % (higher is better)'
    """

    key: str
    name: str
    long_name: str = ""
    unit: str = ""
    decimals: int = 2
    higher_is_better: bool = True
    unprocessed: str | None = None
    beside: str | None = None
    test: SignificanceTest | None = None
    axis: str = ""
    least_span: float = 0.0

    @property
    def spoken(self):
        """Name in sentences."""
        return self.long_name or self.name

    @property
    def title(self):
        """Name and unit."""
        return f"{self.name} {self.unit}".strip()

    @property
    def difference_unit(self):
        """Unit of a difference."""
        return "points" if self.unit == "%" else self.unit

    @property
    def axis_title(self):
        """Title of a plot, with the better direction."""
        named = f"{self.spoken}, {self.unit}" if self.unit else self.spoken
        better = "higher" if self.higher_is_better else "lower"
        return f"{self.axis or named} ({better} is better)"


@dataclass(frozen=True)
class Conditions:
    """Groups of test items that are averaged on their own."""

    names: tuple  # of the groups, in order
    of: Callable  # maps a test item to the name of its group
    title: str  # what they differ in: "angle between the speakers"
    axis: str  # the same with its unit
    noun: str  # what a group is called: "angle bucket"
    together: str  # all of them: "the four angle buckets"
    column: str  # head of a column of names
    note: str  # sentence above a table by condition


@dataclass(frozen=True)
class ItemField:
    """One entry of a test item."""

    key: str
    kind: type = float  # or str, or bool
    optional: bool = False  # whether it may be None
    plural: str = ""  # several of them, in messages; empty for `key`

    def fits(self, value):
        """Whether a value is of this kind; texts are checked elsewhere."""
        if self.kind is str or value is None and self.optional:
            return True
        if self.kind is bool:
            return isinstance(value, bool)
        return is_number(value)


@dataclass(frozen=True)
class SameInput:
    """A number that tells whether two systems had the same input."""

    key: str  # where test items and blocks have it
    tolerance: float  # a larger difference says that the inputs were others
    difference: str  # how such inputs differ, for messages


@dataclass(frozen=True)
class CardText:
    """What a model card says about the task."""

    title: str  # headline, without the bits
    about: str  # what the model does, a paragraph
    # How it is loaded and called, Markdown; "{sample}" stands for the name of
    # a recording, in quotes.
    use: str = ""
    tags: tuple = ()  # for the hub
    pipeline_tag: str = "audio-to-audio"  # the hub's name of the task
    end: str = ""  # last paragraph; empty for that of packed folders


@dataclass(frozen=True)
class Task:
    """A record of what is scored and how it is presented.

    Arguments
    ---------
    name : str
        Name of the task; metrics.json has it as "task".
    measures : tuple of Measure
        In the order of the columns; the first is what it is about.
    fields : tuple of ItemField
        What every test item holds beside its "id".
    summarise : callable
        Maps the items of one condition to a dict of numbers: "n", and every
        measure by its key, None where it is not known.
    card : callable
        Maps a quantization_config.json to the model card's `CardText`.
    conditions : Conditions or None
        Groups of items; None: all are averaged together.
    items : str
        Several test items, in words.
    reference : str
        Field that says what the right output is.
    unprocessed : str or None
        What the input is called where it is scored as well.
    same_input : SameInput or None
        How two systems are known to have had the same input.
    counts : tuple of str
        Further numbers that every block must hold.
    speed : str or None
        Head of the column of seconds per hour of audio, None without audio.

    Example
    -------
    >>> task = find_task("separation")
    >>> [measure.title for measure in task.measures]
    ['SI-SNR dB', 'PESQ', 'WER %']
    >>> task.condition_names
    ('0-15', '15-45', '45-90', '90-180')
    """

    name: str
    measures: tuple
    fields: tuple
    summarise: Callable
    card: Callable
    conditions: Conditions | None = None
    items: str = "items"
    reference: str = "reference"
    unprocessed: str | None = None
    same_input: SameInput | None = None
    counts: tuple = ()
    speed: str | None = None

    @property
    def keys(self):
        """Keys of the measures."""
        return tuple(measure.key for measure in self.measures)

    @property
    def columns(self):
        """Measures with cells and plots of their own."""
        return [measure for measure in self.measures if not measure.beside]

    def beside(self, measure):
        """Measures that are shown in the cells of another."""
        return [other for other in self.measures if other.beside == measure.key]

    @property
    def tested(self):
        """The measure whose differences are tested, or None."""
        return next((m for m in self.measures if m.test), None)

    @property
    def condition_names(self):
        """Names of the blocks in metrics.json."""
        return self.conditions.names if self.conditions else (NO_CONDITION,)

    def condition_of(self, item):
        """Name of the block that an item counts in."""
        return self.conditions.of(item) if self.conditions else NO_CONDITION


def register_task(task):
    """Let a task be found by its name.

    Arguments
    ---------
    task : Task
        The record.

    Returns
    -------
    task : Task
        The same.
    """
    if _TASKS.setdefault(task.name, task) != task:
        raise ValueError(f"there is another task named {task.name!r}")
    return task


def find_task(name=None):
    """Find a registered task."""
    name = DEFAULT_TASK if name is None else name
    if name in _HOMES and name not in _TASKS:
        import_module(f".{_HOMES[name]}", __package__)
    if name not in _TASKS:
        names = ", ".join(sorted({*_HOMES, *_TASKS}))
        raise ValueError(
            f"there is no task {name!r}, only {names}: import its module"
        )
    return _TASKS[name]


def markdown_table(header, rows):
    """Write a table in Markdown.

    Arguments
    ---------
    header : sequence of str
    rows : iterable of sequence

    Example
    -------
    >>> print(markdown_table(("bits", "WER"), [(4, "5.2 %")]), end="")
    | bits | WER |
    | --- | --- |
    | 4 | 5.2 % |
    """
    return "\n".join(markdown_lines(header, rows)) + "\n"


def markdown_lines(header, rows):
    """Yield the lines of a table in Markdown, each as soon as its row is there.

    Example
    -------
    >>> for line in markdown_lines(("bits", "WER"), [(4, "5.2 %")]):
    ...     print(line, flush=True)
    | bits | WER |
    | --- | --- |
    | 4 | 5.2 % |
    """
    for row in chain((header, ["---"] * len(header)), rows):
        cells = [str(cell).replace("|", "\\|") for cell in row]
        yield f"| {' | '.join(cells)} |"


def mean(values):
    """Average values; None where there is no value or one is None."""
    if not values or None in values:
        return None
    return float(fmean(values))


# What several tasks share: word errors and their significance


def _test_word_errors(pairs):
    """MAPSSWE of two systems' items."""
    result = mapsswe(
        (own["reference"], own["hypothesis"], other["hypothesis"])
        for own, other in pairs
    )
    return {"z": result.z, "p": result.p, "segments": result.segments}


MAPSSWE = SignificanceTest(
    "mapsswe", "MAPSSWE", "word errors", "segments", _test_word_errors
)
WER = Measure(
    "wer",
    "WER",
    "word error rate",
    unit="%",
    decimals=1,
    higher_is_better=False,
    test=MAPSSWE,
    least_span=10,
)


def count_word_errors(items, hypothesis="hypothesis"):
    """Count the word errors of many items together.

    Arguments
    ---------
    items : list of dict
        With "reference" and `hypothesis`.
    hypothesis : str
        Key of what was recognised.

    Returns
    -------
    errors : WordErrors
        Their sum.

    Example
    -------
    >>> count_word_errors([{"reference": "a b", "hypothesis": "a"}]).rate
    50.0
    """
    pairs = [(item["reference"], item[hypothesis]) for item in items]
    return sum((word_errors(*pair) for pair in pairs), WordErrors())
