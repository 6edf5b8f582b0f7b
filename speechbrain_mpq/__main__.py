"""Command line: `python -m speechbrain_mpq table results/`."""

import argparse
import sys

from .evaluation.files import gather
from .evaluation.table import results_table


def main(arguments=None):
    """Run a command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_mpq", description=__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser(
        "table",
        help="one table of all finished experiments below a folder",
        epilog="example: python -m speechbrain_mpq table results/",
    )
    table.add_argument("folder", nargs="?", default="results")
    options = parser.parse_args(arguments)
    try:
        metrics = gather(options.folder)
        print(results_table(metrics))
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
