"""The parameters of a model, by the names that they have while it is plain."""

import difflib
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch.nn.utils import parametrize

from .fake_quant import FakeQuantize
from .groups import RowGroups, slice_name, split_name

ROOT = "."  # cluster of the parameters that the model itself owns


@dataclass
class NamedTensor:
    """A parameter, or some rows of it, by its name in the plain model.

    Arguments
    ---------
    name : str
        Name in the plain model, quantized or not; with its rows where it is
        a slice, "conv.weight[0:32]".
    parameter : torch.nn.Parameter
        The float values that are trained, of all slices.
    owners : list
        (module, attribute) of every module that holds it; several where
        parameters are tied.
    fake_quantize : FakeQuantize or None
        What quantizes it.
    reason : str
        Why it cannot be quantized; empty where it can.
    rows : slice or Ellipsis
        ``parameter[rows]`` are its values.
    """

    name: str
    parameter: torch.nn.Parameter
    owners: list = field(default_factory=list)
    fake_quantize: FakeQuantize = None
    reason: str = ""
    rows: object = ...

    @property
    def parameter_name(self):
        """Name of the whole parameter."""
        return split_name(self.name)[0] if self.rows is not ... else self.name

    @property
    def cluster(self):
        """Name of the owning module, with the rows of a slice."""
        module = self.parameter_name.rpartition(".")[0] or ROOT
        return slice_name(module, self.rows)

    @property
    def weight(self):
        """The float values, without gradient; a view of the parameter."""
        return self.parameter.detach()[self.rows]

    def slice(self, rows, fake_quantize=None):
        """Some rows of it as a tensor of its own."""
        return replace(
            self,
            name=slice_name(self.name, rows),
            owners=list(self.owners),
            fake_quantize=fake_quantize,
            rows=rows,
        )


def named_tensors(model):
    """All parameters by their plain names, tied ones once.

    A parameter that is quantized in slices stands there as these.
    """
    found = {}
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        for tensor in _tensors_of(path, module):
            identity = id(tensor.parameter), slice_name("", tensor.rows)
            first = found.setdefault(identity, tensor)
            if first is not tensor:
                first.owners += tensor.owners
    return {tensor.name: tensor for tensor in found.values()}


def plain_buffers(model):
    """Buffers of the model without those of its quantizers."""
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if "parametrizations" not in name.split(".")
    }


def select(tensors, include, exclude):
    """The tensors that patterns choose, all of them quantizable.

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

    def matches(tensor, patterns):
        return any(
            fnmatchcase(tensor.parameter_name, pattern)
            or tensor.name == pattern
            for pattern in patterns
        )

    for pattern in include + exclude:
        if not any(matches(t, [pattern]) for t in tensors.values()):
            raise ValueError(
                f"pattern {pattern!r} matches no parameter"
                f"{near_misses(pattern, tensors)}"
            )

    chosen = [
        tensor
        for tensor in tensors.values()
        if matches(tensor, include) and not matches(tensor, exclude)
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
        if isinstance(chain[0], RowGroups):
            whole = NamedTensor(name, chain.original, owners)
            slices = chain[0].slices(len(chain.original))
            for rows, fake_quantize in slices:
                yield whole.slice(rows, fake_quantize)
            continue
        kind = type(chain[0]).__name__
        for part, parameter in chain.named_parameters():
            inner = f"{prefix}parametrizations.{attribute}.{part}"
            reason = f"parametrized by {kind}"
            yield NamedTensor(inner, parameter, [(chain, part)], reason=reason)
