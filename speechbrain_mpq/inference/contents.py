"""What a packed model stores, tensor by tensor, without building it."""

import re
from collections import Counter
from pathlib import Path

from ..quantization.plan import packed_bytes
from ..quantization.row_groups import slice_name, split_name

FLOAT_BITS = 32  # of the model that the compression is against


def coverage_rows(model):
    """The coverage table of a packed model.

    Arguments
    ---------
    model : PackedModel
        From `read_model`.

    Returns
    -------
    rows : list of dict
        In the order of the names: tensor, cluster, shape, parameters,
        stored_bits, scales, bytes, reason (why it is in floating point).
    """
    rows = []
    for name, tensor in model.quantized.items():
        count, scales = tensor.integers.numel(), tensor.alpha.numel()
        size = packed_bytes(count, tensor.bits, scales)
        row = _row(name, tensor.integers, tensor.bits, size)
        rows.append({**row, "scales": scales, "reason": ""})
    for name, tensor in model.floats.items():
        width = tensor.element_size()
        row = _row(name, tensor, 8 * width, tensor.numel() * width)
        reason = f"stored as {str(tensor.dtype).removeprefix('torch.')}"
        rows.append({**row, "scales": 0, "reason": reason})
    return sorted(rows, key=lambda row: _in_order(row["tensor"]))


def cluster_bits(rows):
    """Bits and parameters of every quantized cluster, as in plan.json.

    Arguments
    ---------
    rows : list of dict
        From `coverage_rows`.

    Returns
    -------
    clusters : dict
        Name -> {"bits", "parameters"}.

    Example
    -------
    >>> row = {"cluster": "conv", "stored_bits": 4, "reason": ""}
    >>> cluster_bits([{**row, "parameters": 6}, {**row, "parameters": 2}])
    {'conv': {'bits': 4, 'parameters': 8}}
    """
    clusters = {}
    for row in rows:
        if row["reason"]:
            continue
        new = {"bits": row["stored_bits"], "parameters": 0}
        cluster = clusters.setdefault(row["cluster"], new)
        cluster["parameters"] += row["parameters"]
    return clusters


def summarise(model, rows):
    """Sizes of a packed model.

    Arguments
    ---------
    model : PackedModel
    rows : list of dict
        From `coverage_rows`.

    Returns
    -------
    summary : dict
        Plain values.
    """
    quantized = [row for row in rows if not row["reason"]]
    count = sum(row["parameters"] for row in quantized)
    bits = sum(row["parameters"] * row["stored_bits"] for row in quantized)
    by_bits = Counter()
    for row in quantized:
        by_bits[f"{row['stored_bits']:g}"] += row["parameters"]
    size = Path(model.path).stat().st_size
    total = sum(row["parameters"] for row in rows)
    return {
        "format": model.version,
        "codebook": model.header.get("codebook", "midtread"),
        "bytes": size,
        "payload_bytes": sum(row["bytes"] for row in rows),
        "parameters": total,
        "quantized_parameters": count,
        "average_bits": round(bits / count, 4) if count else FLOAT_BITS,
        "compression": round(total * FLOAT_BITS / 8 / size, 2),
        "parameters_by_bits": dict(
            sorted(by_bits.items(), key=lambda item: float(item[0]))
        ),
    }


def _row(name, tensor, bits, size):
    """What all rows have."""
    parameter, rows = split_name(name)
    module = parameter.rpartition(".")[0] or "."
    return {
        "tensor": name,
        "cluster": slice_name(module, rows) if rows != ... else module,
        "shape": list(tensor.shape),
        "parameters": tensor.numel(),
        "stored_bits": bits,
        "bytes": size,
    }


def _in_order(name):
    """Numbers in names count as numbers; the ends stand at the ends."""
    place = 0 if "scale_in" in name else 1 if "conv_in." in name else 2
    place = 3 if "conv_out." in name else place
    parts = re.split(r"(\d+)", name)
    return place, [int(p) if p.isdigit() else p for p in parts]
