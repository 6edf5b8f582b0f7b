"""An integer GRU against big integers, against its float GRU, and forged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from speechbrain_mpq.nnet.gru_conversion import (
    calibrate,
    convert,
    homogeneous_plan,
)
from speechbrain_mpq.nnet.gru_operations import (
    ELEMENTWISE,
    LINEAR,
    gru_cells,
    operations,
)
from speechbrain_mpq.nnet.gru_simulation import FakeQuantizedGRU
from speechbrain_mpq.nnet.integer_gru import (
    FORMAT,
    MULTIPLIERS,
    TENSORS,
)
from speechbrain_mpq.nnet.integer_gru_file import (
    load_integer_gru,
    save_integer_gru,
)

LENGTHS = torch.tensor([5, 2, 4])


class IntegersOnly(TorchDispatchMode):
    """Fails at the first operation that reads or makes a float."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in [*args, *(kwargs or {}).values(), result]:
            for leaf in value if isinstance(value, list | tuple) else [value]:
                floating = isinstance(leaf, float)
                if isinstance(leaf, torch.Tensor):
                    floating |= leaf.is_floating_point() or leaf.is_complex()
                assert not floating, f"{func} with {leaf!r}"
        self.operations += 1
        return result


def int32(value):
    """The value, which a 32-bit register holds."""
    assert -(2**31) <= value < 2**31
    return value


def shifted(value, shift):
    """Rounded to the nearest, halves up, with integers of any size."""
    return (2 * value + 2**shift) // 2 ** (shift + 1)


def clip(value, bits):
    """Into the codes of so many bits."""
    return max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, value))


def oracle_step(cell, inputs, state):
    """One step of one sequence, one number at a time."""
    hidden, plan = cell.hidden_size, cell.plan
    values = iter(cell.constants)
    zero = {name: next(values) for name in ELEMENTWISE}
    scaling = {
        name: [next(values) for _ in range(count + 1)]
        for name, count in MULTIPLIERS.items()
    }

    def linear(name, unit):
        number = LINEAR.index(name)
        source, gate = divmod(number, 3)
        row = gate * hidden + unit
        weight = (cell.weight_ih, cell.weight_hh)[source][row].tolist()
        total = cell.bias[source, row].item()
        for w, q in zip(weight, (inputs, state)[source]):
            total = int32(total + w * q)
        total *= cell.multiplier[source, row].item()
        limit = 2 ** ((cell.result_bits or plan[name]) - 1) - 1
        result = shifted(total, cell.shift[source, row].item())
        return max(-limit, min(limit, result))

    def close(name, total):
        shift = scaling[name][-1]
        return clip(shifted(total, shift) + zero[name], plan[name])

    def gate(name, before, total):
        code = close(before, total)
        table = getattr(cell, f"table_{name}").tolist()
        return table[code + 2 ** (plan[before] - 1)] - zero[name]

    def add(name, a, b):
        first, second, _ = scaling[name]
        return a * first + b * second

    following = []
    for unit in range(hidden):
        i = {name: linear(name, unit) for name in LINEAR}
        total = add("sum_reset", i["input_reset"], i["hidden_reset"])
        r = gate("reset", "sum_reset", total)
        total = add("sum_update", i["input_update"], i["hidden_update"])
        z = gate("update", "sum_update", total)
        product = int32(r * i["hidden_new"]) * scaling["gated_hidden"][0]
        gated = close("gated_hidden", product) - zero["gated_hidden"]
        n = gate("new", "sum_new", add("sum_new", i["input_new"], gated))
        one, multiplier, _ = scaling["complement"]
        rest = close("complement", one - z * multiplier) - zero["complement"]
        new = close("new_part", int32(rest * n) * scaling["new_part"][0])
        old = int32(z * (state[unit] - zero["state"]))
        old = close("old_part", old * scaling["old_part"][0])
        new, old = new - zero["new_part"], old - zero["old_part"]
        following.append(close("state", add("state", new, old)))
    return following


def oracle(integer, codes, lengths):
    """Outputs of all layers, one sequence at a time."""
    cells, width = integer.cells, 1 + integer.description["bidirectional"]
    names, result = list(cells), []
    for sequence, length in zip(codes.tolist(), lengths.tolist()):
        steps = sequence[:length]
        for first in range(0, len(names), width):
            directions = []
            for name in names[first : first + width]:
                cell, outputs = cells[name], []
                zero = cell.constants[ELEMENTWISE.index("state")]
                state = [zero] * cell.hidden_size
                reverse = name.endswith("_reverse")
                for step in steps[::-1] if reverse else steps:
                    state = oracle_step(cell, step, state)
                    outputs.append(state)
                directions.append(outputs[::-1] if reverse else outputs)
            if width == 2:
                *scalings, target = integer.joints[names[first]]
                for number, (multiplier, shift) in enumerate(scalings):
                    cell = cells[names[first + number]]
                    zero = cell.constants[ELEMENTWISE.index("state")]
                    directions[number] = [
                        [
                            clip(
                                shifted((q - zero) * multiplier, shift)
                                + target,
                                8,
                            )
                            for q in step
                        ]
                        for step in directions[number]
                    ]
            steps = [sum(parts, []) for parts in zip(*directions)]
        result.append(steps)
    return result


def random_plan(gru, generator):
    """Bits 2 to 8 at random."""
    names = operations(gru_cells(gru))
    bits = torch.randint(2, 9, (len(names),), generator=generator)
    return dict(zip(names, bits.tolist()))


def made_gru(seed=0, scale=3.0, **options):
    """A GRU with weights that use its gates, and its inputs."""
    torch.manual_seed(seed)
    gru = torch.nn.GRU(4, 5, **options)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.mul_(scale)
    return gru, torch.randn(3, 5, 4)


@pytest.mark.parametrize("result_bits", [16, None])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}],
    ids=["one", "deep", "unbiased"],
)
def test_equals_big_integers(options, result_bits):
    gru, inputs = made_gru(**options)
    generator = torch.Generator().manual_seed(1)
    calibration = calibrate(gru, [(inputs, LENGTHS)], result_bits)
    for _ in range(3):
        plan = random_plan(gru, generator)
        integer = convert(gru, plan, calibration)
        wild = torch.randint(-128, 128, inputs.shape, dtype=torch.int32)
        for codes in (integer.quantize(inputs), wild):
            outputs, _ = integer(codes, lengths=LENGTHS)
            wanted = oracle(integer, codes, LENGTHS)
            for row, length, expected in zip(outputs, LENGTHS, wanted):
                assert row[:length].tolist() == expected


def test_integers_only():
    gru, inputs = made_gru(num_layers=2, bidirectional=True)
    linear = torch.nn.Linear(10, 3)
    calibration = calibrate(gru, [inputs])
    plan = homogeneous_plan(gru, 8)
    integer = convert(gru, plan, calibration, linear)
    codes = integer.quantize(inputs)
    with IntegersOnly() as audit:
        scores = integer.classify(codes, LENGTHS)
    assert scores.dtype == torch.int32 and audit.operations > 100
    with pytest.raises(AssertionError), IntegersOnly():
        integer.dequantize(codes)


@pytest.mark.parametrize("layers, both", [(1, False), (2, True)])
def test_eight_bits_are_close(layers, both):
    gru, inputs = made_gru(num_layers=layers, bidirectional=both, scale=1.5)
    calibration = calibrate(gru, [inputs])
    integer = convert(gru, homogeneous_plan(gru, 8), calibration)
    outputs, states = integer(integer.quantize(inputs))
    gru.batch_first = True
    wanted, wanted_states = gru(inputs)
    error = (integer.dequantize(outputs) - wanted).square().mean().sqrt()
    assert error < 0.02
    assert states.shape == wanted_states.shape


def test_more_bits_are_closer():
    gru, inputs = made_gru(scale=1.5)
    calibration = calibrate(gru, [inputs])
    gru.batch_first = True
    wanted, errors = gru(inputs)[0], []
    for bits in (2, 4, 6, 8):
        integer = convert(gru, homogeneous_plan(gru, bits), calibration)
        outputs = integer.dequantize(integer(integer.quantize(inputs))[0])
        errors.append((outputs - wanted).square().mean().item())
    assert errors == sorted(errors, reverse=True)


def test_speechbrain_gru_and_its_lengths():
    from speechbrain.nnet.RNN import GRU

    torch.manual_seed(0)
    gru = GRU(hidden_size=5, input_shape=(None, None, 4)).eval()
    inputs, lengths = torch.randn(3, 5, 4), torch.tensor([5, 2, 4])
    calibration = calibrate(gru, [(inputs, lengths)])
    integer = convert(gru, homogeneous_plan(gru, 8), calibration)
    outputs, states = integer(integer.quantize(inputs), lengths=lengths)
    _, wanted = gru(inputs, lengths=lengths / 5)
    assert torch.allclose(integer.dequantize(states), wanted, atol=0.05)
    assert (outputs[1, 1:] == outputs[1, 1]).all()  # behind its end


def test_stream_is_the_whole():
    gru, inputs = made_gru(num_layers=2)
    integer = convert(gru, homogeneous_plan(gru, 5), calibrate(gru, [inputs]))
    codes = integer.quantize(inputs)
    whole, ends = integer(codes)
    states, pieces = None, []
    for step in codes.split(2, dim=1):
        piece, states = integer(step, states)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(states, ends)


def test_calibration_sees_every_column():
    torch.manual_seed(0)
    inputs = torch.zeros(64, 16, 32)
    inputs[..., 5] = torch.randn(64, 16)  # all others are zero
    calibration = calibrate(torch.nn.GRU(32, 64), [inputs])
    assert calibration.affine("l0.input", 8).scale > 0.01


def test_changed_weights_are_converted_anew():
    gru, inputs = made_gru()
    calibration = calibrate(gru, [inputs])
    plan = homogeneous_plan(gru, 4)
    before = convert(gru, plan, calibration)
    with torch.no_grad():
        gru.weight_hh_l0.neg_()
    after = convert(gru, plan, calibration)
    assert torch.equal(
        before.cells["l0"].weight_hh, -after.cells["l0"].weight_hh
    )


def test_silence_and_constant_features():
    gru, inputs = made_gru()
    for features in (torch.zeros(3, 5, 4), torch.full((3, 5, 4), 7.0)):
        calibration = calibrate(gru, [features])
        integer = convert(gru, homogeneous_plan(gru, 3), calibration)
        for seen in (features, 100 * inputs):
            outputs, _ = integer(integer.quantize(seen))
            assert outputs.abs().max() <= 4


def test_fake_quantization_is_what_the_integers_do():
    gru, inputs = made_gru(scale=1.5)
    calibration = calibrate(gru, [inputs])
    plan = homogeneous_plan(gru, 6)
    integer = convert(gru, plan, calibration)
    fake = FakeQuantizedGRU(gru, plan, calibration)
    rounded, _ = fake(inputs)
    outputs, _ = integer(integer.quantize(inputs))
    step = integer.output.scale
    difference = (integer.dequantize(outputs) - rounded).abs() / step
    assert difference.mean() < 0.2  # of a code: the rest are ties
    rounded.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in gru.parameters())


def test_training_mends_what_rounding_broke():
    torch.manual_seed(0)
    inputs = torch.randn(256, 6, 3)
    classes = inputs.sum(1).argmax(-1)
    gru, linear = torch.nn.GRU(3, 16, batch_first=True), torch.nn.Linear(16, 3)

    def train(network, steps, lr):
        parameters = [*network.parameters(), *linear.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            scores = linear(network(inputs)[1][-1])
            torch.nn.functional.cross_entropy(scores, classes).backward()
            optimizer.step()

    def errors(**options):
        integer = convert(gru, plan, calibration, linear, **options)
        scores = integer.classify(integer.quantize(inputs))
        return (scores.argmax(-1) != classes).sum().item()

    train(gru, 80, 0.02)
    calibration = calibrate(gru, [inputs])
    plan = homogeneous_plan(gru, 3) | {f"l0.{name}": 2 for name in LINEAR}
    before = errors()
    fake = FakeQuantizedGRU(gru, plan, calibration)
    train(fake, 60, 0.01)
    assert errors(row_scales=fake.row_scales()) < 0.8 * before


@pytest.fixture
def saved(tmp_path):
    """An integer GRU, what it gives, and its file."""
    gru, inputs = made_gru(num_layers=2, bidirectional=True)
    plan = random_plan(gru, torch.Generator().manual_seed(2))
    calibration = calibrate(gru, [inputs])
    linear = torch.nn.Linear(10, 3)
    integer = convert(gru, plan, calibration, linear, ["a", "b", "c"])
    path = tmp_path / "gru.safetensors"
    save_integer_gru(path, integer)
    return integer, integer.quantize(inputs), path


def test_file_gives_the_same(saved):
    integer, codes, path = saved
    loaded = load_integer_gru(path)
    assert torch.equal(loaded.classify(codes), integer.classify(codes))
    for mine, other in zip(loaded(codes), integer(codes)):
        assert torch.equal(mine, other)
    assert loaded.description == integer.description
    stored = load_file(path)
    size = sum(t.numel() * t.element_size() for t in stored.values())
    assert loaded.packed_bytes == size
    assert {name: t.dtype for name, t in stored.items()} == TENSORS


def forge(path, change=None, **tensors):
    """The same file with another description or other tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()[FORMAT])
    if change:
        change(description)
    text = json.dumps(description)
    save_file({**load_file(path), **tensors}, path, metadata={FORMAT: text})


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", 2**15),
        ("hidden_size", 2**40),
        ("hidden_size", True),
        ("input_size", -1),
        ("layers", 10**9),
        ("bidirectional", 1),
        ("classes", 4),
        ("classes", 2**16),
        ("result_bits", 64),
        ("input", [float("nan"), 0]),
        ("input", [0.1, 10**20]),
        ("output", [0.1, 0, 8.0]),
        ("plan", {}),
        ("plan", []),
        ("labels", [1, 2, 3]),
        ("version", 2),
    ],
)
def test_forged_descriptions(saved, key, value):
    _, _, path = saved
    forge(path, lambda description: description.update({key: value}))
    with pytest.raises(ValueError, match="is no integer GRU"):
        load_integer_gru(path)


def test_forged_plan_and_tensors(saved):
    _, _, path = saved
    original = path.read_bytes()
    tensors = load_file(path)

    def refused(match, **changes):
        forge(path, **changes)
        with pytest.raises(ValueError, match=match):
            load_integer_gru(path)
        path.write_bytes(original)

    def raise_bits(description):
        description["plan"]["l0.state"] = 300

    refused("300 bits", change=raise_bits)
    refused("overflow", shifts=torch.full_like(tensors["shifts"], 60))
    refused("overflow", biases=torch.full_like(tensors["biases"], 2**31 - 1))
    refused("overflow", multipliers=-tensors["multipliers"] - 1)
    refused("overflow", constants=torch.full_like(tensors["constants"], 2**30))
    refused("type", tables=tensors["tables"].to(torch.int8))
    refused("other tensors", more=torch.zeros(3))
    path.write_bytes(original[: len(original) // 2])
    with pytest.raises(ValueError, match="is no integer GRU"):
        load_integer_gru(path)


def test_clear_errors():
    gru, inputs = made_gru()
    calibration = calibrate(gru, [inputs])
    plan = homogeneous_plan(gru, 8)
    integer = convert(gru, plan, calibration)
    with pytest.raises(ValueError, match="from quantize"):
        integer(inputs)
    with pytest.raises(ValueError, match="not finite"):
        integer.quantize(inputs / 0)
    with pytest.raises(ValueError, match="not finite"):
        calibrate(gru, [inputs / 0])
    with pytest.raises(ValueError, match="no batch"):
        calibrate(gru, [])
    with pytest.raises(ValueError, match="lengths must be 3 integers"):
        integer(integer.quantize(inputs), lengths=torch.tensor([0.5, 1, 1]))
    with pytest.raises(ValueError, match="no classifier"):
        integer.classify(integer.quantize(inputs))
    with pytest.raises(ValueError, match="8.0 bits"):
        convert(gru, dict.fromkeys(plan, 8.0), calibration)
    with pytest.raises(ValueError, match="not a plan of this GRU"):
        other = homogeneous_plan(torch.nn.GRU(4, 5, num_layers=2), 8)
        convert(gru, other, calibration)
    with pytest.raises(ValueError, match="has not seen"):
        convert(torch.nn.GRU(4, 5, 2), other, calibration)
    with pytest.raises(FileNotFoundError):
        load_integer_gru("nowhere.safetensors")
