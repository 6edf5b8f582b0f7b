"""The argument parser of all commands: it says what a typing error meant."""

import argparse

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
        if args is not None and self.allow_abbrev:  # else others' may follow
            self._check_options(args)
        return super().parse_known_args(args, namespace)

    def _check_options(self, args):
        """End the program at the first option that there is not."""
        known = [
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
            if text[:2] != "--" or any(k.startswith(name) for k in known):
                continue
            self.error(f"no option {name}{did_you_mean(name, known)}")

    def _check_value(self, action, value):
        """Refuse a value that is none of the choices."""
        choices = action.choices
        if choices is not None and value not in choices:
            hint = did_you_mean(value, choices)
            raise argparse.ArgumentError(action, f"no {value}{hint}")
