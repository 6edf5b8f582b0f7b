"""SpeechBrain's interfaces as ONNX files: waveform in, scores out.

What a packed folder of an `EncoderASR` or `EncoderClassifier` computes, from
the samples to the scores, as one model for stock ONNX Runtime, with the stored
integers (see `engines.integer_onnx`). Labels and sample rate are in the file's
metadata. One waveform at a time, of any length.

SpeechBrain's STFT is complex, which PyTorch's exporter does not know: while it
runs, a convolution with cosines and sines stands in for it.
"""

import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from speechbrain.processing.features import STFT

from ..quantization.packing import read_model
from ..utils import write_chunks
from .engines.engine import import_engine
from .engines.integer_onnx import integer_model, stored_weights
from .engines.lowered import decibels

TRIED = (1.0, 0.6, 1.7)  # seconds of noise; the first is exported with
MIN_DECIBELS = 15.0  # of what comes out; sound integers give over 25


class _Recognizer(torch.nn.Module):
    """Log-probabilities of an `EncoderASR`'s tokens."""

    outputs = ("log_probs",)

    def __init__(self, interface):
        super().__init__()
        self.modules_used = interface.mods
        self.encode = interface.encode_batch

    def forward(self, wavs):
        """[1, samples] -> [1, frames, tokens]."""
        return self.encode(wavs, torch.ones(1))


class _Classifier(torch.nn.Module):
    """Embeddings and scores of an `EncoderClassifier`."""

    def __init__(self, interface):
        super().__init__()
        self.modules_used = interface.mods
        self.encode = interface.encode_batch
        self.classifier = getattr(interface.mods, "classifier", None)
        self.outputs = ("embedding", "scores")[: 1 + bool(self.classifier)]

    def forward(self, wavs):
        """[1, samples] -> [1, 1, size] and [1, classes]."""
        embedding = self.encode(wavs, torch.ones(1))
        if self.classifier is None:
            return embedding
        return embedding, self.classifier(embedding).squeeze(1)


KINDS = {"EncoderASR": _Recognizer, "EncoderClassifier": _Classifier}


def export_interface(interface, path, folder=None):
    """Write an interface as an ONNX file.

    Arguments
    ---------
    interface : EncoderASR or EncoderClassifier
        Or of a class that inherits from one; loaded from `folder`.
    path : str or Path
        File to write, `.onnx`.
    folder : str or Path or None
        Packed folder, as `speechbrain-mpq quantize` writes it; None: all
        weights stay in floating point.

    Returns
    -------
    dict
        "bytes", "decibels" of what comes out against PyTorch, and "weights":
        how many are "integer" products, "looked up" and "dequantized".
    """
    engine = import_engine("onnx")
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: the file's name must end in .onnx")
    names = [base.__name__ for base in type(interface).__mro__]
    kind = next((KINDS[name] for name in names if name in KINDS), None)
    if kind is None:
        raise ValueError(
            f"{names[0]} cannot be exported, only {' and '.join(KINDS)}, "
            "which run once from the samples to the scores"
        )
    module = kind(interface).eval()
    rate = interface.hparams.sample_rate
    generator = torch.Generator().manual_seed(0)
    noise = [
        0.1 * torch.randn(1, int(seconds * rate), generator=generator)
        for seconds in TRIED
    ]
    axes = {"wavs": {1: "samples"}}
    if kind is _Recognizer:
        axes["log_probs"] = {1: "frames"}
    with mock.patch.object(STFT, "forward", _convolved_stft):
        model, used = integer_model(
            module,
            (noise[0],),
            _stored(interface, folder) if folder else (),
            (["wavs"], list(module.outputs)),
            axes,
        )
    compared = list(_compared(module, engine.session(model), noise))
    quality = min(compared)
    if not all(decibel > MIN_DECIBELS for decibel in compared):  # NaN, too
        raise ValueError(
            f"the ONNX model is {quality:.1f} dB from PyTorch on waveforms of "
            f"{min(TRIED)} to {max(TRIED)} s: this network does something that "
            "depends on the length and that PyTorch's exporter writes down as "
            "a constant; it cannot be exported"
        )
    for key, value in _metadata(interface).items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_chunks(path, [content])
    return {"bytes": len(content), "decibels": quality, "weights": dict(used)}


def _stored(interface, folder):
    """The integers of all loadables in a folder."""
    weights = []
    for name in interface.hparams.pretrainer.loadables:
        file = Path(folder) / f"{name}.ckpt"
        hooks = interface.hparams.pretrainer.custom_hooks
        if name in hooks and file.is_file():
            weights += stored_weights(read_model(file)).values()
    if not weights:
        raise ValueError(
            f"{folder} has no packed model: give a folder that "
            "`speechbrain-mpq quantize` wrote"
        )
    return weights


def _compared(module, running, waveforms):
    """Decibels of each output for each waveform."""
    for waveform in waveforms:
        with torch.inference_mode():
            exact = module(waveform)
        exact = exact if isinstance(exact, tuple) else (exact,)
        outputs = running.run(None, {"wavs": waveform.numpy()})
        for one, other in zip(exact, outputs):
            if one.shape != other.shape:
                yield -math.inf
            else:
                yield decibels(one, torch.from_numpy(other))


def _metadata(interface):
    """What whoever runs the file must know."""
    hparams = interface.hparams
    content = {"sample_rate": hparams.sample_rate}
    for name in ("tokenizer", "label_encoder"):
        table = getattr(getattr(hparams, name, None), "ind2lab", None)
        if table:
            content["labels"] = [str(table[i]) for i in range(len(table))]
    blank = getattr(hparams, "blank_index", None)
    if blank is not None:
        content["blank_index"] = blank
    return {key: json.dumps(value) for key, value in content.items()}


def _convolved_stft(self, x):
    """SpeechBrain's `STFT.forward` in real numbers, of one channel."""
    # Gives [batch, frames, bins, 2].
    place = np.arange(self.n_fft // 2 + 1)[:, None] * np.arange(self.n_fft)
    turn = 2 * np.pi / self.n_fft * (place % self.n_fft)
    left = (self.n_fft - self.win_length) // 2
    right = self.n_fft - self.win_length - left
    window = np.pad(self.window.double().cpu().numpy(), (left, right))
    basis = np.concatenate([np.cos(turn), -np.sin(turn)]) * window
    if self.normalized_stft:
        basis = basis / math.sqrt(self.n_fft)
    basis = torch.from_numpy(basis).float()[:, None]  # [2 bins, 1, n_fft]
    x = x[:, None]
    if self.center:
        half = self.n_fft // 2
        x = F.pad(x, (half, half), mode=self.pad_mode)
    spectrum = F.conv1d(x, basis, stride=self.hop_length)
    parts = torch.stack(spectrum.chunk(2, dim=1), dim=-1)
    return parts.transpose(1, 2)
