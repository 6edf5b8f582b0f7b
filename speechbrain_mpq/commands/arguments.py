"""Arguments that several commands have, and how wrong ones are told."""

import argparse
import os

from ..utils import did_you_mean


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that suggests what is nearest.

    It does so for options, for subcommands and for the values of options with
    a choice, before anything else that is wrong is complained of.

    Example
    -------
    >>> parser = Parser(prog="separate", exit_on_error=False)
    >>> _ = parser.add_argument("--engine", choices=("torch", "onnx"))
    >>> parser.parse_args(["--engine", "onx"])
    Traceback (most recent call last):
    ...
    argparse.ArgumentError: argument --engine: no onx: did you mean onnx?
    """

    def parse_known_args(self, args=None, namespace=None):
        """Refuse options that are mistyped, then parse as usual."""
        self._given = args or ()
        if args is not None and self.allow_abbrev:  # else others' may follow
            self._check_options(args)
        return super().parse_known_args(args, namespace)

    def error(self, message):
        """End the program; files that look like options are told apart."""
        for text in getattr(self, "_given", ()):
            if text[:1] == "-" and len(text) > 1 and os.path.exists(text):
                message += f" (write the file {text} as .{os.sep}{text})"
                break
        super().error(message)

    def _check_options(self, args):
        """End the program at the first option that there is not."""
        options = [
            name for name in self._option_string_actions if name[:2] == "--"
        ]
        subcommands = any(
            isinstance(action, argparse._SubParsersAction)
            for action in self._actions
        )
        for text in args:
            if text == "--" or (subcommands and text[:1] != "-"):
                return  # what follows is checked by the subcommand
            name = text.partition("=")[0]
            if text[:2] != "--" or any(k.startswith(name) for k in options):
                continue
            self.error(f"no option {name}{did_you_mean(name, options)}")

    def _check_value(self, action, value):
        """Refuse an empty value, and one that is none of the choices."""
        if value == "":  # what an unset variable of the shell gives
            raise argparse.ArgumentError(action, "it is empty: give a value")
        choices = action.choices
        if choices is not None and value not in choices:
            hint = did_you_mean(value, choices)
            raise argparse.ArgumentError(action, f"no {value}{hint}")


ENGINES = ("torch", "openvino", "onnx")
MAX_THREADS = 1024
MAX_CHANNELS = 1024


def add_engine_options(parser, engines=ENGINES):
    """Say which engine may run the network, on how many threads."""
    parser.add_argument(
        "--engine",
        choices=engines,
        default="torch",
        help="what runs the network (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(1, MAX_THREADS),
        default=1,
        help="of the engine (default: 1)",
    )


def whole_number(low, high):
    """Make a type for argparse: an integer of a range.

    Example
    -------
    >>> whole_number(1, 8)("-1")
    Traceback (most recent call last):
    ...
    argparse.ArgumentTypeError: -1 is not a whole number from 1 to 8
    """

    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text} is not a whole number from {low} to {high}"
            )
        return value

    return convert


def bits_number(text):
    """A type for argparse: a number of bits, whole or not.

    Example
    -------
    >>> bits_number("4"), bits_number("1.6")
    (4, 1.6)
    >>> bits_number("two")
    Traceback (most recent call last):
    ...
    argparse.ArgumentTypeError: 'two' is no number of bits, such as 4 or 1.6
    """
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of bits, such as 4 or 1.6"
        ) from error


def check_device(name):
    """Check a device; PyTorch's complaints become a message.

    Example
    -------
    >>> check_device("cpu")
    >>> check_device("gpu")
    Traceback (most recent call last):
    ...
    ValueError: --device gpu cannot be used: Expected one of cpu, cuda, ...
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from error
