"""The parameters of a model, by the names that they have while it is plain."""

import difflib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch.nn.utils import parametrize

from .fake_quant import FakeQuantize

ROOT = "."  # cluster of the parameters that the model itself owns


@dataclass
class NamedTensor:
    """A parameter under the name it has in the plain model.

    Arguments
    ---------
    name : str
        Name in the plain model, quantized or not.
    parameter : torch.nn.Parameter
        The float values that are trained.
    owners : list
        (module, attribute) of every module that holds it; several where
        parameters are tied.
    fake_quantize : FakeQuantize or None
        What quantizes it.
    reason : str
        Why it cannot be quantized; empty where it can.
    """

    name: str
    parameter: torch.nn.Parameter
    owners: list = field(default_factory=list)
    fake_quantize: FakeQuantize = None
    reason: str = ""

    @property
    def cluster(self):
        """Name of the owning module."""
        return self.name.rpartition(".")[0] or ROOT


def named_tensors(model):
    """All parameters by their plain names, tied ones once.

    Arguments
    ---------
    model : torch.nn.Module
        Plain or quantized.

    Returns
    -------
    dict of str -> NamedTensor

    Example
    -------
    >>> model = torch.nn.Sequential(torch.nn.PReLU())
    >>> from speechbrain_mpq.quantization.fake_quant import attach
    >>> attach(model[0], "weight", FakeQuantize(4, 1.0))
    >>> [name for name, _ in model.named_parameters()]
    ['0.parametrizations.weight.original']
    >>> list(named_tensors(model))
    ['0.weight']
    """
    found = {}
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        for tensor in _tensors_of(path, module):
            first = found.setdefault(id(tensor.parameter), tensor)
            if first is not tensor:
                first.owners += tensor.owners
    return {tensor.name: tensor for tensor in found.values()}


def plain_buffers(model):
    """Buffers of the model without those of its quantizers.

    Arguments
    ---------
    model : torch.nn.Module
        Plain or quantized.

    Returns
    -------
    dict of str -> torch.Tensor
    """
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if "parametrizations" not in name.split(".")
    }


def select(tensors, include, exclude):
    """The tensors that patterns choose, all of them quantizable.

    Arguments
    ---------
    tensors : dict of str -> NamedTensor
        As made by ``named_tensors``.
    include : sequence of str
        fnmatch patterns on parameter names; each must match something.
    exclude : sequence of str
        Patterns of what to leave out of these; each must match something.

    Returns
    -------
    list of NamedTensor

    Example
    -------
    >>> tensors = named_tensors(torch.nn.Linear(2, 2))
    >>> select(tensors, ["*"], ["*.bais"])
    Traceback (most recent call last):
    ...
    ValueError: pattern '*.bais' matches no parameter; near misses: bias, weight
    """
    include = [include] if isinstance(include, str) else list(include)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    for pattern in include + exclude:
        if not any(fnmatchcase(name, pattern) for name in tensors):
            raise ValueError(
                f"pattern {pattern!r} matches no parameter"
                f"{near_misses(pattern, tensors)}"
            )

    def matches(name, patterns):
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    chosen = [
        tensor
        for name, tensor in tensors.items()
        if matches(name, include) and not matches(name, exclude)
    ]
    for tensor in chosen:
        if tensor.reason.startswith("parametrized"):
            raise ValueError(
                f"{tensor.name} is {tensor.reason}: call torch.nn.utils."
                "parametrize.remove_parametrizations on its module first, or "
                f"exclude {tensor.name!r}"
            )
    chosen = [tensor for tensor in chosen if not tensor.reason]
    if not chosen:
        raise ValueError(
            "nothing to quantize: include and exclude leave no float parameter"
        )
    return chosen


def near_misses(wrong, names):
    """The end of a message about a name or pattern that is not there.

    Arguments
    ---------
    wrong : str
        The name or pattern.
    names : iterable of str
        What there is.

    Returns
    -------
    str

    Example
    -------
    >>> near_misses("conv_im", ["norm.weight", "conv_in.weight"])
    '; near misses: conv_in.weight, norm.weight'
    """
    text = wrong.strip("*")

    def likeness(name):
        parts = [name, name.rpartition(".")[0], *name.split(".")]
        return max(
            difflib.SequenceMatcher(None, text, part).ratio() for part in parts
        )

    near = sorted(names, key=likeness, reverse=True)[:3]
    return f"; near misses: {', '.join(near)}" if near else ""


def _tensors_of(path, module):
    """NamedTensor of each parameter that a module itself owns."""
    prefix = f"{path}." if path else ""
    for attribute, parameter in module._parameters.items():
        if parameter is None:
            continue
        reason = ""
        if not parameter.is_floating_point():
            reason = f"not a float tensor ({parameter.dtype})"
        elif not parameter.numel():
            reason = "empty"
        owners = [(module, attribute)]
        name = prefix + attribute
        yield NamedTensor(name, parameter, owners, reason=reason)
    if not parametrize.is_parametrized(module):
        return
    for attribute, chain in module.parametrizations.items():
        name, owners = prefix + attribute, [(module, attribute)]
        if isinstance(chain[0], FakeQuantize):
            yield NamedTensor(name, chain.original, owners, chain[0])
            continue
        kind = type(chain[0]).__name__
        for part, parameter in chain.named_parameters():
            inner = f"{prefix}parametrizations.{attribute}.{part}"
            reason = f"parametrized by {kind}"
            yield NamedTensor(inner, parameter, [(chain, part)], reason=reason)
