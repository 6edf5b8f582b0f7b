"""`speechbrain-mpq table`: all finished experiments in one table."""

import sys

from ..utils import check_output

HELP = "one table of all finished experiments below some folders"
EXAMPLE = "speechbrain-mpq table results/ --against fp32 uniform_4bit"


def add_arguments(parser):
    """Add the command's options to a parser."""
    parser.add_argument("folders", nargs="*", metavar="folder")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="SYSTEM",
        help="mark word error rates that do not differ significantly from "
        "these systems, as fp32 or uniform_4bit (default: those of the "
        "paper's Table 1 that are there: fp32, uniform_4bit, uniform_8bit)",
    )
    parser.add_argument(
        "--seeds",
        choices=("all", "mean"),
        default="all",
        help="a row for each seed, or only their mean and standard deviation",
    )
    parser.add_argument(
        "--wide",
        action="store_true",
        help="every condition, as the angle buckets, and the speed; without "
        "it the table has 80 columns",
    )
    parser.add_argument("--html", help="write a page to this file as well")


def run(options) -> int:
    """Print the table of the folders, and write its page."""
    from ..evaluation.results_table import results_table, tables_of
    from ..evaluation.runs import gather

    if options.html:
        check_output(options.html)
    runs = gather(*(options.folders or ["results"]))
    tables = tables_of(runs, options.against)
    shown = []
    for number, (group, against) in enumerate(tables, 1):
        if len(tables) > 1:
            corpus = group[0].get("corpus") or "unnamed"
            shown.append(
                f"Test set {number} of {len(tables)}, corpus {corpus}, as "
                f"{group[0]['folder']}:\n"
            )
        table = results_table(group, against, options.seeds, options.wide)
        shown.append(table + "\n" * (number < len(tables)))
    if options.html:
        from ..evaluation.report import write_table

        write_table(options.html, runs, options.against, options.seeds)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # not all terminals have †
    print("\n".join(shown))
    return 0
