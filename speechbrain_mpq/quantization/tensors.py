"""The weights of a model, by the names that they have while it is plain."""

import difflib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize

from .chains import chains, float_weight, follow_writes, is_own, quantizer_of
from .codebook import scale_shape
from .fake_quant import FakeQuantize
from .groups import RowGroups, gate_cluster, slice_name, split_name
from .parametrized import old_weight_norm, settle

# SpeechBrain's layers whose weights are not [output channels, ...]: dimensions
# of the output channels.
AXES = {
    "speechbrain.nnet.complex_networks.c_linear.CLinear": (1,),
    "speechbrain.nnet.quaternion_networks.q_linear.QLinear": (1,),
    "speechbrain.nnet.hypermixing.ParallelMLPs": (0, 1),
}
NO_SHAPE = "{} has no shape before the first forward: run the model once"
ROOT = "."  # cluster of the parameters that the model itself owns
OLD_WEIGHT_NORM = "torch.nn.utils.weight_norm"

# What a scale can be fitted to; eight-bit floats are made to be stored only.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# torch's layers whose weights are [input channels, output channels, ...].
TRANSPOSED = (
    torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d,
)


@dataclass
class NamedTensor:
    """A weight of a model, or some of its output channels, under its name."""

    # name in the plain model, quantized or not; with its channels where it is a
    # group of them, "conv.weight[0:32]"
    name: str
    # the float values that are trained, of all groups; where the module has
    # parametrizations of its own, such as weight norm, one of what they compute
    # the weight from
    parameter: torch.nn.Parameter
    # (module, attribute) of every module that holds it; several where
    # parameters are tied
    owners: list = field(default_factory=list)
    fake_quantize: FakeQuantize = None  # what quantizes it
    reason: str = ""  # why it cannot be quantized; empty where it can
    rows: object = ...  # ``parameter[rows]`` are its values
    # list of str: its other names in the plain model, where it is tied
    aliases: list = field(default_factory=list)
    # the module's own parametrizations, which the weight results from
    chain: object = None
    # dict of str -> torch.Tensor: what these compute the weight from, by their
    # names in the model
    parts: dict = field(default_factory=dict)
    gated: bool = False  # its groups are gates of a recurrent layer

    @property
    def parameter_name(self):
        """Name of the whole parameter."""
        return split_name(self.name)[0] if self.rows is not ... else self.name

    @property
    def names(self):
        """All names of the whole parameter in the plain model."""
        return [self.parameter_name, *self.aliases]

    @property
    def cluster(self):
        """Name of the owning module, with the channels or gate of a group."""
        module = self.parameter_name.rpartition(".")[0] or ROOT
        if self.gated and self.rows is not ...:
            return gate_cluster(module, *self.owners[0], self.rows)
        return slice_name(module, self.rows)

    @property
    def whole(self):
        """The float values of all groups, without gradient."""
        if isinstance(self.parameter, UninitializedTensorMixin):
            raise ValueError(NO_SHAPE.format(self.parameter_name))
        if self.chain is None:
            return self.parameter.detach()
        with torch.no_grad():
            return float_weight(self.chain).detach()

    @property
    def weight(self):
        """The float values, without gradient.

        A view of the parameter, but for modules that have parametrizations of
        their own.
        """
        return self.whole[self.rows]

    @property
    def shape(self):
        """Shape of the whole weight."""
        return self.whole.shape

    @property
    def axes(self):
        """Dimensions of the output channels."""
        if self.rows is not ... or not self.owners:
            return (0,)
        module, attribute = self.owners[0]
        if attribute == "weight" and isinstance(module, TRANSPOSED):
            # Groups share places in the second dimension.
            return (1,) if module.groups == 1 else (0, 1)
        if attribute == "weight" and _is_transformers_linear(module):
            return (1,)
        kind = parametrize.type_before_parametrizations(module)
        axes = AXES.get(f"{kind.__module__}.{kind.__qualname__}", (0,))
        return axes if max(axes) < len(self.shape) else (0,)

    @property
    def is_vector(self):
        """Whether it has one dimension, as biases, norms and slopes have.

        Some norms write theirs as [1, 1, channels].
        """
        if isinstance(self.parameter, UninitializedTensorMixin):
            return False
        if len(self.shape) < 2:
            return True
        is_matrix = any(is_torchs(owner) for owner, _ in self.owners)
        return not is_matrix and sum(n > 1 for n in self.shape) < 2

    def scale_shape(self, granularity):
        """Gives the shape of its scale."""
        shape = tuple(self.weight.shape)
        return scale_shape(shape, granularity, self.axes)

    def slice(self, rows, fake_quantize=None):
        """Makes a tensor of its own of some of its rows."""
        return replace(
            self,
            name=slice_name(self.name, rows),
            owners=list(self.owners),
            fake_quantize=fake_quantize,
            rows=rows,
        )


def is_expanded(tensor):
    """Whether elements of a tensor share memory, as `expand` leaves them."""
    if tensor.layout != torch.strided:
        return False
    return any(n > 1 and not s for n, s in zip(tensor.shape, tensor.stride()))


def named_tensors(model):
    """Finds all weights of a model by their plain names, tied ones once.

    A weight that is quantized in groups stands there as these.
    """
    tensors = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" in path.split("."):
            continue
        for tensor in _tensors_of(path, module):
            # One part of what a weight results from may be tied alone.
            held = tensor.parts.values() or [tensor.parameter]
            identity = *map(id, held), slice_name("", tensor.rows)
            first = tensors.setdefault(identity, tensor)
            if first is not tensor:
                new = [o for o in tensor.owners if not _is_in(o, first.owners)]
                first.owners += new
                first.aliases.append(tensor.parameter_name)
    return {tensor.name: tensor for tensor in tensors.values()}


def is_torchs(module):
    """Whether a module's class is one of torch's own layers."""
    kind = parametrize.type_before_parametrizations(module)
    return kind.__module__.startswith("torch.")


def _is_transformers_linear(module):
    """Whether it is the Conv1D of GPT-2, a linear layer [inputs, outputs]."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers")
        for kind in type(module).__mro__
    )


def _is_in(owner, owners):
    """Whether a module and attribute are among others."""
    return any(owner[0] is m and owner[1] == name for m, name in owners)


def plain_buffers(model):
    """Finds the buffers of a model without those of its quantizers."""
    buffers = dict(model.named_buffers())
    for path, module in model.named_modules():
        if isinstance(module, FakeQuantize | RowGroups):
            for name, _ in module.named_buffers(prefix=path):
                buffers.pop(name, None)
    return buffers


def select(tensors, include, exclude):
    """Finds the weights that patterns choose, all of them quantizable.

    All names of a tied weight count.

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
        if not any(_matching(t, [pattern]) for t in tensors.values()):
            raise ValueError(
                f"pattern {pattern!r} matches no parameter"
                f"{near_misses(pattern, tensors)}"
            )
    chosen = [t for t in tensors.values() if _is_chosen(t, include, exclude)]
    _refuse_uncomputable(chosen)
    chosen = [tensor for tensor in chosen if not tensor.reason]
    if not chosen:
        raise ValueError(
            "nothing to quantize: include and exclude leave no float parameter"
        )
    return chosen


def _matching(tensor, patterns):
    """Those names of a tensor that patterns match."""
    return [
        name
        for name in [*tensor.names, *tensor.parts]
        if any(
            fnmatchcase(name, p)
            or (tensor.name == p and name == tensor.names[0])
            for p in patterns
        )
    ]


def _is_chosen(tensor, include, exclude):
    """Whether patterns choose a tensor; an error where they disagree."""
    included, excluded = _matching(tensor, include), _matching(tensor, exclude)
    if not included or set(excluded) & set(tensor.parts):
        return False
    kept = [n for n in included if n not in excluded and n in tensor.names]
    if kept and excluded:
        raise ValueError(
            f"{', '.join(tensor.names)} are one tied parameter, and the "
            f"patterns exclude {excluded[0]!r} but not {kept[0]!r}: exclude "
            "all of its names or none"
        )
    return not excluded


def _refuse_uncomputable(chosen):
    """Refuse weights that others divide by, all at once."""
    norms = [t.name for t in chosen if t.reason.startswith(OLD_WEIGHT_NORM)]
    if norms:
        listed = ", ".join(repr(name) for name in norms)
        raise ValueError(
            f"{listed}: directions of {OLD_WEIGHT_NORM}, which become NaN "
            "where they are quantized to zero. Use torch.nn.utils."
            "parametrizations.weight_norm, whose resulting weight can be "
            f"quantized, or exclude them: {norms}"
        )


def refuse_shared_memory(chosen, model):
    """Refuses weights some values of which are another tensor's as well.

    Such tensors follow each other while they are trained in place, but have
    quantized values of their own, and a packed file is loaded into one of them
    over the other.

    Arguments
    ---------
    chosen : list of NamedTensor
        To be quantized.
    model : torch.nn.Module
        That holds them.

    Example
    -------
    >>> model = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])
    >>> model[1].weight = torch.nn.Parameter(model[0].weight.data)
    >>> refuse_shared_memory(list(named_tensors(model).values()), model)
    Traceback (most recent call last):
    ...
    ValueError: 0.weight and 1.weight share memory, but are no one parameter...
    """
    by_storage = defaultdict(dict)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not isinstance(tensor, UninitializedTensorMixin) and _span(tensor):
            place = tensor.untyped_storage().data_ptr()
            by_storage[place][id(tensor)] = name, tensor
    for tensor in chosen:
        for part in tensor.parts.values() or [tensor.parameter]:
            beside = by_storage[part.untyped_storage().data_ptr()]
            for key, (name, other) in beside.items():
                if key != id(part) and _overlap(part, other):
                    raise ValueError(
                        f"{tensor.name} and {name} share memory, but are no "
                        "one parameter: assign the parameter itself to both "
                        "modules (b.weight = a.weight), or give one a "
                        "clone() of it"
                    )


def _span(tensor):
    """The bytes of its storage from its first value to its last, a range."""
    if not tensor.numel() or tensor.is_meta or tensor.layout != torch.strided:
        return range(0)
    steps = zip(tensor.shape, tensor.stride())
    values = 1 + sum((size - 1) * step for size, step in steps)
    start = tensor.storage_offset() * tensor.element_size()
    return range(start, start + values * tensor.element_size())


def _overlap(one, other):
    """Whether two tensors of one storage have a value in common."""
    first, second = _span(one), _span(other)
    if max(first.start, second.start) >= min(first.stop, second.stop):
        return False
    if one.dtype != other.dtype:
        return True
    # Columns of a matrix lie between each other's without a common one.
    places = torch.arange(max(first.stop, second.stop) // one.element_size())
    one, other = (
        places.as_strided(t.shape, t.stride(), t.storage_offset()).flatten()
        for t in (one, other)
    )
    return bool(torch.isin(one, other).any())


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
    """NamedTensor of each weight that a module itself owns."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"{path or 'the model'} is TorchScript, whose weights cannot be "
            "replaced: take the module that it was made of"
        )
    prefix = f"{path}." if path else ""
    divided_by = old_weight_norm(module)
    for attribute, parameter in module._parameters.items():
        if parameter is None:
            continue
        reason = _reason(parameter)
        if attribute in divided_by:
            reason = OLD_WEIGHT_NORM
        owners = [(module, attribute)]
        name = prefix + attribute
        yield NamedTensor(name, parameter, owners, reason=reason)
    for attribute, chain in chains(module).items():
        settle(chain)
        follow_writes([chain])
        yield from _tensors_of_chain(prefix, module, attribute, chain)


def _tensors_of_chain(prefix, module, attribute, chain):
    """NamedTensor of a parametrized weight, or of its groups."""
    quantizer = quantizer_of(chain)
    name, owners = prefix + attribute, [(module, attribute)]
    if is_own(chain):
        inner = f"{prefix}parametrizations.{attribute}"
        parts = dict(chain.named_parameters(prefix=inner))
        if quantizer is not None:
            last = f"{inner}.{len(chain) - 1}."
            parts = {n: p for n, p in parts.items() if not n.startswith(last)}
        if not parts:
            return
        with torch.no_grad():
            value = float_weight(chain)
        alike = [p for p in parts.values() if p.shape == value.shape]
        parameter = (alike or list(parts.values()))[-1]
        reason = _reason(value)
        whole = NamedTensor(
            name, parameter, owners, reason=reason, chain=chain, parts=parts
        )
    else:
        parameter = chain.original
        whole = NamedTensor(name, parameter, owners, reason=_reason(parameter))
    if isinstance(quantizer, RowGroups):
        whole.gated = quantizer.gated
        for rows, fake_quantize in quantizer.slices(whole.shape[0]):
            yield whole.slice(rows, fake_quantize)
    else:
        yield replace(whole, fake_quantize=quantizer)


def _reason(tensor):
    """Why a tensor cannot be quantized, if so."""
    if isinstance(tensor, UninitializedTensorMixin):
        return "without a shape before the first forward"
    if tensor.dtype not in FLOATS:
        return f"not a float tensor ({tensor.dtype})"
    return "" if tensor.numel() else "empty"
