"""Pages of results: one HTML file each, with all it shows inside."""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        'the report needs matplotlib: pip install "speechbrain_mpq[evaluate]"'
    ) from error

from ..whole_files import write_text
from .examples import example_section
from .page import page, tag, text
from .sections import (
    additivity_section,
    admm_section,
    pareto_section,
    plan_section,
    quality_section,
    scores_section,
    training_section,
)
from .systems import label
from .table_html import table_section
from .verdict import verdict


def write_report(
    path,
    metrics,
    plan=None,
    scores=None,
    examples=(),
    training_curve=None,
    neighbours=(),
    ceiling=None,
    pareto=None,
    additivity=None,
    admm=None,
):
    """Write the report of a system and its baselines as one HTML file.

    Arguments
    ---------
    path : str | Path
        The file; its folder must exist.
    metrics : list[dict]
        Contents of metrics.json: the system first, then baselines such as
        full and uniform precision, all scored on one test set.
    plan : dict | None
        Content of plan.json.
    scores : dict | None
        Content of scores.json.
    examples : list[dict]
        Test items to look at and to listen to: {"id", "doa_target",
        "doa_interferer", "angle", "sample_rate", "reference", "signals",
        "hypotheses", "si_snr"}; signals, hypotheses and si_snr are dicts by
        "mixture", "target" and system.
    training_curve : list | None
        One dict of numbers per epoch, or the losses alone.
    neighbours : list[dict]
        Metrics of more systems, drawn beside these by their size.
    ceiling : dict | None
        Content of ceiling.json, shown with the plan: what mixed precision can
        win, "am_gm_db" and "limited_db", and what the plan does, "planned_db".
    pareto : dict | None
        Content of pareto.json: "points" and "chosen", dicts of "bytes" and
        the summed "score" of a plan.
    additivity : list[dict] | None
        Content of additivity.json: "plan", "predicted" and "measured".
    admm : list[dict] | None
        Content of admm.json: "iteration", "primal_residual", "valid_loss".

    Example
    -------
    >>> from .metrics import summarise
    >>> item = {
    ...     "id": "a",
    ...     "angle": 7.0,
    ...     "si_snr": 9.0,
    ...     "si_snr_mixture": 0.0,
    ...     "pesq": 2.0,
    ...     "reference": "set red",
    ...     "hypothesis": "set blue",
    ... }
    >>> path = getfixture("tmpdir") / "report.html"
    >>> write_report(path, [{"system": "kl", "bits": 4, **summarise([item])}])
    >>> "9.00(2.00)" in path.read_text("utf-8")
    True
    """
    headline, sentences = verdict(metrics)
    names = [label(m) for m in metrics]
    sections = [
        tag("h1", tag("small", "Separation report") + text(headline)),
        *(tag("p", text(sentence)) for sentence in sentences),
        tag("p", text(_origin(metrics[0])), class_="soft"),
        tag("h2", "Results by angle between the speakers"),
        table_section(metrics, ours=True),
        quality_section(names, metrics),
    ]
    if neighbours or pareto:
        runs = [*metrics, *neighbours]
        sections.append(pareto_section(runs, pareto))
    if plan:
        sections.append(plan_section(plan, ceiling))
    if scores:
        sections.append(scores_section(scores))
    if additivity:
        sections.append(additivity_section(additivity))
    if admm:
        sections.append(admm_section(admm))
    if training_curve:
        sections.append(training_section(training_curve))
    if examples:
        sections.append(tag("h2", "Look and listen"))
        sections.append(tag("p", _EXAMPLES_NOTE, class_="soft"))
        sections += [example_section(example) for example in examples]
    write_text(path, page(headline, "\n".join(sections)))


def write_table(path, runs, against=None, seeds="all"):
    """Write the results table of many systems as one HTML file.

    Arguments
    ---------
    path : str | Path
        The file; its folder must exist.
    runs : list[dict]
        Contents of metrics.json files, as `runs.gather` gives them.
    against : sequence of str | None
        Baselines of the marks, see `marks.choose_baselines`.
    seeds : str
        "all" or "mean", see `table_cells.table_cells`.
    """
    sections = [
        tag("h1", tag("small", "Results") + "Systems on one test set"),
        tag("p", text(_origin(runs[0], ("corpus", "test_set"))), class_="soft"),
        table_section(runs, against, seeds),
        pareto_section(runs, own=False),
    ]
    write_text(path, page("Results", "\n".join(sections)))


_EXAMPLES_NOTE = (
    "All signals of an item are brought to one loudness. In transcripts, "
    "<span class='words'><mark>wrong <s>right</s></mark></span> is a "
    "substitution, <span class='words'><del>left out</del></span> a deletion "
    "and <span class='words'><ins>added</ins></span> an insertion. "
    "Spectrograms reach from 0 Hz at the bottom to half the sample rate and "
    "show 70 dB."
)


def _origin(metrics, keys=("corpus", "seed", "test_set")):
    """Corpus, seed, test set and times of a run in one line."""
    shown = [key for key in keys if metrics.get(key) is not None]
    parts = [f"{key.replace('_', ' ')} {metrics[key]}" for key in shown]
    parts.insert(
        len(parts) - ("test_set" in shown),
        f"{sum(b['n'] for b in metrics['buckets'].values())} mixtures",
    )
    if "seed" in keys:
        parts += [
            f"{name} {seconds:.0f} s"
            for name, seconds in (metrics.get("wall_seconds") or {}).items()
        ]
    return " · ".join(parts)
