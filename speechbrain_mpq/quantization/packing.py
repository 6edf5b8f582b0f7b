"""Packed models: bit-packed integers in a safetensors file.

model.safetensors holds two pooled tensors, so that its header stays small:
``packed`` and ``scales`` (see ``pools``). What stayed in float keeps its own
name. The header's ``mpq_config`` gives the bits and shape of every quantized
tensor, ``sha256`` guards it all. quantization_config.json beside it is a
readable copy that nothing reads. All bytes are in docs/packed_format.md.
"""

import json
from pathlib import Path

from ..whole_files import write_text
from .container import DTYPES, write_container
from .described import (
    described_tensors,
    needs_second_version,
    shared_header,
    tree_header,
)
from .model_plan import bit_plan
from .name_tree import check_name
from .pools import POOLS, pool
from .row_groups import split_name
from .tensors import named_tensors
from .unpacking import (
    MODEL_FILE,
    load_packed_,
    read_model,
    read_packed,
    stored_buffers,
)

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
    pools, header = pool(quantized, codebook, describe)
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
    """What quantization_config.json repeats of a header.

    Arguments
    ---------
    header : dict
        The configuration in the file.
    version : int
        Version of the format.

    Returns
    -------
    dict
    """
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
