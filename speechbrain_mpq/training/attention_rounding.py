"""Calibrated rounding of attention: its two matrices, one after the other.

PyTorch's multi-head attention holds queries', keys' and values' projections in
one matrix, and multiplies what the heads put out with another, whose linear
layer it never calls. The first is fitted to what it put out in full precision,
where all three read the same: self-attention. The second is then fitted on
what the heads put out once the first is rounded.

Layout: what an attention reads and puts out is [steps, items, features] or
[items, steps, features], as the layer has it; a matrix gets [steps, features]
of each item. Steps that `key_padding_mask` hides do not count.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn
from torch.func import functional_call

from .matrix_rounding import (
    DAMPINGS,
    as_linear,
    matched_items,
    round_matrix_,
)

WEIGHT, BIAS = "in_proj_weight", "in_proj_bias"
OUTPUT = "out_proj"
INPUTS = ("query", "key", "value")
MASKS = ("key_padding_mask", "attn_mask")


def is_attention(layer):
    """Whether a layer is PyTorch's multi-head attention with one matrix.

    Example
    -------
    >>> is_attention(nn.MultiheadAttention(4, 2))
    True
    >>> is_attention(nn.MultiheadAttention(4, 2, kdim=3))
    False
    """
    if type(layer) is not nn.MultiheadAttention:
        return False  # what inherits may compute something else
    own = (
        layer._parameters.get(WEIGHT),
        layer.out_proj._parameters.get("weight"),
    )
    return all(weight is not None for weight in own)


@dataclass
class Attended:
    """What goes into an attention in one of its uses.

    Arguments
    ---------
    inputs : list of torch.Tensor
        Queries, keys and values; one alone where all are the same.
    masks : dict
        The other arguments that say what is attended to.
    """

    inputs: list
    masks: dict = field(default_factory=dict)

    @property
    def shape(self):
        """All sizes, the same for uses of the same kind."""
        return [tuple(value.shape) for value in self.inputs]

    def to(self, *place, **options):
        """What `torch.Tensor.to` makes of all of it, without gradient."""
        masks = {
            key: _moved(value, *place, **options)
            if torch.is_tensor(value)
            else value
            for key, value in self.masks.items()
        }
        inputs = [_moved(value, *place, **options) for value in self.inputs]
        return Attended(inputs, masks)


def attended_by(layer, *args, **kwargs):
    """The arguments of an attention's forward.

    Arguments
    ---------
    layer : torch.nn.MultiheadAttention
    *args, **kwargs
        As its forward takes them.

    Returns
    -------
    Attended

    Example
    -------
    >>> layer, x = nn.MultiheadAttention(4, 2), torch.ones(3, 1, 4)
    >>> len(attended_by(layer, x, x, x).inputs)
    1
    """
    names = (*INPUTS, "key_padding_mask", "need_weights", "attn_mask")
    given = {**dict(zip(names, args)), **kwargs}
    inputs = [given[name] for name in INPUTS]
    if all(_is_same(inputs[0], other) for other in inputs[1:]):
        inputs = inputs[:1]
    return Attended(inputs, {key: given.get(key) for key in MASKS})


def count_items(layer, use):
    """How many items go in.

    Arguments
    ---------
    layer : torch.nn.MultiheadAttention
    use : Attended

    Returns
    -------
    int
    """
    return len(_items(layer, use))


def round_attention_(tensors, layer, plain, uses, dampings=DAMPINGS):
    """Round an attention so that its matrices put out what they did.

    Arguments
    ---------
    tensors : dict
        (module, attribute) -> tensors, see `tensors_by_owner`.
    layer : torch.nn.MultiheadAttention
        Quantized, changed in place.
    plain : torch.nn.MultiheadAttention
        The layer in full precision.
    uses : list of (Attended, Attended)
        What goes in now, and what went in in full precision.
    dampings : sequence of float
        See `CalibratedRounding`.

    Returns
    -------
    str
        Why its first matrix was left alone; empty where it was rounded.
    """
    alone = all(len(use.inputs) == 1 for pair in uses for use in pair)
    if alone:
        _fit(
            tensors,
            (layer, plain, WEIGHT, BIAS),
            [(_items(plain, a), _items(plain, b), _counts(a)) for a, b in uses],
            dampings,
        )
    _fit(
        tensors,
        (layer.out_proj, plain.out_proj, "weight", "bias"),
        [
            (_heads(plain, a, layer), _heads(plain, b), _counts(b))
            for a, b in uses
        ],
        dampings,
    )
    return "" if alone else "queries, keys and values are not the same"


def is_fitted(tensors, layer):
    """Whether an attention has something that rounding may change.

    Arguments
    ---------
    tensors : dict
        See `tensors_by_owner`.
    layer : torch.nn.MultiheadAttention

    Returns
    -------
    bool
    """
    own = [
        *(tensors[layer, name] for name in (WEIGHT, BIAS)),
        *(tensors[layer.out_proj, name] for name in ("weight", "bias")),
    ]
    return any(
        slices and (slices[0].fake_quantize or slices[0].is_vector)
        for slices in own
    )


def _fit(tensors, matrix, uses, dampings):
    """Round one matrix, if it or its bias is to be."""
    layer, plain, name, bias = matrix
    weights, biases = tensors[layer, name], tensors[layer, bias]
    if not biases and not (weights and weights[0].fake_quantize):
        return
    linear, pairs = as_linear(plain, name, bias), []
    for given, wanted, counts in uses:
        outputs = [linear(item) for item in wanted]
        pairs += matched_items(given, outputs, counts)
    rounded = partial(getattr, layer, name)
    round_matrix_(weights, biases, linear, rounded, pairs, dampings)


def _heads(plain, use, layer=None):
    """What the heads put out, item by item, with the first matrix of a layer.

    That is what comes out where the second one changes nothing.
    """
    weight = plain.out_proj.weight
    values = {f"{OUTPUT}.weight": torch.eye(len(weight)).to(weight)}
    if plain.out_proj.bias is not None:
        values[f"{OUTPUT}.bias"] = torch.zeros_like(plain.out_proj.bias)
    for name in (WEIGHT, BIAS) if layer is not None else ():
        if getattr(layer, name) is not None:
            values[name] = getattr(layer, name)
    inputs = use.inputs * 3 if len(use.inputs) == 1 else use.inputs
    options = {"need_weights": False, **use.masks}
    outputs, _ = functional_call(plain, values, tuple(inputs), options)
    return _by_item(plain, outputs)


def _items(plain, use):
    """What self-attention reads, item by item."""
    return _by_item(plain, use.inputs[0])


def _by_item(plain, values):
    """[steps, features] of each item."""
    if values.dim() == 2:
        return [values]
    return list(values.unbind(0 if plain.batch_first else 1))


def _counts(use):
    """Which steps count, item by item; None: all.

    The mask is of the keys: it is of the queries in self-attention only.
    """
    mask = use.masks["key_padding_mask"]
    if mask is None or len(use.inputs) > 1:
        return None
    mask = mask if mask.dtype is torch.bool else mask == -torch.inf
    return list(~(mask if mask.dim() == 2 else mask[None]))


def _is_same(value, other):
    """Whether two inputs have the same values, without a look where it can."""
    if value is other:
        return True
    if value.shape != other.shape:
        return False
    place = value.data_ptr(), value.stride()
    return place == (other.data_ptr(), other.stride()) or torch.equal(
        value, other
    )


def _moved(value, *place, dtype=None, **options):
    """A tensor elsewhere; masks of numbers that are no floats stay such."""
    if dtype is not None and value.is_floating_point():
        options["dtype"] = dtype
    return value.detach().to(*place, **options)
