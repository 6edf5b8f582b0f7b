"""A trained GRU to integers: codes, multipliers, shifts, tables.

A GRU runs in floating point over a calibration set; each operation then gets,
for each bit width, the codes with the least squared error.
"""

import math

import torch

from .gru_operations import (
    ELEMENTWISE,
    INPUT_BITS,
    LINEAR,
    RESULT_BITS,
    Affine,
    check_plan,
    gru_cells,
    named_matrices,
    operations,
    run_gru,
    torch_gru,
)
from .integer_gru import (
    FORMAT,
    MAX_SHIFT,
    TABLES,
    VERSION,
    IntegerCell,
    IntegerGRU,
)

# What a sum is good for is seen behind its non-linearity
BEHIND = {
    "sum_reset": torch.sigmoid,
    "sum_update": torch.sigmoid,
    "sum_new": torch.tanh,
}
SHRINK = torch.linspace(0.3, 1, 15, dtype=torch.float64)  # parts of a range
SAMPLE = 512  # values of an operation that each step adds
FIT_SAMPLE = 8192  # values that codes are fitted to, or that all steps add


def calibrate(gru, batches, result_bits=RESULT_BITS):
    """Run a GRU in floating point and note what its operations give.

    Arguments
    ---------
    gru : torch.nn.GRU or speechbrain.nnet.RNN.GRU
    batches : iterable
        Inputs [batch, time, features], or these and lengths ([batch],
        integers) as a tuple or list, of which more may follow.
    result_bits : int or None
        See `Calibration`.

    Returns
    -------
    Calibration

    Example
    -------
    >>> calibration = calibrate(torch.nn.GRU(2, 3), [torch.randn(4, 5, 2)])
    >>> calibration.affine("l0.state", 4).bits
    4
    """
    calibration, cells = Calibration(result_bits), gru_cells(gru)
    size, hidden = torch_gru(gru).input_size, torch_gru(gru).hidden_size
    calibration.sizes = {"input_size": size, "hidden_size": hidden}
    for batch in batches:
        several = isinstance(batch, tuple | list)
        inputs, lengths = batch[:2] if several else (batch, None)
        if inputs.ndim != 3 or inputs.shape[2] != size:
            raise ValueError(
                f"calibrate with inputs [batch, time, {size}], not "
                f"{list(inputs.shape)}"
            )
        with torch.no_grad():
            inputs = inputs.to(cells["l0"].weight_ih)
            run_gru(cells, inputs, lengths, calibration.observe)
    if not calibration.samples:
        raise ValueError("no batch to calibrate with")
    return calibration


class Calibration:
    """Which values the operations take, and the codes that suit them.

    Arguments
    ---------
    result_bits : int or None
        Bits of the result of a product with a matrix; None: as many as the
        weights have.

    Example
    -------
    >>> calibration = Calibration()
    >>> values = torch.linspace(0, 1, 256)[None]
    >>> _ = calibration.observe("l0.reset", values, torch.tensor([True]))
    >>> calibration.affine("l0.reset", 8).zero_point
    -128
    """

    def __init__(self, result_bits=RESULT_BITS):
        if result_bits is not None and not 8 <= result_bits <= 16:
            raise ValueError(f"result_bits are 8 to 16, not {result_bits}")
        self.result_bits = result_bits
        self.samples, self.largest = {}, {}
        self.sizes = {}  # of the GRU, where `calibrate` ran one
        self._affine, self._rows = {}, {}

    def observe(self, name, values, valid):
        """Keep some of the values, and the largest; returns the values."""
        seen = values.detach()[valid].flatten()
        if not torch.isfinite(seen).all():
            raise ValueError(f"{name} takes values that are not finite")
        largest = seen.abs().max().item() if len(seen) else 0.0
        self.largest[name] = max(self.largest.get(name, 0.0), largest)
        drawn = self.samples.setdefault(name, [])
        # [batch, time] is all steps at once
        count = FIT_SAMPLE if valid.ndim == 2 else SAMPLE
        drawn.append(self._draw(seen, count, len(drawn)))
        return values

    def affine(self, name, bits):
        """The codes of an operation at so many bits, found once."""
        if (name, bits) not in self._affine:
            if name not in self.samples:
                raise ValueError(f"calibration has not seen {name}")
            self._affine[name, bits] = self._fit(name, bits)
        return self._affine[name, bits]

    def result_width(self, bits):
        """Bits of the result of a product with weights of so many bits."""
        return self.result_bits or bits

    def rows(self, name, weight, bits, floor):
        """`fit_rows`, found once for the same values of the weight."""
        version = weight.data_ptr(), weight._version, tuple(floor.tolist())
        if self._rows.get((name, bits), (None,))[0] != version:
            fitted = fit_rows(weight, bits, floor)
            # The weight is kept, so that no other one gets its address
            self._rows[name, bits] = version, weight, *fitted
        return self._rows[name, bits][2:]

    def _draw(self, values, count, seed=0):
        """Some of the values at random, [count] or fewer."""
        # Every so many, or the same places at each step, would be the same few
        # columns again and again.
        if len(values) <= count:
            return values.cpu()
        generator = torch.Generator().manual_seed(seed)
        return values.cpu()[
            torch.randint(len(values), (count,), generator=generator)
        ]

    def _fit(self, name, bits):
        """Codes for what was observed of an operation."""
        operation = name.split(".")[-1]
        if operation in LINEAR and bits >= 12:  # room for what is unseen
            largest = 2 * max(self.largest[name], 1e-6)
            return Affine(largest / (2 ** (bits - 1) - 1), 0, bits)
        sample = self._draw(torch.cat(self.samples[name]), FIT_SAMPLE).double()
        return _fit_affine(
            sample,
            bits,
            BEHIND.get(operation),
            with_zero=operation in ("state", "input", "output"),
            symmetric=operation in LINEAR,
        )


def _fit_affine(sample, bits, through=None, with_zero=False, symmetric=False):
    """The codes of a sample [values] with the least squared error."""
    lowest, highest = sample.min().item(), sample.max().item()
    if with_zero:
        lowest, highest = min(lowest, 0.0), max(highest, 0.0)
    if symmetric:
        highest = max(abs(lowest), abs(highest))
        pairs = [(-highest * share, highest * share) for share in SHRINK]
    else:
        # Zero, where it must be kept, is what both ends move to
        middle = 0.0 if with_zero else sample.mean().item()
        shares = SHRINK[::2]
        pairs = [
            (middle + (lowest - middle) * low, middle + (highest - middle) * up)
            for low in shares
            for up in shares
        ]
    through = through or (lambda values: values)
    target, best = through(sample), (math.inf, None)
    for low, high in reversed(pairs):
        affine = _spanning(float(low), float(high), bits, symmetric)
        rounded = affine.fake_quantize(sample)
        error = (through(rounded) - target).square().mean().item()
        if error < best[0]:
            best = error, affine
    return best[1]


def fit_rows(weight, bits, floor, scales=None):
    """Symmetric codes of a matrix, a scale for each row.

    Arguments
    ---------
    weight : torch.Tensor
        [rows, columns].
    floor : torch.Tensor
        [rows], least scales: with a smaller one a bias would not fit.
    scales : torch.Tensor or None
        [rows], as training has found them; None: those of the least squared
        error.

    Returns
    -------
    codes : torch.Tensor
        [rows, columns], int8.
    scales : torch.Tensor
        [rows], float64.

    Example
    -------
    >>> codes, scales = fit_rows(
    ...     torch.tensor([[1.0, -1.0, 0.1], [0.0, 0.0, 0.0]]), 2, torch.zeros(2)
    ... )
    >>> codes.tolist(), scales.tolist()
    ([[1, -1, 0], [0, 0, 0]], [1.0, 1.0])
    """
    weight = weight.detach().double()
    highest = 2 ** (bits - 1) - 1
    if scales is None:
        largest = weight.abs().amax(1)  # [rows]
        scales = SHRINK[:, None].to(weight.device) * largest / highest
    scales = scales.double().reshape(-1, len(weight)).maximum(floor)
    scales = torch.where(scales > 0, scales, 1.0)[..., None]
    codes = (weight / scales).round().clamp(-highest, highest)
    errors = (codes * scales - weight).square().sum(-1)  # [shares, rows]
    best, rows = errors.argmin(0), torch.arange(len(weight))
    return codes[best, rows].to(torch.int8), scales[best, rows, 0]


def _spanning(lowest, highest, bits, symmetric):
    """Codes from about the lowest to about the highest value."""
    if symmetric:
        return Affine(max(highest, 1e-6) / (2 ** (bits - 1) - 1), 0, bits)
    # A narrow range far from zero has a zero point beyond 16 bits
    width = max(abs(lowest), abs(highest), 1e-6) / 64
    scale = max(highest - lowest, width) / (2**bits - 1)
    zero_point = round(-(2 ** (bits - 1)) - lowest / scale)
    return Affine(scale, zero_point, bits)


MULTIPLIER_BITS = 15


def homogeneous_plan(gru, bits):
    """The same bits for every operation.

    Arguments
    ---------
    gru : torch.nn.GRU or speechbrain.nnet.RNN.GRU
    bits : int
        2 to 8.

    Returns
    -------
    dict of str -> int

    Example
    -------
    >>> len(homogeneous_plan(torch.nn.GRU(2, 3, num_layers=2), 4))
    34
    """
    return dict.fromkeys(operations(gru_cells(gru)), bits)


def convert(
    gru, plan, calibration, classifier=None, labels=(), row_scales=None
) -> IntegerGRU:
    """A trained GRU in integers.

    Arguments
    ---------
    gru : torch.nn.GRU or speechbrain.nnet.RNN.GRU
        Any number of layers, one or two directions, with or without biases.
    plan : dict of str -> int
        Operation -> bits (see `gru_operations.py`).
    calibration : Calibration
        From `calibrate` on inputs like those to come.
    classifier : torch.nn.Linear or None
        Applied to the last output of a sequence; it gets 8 bits.
    labels : sequence of str
        Names of the classes, kept in the file.
    row_scales : dict of str -> torch.Tensor or None
        From `FakeQuantizedGRU.row_scales` after training.

    Example
    -------
    >>> gru, inputs = torch.nn.GRU(2, 3), torch.randn(4, 5, 2)
    >>> plan = homogeneous_plan(gru, 8) | {"l0.input_new": 2}
    >>> linear = torch.nn.Linear(3, 10)
    >>> integer = convert(gru, plan, calibrate(gru, [inputs]), linear)
    >>> integer.classify(integer.quantize(inputs)).shape
    torch.Size([4, 10])
    >>> integer.cells["l0"].weight_ih[6:].abs().max()  # of input_new
    tensor(1, dtype=torch.int8)
    """
    parameters, gru = gru_cells(gru), torch_gru(gru)
    check_plan(plan, parameters)
    _check_calibration(gru, parameters, calibration)
    _check_classifier(gru, classifier, labels)
    current = source = calibration.affine("l0.input", INPUT_BITS)
    cells, joints, width = {}, {}, 1 + gru.bidirectional
    for number, name in enumerate(parameters):
        matrices = [
            (full.removeprefix(f"{name}."), weight.cpu(), bias.cpu())
            for full, weight, bias in named_matrices(gru)
            if full.startswith(f"{name}.")
        ]
        cells[name] = _convert_cell(
            name, matrices, plan, calibration, current, row_scales
        )
        if number % width < width - 1:
            continue
        first = name.removesuffix("_reverse")
        following = calibration.affine(f"{name}.state", plan[f"{name}.state"])
        if gru.bidirectional:
            following = calibration.affine(f"{first}.output", INPUT_BITS)
            joints[first] = _convert_joint(
                (first, name), plan, calibration, following
            )
        current = following
    integers = None
    if classifier is not None:
        integers = _convert_classifier(classifier, current)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "input_size": gru.input_size,
        "hidden_size": gru.hidden_size,
        "layers": gru.num_layers,
        "bidirectional": gru.bidirectional,
        "result_bits": calibration.result_bits,
        "plan": dict(plan),
        "input": [source.scale, source.zero_point],
        "output": [current.scale, current.zero_point, current.bits],
        "classes": 0 if classifier is None else len(integers[1]),
        "labels": list(labels),
    }
    return IntegerGRU(description, cells, joints, integers)


def _convert_joint(cells, plan, calibration, output):
    """What brings the states of both directions to the scale of the output."""
    pairs = []
    for cell in cells:
        state = calibration.affine(f"{cell}.state", plan[f"{cell}.state"])
        (multiplier,), shift = fixed_point(state.scale / output.scale)
        pairs.append([multiplier, shift])
    return [*pairs, output.zero_point]


def fixed_point(*ratios, most=MAX_SHIFT):
    """Integer multipliers with one right shift in place of real ratios."""
    largest = max(ratios)
    if not 0 <= largest < 2 ** (MULTIPLIER_BITS - 1):
        raise ValueError(
            f"a ratio of {largest:g} between scales: were features calibrated "
            "that are all zero?"
        )
    exponent = math.frexp(largest)[1] if largest else 0  # largest < 2^exponent
    shift = min(max(MULTIPLIER_BITS - exponent, 1), most)
    limit = 2**MULTIPLIER_BITS - 1
    return [min(round(r * 2**shift), limit) for r in ratios], shift


def _check_calibration(gru, cells, calibration):
    """Refuse the calibration of another GRU."""
    for name, size in calibration.sizes.items():
        if getattr(gru, name) != size:
            raise ValueError(
                f"calibrated with a GRU of {name} {size}, not "
                f"{getattr(gru, name)}: calibrate with this one"
            )
    unseen = [n for n in operations(cells) if n not in calibration.samples]
    if unseen:
        raise ValueError(
            f"calibration has not seen {unseen[0]}: calibrate with this GRU"
        )


def _check_classifier(gru, classifier, labels):
    """Refuse a classifier that is not behind this GRU."""
    if classifier is None:
        if labels:
            raise ValueError("labels without a classifier: give both")
        return
    if not isinstance(classifier, torch.nn.Linear):
        name = type(classifier).__name__
        raise TypeError(f"the classifier is a {name}, not a torch.nn.Linear")
    outputs = gru.hidden_size * (1 + gru.bidirectional)
    if classifier.in_features != outputs:
        raise ValueError(
            f"a classifier of {classifier.in_features} features behind a GRU "
            f"of {outputs} outputs"
        )
    if labels and len(labels) != classifier.out_features:
        raise ValueError(
            f"{len(labels)} labels for {classifier.out_features} classes"
        )
    if not all(torch.isfinite(p).all() for p in classifier.parameters()):
        raise ValueError("the classifier holds NaN or infinity")


def _lookup_table(function, source, target):
    """A non-linearity as int8 codes [2^bits of source], one for each."""
    codes = torch.arange(source.lowest, source.highest + 1)
    return target.quantize(function(source.dequantize(codes))).to(torch.int8)


def _convert_cell(name, matrices, plan, calibration, source, row_scales):
    """An IntegerCell of a cell whose inputs are codes of `source`."""
    bits = {
        operation.split(".")[1]: width
        for operation, width in plan.items()
        if operation.startswith(f"{name}.")
    }

    def affine(operation):
        width = bits[operation]
        if operation in LINEAR:
            width = calibration.result_width(width)
        return calibration.affine(f"{name}.{operation}", width)

    weights, biases, scalings = [], [], []
    for operation, weight, bias in matrices:
        before = source if operation in LINEAR[:3] else affine("state")
        full, width = f"{name}.{operation}", bits[operation]
        floor = bias.detach().double().abs() / before.scale / 2**29
        learned = (row_scales or {}).get(full)
        codes, scales = (
            calibration.rows(full, weight, width, floor)
            if learned is None
            else fit_rows(weight, width, floor, learned)
        )
        scales = scales * before.scale  # of the accumulator
        shifted = before.zero_point * codes.long().sum(1)
        bias = (bias.detach().double() / scales).round().long() - shifted
        ratios = (scales / affine(operation).scale).tolist()
        weights.append(codes)
        biases.append(bias.to(torch.int32))
        scalings += [fixed_point(ratio) for ratio in ratios]
    multipliers = torch.tensor([m for (m,), _ in scalings], dtype=torch.int16)
    shifts = torch.tensor([s for _, s in scalings], dtype=torch.uint8)
    rows = torch.cat(biases), multipliers, shifts
    return IntegerCell(
        bits,
        calibration.result_bits,
        (torch.cat(weights[:3]), torch.cat(weights[3:])),
        [tensor.reshape(2, -1) for tensor in rows],
        {
            operation: _lookup_table(
                BEHIND[before], affine(before), affine(operation)
            )
            for operation, before in TABLES.items()
        },
        _constants(affine),
    )


def _constants(affine):
    """Zero points, multipliers and shifts of element-wise operations."""
    scale = {name: affine(name).scale for name in (*LINEAR, *ELEMENTWISE)}
    operands = {
        "sum_reset": (scale["input_reset"], scale["hidden_reset"]),
        "sum_update": (scale["input_update"], scale["hidden_update"]),
        "sum_new": (scale["input_new"], scale["gated_hidden"]),
        "gated_hidden": (scale["reset"] * scale["hidden_new"],),
        "complement": (scale["update"],),
        "new_part": (scale["complement"] * scale["new"],),
        "old_part": (scale["update"] * scale["state"],),
        "state": (scale["new_part"], scale["old_part"]),
    }
    constants = [affine(name).zero_point for name in ELEMENTWISE]
    for name, factors in operands.items():
        most = MAX_SHIFT
        if name == "complement":  # 1 shifted to the left is an int32 too
            most = 30 - max(math.frexp(1 / scale[name])[1], 0)
        ratios = (factor / scale[name] for factor in factors)
        multipliers, shift = fixed_point(*ratios, most=most)
        if name == "complement":
            constants.append(round(2**shift / scale[name]))
        constants += [*multipliers, shift]
    return constants


def _convert_classifier(linear, source):
    """Weight and bias in integers, one scale for all classes."""
    weight = linear.weight.detach().cpu()
    codes, scales = fit_rows(weight.reshape(1, -1), 8, torch.zeros(1))
    codes = codes.reshape(weight.shape)
    bias = source.zero_point * -codes.long().sum(1)
    if linear.bias is not None:
        real = linear.bias.detach().cpu().double() / (scales * source.scale)
        bias = bias + real.round().long()
    if bias.abs().max() + codes.long().abs().sum(1).max() * 128 >= 2**31:
        raise ValueError("a bias of the classifier is beyond int32")
    return codes, bias.to(torch.int32)
