"""Mixed-precision quantization of speech models."""

import argparse
import codecs
import os
import sys
from importlib import import_module

from . import __version__
from .commands.arguments import Parser
from .signals import exit_on_signals
from .utils import error_text, keep_freed_memory

REPLACED = {"█": b"#", "°": b" deg"}
COMMANDS = (
    "table",
    "track",
    "locate",
    "quantize",
    "separate",
    "enhance",
    "inspect",
    "verify",
    "export",
    "demo",
    "rescore",
    "quality",
    "transcribe",
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
    _prepare_output()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    keep_freed_memory()
    try:
        with exit_on_signals():
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
        print(error_text(error), file=sys.stderr)
        return 1
    return code


def _prepare_output():
    """Let any text be printed, wherever the output goes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))
    codecs.register_error("speechbrain_mpq", _replaced)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="speechbrain_mpq")


def _replaced(error):
    """Bytes for letters that the output's encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    # Names of files that are no UTF-8 come as they are on the disk
    content = b"".join(
        bytes([ord(letter) - 0xDC00])
        if 0xDC80 <= ord(letter) <= 0xDCFF
        else REPLACED.get(letter, b"?")
        for letter in letters
    )
    return content, error.end


def _parser():
    """What the command line may say."""
    parser = Parser(prog="speechbrain-mpq", description=__doc__)
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
