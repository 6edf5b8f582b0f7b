"""Every trained GRU converts; what cannot is refused before work."""

import copy

import pytest
import torch
from speechbrain.nnet.RNN import GRU, LSTM, LiGRU
from torch.utils.data import DataLoader, TensorDataset

from speechbrain_mpq.nnet.gru_conversion import (
    calibrate,
    convert,
    homogeneous_plan,
)
from speechbrain_mpq.nnet.integer_gru_file import (
    load_integer_gru,
    save_integer_gru,
)

LENGTHS = torch.tensor([9, 4, 1, 7])


def inputs_of(features):
    """Sequences with a scale of their own for each feature."""
    return torch.randn(4, 9, features) * torch.linspace(0.2, 2, features)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 1},
        {"hidden_size": 33, "input_size": 1},
        {"hidden_size": 130, "input_size": 40},
        {"num_layers": 3},
        {"num_layers": 2, "bidirectional": True},
        {"bidirectional": True, "bias": False, "batch_first": True},
        {"num_layers": 2, "dropout": 0.5},
        {"dtype": torch.float64},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_torch_gru(options, tmp_path):
    torch.manual_seed(0)
    options = {"input_size": 5, "hidden_size": 8} | options
    gru = torch.nn.GRU(**options)  # in training mode: dropout must not matter
    inputs = inputs_of(gru.input_size).to(gru.weight_ih_l0)
    calibration = calibrate(gru, [(inputs, LENGTHS)])
    integer = convert(gru, homogeneous_plan(gru, 8), calibration)
    save_integer_gru(tmp_path / "gru.safetensors", integer)
    loaded = load_integer_gru(tmp_path / "gru.safetensors")
    outputs, states = loaded(loaded.quantize(inputs), lengths=LENGTHS)
    gru.eval().batch_first = True
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        inputs, LENGTHS, batch_first=True, enforce_sorted=False
    )
    packed_outputs, wanted_states = gru(packed)
    wanted, _ = torch.nn.utils.rnn.pad_packed_sequence(
        packed_outputs, batch_first=True
    )
    for row, expected, length in zip(outputs, wanted, LENGTHS):
        given = loaded.dequantize(row[:length])
        assert (given - expected[:length]).abs().max() < 0.06
    assert states.shape == wanted_states.shape


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"bias": False, "dropout": 0.3, "re_init": False},
    ],
    ids=["one", "both", "unbiased"],
)
def test_every_speechbrain_gru(options):
    torch.manual_seed(0)
    gru = GRU(hidden_size=8, input_shape=(None, None, 5), **options).eval()
    inputs = inputs_of(5)
    batches = DataLoader(TensorDataset(inputs, LENGTHS, LENGTHS), 2)
    integer = convert(gru, homogeneous_plan(gru, 8), calibrate(gru, batches))
    outputs, _ = integer(integer.quantize(inputs), lengths=LENGTHS)
    wanted, _ = gru(inputs, lengths=LENGTHS / 9)
    for row, expected, length in zip(outputs, wanted, LENGTHS):
        given = integer.dequantize(row[:length])
        assert (given - expected[:length]).abs().max() < 0.06


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    gru, inputs = torch.nn.GRU(5, 8, batch_first=True), inputs_of(5)
    with torch.no_grad():
        wanted, _ = gru(inputs)
    half = copy.deepcopy(gru).to(dtype)
    linear = torch.nn.Linear(8, 2).to(dtype)
    calibration = calibrate(half, [inputs])
    integer = convert(half, homogeneous_plan(gru, 8), calibration, linear)
    outputs, _ = integer(integer.quantize(inputs.to(dtype)))
    assert (integer.dequantize(outputs) - wanted).abs().max() < 0.1


def test_pruned_and_reparametrized():
    """Weights that other parameters result in are what is converted."""
    torch.manual_seed(0)
    gru, inputs = torch.nn.GRU(5, 8, batch_first=True), inputs_of(5)
    torch.nn.utils.parametrizations.weight_norm(gru, "weight_hh_l0")
    with torch.no_grad():
        gru.parametrizations.weight_hh_l0.original0.mul_(2)
        wanted, _ = gru(inputs)
    calibration = calibrate(gru, [inputs])
    integer = convert(gru, homogeneous_plan(gru, 8), calibration)
    outputs, _ = integer(integer.quantize(inputs))
    assert (integer.dequantize(outputs) - wanted).abs().max() < 0.06


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.LSTM(5, 8),
        torch.nn.RNN(5, 8),
        torch.nn.GRUCell(5, 8),
        LSTM(8, (None, None, 5)),
        LiGRU(8, (None, None, 5)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_networks_are_refused(module):
    with pytest.raises(TypeError, match="give a torch.nn.GRU"):
        calibrate(module, [inputs_of(5)])
    with pytest.raises(TypeError, match="give a torch.nn.GRU"):
        homogeneous_plan(module, 8)


def test_refused_before_work():
    gru, inputs = torch.nn.GRU(5, 8), inputs_of(5)
    calibration, plan = calibrate(gru, [inputs]), homogeneous_plan(gru, 8)
    for wrong in (inputs[0], inputs[..., :4]):
        with pytest.raises(ValueError, match=r"\[batch, time, 5\]"):
            calibrate(gru, [wrong])
    with pytest.raises(ValueError, match="hidden_size 8, not 9"):
        convert(torch.nn.GRU(5, 9), plan, calibration)
    deep = torch.nn.GRU(5, 8, 2)
    with pytest.raises(ValueError, match="calibrate with this GRU"):
        convert(deep, homogeneous_plan(deep, 8), calibration)
    with pytest.raises(ValueError, match="give 2 to 8"):
        homogeneous = homogeneous_plan(gru, 9)
        convert(gru, homogeneous, calibration)
    for classifier, labels, match in (
        (torch.nn.Linear(9, 2), (), "9 features behind a GRU of 8"),
        (torch.nn.Linear(8, 2), ["yes"], "1 labels for 2 classes"),
        (None, ["yes"], "labels without a classifier"),
    ):
        with pytest.raises(ValueError, match=match):
            convert(gru, plan, calibration, classifier, labels)
    with pytest.raises(TypeError, match="not a torch.nn.Linear"):
        convert(gru, plan, calibration, torch.nn.Sequential())
    with pytest.raises(ValueError, match="more than 65536"):
        calibrate(torch.nn.GRU(2**16 + 1, 1), [inputs])
    with torch.no_grad():
        gru.weight_hh_l0[3, 2] = float("nan")
    with pytest.raises(ValueError, match="weight_hh_l0 holds NaN"):
        calibrate(gru, [inputs])
    with pytest.raises(ValueError, match="weight_hh_l0 holds NaN"):
        convert(gru, plan, calibration)
