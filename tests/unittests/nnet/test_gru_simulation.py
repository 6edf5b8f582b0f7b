"""The simulation in float64 against the integers themselves, bit for bit."""

from types import SimpleNamespace

import pytest
import torch

from speechbrain_mpq.nnet.gru_conversion import (
    calibrate,
    convert,
    homogeneous_plan,
)
from speechbrain_mpq.nnet.gru_operations import gru_cells, operations
from speechbrain_mpq.nnet.gru_simulation import (
    PackedCodes,
    SimulatedGRU,
    _Rounding,
)
from speechbrain_mpq.nnet.integer_gru import requantize

LENGTHS = torch.tensor([3, 7, 1, 5])


def made(seed=0, scale=3.0, **options):
    """A GRU with weights that use its gates, its inputs and a classifier."""
    torch.manual_seed(seed)
    gru = torch.nn.GRU(6, 9, **options)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.mul_(scale)
    return gru, torch.randn(4, 7, 6)


@pytest.mark.parametrize("result_bits", [16, None])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}],
    ids=["one", "deep"],
)
def test_equals_the_integers(options, result_bits):
    gru, inputs = made(**options)
    calibration = calibrate(gru, [(inputs, LENGTHS)], result_bits)
    names = operations(gru_cells(gru))
    linear = torch.nn.Linear(9 * (1 + gru.bidirectional), 5)
    wild = torch.randint(-128, 128, inputs.shape, dtype=torch.int32)
    packed = PackedCodes(wild, LENGTHS)
    for _ in range(5):
        bits = torch.randint(2, 9, (len(names),)).tolist()
        plan = dict(zip(names, bits))
        integer = convert(gru, plan, calibration, linear)
        simulated = SimulatedGRU(integer)
        tensors = [
            value
            for cell in simulated.cells.values()
            for value in vars(cell).values()
            if isinstance(value, torch.Tensor)
        ]
        assert {tensor.dtype for tensor in tensors} == {torch.float64}
        scores = simulated.classify(packed)
        assert scores.dtype == torch.int32
        assert torch.equal(scores, integer.classify(wild, LENGTHS))
        _, _, last = integer._run(wild, None, LENGTHS)
        assert torch.equal(simulated.last(packed), last)


@pytest.mark.parametrize("shift", [1, 15, 30, 46])
@pytest.mark.parametrize("zero_point", [0, -(2**15) + 1, 2**14 + 3])
def test_rounding_is_exact(shift, zero_point):
    """Halves, and whatever bits a sum and the place of a code can have."""
    low, high = -8 - zero_point, 7 - zero_point
    cell = SimpleNamespace(ranges={"x": (low, high)}, scaling={"x": [1, shift]})
    rounding = _Rounding(cell, "x")
    assert rounding.together == (shift < 46 or zero_point == 0)
    edges = (torch.arange(low - 2, high + 3) * 2**shift).clamp(-(2**47), 2**47)
    near = torch.cat([edges + 2 ** (shift - 1) + step for step in (-1, 0, 1)])
    values = torch.cat([edges, near, torch.randint(-(2**47), 2**47, (999,))])
    places = rounding(values.double() * rounding.unit).long()
    assert torch.equal(places + low, requantize(values, shift, low, high))


@pytest.mark.parametrize("scale", [1e-5, 40])
def test_scales_far_apart(scale):
    gru, inputs = made(scale=scale)
    for calibrated in (inputs, inputs * 1e-4):
        calibration = calibrate(gru, [calibrated])
        integer = convert(gru, homogeneous_plan(gru, 5), calibration)
        codes = integer.quantize(inputs)
        _, _, last = integer._run(codes, None, None)
        assert torch.equal(SimulatedGRU(integer).last(PackedCodes(codes)), last)


def test_products_are_those_of_the_same_integers():
    gru, inputs = made()
    other, _ = made(seed=1)
    calibrations = [calibrate(module, [inputs]) for module in (gru, other)]
    codes = torch.randint(-128, 128, inputs.shape, dtype=torch.int32)
    packed = PackedCodes(codes)
    for module, calibration, count in zip((gru, other), calibrations, (6, 12)):
        for bits in (8, 3, 8):
            plan = homogeneous_plan(module, bits)
            integer = convert(module, plan, calibration)
            _, _, last = integer._run(codes, None, None)
            assert torch.equal(SimulatedGRU(integer).last(packed), last)
        assert len(packed.products) == count  # 3 gates, 2 widths


def test_clear_errors():
    gru, inputs = made()
    integer = convert(gru, homogeneous_plan(gru, 8), calibrate(gru, [inputs]))
    with pytest.raises(ValueError, match=r"from quantize\(\)"):
        PackedCodes(inputs)
    with pytest.raises(ValueError, match="lengths must be 4 integers"):
        PackedCodes(integer.quantize(inputs), LENGTHS[:2])
    packed = PackedCodes(integer.quantize(inputs)[..., :5])
    with pytest.raises(ValueError, match="codes of 5, not 6"):
        SimulatedGRU(integer).last(packed)
    with pytest.raises(ValueError, match="convert with one"):
        SimulatedGRU(integer).classify(packed)
