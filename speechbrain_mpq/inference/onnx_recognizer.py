"""A hybrid recognizer's network as an ONNX model that runs stored integers.

TDNN-F is made of convolutions over one or two frames. ONNX Runtime computes
convolutions in float32, so that the frames are put beside each other here and
each layer is a matrix: `engines.integer_onnx` multiplies those of 8 bits or
fewer in integers. One utterance at a time, of any length.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..quantization.packing import read_model
from ..utils import write_chunks
from .engines.engine import import_engine
from .engines.integer_onnx import StoredWeight, integer_model, stored_weights
from .engines.lowered import decibels

TRIED = (100, 61, 170)  # frames of noise; the first is exported with
MIN_DECIBELS = 10.0  # of the outputs; sound integers give over 15
NAMES = ["features"], ["log_probs"]
AXES = {"features": {1: "frames"}, "log_probs": {1: "outputs"}}


def _beside(weight):
    """A convolution's weight as a matrix, [rows, taps x inputs]."""
    order = (0, 2, 1)
    if isinstance(weight, np.ndarray):
        return weight.transpose(order).reshape(len(weight), -1)
    return weight.permute(order).reshape(len(weight), -1)


class _Frames(torch.nn.Module):
    """What a convolution computes, with frames beside each other."""

    def __init__(self, conv):
        super().__init__()
        matrix = _beside(conv.weight.detach())
        rows, columns = matrix.shape
        self.taps, self.gap = conv.kernel_size[0], conv.dilation[0]
        self.linear = torch.nn.Linear(columns, rows, conv.bias is not None)
        self.linear.weight.data.copy_(matrix)
        if conv.bias is not None:
            self.linear.bias.data.copy_(conv.bias.detach())

    def forward(self, x):
        """[1, frames, inputs] to [1, frames - gap, rows]."""
        if self.taps == 2:
            x = torch.cat([x[:, : -self.gap], x[:, self.gap :]], 2)
        return self.linear(x)


class _Norm(torch.nn.Module):
    """A batch norm without scale and shift, in eval mode."""

    def __init__(self, norm):
        super().__init__()
        gain = (norm.running_var + norm.eps).rsqrt()
        self.register_buffer("gain", gain)
        self.register_buffer("shift", -norm.running_mean * gain)

    def forward(self, x):
        """[1, frames, size]."""
        return x * self.gain + self.shift


class MatrixTDNNF(torch.nn.Module):
    """A TDNN-F for one utterance, whose layers are matrices.

    Arguments
    ---------
    model : TDNNF
        In eval mode, without a speaker vector.

    Example
    -------
    >>> from speechbrain_mpq.lobes.models.tdnnf import TDNNF
    >>> model = TDNNF(5, 6, 8, [4, 4], [1, 3], prefinal=4).eval()
    >>> features = torch.randn(1, 20, 5)
    >>> with torch.no_grad():
    ...     same = model(features).log_softmax(2)
    ...     (MatrixTDNNF(model)(features) - same).abs().max() < 1e-5
    tensor(True)
    """

    def __init__(self, model):
        super().__init__()
        if model.settings["speaker_size"]:
            raise ValueError("a network that wants a vector of the speaker")
        self.splice, self.context = model.splice, model.context
        self.subsampling, self.slow = model.subsampling, model.slow
        self.decorrelate = model.decorrelate and _Frames(model.decorrelate)
        self.first, self.first_norm = (
            _Frames(model.first),
            _Norm(model.first_norm),
        )
        self.layers = torch.nn.ModuleList(map(_layer, model.layers))
        self.bypass = model.settings["bypass"]
        self.strides = [layer.stride for layer in model.layers]
        chain = model.chain
        self.last = torch.nn.Sequential(
            *(_Frames(model.prefinal), _Frames(chain.affine)),
            *(torch.nn.ReLU(), _Norm(chain.norm), _Frames(chain.linear)),
            *(_Norm(chain.small_norm), _Frames(chain.output)),
        )

    def forward(self, features):
        """Features [1, frames, inputs] to log-probabilities."""
        wanted = (features.shape[1] + self.subsampling - 1) // self.subsampling
        # The first and the last frame go on
        beyond = self.context + self.subsampling - 1
        x = F.pad(
            features.transpose(1, 2), (self.context, beyond), mode="replicate"
        ).transpose(1, 2)
        width = 2 * self.splice + 1
        inner = x.shape[1] - width + 1
        x = torch.cat([x[:, i : i + inner] for i in range(width)], 2)
        if self.decorrelate is not None:
            x = self.decorrelate(x)
        x = self.first_norm(self.first(x).relu())
        for i, (layer, stride) in enumerate(zip(self.layers, self.strides)):
            if i == self.slow:
                x = x[:, :: self.subsampling]
            y = layer(x)
            x = y + self.bypass * x[:, stride : x.shape[1] - stride]
        if self.slow == len(self.layers):
            x = x[:, :: self.subsampling]
        return self.last(x)[:, :wanted].log_softmax(2)


def _layer(layer):
    """A TDNN-F layer but for its bypass."""
    return torch.nn.Sequential(
        _Frames(layer.linear),
        _Frames(layer.affine),
        torch.nn.ReLU(),
        _Norm(layer.norm),
    )


def _matrices(folder):
    """The stored integers of a packed folder, as those matrices."""
    weights = stored_weights(read_model(folder)).values()
    return [
        StoredWeight(_beside(weight.levels), weight.scale)
        for weight in weights
        if weight.levels.ndim == 3
    ]


def recognizer_model(model, folder=None):
    """A recognizer's network as an ONNX model, compared with PyTorch.

    Arguments
    ---------
    model : TDNNF
        In eval mode.
    folder : str or Path or None
        Packed folder that it was loaded from; None: all weights stay floats.

    Returns
    -------
    onnx.ModelProto
        "features" [1, frames, inputs] in, "log_probs" [1, outputs' frames,
        outputs] out.
    report : dict
        "decibels" of the outputs against PyTorch on noise, and "weights": how
        many are "integer" products and "dequantized".
    """
    engine = import_engine("onnx")
    module = MatrixTDNNF(model).eval()
    generator = torch.Generator().manual_seed(0)
    size = model.settings["input_size"]
    noise = [
        torch.randn(1, frames, size, generator=generator) for frames in TRIED
    ]
    stored = _matrices(folder) if folder else ()
    made, used = integer_model(module, (noise[0],), stored, NAMES, AXES)
    session = engine.session(made)
    qualities = []
    for features in noise:
        with torch.inference_mode():
            exact = model(features).log_softmax(2)
        (given,) = session.run(None, {"features": features.numpy()})
        same = exact.shape == given.shape
        quality = decibels(exact, torch.from_numpy(given)) if same else math.nan
        qualities.append(float(quality))
    worst = min(qualities)
    if not all(quality > MIN_DECIBELS for quality in qualities):  # NaN, too
        raise ValueError(
            f"the ONNX model is {worst:.1f} dB from PyTorch on noise: use "
            'engine="torch"'
        )
    return made, {"decibels": worst, "weights": dict(used)}


def export_recognizer(model, path, folder=None):
    """Write a recognizer's network as an ONNX file.

    Arguments
    ---------
    model : TDNNF
    path : str or Path
        File to write, `.onnx`.
    folder : str or Path or None
        As for `recognizer_model`.

    Returns
    -------
    dict
        That report, and "bytes".
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: the file's name must end in .onnx")
    made, report = recognizer_model(model, folder)
    content = made.SerializeToString()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_chunks(path, [content])
    return {"bytes": len(content), **report}


class RecognizerSession:
    """The network in ONNX Runtime, called as the TDNNF is.

    Arguments
    ---------
    model : TDNNF
    folder : str or Path or None
        As for `recognizer_model`.
    threads : int
    """

    def __init__(self, model, folder=None, threads=1):
        made, self.report = recognizer_model(model, folder)
        self.session = import_engine("onnx").session(made, threads)

    def __call__(self, feats, wav_lens):
        """Log-probabilities [batch, outputs' frames, outputs]."""
        lengths = (wav_lens * feats.shape[1]).round().long().clamp(min=1)
        rows = [
            torch.from_numpy(
                self.session.run(None, {"features": row[None, :n].numpy()})[0]
            )[0]
            for row, n in zip(feats.cpu(), lengths.tolist())
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
