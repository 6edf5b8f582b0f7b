"""Every parameter of SpeechBrain's modules is quantized, or listed with why."""

import pytest
import torch
from speechbrain.lobes.models.conv_tasnet import MaskNet
from speechbrain.lobes.models.CRDNN import CRDNN
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from speechbrain.nnet.attention import MultiheadAttention, RelPosMHAXL
from speechbrain.nnet.CNN import Conv1d, DepthwiseSeparableConv1d
from speechbrain.nnet.embedding import Embedding
from speechbrain.nnet.RNN import GRU, LSTM, LiGRU

from speechbrain_mpq import Quantizer


def audio():
    """Features [batch, frames, channels]."""
    return torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))


class TiedLM(torch.nn.Module):
    """Embedding and output share one matrix."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 16)
        self.output = torch.nn.Linear(16, 10)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        return self.output(self.embedding(tokens))


def transformer(kind, attention):
    """A small encoder and decoder."""
    return TransformerASR(
        tgt_vocab=7,
        input_size=16,
        d_model=16,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        d_ffn=32,
        dropout=0.0,
        encoder_module=kind,
        attention_type=attention,
        kernel_size=5,
        normalize_before=True,
    )


def transcribe(model):
    """Encoder and decoder outputs."""
    tokens = torch.tensor([[1, 2, 3], [2, 3, 4]])
    return model(audio(), tokens, torch.ones(2))


def crdnn():
    """Convolutions, LSTM, linear layers."""
    return CRDNN(
        input_size=16,
        cnn_blocks=1,
        cnn_channels=[4],
        rnn_layers=2,
        rnn_neurons=8,
        rnn_bidirectional=True,
        dnn_blocks=1,
        dnn_neurons=8,
    )


def ecapa():
    """A small speaker model."""
    return ECAPA_TDNN(
        16,
        lin_neurons=8,
        channels=[8] * 5,
        attention_channels=4,
        res2net_scale=2,
        se_channels=4,
    )


def attend(model):
    """Attention of some audio to itself."""
    return model(audio(), audio(), audio())[0]


def attend_relative(model):
    """The same with relative positions."""
    positions = torch.randn(1, 79, 16)
    return model(audio(), audio(), audio(), positions)[0]


MODELS = {
    "LSTM": (
        lambda: LSTM(8, input_size=16, num_layers=2),
        lambda m: m(audio())[0],
    ),
    "GRU": (
        lambda: GRU(8, input_size=16, bidirectional=True),
        lambda m: m(audio())[0],
    ),
    "LiGRU": (
        lambda: LiGRU(8, (2, 40, 16), num_layers=2),
        lambda m: m(audio())[0],
    ),
    "CRDNN": (crdnn, lambda m: m(audio())),
    "convolution": (lambda: Conv1d(8, 3, in_channels=16), lambda m: m(audio())),
    "depthwise": (
        lambda: DepthwiseSeparableConv1d(8, 3, (2, 40, 16)),
        lambda m: m(audio()),
    ),
    "attention": (lambda: MultiheadAttention(2, 16), attend),
    "relative": (lambda: RelPosMHAXL(16, 2), attend_relative),
    "Transformer": (
        lambda: transformer("transformer", "regularMHA"),
        lambda m: sum(part.sum() for part in transcribe(m)),
    ),
    "Conformer": (
        lambda: transformer("conformer", "RelPosMHAXL"),
        lambda m: sum(part.sum() for part in transcribe(m)),
    ),
    "TransformerLM": (
        lambda: TransformerLM(7, 16, 2, 1, 0, 32, 0.0),
        lambda m: m(torch.tensor([[1, 2, 3]])),
    ),
    "embedding": (
        lambda: Embedding(10, embedding_dim=4),
        lambda m: m(torch.tensor([[1, 2]])),
    ),
    "tied": (TiedLM, lambda m: m(torch.tensor([[1, 2]]))),
    "MaskNet": (
        lambda: MaskNet(16, 8, 8, 3, 2, 1, 2, "gLN", False, "relu"),
        lambda m: m(audio().mT),
    ),
    "ECAPA": (ecapa, lambda m: m(audio())),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_counted_once_and_trained(name):
    torch.manual_seed(0)
    build, run = MODELS[name]
    model = build()
    parameters = dict(model.named_parameters())
    count = sum(parameter.numel() for parameter in model.parameters())
    quantizer = Quantizer({"net": model}, bits=4)

    plan = quantizer.plan
    quantized = sum(c.parameters for c in plan.clusters.values())
    assert quantized + plan.rest_parameters == count
    rows = {row["tensor"]: row for row in quantizer.coverage()}
    weights = [rows[f"net.{parameter}"] for parameter in parameters]
    assert sum(row["parameters"] for row in weights) == count
    assert all(row["asked_bits"] == 4 or row["reason"] for row in rows.values())
    assert sum(r["bytes"] for r in weights) <= plan.bytes + len(weights)
    assert plan.rest_parameters == 0

    run(model).square().sum().backward()
    trained = {
        id(parameter)
        for parameter in model.parameters()
        if parameter.grad is not None
    }
    assert trained
    for path, parameter in model.named_parameters():
        if "log_stretch" not in path:
            assert id(parameter) in trained, path


@pytest.mark.parametrize("name", ["LSTM", "Conformer", "tied"])
def test_what_is_left_out_is_listed_with_the_reason(name):
    build, _ = MODELS[name]
    model = build()
    count = sum(parameter.numel() for parameter in model.parameters())
    exclude = ["*bias*"]
    quantizer = Quantizer({"net": model}, bits=4, exclude=exclude)
    left = [r for r in quantizer.coverage() if r["asked_bits"] is None]
    trained = [row for row in left if "buffer" not in row["reason"]]
    assert trained
    assert all("bias" in row["tensor"] for row in trained)
    assert all(row["reason"] == "not selected" for row in trained)
    floats = sum(row["parameters"] for row in trained)
    assert floats == quantizer.plan.rest_parameters
    quantized = sum(c.parameters for c in quantizer.plan.clusters.values())
    assert floats + quantized == count
