"""`speechbrain-mpq table`: all finished experiments in one table."""

import sys

HELP = "one table of all finished experiments below some folders"
EXAMPLE = "speechbrain-mpq table results/ --against fp32 uniform_4bit"


def add_arguments(parser):
    """Add the command's options to a parser.

    Arguments
    ---------
    parser : argparse.ArgumentParser
        Of this command.
    """
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
    parser.add_argument("--html", help="write a page to this file as well")


def run(options):
    """Print the table of the folders, and write its page.

    Arguments
    ---------
    options : argparse.Namespace
        The parsed command line.

    Returns
    -------
    code : int
        Exit status.
    """
    from ..evaluation.results_table import results_table
    from ..evaluation.runs import gather

    runs = gather(*(options.folders or ["results"]))
    shown = results_table(runs, options.against, options.seeds)
    if options.html:
        from ..evaluation.report import write_table

        write_table(options.html, runs, options.against, options.seeds)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # not all terminals have †
    print(shown)
    return 0
