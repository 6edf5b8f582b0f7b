"""Calibrated rounding of recurrent layers: one matrix after another.

A direction of an LSTM, GRU or RNN multiplies what goes in with one matrix and
its own output of one step before with another; an LSTM with projections has a
third one behind its memory. Each is fitted to what it put out in full
precision, from the first layer to the last: the matrix of the inputs on what
the layers below it put out once they are rounded, the recurrent one on what
the layer puts out once that matrix is. Gates are rows of a matrix. Cells are
layers of one step that are given what they put out before.

Layout: a sequence is [steps, features], a state [layers x directions, items,
size], as in PyTorch; what several directions are given or put out is a list of
items for each use, for each direction.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from .matrix_rounding import (
    DAMPINGS,
    as_linear,
    matched_items,
    round_matrix_,
)

# Which layer does what a layer or cell does.
KINDS = {
    nn.LSTM: nn.LSTM,
    nn.GRU: nn.GRU,
    nn.RNN: nn.RNN,
    nn.LSTMCell: nn.LSTM,
    nn.GRUCell: nn.GRU,
    nn.RNNCell: nn.RNN,
}
INPUT, RECURRENT, PROJECTION = "weight_ih", "weight_hh", "weight_hr"
BIASES = {INPUT: "bias_ih", RECURRENT: "bias_hh"}


def is_recurrent(layer):
    """Whether a layer is one of PyTorch's own recurrent layers or cells.

    Example
    -------
    >>> is_recurrent(nn.GRUCell(2, 3)), is_recurrent(nn.Linear(2, 3))
    (True, False)
    """
    return type(layer) in KINDS  # what inherits may compute something else


@dataclass
class Sequences:
    """What goes into a recurrent layer in one of its uses.

    Arguments
    ---------
    items : list of torch.Tensor
        [steps, features] each.
    state : tuple of torch.Tensor
        First h, of an LSTM first c as well; empty where these are zeros.
    """

    items: list
    state: tuple = ()

    @property
    def shape(self):
        """All sizes, the same for uses of the same kind."""
        return [tuple(item.shape) for item in self.items], len(self.state)

    def to(self, *place, **options):
        """What `torch.Tensor.to` makes of all of it, without gradient."""
        return Sequences(
            [item.detach().to(*place, **options) for item in self.items],
            tuple(part.detach().to(*place, **options) for part in self.state),
        )


def items_of(layer, values):
    """What a layer takes or puts out, item by item.

    Arguments
    ---------
    layer : torch.nn.Module
        See `is_recurrent`.
    values : torch.Tensor or PackedSequence
        In the layer's own layout.

    Returns
    -------
    list of torch.Tensor
        [steps, features] each.

    Example
    -------
    >>> layer = nn.GRU(2, 3, batch_first=True)
    >>> [len(item) for item in items_of(layer, torch.ones(2, 5, 2))]
    [5, 5]
    """
    if isinstance(values, PackedSequence):
        return unpack_sequence(values)
    if isinstance(layer, nn.RNNCellBase):
        return list(values.reshape(-1, 1, values.shape[-1]))
    if values.dim() == 2:
        return [values]
    return list(values.unbind(0 if layer.batch_first else 1))


def given_to(layer, input, hx=None):
    """The arguments of a layer's forward.

    Arguments
    ---------
    layer : torch.nn.Module
        See `is_recurrent`.
    input : torch.Tensor or PackedSequence
    hx : torch.Tensor, tuple of torch.Tensor or None

    Returns
    -------
    Sequences
    """
    parts = hx if isinstance(hx, tuple | list) else (hx,)
    state = []
    for part in parts if hx is not None else ():
        if isinstance(layer, nn.RNNCellBase):
            part = part.reshape(1, -1, part.shape[-1])
        state.append(part if part.dim() == 3 else part[:, None])
    return Sequences(items_of(layer, input), tuple(state))


def levels_of(layer):
    """Endings of the names of a layer's weights, by level and direction.

    Example
    -------
    >>> levels_of(nn.GRU(2, 3, num_layers=2, bidirectional=True))
    [['_l0', '_l0_reverse'], ['_l1', '_l1_reverse']]
    >>> levels_of(nn.GRUCell(2, 3))
    [['']]
    """
    if isinstance(layer, nn.RNNCellBase):
        return [[""]]
    directions = ["", "_reverse"] if layer.bidirectional else [""]
    return [
        [f"_l{level}{direction}" for direction in directions]
        for level in range(layer.num_layers)
    ]


def round_recurrent_(
    tensors, layer, plain, uses, counts=None, dampings=DAMPINGS
):
    """Round a recurrent layer so that its matrices put out what they did.

    Arguments
    ---------
    tensors : dict
        (module, attribute) -> tensors, see `tensors_by_owner`.
    layer : torch.nn.Module
        Quantized, changed in place.
    plain : torch.nn.Module
        The layer in full precision.
    uses : list of (Sequences, Sequences)
        What goes in now, and what went in in full precision.
    counts : list of (list of torch.Tensor or None) or None
        Which steps of each item count, in each use; None: all.
    dampings : sequence of float
        See `CalibratedRounding`.
    """
    now, before = zip(*uses)
    for number in range(len(levels_of(plain))):
        level = _Level(tensors, layer, plain, number)
        level.counts = counts or [None] * len(uses)
        level.dampings = dampings
        now, before = level.round_(now, before)


class _Level:
    """One layer of a recurrent module, in all its directions."""

    counts, dampings = (), DAMPINGS

    def __init__(self, tensors, layer, plain, number):
        self.tensors, self.layer, self.plain = tensors, layer, plain
        self.endings = levels_of(plain)[number]
        first = number * len(self.endings)
        self.states = slice(first, first + len(self.endings))
        self.projects = bool(getattr(plain, "proj_size", 0))

    def round_(self, now, before):
        """Round its matrices; returns what both uses give the next level."""
        given, wanted = self._own(now), self._own(before)
        self._fit(INPUT, *map(self._inputs, (given, wanted)))
        last = self._run(wanted)
        self._fit(
            RECURRENT,
            self._one_step_before(given, self._run(given, (INPUT,))),
            self._one_step_before(wanted, last),
        )
        done = INPUT, RECURRENT
        if self.projects:
            self._fit(
                PROJECTION,
                self._run(given, done, unprojected=True),
                self._run(wanted, unprojected=True),
            )
        new = self._run(given, (*done, PROJECTION))
        return _with_outputs(now, new), _with_outputs(before, last)

    def _own(self, uses):
        """Uses with the first states of this level only."""
        return [
            replace(use, state=tuple(part[self.states] for part in use.state))
            for use in uses
        ]

    def _inputs(self, uses):
        """What all directions read."""
        return [[use.items for use in uses] for _ in self.endings]

    def _one_step_before(self, uses, outputs):
        """What recurrent matrices are given: outputs, a step late."""
        return [
            [
                _late(items, use.state and use.state[0][number], ending)
                for use, items in zip(uses, own)
            ]
            for number, (ending, own) in enumerate(zip(self.endings, outputs))
        ]

    def _fit(self, kind, given, wanted):
        """Round the matrices of a kind, one for each direction."""
        for ending, now, before in zip(self.endings, given, wanted):
            name, bias = kind + ending, BIASES.get(kind, "") + ending
            weights = self.tensors[self.layer, name]
            biases = self.tensors[self.layer, bias]
            if not biases and not (weights and weights[0].fake_quantize):
                continue
            matrix = as_linear(self.plain, name, bias)
            pairs = []
            for inputs, outputs, kept in zip(now, before, self.counts):
                pairs += matched_items(inputs, list(map(matrix, outputs)), kept)
            rounded = partial(getattr, self.layer, name)
            round_matrix_(
                weights, biases, matrix, rounded, pairs, self.dampings
            )

    def _run(self, uses, rounded=(), unprojected=False):
        """What comes out with some kinds of matrices as they are now."""
        one = self._layer(rounded)
        if unprojected:
            uses, one = _unprojected(uses, one)
        return list(zip(*(_outputs(one, use) for use in uses)))

    def _layer(self, rounded):
        """A layer of this level alone."""
        plain, options = self.plain, {}
        kind = KINDS[type(plain)]
        if kind is nn.RNN:
            options["nonlinearity"] = plain.nonlinearity
        if self.projects:
            options["proj_size"] = plain.proj_size
        first = getattr(plain, INPUT + self.endings[0])
        one = kind(
            first.shape[1],
            plain.hidden_size,
            bias=bool(plain.bias),  # Tacotron2 of SpeechBrain has 1
            bidirectional=len(self.endings) == 2,
            **options,
        ).to(first)
        now = {*rounded, *(BIASES.get(kind) for kind in rounded)}
        for ending, own in zip(self.endings, levels_of(one)[0]):
            for name in (INPUT, RECURRENT, PROJECTION, *BIASES.values()):
                if hasattr(one, name + own):
                    source = self.layer if name in now else plain
                    value = getattr(source, name + ending)
                    getattr(one, name + own).data.copy_(value)
        return one


def _outputs(one, use):
    """What a layer puts out for the items of a use, for each direction."""
    state = use.state or None
    if state and not isinstance(one, nn.LSTM):
        state = state[0]
    packed = pack_sequence(use.items, enforce_sorted=False)
    output, _ = one(packed, state)
    directions = 2 if one.bidirectional else 1
    halves = [item.chunk(directions, -1) for item in unpack_sequence(output)]
    return list(map(list, zip(*halves)))


def _with_outputs(uses, outputs):
    """Uses whose items are the outputs of all directions beside each other."""
    return [
        replace(use, items=[torch.cat(parts, -1) for parts in zip(*both)])
        for use, *both in zip(uses, *outputs)
    ]


def _late(items, first, ending):
    """Each item one step later, in its direction, behind the first state."""
    late = []
    for number, item in enumerate(items):
        begin = torch.zeros_like(item[:1])
        if len(first):
            begin = first[number][None]
        if ending.endswith("_reverse"):
            late.append(torch.cat([item[1:], begin]))
        else:
            late.append(torch.cat([begin, item[:-1]]))
    return late


def _unprojected(uses, one):
    """An LSTM that puts out what another's projection is given, and its uses.

    What comes back goes through both the projection and the recurrent matrix,
    which are one matrix here; a first state comes from one that the projection
    makes it of.
    """
    plain = nn.LSTM(
        one.input_size,
        one.hidden_size,
        bias=bool(one.bias),
        bidirectional=one.bidirectional,
    ).to(one.weight_ih_l0)
    back = []
    for ending in levels_of(one)[0]:
        projection = getattr(one, PROJECTION + ending)
        back.append(torch.linalg.pinv(projection))
        for name in (INPUT, RECURRENT, *BIASES.values()):
            if hasattr(plain, name + ending):
                value = getattr(one, name + ending)
                value = value @ projection if name == RECURRENT else value
                getattr(plain, name + ending).data.copy_(value)
    back = torch.stack(back).mT
    moved = [
        replace(use, state=(use.state[0] @ back, *use.state[1:]))
        if use.state
        else use
        for use in uses
    ]
    return moved, plain
