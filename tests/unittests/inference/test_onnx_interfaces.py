"""SpeechBrain's interfaces as ONNX files, in stock ONNX Runtime."""

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.decoders import ctc_greedy_decode
from speechbrain.inference.ASR import EncoderASR
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models import ECAPA_TDNN
from speechbrain.nnet.activations import Softmax
from speechbrain.nnet.CNN import Conv1d
from speechbrain.nnet.containers import LengthsCapableSequential
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.normalization import BatchNorm1d
from speechbrain.nnet.RNN import LSTM
from speechbrain.processing.features import STFT, InputNormalization

from speechbrain_mpq.inference import onnx_interfaces
from speechbrain_mpq.quantization.packing import save_packed
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.quantization.unpacking import load_packed_

onnxruntime = pytest.importorskip("onnxruntime", reason="extra onnx is missing")
pytest.importorskip("onnx", reason="the extra onnx is not installed")
RATE = 16000


def recognizer_parts():
    """Layers of an `EncoderASR` with trained norms."""
    return nn.ModuleList(
        [
            Conv1d(8, 5, input_shape=(None, None, 20), stride=2),
            BatchNorm1d(input_size=8),
            LSTM(6, (None, None, 8), bidirectional=True),
            Linear(5, input_size=12),
        ]
    )


def recognizer(parts):
    """An `EncoderASR` of these layers."""
    encoder = LengthsCapableSequential(
        Fbank(n_mels=20), InputNormalization(norm_type="sentence")
    )
    for i, part in enumerate([*parts, Softmax(apply_log=True)]):
        encoder.append(part, layer_name=f"part_{i}")
    labels = CategoricalEncoder()
    labels.update_from_iterable("_ abc")
    return EncoderASR(
        modules={"encoder": encoder},
        hparams={
            "tokenizer": labels,
            "decoding_function": partial(ctc_greedy_decode, blank_id=0),
            "sample_rate": RATE,
            "blank_index": 0,
            "pretrainer": pretrainer(parts),
        },
    )


def classifier_parts():
    """Embedding and classifier of an `EncoderClassifier`."""
    ecapa = ECAPA_TDNN.ECAPA_TDNN(
        20,
        channels=[8, 8, 8, 8, 24],
        attention_channels=8,
        res2net_scale=2,
        se_channels=8,
        lin_neurons=12,
    )
    return nn.ModuleDict(
        {
            "embedding": ecapa,
            "classifier": ECAPA_TDNN.Classifier(12, out_neurons=7),
        }
    )


def classifier(parts):
    """An `EncoderClassifier` of these layers."""
    return EncoderClassifier(
        modules={
            "compute_features": Fbank(n_mels=20),
            "mean_var_norm": InputNormalization(
                norm_type="sentence", std_norm=False
            ),
            "embedding_model": parts["embedding"],
            "classifier": parts["classifier"],
        },
        hparams={
            "label_encoder": CategoricalEncoder(),
            "sample_rate": RATE,
            "pretrainer": pretrainer(parts),
        },
    )


def pretrainer(parts):
    """What says that a folder's model.ckpt is packed."""
    return SimpleNamespace(
        loadables={"model": parts}, custom_hooks={"model": load_packed_}
    )


KINDS = {
    "asr": (recognizer_parts, recognizer),
    "classifier": (classifier_parts, classifier),
}


def packed(folder, kind, bits=4):
    """A quantized interface, as it is loaded from its folder."""
    make, build = KINDS[kind]
    torch.manual_seed(3)
    parts = make()
    for module in parts.modules():
        if isinstance(module, nn.BatchNorm1d):  # trained ones
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    parts.eval()
    quantize_(parts, bits)
    save_packed(parts, folder).rename(folder / "model.ckpt")
    return build(load_packed_(make(), folder / "model.ckpt").eval())


def run(path, wavs):
    """What stock ONNX Runtime makes of a file."""
    session = onnxruntime.InferenceSession(str(path))
    return session, session.run(None, {"wavs": wavs.numpy()})


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", list(KINDS))
def test_file_is_the_interface(kind, bits, tmp_path):
    interface = packed(tmp_path, kind, bits)
    path = tmp_path / "new" / "model.onnx"
    report = onnx_interfaces.export_interface(interface, path, tmp_path)
    assert report["bytes"] == path.stat().st_size
    assert report["decibels"] > 20
    assert report["weights"]["dequantized"] > 0
    if kind == "asr":  # the matrices of the LSTM and of the linear layer
        assert report["weights"]["integer"] == 3
    wavs = 0.1 * torch.randn(1, 23456)
    session, given = run(path, wavs)
    with torch.no_grad():
        exact = interface.encode_batch(wavs, torch.ones(1))
    assert np.abs(given[0] - exact.numpy()).max() < 0.2 * exact.std()
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["sample_rate"]) == RATE
    if kind == "asr":
        assert json.loads(metadata["labels"]) == ["_", " ", "a", "b", "c"]
        assert json.loads(metadata["blank_index"]) == 0


def test_without_a_packed_folder_it_is_exact(tmp_path):
    interface = packed(tmp_path, "asr")
    path = tmp_path / "float.onnx"
    report = onnx_interfaces.export_interface(interface, path)
    assert report["decibels"] > 80 and report["weights"] == {}


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_convolved_stft_is_the_stft(center, normalized):
    stft = STFT(
        RATE,
        win_length=20,
        n_fft=512,
        center=center,
        normalized_stft=normalized,
    )
    x = torch.randn(2, 4000)
    given = onnx_interfaces._convolved_stft(stft, x)
    assert torch.allclose(given, stft(x), atol=2e-4)


def test_refusals(tmp_path):
    interface = packed(tmp_path, "asr")
    export = onnx_interfaces.export_interface
    with pytest.raises(ValueError, match="must end in .onnx"):
        export(interface, tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no packed model"):
        export(interface, tmp_path / "a.onnx", tmp_path / "empty")
    separation = SepformerSeparation.__new__(SepformerSeparation)
    with pytest.raises(ValueError, match="only EncoderASR and EncoderClassif"):
        export(separation, tmp_path / "a.onnx")


def test_what_depends_on_the_length_is_refused(tmp_path):
    interface = packed(tmp_path, "asr")
    encode = interface.encode_batch

    def stuck(wavs, lengths):  # a Python number ends up as a constant
        return encode(wavs, lengths) * float(wavs.shape[1])

    interface.encode_batch = stuck
    with pytest.raises(ValueError, match="depends on the length"):
        onnx_interfaces.export_interface(interface, tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_outputs_that_are_no_numbers_are_refused(tmp_path):
    interface = packed(tmp_path, "asr")
    encode = interface.encode_batch

    def broken(wavs, lengths):  # of the longest waveform only
        longest = int(max(onnx_interfaces.TRIED) * RATE)
        return encode(wavs, lengths) * (
            math.nan if int(wavs.shape[1]) == longest else 1
        )

    interface.encode_batch = broken
    with pytest.raises(ValueError, match="dB from PyTorch"):
        onnx_interfaces.export_interface(interface, tmp_path / "a.onnx")
