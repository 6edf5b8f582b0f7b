"""Quantizing a model in place, by parameter name, and undoing it.

Every float parameter can be quantized, whatever its module does with it:
convolutions, linear, recurrent and attention layers, norms, PReLU. The module
that owns a parameter names its cluster. The coverage table tells what every
tensor of a model is stored as, and why.
"""

import logging
import weakref
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

from .chains import listen_to_steps
from .codebook import (
    check_bits,
    dequantize,
    fit_scale,
    largest_level,
    nearest_levels,
    scale_shape,
)
from .fake_quant import FakeQuantize, LearnedStep
from .finite import not_finite, watch_outputs
from .groups import RowGroups, split_as_named, split_groups
from .packing import content_of, unpackable
from .parametrized import (
    Constant,
    attach,
    computed_always,
    computed_once,
    copies_apart,
    detach,
)
from .plan import (
    BitPlan,
    Scheme,
    bit_plan,
    bits_of_plan,
    packed_bytes,
    scheme_of,
)
from .tensors import (
    ROOT,
    NamedTensor,
    named_tensors,
    near_misses,
    plain_buffers,
    refuse_shared_memory,
    select,
)

logger = logging.getLogger(__name__)


def coverage(model):
    """Lists what a packed file holds of every tensor of a model, and why.

    A tensor that is quantized in groups of output channels has a row for each
    of them. The bytes are those of the packed file but its header
    (``packed_file_bytes`` counts that, too); with the entropy codebook, whose
    tensors are coded all together, those of the bits that were asked for.

    Arguments
    ---------
    model : torch.nn.Module
        Plain or quantized.

    Returns
    -------
    list of dict
        Keys tensor, cluster, shape, parameters, asked_bits and codebook (None
        where it was left alone), stored_bits, bytes, reason (why it was left
        alone, and "cannot be packed" where no file can hold it). Another name
        of a tied tensor has a row of 0 parameters and bytes.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq.quantization.quant_api import quantize_
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
    tensors = named_tensors(model)
    content = content_of(model)
    by_kind = sorted(tensors.values(), key=lambda t: t.fake_quantize is None)
    rows = []
    for tensor in by_kind:
        if tensor.fake_quantize or tensor.chain is None:
            rows.append(_coverage_row(tensor, content))
        else:
            rows += [
                _coverage_row(NamedTensor(name, part), content)
                for name, part in tensor.parts.items()
            ]
        rows += [_alias_row(tensor, name) for name in tensor.aliases]
    listed = {row["tensor"] for row in rows}
    for name, buffer in plain_buffers(model).items():
        if name not in listed:
            buffer = NamedTensor(name, buffer, reason="buffer, not trained")
            rows.append(_coverage_row(buffer, content))
    rows += [_state_row(name, own) for name, own in content.states.items()]
    if content.same:
        same = _state_row("(names of equal buffers)", content.same_names())
        rows.append({**same, "cluster": ROOT, "reason": "stored once"})
    listed = {row["tensor"] for row in rows}
    for name in sorted(set(content.refused) - listed):
        why = f"cannot be packed: {content.refused[name]}"
        rows.append({**_state_row(name, {}), "reason": why})
    return rows


def _coverage_row(tensor, content):
    """One row of the coverage table."""
    count = tensor.weight.numel()
    width = tensor.weight.element_size()
    row = {
        "tensor": tensor.name,
        "cluster": tensor.cluster,
        "shape": list(tensor.weight.shape),
        "parameters": count,
        "asked_bits": None,
        "stored_bits": 8 * width,
        "codebook": None,
        "bytes": count * width,
        "reason": tensor.reason or "not selected",
    }
    stored = tensor.fake_quantize
    if stored:
        bits = stored.stored_bits
        row.update(asked_bits=bits, codebook=stored.codebook, reason="")
    elif tensor.name in content.quantized:
        stored = content.quantized[tensor.name].fake_quantize
        row["reason"] += "; integers are exact"
    if stored:
        bits, scales = stored.stored_bits, stored.alpha.numel()
        row.update(stored_bits=bits, bytes=packed_bytes(count, bits, scales))
    if tensor.name in content.same:
        row.update(bytes=0, reason=f"equal to {content.same[tensor.name]}")
    elif tensor.name in content.left_out:
        why = content.left_out[tensor.name]
        row.update(bytes=0, reason=f"{row['reason']}; not stored: {why}")
    elif tensor.name in content.refused:
        why = content.refused[tensor.name]
        row.update(bytes=0, reason=f"cannot be packed: {why}")
    elif not stored and tensor.name not in content.floats:
        row.update(bytes=0, reason="buffer that no checkpoint holds either")
    return row


def _alias_row(tensor, name):
    """The row of another name of a tied tensor."""
    return {
        **_state_row(name, {}),
        "shape": list(tensor.weight.shape),
        "asked_bits": getattr(tensor.fake_quantize, "stored_bits", None),
        "reason": f"tied to {tensor.name}",
    }


def _state_row(name, tensors):
    """The row of what a module keeps outside of parameters and buffers."""
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    return {
        "tensor": name,
        "cluster": name.rpartition(".")[0] or ROOT,
        "shape": [],
        "parameters": 0,
        "asked_bits": None,
        "stored_bits": 8,
        "codebook": None,
        "bytes": size,
        "reason": "state of its module, not trained",
    }


def clusters(model, include=("*",), exclude=(), rows=None, gates=False):
    """The clusters of the parameters that patterns select.

    A cluster is named after the module that owns its parameters. Slices of
    them are in a cluster for their rows; what is not cut (biases, vectors)
    stays in the cluster of the module's own name.

    Arguments
    ---------
    model : torch.nn.Module
        Plain or quantized.
    include : sequence of str
        fnmatch patterns on parameter names; each must match something.
    exclude : sequence of str
        Patterns of what to leave out of these; each must match something.
    rows : int or None
        Most output channels of one slice: matrices and filters with more are
        cut along their first dimension into slices of about equal size.
    gates : bool
        Each gate of each layer of an LSTM or GRU is a cluster of its own.

    Returns
    -------
    dict of str -> list of str
        Cluster name -> names of its parameters and slices.

    Example
    -------
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.PReLU())
    >>> clusters(model)
    {'0': ['0.weight', '0.bias'], '1': ['1.weight']}
    >>> clusters(model, exclude=["*.bias"])
    {'0': ['0.weight'], '1': ['1.weight']}
    >>> clusters(model, include="0.*", rows=2)
    {'0[0:1]': ['0.weight[0:1]'], '0[1:3]': ['0.weight[1:3]'], '0': ['0.bias']}
    >>> lstm = torch.nn.Sequential(torch.nn.LSTM(2, 3))
    >>> clusters(lstm, "*weight*", gates=True)["0.forget_l0"]
    ['0.weight_ih_l0[3:6]', '0.weight_hh_l0[3:6]']
    """
    grouped = defaultdict(list)
    tensors = split_groups(named_tensors(model), rows, gates)
    for tensor in select(tensors, include, exclude):
        grouped[tensor.cluster].append(tensor.name)
    return dict(grouped)


def quantize_(
    model,
    plan_or_bits,
    include=("*",),
    exclude=(),
    estimator=FakeQuantize,
    scheme=None,
    **options,
):
    """Quantizes parameters in place; training goes on straight through.

    Arguments
    ---------
    model : torch.nn.Module
        Model without quantized parameters.
    plan_or_bits : BitPlan, int or float
        Bits of every cluster, 1 to 16, or 1.6. Parameters that a plan does
        not name stay in float.
    include : sequence of str
        fnmatch patterns on parameter names; each must match something.
    exclude : sequence of str
        Patterns of what to leave out of these; each must match something.
    estimator : type
        How quantized weights are trained: ``FakeQuantize`` (straight
        through, fixed scales) or ``LearnedStep``.
    scheme : Scheme or None
        How values are represented. A plan has a codebook and groups of its
        own, which count where it is given.
    **options : dict
        Single fields of a ``Scheme``: granularity, codebook, rows, gates.

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
    codebook = options.get("codebook")
    scheme = scheme_of(scheme, **options) or Scheme()
    if isinstance(plan_or_bits, BitPlan):
        scheme = replace(scheme, codebook=codebook or plan_or_bits.codebook)
        plan = plan_or_bits
        tensors = split_as_named(tensors, plan.tensors, plan.gated)
        chosen = select(tensors, include, exclude)
        bits = bits_of_plan(plan_or_bits, tensors, chosen)
    else:
        tensors = split_groups(tensors, scheme.rows, scheme.gates)
        chosen = select(tensors, include, exclude)
        bits = dict.fromkeys([t.name for t in chosen], check_bits(plan_or_bits))
    whole = _whole_parameters(tensors, bits)
    refuse_shared_memory([groups[0] for groups in whole], model)
    # All scales first: a tensor that is refused leaves the model as it was.
    # The largest before the others, which then fit into its memory.
    by_size = sorted(bits, key=lambda name: -tensors[name].weight.numel())
    scales = {
        name: fit_tensor(tensors[name], bits[name], scheme) for name in by_size
    }
    made = [(p, _quantizers(p, bits, scales, scheme, estimator)) for p in whole]
    for groups, (quantizer, *others) in made:
        if others:
            quantizer = RowGroups([quantizer, *others], groups[0].gated)
        for module, attribute in groups[0].owners:
            attach(module, attribute, quantizer)
    computed_once(model)
    watch_outputs(model)
    copies_apart(model)
    _warn_of_unpackable(model)
    return bit_plan(model)


def _warn_of_unpackable(model):
    """Names what no file can hold; what is refused leaves a model in float."""
    try:
        refused = {**unpackable(model), **not_finite(model)}
    except ValueError:
        dequantize_(model)
        raise
    for name, why in refused.items():
        logger.warning(f"{name} cannot be packed: {why}")


def watch_scales(model):
    """Names what is all zero when training begins, and would stay so.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized, to be trained.

    Returns
    -------
    handle
        With a method `remove`.
    """
    seen = weakref.ref(model)

    def look(optimizer, args, kwargs):
        model = seen()
        if model is None:  # it died while listeners are told
            return
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        if any(id(parameter) in held for parameter in model.parameters()):
            handle.remove()
            _warn_of_unscaled(model)

    handle = listen_to_steps(model, look)
    return handle


def _warn_of_unscaled(model):
    """Name what is all zero, where its scale cannot be trained either."""
    names, estimators = [], set()
    for name, tensor in named_tensors(model).items():
        kind = type(tensor.fake_quantize)
        # Others have no scale that stays, or fit it later.
        if kind in (FakeQuantize, LearnedStep) and _is_unscaled(tensor):
            names.append(name)
            estimators.add(kind.__name__)
    if names:
        logger.warning(
            f"{', '.join(names)}: all zero, or channels of it, so that no "
            f"scale fits: with {', '.join(estimators)} it stays zero. Train "
            f"it with LogStep, or exclude it: {names}"
        )


def _is_unscaled(tensor):
    """Whether a tensor is trained without any scale, or a channel of it."""
    trained = tensor.parameter.requires_grad
    return trained and bool((tensor.fake_quantize.alpha == 0).any())


def _quantizers(groups, bits, scales, scheme, estimator):
    """What quantizes a parameter, one for each group of output channels."""
    quantizers = [estimator(bits[p.name], scales[p.name]) for p in groups]
    for quantizer in quantizers:
        quantizer.set_codebook(scheme.codebook)
        needs_parameter = getattr(quantizer, "needs_parameter", False)
        if needs_parameter and groups[0].chain is not None:
            raise ValueError(
                f"{groups[0].name} results from parametrizations of its "
                f"module's own, which {type(quantizer).__name__} cannot "
                "train: call torch.nn.utils.parametrize."
                "remove_parametrizations on its module first, or exclude it"
            )
    return quantizers


def dequantize_(model, keep_quantized=False):
    """Makes all parameters plain again; does nothing to a plain model.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized model.
    keep_quantized : bool
        Leave the quantized values in the parameters, not the float ones.
    """
    quantized = [t for t in named_tensors(model).values() if t.fake_quantize]
    # Slices of one tensor have the same owners.
    owners = dict.fromkeys(owner for t in quantized for owner in t.owners)
    computed_always(model)
    for module, attribute in owners:
        detach(module, attribute, keep_quantized)


def requantize_(model):
    """Fits every scale again to the float values, e.g. after loading them.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized model.
    """
    for tensor in named_tensors(model).values():
        quantizer = tensor.fake_quantize
        if quantizer:
            granularity = "channel" if quantizer.alpha.dim() else "tensor"
            scheme = Scheme(granularity, quantizer.codebook)
            bits = quantizer.stored_bits
            quantizer.set_scale(fit_tensor(tensor, bits, scheme))


def fake_quantize(
    weight, bits, scheme=None, name="a tensor", shape=None, alpha=None
):
    """The quantized values of a weight, by the scale that fits it best.

    Where that is known already it is `alpha`.

    Example
    -------
    >>> fake_quantize(torch.tensor([0.6, -0.2]), 1)
    tensor([ 0.4000, -0.4000])
    """
    scheme = scheme or Scheme()
    if alpha is None:
        shape = shape or scale_shape(tuple(weight.shape), scheme.granularity)
        alpha = _fit(name, weight, check_bits(bits), scheme, shape)
    levels = nearest_levels(weight, bits, alpha, scheme.codebook)
    return dequantize(levels, alpha, weight.dtype)


@contextmanager
def cluster_quantized(
    model,
    cluster,
    bits,
    include=("*",),
    exclude=(),
    scheme=None,
    **options,
):
    """Quantizes one cluster of a plain model inside a ``with`` block.

    The float values come back bit-exact at its end. No gradients: the values
    are overwritten in place.
    """
    scheme = scheme_of(scheme, **options) or Scheme()
    tensors = split_groups(named_tensors(model), scheme.rows, scheme.gates)
    grouped = defaultdict(list)
    for tensor in select(tensors, include, exclude):
        grouped[tensor.cluster].append(tensor)
    if cluster not in grouped:
        raise ValueError(
            f"no cluster {cluster!r} in the model"
            f"{near_misses(cluster, grouped)}"
        )
    members = grouped[cluster]
    if any(member.fake_quantize for member in members):
        raise ValueError(
            f"cluster {cluster!r} is quantized already: call "
            "dequantize_(model) first"
        )
    values = [_quantized(member, bits, scheme) for member in members]
    with torch.no_grad(), ExitStack() as stack:
        for member, value in zip(members, values, strict=True):
            stack.enter_context(written(member, value))
        yield


@contextmanager
def written(tensor, value):
    """Give a tensor other values inside a ``with`` block, without gradient.

    The old ones come back bit-exact.

    Arguments
    ---------
    tensor : NamedTensor
        Of a model in full precision.
    value : torch.Tensor
        In the tensor's shape.
    """
    if tensor.chain is not None:  # they result from others
        whole = tensor.whole.clone()
        whole[tensor.rows] = value
        tensor.chain.append(Constant(whole))
        try:
            yield
        finally:
            tensor.chain.pop(len(tensor.chain) - 1)
        return
    saved = tensor.weight.clone()
    try:
        tensor.parameter[tensor.rows].copy_(value)
        yield
    finally:
        tensor.parameter[tensor.rows].copy_(saved)


def _whole_parameters(tensors, bits):
    """The groups of every parameter that gets bits, one list for each."""
    groups = defaultdict(list)
    for tensor in tensors.values():
        groups[tensor.parameter_name].append(tensor)
    names = dict.fromkeys(tensors[name].parameter_name for name in bits)
    for group in (p for name in names for p in groups[name]):
        if group.name not in bits:
            raise ValueError(
                f"{group.name} gets no bits, other rows of its tensor do: "
                "quantize all slices of a tensor or none"
            )
    return [groups[name] for name in names]


def fit_tensor(tensor, bits, scheme, name=None):
    """The scale of a tensor with the least squared error.

    Arguments
    ---------
    tensor : NamedTensor
    bits : int or float
    scheme : Scheme
    name : str or None
        How it is named where it is refused; None: by its own name.

    Returns
    -------
    torch.Tensor

    Example
    -------
    >>> layer = torch.nn.PReLU(init=0.5)
    >>> fit_tensor(named_tensors(layer)["weight"], 2, Scheme())
    tensor(0.5000)
    """
    shape = tensor.scale_shape(scheme.granularity)
    return _fit(name or tensor.name, tensor.weight, bits, scheme, shape)


def _fit(name, weight, bits, scheme, shape):
    """Scale of a tensor; names it where it cannot be fitted."""
    if weight.is_meta:
        raise ValueError(
            f"{name} is on the meta device, without values: load weights "
            "before quantizing"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{name} has NaN or infinite values: load sound weights before "
            "quantizing"
        )
    alpha = fit_scale(weight, bits, codebook=scheme.codebook, shape=shape)
    largest = torch.tensor(largest_level(bits, scheme.codebook))
    if not torch.isfinite(dequantize(largest, alpha, weight.dtype)).all():
        raise ValueError(
            f"{name} has values up to {weight.abs().max():.3g}: a table of "
            f"{bits} bits would end above what {weight.dtype} or the scale's "
            "float32 can hold. Load sound weights, or exclude it"
        )
    return alpha


def _quantized(tensor, bits, scheme):
    """The quantized values of a tensor, as its own type."""
    shape = tensor.scale_shape(scheme.granularity)
    return fake_quantize(tensor.weight, bits, scheme, tensor.name, shape)
