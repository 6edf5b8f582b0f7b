"""Options that several commands have: what runs the model, and where."""

import argparse

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
