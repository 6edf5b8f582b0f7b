"""An integer GRU's results in floating point: bit for bit, or for training.

PyTorch multiplies matrices of integers slowly. A search that evaluates a
thousand plans on the same sequences simulates the integers in float64, and
everything stays exact:

* A float64 holds every integer, and every multiple of 2^-s with an integer,
  below 2^53.
* `IntegerCell` refuses constants with which an accumulator could leave int32.
  Times a multiplier of 15 bits that is below 2^46, whatever part of the sum
  is added first; with the half and both operands of a sum, below 2^48.
* A right shift by s is a product with 2^-s, which only moves the exponent, and
  a floor. So the multiplier and the shift of a row are folded into its
  weights: all partial sums are multiples of 2^-s, below 2^48 of them.
* Where the place of a code in its table is added before the floor, too, the
  sum is held against 2^52 when the simulation is built (`_Rounding`).

What is behind the sums of a gate has few codes, so that (1 - z) * n and z * h
are looked up as well: 2^16 entries at most.

`FakeQuantizedGRU` is trained through the roundings, with a gradient.
"""

import torch

from .gru_conversion import fit_rows
from .gru_operations import (
    INPUT_BITS,
    LINEAR,
    Cell,
    check_plan,
    gru_cells,
    named_matrices,
    run_gru,
    valid_steps,
)

EXACT = 2**52


class PackedCodes:
    """Sequences of codes without padding, and what was computed of them.

    Arguments
    ---------
    codes : torch.Tensor
        [batch, time, features], int32, from `IntegerGRU.quantize`.
    lengths : torch.Tensor or None
        [batch], steps of each sequence.

    Example
    -------
    >>> codes = torch.zeros(2, 3, 1, dtype=torch.int32)
    >>> packed = PackedCodes(codes, torch.tensor([1, 3]))
    >>> packed.counts, packed.data.shape
    ([2, 1, 1], torch.Size([4, 1]))
    """

    def __init__(self, codes, lengths=None):
        if codes.is_floating_point() or codes.ndim != 3:
            raise ValueError(
                "give codes [batch, time, features] from quantize(), not "
                f"{codes.dtype} {list(codes.shape)}"
            )
        valid = valid_steps(lengths, *codes.shape[:2], codes.device)
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            codes, valid.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        self.data = packed.data.double()  # [all steps, features], time first
        self.counts = packed.batch_sizes.tolist()  # sequences at each step
        self.unsorted = packed.unsorted_indices
        self.products = {}  # of the first layer, by the integers they are of


class SimulatedGRU:
    """What an integer GRU computes, for many sequences at once.

    Arguments
    ---------
    integer : IntegerGRU

    Example
    -------
    >>> from speechbrain_mpq.nnet.gru_conversion import (
    ...     calibrate,
    ...     convert,
    ...     homogeneous_plan,
    ... )
    >>> gru, inputs = torch.nn.GRU(2, 3), torch.randn(4, 5, 2)
    >>> calibration = calibrate(gru, [inputs])
    >>> linear = torch.nn.Linear(3, 10)
    >>> integer = convert(gru, homogeneous_plan(gru, 4), calibration, linear)
    >>> codes = integer.quantize(inputs)
    >>> scores = SimulatedGRU(integer).classify(PackedCodes(codes))
    >>> torch.equal(scores, integer.classify(codes))
    True
    """

    def __init__(self, integer):
        self.integer = integer
        self.cells = {n: _Cell(cell) for n, cell in integer.cells.items()}

    def classify(self, packed):
        """Scores of the classes, as `IntegerGRU.classify` gives them.

        Arguments
        ---------
        packed : PackedCodes

        Returns
        -------
        torch.Tensor
            [batch, classes], int32.
        """
        weight = self.integer.classifier_weight
        if weight is None:
            raise ValueError("no classifier: convert with one")
        last = self.last(packed).double()  # sums below 2^31
        scores = last @ weight.double().T + self.integer.classifier_bias
        return scores.to(torch.int32)

    @torch.no_grad()
    def last(self, packed):
        """The output that each sequence ends with.

        Arguments
        ---------
        packed : PackedCodes

        Returns
        -------
        torch.Tensor
            [batch, hidden x directions], int32.
        """
        size = self.integer.description["input_size"]
        if packed.data.shape[1] != size:
            raise ValueError(f"codes of {packed.data.shape[1]}, not {size}")
        width = 1 + self.integer.description["bidirectional"]
        names, codes = list(self.cells), packed.data
        for first in range(0, len(names), width):
            products = packed.products if first == 0 else {}
            ran = [
                self.cells[name].run(
                    codes,
                    packed.counts,
                    products,
                    name.endswith("_reverse"),
                    first + width < len(names),
                )
                for name in names[first : first + width]
            ]
            join = self.integer._join
            last = join(names[first], [_int32(state) for _, state in ran])
            if first + width < len(names):
                outputs = [_int32(states) for states, _ in ran]
                codes = join(names[first], outputs).double()
        return last[packed.unsorted]


class _Rounding:
    """Shift, half rounded up, and saturate: `requantize` in float64.

    Gives the place of a code among its codes, from 0, to be truncated.
    """

    def __init__(self, cell, name):
        low, high = cell.ranges[name]
        self.low, self.top = low, high - low
        shift = cell.scaling[name][-1]
        self.unit = 2.0**-shift
        # Else the half and the place are added one by one, floored between
        self.together = (abs(low) + self.top + 1) * 2**shift < EXACT

    def __call__(self, values):
        """In place, of values in which 2^-shift is a factor already."""
        if self.together:
            values.add_(0.5 - self.low)
        else:
            values.add_(0.5).floor_().sub_(self.low)
        return values.clamp_(0, self.top)


class _Cell:
    """One layer in one direction, its constants as float64."""

    def __init__(self, cell):
        self.cell, hidden = cell, cell.hidden_size
        self.lowest = -(2 ** (cell.plan["state"] - 1))
        self.zero = cell.zero_points["state"] - self.lowest
        self.factors = cell.multiplier * 2.0 ** -cell.shift.double()  # [2, 3H]
        limits = cell.limit.reshape(2, 3, hidden)[:, :, 0].tolist()
        self.limits = [[float(limit) for limit in row] for row in limits]
        weight = cell.weight_hh.double()
        # States are places from 0, codes from the lowest one
        bias = cell.bias[1] + self.lowest * weight.sum(1)
        factors = self.factors[1]
        scaled = (weight * factors[:, None]).reshape(3, hidden, hidden)
        self.weight = scaled.transpose(1, 2).contiguous()
        self.bias = (bias * factors + 0.5).reshape(3, 1, hidden)
        self.rounding = {
            name: _Rounding(cell, name)
            for name in ("sum_reset", "sum_update", "sum_new", "state")
        }
        self.gated_range = cell.ranges["gated_hidden"]
        self._make_tables()

    def _make_tables(self):
        """What follows from the places of one or two codes."""
        cell = self.cell
        multiplier, shift = cell.scaling["gated_hidden"]
        self.reset = cell.centred_reset.double() * (multiplier * 2.0**-shift)
        update, new = cell.centred_update[:, None], cell.centred_new
        states = torch.arange(2 ** cell.plan["state"]) - self.zero
        one, other, _ = cell.scaling["state"]
        unit = self.rounding["state"].unit
        new_part = cell._product("new_part", cell._complement(update), new)
        old_part = cell._product("old_part", update, states.to(torch.int32))
        # An int32 times a float would be a float32
        self.new_part = new_part.double().flatten() * (one * unit)
        self.old_part = old_part.double().flatten() * (other * unit)
        self.new_size, self.states = len(new), len(states)

    def _project(self, codes, products):
        """Products of all steps with the input's matrices: reset, update, new.

        Those of the same integers are taken from `products`.
        """
        cell, parts = self.cell, []
        blocks = zip(
            cell.weight_ih.chunk(3),
            cell.bias[0].chunk(3),
            cell.multiplier[0].chunk(3),
            cell.shift[0].chunk(3),
            self.factors[0].chunk(3),
            self.limits[0],
        )
        for weight, bias, *integers, factors, limit in blocks:
            key = (limit,) + tuple(
                values.numpy().tobytes() for values in (weight, bias, *integers)
            )
            if key not in products:
                scaled = (weight * factors[:, None]).T
                sums = torch.addmm(bias * factors + 0.5, codes, scaled)
                products[key] = sums.floor_().clamp_(-limit, limit)
            parts.append(products[key])
        return parts

    def run(self, codes, counts, products, reverse, keep):
        """All steps of all sequences.

        Returns
        -------
        tuple
            Codes of all states [all steps, hidden], where they are to be kept
            (else None), and of the last ones [batch, hidden]; float64.
        """
        projected = self._project(codes, products)
        batch, hidden = counts[0], self.cell.hidden_size
        states = torch.full((batch, hidden), float(self.zero)).double()
        places = torch.full((batch, hidden), self.zero, dtype=torch.int32)
        outputs = torch.empty(len(codes), hidden).double() if keep else None
        ends = torch.tensor(counts).cumsum(0).tolist()
        steps = list(zip(counts, ends))
        for count, end in reversed(steps) if reverse else steps:
            rows = slice(end - count, end)
            now = [part[rows] for part in projected]
            self._step(now, states[:count], places[:count])
            if keep:
                outputs[rows] = states[:count]
        if keep:
            outputs += self.lowest
        return outputs, states + self.lowest

    def _step(self, from_input, states, places):
        """One step, in place; all are [sequences, hidden]."""
        i_r, i_z, i_n = from_input
        shape = 3, *states.shape
        from_state = torch.baddbmm(
            self.bias, states.expand(shape), self.weight
        ).floor_()
        for part, limit in zip(from_state, self.limits[1]):
            part.clamp_(-limit, limit)
        h_r, h_z, h_n = from_state
        reset = self._sum("sum_reset", i_r, h_r)
        update = self._sum("sum_update", i_z, h_z)
        gated = self.reset.index_select(0, reset.flatten()).reshape(i_r.shape)
        gated.mul_(h_n).add_(0.5).floor_().clamp_(*self.gated_range)
        new = self._sum("sum_new", i_n, gated)
        pair = new.add_(update, alpha=self.new_size).flatten()
        following = self.new_part.index_select(0, pair)
        pair = places.add_(update, alpha=self.states).flatten()
        following += self.old_part.index_select(0, pair)
        following = self.rounding["state"](following).reshape(states.shape)
        places.copy_(following)  # truncated
        states.copy_(places)

    def _sum(self, name, first, second):
        """The place of a sum of two results, int32."""
        one, other, _ = self.cell.scaling[name]
        rounding = self.rounding[name]
        total = (first * (one * rounding.unit)).add_(
            second, alpha=other * rounding.unit
        )
        return rounding(total).to(torch.int32)


def _int32(codes):
    """Codes as integers again."""
    return codes.to(torch.int32)


class FakeQuantizedGRU(torch.nn.Module):
    """A GRU that rounds in floating point as the integers will.

    Training it trains the parameters of the GRU it was made from, and a step
    for each row of its matrices (as in Learned Step Size Quantization,
    https://arxiv.org/abs/1902.08153). Convert afterwards with the same plan
    and calibration and with `row_scales()`. Differences to the integers
    remain where a 15-bit multiplier rounds the other way.

    Arguments
    ---------
    gru : torch.nn.GRU or speechbrain.nnet.RNN.GRU
    plan : dict of str -> int
        Operation -> bits.
    calibration : Calibration

    Example
    -------
    >>> from speechbrain_mpq.nnet.gru_conversion import calibrate
    >>> from speechbrain_mpq.nnet.gru_operations import operations
    >>> gru, inputs = torch.nn.GRU(2, 3), torch.randn(4, 5, 2)
    >>> plan = dict.fromkeys(operations(["l0"]), 8)
    >>> fake = FakeQuantizedGRU(gru, plan, calibrate(gru, [inputs]))
    >>> outputs, states = fake(inputs)
    >>> outputs.shape, states.shape
    (torch.Size([4, 5, 3]), torch.Size([1, 4, 3]))
    """

    def __init__(self, gru, plan, calibration):
        super().__init__()
        check_plan(plan, gru_cells(gru))
        self.gru, self.plan, self.calibration = gru, plan, calibration
        self.log_scales = torch.nn.ParameterDict()
        for name, weight, bias in named_matrices(gru):
            floor = bias.detach().double().abs() / 2**29
            _, scales = fit_rows(weight, plan[name], floor)
            key = name.replace(".", "_")
            self.log_scales[key] = scales.to(weight).log()

    def row_scales(self):
        """Learned scales of the rows of each matrix, for `convert`.

        Returns
        -------
        dict of str -> torch.Tensor
            Operation -> [hidden].
        """
        return {
            name: self.log_scales[name.replace(".", "_")].detach().exp()
            for name, _, _ in named_matrices(self.gru)
        }

    def forward(self, inputs, lengths=None):
        """Outputs [batch, time, hidden] and last states [cells, batch, hidden].

        Arguments
        ---------
        inputs : torch.Tensor
            [batch, time, features].
        lengths : torch.Tensor or None
            [batch], integers.
        """
        return run_gru(self._rounded(), inputs, lengths, self._round)

    def _round(self, name, values, valid):
        """The result of an operation, rounded."""
        bits = self.plan.get(name, INPUT_BITS)
        if name.split(".")[-1] in LINEAR:
            bits = self.calibration.result_width(bits)
        return self.calibration.affine(name, bits).fake_quantize(values)

    def _rounded(self):
        """Cells with rounded matrices."""
        rounded = {}
        for name, weight, _ in named_matrices(self.gru):
            scales = self.log_scales[name.replace(".", "_")].exp()[:, None]
            highest = 2 ** (self.plan[name] - 1) - 1
            inside = (weight / scales).clamp(-highest, highest)
            codes = inside + (inside.round() - inside).detach()
            rounded.setdefault(name.split(".")[0], []).append(codes * scales)
        return {
            name: Cell(torch.cat(parts[:3]), torch.cat(parts[3:]), *cell[2:])
            for (name, cell), parts in zip(
                gru_cells(self.gru).items(), rounded.values()
            )
        }
