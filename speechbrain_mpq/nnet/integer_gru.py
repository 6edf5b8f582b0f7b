"""A GRU that computes with integers only, from its input to its output.

Each of its seventeen operations (`gru_operations.py`) has a bit width of its
own. Codes are signed integers of 2 to 8 bits that stand for
scale * (code - zero point); the scales of two operands and their result are
one ratio, which is an integer multiplier of 15 bits and a right shift:

    accumulator = W q + bias                                    (int32)
    requantized = (accumulator * multiplier + half) >> shift    (int64 inside)

Zero points of inputs are part of the biases. Sigmoid and tanh are look-up
tables with an entry for each code of the sum before them.
"""

import torch

from .gru_operations import ELEMENTWISE, INPUT_BITS, LINEAR, Affine, valid_steps

FORMAT = "integer_gru"
VERSION = 1
MAX_SHIFT = 46  # an int32 times a multiplier, and half of 2^46, are int64
# Integer multipliers of each operation; each has one shift besides
MULTIPLIERS = {
    **dict.fromkeys(("sum_reset", "sum_update", "sum_new"), 2),
    **{"gated_hidden": 1, "complement": 2, "new_part": 1, "old_part": 1},
    "state": 2,
}
CONSTANTS = len(ELEMENTWISE) + sum(MULTIPLIERS.values()) + len(MULTIPLIERS)
TABLES = {"reset": "sum_reset", "update": "sum_update", "new": "sum_new"}
TENSORS = {
    "weights": torch.uint8,  # codes without gaps, each matrix from a new byte
    "tables": torch.uint8,
    "biases": torch.int32,
    "multipliers": torch.int16,
    "shifts": torch.uint8,
    "constants": torch.int32,
}


def requantize(values, shift, lowest, highest):
    """Shift right, half rounded up, and saturate.

    Arguments
    ---------
    values : torch.Tensor
        int64, already multiplied.
    shift : int or torch.Tensor
        1 to 46.
    lowest, highest : int or torch.Tensor
        Range of the result: of codes without their zero point.

    Returns
    -------
    torch.Tensor
        int32.

    Example
    -------
    >>> requantize(torch.tensor([3, 2, -2, -3, 999]), 2, -8, 7)
    tensor([ 1,  1,  0, -1,  7], dtype=torch.int32)
    """
    shifted = (values + (1 << (shift - 1))).bitwise_right_shift_(shift)
    return shifted.clamp_(lowest, highest).to(torch.int32)


class IntegerCell(torch.nn.Module):
    """One layer in one direction.

    Arguments
    ---------
    plan : dict of str -> int
        Operation (without the name of the cell) -> bits.
    result_bits : int or None
        Bits of the results of products with matrices; None: the weights'.
    weights : tuple of torch.Tensor
        [3 hidden, features] and [3 hidden, hidden], int8, in torch's order
        reset, update, new.
    rows : tuple of torch.Tensor
        Biases (int32), multipliers (int16) and shifts (uint8), [2, 3 hidden]:
        of the input, then of the hidden state.
    tables : dict of str -> torch.Tensor
        Non-linearity -> codes, int8.
    constants : list of int
        Zero points of ELEMENTWISE, then of each operation in MULTIPLIERS its
        multipliers and its shift.
    """

    def __init__(self, plan, result_bits, weights, rows, tables, constants):
        super().__init__()
        self.plan, self.result_bits = dict(plan), result_bits
        self.hidden_size = weights[1].shape[1]
        for name, tensor in zip(("weight_ih", "weight_hh"), weights):
            self.register_buffer(name, tensor)
        for name, tensor in zip(("bias", "multiplier", "shift"), rows):
            self.register_buffer(name, tensor)
        for name in TABLES:
            self.register_buffer(f"table_{name}", tables[name])
        limits = [
            2 ** ((result_bits or plan[name]) - 1) - 1
            for name in LINEAR
            for _ in range(self.hidden_size)
        ]
        limits = torch.tensor(limits, dtype=torch.int32).reshape(2, -1)
        self.register_buffer("limit", limits, persistent=False)
        self.constants = [int(value) for value in constants]
        values = iter(self.constants)
        self.zero_points = dict(zip(ELEMENTWISE, values))
        self.scaling = {
            name: [next(values) for _ in range(count + 1)]
            for name, count in MULTIPLIERS.items()
        }
        self.ranges = {}
        for name, zero_point in self.zero_points.items():
            bound = 2 ** (plan[name] - 1)
            self.ranges[name] = -bound - zero_point, bound - 1 - zero_point
        for name in TABLES:
            centred = tables[name].to(torch.int32) - self.zero_points[name]
            self.register_buffer(f"centred_{name}", centred, persistent=False)
        self._check()

    def project(self, codes, source):
        """Products with a matrix, in three parts of a gate each.

        Arguments
        ---------
        codes : torch.Tensor
            [..., features], int32.

        Returns
        -------
        list of torch.Tensor
            Reset, update, new: [..., hidden], int32, zero point 0.
        """
        weight = (self.weight_ih, self.weight_hh)[source]
        accumulator = codes @ weight.to(torch.int32).T + self.bias[source]
        limit = self.limit[source]
        results = requantize(
            accumulator.long() * self.multiplier[source],
            self.shift[source].long(),
            *(-limit, limit),
        )
        return results.chunk(3, -1)

    def forward(self, from_input, state):
        """One step.

        Arguments
        ---------
        from_input : list of torch.Tensor
            From `project`, [batch, hidden].
        state : torch.Tensor
            [batch, hidden], codes, int32.
        """
        i_r, i_z, i_n = from_input
        h_r, h_z, h_n = self.project(state, 1)
        r = self._lookup("reset", self._sum("sum_reset", i_r, h_r))
        z = self._lookup("update", self._sum("sum_update", i_z, h_z))
        gated = self._product("gated_hidden", r, h_n)
        n = self._lookup("new", self._sum("sum_new", i_n, gated))
        new_part = self._product("new_part", self._complement(z), n)
        zero_point = self.zero_points["state"]
        old_part = self._product("old_part", z, state - zero_point)
        return self._sum("state", new_part, old_part) + zero_point

    # Results are without their zero points until they are looked up, stored
    # or multiplied with a matrix: what comes next needs them so.

    def _sum(self, name, first, second):
        """A sum of two results."""
        one, other, shift = self.scaling[name]
        total = (first.long() * one).add_(second.long() * other)
        return requantize(total, shift, *self.ranges[name])

    def _product(self, name, first, second):
        """A product of two results."""
        multiplier, shift = self.scaling[name]
        product = (first * second).long().mul_(multiplier)
        return requantize(product, shift, *self.ranges[name])

    def _complement(self, update):
        """1 - z."""
        one, multiplier, shift = self.scaling["complement"]
        rest = one - update.long() * multiplier
        return requantize(rest, shift, *self.ranges["complement"])

    def _lookup(self, name, total):
        """A non-linearity of a sum."""
        before = TABLES[name]
        first = self.zero_points[before] + 2 ** (self.plan[before] - 1)
        table = getattr(self, f"centred_{name}")
        # Three times as fast as table[codes]
        entries = table.index_select(0, (total + first).flatten())
        return entries.reshape(total.shape)

    def _check(self):
        """Refuse constants with which an integer could overflow."""
        shifts = [*self.shift.flatten().tolist()]
        shifts += [values[-1] for values in self.scaling.values()]
        multipliers = self.multiplier.flatten().tolist()
        multipliers += [
            multiplier
            for name, (*values, _) in self.scaling.items()
            for multiplier in values[name == "complement" :]
        ]
        fits = (
            all(1 <= shift <= MAX_SHIFT for shift in shifts)
            and all(0 <= value < 2**15 for value in multipliers)
            and all(abs(zero) < 2**15 for zero in self.zero_points.values())
            and 0 <= self.scaling["complement"][0] < 2**31
            and abs(self.zero_points["state"]) <= 2 ** (self.plan["state"] - 1)
        )
        for weight, bias in zip((self.weight_ih, self.weight_hh), self.bias):
            # Both are codes of 8 bits or fewer, or the states of a cell
            bound = weight.long().abs().sum(1) * 2**7 + bias.long().abs()
            fits = fits and bound.max() < 2**31
        if not fits:
            raise ValueError("constants with which int32 could overflow")


class IntegerGRU(torch.nn.Module):
    """A GRU, and a classifier behind it where there is one, in integers.

    `convert` makes it of a trained GRU, `load_integer_gru` of a file.

    Arguments
    ---------
    description : dict
        Sizes, plan and scales, as the file has them.
    cells : dict of str -> IntegerCell
    joints : dict of str -> list of int
        First cell of a layer of two directions -> multiplier and shift of
        each direction.
    classifier : tuple of torch.Tensor or None
        Weight [classes, features] (int8) and bias [classes] (int32).

    Example
    -------
    >>> from speechbrain_mpq.nnet.gru_conversion import (
    ...     calibrate,
    ...     convert,
    ...     homogeneous_plan,
    ... )
    >>> gru, inputs = torch.nn.GRU(2, 3), torch.randn(4, 5, 2)
    >>> calibration = calibrate(gru, [inputs])
    >>> integer = convert(gru, homogeneous_plan(gru, 8), calibration)
    >>> outputs, states = integer(integer.quantize(inputs))
    >>> outputs.dtype, outputs.shape, integer.dequantize(outputs).dtype
    (torch.int32, torch.Size([4, 5, 3]), torch.float32)
    """

    def __init__(self, description, cells, joints, classifier=None):
        super().__init__()
        self.description = description
        self.cells = torch.nn.ModuleDict(cells)
        self.joints = joints
        self.input = Affine(*description["input"], INPUT_BITS)
        scale, zero_point, bits = description["output"]
        self.output = Affine(scale, zero_point, bits)
        weight, bias = classifier or (None, None)
        self.register_buffer("classifier_weight", weight)
        self.register_buffer("classifier_bias", bias)

    @property
    def plan(self):
        """Operation -> bits."""
        return dict(self.description["plan"])

    @property
    def packed_bytes(self):
        """Bytes of all integers of the packed file, without its description."""
        sizes = tensor_sizes(self.description)
        return sum(
            size * TENSORS[name].itemsize for name, size in sizes.items()
        )

    def quantize(self, inputs):
        """Codes of real features: the border that is not integers yet.

        Arguments
        ---------
        inputs : torch.Tensor
            [batch, time, features].

        Returns
        -------
        torch.Tensor
            int32.
        """
        if not torch.isfinite(inputs).all():
            raise ValueError("features that are not finite")
        return self.input.quantize(inputs)

    def dequantize(self, outputs):
        """Real values, float32, of the codes of outputs."""
        return self.output.dequantize(outputs)

    def forward(self, codes, states=None, lengths=None):
        """Run all layers.

        Arguments
        ---------
        codes : torch.Tensor
            [batch, time, features], int32, from `quantize`.
        states : torch.Tensor or None
            [cells, batch, hidden], where an earlier call ended.
        lengths : torch.Tensor or None
            [batch], steps of each sequence; behind them a state stays.

        Returns
        -------
        outputs : torch.Tensor
            [batch, time, hidden x directions], int32.
        states : torch.Tensor
            [cells, batch, hidden], int32, after the last step.
        """
        outputs, states, _ = self._run(codes, states, lengths)
        return outputs, states

    def classify(self, codes, lengths=None):
        """Scores of the classes after the last step, int32 accumulators.

        Arguments
        ---------
        codes : torch.Tensor
            [batch, time, features], int32, from `quantize`.
        lengths : torch.Tensor or None
            [batch].

        Returns
        -------
        torch.Tensor
            [batch, classes], int32; the largest is the class.
        """
        if self.classifier_weight is None:
            raise ValueError("no classifier: convert with one")
        _, _, last = self._run(codes, None, lengths)
        weight = self.classifier_weight.to(torch.int32)
        return last @ weight.T + self.classifier_bias

    def _run(self, codes, states, lengths):
        """Outputs, states, and the output that each sequence ends with."""
        size = self.description["input_size"]
        if codes.is_floating_point() or codes.shape[2:] != (size,):
            raise ValueError(
                f"give codes [batch, time, {size}] from quantize(), not "
                f"{codes.dtype} {list(codes.shape)}"
            )
        batch, steps, _ = codes.shape
        valid = valid_steps(lengths, batch, steps, codes.device)
        names, width = list(self.cells), 1 + self.description["bidirectional"]
        ends = []
        for first in range(0, len(names), width):
            layer = []
            for number in range(first, first + width):
                name = names[number]
                start = None if states is None else states[number]
                reverse = name.endswith("_reverse")
                cell = self.cells[name]
                layer.append(_run_cell(cell, codes, start, valid, reverse))
            ends.extend(state for _, state in layer)
            codes = self._join(names[first], [outputs for outputs, _ in layer])
            last = self._join(names[first], [state for _, state in layer])
        return codes, torch.stack(ends), last

    def _join(self, name, directions):
        """Both directions side by side, in codes they share."""
        if len(directions) == 1:
            return directions[0]
        *scalings, target = self.joints[name]
        joined = []
        for suffix, codes, (multiplier, shift) in zip(
            ("", "_reverse"), directions, scalings
        ):
            zero_point = self.cells[name + suffix].zero_points["state"]
            product = (codes - zero_point).long() * multiplier
            limits = -128 - target, 127 - target
            joined.append(requantize(product, shift, *limits) + target)
        return torch.cat(joined, -1)


def _run_cell(cell, codes, state, valid, reverse):
    """Outputs [batch, time, hidden] and last state [batch, hidden]."""
    batch, steps, _ = codes.shape
    if state is None:
        shape = batch, cell.hidden_size
        state = codes.new_full(shape, cell.zero_points["state"])
    projected = cell.project(codes, 0)
    outputs = [None] * steps
    for step in reversed(range(steps)) if reverse else range(steps):
        following = cell([part[:, step] for part in projected], state)
        state = torch.where(valid[:, step, None], following, state)
        outputs[step] = state
    return torch.stack(outputs, 1), state


def cell_names(description):
    """Names of the cells and the features each reads.

    Yields
    ------
    tuple
        (name, features).

    Example
    -------
    >>> sizes = {"input_size": 5, "hidden_size": 4}
    >>> list(cell_names({**sizes, "layers": 2, "bidirectional": False}))
    [('l0', 5), ('l1', 4)]
    """
    width = 1 + description["bidirectional"]
    features = description["input_size"]
    for layer in range(description["layers"]):
        for suffix in ("", "_reverse")[:width]:
            yield f"l{layer}{suffix}", features
        features = description["hidden_size"] * width


def tensor_sizes(description):
    """Elements of each tensor of the packed file.

    Example
    -------
    >>> sizes = {"input_size": 2, "hidden_size": 4, "classes": 0}
    >>> layers = {"layers": 1, "bidirectional": False}
    >>> names = [*LINEAR, *ELEMENTWISE]
    >>> plan = {f"l0.{name}": 4 for name in names}
    >>> sizes = tensor_sizes({**sizes, **layers, "plan": plan})
    >>> sizes["weights"], sizes["tables"], sizes["biases"]
    (36, 24, 24)
    """
    sizes = dict.fromkeys(TENSORS, 0)
    hidden, plan = description["hidden_size"], description["plan"]
    for cell, features in cell_names(description):
        for name in LINEAR:
            columns = features if name in LINEAR[:3] else hidden
            bits = plan[f"{cell}.{name}"]
            sizes["weights"] += -(-hidden * columns * bits // 8)
        for name, before in TABLES.items():
            entries = 2 ** plan[f"{cell}.{before}"]
            sizes["tables"] += -(-entries * plan[f"{cell}.{name}"] // 8)
        for name in ("biases", "multipliers", "shifts"):
            sizes[name] += 6 * hidden
        sizes["constants"] += CONSTANTS
    if description["bidirectional"]:
        sizes["constants"] += 5 * description["layers"]
    outputs = hidden * (1 + description["bidirectional"])
    sizes["weights"] += description["classes"] * outputs
    sizes["biases"] += description["classes"]
    return sizes
