"""Write the report page of a system: its numbers, in words and figures.

A page is one HTML file with all it shows inside. The task of the runs says
which measures and conditions there are; a section is there where its file is.
"""

import operator
from dataclasses import dataclass
from functools import partial

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        'the report needs matplotlib: pip install "speechbrain_mpq[evaluate]"'
    ) from error
from ..utils import write_text
from . import plots
from .page import example_section, page, picture, tag, text
from .results_table import (
    compare,
    difference_cells,
    table_cells,
    table_notes,
    tables_of,
)
from .runs import (
    FULL_PRECISION,
    bits_text,
    full_label,
    label,
    size_text,
    task_of,
)
from .significance import SIGNIFICANCE_LEVEL

SAME = 1.0  # points of a tested measure that are as good as none


@dataclass
class Evidence:
    """What a report shows beside the metrics; each may be missing.

    Example
    -------
    >>> Evidence(plan={"clusters": {}}).scores is None
    True
    """

    plan: dict | None = None  # content of plan.json
    scores: dict | None = None  # content of scores.json
    ceiling: dict | None = None  # content of ceiling.json: the coding gain
    pareto: dict | None = None  # content of pareto.json
    # dicts: content of additivity.json: "plan", "predicted" and "measured"
    additivity: list | None = None
    # dicts: content of admm.json: "iteration", "primal_residual", "valid_loss"
    admm: list | None = None
    # losses of every epoch, see `plots.training_curve`
    training_curve: list | None = None
    # dicts: metrics of more systems, drawn beside these by their size
    neighbours: tuple = ()
    # dicts: test items to look at and to listen to: {"id", "sample_rate",
    # "signals"} and what else is known of "reference", "hypotheses",
    # "doa_target", "doa_interferer", "angle" and the first measure, as
    # "si_snr"; signals, hypotheses and the measure are dicts by "mixture",
    # "target" and system
    examples: tuple = ()


def _verdict(metrics):
    """Headline and sentences on the first system, against the others."""
    system, *baselines = metrics
    names = {id(run): full_label(run, metrics) for run in metrics}
    full = [m for m in baselines if m["bits"] >= FULL_PRECISION]
    headline = label(system)
    if full:
        headline += f": {_headline(system, full[0])}"
    sentences = [_gain(system)]
    sentences += [
        _comparison(system, baseline, names[id(baseline)])
        for baseline in baselines
    ]
    return headline, [sentence for sentence in sentences if sentence]


def _headline(system, full):
    """Compression and loss against full precision, in one line."""
    parts = []
    if system.get("model_bytes") and full.get("model_bytes"):
        ratio = full["model_bytes"] / system["model_bytes"]
        parts.append(f"{ratio:.1f} times smaller")
    task = task_of(system)
    measure = task.tested or task.measures[0]
    outcome = compare(system, full)
    if outcome is None:
        difference = _difference(system, full, measure.key)
        if difference is not None:
            amount = _signed(difference, measure)
            parts.append(f"{measure.spoken} {amount}")
    elif outcome["p"] >= SIGNIFICANCE_LEVEL:
        parts.append(_no_change(system, full, measure, outcome["z"]))
    else:
        more = "more" if outcome["z"] > 0 else "fewer"
        parts.append(f"significantly {more} {measure.test.counted}")
    return ", ".join(parts)


def _no_change(system, full, measure, z):
    """What a test that shows no difference allows to say."""
    counted = measure.test.counted
    between = _interval(system, full, measure, z)
    if between is None:
        return f"no difference in {counted} shown"
    low, high = between
    if max(-low, high) <= SAME:
        return f"no significant change in {counted}"
    unit = f" {measure.difference_unit}".rstrip()
    return (
        f"{measure.spoken} {low:+.1f} to {high:+.1f}{unit} (95 % interval, "
        "no difference shown)"
    )


def _interval(system, full, measure, z):
    """Where the difference lies with 95 % certainty; None: it is not known."""
    counts = task_of(system).counts

    def pooled(run):
        blocks = [*run["buckets"].values()]
        values = [block.get(measure.key) for block in blocks]
        if None in values:
            return None
        weights = [block[counts[0] if counts else "n"] for block in blocks]
        if not sum(weights):
            return None
        return sum(map(operator.mul, values, weights)) / sum(weights)

    ours, theirs = pooled(system), pooled(full)
    if None in (ours, theirs):
        return None
    difference = ours - theirs
    if not z or not difference:
        return None
    margin = 1.96 * abs(difference / z)
    return difference - margin, difference + margin


def _gain(system):
    """Sentence on what the system does to its input."""
    task = task_of(system)
    measure = task.measures[0]
    if not (task.unprocessed and measure.unprocessed):
        return None
    blocks = system["buckets"].values()
    before = [block[measure.unprocessed] for block in blocks]
    after = system["average"][measure.key]
    if not before or None in before or after is None:
        return None
    before = sum(before) / len(before)
    together = task.conditions and task.conditions.together
    over = f", the mean of {together}" if together else ""
    shown = [
        f"{value:.{measure.decimals}f} {measure.unit}".rstrip()
        for value in (before, after)
    ]
    return (
        f"{task.name.capitalize()} takes the {measure.name} from {shown[0]} in "
        f"the {task.unprocessed} to {shown[1]}{over}."
    )


def _comparison(system, baseline, name):
    """Sentence on the system against one baseline."""
    task = task_of(system)
    # What is tested comes first.
    measures = sorted(task.measures, key=lambda measure: not measure.test)
    parts = []
    for measure in measures:
        difference = _difference(system, baseline, measure.key)
        if difference is not None:
            parts.append(f"{_signed(difference, measure)} {measure.name}")
    sizes = [m.get("model_bytes") for m in (system, baseline)]
    size = ""
    if all(sizes):
        size = f" ({size_text(sizes[0])} against {size_text(sizes[1])})"
    if not parts:
        return None
    how = baseline.get("estimator")  # how it is estimated
    if how and how not in name:
        name += f" by {how}"
    sentence = f"Against {name}{size}: {', '.join(parts)}."
    if task.tested is None:
        return sentence
    test = task.tested.test
    result = compare(system, baseline)
    if result is None:
        return f"{sentence} The difference in {test.counted} was not tested."
    outcome = "is" if result["p"] < SIGNIFICANCE_LEVEL else "is not"
    return (
        f"{sentence} The difference in {test.counted} {outcome} significant "
        f"({test.name}, z = {result['z']:.2f}, {_p_text(result['p'])}, "
        f"{result[test.samples]} {test.samples})."
    )


def _signed(difference, measure):
    """A difference with its unit."""
    shown = f"{difference:+.{measure.decimals}f}"
    return f"{shown} {measure.difference_unit}".rstrip()


def _p_text(p):
    """A p value; small ones as a bound."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def _difference(system, baseline, key):
    """System minus baseline on average, or None where one is unknown."""
    ours, theirs = system["average"][key], baseline["average"][key]
    return None if ours is None or theirs is None else ours - theirs


def _quality_section(names, runs):
    """Plots of the table's numbers by condition, where there are several."""
    task = task_of(runs[0])
    if not task.conditions:
        return ""
    draw = partial(plots.quality_by_condition, names, runs)
    *most, last = [measure.spoken for measure in task.measures]
    measures = f"{', '.join(most)} and {last}" if most else last
    return _figure(draw, f"{measures} by {task.conditions.noun}")


def _pareto_section(runs, predicted=None, own=True):
    """Size against quality, and against the predicted score."""
    note = (
        "Every system by the size of its file; full precision is the dashed "
        "line, vertical bars span the seeds, figures are bits; solid lines: "
        "PostTraining, dashed: LearnedStep."
    )
    if own:
        note += " The ring is around this system."
    if predicted:
        note += (
            " On the right, the least sum of scores that a file of each size "
            "allows, and the plan that was chosen."
        )
    draw = partial(plots.pareto, runs, predicted, own)
    return (
        tag("h2", "Size against quality")
        + tag("p", text(note))
        + _figure(draw, "Quality against the size of the file")
    )


def _plan_section(plan, gain=None):
    """Bits per cluster, and how many parameters have how many."""
    clusters = plan["clusters"]
    average = bits_text({"bits": plan["average_bits"]})
    note = (
        f"{len(clusters)} clusters, {average} bits per parameter on average, "
        f"{size_text(plan['bytes'])} by the plan's count."
    )
    parts = [tag("h2", "Where the bits went"), tag("p", text(note))]
    if gain:
        parts.append(tag("p", text(_coding_gain_note(gain))))
    caption = (
        "Bits of every cluster, in the order of the signal; areas are bytes"
    )
    parts.append(
        _figure(partial(plots.bits_per_cluster, clusters), caption, "wide")
    )
    parts.append(tag("div", _bits_table(clusters), class_="scroll"))
    return "".join(parts)


def _scores_section(scores):
    """Heat map of the sensitivities that the bits follow from."""
    note = f"Method: {scores.get('method', 'not named')}. " + (
        "Brighter clusters lose more at these bits; empty cells are zero or "
        "below."
    )
    parts = [
        tag("h2", "Sensitivity to quantization"),
        tag("p", text(note)),
        _figure(
            partial(plots.sensitivity_map, scores),
            "Sensitivity of every cluster by bits",
            "map",
        ),
    ]
    traces = scores.get("details", {}).get("traces")
    if traces:
        caption = "Hessian trace of every cluster with its standard error"
        parts.append(_figure(partial(plots.trace_errors, traces), caption))
    return "".join(parts)


def _additivity_section(rows):
    """Predicted against measured loss of whole plans."""
    note = (
        "Scores change one cluster at a time; their sum is what a whole plan "
        "should lose if clusters did not act on each other. Above the dashed "
        "line a plan loses more than that."
    )
    draw = partial(plots.predicted_and_measured, rows)
    return (
        tag("h2", "Predicted and measured loss")
        + tag("p", text(note))
        + _figure(draw, "Predicted against measured loss of whole plans")
    )


def _admm_section(rows):
    """Convergence of ADMM."""
    note = (
        "The primal residual says how far the weights are from their "
        "quantized values; the loss is that of the quantized network."
    )
    return (
        tag("h2", "Convergence of ADMM")
        + tag("p", text(note))
        + _figure(partial(plots.convergence, rows), "ADMM by iteration")
    )


def _training_section(curve):
    """Curves of the training."""
    draw = partial(plots.training_curve, curve)
    return tag("h2", "Training") + _figure(draw, "Training by epoch")


def _table_row(cells, starts=(), element="td", class_=""):
    """One table row."""
    inner = "".join(
        tag(element, text(cell.strip()), class_="first")
        if index in starts
        else tag(element, text(cell.strip()))
        for index, cell in enumerate(cells)
    )
    return tag("tr", inner, class_=class_) if class_ else tag("tr", inner)


def _bits_table(clusters):
    """How many clusters and parameters have how many bits."""
    total = sum(cluster["parameters"] for cluster in clusters.values())
    rows = []
    for bits in sorted({cluster["bits"] for cluster in clusters.values()}):
        sizes = [
            cluster["parameters"]
            for cluster in clusters.values()
            if cluster["bits"] == bits
        ]
        share = f"{100 * sum(sizes) / max(total, 1):.1f} %"
        cells = [f"{bits:g} bit", str(len(sizes)), f"{sum(sizes):,}", share]
        rows.append(_table_row(cells))
    header = ["bits", "clusters", "parameters", "share"]
    head = tag("thead", _table_row(header, element="th"))
    return tag("table", head + tag("tbody", "".join(rows)))


def _coding_gain_note(gain):
    """What mixed precision can win here, and what the plan wins."""
    note = (
        "If each bit took off 6 dB of harm, mixed precision could lose at most "
        f"{gain['am_gm_db']:.1f} dB less than uniform precision of the same "
        "bytes: the arithmetic over the geometric mean of the sensitivities."
    )
    limited, planned = gain.get("limited_db"), gain.get("planned_db")
    if limited is not None:
        note += f" Within the candidate bits it is {limited:.1f} dB."
    if planned is not None:
        note += (
            f" By the scores themselves this plan loses {planned:.1f} dB less."
        )
    return note


def _figure(draw, caption, class_=""):
    """A figure with its caption, which scrolls where it is wide."""
    image = tag(
        "div", picture(draw, caption), class_=f"scroll {class_}".strip()
    )
    return tag("figure", image + tag("figcaption", text(caption)))


def _table_section(runs, against=None, seeds="all", ours=False):
    """The results table, what its marks say, and differences by seed."""
    table = partial(_results_table, runs, against, seeds, ours)
    notes = table_notes(runs, against, seeds)
    if task_of(runs[0]).conditions:  # by condition where there is room
        wide, lean = table(True, class_="desk"), table(False, class_="phone")
        shown = wide + lean
    else:
        shown = table(True)
    return (
        shown
        + "".join(tag("p", text(note), class_="soft") for note in notes)
        + _differences(runs)
    )


def _results_table(runs, against, seeds, ours, wide, class_=""):
    """The results as a table."""
    groups, header, rows = table_cells(runs, against, seeds, wide)
    starts, column = set(), 0
    for _, columns in groups:
        starts.add(column)
        column += columns
    starts.discard(0)
    head = _table_row(header, starts, "th")
    if any(title for title, _ in groups):
        titles = "".join(
            tag("th", text(title), colspan=columns) for title, columns in groups
        )
        head = tag("tr", titles) + head
    # The unprocessed input, where it is scored, stands above the first run.
    first = 1 if task_of(runs[0]).unprocessed else 0
    body = "".join(
        _table_row(
            row, starts, class_="ours" if ours and index == first else ""
        )
        for index, row in enumerate(rows)
    )
    return tag("div", _table(head, body, class_="results"), class_=class_)


def _differences(runs):
    """Differences between systems of equal bytes, where seeds allow."""
    header, rows = difference_cells(runs)
    if not rows:
        return ""
    note = (
        "Mean and standard deviation, over the seeds, of the difference "
        "between two systems whose files are of one size."
    )
    body = "".join(_table_row(row) for row in rows)
    return (
        tag("h2", "Differences at equal bytes")
        + tag("p", text(note))
        + _table(_table_row(header, element="th"), body)
    )


def _table(head, body, **attributes):
    """A table that scrolls where it is wide."""
    inner = tag("thead", head) + tag("tbody", body)
    return tag("div", tag("table", inner, **attributes), class_="scroll")


def write_report(path, metrics, evidence=None):
    """Write the report of a system and its baselines as one HTML file.

    Arguments
    ---------
    metrics : list[dict]
        Contents of metrics.json: the system first, then baselines such as
        full and uniform precision, all scored on one test set.
    """
    evidence = evidence or Evidence()
    task = task_of(metrics[0])
    headline, sentences = _verdict(metrics)
    names = [full_label(m, metrics) for m in metrics]
    title = f"{task.name.capitalize()} report"
    by = f" by {task.conditions.title}" if task.conditions else ""
    sections = [
        tag("h1", tag("small", text(title)) + text(headline)),
        *(tag("p", text(sentence)) for sentence in sentences),
        tag("p", text(_origin(metrics[0])), class_="soft"),
        tag("h2", text(f"Results{by}")),
        _table_section(metrics, ours=True),
        _quality_section(names, metrics),
    ]
    if evidence.neighbours or evidence.pareto:
        runs = [*metrics, *evidence.neighbours]
        sections.append(_pareto_section(runs, evidence.pareto))
    if evidence.plan:
        sections.append(_plan_section(evidence.plan, evidence.ceiling))
    if evidence.scores:
        sections.append(_scores_section(evidence.scores))
    if evidence.additivity:
        sections.append(_additivity_section(evidence.additivity))
    if evidence.admm:
        sections.append(_admm_section(evidence.admm))
    if evidence.training_curve:
        sections.append(_training_section(evidence.training_curve))
    if evidence.examples:
        sections.append(tag("h2", "Look and listen"))
        sections.append(tag("p", _EXAMPLES_NOTE, class_="soft"))
        sections += [
            example_section(example, task.measures[0])
            for example in evidence.examples
        ]
    write_text(path, page(headline, "\n".join(filter(None, sections))))


def write_table(path, runs, against=None, seeds="all"):
    """Write the results table of many systems as one HTML file.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files, as `runs.gather` gives them; there is
        a table for each test set.
    """
    sections = []
    for group, marked in tables_of(runs, against):
        origin = _origin(group[0], ("corpus", "test_set"))
        sections += [
            tag("h1", tag("small", "Results") + "Systems on one test set"),
            tag("p", text(origin), class_="soft"),
            _table_section(group, marked, seeds),
            _pareto_section(group, own=False),
        ]
    write_text(path, page("Results", "\n".join(sections)))


_EXAMPLES_NOTE = (
    "All signals of an item are brought to one loudness. In transcripts, "
    "<span class='words'><mark>wrong <s>right</s></mark></span> is a "
    "substitution, <span class='words'><del>left out</del></span> a deletion "
    "and <span class='words'><ins>added</ins></span> an insertion. "
    "Spectrograms: time in seconds, frequency in kHz, 70 dB by colour."
)


def _origin(metrics, keys=("corpus", "seed", "test_set")):
    """Corpus, seed, test set and times of a run in one line."""
    shown = [key for key in keys if metrics.get(key) is not None]
    parts = [f"{key.replace('_', ' ')} {metrics[key]}" for key in shown]
    parts.insert(
        len(parts) - ("test_set" in shown),
        f"{sum(b['n'] for b in metrics['buckets'].values())} "
        f"{task_of(metrics).items}",
    )
    if "seed" in keys:
        parts += [
            f"{name} {seconds:.0f} s"
            for name, seconds in (metrics.get("wall_seconds") or {}).items()
        ]
    return " · ".join(parts)
