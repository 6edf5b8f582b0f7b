"""Command line: `python -m speechbrain_mpq table results/`."""

import argparse
import os
import sys


def main(arguments=None):
    """Run a command.

    Arguments
    ---------
    arguments : list of str or None
        Those of the command line if not given.

    Returns
    -------
    code : int
        Exit status: 0, or 1 where there was something to complain of.

    Example
    -------
    >>> main(["table", "no/such/folder"])
    1
    """
    options = _parser().parse_args(arguments)
    try:
        _show_table(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, as `head`, has seen enough. Python would flush once more
        # at exit and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser():
    """What the command line may say."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_mpq", description=__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser(
        "table",
        help="one table of all finished experiments below some folders",
        epilog="example: python -m speechbrain_mpq table results/ "
        "--against fp32 uniform_4bit --html table.html",
    )
    table.add_argument("folders", nargs="*", metavar="folder")
    table.add_argument(
        "--against",
        nargs="+",
        metavar="SYSTEM",
        help="mark word error rates that do not differ significantly from "
        "these systems, as fp32 or uniform_4bit (default: those of the "
        "paper's Table 1 that are there: fp32, uniform_4bit, uniform_8bit)",
    )
    table.add_argument(
        "--seeds",
        choices=("all", "mean"),
        default="all",
        help="a row for each seed, or only their mean and standard deviation",
    )
    table.add_argument("--html", help="write a page to this file as well")
    return parser


def _show_table(options):
    """Print the table of the folders, and write its page."""
    from .evaluation.runs import gather
    from .evaluation.table import results_table

    runs = gather(*(options.folders or ["results"]))
    shown = results_table(runs, options.against, options.seeds)
    if options.html:
        from .evaluation.report import write_table

        write_table(options.html, runs, options.against, options.seeds)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # not all terminals have †
    print(shown)


if __name__ == "__main__":
    sys.exit(main())
