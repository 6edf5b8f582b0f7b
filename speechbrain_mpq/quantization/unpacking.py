"""Packed models, read: every check comes before what it protects.

What a file declares is held against its size, names and shapes against the
model that it is loaded into; then the weights are read, and their integers
unpacked a piece at a time. All bytes are in docs/packed_format.md.
"""

import logging
import math
from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import torch
from torch.nn.parameter import UninitializedTensorMixin

from .codebook import (
    TERNARY_BITS,
    check_codebook,
    dequantize,
    largest_level,
    packed_width,
    scale_shape,
)
from .container import PIECE, PackedModelError, read_container, unpack_bits
from .entropy_coding import check_claims, decode_packed
from .groups import first_row, split_name
from .header import check_name, described_tensors, scale_axes
from .parametrized import fix_
from .plan import packed_bytes
from .state import (
    EXTRA,
    SAME,
    decode_states,
    made_alike,
    module_states,
    own_hook,
    set_module_states,
    stored_buffers,
)
from .tensors import NO_SHAPE, is_expanded, named_tensors

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
PACKED_TENSORS = ("packed", "scales")
CODED = "@coded"  # of format 5, in the place of packed
CODING = "range"

# What the header of each format version holds.
KEYS = {
    **dict.fromkeys(("1", "2"), {"granularity", "tensors"}),
    "3": {"granularity", "shapes", "bits", "architecture"},
    "4": {"granularity", "shapes", "bits", "architecture", "axes"},
    "5": {"granularity", "shapes", "bits", "coding"},
}
OPTIONAL = {
    **dict.fromkeys("1234", {"codebook"}),
    "5": {"codebook", "architecture", "axes"},
}

# What a header can raise that was written by a stranger.
_INCONSISTENT = (
    *(AttributeError, KeyError, TypeError, ValueError, IndexError),
    *(OverflowError, RecursionError, RuntimeError),
)


@dataclass(frozen=True)
class PackedTensor:
    """A quantized tensor, or a group of its output channels, as stored."""

    bits: int | float  # bits of one value
    # uint8, without gaps
    packed: torch.Tensor = field(repr=False)
    alpha: torch.Tensor  # float32 scale, broadcastable to the integers
    shape: tuple  # tuple of int: that of the weight
    codebook: str = "midtread"  # "midtread" or "midrise"

    @property
    def integers(self):
        """int32 in the shape of the weight, unpacked at every call."""
        pieces = [values for _, values in self.pieces()]
        values = torch.cat(pieces) if pieces else torch.zeros(0)
        return values.int().reshape(self.shape)

    def numel(self):
        """Counts the values, without unpacking them."""
        return math.prod(self.shape)

    def pieces(self):
        """Unpacks a part of the integers at a time.

        Yields
        ------
        (int, torch.Tensor)
            Where the part begins, and its int32 values, in one dimension.
        """
        count = math.prod(self.shape)
        for start in range(0, count, PIECE):
            size = min(PIECE, count - start)
            bits = packed_width(self.bits, self.codebook)
            first = packed_bytes(start, bits, scales=0)
            packed = self.packed[first:][: packed_bytes(size, bits, 0)]
            yield start, unpack_bits(packed, self.bits, (size,), self.codebook)

    def values(self, dtype=torch.float32):
        """Computes the float values, a part at a time."""
        result = torch.empty(self.shape, dtype=dtype)
        flat, scales = result.view(-1), self.alpha.reshape(-1)
        own = [i for i, size in enumerate(self.alpha.shape) if size > 1]
        stride = math.prod(self.shape[own[-1] + 1 :]) if own else 1
        for start, integers in self.pieces():
            alpha = scales
            if len(scales) > 1:
                index = torch.arange(start, start + len(integers))
                alpha = scales[index // stride % len(scales)]
            piece = dequantize(integers, alpha, dtype)
            flat[start : start + len(integers)] = piece
        return result

    def check(self, name):
        """Refuses integers that are not in their codebook; all bits count."""
        bits, count = self.bits, math.prod(self.shape)
        largest = largest_level(bits, self.codebook)
        for _, integers in self.pieces():
            if integers.abs().max() > largest:
                raise ValueError(
                    f"{name}: integers that are not in the {bits}-bit codebook"
                )
        bits = packed_width(bits, self.codebook)
        if bits == TERNARY_BITS:
            room = 3 ** (count % 5) if count % 5 else 256
        else:
            room = 2 ** (count * bits % 8) if count * bits % 8 else 256
        if count and int(self.packed[-1]) >= room:
            raise ValueError("a last byte with more than the last integers")


@dataclass(frozen=True)
class PackedModel:
    """A packed model as it is in the file, verified."""

    path: Path  # the file
    # dict of str -> PackedTensor: what was quantized, by the name of the
    # parameter or group
    quantized: dict
    floats: dict  # dict of str -> torch.Tensor: what was not
    # dict of str -> object: what modules keep outside of parameters and buffers
    states: dict
    # granularity, codebook, architecture, and what describes the tensors
    header: dict
    version: int  # version of the format
    container: object = field(repr=False)  # the file

    @property
    def architecture(self):
        """What the model was saved with as its architecture, or None."""
        return self.header.get("architecture")

    @property
    def content(self):
        """The whole file, as bytes."""
        return self.container.content

    @property
    def shapes(self):
        """Name -> (shape, type), the type None where quantized."""
        shapes = {n: (tuple(t.shape), t.dtype) for n, t in self.floats.items()}
        quantized = {n: tuple(t.shape) for n, t in self.quantized.items()}
        return shapes | _whole_shapes(quantized)

    def values(self, targets):
        """Computes the values of every tensor, in the types of a model."""
        grouped = self.groups()
        values = dict(self.floats)
        for name, groups in grouped.items():
            target = targets.get(name, groups[0][1].alpha)
            floats = [tensor.values(target.dtype) for _, tensor in groups]
            values[name] = torch.cat(floats) if len(floats) > 1 else floats[0]
        return values

    def groups(self):
        """Collects what each quantized parameter consists of."""
        grouped = defaultdict(list)
        for name, tensor in self.quantized.items():
            parameter, rows = split_name(name)
            grouped[parameter].append((first_row(rows), rows, tensor))
        return {
            name: [(rows, t) for _, rows, t in sorted(own, key=itemgetter(0))]
            for name, own in grouped.items()
        }


def read_model(path, compatible=None):
    """Reads and checks a packed model, without any model.

    Arguments
    ---------
    path : str or Path
        Folder, or its model.safetensors.
    compatible : callable or None
        Takes the file, name -> (shape, type) of all that it declares, its
        header and its version, before any weight is read; what it raises ends
        the reading.

    Returns
    -------
    PackedModel
    """
    path = Path(path)
    path = path / MODEL_FILE if path.is_dir() else path
    read = {}

    def check(header, version, kinds):
        try:
            read["described"] = _check_header(header, version, kinds)
        except _INCONSISTENT as error:
            raise _inconsistent(path, error) from error
        if compatible is not None:
            declared = _declared(read["described"], kinds)
            compatible(path, declared, header, version)

    container = read_container(path, check)
    try:
        tensors = without_coding(container)
        quantized = _quantized(tensors, container.config, read["described"])
        rest = {n: t for n, t in tensors.items() if n not in PACKED_TENSORS}
        floats, states = decode_states(rest if quantized else tensors)
    except _INCONSISTENT as error:
        raise _inconsistent(path, error) from error
    version = int(container.version)
    return PackedModel(
        path, quantized, floats, states, container.config, version, container
    )


def without_coding(container):
    """The tensors of a file, those of format 5 as in the formats before."""
    tensors, config = dict(container.tensors), container.config
    if container.version == "5":
        described = described_tensors(config)
        codebook = config.get("codebook", "midtread")
        counts = [
            (packed_width(bits, codebook), math.prod(shape))
            for _, bits, shape in described
        ]
        tensors["packed"] = decode_packed(tensors.pop(CODED), counts, codebook)
    return tensors


def _inconsistent(path, error):
    """What a header that contradicts itself is told as."""
    problem = f"inconsistent ({error!r})"
    return PackedModelError(path, problem, "pack the model again")


def _check_header(header, version, kinds):
    """Name, bits, shape and scale's shape of all tensors of a sound header."""
    if not isinstance(header, dict):
        raise TypeError("mpq_config is no JSON object")
    if not set(header) - OPTIONAL[version] == KEYS[version]:
        raise ValueError(f"not what format {version} has")
    if version == "5":
        kinds = _plain_kinds(header, kinds)
    described = described_tensors(header)
    axes = scale_axes(header, described)
    granularity = header["granularity"]
    codebook = check_codebook(header.get("codebook", "midtread"))
    if codebook == "entropy" and version != "5":
        raise ValueError("the entropy codebook in a file that is not coded")
    scale_shape((), granularity)  # refuses an unknown one
    rows, size, count = [], 0, 0
    for name, bits, shape in described:
        if split_name(name)[0] in kinds:
            raise ValueError(f"{name} is stored twice")
        alpha = scale_shape(shape, granularity, axes.get(name, (0,)))
        rows.append((name, bits, shape, alpha))
        width = packed_width(bits, codebook)
        size += packed_bytes(math.prod(shape), width, scales=0)
        count += math.prod(alpha)
        if described and not set(PACKED_TENSORS) <= set(kinds):
            raise KeyError(PACKED_TENSORS)
    for name in kinds:
        if name not in PACKED_TENSORS or not described:
            check_name(name)
    if described:
        expected = {
            "packed": (torch.uint8, size),
            "scales": (torch.float32, count),
        }
        for name, (dtype, length) in expected.items():
            if kinds[name][0] != dtype:
                raise ValueError("packed is not uint8 or scales not float32")
            if len(kinds[name][1]) != 1:
                raise ValueError("packed or scales is no vector")
            if kinds[name][1][0] < length:
                raise ValueError("no integers or scales left for all tensors")
            if kinds[name][1][0] > length:
                raise ValueError("more integers or scales than tensors")
    return rows


def _plain_kinds(header, kinds):
    """What is stored, as in a file whose integers are not coded; checked."""
    if header["coding"] != CODING:
        raise ValueError(f"the unknown coding {header['coding']!r:.40}")
    codebook = check_codebook(header.get("codebook", "midtread"))
    counts = [
        (packed_width(bits, codebook), math.prod(shape))
        for _, bits, shape in described_tensors(header)
    ]
    if not counts or "packed" in kinds:
        raise ValueError("a coded file without anything to code")
    dtype, shape = kinds[CODED]
    if dtype != torch.uint8 or len(shape) != 1:
        raise ValueError("coded is no vector of uint8")
    check_claims(shape[0], counts)
    size = sum(packed_bytes(count, bits, scales=0) for bits, count in counts)
    rest = {name: kind for name, kind in kinds.items() if name != CODED}
    return {**rest, "packed": (torch.uint8, (size,))}


def _declared(described, kinds):
    """Name -> (shape, type) of all that a header declares."""
    shapes = {n: (shape, dtype) for n, (dtype, shape) in kinds.items()}
    if described:
        packed_tensors = {*PACKED_TENSORS, CODED}
        shapes = {n: s for n, s in shapes.items() if n not in packed_tensors}
    return shapes | _whole_shapes(
        {name: shape for name, _, shape, _ in described}
    )


def _whole_shapes(shapes):
    """Parameter name -> (shape, None), groups of output channels together."""
    whole = {}
    for name, shape in shapes.items():
        parameter, rows = split_name(name)
        if rows is not ... and parameter in whole:
            shape = (whole[parameter][0][0] + shape[0], *shape[1:])
        whole[parameter] = tuple(shape), None
    return whole


def _quantized(tensors, config, described):
    """The quantized tensors of a file whose header is sound, checked."""
    if not described:  # full precision
        return {}
    packed, scales = (tensors[name] for name in PACKED_TENSORS)
    codebook = config.get("codebook", "midtread")
    check_scales(scales)
    quantized = {}
    for name, bits, shape, alpha_shape in described:
        width = packed_width(bits, codebook)
        size = packed_bytes(math.prod(shape), width, scales=0)
        count = math.prod(alpha_shape)
        alpha = scales[:count].reshape(alpha_shape)
        check_scales(alpha * largest_level(bits, codebook))
        tensor = PackedTensor(bits, packed[:size], alpha, shape, codebook)
        tensor.check(name)
        quantized[name] = tensor
        packed, scales = packed[size:], scales[count:]
    return quantized


def check_scales(scales):
    """Refuses scales, or largest values, that are not finite or negative."""
    if not torch.isfinite(scales).all() or (scales < 0).any():
        raise ValueError("scales must be finite and not negative")
    return scales


def read_packed(folder):
    """Reads and checks the tensors of a packed model.

    Arguments
    ---------
    folder : str or Path
        As for ``read_model``.

    Returns
    -------
    quantized : dict of str -> PackedTensor
        By the name of the parameter or group.
    floats : dict of str -> torch.Tensor
        By name.
    """
    packed = read_model(folder)
    return packed.quantized, packed.floats


def check_compatible(packed, targets):
    """Refuses a packed model that is not the given model's."""
    _check_shapes(packed.path, packed.shapes, targets)


def check_declared(path, shapes, model):
    """Refuses a file for a model by its header, before its weights are read.

    Arguments
    ---------
    path : Path
        The file.
    shapes : dict
        Name -> (shape, type) of all that it declares.
    model : torch.nn.Module
        Plain; it may be on the meta device.
    """
    plain = {n: s for n, s in shapes.items() if "@" not in n}
    targets = plain_targets(model, shapes)
    if SAME in shapes:  # which names, only its content tells
        targets = {n: t for n, t in targets.items() if n in plain}
    _check_shapes(path, plain, targets)


def _check_shapes(path, shapes, targets):
    """Refuse names, shapes and types that are not a model's."""
    problem = _difference(shapes, targets)
    if problem:
        raise PackedModelError(
            path,
            problem,
            "load it into the architecture that it was packed from",
        )


def _difference(shapes, targets):
    """How a file's tensors differ from a model's; empty if they do not."""
    missing = sorted(set(targets) - set(shapes))
    unexpected = sorted(set(shapes) - set(targets))
    if missing or unexpected:
        return (
            f"another model: lacks {_some(missing)}; adds {_some(unexpected)}"
        )
    for name, target in targets.items():
        shape, dtype = shapes[name]
        if dtype is None and target.is_floating_point():
            dtype = target.dtype  # integers become any type of floats
        if (shape, dtype) != (tuple(target.shape), target.dtype):
            return (
                f"{name} is {shape} {dtype or 'quantized'}, the model's is "
                f"{tuple(target.shape)} {target.dtype}"
            )
    return ""


def _some(names):
    """The first names of a list, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "nothing") + more


def load_packed_(model, folder):
    """Loads a packed model into a plain model of the same architecture.

    The parameters become plain tensors that hold the dequantized values, so
    that the forward is bit-identical to the quantized model's. Everything is
    checked before the model is touched, names and shapes before the weights
    are read. Where a weight was quantized behind parametrizations of the
    module's own, such as weight norm, it replaces them by what they resulted
    in.

    Arguments
    ---------
    model : torch.nn.Module
        Model without quantized parameters.
    folder : str or Path or PackedModel
        Folder that ``save_packed`` wrote, its model.safetensors, or what
        ``read_model`` read of it. As a custom hook of SpeechBrain's
        Pretrainer it gets the file.

    Returns
    -------
    torch.nn.Module
        The model.
    """
    _refuse_unwritable(model)
    own_states, _ = module_states(model)

    def compatible(path, shapes, header, version):
        check_declared(path, shapes, model)

    packed = folder
    if not isinstance(folder, PackedModel):
        packed = read_model(folder, compatible)
    shapes = packed.shapes
    targets = plain_targets(model, shapes)
    _check_shapes(packed.path, shapes, targets)
    _check_states(packed, model, own_states)
    if packed.states:  # the only thing that can fail from here on
        try:
            set_module_states(model, packed.states)
        except Exception as error:
            raise PackedModelError(
                packed.path,
                f"its state does not load ({error})",
                "pack the model again",
            ) from error
    _fill(model, targets, packed)
    return model


def _refuse_unwritable(model):
    """Raise ValueError where values would be written to no memory."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedTensorMixin):
            raise ValueError(NO_SHAPE.format(name))
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device, where nothing can be loaded "
                'to: call model.to_empty(device="cpu") first'
            )


def _fill(model, targets, packed):
    """Put a file's values into a model that it fits, one after the other."""
    groups = packed.groups()
    behind = _behind_own(model, packed.shapes)
    with torch.no_grad():
        for name, target in targets.items():
            pieces = groups.get(name) or [(..., None)]
            for rows, tensor in pieces:
                value = tensor.values(target.dtype) if tensor else None
                value = packed.floats[name] if value is None else value
                if is_expanded(target):  # torch writes to no such tensor
                    target.data = target.data.clone()
                target[rows].copy_(value)
            for module, attribute in behind.get(name, ()):
                fix_(module, attribute, target)


def _behind_own(model, names):
    """Weights of parametrized modules that a file holds as one: owners."""
    return {
        name: tensor.owners
        for name, tensor in named_tensors(model).items()
        if name in names and tensor.chain is not None
    }


def _check_states(packed, model, own):
    """Refuse states of modules that are not the model's."""
    modules = dict(model.named_modules())
    for name in packed.states:
        path, _, kind = name.rpartition(".")
        module = modules.get(path)
        is_loadable = module is not None and (
            name in own or _can_load(module, kind)
        )
        if not is_loadable:
            raise PackedModelError(
                packed.path,
                f"another model: adds {name}",
                "load it into the architecture that it was packed from",
            )
    for name in set(own) - set(packed.states):
        logger.warning(
            f"{packed.path} holds no {name}: the model keeps what it has there"
        )


def _can_load(module, kind):
    """Whether a module takes a state of a kind."""
    if kind == EXTRA:
        plain = torch.nn.Module.set_extra_state
        return type(module).set_extra_state is not plain
    return own_hook(module, "LOAD") is not None


def plain_targets(model, names=None):
    """Finds what a packed file must fill."""
    tensors = named_tensors(model)
    if any(tensor.fake_quantize for tensor in tensors.values()):
        raise ValueError(
            "packed models load into plain models and this one is quantized: "
            "call dequantize_(model) first"
        )
    targets, buffers = {}, stored_buffers(model)
    for name, tensor in tensors.items():
        if tensor.chain is None:
            targets[name] = tensor.parameter
        elif names is not None and name in names:
            targets[name] = tensor.whole.clone()
            for inner in inner_buffers(tensor):
                buffers.pop(inner, None)
        else:
            targets.update(tensor.parts)
    if names is not None:
        for name in made_alike(model):
            if name not in names:
                buffers.pop(name, None)
    return {**targets, **buffers}


def inner_buffers(tensor):
    """Names the buffers of a module's own parametrizations of a weight."""
    path, _, attribute = tensor.parameter_name.rpartition(".")
    inner = f"{path}.parametrizations.{attribute}".lstrip(".")
    return [n for n, _ in tensor.chain.named_buffers(prefix=inner)]
