"""Quantizing a model in place, by parameter name, and undoing it.

Every float parameter can be quantized, whatever its module does with it:
convolutions, linear, recurrent and attention layers, norms, PReLU. The module
that owns a parameter names its cluster.
"""

from collections import defaultdict
from contextlib import contextmanager

import torch

from .codebook import check_bits, dequantize, fit_scale, nearest_levels
from .fake_quant import FakeQuantize, attach, detach
from .plan import BitPlan, ClusterBits, packed_bytes
from .tensors import (
    NamedTensor,
    named_tensors,
    near_misses,
    plain_buffers,
    select,
)


def clusters(model, include=("*",), exclude=()):
    """The clusters of the parameters that patterns select.

    Arguments
    ---------
    model : torch.nn.Module
        Plain or quantized.
    include : sequence of str
        fnmatch patterns on parameter names; each must match something.
    exclude : sequence of str
        Patterns of what to leave out of these; each must match something.

    Returns
    -------
    dict of str -> list of str
        Cluster name -> names of its parameters.

    Example
    -------
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.PReLU())
    >>> clusters(model)
    {'0': ['0.weight', '0.bias'], '1': ['1.weight']}
    >>> clusters(model, exclude=["*.bias"])
    {'0': ['0.weight'], '1': ['1.weight']}
    """
    grouped = defaultdict(list)
    for tensor in select(named_tensors(model), include, exclude):
        grouped[tensor.cluster].append(tensor.name)
    return dict(grouped)


def quantize_(
    model,
    plan_or_bits,
    include=("*",),
    exclude=(),
    granularity="tensor",
    estimator=FakeQuantize,
):
    """Quantizes parameters in place; training goes on straight through.

    Arguments
    ---------
    model : torch.nn.Module
        Model without quantized parameters.
    plan_or_bits : BitPlan or int
        Bits of every cluster. Parameters that a plan does not name stay in
        float.
    include : sequence of str
        fnmatch patterns on parameter names; each must match something.
    exclude : sequence of str
        Patterns of what to leave out of these; each must match something.
    granularity : str
        "tensor": one scale a tensor. "channel": one for each entry of the
        first dimension of matrices and filters.
    estimator : type
        How quantized weights are trained: ``FakeQuantize`` (straight
        through, fixed scales) or ``LearnedStep``.

    Returns
    -------
    BitPlan
        What was done, with the model's bytes.

    Example
    -------
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.6, -0.2]]))
    >>> quantize_(layer, 1).bytes
    5
    >>> layer.weight.data
    tensor([[ 0.4000, -0.4000]])
    >>> dequantize_(layer)
    >>> layer.weight.data
    tensor([[ 0.6000, -0.2000]])
    """
    tensors = named_tensors(model)
    if any(tensor.fake_quantize for tensor in tensors.values()):
        raise ValueError(
            "the model is quantized already: call dequantize_(model) first"
        )
    chosen = select(tensors, include, exclude)
    if isinstance(plan_or_bits, BitPlan):
        bits = _bits_of_plan(plan_or_bits, tensors, chosen)
    else:
        bits = dict.fromkeys([t.name for t in chosen], check_bits(plan_or_bits))
    # All scales first: a tensor that is refused leaves the model as it was.
    scales = {
        name: _fit(tensors[name], bits[name], granularity) for name in bits
    }
    for name, alpha in scales.items():
        fake_quantize = estimator(bits[name], alpha)
        for module, attribute in tensors[name].owners:
            attach(module, attribute, fake_quantize)
    return bit_plan(model)


def dequantize_(model, keep_quantized=False):
    """Makes all parameters plain again; does nothing to a plain model.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized model.
    keep_quantized : bool
        Leave the quantized values in the parameters, not the float ones.
    """
    for tensor in named_tensors(model).values():
        if tensor.fake_quantize:
            for module, attribute in tensor.owners:
                detach(module, attribute, keep_quantized)


def requantize_(model):
    """Fits every scale again to the float values, e.g. after loading them.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized model.
    """
    for tensor in named_tensors(model).values():
        if tensor.fake_quantize:
            alpha = tensor.fake_quantize.alpha
            granularity = "channel" if alpha.dim() else "tensor"
            bits = int(tensor.fake_quantize.bits)
            fitted = _fit(tensor, bits, granularity)
            tensor.fake_quantize.set_scale(fitted)


def bit_plan(model):
    """The plan that a quantized model follows.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized model.

    Returns
    -------
    BitPlan
    """
    grouped, rest = defaultdict(list), 0
    for tensor in named_tensors(model).values():
        if tensor.fake_quantize:
            grouped[tensor.cluster].append(tensor)
        else:
            rest += tensor.parameter.numel()
    if not grouped:
        raise ValueError(
            "the model has no quantized parameter: call quantize_ first"
        )
    entries = {}
    for cluster, members in grouped.items():
        entries[cluster] = ClusterBits(
            bits=int(members[0].fake_quantize.bits),
            parameters=sum(m.parameter.numel() for m in members),
            tensors=tuple(m.name for m in members),
            scales=sum(m.fake_quantize.alpha.numel() for m in members),
        )
    return BitPlan(entries, rest)


@contextmanager
def cluster_quantized(
    model, cluster, bits, include=("*",), exclude=(), granularity="tensor"
):
    """Quantizes one cluster of a plain model inside a ``with`` block.

    The float values come back bit-exact at its end. No gradients: the values
    are overwritten in place.

    Arguments
    ---------
    model : torch.nn.Module
        Plain model.
    cluster : str
        Name of the cluster.
    bits : int
        Bits of its values.
    include : sequence of str
        fnmatch patterns on parameter names.
    exclude : sequence of str
        Patterns of what to leave out of these.
    granularity : str
        "tensor" or "channel".

    Example
    -------
    >>> layer = torch.nn.PReLU(init=0.25)
    >>> model = torch.nn.Sequential(layer, torch.nn.Linear(2, 2))
    >>> before = model[1].weight.detach().clone()
    >>> with cluster_quantized(model, "1", 2):
    ...     print(len(model[1].weight.unique()) <= 3)
    True
    >>> torch.equal(model[1].weight, before)
    True
    """
    tensors = named_tensors(model)
    names = clusters(model, include, exclude)
    if cluster not in names:
        raise ValueError(
            f"no cluster {cluster!r} in the model{near_misses(cluster, names)}"
        )
    members = [tensors[name] for name in names[cluster]]
    if any(member.fake_quantize for member in members):
        raise ValueError(
            f"cluster {cluster!r} is quantized already: call "
            "dequantize_(model) first"
        )
    values = [_quantized(member, bits, granularity) for member in members]
    saved = [member.parameter.detach().clone() for member in members]
    with torch.no_grad():
        try:
            for member, value in zip(members, values, strict=True):
                member.parameter.copy_(value)
            yield
        finally:
            for member, value in zip(members, saved, strict=True):
                member.parameter.copy_(value)


def coverage(model):
    """One row for every tensor of the model: asked and stored bits, bytes.

    Arguments
    ---------
    model : torch.nn.Module
        Plain or quantized.

    Returns
    -------
    list of dict
        Keys tensor, cluster, shape, parameters, asked_bits (None where it was
        left alone), stored_bits, bytes, reason (why it was left alone).

    Example
    -------
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


def _bits_of_plan(plan, tensors, chosen):
    """Parameter name -> bits, for a plan that must fit the model."""
    members = defaultdict(list)
    for tensor in chosen:
        members[tensor.cluster].append(tensor.name)
    known = [tensor.name for tensor in chosen]
    bits = {}
    for cluster, entry in plan.clusters.items():
        present = members.get(cluster, ())
        names = entry.tensors or present
        missing = [name for name in names if name not in present]
        if missing or not names:
            missing = missing[0] if missing else cluster
            raise ValueError(
                f"the plan's cluster {cluster!r} needs {missing!r}, which the "
                "model lacks there or the patterns leave out"
                f"{near_misses(missing, known)}"
            )
        count = sum(tensors[name].parameter.numel() for name in names)
        if count != entry.parameters:
            raise ValueError(
                f"the plan's cluster {cluster!r} has {entry.parameters} "
                f"parameters, the model's {count}: make a plan for this model"
            )
        bits.update(dict.fromkeys(names, entry.bits))
    return bits


def _fit(tensor, bits, granularity):
    """Scale of a tensor; names the tensor where it cannot be fitted."""
    if not torch.isfinite(tensor.parameter).all():
        raise ValueError(
            f"{tensor.name} has NaN or infinite values: load sound weights "
            "before quantizing"
        )
    return fit_scale(tensor.parameter, bits, granularity)


def _quantized(tensor, bits, granularity):
    """The quantized values of a tensor, as its own type."""
    bits = check_bits(bits)
    weight = tensor.parameter.detach()
    alpha = _fit(tensor, bits, granularity)
    return dequantize(nearest_levels(weight, bits, alpha), alpha, weight.dtype)


def _coverage_row(tensor):
    """One row of the coverage table."""
    count = tensor.parameter.numel()
    row = {
        "tensor": tensor.name,
        "cluster": tensor.cluster,
        "shape": list(tensor.parameter.shape),
        "parameters": count,
        "asked_bits": None,
        "stored_bits": 8 * tensor.parameter.element_size(),
        "bytes": count * tensor.parameter.element_size(),
        "reason": tensor.reason or "not selected",
    }
    if tensor.fake_quantize:
        bits = int(tensor.fake_quantize.bits)
        scales = tensor.fake_quantize.alpha.numel()
        row.update(asked_bits=bits, stored_bits=bits, reason="")
        row["bytes"] = packed_bytes(count, bits, scales)
    return row
