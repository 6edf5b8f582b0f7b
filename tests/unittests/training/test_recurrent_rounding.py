"""Recurrent layers, against every step written out."""

import copy

import pytest
import torch
import torch.nn as nn
from speechbrain.nnet.RNN import GRU, LiGRU
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from speechbrain_mpq.quantization.codebook import fit_scale
from speechbrain_mpq.quantization.gptq import (
    calibrated_levels,
    calibrated_scale,
    damped_moment,
    regressed_weight,
)
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.quantization.tensors import named_tensors
from speechbrain_mpq.training.rounding import round_calibrated_

FEATURES, HIDDEN, ITEMS, STEPS = 5, 6, 8, 12
DAMPING = 0.1
WIDE = 12  # where rounding errors are many enough to speak of their mean


def step(kind, own, x, h, c):
    """One step as PyTorch documents it: h, c and h before a projection."""
    given = own["weight_ih"] @ x + own.get("bias_ih", 0)
    back = own["weight_hh"] @ h + own.get("bias_hh", 0)
    if kind == "LSTM":
        i, f, g, o = (given + back).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        raw = o.sigmoid() * c.tanh()
        return own.get("weight_hr", torch.eye(len(raw))) @ raw, c, raw
    if kind == "GRU":
        (r, z, n), (back_r, back_z, back_n) = given.chunk(3), back.chunk(3)
        r, z = (r + back_r).sigmoid(), (z + back_z).sigmoid()
        new = (1 - z) * (n + r * back_n).tanh() + z * h
        return new, c, new
    new = (given + back).relu() if kind == "relu" else (given + back).tanh()
    return new, c, new


def unrolled(kind, own, items, first, reverse):
    """Outputs, what came before each, and what a projection was given."""
    found = {"output": [], "before": [], "raw": []}
    for number, item in enumerate(items):
        h, c = (state[number] for state in first)
        rows = {key: [None] * len(item) for key in found}
        order = range(len(item))
        for t in reversed(order) if reverse else order:
            rows["before"][t] = h
            h, c, rows["raw"][t] = step(kind, own, item[t], h, c)
            rows["output"][t] = h
        for key, values in rows.items():
            found[key].append(torch.stack(values))
    return found


def rounded(weight, bias, given, wanted, bits):
    """A matrix fitted to outputs in one go, and the bias that it leaves."""
    x, y = torch.cat(given).T.double(), torch.cat(wanted).T.double()
    y = weight.double() @ y
    shift = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    if bias is None:
        shift = 0 * shift[0], 0 * shift[1]
    moment = (x - shift[0]) @ (x - shift[0]).T
    cross = (y - shift[1]) @ (x - shift[0]).T
    values = regressed_weight(weight, cross, moment, DAMPING)
    moment = damped_moment(moment, DAMPING)
    alpha = fit_scale(values.float(), bits)
    alpha = calibrated_scale(values, moment, bits, alpha).float()
    new = calibrated_levels(values, moment, bits, alpha) * alpha
    if bias is None:
        return new.float(), None
    return new.float(), (bias + (shift[1] - new @ shift[0])[:, 0]).float()


def by_hand(plain, kind, items, states, bits):
    """All matrices of a layer rounded in their order: name -> value."""
    new, now, before = {}, items, items
    directions = 2 if plain.bidirectional else 1
    for level in range(plain.num_layers):
        outputs = []
        for direction in range(directions):
            end = f"_l{level}" + "_reverse" * direction
            own = {
                n.removesuffix(end): p.detach() for n, p in named(plain, end)
            }
            first = [s[level * directions + direction] for s in states]

            def run(values, items, first=first, direction=direction):
                return unrolled(kind, values, items, first, direction)

            def fit(key, given, wanted, own=own):
                bias = key.replace("weight", "bias")
                old = own.get(bias)
                value, bias_value = rounded(own[key], old, given, wanted, bits)
                changed = {key: value}
                return changed | ({} if old is None else {bias: bias_value})

            changed = own | fit("weight_ih", now, before)
            wanted, given = run(own, before), run(changed, now)
            changed |= fit("weight_hh", given["before"], wanted["before"])
            if "weight_hr" in own:
                given = run(changed, now)
                changed |= fit("weight_hr", given["raw"], wanted["raw"])
            outputs.append((run(changed, now)["output"], wanted["output"]))
            new |= {key + end: value for key, value in changed.items()}
        now, before = (
            [torch.cat(parts, -1) for parts in zip(*side)]
            for side in zip(*outputs)
        )
    return new


def named(layer, end):
    """Parameters whose names end so, with this end as a whole."""
    return [(n, p) for n, p in layer.named_parameters() if n.endswith(end)]


class Wrapped(nn.Module):
    """A layer that is given padded items [items, features, steps], or packs."""

    def __init__(self, layer, lengths=None, states=None):
        super().__init__()
        self.layer, self.lengths, self.states = layer, lengths, states

    def forward(self, x):
        """Outputs, [steps, items, size] or with the items first."""
        x = x if self.layer.batch_first else x.transpose(0, 1)
        first, states = self.layer.batch_first, self.states
        if isinstance(states, list):
            states = states[0] if len(states) == 1 else tuple(states)
        if self.lengths is None:
            return self.layer(x, states)[0]
        options = {"batch_first": first, "enforce_sorted": False}
        packed = pack_padded_sequence(x, self.lengths, **options)
        return pad_packed_sequence(self.layer(packed, states)[0])[0]


def given(seed=0, items=ITEMS, features=FEATURES):
    """Correlated features, [items, steps, features]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator)
    return torch.randn(items, STEPS, features, generator=generator) @ mixing


TWO = {"num_layers": 2, "bidirectional": True}
LAYERS = {
    "lstm": ("LSTM", nn.LSTM, {}),
    "gru": ("GRU", nn.GRU, {"batch_first": True}),
    "tanh": ("tanh", nn.RNN, {}),
    "relu": ("relu", nn.RNN, {"nonlinearity": "relu"}),
    "two layers, both ways": ("LSTM", nn.LSTM, {**TWO, "batch_first": True}),
    "gru, both ways": ("GRU", nn.GRU, TWO),
    "projection": ("LSTM", nn.LSTM, {"proj_size": 4, "num_layers": 2}),
    "projections both ways": ("LSTM", nn.LSTM, {"proj_size": 4, **TWO}),
    "no bias": ("GRU", nn.GRU, {"bias": False}),
}
LENGTHS = torch.tensor([12, 3, 7, 1, 12, 5, 9, 2])


@pytest.mark.parametrize("way", ["padded", "packed", "first states"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_matrices_are_fitted_to_what_an_unrolled_loop_gives_them(name, way):
    kind, cls, options = LAYERS[name]
    torch.manual_seed(0)
    layer = cls(FEATURES, HIDDEN, dropout=0.0, **options).eval()
    directions = 2 if layer.bidirectional else 1
    levels, size = layer.num_layers * directions, layer.proj_size or HIDDEN
    sizes = (size, HIDDEN) if kind == "LSTM" else (size,)
    states = [torch.randn(levels, ITEMS, n) / 2 for n in sizes]
    lengths = torch.full((ITEMS,), STEPS) if way == "padded" else LENGTHS
    if way != "first states":
        states = [torch.zeros_like(state) for state in states]
    items = [item[:n] for item, n in zip(given(), lengths)]
    zeros = torch.zeros(levels, ITEMS, HIDDEN)
    expected = by_hand(layer, kind, items, [*states, zeros][:2], bits=4)

    model = Wrapped(
        layer,
        None if way == "padded" else lengths,
        states if way == "first states" else None,
    )
    quantize_(model, 4, exclude=["*bias*"] if layer.bias else ())
    assert round_calibrated_(model, "", given(), (DAMPING,), False) == ["layer"]
    found = {n: t.weight for n, t in named_tensors(model.layer).items()}
    assert set(found) == set(expected)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


WAYS = {
    "tensor": {},
    "channel": {"granularity": "channel"},
    "midrise": {"codebook": "midrise"},
    "entropy": {"codebook": "entropy"},
    "gates": {"gates": True},
    "gates, entropy": {"gates": True, "codebook": "entropy"},
    "float vectors": {"exclude": ["*bias*"]},
}


def squared_error(model, plain, inputs):
    """Relative error of the outputs."""
    difference = model(inputs) - plain(inputs)
    return (difference.square().mean() / plain(inputs).var()).item()


@torch.no_grad()
def lost(make, **options):
    """Mean errors behind nearest and calibrated rounding of some networks."""
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        plain, inputs = make().eval(), given(seed, items=16, features=WIDE)
        model = copy.deepcopy(plain)
        quantize_(model, 3, **options)
        nearest = squared_error(model, plain, inputs)
        assert round_calibrated_(model, "", inputs, progress=False)
        errors.append((nearest, squared_error(model, plain, inputs)))
    return [sum(column) / len(errors) for column in zip(*errors)]


@pytest.mark.parametrize(
    "name, way",
    [
        *(("lstm", way) for way in WAYS),
        *(("gru", way) for way in list(WAYS)[::3]),
        *(("projections both ways", way) for way in list(WAYS)[1::3]),
    ],
)
def test_outputs_come_closer(name, way):
    _, cls, options = LAYERS[name]
    nearest, calibrated = lost(
        lambda: Wrapped(cls(WIDE, WIDE, **options)), **WAYS[way]
    )
    assert calibrated < 0.8 * nearest


class Cells(nn.Module):
    """A loop over a cell of PyTorch."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        """Outputs, [steps, items, size]."""
        state, outputs = None, []
        for item in x.unbind(1):
            state = self.cell(item, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


OTHERS = {
    "lstm cell": lambda: Cells(nn.LSTMCell(WIDE, WIDE, 1)),  # of Tacotron2
    "gru cell": lambda: Cells(nn.GRUCell(WIDE, WIDE)),
    "rnn cell": lambda: Cells(nn.RNNCell(WIDE, WIDE)),
    "ligru": lambda: First(LiGRU(WIDE, (16, STEPS, WIDE))),
    "wrapper": lambda: First(GRU(WIDE, input_size=WIDE, num_layers=2)),
}


class First(nn.Module):
    """The outputs alone of SpeechBrain's recurrent layers."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        """Outputs, [items, steps, size]."""
        return self.layer(x)[0]


@pytest.mark.parametrize("name", OTHERS)
def test_cells_and_speechbrains_layers(name):
    nearest, calibrated = lost(OTHERS[name], exclude=["*bias*"])
    assert calibrated < 0.8 * nearest


class Doubled(nn.GRU):
    """Computes something else."""

    def forward(self, x, state=None):
        """Twice the outputs."""
        output, state = super().forward(x, state)
        return 2 * output, state


def test_what_inherits_keeps_nearest_rounding(caplog):
    torch.manual_seed(0)
    model = First(Doubled(FEATURES, HIDDEN))
    quantize_(model, 3)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level("INFO"):
        assert not round_calibrated_(model, "", given(), progress=False)
    assert "Nearest rounding stays (no matrix): layer" in caplog.text
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_one_sequence_says_nothing_about_another(caplog):
    model = First(nn.GRU(FEATURES, HIDDEN))
    quantize_(model, 3)
    with caplog.at_level("INFO"):
        inputs = given()[:2, 0]  # two steps of one sequence without a batch
        assert not round_calibrated_(model, "", inputs, progress=False)
    assert "a single item goes in: give more batches" in caplog.text
