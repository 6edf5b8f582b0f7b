"""Every layer class of SpeechBrain: packed, loaded.

The examples of the docstrings are run up to where they call what they build;
that is packed and loaded into a copy with other weights, and must put out the
same bits. Of classes whose docstring builds none, or a large one, there are
small ones below.
"""

import contextlib
import copy
import doctest
import importlib
import inspect
import io
import pkgutil
import sys

import pytest
import speechbrain.lobes.models
import speechbrain.nnet
import torch
from helpers import outputs, same_bits

from speechbrain_mpq.quantization.packing import (
    load_packed_,
    packed_file_bytes,
    save_packed,
)
from speechbrain_mpq.quantization.plan import BitPlan, ClusterBits
from speechbrain_mpq.quantization.quant_api import (
    clusters,
    dequantize_,
    quantize_,
)
from speechbrain_mpq.quantization.state import made_alike, stored_buffers
from speechbrain_mpq.quantization.tensors import named_tensors

LARGEST = 100_000  # parameters; the larger ones consist of the others
ALL_BITS = (1, 1.6, *range(2, 17))


# Module of speechbrain -> what builds its classes, in its own names
SMALL = {
    "nnet.attention": (
        *("MultiheadAttention(2, 8)", "RelPosMHAXL(8, 2)", "RoPEMHA(8, 2)"),
        *("RelPosEncXL(8)", "PositionalwiseFeedForward(8, input_size=4)"),
    ),
    "nnet.RNN": (
        *("QuasiRNN(4, input_size=3)", "LiGRU_Layer(3, 4, 1, 2)"),
        "SLiGRU_Layer(3, 4, 1, 2, recurrent_elementwise_affine=True)",
    ),
    "nnet.complex_networks.c_RNN": (
        *("CLSTM_Layer(4, 4, 1, 2)", "CRNN_Layer(4, 4, 1, 2)"),
        "CLiGRU_Layer(4, 4, 1, 2)",
    ),
    "nnet.quaternion_networks.q_RNN": (
        *("QLSTM_Layer(4, 4, 1, 2)", "QRNN_Layer(4, 4, 1, 2)"),
        "QLiGRU_Layer(4, 4, 1, 2)",
    ),
    "nnet.hypermixing": ("HyperMixing(8, 8)", "ParallelMLPs(4, 4)"),
    "nnet.unet": ("UNetModel(1, 8, 1, 1, (), 0, (1, 2), norm_num_groups=2)",),
    "nnet.utils": ("DoneDetector(nn.Linear(4, 4), nn.Linear(4, 1))",),
    "lobes.models.ContextNet": (
        "ContextNetBlock(4, 3, 1, 2, input_shape=[2, 5, 4])",
    ),
    "lobes.models.EnhanceResnet": ("SEblock(8)",),
    "lobes.models.DiffWave": ("DiffWave(4, 1, 4, 1, 50)",),
    "lobes.models.ECAPA_TDNN": (
        "ECAPA_TDNN(4, channels=[8] * 5, lin_neurons=4, attention_channels=4, "
        "se_channels=4)",
    ),
    "lobes.models.GatedNN": ("GatedNN([None, None, 4], neurons=4)",),
    "lobes.models.HifiGAN": (
        *("ResBlock1(4)", "ResBlock2(4)"),
        "UnitHifiganGenerator(4, 1, '1', [[1, 3, 5]], [3], [4], 8, [2], "
        "vocab_size=5, embedding_dim=4)",
    ),
    "lobes.models.MetricGAN": (
        *("EnhancementGenerator(8, 4, 1)", "Learnable_sigmoid(4)"),
    ),
    "lobes.models.MetricGAN_U": ("EnhancementGenerator(8, 4, 1, 4)",),
    "lobes.models.PIQ": ("ResBlockAudio(4)", "VQEmbedding(5, 4)"),
    "lobes.models.ResNet": (
        "ResNet(8, channels=[4] * 4, block_sizes=[1] * 4, lin_neurons=4)",
    ),
    "lobes.models.Tacotron2": (
        "Tacotron2(True, 4, 5, 8, 5, 1, 8, 8, 4, 2, 3, 1, 4, 4, 4, 3, 8, 5, 2)",
    ),
    "lobes.models.VanillaNN": ("VanillaNN([None, None, 4], dnn_neurons=4)",),
    "lobes.models.Xvector": (
        *("Classifier([None, None, 4], lin_neurons=4, out_neurons=3)",),
        "Discriminator([None, None, 4], lin_neurons=4)",
    ),
    "lobes.models.beats": (
        *("GLU_Linear(4, 4)", "MultiheadAttention(8, 2)"),
        "TransformerSentenceEncoderLayer(8, 8, 2)",
    ),
    "lobes.models.discrete.dac": (
        *("Snake1d(4)", "ResidualVectorQuantize(4, 2, 5, 2)"),
        *("ResidualUnit(4)", "EncoderBlock(4, 2)", "DecoderBlock(4, 2, 2)"),
    ),
    "lobes.models.dual_path": (
        *("SBTransformerBlock(1, 8, 2, 8)", "SBRNNBlock(4, 4, 1)"),
        *("PytorchTransformerBlock(8, 1, 2, 8)", "DPTNetBlock(8, 2, 8)"),
        "SBConformerEncoderBlock(1, 8, 2, 8, kernel_size=3)",
    ),
    "lobes.models.resepformer": (
        *("SBRNNBlock(4, 4, 1, 4)",),
        "SBTransformerBlock_wnormandskip(1, 8, 2, 8)",
    ),
    "lobes.models.transformer.Branchformer": (
        "BranchformerEncoder(1, 8, 2, 3, csgu_linear_units=8)",
    ),
    "lobes.models.transformer.Conformer": (
        *("ConformerEncoder(1, 8, 8, 2, 3)", "ConformerDecoder(1, 2, 8, 8)"),
    ),
    "lobes.models.transformer.Transformer": (
        "TransformerEncoder(1, 2, 8, d_model=8, ffn_type='1dcnn')",
        *("TransformerDecoder(1, 2, 8, 8)", "NormalizedEmbedding(8, 5)"),
    ),
}
SMALL = [(module, text) for module, own in SMALL.items() for text in own]

# Attention over 64 x 64 places would take gigabytes
SHORTER = {"AttentionPool2d": ("64", "8")}


class Called(Exception):
    """Ends an example: what comes after the first call is not needed."""


class TooLarge(Exception):
    """Ends an example that builds a large model."""


def mixed_plan(model):
    """Bits of all sizes, other ones in every cluster."""
    tensors = named_tensors(model).items()
    sizes = {name: tensor.weight.numel() for name, tensor in tensors}
    plan, start = {}, len(type(model).__name__)
    for index, (cluster, names) in enumerate(clusters(model).items()):
        bits = ALL_BITS[(start + index) % len(ALL_BITS)]
        count = sum(sizes[name] for name in names)
        plan[cluster] = ClusterBits(bits, count, tuple(names))
    return BitPlan(plan)


def layer_classes():
    """All classes of layers and networks that can be imported here."""
    for package in (speechbrain.nnet, speechbrain.lobes.models):
        prefix = f"{package.__name__}."
        for found in pkgutil.walk_packages(package.__path__, prefix):
            try:
                module = importlib.import_module(found.name)
            except ImportError:  # needs what is not installed
                continue
            for name, kind in inspect.getmembers(module, inspect.isclass):
                own = kind.__module__ == found.name
                if own and issubclass(kind, torch.nn.Module):
                    yield pytest.param(kind, id=f"{found.name}.{name}")


def example_of(kind):
    """A module that a docstring builds, and what it calls it with."""
    called, building, sizes = [], [], []
    plain, init = torch.nn.Module.__call__, kind.__init__
    register = torch.nn.Module.register_parameter

    def build(self, *arguments, **keywords):
        if not building:
            sizes.clear()
        building.append(self)
        init(self, *arguments, **keywords)
        building.pop()

    def count(self, name, parameter):
        register(self, name, parameter)
        if building and parameter is not None:
            sizes.append(parameter.numel())
            if sum(sizes) > 4 * LARGEST:  # parametrized, they count twice
                raise TooLarge

    def call(self, *arguments, **keywords):
        if type(self) is kind and not building:
            called.append((self, copy.deepcopy((arguments, keywords))))
            raise Called
        return plain(self, *arguments, **keywords)

    text = (kind.__doc__ or "").replace(*SHORTER.get(kind.__name__, ("", "")))
    examples = doctest.DocTestParser().get_examples(text)
    names = dict(vars(sys.modules[kind.__module__]))
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", call)
        patch.setattr(kind, "__init__", build)
        patch.setattr(torch.nn.Module, "register_parameter", count)
        with contextlib.redirect_stdout(io.StringIO()):
            with contextlib.suppress(Exception):
                for example in examples:
                    exec(compile(example.source, "example", "single"), names)
    if called:
        return called[0]
    if building:  # it was ended there
        pytest.skip("large")
    built = [value for value in names.values() if type(value) is kind]
    return (built[0], None) if built else (None, None)


def with_other_weights(model):
    """A copy that differs in all that is stored."""
    other, alike = copy.deepcopy(model), made_alike(model)
    with torch.no_grad():
        values = [*other.parameters()]
        buffers = stored_buffers(other).items()
        values += [value for name, value in buffers if name not in alike]
        for value in values:
            if value.is_floating_point():
                value.add_(1)
    return other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module, text", SMALL)
def test_small_ones_are_what_is_packed(tmp_path, module, text):
    names = vars(importlib.import_module(f"speechbrain.{module}"))
    torch.manual_seed(0)
    model = eval(text, dict(names)).eval()
    for parameter in model.parameters():
        parameter.data.normal_()  # some are never set
    quantized = copy.deepcopy(model)
    if sum(1 for _ in model.parameters()):
        quantize_(quantized, mixed_plan(model))
    other = with_other_weights(model)
    path = save_packed(quantized, tmp_path)
    assert path.stat().st_size == packed_file_bytes(quantized)
    load_packed_(other, tmp_path)
    dequantize_(quantized, keep_quantized=True)
    expected, state = quantized.state_dict(), other.state_dict()
    assert sorted(state) == sorted(expected)
    assert all(same_bits(state[n], expected[n]) for n in state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(layer_classes()))
def test_what_is_packed_is_the_layer(tmp_path, kind):
    model, given = example_of(kind)
    if model is None:
        pytest.skip("its docstring builds none")
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        pytest.skip("large")
    try:
        model = copy.deepcopy(model.eval())
    except RuntimeError:
        pytest.skip("it holds what cannot be copied")
    for parameter in model.parameters():
        # Some biases are never set: memory as it was.
        if parameter.is_floating_point() and not (parameter.abs() < 1e6).all():
            parameter.data.normal_()
    settings = {"float": None}
    if any(p.is_floating_point() for p in model.parameters()):
        settings["mixed"] = {"plan_or_bits": mixed_plan(model)}
        settings["channel"] = {"plan_or_bits": 5, "granularity": "channel"}
    for name, options in settings.items():
        quantized = copy.deepcopy(model)
        if options:
            quantize_(quantized, **options)
        other = with_other_weights(model)
        path = save_packed(quantized, tmp_path / name)
        assert path.stat().st_size == packed_file_bytes(quantized)
        load_packed_(other, tmp_path / name)
        if given:
            check_outputs(quantized, other, given)
        dequantize_(quantized, keep_quantized=True)
        expected = quantized.state_dict()
        state = other.state_dict()
        assert sorted(state) == sorted(expected)
        if not given:
            assert all(same_bits(state[n], expected[n]) for n in state)


def check_outputs(quantized, other, given):
    """The same bits from both."""

    def call(model, given):
        arguments, keywords = copy.deepcopy(given)
        return model(*arguments, **keywords)

    pairs = zip(
        outputs(quantized, given, call),
        outputs(other, given, call),
        strict=True,
    )
    assert all(same_bits(one, two) for one, two in pairs)
