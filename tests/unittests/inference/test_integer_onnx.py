"""Networks with their stored integers in stock ONNX Runtime."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from speechbrain.nnet.RNN import LSTM

from speechbrain_mpq.inference.engines import integer_onnx, onnx_engine
from speechbrain_mpq.quantization.packing import read_model, save_packed
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.quantization.unpacking import load_packed_

for module in ("onnx", "onnxruntime"):
    pytest.importorskip(module, reason="the extra onnx is not installed")


class Classifier(nn.Module):
    """Looks up, convolves, recurs, projects: all that is rewritten."""

    def __init__(self, bidirectional=False):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 5, 3, padding=1)
        self.rnn = LSTM(7, (4, 3, 5), num_layers=2, bidirectional=bidirectional)
        width = 14 if bidirectional else 7
        self.out = nn.Linear(width, 9)
        self.last = nn.Linear(9, 3, bias=False)

    def forward(self, tokens):
        """[batch, time] -> [batch, time, classes]."""
        x = self.embedding(tokens)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x, _ = self.rnn(x)
        return self.last(self.out(x).relu())


def exported(folder, bits=4, bidirectional=False, **options):
    """A quantized model, its ONNX model and what was done with weights."""
    torch.manual_seed(1)
    model = Classifier(bidirectional).eval()
    quantize_(model, bits, **options)
    save_packed(model, folder)
    model = load_packed_(Classifier(bidirectional), folder).eval()
    tokens = torch.randint(0, 11, (2, 5))
    names = ["tokens"], ["scores"]
    axes = {name: {0: "batch", 1: "time"} for name in ("tokens", "scores")}
    packed = read_model(folder)
    onnx_model, used = integer_onnx.integer_model(
        model,
        (tokens,),
        integer_onnx.stored_weights(packed).values(),
        names,
        axes,
    )
    return model, packed, onnx_model, used


def integers(onnx_model):
    """The integer initializers of a model."""
    from onnx import numpy_helper

    arrays = {
        item.name: numpy_helper.to_array(item)
        for item in onnx_model.graph.initializer
    }
    return {
        name: array
        for name, array in arrays.items()
        if name.endswith((".levels", ".stored", ".rows"))
    }


def counted(arrays):
    """How often each integer occurs in some arrays."""
    values = np.concatenate([array.reshape(-1) for array in arrays])
    return np.bincount(values.astype(int) + 128, minlength=256)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_is_near_pytorch_for_other_shapes(bits, bidirectional, tmp_path):
    model, _, onnx_model, used = exported(tmp_path, bits, bidirectional)
    assert used == {"looked up": 1, "integer": 2 * 2 + 2, "dequantized": 3}
    session = onnx_engine.session(onnx_model)
    tokens = torch.randint(0, 11, (3, 8))
    with torch.no_grad():
        exact = model(tokens)
    (given,) = session.run(None, {"tokens": tokens.numpy()})
    error = (torch.from_numpy(given) - exact).square().mean().sqrt()
    assert error < 0.05 * exact.std()


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "channel"}, {"gates": True}, {"codebook": "midrise"}],
)
def test_holds_the_stored_integers(options, tmp_path):
    """Every integer of the file is in the model, as often."""
    _, packed, onnx_model, _ = exported(tmp_path, **options)
    stored = integer_onnx.stored_weights(packed)
    matrices = [w.levels for w in stored.values() if w.levels.ndim > 1]
    held = [
        levels for levels in integers(onnx_model).values() if levels.ndim > 1
    ]
    assert len(matrices) == 8
    assert np.array_equal(counted(matrices), counted(held))


def test_wide_weights_are_computed_in_float(tmp_path):
    model, _, onnx_model, used = exported(tmp_path, 12)
    assert set(used) == {"dequantized", "looked up"}
    tokens = torch.randint(0, 11, (3, 8))
    with torch.no_grad():
        exact = model(tokens)
    session = onnx_engine.session(onnx_model)
    (given,) = session.run(None, {"tokens": tokens.numpy()})
    assert np.abs(given - exact.numpy()).max() < 1e-5


def test_float_weights_stay(tmp_path):
    model, _, onnx_model, used = exported(tmp_path, exclude=["rnn.*", "last.*"])
    assert used["integer"] == 1
    session = onnx_engine.session(onnx_model)
    tokens = torch.randint(0, 11, (1, 4))
    (given,) = session.run(None, {"tokens": tokens.numpy()})
    with torch.no_grad():
        exact = model(tokens).numpy()
    assert np.abs(given - exact).max() < 0.1 * exact.std()
