"""A GRU that rounds as its integers will: its codes, and its training.

A GRU runs in floating point over a calibration set; each operation then gets,
for each bit width, the codes with the least squared error. With these it can be
trained through the roundings.
"""

import math
from dataclasses import dataclass

import torch

from .gru_operations import (
    INPUT_BITS,
    LINEAR,
    RESULT_BITS,
    Cell,
    check_plan,
    gru_cells,
    named_matrices,
    run_gru,
    torch_gru,
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
            found = fit_rows(weight, bits, floor)
            # The weight is kept, so that no other one gets its address
            self._rows[name, bits] = version, weight, *found
        return self._rows[name, bits][2:]

    def _draw(self, values, count, seed=0):
        """Some of the values at random, [count] or fewer.

        Every so many, or the same places at each step, would be the same few
        columns again and again.
        """
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
    wanted, best = through(sample), (math.inf, None)
    for low, high in reversed(pairs):
        found = _spanning(float(low), float(high), bits, symmetric)
        rounded = found.fake_quantize(sample)
        error = (through(rounded) - wanted).square().mean().item()
        if error < best[0]:
            best = error, found
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
    >>> from speechbrain_mpq.nnet.gru_calibration import calibrate
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
