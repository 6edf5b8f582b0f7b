"""A system as it is stored: the weights that it runs with, and their bytes.

A system's size is that of a file that was written and whose content gives the
weights back. `stored_bytes` are the tensors in it, `container_bytes` all of
it, names and shapes included.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


@dataclass
class System:
    """What a peer hands over to be scored.

    Arguments
    ---------
    separator : torch.nn.Module
        With the weights that the stored file gives.
    stored_bytes : int
        Bytes of all tensors in the file.
    container_bytes : int
        Bytes of the file or files.
    stored_as : str
        Which file that is.
    details : dict
        What else is worth keeping, for JSON.
    """

    separator: torch.nn.Module
    stored_bytes: int
    container_bytes: int
    stored_as: str
    details: dict = field(default_factory=dict)


def tensor_bytes(tensors):
    """Bytes of tensors.

    Arguments
    ---------
    tensors : iterable of torch.Tensor

    Returns
    -------
    int

    Example
    -------
    >>> tensor_bytes([torch.zeros(3), torch.zeros(5, dtype=torch.uint8)])
    17
    """
    return sum(t.numel() * t.element_size() for t in tensors)


def safetensors_bytes(path):
    """Bytes of the tensors in a safetensors file.

    Arguments
    ---------
    path : Path

    Returns
    -------
    int
    """
    return tensor_bytes(load_file(path).values())


def fill_(network, weights):
    """Puts other weights into a network, by parameter name.

    Arguments
    ---------
    network : torch.nn.Module
    weights : dict of str -> torch.Tensor
        In any shape of the same size, as a 1x1 filter is a matrix.
    """
    with torch.no_grad():
        for name, value in weights.items():
            parameter = network.get_parameter(name)
            parameter.copy_(value.reshape(parameter.shape))


def store_rows(network, grids, path):
    """Stores weights that lie on a grid per row, packed without gaps.

    For peers that train or simulate quantized weights and leave the storing
    to others. The file is read again, and what it gives is put into the
    network.

    Arguments
    ---------
    network : torch.nn.Module
        All other parameters are stored in float32.
    grids : dict
        Parameter name -> (bits, offset, scale): a weight [rows, ...] is
        scale x (code + offset) with codes 0 to 2^bits - 1; scale [rows].
    path : Path
        safetensors file to write.

    Returns
    -------
    stored_bytes, container_bytes : int
    """
    tensors, shapes = {}, {}
    for name, parameter in network.named_parameters():
        if name not in grids:
            tensors[name] = parameter.detach().clone()
            continue
        bits, offset, scale = grids[name]
        rows = parameter.detach().reshape(len(scale), -1)
        # A row of zeros has the scale 0.
        steps = rows / scale.clamp_min(1e-30)[:, None] - offset
        codes = steps.round().to(torch.int32)
        if codes.min() < 0 or codes.max() >= 2**bits:
            raise ValueError(f"{name} is not on its {bits}-bit grid")
        if ((steps - codes)[scale > 0].abs() > 0.01).any():
            raise ValueError(f"{name} lies between the levels of its grid")
        tensors[f"{name}:codes"] = pack_codes(codes, bits)
        tensors[f"{name}:scale"] = scale.detach().float().clone()
        shapes[name] = [bits, offset, *parameter.shape]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"grids": json.dumps(shapes)})
    read = load_file(path)
    for name, (bits, offset, *shape) in shapes.items():
        scale = read[f"{name}:scale"]
        codes = unpack_codes(read[f"{name}:codes"], bits, math.prod(shape))
        values = (codes.view(len(scale), -1) + offset) * scale[:, None]
        fill_(network, {name: values})
    return tensor_bytes(read.values()), path.stat().st_size


def pack_codes(codes, bits):
    """Codes of a few bits each as bytes without gaps.

    Arguments
    ---------
    codes : torch.Tensor
        Whole numbers from 0 to 2^bits - 1.
    bits : int
        At most 16.

    Returns
    -------
    torch.Tensor
        uint8.

    Example
    -------
    >>> packed = pack_codes(torch.tensor([5, 0, 7]), 3)
    >>> len(packed), unpack_codes(packed, 3, 3).tolist()
    (2, [5, 0, 7])
    """
    values = codes.reshape(-1, 1).numpy().astype(np.int64)
    as_bits = (values >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(as_bits.astype(np.uint8)))


def unpack_codes(packed, bits, count):
    """Undoes `pack_codes`.

    Arguments
    ---------
    packed : torch.Tensor
        uint8.
    bits : int
        Of one code.
    count : int
        Codes.

    Returns
    -------
    torch.Tensor
        float32.
    """
    as_bits = np.unpackbits(packed.numpy(), count=count * bits)
    values = as_bits.reshape(count, bits) @ (1 << np.arange(bits))
    return torch.from_numpy(values.astype(np.float32))
