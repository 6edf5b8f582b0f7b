"""Mixed-precision quantization of speech models."""

import argparse
import os
import sys
from importlib import import_module

from . import __version__
from .utils import keep_freed_memory

COMMANDS = (
    "table",
    "track",
    "quantize",
    "separate",
    "inspect",
    "verify",
    "export",
    "demo",
)


def main(arguments=None):
    """Run a command: `speechbrain-mpq table results/`.

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
    keep_freed_memory()
    try:
        code = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, as `head`, has seen enough. Python would flush once more
        # at exit and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(_message(error), file=sys.stderr)
        return 1
    return code


def _message(error):
    """What went wrong, without the system's number for it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    return str(error)


def _parser():
    """What the command line may say."""
    parser = argparse.ArgumentParser(
        prog="speechbrain-mpq", description=__doc__
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="command"
    )
    for name in COMMANDS:
        module = import_module(f".commands.{name}", __package__)
        command = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=f"example: {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
