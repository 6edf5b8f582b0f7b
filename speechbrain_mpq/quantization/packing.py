"""What a packed file holds of the quantized tensors: two pools and a header.

``packed`` (uint8) has the integers of all quantized tensors in the order of
their names, each beginning on a byte, and ``scales`` (float32) is in the same
order. The header tells the bits and shape of every tensor (see
``described``).

Whether a packed model is that of a module.

Packed models, read: every check comes before what it protects.

Packed models: bit-packed integers in a safetensors file.

model.safetensors holds two pooled tensors, so that its header stays small:
``packed`` and ``scales`` (see ``pools``). What stayed in float keeps its own
name. The header's ``mpq_config`` gives the bits and shape of every quantized
tensor, ``sha256`` guards it all. quantization_config.json beside it is a
readable copy that nothing reads. All bytes are in docs/packed_format.md.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import torch

from ..utils import write_text
from .codebook import (
    GRANULARITIES,
    TERNARY_BITS,
    check_codebook,
    dequantize,
    largest_level,
    quantize_to_integers,
    scale_shape,
)
from .container import (
    DTYPES,
    PackedModelError,
    pack_bits,
    read_container,
    unpack_bits,
    write_container,
)
from .groups import first_row, split_name
from .header import (
    check_name,
    described_tensors,
    needs_second_version,
    shared_header,
    tree_header,
)
from .plan import bit_plan, packed_bytes
from .tensors import named_tensors, plain_buffers

POOLS = ("packed", "scales")


@dataclass
class PackedTensor:
    """A quantized tensor, or some rows of one, as it is stored.

    Arguments
    ---------
    bits : int or float
        Bits of one value.
    integers : torch.Tensor
        int32, in the shape of the weight.
    alpha : torch.Tensor
        float32 scale, broadcastable to the integers.
    """

    bits: int | float
    integers: torch.Tensor
    alpha: torch.Tensor


def _pack_tensors(quantized, codebook, describe):
    """The pools of a model's quantized tensors, and what describes them."""
    packed, scales = [], []
    for name in sorted(quantized):
        tensor = quantized[name]
        bits = tensor.fake_quantize.stored_bits
        alpha = tensor.fake_quantize.alpha
        integers = quantize_to_integers(tensor.weight, bits, alpha, codebook)
        packed.append(pack_bits(integers, bits, codebook))
        scales.append(_checked(alpha.detach().cpu().float().reshape(-1)))
    kind = {} if codebook == "midtread" else {"codebook": codebook}
    header = {
        "granularity": _granularity(quantized),
        **kind,
        **describe(quantized),
    }
    if not quantized:
        return {}, header
    return dict(zip(POOLS, (torch.cat(packed), torch.cat(scales)))), header


def _unpack_tensors(tensors, header):
    """Takes the quantized tensors out of a file's content."""
    floats = dict(tensors)
    described = described_tensors(header)
    if not described:  # full precision
        return {}, _named(floats)
    packed, scales = (floats.pop(name) for name in POOLS)
    if packed.dtype != torch.uint8 or scales.dtype != torch.float32:
        raise ValueError("packed is not uint8 or scales not float32")
    if packed.dim() != 1 or scales.dim() != 1:
        raise ValueError("packed or scales is no vector")
    _checked(scales)
    codebook = check_codebook(header.get("codebook", "midtread"))
    quantized = {}
    for name, bits, shape in described:
        alpha_shape = scale_shape(shape, header["granularity"])
        count = math.prod(alpha_shape)
        size = packed_bytes(math.prod(shape), bits, scales=0)
        if len(packed) < size or len(scales) < count:
            raise ValueError(f"no integers or scales left for {name}")
        if split_name(name)[0] in floats:
            raise ValueError(f"{name} is stored twice")
        integers = _integers(packed[:size], bits, shape, codebook)
        alpha = scales[:count].reshape(alpha_shape)
        _checked(alpha * largest_level(bits, codebook))
        quantized[name] = PackedTensor(bits, integers, alpha)
        packed, scales = packed[size:], scales[count:]
    if len(packed) or len(scales):
        raise ValueError("more integers or scales than tensors")
    return quantized, _named(floats)


def _integers(packed, bits, shape, codebook):
    """The integers of a tensor; all bits of all bytes count."""
    integers = unpack_bits(packed, bits, shape, codebook)
    count = math.prod(shape)
    if not count:
        return integers
    if integers.abs().max() > largest_level(bits, codebook):
        raise ValueError(f"integers that are not in the {bits}-bit codebook")
    if bits == TERNARY_BITS:
        room = 3 ** (count % 5) if count % 5 else 256
    else:
        room = 2 ** (count * bits % 8) if count * bits % 8 else 256
    if int(packed[-1]) >= room:
        raise ValueError("a last byte with more than the last integers")
    return integers


def _checked(scales):
    """Scales, or largest values, that are finite and not negative."""
    if not torch.isfinite(scales).all() or (scales < 0).any():
        raise ValueError("scales must be finite and not negative")
    return scales


def _named(floats):
    """Tensors whose names are sound."""
    for name in floats:
        check_name(name)
    return floats


def _granularity(quantized):
    """The one granularity that all scales' shapes follow."""
    shapes = [
        (tuple(t.weight.shape), tuple(t.fake_quantize.alpha.shape))
        for t in quantized.values()
    ]
    for granularity in GRANULARITIES:
        if all(scale_shape(shape, granularity) == a for shape, a in shapes):
            return granularity
    raise ValueError(
        "packing needs one scale per tensor, or one per entry of the first "
        "dimension, in the whole model"
    )


def check_compatible(packed, targets):
    """Refuses a packed model that is not the given model's."""
    problem = _difference(packed, targets)
    if problem:
        raise PackedModelError(
            packed.path,
            problem,
            "load it into the architecture that it was packed from",
        )


def _difference(packed, targets):
    """How a file's tensors differ from a model's; empty if they do not."""
    shapes = _shapes(packed)
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


def _shapes(packed):
    """Parameter name -> (shape, type), the type None where quantized."""
    shapes = {n: (tuple(t.shape), t.dtype) for n, t in packed.floats.items()}
    rows = defaultdict(int)
    for name, tensor in packed.quantized.items():
        parameter, cut = split_name(name)
        shape = tuple(tensor.integers.shape)
        if cut is not ...:
            rows[parameter] += shape[0]
            shape = (rows[parameter], *shape[1:])
        shapes[parameter] = (shape, None)
    return shapes


def _some(names):
    """The first names of a list, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "nothing") + more


MODEL_FILE = "model.safetensors"


# What the header of each format version holds.
KEYS = {
    **dict.fromkeys(("1", "2"), {"granularity", "tensors"}),
    "3": {"granularity", "shapes", "bits", "architecture"},
}


OPTIONAL = {"codebook"}


# What a header can raise that was written by a stranger.
_INCONSISTENT = (
    *(AttributeError, KeyError, TypeError, ValueError, IndexError),
    *(OverflowError, RecursionError, RuntimeError),
)


@dataclass(frozen=True)
class PackedModel:
    """A packed model as it is in the file, verified.

    Arguments
    ---------
    path : Path
        The file.
    quantized : dict of str -> PackedTensor
        What was quantized, by the name of the parameter or slice.
    floats : dict of str -> torch.Tensor
        What was not.
    header : dict
        Granularity, codebook, architecture, and what describes the tensors.
    version : int
        Version of the format.
    content : bytes
        The whole file.
    """

    path: Path
    quantized: dict
    floats: dict
    header: dict
    version: int
    content: bytes = field(repr=False)

    @property
    def architecture(self):
        """What the model was saved with as its architecture, or None."""
        return self.header.get("architecture")

    def values(self, targets):
        """Float values of every tensor, in the types that a model has."""
        return {**self.floats, **_dequantized(self.quantized, targets)}


def read_model(path):
    """Reads and checks a packed model, without any model."""
    path = Path(path)
    path = path / MODEL_FILE if path.is_dir() else path
    container = read_container(path)
    header = container.config
    try:
        if not isinstance(header, dict):
            raise TypeError("mpq_config is no JSON object")
        if not set(header) - OPTIONAL == KEYS[container.version]:
            raise ValueError(f"not what format {container.version} has")
        quantized, floats = _unpack_tensors(container.tensors, header)
    except _INCONSISTENT as error:
        raise PackedModelError(
            path, f"inconsistent ({error!r})", "pack the model again"
        ) from error
    version = int(container.version)
    return PackedModel(
        path, quantized, floats, header, version, container.content
    )


def read_packed(folder):
    """Reads and checks the tensors of a packed model."""
    packed = read_model(folder)
    return packed.quantized, packed.floats


def load_packed_(model, folder):
    """Loads a packed model into a plain model of the same architecture.

    The parameters become plain tensors that hold the dequantized values, so
    that the forward is bit-identical to the quantized model's. Everything is
    checked before the model is touched.

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
    targets = plain_targets(model)
    is_read = isinstance(folder, PackedModel)
    packed = folder if is_read else read_model(folder)
    check_compatible(packed, targets)
    values = packed.values(targets)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])
    return model


def stored_buffers(model):
    """The persistent buffers of a model, without those of its quantizers."""
    stored = model.state_dict()
    extra = [name for name in stored if name.endswith("_extra_state")]
    if extra:
        raise ValueError(f"{extra[0]}: packed models hold tensors only")
    buffers = plain_buffers(model)
    return {name: b for name, b in buffers.items() if name in stored}


def plain_targets(model):
    """What a packed file must fill."""
    tensors = named_tensors(model)
    if any(tensor.fake_quantize for tensor in tensors.values()):
        raise ValueError(
            "packed models load into plain models and this one is quantized: "
            "call dequantize_(model) first"
        )
    targets = {name: tensor.parameter for name, tensor in tensors.items()}
    return {**targets, **stored_buffers(model)}


def _dequantized(quantized, targets):
    """Parameter name -> float values in the type that the model has."""
    pieces = defaultdict(list)
    for name, tensor in quantized.items():
        parameter, rows = split_name(name)
        value, target = tensor.integers, targets.get(parameter, tensor.alpha)
        if target.is_floating_point():
            value = dequantize(value, tensor.alpha, target.dtype)
        pieces[parameter].append((first_row(rows), value))
    values = {}
    for name, slices in pieces.items():
        ordered = [value for _, value in sorted(slices, key=itemgetter(0))]
        values[name] = torch.cat(ordered) if len(ordered) > 1 else ordered[0]
    return values


CONFIG_FILE = "quantization_config.json"
__all__ = [
    "CONFIG_FILE",
    "MODEL_FILE",
    "load_packed_",
    "read_model",
    "read_packed",
    "readable_config",
    "save_packed",
]


def save_packed(model, folder, metadata=None, architecture=None):
    """Writes a model as a packed model, quantized or in full precision.

    The same weights give the same bytes. Each file is written whole or not
    at all.

    Arguments
    ---------
    model : torch.nn.Module
        It is left as it is.
    folder : str or Path
        Made if it is not there.
    metadata : dict or None
        Anything that JSON can hold, for quantization_config.json.
    architecture : dict or None
        Anything that JSON can hold, for the header of the weights, under
        their checksum: what to build before they are loaded. The file then
        is of format 3.

    Returns
    -------
    Path
        The model.safetensors, whose size is the model's.
    """
    quantized, floats = _split(model)
    plan = bit_plan(model) if quantized else None
    codebook = plan.codebook if plan else "midtread"
    describe = tree_header if architecture is None else shared_header
    pools, header = _pack_tensors(quantized, codebook, describe)
    if architecture is not None:
        header, version = {"architecture": architecture, **header}, 3
    else:
        version = 2 if needs_second_version(header) else 1
    readable = {
        **readable_config(header, version),
        "plan": plan.to_dict() if plan else None,
        "metadata": metadata or {},
    }
    # Readers refuse NaN: complain before anything is written.
    text = json.dumps(readable, indent=1, allow_nan=False) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_FILE
    write_container(path, {**floats, **pools}, header, str(version))
    write_text(folder / CONFIG_FILE, text)
    return path


def readable_config(header, version):
    """What quantization_config.json repeats of a header."""
    kept = {k: header[k] for k in ("architecture",) if k in header}
    return {
        "quant_method": "speechbrain_mpq",
        "version": version,
        **kept,
        "granularity": header["granularity"],
        "tensors": {
            name: {"bits": bits, "shape": list(shape)}
            for name, bits, shape in described_tensors(header)
        },
    }


def _split(model):
    """Quantized NamedTensors, and all else as tensors on the CPU, by name."""
    tensors = named_tensors(model)
    quantized = {n: tensors[n] for n in sorted(tensors)}
    quantized = {n: t for n, t in quantized.items() if t.fake_quantize}
    floats = stored_buffers(model)
    for name, tensor in tensors.items():
        if not tensor.fake_quantize:
            floats[name] = tensor.parameter
    floats = {n: t.detach().cpu().contiguous() for n, t in floats.items()}
    for name in [*quantized, *floats]:
        check_name(split_name(name)[0] if name in quantized else name)
    wrong = [n for n in floats if n in POOLS or floats[n].dtype not in DTYPES]
    if wrong:
        raise ValueError(
            f"{wrong[0]} cannot be packed: its name is taken by the format, "
            f"or its type {floats[wrong[0]].dtype} is not supported"
        )
    return quantized, floats
