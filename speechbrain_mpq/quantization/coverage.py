"""The coverage table: what every tensor of a model is stored as, and why."""

from .plan import packed_bytes
from .tensors import NamedTensor, named_tensors, plain_buffers


def coverage(model):
    """One row for every tensor of the model: asked and stored bits, bytes.

    A tensor that is quantized in slices has a row for each of them.

    Arguments
    ---------
    model : torch.nn.Module
        Plain or quantized.

    Returns
    -------
    list of dict
        Keys tensor, cluster, shape, parameters, asked_bits and codebook (None
        where it was left alone), stored_bits, bytes, reason (why it was left
        alone).

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq.quantization.quantizer import quantize_
    >>> model = torch.nn.BatchNorm1d(8)
    >>> _ = quantize_(model, 4, exclude=["bias"])
    >>> for row in coverage(model):
    ...     print(row["tensor"], row["stored_bits"], row["bytes"])
    weight 4 8
    bias 32 32
    running_mean 32 32
    running_var 32 32
    num_batches_tracked 64 8
    """
    tensors = sorted(
        named_tensors(model).values(), key=lambda t: t.fake_quantize is None
    )
    rows = [_coverage_row(tensor) for tensor in tensors]
    for name, buffer in plain_buffers(model).items():
        tensor = NamedTensor(name, buffer, reason="buffer, not trained")
        rows.append(_coverage_row(tensor))
    return rows


def _coverage_row(tensor):
    """One row of the coverage table."""
    count = tensor.weight.numel()
    row = {
        "tensor": tensor.name,
        "cluster": tensor.cluster,
        "shape": list(tensor.weight.shape),
        "parameters": count,
        "asked_bits": None,
        "stored_bits": 8 * tensor.parameter.element_size(),
        "codebook": None,
        "bytes": count * tensor.parameter.element_size(),
        "reason": tensor.reason or "not selected",
    }
    if tensor.fake_quantize:
        bits = tensor.fake_quantize.stored_bits
        scales = tensor.fake_quantize.alpha.numel()
        kind = tensor.fake_quantize.codebook
        row.update(asked_bits=bits, stored_bits=bits, codebook=kind, reason="")
        row["bytes"] = packed_bytes(count, bits, scales)
    return row
