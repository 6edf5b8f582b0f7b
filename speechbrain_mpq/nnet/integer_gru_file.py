"""Integer GRUs as safetensors files: their integers, packed, and JSON.

Nothing in a file is executed. Everything is checked: sizes before memory is
taken, constants against overflow before they are used.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..utils import atomic_write, strict_json
from .gru_operations import (
    BITS,
    ELEMENTWISE,
    LINEAR,
    MAX_SIZE,
    check_plan,
)
from .integer_gru import (
    CONSTANTS,
    FORMAT,
    MAX_SHIFT,
    TABLES,
    TENSORS,
    VERSION,
    IntegerCell,
    IntegerGRU,
    cell_names,
    tensor_sizes,
)

MAX_LAYERS = 64
MAX_DESCRIPTION = 2**20  # characters of JSON


def save_integer_gru(path, integer):
    """Write the integers, packed at their bits, as one safetensors file.

    Arguments
    ---------
    path : str or Path
    integer : IntegerGRU

    Example
    -------
    >>> from speechbrain_mpq.nnet import gru_conversion
    >>> gru, inputs = torch.nn.GRU(2, 3), torch.zeros(4, 5, 2)
    >>> plan = gru_conversion.homogeneous_plan(gru, 4)
    >>> calibration = gru_conversion.calibrate(gru, [inputs])
    >>> integer = gru_conversion.convert(gru, plan, calibration)
    >>> path = getfixture("tmp_path") / "gru.safetensors"
    >>> save_integer_gru(path, integer)
    >>> load_integer_gru(path).packed_bytes == integer.packed_bytes
    True
    """
    plan = integer.description["plan"]
    parts = {name: [] for name in TENSORS}
    for name, cell in integer.cells.items():
        blocks = [*cell.weight_ih.chunk(3), *cell.weight_hh.chunk(3)]
        for operation, block in zip(LINEAR, blocks):
            parts["weights"].append(_pack(block, plan[f"{name}.{operation}"]))
        for operation in TABLES:
            table = getattr(cell, f"table_{operation}")
            parts["tables"].append(_pack(table, plan[f"{name}.{operation}"]))
        parts["biases"].append(cell.bias.flatten())
        parts["multipliers"].append(cell.multiplier.flatten())
        parts["shifts"].append(cell.shift.flatten())
        parts["constants"].append(torch.tensor(cell.constants))
    for *scalings, zero_point in integer.joints.values():
        joint = [*scalings[0], *scalings[1], zero_point]
        parts["constants"].append(torch.tensor(joint))
    if integer.classifier_weight is not None:
        parts["weights"].append(_pack(integer.classifier_weight, 8))
        parts["biases"].append(integer.classifier_bias)
    tensors = {
        name: torch.cat(values).to(TENSORS[name]).cpu()
        for name, values in parts.items()
    }
    text = json.dumps(integer.description)
    with atomic_write(path) as part:
        save_file(tensors, part, metadata={FORMAT: text})


def load_integer_gru(path) -> IntegerGRU:
    """Read what `save_integer_gru` wrote, whoever sent it.

    The description is held against the sizes of the tensors, and these
    against the size of the file, before memory is taken for any of them.

    Arguments
    ---------
    path : str or Path

    Example
    -------
    >>> path = getfixture("tmpdir") / "other.safetensors"
    >>> save_file({"weights": torch.zeros(2**10)}, path)
    >>> load_integer_gru(path)
    Traceback (most recent call last):
    ...
    ValueError: ... is no integer GRU: a description of 0 characters
    """
    try:
        with _opened(path) as file:
            text = (file.metadata() or {}).get(FORMAT, "")
            description = _read_description(text)
            sizes = tensor_sizes(description)
            if set(file.keys()) != set(sizes):
                raise ValueError("other tensors than an integer GRU's")
            for name, size in sizes.items():
                shape = file.get_slice(name).get_shape()
                if shape != [size]:
                    raise ValueError(f"{name} {shape} instead of [{size}]")
            tensors = {name: file.get_tensor(name) for name in sizes}
        return _unpack(description, tensors)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no integer GRU: {error}") from error


def is_integer_gru(path):
    """Whether a file says that it is one; false where it cannot be read."""
    try:
        with _opened(path) as file:
            return FORMAT in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _opened(path):
    """A safetensors file; a pipe of its name would never end."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return safe_open(path, framework="pt")


def _read_description(text):
    """The description of a file, every value of its type and range."""
    if not 0 < len(text) <= MAX_DESCRIPTION:
        raise ValueError(f"a description of {len(text)} characters")
    content = strict_json(text, packed=True)
    if not isinstance(content, dict):
        raise ValueError("a description that is no JSON object")
    if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"not {FORMAT} version {VERSION}")

    def whole(name, least, most):
        value = content.get(name)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} is {value!r}, not {least} to {most}")

    for name in ("input_size", "hidden_size"):
        whole(name, 1, MAX_SIZE)
    whole("classes", 0, MAX_SIZE)
    whole("layers", 1, MAX_LAYERS)
    if type(content.get("bidirectional")) is not bool:
        raise ValueError("bidirectional is neither true nor false")
    if content.get("result_bits", 0) is not None:
        whole("result_bits", 8, 16)
    if not isinstance(content.get("plan"), dict):
        raise ValueError("no plan")
    check_plan(content["plan"], [name for name, _ in cell_names(content)])
    for name, length in (("input", 2), ("output", 3)):
        values = content.get(name)
        if not isinstance(values, list) or len(values) != length:
            raise ValueError(f"{name} is not scale and zero point")
        scale, zero_point, *bits = values
        good = type(scale) is float and math.isfinite(scale) and scale > 0
        good = good and type(zero_point) is int and abs(zero_point) <= 128
        if not good or any(b not in BITS or type(b) is not int for b in bits):
            raise ValueError(f"{name} of {values}")
    labels = content.get("labels")
    if not isinstance(labels, list) or not all(
        isinstance(label, str) for label in labels
    ):
        raise ValueError("labels that are no list of words")
    if labels and len(labels) != content["classes"]:
        raise ValueError(
            f"{len(labels)} labels of {content['classes']} classes"
        )
    return content


class _Reader:
    """Takes values off the front of the tensors of a file."""

    def __init__(self, tensors):
        for name, dtype in TENSORS.items():
            if tensors[name].dtype != dtype:
                raise ValueError(f"{name} of type {tensors[name].dtype}")
        self.tensors, self.taken = tensors, dict.fromkeys(TENSORS, 0)

    def take(self, name, count):
        """The next values of a tensor."""
        start = self.taken[name]
        self.taken[name] += count
        return self.tensors[name][start : start + count]

    def codes(self, name, bits, shape):
        """The next codes of a tensor of bytes, int8."""
        packed = self.take(name, -(-math.prod(shape) * bits // 8))
        return _unpack_codes(packed, bits, shape)


def _unpack(description, tensors):
    """An IntegerGRU of tensors of the right sizes."""
    reader, joints, classifier = _Reader(tensors), {}, None
    cells = {
        cell: _read_cell(reader, description, cell, features)
        for cell, features in cell_names(description)
    }
    if description["bidirectional"]:
        for layer in range(description["layers"]):
            joints[f"l{layer}"] = _read_joint(reader)
    if description["classes"]:
        classifier = _read_classifier(reader, description)
    return IntegerGRU(description, cells, joints, classifier)


def _read_cell(reader, description, cell, features):
    """One direction of one layer: matrices, tables and constants."""
    hidden, plan = description["hidden_size"], description["plan"]
    bits = {name: plan[f"{cell}.{name}"] for name in LINEAR + ELEMENTWISE}
    blocks = [
        reader.codes(
            "weights",
            bits[name],
            (hidden, features if name in LINEAR[:3] else hidden),
        )
        for name in LINEAR
    ]
    return IntegerCell(
        bits,
        description["result_bits"],
        (torch.cat(blocks[:3]), torch.cat(blocks[3:])),
        [
            reader.take(name, 6 * hidden).reshape(2, -1)
            for name in ("biases", "multipliers", "shifts")
        ],
        {
            name: reader.codes("tables", bits[name], (2 ** bits[before],))
            for name, before in TABLES.items()
        },
        reader.take("constants", CONSTANTS).tolist(),
    )


def _read_joint(reader):
    """What brings both directions to one scale: two pairs, a zero point."""
    *joint, zero_point = reader.take("constants", 5).tolist()
    pairs = [joint[:2], joint[2:]]
    good = all(
        0 <= multiplier < 2**15 and 1 <= shift <= MAX_SHIFT
        for multiplier, shift in pairs
    )
    if not good or abs(zero_point) > 128:
        raise ValueError("constants between layers that overflow")
    return [*pairs, zero_point]


def _read_classifier(reader, description):
    """Weights [classes, outputs] and biases, whose sums fit int32."""
    outputs = description["hidden_size"] * (1 + description["bidirectional"])
    shape = description["classes"], outputs
    weights, biases = (
        reader.codes("weights", 8, shape),
        reader.take("biases", shape[0]),
    )
    most = weights.long().abs().sum(1) * 128 + biases.long().abs()
    if most.max() >= 2**31:
        raise ValueError("a classifier with which int32 could overflow")
    return weights, biases


def _pack(codes, bits):
    """Signed codes to bytes without gaps, lowest bit first."""
    values = codes.flatten().cpu().numpy().astype(np.int16) + 2 ** (bits - 1)
    as_bits = np.unpackbits(
        values.astype(np.uint8)[:, None], axis=1, bitorder="little"
    )[:, :bits]
    return torch.from_numpy(np.packbits(as_bits, bitorder="little"))


def _unpack_codes(packed, bits, shape):
    """The codes that `_pack` stored, int8."""
    count = math.prod(shape)
    as_bits = np.unpackbits(
        packed.numpy(), count=count * bits, bitorder="little"
    )
    values = as_bits.reshape(count, bits) @ (1 << np.arange(bits))
    codes = (values - 2 ** (bits - 1)).astype(np.int8)
    return torch.from_numpy(codes).reshape(shape)
