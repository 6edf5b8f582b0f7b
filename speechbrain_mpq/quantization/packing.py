"""Packed models: bit-packed integers in a safetensors file, and back.

model.safetensors holds two pooled tensors, so that its header stays small:
``packed`` (uint8), the integers of all quantized tensors in the order of
their names, each beginning on a byte, and ``scales`` (float32) in the same
order. What stayed in float keeps its own name. The header's ``mpq_config``
gives the bits and shape of every quantized tensor, ``sha256`` guards it all.
quantization_config.json beside it is a readable copy that nothing reads.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .codebook import (
    GRANULARITIES,
    check_bits,
    dequantize,
    largest_level,
    quantize_to_integers,
    scale_shape,
)
from .container import (
    DTYPES,
    VERSION,
    PackedModelError,
    read_container,
    write_container,
    write_whole,
)
from .quantizer import bit_plan
from .tensors import named_tensors, plain_buffers

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "quantization_config.json"
POOLS = ("packed", "scales")


@dataclass
class PackedTensor:
    """A quantized tensor as it is stored.

    Arguments
    ---------
    bits : int
        Bits of one value.
    integers : torch.Tensor
        int32, in the shape of the weight.
    alpha : torch.Tensor
        float32 scale, broadcastable to the integers.
    """

    bits: int
    integers: torch.Tensor
    alpha: torch.Tensor


def pack_bits(integers, bits):
    """Integers of a codebook to bytes without gaps, lowest bit first.

    Stored is value + 2^(bits - 1), with one bit 0 for -1 and 1 for +1.

    Arguments
    ---------
    integers : torch.Tensor
        Levels of an n-bit codebook, any shape.
    bits : int
        Bits of one value, 1 to 16.

    Returns
    -------
    torch.Tensor
        uint8, ceil(n * bits / 8) bytes.

    Example
    -------
    >>> pack_bits(torch.tensor([-1, 0, 1, 0, 1]), 2)
    tensor([185,   3], dtype=torch.uint8)
    >>> pack_bits(torch.tensor([-1, 1, 1]), 1)
    tensor([6], dtype=torch.uint8)
    """
    largest = largest_level(check_bits(bits))
    values = integers.detach().cpu().numpy().reshape(-1).astype(np.int32)
    if np.abs(values).max(initial=0) > largest or (bits == 1 and 0 in values):
        raise ValueError(f"integers are not in the {bits}-bit codebook")
    codes = (values + 1) // 2 if bits == 1 else values + 2 ** (bits - 1)
    as_bytes = codes.astype("<u2").view(np.uint8).reshape(-1, 2)
    as_bits = np.unpackbits(as_bytes, axis=1, bitorder="little")[:, :bits]
    return torch.from_numpy(np.packbits(as_bits, bitorder="little"))


def unpack_bits(packed, bits, shape):
    """The integers that ``pack_bits`` stored.

    Arguments
    ---------
    packed : torch.Tensor
        uint8 bytes.
    bits : int
        Bits of one value, 1 to 16.
    shape : tuple of int
        Shape of the integers.

    Returns
    -------
    torch.Tensor
        int32.

    Example
    -------
    >>> unpack_bits(torch.tensor([185, 3], dtype=torch.uint8), 2, (5,))
    tensor([-1,  0,  1,  0,  1], dtype=torch.int32)
    """
    count, bits = math.prod(shape), check_bits(bits)
    as_bits = np.unpackbits(
        packed.numpy(), count=count * bits, bitorder="little"
    )
    padded = np.zeros((count, 16), np.uint8)
    padded[:, :bits] = as_bits.reshape(count, bits)
    codes = np.packbits(padded, axis=1, bitorder="little").view("<u2")
    codes = codes.reshape(shape).astype(np.int32)
    values = 2 * codes - 1 if bits == 1 else codes - 2 ** (bits - 1)
    return torch.from_numpy(values)


def save_packed(model, folder, metadata=None):
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

    Returns
    -------
    Path
        The model.safetensors, whose size is the model's.
    """
    quantized, floats = _split(model)
    plan = bit_plan(model).to_dict() if quantized else None
    granularity = _granularity(quantized)
    packed, scales, described = [], [], {}
    for name, tensor in quantized.items():
        bits, alpha = int(tensor.fake_quantize.bits), tensor.fake_quantize.alpha
        weight = tensor.parameter.detach()
        integers = quantize_to_integers(weight, bits, alpha)
        packed.append(pack_bits(integers, bits))
        scales.append(alpha.detach().cpu().float().reshape(-1))
        described[name] = {"bits": bits, "shape": list(weight.shape)}
    pools = {}
    if quantized:
        pools = {"packed": torch.cat(packed), "scales": torch.cat(scales)}
    header_config = {"granularity": granularity, "tensors": _nest(described)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_FILE
    write_container(path, {**floats, **pools}, header_config)
    readable = {
        "quant_method": "speechbrain_mpq",
        "version": int(VERSION),
        "granularity": granularity,
        "tensors": described,
        "plan": plan,
        "metadata": metadata or {},
    }
    text = json.dumps(readable, indent=1) + "\n"
    write_whole(folder / CONFIG_FILE, [text.encode()])
    return path


def read_packed(folder):
    """Reads and checks a packed model, without any model.

    Arguments
    ---------
    folder : str or Path
        Folder that ``save_packed`` wrote.

    Returns
    -------
    quantized : dict of str -> PackedTensor
        What was quantized, by parameter name.
    floats : dict of str -> torch.Tensor
        What was not.
    """
    path = Path(folder) / MODEL_FILE
    tensors, config = read_container(path)
    try:
        return _unpool(tensors, config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PackedModelError(
            path, f"inconsistent ({error!r})", "pack the model again"
        ) from error


def load_packed_(model, folder):
    """Loads a packed model into a plain model of the same architecture.

    The parameters become plain tensors that hold the dequantized values, so
    that the forward is bit-identical to the quantized model's. Everything is
    checked before the model is touched.

    Arguments
    ---------
    model : torch.nn.Module
        Model without quantized parameters.
    folder : str or Path
        Folder that ``save_packed`` wrote.

    Returns
    -------
    torch.nn.Module
        The model.
    """
    targets = _plain_targets(model)
    quantized, floats = read_packed(folder)
    values = dict(floats)
    for name, tensor in quantized.items():
        target = targets.get(name, tensor.alpha)
        if target.is_floating_point():
            values[name] = dequantize(
                tensor.integers, tensor.alpha, target.dtype
            )
        else:
            values[name] = tensor.integers
    problem = _difference(values, targets)
    if problem:
        raise PackedModelError(
            Path(folder) / MODEL_FILE,
            problem,
            "load it into the architecture that it was packed from",
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])
    return model


def _split(model):
    """Quantized NamedTensors, and all else as tensors on the CPU, by name."""
    tensors = named_tensors(model)
    quantized = {n: tensors[n] for n in sorted(tensors)}
    quantized = {n: t for n, t in quantized.items() if t.fake_quantize}
    floats = _stored_buffers(model)
    for name, tensor in tensors.items():
        if not tensor.fake_quantize:
            floats[name] = tensor.parameter
    floats = {n: t.detach().cpu().contiguous() for n, t in floats.items()}
    wrong = [n for n in floats if n in POOLS or floats[n].dtype not in DTYPES]
    if wrong:
        raise ValueError(
            f"{wrong[0]} cannot be packed: its name is taken by the format, "
            f"or its type {floats[wrong[0]].dtype} is not supported"
        )
    return quantized, floats


def _stored_buffers(model):
    """The persistent buffers."""
    stored = model.state_dict()
    extra = [name for name in stored if name.endswith("_extra_state")]
    if extra:
        raise ValueError(f"{extra[0]}: packed models hold tensors only")
    buffers = plain_buffers(model)
    return {name: b for name, b in buffers.items() if name in stored}


def _plain_targets(model):
    """What a packed file must fill: name -> parameter or buffer."""
    tensors = named_tensors(model)
    if any(tensor.fake_quantize for tensor in tensors.values()):
        raise ValueError(
            "packed models load into plain models and this one is quantized: "
            "call dequantize_(model) first"
        )
    targets = {name: tensor.parameter for name, tensor in tensors.items()}
    return {**targets, **_stored_buffers(model)}


def _difference(values, targets):
    """How a file's tensors differ from a model's; empty if they do not."""
    missing = sorted(set(targets) - set(values))
    unexpected = sorted(set(values) - set(targets))
    if missing or unexpected:
        return (
            f"another model: lacks {_some(missing)}; adds {_some(unexpected)}"
        )
    for name, target in targets.items():
        wanted = f"{tuple(target.shape)} {target.dtype}"
        found = f"{tuple(values[name].shape)} {values[name].dtype}"
        if wanted != found:
            return f"{name} is {found}, the model's is {wanted}"
    return ""


def _granularity(quantized):
    """The one granularity that all scales' shapes follow."""
    shapes = {
        name: (tuple(t.parameter.shape), tuple(t.fake_quantize.alpha.shape))
        for name, t in quantized.items()
    }
    for granularity in GRANULARITIES:
        if all(
            scale_shape(shape, granularity) == alpha
            for shape, alpha in shapes.values()
        ):
            return granularity
    raise ValueError(
        "packing needs one scale per tensor, or one per entry of the first "
        "dimension, in the whole model"
    )


def _nest(described):
    """{"a.b.weight": ...} to {"a": {"b": {"weight": [bits, *shape]}}}.

    Written in full, the names would be most of the header.
    """
    tree = {}
    for name, entry in described.items():
        *parents, leaf = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = [entry["bits"], *entry["shape"]]
    return tree


def _flatten(tree, prefix=""):
    """Undoes ``_nest``: yields (name, bits, shape)."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            bits, *shape = value
            if any(type(size) is not int or size < 0 for size in shape):
                raise ValueError(f"shape {shape} of {prefix}{key}")
            yield prefix + key, check_bits(bits), tuple(shape)


def _unpool(tensors, config):
    """The PackedTensors and float tensors of a file's content."""
    if not config["tensors"]:  # full precision
        return {}, tensors
    packed, scales = tensors.pop("packed"), tensors.pop("scales")
    if packed.dtype != torch.uint8 or scales.dtype != torch.float32:
        raise ValueError("packed is not uint8 or scales not float32")
    if not torch.isfinite(scales).all():
        raise ValueError("scales must be finite")
    quantized = {}
    for name, bits, shape in sorted(_flatten(config["tensors"])):
        alpha_shape = scale_shape(shape, config["granularity"])
        count = math.prod(alpha_shape)
        size = math.ceil(math.prod(shape) * bits / 8)
        if len(packed) < size or len(scales) < count:
            raise ValueError(f"no integers or scales left for {name}")
        integers = unpack_bits(packed[:size], bits, shape)
        alpha = scales[:count].reshape(alpha_shape)
        quantized[name] = PackedTensor(bits, integers, alpha)
        packed, scales = packed[size:], scales[count:]
    if len(packed) or len(scales):
        raise ValueError("more integers or scales than tensors")
    return quantized, tensors


def _some(names):
    """The first names of a list, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "nothing") + more
