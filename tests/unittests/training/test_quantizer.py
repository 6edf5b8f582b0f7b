"""The Quantizer of a YAML: what it attaches to, loads and refuses.

And weights that no loss reaches: what is said, and what is left behind."""

import gc
import logging

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models import conv_tasnet, dual_path
from speechbrain.lobes.models.conv_tasnet import MaskNet
from speechbrain.lobes.models.CRDNN import CRDNN
from speechbrain.lobes.models.discrete.dac import Snake1d
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from speechbrain.nnet.attention import MultiheadAttention, RelPosMHAXL
from speechbrain.nnet.CNN import Conv1d, DepthwiseSeparableConv1d
from speechbrain.nnet.embedding import Embedding
from speechbrain.nnet.RNN import GRU, LSTM, LiGRU

from speechbrain_mpq import (
    FakeQuantize,
    KLScores,
    LearnedBits,
    Quantizer,
    dequantize_,
    learn_bits,
    quantize_,
)
from speechbrain_mpq.allocation.solver import parse_budget
from speechbrain_mpq.quantization import chains as quantized_chains
from speechbrain_mpq.quantization.chains import listen_to_steps
from speechbrain_mpq.training import quantizer as quantizers
from speechbrain_mpq.training.calibration import Calibration
from speechbrain_mpq.training.distributions import (
    distribution_type,
    find_distributions,
)
from speechbrain_mpq.training.pipeline import check_limits
from speechbrain_mpq.training.quantizer import PATIENCE


def modules():
    """What a recipe calls its modules."""
    torch.manual_seed(0)
    return {
        "encoder": torch.nn.LSTM(4, 4),
        "output": torch.nn.Linear(4, 3),
    }


def weights_of(layers):
    """A full-precision checkpoint of other values."""
    return {
        name: {key: 3 * value + 0.1 for key, value in m.state_dict().items()}
        for name, m in layers.items()
    }


def test_modules_keep_their_identity_and_come_back():
    layers = modules()
    before = {n: m.state_dict() for n, m in modules().items()}
    quantizer = Quantizer(layers, bits=3)
    assert quantizer.model["output"] is layers["output"]
    assert len(layers["output"].weight.unique()) <= 7
    quantizer.dequantize()
    for name, layer in layers.items():
        assert list(layer.state_dict()) == list(before[name])
        assert all(
            torch.equal(value, before[name][key])
            for key, value in layer.state_dict().items()
        )
    layers["output"].load_state_dict(weights_of(layers)["output"])


@pytest.mark.parametrize("strict", [True, False])
def test_full_precision_weights_get_scales_that_fit(strict):
    layers, checkpoint = modules(), weights_of(modules())
    quantizer = Quantizer(layers, bits=4, granularity="channel")
    for name, layer in layers.items():
        layer.load_state_dict(checkpoint[name], strict=strict)
    fresh = modules()
    for name, layer in fresh.items():
        layer.load_state_dict(checkpoint[name])
    quantize_(torch.nn.ModuleDict(fresh), 4, granularity="channel")
    assert torch.equal(layers["output"].weight, fresh["output"].weight)
    for name in ("weight_ih_l0", "bias_hh_l0"):
        loaded, fitted = (
            getattr(m["encoder"], name) for m in (quantizer.model, fresh)
        )
        assert torch.equal(loaded, fitted)


def test_quantized_weights_keep_the_scales_that_they_bring():
    trained = modules()
    Quantizer(trained)
    scale = trained["output"].parametrizations.weight[0].log_stretch
    scale.data.fill_(0.3)
    layers = modules()
    Quantizer(layers)
    layers["output"].load_state_dict(trained["output"].state_dict())
    assert torch.equal(layers["output"].weight, trained["output"].weight)


def test_checkpoint_without_a_key():
    layers = modules()
    Quantizer(layers)
    checkpoint = weights_of(modules())["output"]
    del checkpoint["weight"]
    with pytest.raises(ValueError, match=r"lacks 'weight'.*targets"):
        layers["output"].load_state_dict(checkpoint, strict=False)


def test_checkpoint_of_another_estimator():
    trained, layers = modules(), modules()
    Quantizer(trained, estimator=FakeQuantize)
    Quantizer(layers)
    with pytest.raises(ValueError, match=r"in another way.*estimator"):
        layers["output"].load_state_dict(
            trained["output"].state_dict(), strict=False
        )


@pytest.mark.parametrize("options", [{"bits": 3}, {"codebook": "midrise"}])
def test_checkpoint_of_another_plan(options):
    trained, layers = modules(), modules()
    Quantizer(trained, **options)
    Quantizer(layers)
    with pytest.raises(ValueError, match="quantized to another plan"):
        layers["output"].load_state_dict(trained["output"].state_dict())


def test_learned_bits_take_those_of_the_checkpoint():
    trained, layers = modules(), modules()
    Quantizer(trained, bits=3)
    learning = LearnedBits(layers, bits=4)
    for name, layer in layers.items():
        layer.load_state_dict(trained[name].state_dict())
    assert learning.plan.average_bits == 3


def test_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=r"'\*norm\*' matches no parameter"):
        Quantizer(modules(), exclude=["*norm*"])
    with pytest.raises(ValueError, match=r"'enc\*' matches.*near misses"):
        Quantizer({"net": torch.nn.PReLU()}, bits=None, include=["enc*"])


def test_model_that_is_quantized_already():
    layers = modules()
    quantizer = Quantizer(layers)
    with pytest.raises(ValueError, match="quantized already"):
        Quantizer(layers, bits=2)
    assert quantizer.plan.average_bits == 4
    dequantize_(quantizer.model)
    quantizer.model["output"].load_state_dict(weights_of(modules())["output"])


@pytest.mark.parametrize("targets", [None, {}, [], "modules"], ids=str)
def test_targets_that_name_nothing(targets):
    with pytest.raises(TypeError, match="targets must name modules"):
        Quantizer(targets)


def test_targets_that_are_no_modules():
    with pytest.raises(TypeError, match="target 'lr' is a float"):
        Quantizer({"lr": 0.1})


@pytest.mark.parametrize("unreached", ["skip", True])
def test_unknown_ways_of_unreached(unreached):
    with pytest.raises(ValueError, match="unreached must be one of"):
        Quantizer(modules(), unreached=unreached)


@pytest.mark.parametrize("bits", [1.5, 17, "900 KiB"])
def test_budget_beyond_the_candidates(bits):
    with pytest.raises(ValueError, match="bits must lie between 2 and 16"):
        LearnedBits(modules(), bits=bits)


def test_frozen_weights_cannot_learn_bits():
    layers = modules()
    layers["encoder"].requires_grad_(False)
    with pytest.raises(ValueError, match="encoder.weight_ih_l0 is frozen"):
        LearnedBits(layers)
    plain = [list(layer.state_dict()) for layer in modules().values()]
    assert [list(layer.state_dict()) for layer in layers.values()] == plain


def test_bits_are_not_decided_without_gradients():
    layers = modules()
    quantizer = LearnedBits(layers, interval=1, unreached="ignore")
    optimizer = learn_bits(
        quantizer.model.parameters(), quantizer, torch.optim.SGD, lr=0.1
    )
    layers["output"](torch.ones(4)).sum().backward()
    with pytest.raises(ValueError, match=r"encoder.* had no gradient in 1"):
        optimizer.step()


def test_batch_norm_under_torchrun(monkeypatch):
    """SpeechBrain makes synchronized ones of them, without quantizers."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    layers = {"bn": torch.nn.BatchNorm1d(3), "out": torch.nn.Linear(3, 3)}
    with pytest.raises(ValueError, match="bn.weight is of a batch norm"):
        Quantizer(layers)
    Quantizer(layers, exclude=["bn.*"])
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.ModuleDict(layers))


def test_wrappers_of_a_brain_are_in_no_name():
    """Under torchrun a Brain puts DDP's wrappers in its own ModuleDict."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    layers = torch.nn.ModuleDict({"out": torch.nn.Linear(3, 3)})
    quantizer = Quantizer(layers)
    names = list(quantizer.plan.tensors)
    layers["out"] = Wrapper(layers["out"])
    assert list(quantizer.plan.tensors) == names == ["out.weight", "out.bias"]


def test_second_optimizer_is_checked_by_itself():
    layers = modules()
    Quantizer(layers)
    first, second = (
        torch.optim.SGD(layers[name].parameters(), lr=0.1)
        for name in ("output", "encoder")
    )
    layers["output"](torch.ones(4)).sum().backward()
    first.step()
    with pytest.raises(ValueError, match="no loss reaches encoder"):
        for _ in range(PATIENCE):
            second.step()


@pytest.mark.parametrize("budget", ["4 apples", "", True, 0, -3, None])
def test_budgets_that_say_nothing(budget):
    with pytest.raises(ValueError, match="not understood"):
        parse_budget(budget)


def test_distributions_come_before_masks_and_lengths():
    lengths = torch.tensor([[1.0], [0.5]])
    log_probs = torch.randn(2, 4, 3).log_softmax(-1)
    found = find_distributions([lengths, {"p": log_probs}])
    assert len(found) == 1 and found[0] is log_probs
    assert (
        distribution_type(torch.randn(2, 3).sigmoid().bfloat16()) == "sigmoid"
    )
    assert distribution_type(torch.zeros(2, 0)) == ""
    assert distribution_type(torch.ones(2, 3, dtype=torch.int64)) == ""


KINDS = [Quantizer, LearnedBits]


def plain_modules():
    """Two layers."""
    return {"one": torch.nn.Linear(4, 3), "two": torch.nn.Linear(3, 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_misspelt_option(kind):
    message = f"{kind.__name__} has no option 'codebok'; near misses: codebook"
    with pytest.raises(TypeError, match=message) as raised:
        kind(plain_modules(), codebok="midrise")
    choices = str(raised.value).partition("choose from ")[2].split(", ")
    assert {"targets", "bits", "codebook", "rows", "unreached"} <= set(choices)
    assert ("interval" in choices) == (kind is LearnedBits)
    assert not {"self", "options", "unknown"} & set(choices)
    assert len(choices) == len(set(choices))


def test_misspelt_option_of_a_yaml():
    text = """
    layer: !new:torch.nn.PReLU
    quantizer: !new:speechbrain_mpq.Quantizer
        targets: [!ref <layer>]
        granulrity: channel
    """
    with pytest.raises(TypeError, match="near misses: granularity"):
        load_hyperpyyaml(text)


@pytest.mark.parametrize("bits", ["4bit", "4", 0, 17, 2.5, True, [4]])
def test_impossible_uniform_bits(bits):
    layers = plain_modules()
    with pytest.raises(ValueError, match="integer from 1 to 16 or 1.6, not"):
        Quantizer(layers, bits=bits)
    assert list(layers["one"].state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"bits": "4 apples"}, "budget '4 apples' is not understood"),
        ({"bits": 40}, "between 2 and 16"),
        ({"candidate_bits": [4, 17]}, "candidate bits .* from 1 to 16"),
        ({"min_bits": 17}, "from 1 to 16"),
        ({"min_bits": 8, "candidate_bits": [2, 4]}, "min_bits 8 is more than"),
        ({"interval": 0}, "at least one decision"),
    ],
)
def test_impossible_learned_bits(options, match):
    with pytest.raises(ValueError, match=match):
        LearnedBits(plain_modules(), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options, match",
    [
        ({"codebook": "midrse"}, "'entropy'), not 'midrse'"),
        ({"granularity": "row"}, "('tensor', 'channel'), not 'row'"),
        ({"rows": 0}, "rows must be a positive number"),
        ({"rows": "64"}, "rows must be a positive number"),
        ({"estimator": "LogStep"}, "!name:speechbrain_mpq.LogStep, not"),
        ({"estimator": FakeQuantize(4, 1.0)}, "estimator must be a class"),
        ({"equal_bits": ["gate"]}, "none of ['qkv', 'gates']; near misses"),
        ({"include": ["three.*"]}, "'three.*' matches no parameter"),
    ],
)
def test_options_that_are_used_later(kind, options, match):
    """Some are used by choose_bits only, when all data is prepared."""
    bits = {"bits": None} if kind is Quantizer else {}
    with pytest.raises((TypeError, ValueError)) as raised:
        kind(plain_modules(), **bits, **options)
    assert match in str(raised.value)


@pytest.mark.parametrize(
    "limits, match",
    [
        ({"average_bits": 1.5}, "out of reach: with 2 to 4 bits"),
        ({"budget_bytes": 9}, "a budget of 9 bytes is out of reach"),
        ({"average_bits": 4, "min_bits": 6}, "reaches min_bits=6"),
        ({"average_bits": 4, "equal_bits": ["qvk"]}, "matches no cluster"),
    ],
)
def test_limits_that_no_plan_keeps(limits, match):
    quantizer = Quantizer(plain_modules(), bits=None)
    calibration = Calibration(quantizer.model)
    checked = calibration, quantizer.selection, KLScores((2, 4))
    check_limits(*checked, {"average_bits": 4, "min_bits": 2})
    with pytest.raises(ValueError, match=match):
        check_limits(*checked, limits)


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


class Model(torch.nn.Module):
    """Owns a parameter itself, as class tokens are."""

    def __init__(self):
        super().__init__()
        self.token = torch.nn.Parameter(torch.rand(8))
        self.unused = torch.nn.Sequential(
            torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        )
        self.layers = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.layers(x)


def step(model, learning=torch.optim.SGD, steps=1, **options):
    """Steps of an optimizer."""
    learner = learning(model.parameters(), lr=0.1, **options)
    for _ in range(steps):
        model(torch.rand(3, 8)).sum().backward()
        learner.step()
        learner.zero_grad()
    return learner


def hooks():
    """How many there are in torch's global list."""
    return len(quantized_chains._LISTENERS)


def test_the_advice_excludes_what_is_not_reached_and_nothing_else(caplog):
    model = Model()
    Quantizer({"net": model})
    with pytest.raises(ValueError, match="no loss reaches net.token") as said:
        step(model, steps=PATIENCE)
    (warned,) = [r.message for r in caplog.records if "first step" in r.message]
    assert 'exclude: ["net.token", "net.unused.*"]' in warned
    assert 'exclude: ["net.token", "net.unused.*"]' in str(said.value)
    model = Model()
    quantizer = Quantizer({"net": model}, exclude=["net.token", "net.unused.*"])
    step(model)
    assert list(quantizer.plan.tensors) == [
        "net.layers.weight",
        "net.layers.bias",
    ]


class Dropping(torch.nn.Module):
    """Leaves out one of its layers, as layer drop does."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in "ab")
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layers[self.calls % 3 % 2](x)


def test_layers_that_some_steps_leave_out_are_trained():
    gc.collect()
    before, model = hooks(), Dropping()
    Quantizer({"net": model})
    started = model.layers[0].parametrizations.weight.original.clone()
    step(model, steps=PATIENCE + 1)
    assert (model.layers[0].parametrizations.weight.original != started).any()
    assert hooks() == before


@pytest.mark.parametrize("learned", [False, True])
def test_no_hook_is_left_where_a_model_is_gone(learned):
    gc.collect()
    before = hooks()
    for _ in range(3):
        model = torch.nn.Linear(8, 8)
        if learned:
            quantizer = LearnedBits({"m": model}, bits=4, interval=9)
            options = {"opt_class": torch.optim.SGD, "quantizer": quantizer}
            step(model, learn_bits, **options)
        else:
            quantizer = Quantizer({"m": model}, bits=4)
            step(model)
    del model, quantizer
    options = None  # the last reference to it
    gc.collect()
    assert hooks() == before


def test_no_hook_is_left_where_all_is_known():
    gc.collect()
    before, model = hooks(), torch.nn.Linear(8, 8)
    quantizer = Quantizer({"m": model}, bits=4)
    step(model)
    model(torch.rand(1, 8))
    assert hooks() == before
    assert quantizer.plan.average_bits == 4


def test_a_yaml_block_is_logged_once_there_is_a_log(caplog):
    name = quantizers.__name__
    with caplog.at_level(logging.WARNING, name):
        model = torch.nn.Linear(8, 8)
        Quantizer({"m": model}, bits=4)
        model(torch.rand(1, 8))
    assert not caplog.records
    with caplog.at_level(logging.INFO, name):
        model(torch.rand(1, 8))
        model(torch.rand(1, 8))
    (record,) = [r for r in caplog.records if r.name == name]
    assert "Quantized 2 tensors in 1 clusters to 4.000 bits" in record.message


def test_vectors_stay_in_float_whatever_they_are_called():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4, bias=False), torch.nn.PReLU()
    )
    quantizer = Quantizer({"m": model}, vectors=False)
    assert list(quantizer.plan.tensors) == ["m.0.weight"]


def test_norms_are_vectors_whatever_their_shape():
    layers = torch.nn.ModuleDict(
        {
            "gln": conv_tasnet.GlobalLayerNorm(8),
            "dual": dual_path.GlobalLayerNorm(8, 4),
            "snake": Snake1d(8),
            "one": torch.nn.Linear(8, 1),
            "depthwise": torch.nn.Conv1d(8, 8, 1, groups=8),
        }
    )
    quantizer = Quantizer(layers, vectors=False)
    assert set(quantizer.plan.tensors) == {"one.weight", "depthwise.weight"}


def test_torchscript_is_refused_with_what_to_do():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    quantizer = Quantizer({"m": model})
    with pytest.raises(ValueError, match="leave out --jit"):
        torch.jit.script(model)
    quantizer.dequantize()
    assert torch.jit.script(model)(torch.ones(1, 4)).shape == (1, 4)


def test_listeners_may_die_while_others_are_told():
    """Python collects owners whenever it likes, also in between."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], 0.1)
    owners, calls = [torch.nn.Linear(1, 1) for _ in range(3)], []

    def called(*_):
        calls.append(len(owners))
        owners.clear()
        gc.collect()

    for owner in owners:
        listen_to_steps(owner, called)
    del owner
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert calls[0] == 3
    calls.clear()
    optimizer.step()
    assert not calls
    kept = torch.nn.Linear(1, 1)
    listening = listen_to_steps(kept, called)
    optimizer.step()
    assert len(calls) == 1
    listening.remove()
    optimizer.step()
    assert len(calls) == 1
