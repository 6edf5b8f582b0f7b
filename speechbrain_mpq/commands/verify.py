"""`speechbrain-mpq verify`: whether packed folders are whole and safe."""

from ..utils import BUNDLED_MODEL

HELP = "check packed folders: exit status 0 if they are whole, else 1"
EXAMPLE = """
  speechbrain-mpq verify packed
  speechbrain-mpq verify models/* && echo all are whole"""


def add_arguments(parser):
    """Say what the command line may hold."""
    parser.add_argument(
        "folders",
        nargs="*",
        default=[BUNDLED_MODEL],
        metavar="folder",
        help="packed folders (default: the 4-bit separator that comes with "
        "the package)",
    )


def run(options) -> int:
    """Check folders, and say what is wrong with each.

    0 if nothing is wrong with any, else 1.
    """
    from ..inference.verification import check_folder

    bad = 0
    for folder in options.folders:
        problems = check_folder(folder)
        bad += bool(problems)
        if problems:
            for problem in problems:
                print(f"{folder}: {problem}")
        else:
            print(f"{folder}: whole")
    return 1 if bad else 0
