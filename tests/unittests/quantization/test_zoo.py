"""What is packed is the model: pack, load, compare, for a zoo of layers.

Each layer is built in a line, twice with other weights; its outputs, its
`state_dict` and the state that its own hooks save must come back bit for bit.
"""

import pytest
import torch
from helpers import assert_packs
from speechbrain.lobes.models import conv_tasnet, dual_path
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
from speechbrain.lobes.models.CRDNN import CRDNN
from speechbrain.lobes.models.ECAPA_TDNN import SERes2NetBlock, TDNNBlock
from speechbrain.lobes.models.HifiGAN import HifiganGenerator
from speechbrain.lobes.models.MetricGAN import MetricDiscriminator
from speechbrain.lobes.models.RNNLM import RNNLM
from speechbrain.lobes.models.transformer.Branchformer import ConvolutionBranch
from speechbrain.lobes.models.transformer.Conformer import ConvolutionModule
from speechbrain.lobes.models.transformer.Transformer import (
    PositionalEncoding,
    TransformerEncoder,
)
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from speechbrain.lobes.models.Xvector import Xvector
from speechbrain.nnet import CNN, RNN, attention, normalization
from speechbrain.nnet.complex_networks.c_linear import CLinear
from speechbrain.nnet.embedding import Embedding
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.quantisers import RandomProjectionQuantizer
from speechbrain.nnet.quaternion_networks.q_linear import QLinear
from speechbrain.nnet.quaternion_networks.q_normalization import QBatchNorm
from speechbrain.processing.features import GlobalNorm, InputNormalization
from speechbrain.utils import checkpoints
from torch import nn
from torch.nn.utils import parametrizations, prune

SETTINGS = {
    "float": None,
    "1": {"plan_or_bits": 1},
    "1.6-channel": {"plan_or_bits": 1.6, "granularity": "channel"},
    "2-rows": {"plan_or_bits": 2, "rows": 3},
    "3-midrise": {"plan_or_bits": 3, "codebook": "midrise"},
    "4-entropy": {"plan_or_bits": 4, "codebook": "entropy"},
    "8": {"plan_or_bits": 8},
    "16-channel": {"plan_or_bits": 16, "granularity": "channel"},
}


class Scalars(nn.Module):
    """Parameters and buffers without a dimension, and of other types."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.short = nn.Parameter(torch.randn(3, 3).half())
        self.long_ = nn.Parameter(torch.randn(3, 3).double())
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.steps = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("count", torch.randint(9, ()))
        self.register_buffer("mask", torch.rand(4) > 0.5)
        self.register_buffer("brain", torch.randn(3).bfloat16())
        self.register_buffer("minus", torch.tensor([-0.0, torch.inf]))
        self.register_buffer("scratch", torch.randn(3), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x):
        """Use them all."""
        x = x * self.gain + self.short.float() @ self.long_.float()
        return x * self.count + self.brain.float() + self.steps


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.output = nn.Linear(5, 7)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        """Map tokens to scores."""
        return self.output(self.embedding(tokens))


class Shared(nn.Module):
    """One layer under two names, and one buffer in two modules."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.other = nn.ModuleList([self.one, nn.BatchNorm1d(4)])
        self.first, self.second = nn.Module(), nn.Module()
        table = torch.randn(64, 64)
        self.first.register_buffer("table", table)
        self.second.register_buffer("table", table.clone())

    def forward(self, x):
        """Go through it twice."""
        x = self.other[1](self.other[0](self.one(x)))
        return x * self.first.table.sum() + self.second.table.sum()


@checkpoints.register_checkpoint_hooks
class Statistics(nn.Module):
    """State outside of state_dict, saved by hooks of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.state = {
            "mean": torch.randn(3),
            "counts": [int(torch.randint(9, ())), (0.1, None), {}],
            2: {"name": "ü", "largest": float("inf"), "on": True},
        }

    def forward(self, x):
        """Normalize, then map."""
        return self.linear(x - self.state["mean"]) * self.state["counts"][0]

    @checkpoints.mark_as_saver
    def save(self, path):
        """Save the state."""
        torch.save(self.state, path)

    @checkpoints.mark_as_loader
    def load(self, path, end_of_epoch):
        """Load the state."""
        self.state = torch.load(path)


class Extra(nn.Module):
    """torch's own way to have another state."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.steps = int(torch.randint(1, 9, ()))

    def forward(self, x):
        """Scale by the state."""
        return x @ self.weight * self.steps

    def get_extra_state(self):
        """Tell the steps."""
        return {"steps": self.steps}

    def set_extra_state(self, state):
        """Take the steps."""
        self.steps = state["steps"]


class Rank(nn.Module):
    """A parametrization of two tensors, with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4, 1) + 0.5)

    def forward(self, left, right):
        """Multiply."""
        return self.scale * (left @ right)

    def right_inverse(self, weight):
        """Two factors of a weight of rank 2."""
        return weight[:, :2].clone(), torch.eye(2, weight.shape[1])


class Expanded(nn.Module):
    """A buffer whose elements share memory, a weight that is transposed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6).t())
        self.register_buffer("shift", torch.randn(1, 4).expand(6, 4))
        self.register_buffer("even", torch.randn(8)[::2])

    def forward(self, x):
        """Map and shift."""
        return x @ (self.weight + self.shift) * self.even


class Lists(nn.Module):
    """Lists and dictionaries of parameters, one of them tied."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.list = nn.ParameterList([self.linear.weight, torch.randn(4)])
        self.dict = nn.ParameterDict({"ü": torch.randn(4, 4)})

    def forward(self, x):
        """Use them all."""
        return self.linear(x) @ self.list[0] * self.list[1] @ self.dict["ü"]


def low_rank():
    """A linear layer of rank 2."""
    layer = nn.Linear(5, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Rank())
    return layer


class TiedDirections(nn.Module):
    """Two layers with weight norm that have one direction, two lengths."""

    def __init__(self):
        super().__init__()
        self.one, self.other = (
            parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2)
        )
        one, other = (
            layer.parametrizations.weight for layer in (self.one, self.other)
        )
        other.original1 = one.original1
        with torch.no_grad():
            other.original0.mul_(2)

    def forward(self, x):
        """Go through both."""
        return self.other(self.one(x))


def after_data(module, *shape):
    """A module that has seen data, and kept statistics of them."""
    for _ in range(3):
        module.train()(torch.randn(*shape) * 2 + 1)
    return module.eval()


def normalizer():
    """SpeechBrain's normalization by statistics of all data."""
    module = InputNormalization(norm_type="global")
    module.train()(torch.randn(2, 9, 4) * 3 + 2, torch.ones(2))
    return nn.ModuleDict({"normalize": module, "linear": nn.Linear(4, 2)})


def normalized(model, x):
    """Outputs of a model with a normalizer."""
    return model["linear"](model["normalize"](x, torch.ones(len(x))))


def hifigan():
    """A vocoder, with weight norm on all its convolutions."""
    return HifiganGenerator(8, 1, "1", [[1, 3, 5]], [3], [4, 4], 8, [2, 2])


def draw(*shape):
    """Inputs of a shape."""
    return lambda: torch.randn(*shape)


def tokens(*shape):
    """Inputs that are numbers of tokens."""
    return lambda: torch.randint(1, 7, shape)


# What is built -> how it is built, what it is given.
ZOO = {
    # torch
    "scalars": (Scalars, draw(3, 3)),
    "tied": (Tied, tokens(2, 3)),
    "shared": (Shared, draw(5, 4)),
    "saver": (Statistics, draw(2, 3)),
    "extra": (Extra, draw(2, 4)),
    "expanded": (Expanded, draw(2, 6)),
    "lists": (Lists, draw(2, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), draw(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), draw(1, 2, 5, 6)),
    "up": (lambda: nn.ConvTranspose1d(4, 6, 3), draw(2, 4, 9)),
    "up_groups": (
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
        draw(2, 4, 9),
    ),
    "up_depthwise": (
        lambda: nn.ConvTranspose1d(4, 4, 3, groups=4),
        draw(2, 4, 9),
    ),
    "up_2d": (lambda: nn.ConvTranspose2d(2, 3, 3), draw(1, 2, 5, 6)),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), lambda: torch.randn(2, 2, 4)),
    "attention": (
        lambda: nn.MultiheadAttention(
            8, 2, kdim=6, vdim=4, batch_first=True, add_bias_kv=True
        ),
        draw(2, 3, 8),
    ),
    "lstm": (lambda: nn.LSTM(3, 4, 2, bidirectional=True), draw(5, 2, 3)),
    "lstm_projected": (lambda: nn.LSTM(3, 6, proj_size=2), draw(5, 2, 3)),
    "gru": (lambda: nn.GRU(3, 4), draw(5, 2, 3)),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        draw(2, 5, 8),
    ),
    "batch_norm": (
        lambda: after_data(nn.BatchNorm1d(4), 3, 4, 5),
        draw(2, 4, 5),
    ),
    "instance_norm": (
        lambda: after_data(
            nn.InstanceNorm1d(4, affine=True, track_running_stats=True), 3, 4, 5
        ),
        draw(2, 4, 5),
    ),
    "group_norm": (lambda: nn.GroupNorm(2, 4), draw(2, 4, 5)),
    "rms_norm": (lambda: nn.RMSNorm(4), draw(2, 5, 4)),
    "prelu": (lambda: nn.PReLU(4), draw(2, 4, 5)),
    "bag": (lambda: nn.EmbeddingBag(7, 4, max_norm=0.5), tokens(2, 3)),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3)),
        draw(2, 4, 9),
    ),
    "tied_directions": (TiedDirections, draw(2, 4)),
    "spectral_norm": (
        lambda: after_data(
            parametrizations.spectral_norm(nn.Linear(4, 6)), 3, 4
        ),
        draw(2, 4),
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
        draw(2, 4),
    ),
    "low_rank": (low_rank, draw(2, 5)),
    "old_spectral_norm": (
        lambda: after_data(nn.utils.spectral_norm(nn.Linear(4, 6)), 3, 4),
        draw(2, 4),
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5),
        draw(2, 6),
    ),
    # speechbrain.nnet, processing
    "sb_conv1d": (
        lambda: CNN.Conv1d(6, 3, in_channels=4, weight_norm=True),
        draw(2, 9, 4),
    ),
    "sb_conv2d": (lambda: CNN.Conv2d(3, 3, in_channels=2), draw(1, 9, 8, 2)),
    "sb_up": (
        lambda: CNN.ConvTranspose1d(6, 3, input_shape=(1, 9, 4)),
        draw(2, 9, 4),
    ),
    "sinc": (lambda: CNN.SincConv(6, 9, in_channels=1), draw(2, 80, 1)),
    "depthwise": (
        lambda: CNN.DepthwiseSeparableConv1d(6, 3, (1, 9, 4)),
        draw(2, 9, 4),
    ),
    "sb_lstm": (lambda: RNN.LSTM(4, input_size=3), draw(2, 5, 3)),
    "ligru": (lambda: RNN.LiGRU(4, (2, 5, 3)), draw(2, 5, 3)),
    "sligru": (lambda: RNN.SLiGRU(4, (2, 5, 3)), draw(2, 5, 3)),
    "quasi": (lambda: RNN.QuasiRNN(4, input_shape=(2, 5, 3)), draw(2, 5, 3)),
    "linear": (lambda: Linear(4, input_size=3), draw(2, 5, 3)),
    "embedding": (lambda: Embedding(7, embedding_dim=4), tokens(2, 3)),
    "relative": (
        lambda: attention.RelPosMHAXL(8, 2),
        lambda: torch.randn(2, 5, 8),
    ),
    "feed_forward": (
        lambda: attention.PositionalwiseFeedForward(16, input_size=8),
        draw(2, 5, 8),
    ),
    "rope": (lambda: attention.RoPEMHA(8, 2), lambda: torch.randn(2, 5, 8)),
    "encoding": (lambda: PositionalEncoding(16), draw(2, 5, 16)),
    "pcen": (lambda: normalization.PCEN(4), lambda: torch.rand(2, 9, 4)),
    "sb_batch_norm": (
        lambda: after_data(normalization.BatchNorm1d(input_size=4), 2, 5, 4),
        draw(2, 5, 4),
    ),
    "quaternion_norm": (
        lambda: after_data(QBatchNorm(8), 3, 8),
        draw(2, 8),
    ),
    "quaternion": (lambda: QLinear(4, (2, 8)), draw(2, 8)),
    "complex": (
        lambda: zeroed(CLinear(4, (2, 8))),
        draw(2, 8),
    ),
    "random_codes": (
        lambda: RandomProjectionQuantizer(8, 4, 16),
        draw(2, 4, 8),
    ),
    "normalizer": (normalizer, draw(2, 9, 4)),
    "global_norm": (lambda: after_data(GlobalNorm(), 2, 9, 4), draw(2, 9, 4)),
    # speechbrain.lobes.models
    "crdnn": (
        lambda: CRDNN(
            input_size=8,
            cnn_channels=(2, 2),
            rnn_neurons=4,
            rnn_layers=1,
            dnn_neurons=4,
            time_pooling=False,
        ),
        draw(2, 10, 8),
    ),
    "front_end": (
        lambda: ConvolutionFrontEnd(
            (1, 8, 8),
            1,
            1,
            out_channels=[2],
            kernel_sizes=[3],
            strides=[2],
            residuals=[False],
        ),
        draw(2, 8, 8),
    ),
    "tdnn": (lambda: TDNNBlock(4, 4, 3, 1), draw(2, 4, 9)),
    "res2net": (lambda: SERes2NetBlock(8, 8, 4, 4), draw(2, 8, 9)),
    "xvector": (
        lambda: Xvector(
            in_channels=4,
            activation=nn.LeakyReLU,
            tdnn_blocks=1,
            tdnn_channels=[4],
            tdnn_kernel_sizes=[3],
            tdnn_dilations=[1],
            lin_neurons=4,
        ),
        draw(2, 9, 4),
    ),
    "conv_tasnet": (
        lambda: conv_tasnet.MaskNet(4, 4, 4, 3, 2, 1, 2, norm_type="gLN"),
        draw(2, 4, 9),
    ),
    "decoder": (lambda: dual_path.Decoder(4, 1, 4, stride=2), draw(2, 4, 9)),
    "transformer_block": (
        lambda: dual_path.SBTransformerBlock(1, 8, 2, 16),
        draw(2, 5, 8),
    ),
    "hifigan": (hifigan, draw(1, 8, 9)),
    "metric": (
        lambda: MetricDiscriminator(kernel_size=(3, 3), base_channels=2),
        draw(1, 2, 20, 20),
    ),
    "rnnlm": (
        lambda: RNNLM(
            7, embedding_dim=4, rnn_neurons=4, rnn_layers=1, dnn_neurons=4
        ),
        tokens(2, 5),
    ),
    "transformer_lm": (
        lambda: TransformerLM(
            7, d_model=8, nhead=2, num_encoder_layers=1, d_ffn=8
        ),
        tokens(2, 5),
    ),
    "sb_encoder": (
        lambda: TransformerEncoder(1, 2, 16, d_model=8),
        draw(2, 5, 8),
    ),
    "convolution_module": (lambda: ConvolutionModule(8, 3), draw(2, 9, 8)),
    "convolution_branch": (
        lambda: ConvolutionBranch(8, 16, 3),
        draw(2, 9, 8),
    ),
}
CALLS = {
    "attention": lambda m, x: m(x, x[..., :6], x[..., :4]),
    "bilinear": lambda m, x: m(x[..., 0, :3], x[..., 1, :]),
    "normalizer": normalized,
    "relative": lambda m, x: m(
        x, x, x, attention.RelPosEncXL(8)(x), attn_mask=None
    ),
    "rope": lambda m, x: m(x, x, x),
    "transformer_lm": lambda m, x: m(x),
}


def zeroed(module):
    """A complex layer, which leaves its bias unset."""
    with torch.no_grad():
        module.b.normal_()
    return module


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ZOO)
def test_what_is_packed_is_the_model(tmp_path, name, setting):
    build, given = ZOO[name]
    assert_packs(tmp_path, build, given, CALLS.get(name), SETTINGS[setting])
