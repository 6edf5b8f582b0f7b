"""Packed models: bit-packed integers in a safetensors file, and back.

model.safetensors holds two pooled tensors, so that its header stays small:
``packed`` and ``scales`` (see ``pools``). What stayed in float keeps its own
name. The header's ``mpq_config`` gives the bits and shape of every quantized
tensor, ``sha256`` guards it all. quantization_config.json beside it is a
readable copy that nothing reads.
"""

import json
from collections import defaultdict
from operator import itemgetter
from pathlib import Path

import torch

from .codebook import dequantize
from .container import (
    DTYPES,
    PackedModelError,
    read_container,
    write_container,
    write_whole,
)
from .model_plan import bit_plan
from .pools import POOLS, needs_second_version, pool, unpool
from .row_groups import first_row, split_name
from .tensors import named_tensors, plain_buffers

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "quantization_config.json"


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
    plan = bit_plan(model) if quantized else None
    codebook = plan.codebook if plan else "midtread"
    pools, header = pool(quantized, codebook)
    version = 2 if needs_second_version(header) else 1
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_FILE
    write_container(path, {**floats, **pools}, header, str(version))
    readable = {
        "quant_method": "speechbrain_mpq",
        "version": version,
        "granularity": header["granularity"],
        "tensors": {
            name: {
                "bits": tensor.fake_quantize.stored_bits,
                "shape": list(tensor.weight.shape),
            }
            for name, tensor in quantized.items()
        },
        "plan": plan.to_dict() if plan else None,
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
        What was quantized, by the name of the parameter or slice.
    floats : dict of str -> torch.Tensor
        What was not.
    """
    path = Path(folder) / MODEL_FILE
    tensors, config = read_container(path)
    try:
        return unpool(tensors, config)
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
    values = {**floats, **_dequantized(quantized, targets)}
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


def _some(names):
    """The first names of a list, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "nothing") + more
