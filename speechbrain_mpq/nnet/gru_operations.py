"""The seventeen operations of a GRU, each with a bit width of its own.

One step of a cell (torch's GRU), with the name of each operation:

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        input_reset, hidden_reset, sum_reset, reset
    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        input_update, hidden_update, sum_update, update
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        input_new, hidden_new, gated_hidden, sum_new, new
    h' = (1 - z) * n + z * h
        complement, new_part, old_part, state

Here they are computed in floating point: observed, to learn which values each
takes (`gru_conversion.py`), or rounded as the integers will be, with a
gradient (`gru_simulation.py`). `integer_gru.py` computes with integers.

The width of a product with a matrix is that of its weights; its result keeps
`RESULT_BITS` until an addition or a product rounds it to a width of its own,
or has the width of the weights too where that is asked for.

Shapes: inputs [batch, time, features], as everywhere in SpeechBrain.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

LINEAR = (
    *("input_reset", "input_update", "input_new"),
    *("hidden_reset", "hidden_update", "hidden_new"),
)
ELEMENTWISE = (
    *("sum_reset", "sum_update", "sum_new", "reset", "update", "new"),
    *("gated_hidden", "complement", "new_part", "old_part", "state"),
)
OPERATIONS = LINEAR + ELEMENTWISE
BITS = (2, 3, 4, 5, 6, 7, 8)  # candidates of each operation
INPUT_BITS = 8  # of the features and of what follows a layer of two directions
MAX_SIZE = 2**16  # features, hidden units, classes; int32 sums hold them
RESULT_BITS = 16  # of a product with a matrix, before it is rounded again


class Cell(NamedTuple):
    """Parameters of one layer in one direction: [3 hidden, features], ..."""

    weight_ih: torch.Tensor
    weight_hh: torch.Tensor
    bias_ih: torch.Tensor
    bias_hh: torch.Tensor


def torch_gru(module):
    """The torch.nn.GRU of a module, where its integers can be found.

    Example
    -------
    >>> torch_gru(torch.nn.GRU(2, 3))
    GRU(2, 3)
    >>> torch_gru(torch.nn.LSTM(2, 3))
    Traceback (most recent call last):
    ...
    TypeError: a LSTM has other operations than a GRU: give a torch.nn.GRU ...
    """
    for candidate in (module, getattr(module, "rnn", None)):
        if isinstance(candidate, torch.nn.GRU):
            break
    else:
        name = type(module).__name__
        raise TypeError(
            f"a {name} has other operations than a GRU: give a torch.nn.GRU "
            "or a speechbrain.nnet.RNN.GRU"
        )
    for name, parameter in candidate.named_parameters():
        if not parameter.is_floating_point():
            raise TypeError(f"{name} is {parameter.dtype}: give the float GRU")
        if not torch.isfinite(parameter).all():
            raise ValueError(
                f"{name} holds NaN or infinity: the training diverged; load an "
                "earlier checkpoint"
            )
    if max(candidate.input_size, candidate.hidden_size) > MAX_SIZE:
        raise ValueError(
            f"{candidate} has more than {MAX_SIZE} features or hidden units, "
            "whose sums int32 could not hold"
        )
    return candidate


def gru_cells(module):
    """Parameters of every cell of a GRU."""
    gru = torch_gru(module)
    cells = {}
    for layer in range(gru.num_layers):
        for suffix in ("", "_reverse")[: 1 + gru.bidirectional]:
            name = f"l{layer}{suffix}"
            weights = [getattr(gru, f"weight_{k}_{name}") for k in ("ih", "hh")]
            none = weights[0].new_zeros(len(weights[0]))
            biases = [
                getattr(gru, f"bias_{k}_{name}") if gru.bias else none
                for k in ("ih", "hh")
            ]
            cells[name] = Cell(*weights, *biases)
    return cells


def named_matrices(module):
    """The matrix and the bias of each linear operation.

    Returns
    -------
    list of tuple
        (operation, weight [hidden, columns], bias [hidden]), cell by cell.

    Example
    -------
    >>> for name, weight, _ in named_matrices(torch.nn.GRU(2, 3))[2:4]:
    ...     print(name, list(weight.shape))
    l0.input_new [3, 2]
    l0.hidden_reset [3, 3]
    """
    return [
        (f"{cell}.{operation}", weight, bias)
        for cell, values in gru_cells(module).items()
        for operation, weight, bias in zip(
            LINEAR,
            (*values.weight_ih.chunk(3), *values.weight_hh.chunk(3)),
            (*values.bias_ih.chunk(3), *values.bias_hh.chunk(3)),
        )
    ]


def operations(cells):
    """Names of all operations, the genes of a plan.

    Arguments
    ---------
    cells : iterable of str
        Names of cells.

    Returns
    -------
    tuple of str

    Example
    -------
    >>> names = operations(["l0"])
    >>> len(names), names[0], names[-1]
    (17, 'l0.input_reset', 'l0.state')
    """
    return tuple(f"{cell}.{name}" for cell in cells for name in OPERATIONS)


def check_plan(plan, cells):
    """Refuses a plan that is of another network or has other bits.

    Example
    -------
    >>> check_plan({"l0.state": 8}, ["l0"])
    Traceback (most recent call last):
    ...
    ValueError: not a plan of this GRU: 16 of 17 operations are missing ...
    """
    names = operations(cells)
    missing = [name for name in names if name not in plan]
    foreign = sorted(set(plan) - set(names))
    if missing or foreign:
        raise ValueError(
            f"not a plan of this GRU: {len(missing)} of {len(names)} "
            f"operations are missing {missing[:3]}, {len(foreign)} are not "
            f"its own {foreign[:3]}"
        )
    for name, bits in plan.items():
        if type(bits) is not int or bits not in BITS:
            raise ValueError(f"{name} has {bits!r} bits: give 2 to 8")


def run_cell(inputs, lengths, cell, observe, reverse=False):
    """All steps of one cell in floating point.

    Arguments
    ---------
    inputs : torch.Tensor
        [batch, time, features].
    lengths : torch.Tensor or None
        [batch], steps of each sequence.
    observe : callable
        Takes (operation, result, valid) and returns what to go on with;
        valid is [batch] or [batch, time], bool.

    Returns
    -------
    outputs : torch.Tensor
        [batch, time, hidden]; behind its end a sequence keeps its state.
    state : torch.Tensor
        [batch, hidden], after the last step.

    Example
    -------
    >>> gru, names = torch.nn.GRU(2, 3), []
    >>> def observe(name, result, valid):
    ...     names.append(name)
    ...     return result
    >>> inputs = torch.randn(4, 1, 2)
    >>> _, state = run_cell(inputs, None, gru_cells(gru)["l0"], observe)
    >>> len(names), torch.allclose(state, gru(inputs.transpose(0, 1))[1][0])
    (17, True)
    """
    batch, steps, _ = inputs.shape
    valid = valid_steps(lengths, batch, steps, inputs.device)
    projected = torch.nn.functional.linear(inputs, cell[0], cell[2])
    from_input = [
        observe(name, part, valid)
        for name, part in zip(LINEAR[:3], projected.chunk(3, -1))
    ]
    state = inputs.new_zeros(batch, cell.weight_hh.shape[1])
    outputs = [None] * steps
    for step in reversed(range(steps)) if reverse else range(steps):
        now = [part[:, step] for part in from_input]
        following = _step(now, state, cell, observe, valid[:, step])
        state = torch.where(valid[:, step, None], following, state)
        outputs[step] = state
    return torch.stack(outputs, 1), state


def valid_steps(lengths, batch, steps, device=None):
    """Which steps belong to a sequence.

    Arguments
    ---------
    lengths : torch.Tensor or None
        [batch], steps of each sequence; None: all.

    Returns
    -------
    torch.Tensor
        [batch, time], bool.

    Example
    -------
    >>> valid_steps(torch.tensor([1, 2]), 2, 2)
    tensor([[ True, False],
            [ True,  True]])
    """
    if lengths is None:
        return torch.ones(batch, steps, dtype=torch.bool, device=device)
    lengths = torch.as_tensor(lengths, device=device)
    good = lengths.shape == (batch,) and not lengths.is_floating_point()
    if not good or ((lengths < 1) | (lengths > steps)).any():
        raise ValueError(
            f"lengths must be {batch} integers from 1 to {steps}: multiply "
            "relative ones by the number of steps and round"
        )
    return torch.arange(steps, device=device) < lengths[:, None]


def run_gru(cells, inputs, lengths, observe):
    """All layers in floating point.

    Arguments
    ---------
    inputs : torch.Tensor
        [batch, time, features].
    lengths : torch.Tensor or None
        [batch], integers.

    Returns
    -------
    outputs : torch.Tensor
        [batch, time, hidden x directions].
    states : torch.Tensor
        [cells, batch, hidden], after the last step.

    Example
    -------
    >>> cells = gru_cells(torch.nn.GRU(2, 3, bidirectional=True))
    >>> run_gru(cells, torch.randn(4, 5, 2), None, lambda *a: a[1])[0].shape
    torch.Size([4, 5, 6])
    """
    batch, steps, _ = inputs.shape
    valid = valid_steps(lengths, batch, steps, inputs.device)
    inputs, states = observe("l0.input", inputs, valid), []
    both = any(name.endswith("_reverse") for name in cells)
    names = list(cells)
    for first in range(0, len(names), 1 + both):
        directions = []
        for name in names[first : first + 1 + both]:

            def within(operation, values, valid, name=name):
                return observe(f"{name}.{operation}", values, valid)

            outputs, state = run_cell(
                inputs, lengths, cells[name], within, name.endswith("_reverse")
            )
            directions.append(outputs)
            states.append(state)
        inputs = directions[0]
        if both:
            name = f"{names[first]}.output"
            inputs = observe(name, torch.cat(directions, -1), valid)
    return inputs, torch.stack(states)


def _step(from_input, state, cell, observe, valid):
    """One step of a cell: the equations at the top."""
    projected = torch.nn.functional.linear(state, cell[1], cell[3])
    i_r, i_z, i_n = from_input
    h_r, h_z, h_n = (
        observe(name, part, valid)
        for name, part in zip(LINEAR[3:], projected.chunk(3, -1))
    )
    r = observe("sum_reset", i_r + h_r, valid)
    r = observe("reset", torch.sigmoid(r), valid)
    z = observe("sum_update", i_z + h_z, valid)
    z = observe("update", torch.sigmoid(z), valid)
    gated = observe("gated_hidden", r * h_n, valid)
    n = observe("sum_new", i_n + gated, valid)
    n = observe("new", torch.tanh(n), valid)
    rest = observe("complement", 1 - z, valid)
    new_part = observe("new_part", rest * n, valid)
    old_part = observe("old_part", z * state, valid)
    return observe("state", new_part + old_part, valid)


@dataclass(frozen=True)
class Affine:
    """Signed integers that stand for real values.

    A code q stands for scale * (q - zero_point).

    Example
    -------
    >>> unit = Affine(scale=1 / 3, zero_point=-2, bits=2)
    >>> unit.quantize(torch.tensor([0.0, 0.3, 1.0, 9.0]))
    tensor([-2, -1,  1,  1], dtype=torch.int32)
    """

    scale: float  # distance of two neighbours
    zero_point: int  # code of zero; it may lie outside the codes
    bits: int  # codes run from -2^(bits - 1) to 2^(bits - 1) - 1

    @property
    def lowest(self):
        """The smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self):
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def quantize(self, values):
        """Codes, int32, of real values."""
        codes = torch.round(values.double() / self.scale) + self.zero_point
        return codes.clamp(self.lowest, self.highest).to(torch.int32)

    def dequantize(self, codes):
        """Real values, float32, of codes."""
        return (codes - self.zero_point).float() * self.scale

    def fake_quantize(self, values):
        """Real values rounded to those of codes; the gradient passes inside."""
        lowest = self.lowest - self.zero_point
        inside = (values / self.scale).clamp(
            lowest, self.highest - self.zero_point
        )
        return (inside + (inside.round() - inside).detach()) * self.scale
