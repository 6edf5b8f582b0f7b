"""What a YAML may give a quantizer, checked when the YAML is loaded.

Many options are used only when bits are chosen, after all data is prepared.
"""

import inspect

import torch

from ..allocation.equal_bits import equal_groups
from ..quantization.codebook import scale_shape
from ..quantization.quantizer import clusters
from ..quantization.row_groups import count_slices
from ..quantization.tables import check_bits, check_codebook
from ..quantization.tensors import near_misses

UNREACHED = ("error", "ignore")
MATRIX = (1, 1)  # the shape of something that options of tables apply to


def refuse_unknown(cls, unknown):
    """Refuses options that a class does not have.

    Arguments
    ---------
    cls : type
        What was to be made.
    unknown : dict
        Keyword arguments that its ``__init__`` does not name.

    Example
    -------
    >>> class Sink:
    ...     def __init__(self, targets, bits=4, **unknown):
    ...         refuse_unknown(type(self), unknown)
    >>> sink = Sink([])
    >>> Sink([], bit=3)
    Traceback (most recent call last):
    ...
    TypeError: Sink has no option 'bit'; near misses: bits, targets: choose ...
    """
    for wrong in unknown:
        options = option_names(cls)
        raise TypeError(
            f"{cls.__name__} has no option {wrong!r}"
            f"{near_misses(wrong, options)}: choose from {', '.join(options)}"
        )


def option_names(cls):
    """Arguments of a class and of those that it inherits from.

    Arguments
    ---------
    cls : type
        Its ``__init__`` may pass what it does not know on to its base.

    Returns
    -------
    list of str

    Example
    -------
    >>> option_names(torch.nn.PReLU)
    ['num_parameters', 'init', 'device', 'dtype']
    """
    named = (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    found = {}
    for base in inspect.getmro(cls):
        if "__init__" in vars(base):
            arguments = inspect.signature(base.__init__).parameters
            found.update(
                (name, None)
                for name, argument in list(arguments.items())[1:]
                if argument.kind in named
            )
    return list(found)


def as_list(patterns):
    """One pattern or several as a list.

    Arguments
    ---------
    patterns : str or sequence of str

    Returns
    -------
    list of str

    Example
    -------
    >>> as_list("qkv"), as_list(("qkv", "*.bias"))
    (['qkv'], ['qkv', '*.bias'])
    """
    return [patterns] if isinstance(patterns, str) else list(patterns)


def check_uniform_bits(bits):
    """Refuses what is no number of bits for all weights.

    Arguments
    ---------
    bits : int or float
        1 to 16, or 1.6.

    Example
    -------
    >>> check_uniform_bits(4)
    >>> check_uniform_bits("4bit")
    Traceback (most recent call last):
    ...
    ValueError: bits must be an integer from 1 to 16 or 1.6, not '4bit': all ...
    """
    try:
        check_bits(bits)
    except ValueError as error:
        raise ValueError(
            f"{error}: all weights get them. Other averages need bits that "
            "differ: name LearnedBits, or let choose_bits choose"
        ) from error


def check_table(granularity, rows, codebook):
    """Refuses options of quantization tables that there are not.

    Arguments
    ---------
    granularity : str
        "tensor" or "channel".
    rows : int or None
        Most output channels that share one bit width.
    codebook : str
        "midtread" or "midrise".

    Example
    -------
    >>> check_table("channel", 64, "midrise")
    >>> check_table("chanel", None, "midrise")
    Traceback (most recent call last):
    ...
    ValueError: granularity must be one of ('tensor', 'channel'), not 'chanel'
    """
    scale_shape(MATRIX, granularity)
    count_slices(MATRIX, rows)
    check_codebook(codebook)


def check_estimator(estimator):
    """Refuses what makes no fake quantizers.

    Arguments
    ---------
    estimator : type
        As `LogStep`.

    Example
    -------
    >>> check_estimator("LogStep")
    Traceback (most recent call last):
    ...
    TypeError: estimator must be a class, such as !name:speechbrain_mpq..., ...
    """
    # A module can be called, too, but makes nothing.
    if not callable(estimator) or isinstance(estimator, torch.nn.Module):
        raise TypeError(
            "estimator must be a class, such as !name:speechbrain_mpq.LogStep, "
            f"not {estimator!r}"
        )


def check_unreached(unreached):
    """Refuses unknown ways with weights that have no gradient.

    Arguments
    ---------
    unreached : str
        One of `UNREACHED`.

    Example
    -------
    >>> check_unreached("ignore")
    """
    if unreached not in UNREACHED:
        raise ValueError(
            f"unreached must be one of {UNREACHED}, not {unreached!r}"
        )


def check_equal_bits(model, equal_bits, rows=None, include=("*",), exclude=()):
    """Refuses rules of equal bits that find nothing in a model.

    Arguments
    ---------
    model : torch.nn.Module
        Plain or quantized.
    equal_bits : sequence of str
        See `equal_groups`.
    rows : int or None
        Most output channels that share one bit width.
    include, exclude : sequence of str
        fnmatch patterns on parameter names; each must match something.

    Example
    -------
    >>> check_equal_bits(torch.nn.ModuleDict({"q": torch.nn.PReLU()}), ["*q"])
    """
    equal_groups(clusters(model, include, exclude, rows), equal_bits)
