"""What not every processor can do.

Items, metrics and finished runs, for the tests of tables.

What reports are made of, for the tests of pages, plots and verdicts.

Packed files of a toy model, whole or forged, for the tests of readers.

A module with many kinds of layers, and its packed model, for tests.

Small packed separators in every stored form, for the tests of engines.

A demo of small models and its server, for the tests of page and browser.

The recipe in tests/data/tiny_recipe, for the tests of the plugin.

Tiny folders that from_hparams loads, for the tests of interfaces.

Scripts of the repository, run in this process as their command lines would.

train.py at tiny size, and rows of tests/recipes, for the integration tests.
"""

import csv
import functools
import importlib.util
import io
import json
import logging
import os
import random
import re
import shlex
import subprocess
import sys
import threading
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.logger import get_environment_description

from speechbrain_mpq.evaluation.report import Evidence, write_report
from speechbrain_mpq.evaluation.runs import summarise
from speechbrain_mpq.inference.demo_server import Demo, serve
from speechbrain_mpq.inference.folder import save_separator, with_current_names
from speechbrain_mpq.inference.separation import QuantizedSeparator
from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import (
    ChannelAffine,
    fold_norms_,
    mask_network,
)
from speechbrain_mpq.quantization.container import (
    PackedModelError,
    read_container,
    write_container,
)
from speechbrain_mpq.quantization.packing import (
    load_packed_,
    packed_file_bytes,
    read_model,
    save_packed,
)
from speechbrain_mpq.quantization.quant_api import (
    coverage,
    dequantize_,
    quantize_,
)
from speechbrain_mpq.quantization.state import encoded, module_states
from speechbrain_mpq.utils import write_json


def _has_bf16_lstm():
    """Whether PyTorch has an LSTM in bfloat16 here: not on AVX2 alone."""
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            torch.nn.LSTM(8, 12)(torch.zeros(2, 1, 8))
    except RuntimeError:
        return False
    return True


needs_bf16_lstm = pytest.mark.skipif(
    not _has_bf16_lstm(),
    reason="PyTorch has no bfloat16 LSTM for this processor",
)


ANGLES = (3.0, 20.0, 60.0, 180.0)


def make_items(seed=0, per_bucket=3):
    chance = random.Random(seed)
    items = []
    for angle in ANGLES * per_bucket:
        words = chance.choices(["red", "blue", "nine", "go"], k=4)
        heard = [word if chance.random() < 0.8 else "x" for word in words]
        items.append(
            {
                "id": f"{len(items):04d}",
                "angle": angle,
                "si_snr": chance.gauss(7, 3),
                "si_snr_mixture": chance.gauss(0, 3),
                "pesq": chance.uniform(1, 4),
                "reference": " ".join(words),
                "hypothesis": " ".join(heard),
            }
        )
    return items


def make_metrics(system="kl", bits=4, items=None, **more):
    return {
        "system": system,
        "bits": bits,
        **summarise(items or make_items()),
        **more,
    }


def write_run(folder, items, **more):
    """A finished run with its items."""
    folder.mkdir(parents=True)
    write_json(folder / "test_items.json", items)
    write_json(folder / "metrics.json", make_metrics(items=items, **more))


NASTY = "<script>alert('x & y')</script>"


def report_metrics(system, bits, errors, **more):
    """Metrics with `errors` wrong words of 10 in every item."""
    items = [
        {
            "id": f"{index}",
            "angle": (5, 30, 60, 120)[index % 4],
            "si_snr": 7.25 + index % 4,
            "si_snr_mixture": 0.5,
            "pesq": 2.125,
            "reference": " ".join("abcdefghij"),
            "hypothesis": " ".join("x" * errors + "abcdefghij"[errors:]),
        }
        for index in range(8)
    ]
    return {"system": system, "bits": bits, **summarise(items), **more}


def make_example(**more):
    rng = np.random.default_rng(0)
    signals = {
        name: rng.standard_normal(1600) for name in ("mixture", "target", "kl")
    }
    return {
        "id": "item-7",
        "doa_target": 40.0,
        "doa_interferer": 110.0,
        "angle": 70.0,
        "sample_rate": 16000,
        "reference": "set nine now",
        "signals": signals,
        "hypotheses": {"mixture": "", "kl": "set five now"},
        "si_snr": {"mixture": 0.5, "kl": 8.75},
        **more,
    }


SUBLAYERS = (  # of a ConvBlock
    *("conv_1x1_in", "prelu_in", "norm_in", "d_conv"),
    *("prelu_out", "norm_out", "conv_1x1_out"),
)


def make_clusters(blocks=2):
    names = [
        f"mask_net.tcn_0_{block}.{sublayer}"
        for block in range(blocks)
        for sublayer in SUBLAYERS
    ]
    names = ["mask_net.conv_in", *names, "mask_net.conv_out"]
    return {name: {"bits": 4, "parameters": 10} for name in names}


def make_plan(clusters):
    return {"average_bits": 4.5, "bytes": 3000, "clusters": clusters}


def make_scores(clusters):
    row = {"2": 3.0, "4": 0.5, "8": 0.0}
    return {
        "method": "kl",
        "clusters": {name: {"scores": row} for name in clusters},
    }


def written(path, metrics, **evidence):
    write_report(path, metrics, Evidence(**evidence))
    return path.read_text(encoding="utf-8")


def refused_file(path, match):
    """Reading fails with a message that names the file."""
    with pytest.raises(PackedModelError, match=match) as caught:
        read_model(path)
    assert str(path) in str(caught.value)


def forge(path, change):
    """A toy model with a changed configuration and a checksum that fits."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    quantize_(model, 4, exclude=["1.bias"])
    file = save_packed(model, path.parent, architecture={"class": "Toy"})
    container = read_container(file)
    tensors, config = dict(container.tensors), container.config
    change(config, tensors)
    write_container(path, tensors, config, "3")
    return model


class Net(torch.nn.Module):
    """Convolution, recurrence, attention, norm and a persistent buffer."""

    def __init__(self, hidden=6):
        super().__init__()
        self.conv = torch.nn.Conv1d(3, hidden, 3, padding=1)
        self.norm = torch.nn.BatchNorm1d(hidden)
        self.prelu = torch.nn.PReLU()
        self.lstm = torch.nn.LSTM(hidden, 4, batch_first=True)
        self.gru = torch.nn.GRU(4, 4, batch_first=True)
        self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("window", torch.hann_window(5))

    def forward(self, x):
        """[batch, 3, time] to [batch, time, 4]."""
        x = self.prelu(self.norm(self.conv(x))).transpose(1, 2)
        x = self.gru(self.lstm(x)[0])[0]
        return self.attention(x, x, x)[0] * self.window.sum()


def net(seed=0, **sizes):
    """A model in eval mode."""
    torch.manual_seed(seed)
    return Net(**sizes).eval()


def packed_net(folder, bits=3, **arguments):
    """A packed model, and the quantized model that it came from."""
    model = net()
    quantize_(model, bits, **arguments)
    return save_packed(model, folder), model


def tensors_of(output):
    """All tensors in what a module puts out."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []


def same_bits(one, other):
    """Whether two tensors are the same, NaN and signs of zeros included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (t.detach().contiguous().reshape(-1) for t in (one, other))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def outputs(model, x, call=None):
    """What a module puts out without gradients, always the same."""
    torch.manual_seed(7)
    with torch.no_grad():
        return tensors_of((call or (lambda m, x: m(x)))(model, x))


def assert_packs(folder, build, given, call=None, settings=None):
    """A packed model is the model: outputs, state_dict, other state, size.

    Arguments
    ---------
    folder : Path
        To write to.
    build : callable
        Builds the module.
    given : callable
        Draws what the module is given.
    call : callable or None
        Runs the module on that.
    settings : dict or None
        Of `quantize_`; None leaves it in float.
    """
    torch.manual_seed(0)
    model, x = build().eval(), given()
    expected_of_float = outputs(model, x, call)
    if settings and any(p.is_floating_point() for p in model.parameters()):
        quantize_(model, **settings)
    path = save_packed(model, folder)
    assert path.stat().st_size == packed_file_bytes(model)
    if (settings or {}).get("codebook") != "entropy":  # coded all together
        listed = sum(row["bytes"] for row in coverage(model))
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert listed + header == path.stat().st_size
    torch.manual_seed(1)
    other = build().eval()
    load_packed_(other, folder)
    state = {
        name: value.clone()
        for name, value in other.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    # A forward may change the state: both from the one that was packed.
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    expected, found = outputs(model, x, call), outputs(other, x, call)
    assert len(found) == len(expected) > 0
    for one, two, full in zip(found, expected, expected_of_float):
        assert same_bits(one, two)
        assert torch.isfinite(one).all() or not torch.isfinite(full).all()
    dequantize_(model, keep_quantized=True)
    expected = {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    expected |= {n: b for n, b in buffers.items() if n in expected}
    assert sorted(state) == sorted(expected)
    for name, value in state.items():
        assert same_bits(value, expected[name]), name
    states, refused = module_states(other)
    assert not refused
    for name, value in module_states(model)[0].items():
        assert encoded(states[name]) == encoded(value)


INPUTS, OUTPUTS = 12, 10


FORMS = {
    "float": None,
    "midtread_4": {"plan_or_bits": 4},
    "midrise_2": {"plan_or_bits": 2, "codebook": "midrise"},
    "midrise_6": {"plan_or_bits": 6, "codebook": "midrise"},
    "ternary": {"plan_or_bits": 1.6},
    "one_bit": {"plan_or_bits": 1},
    "eight": {"plan_or_bits": 8},
    "twelve": {"plan_or_bits": 12},
    "sixteen": {"plan_or_bits": 16},
    "channels": {"plan_or_bits": 3, "granularity": "channel"},
    "slices": {"plan_or_bits": 4, "rows": 5, "codebook": "midrise"},
    "entropy_2": {"plan_or_bits": 2, "codebook": "entropy"},
    "entropy_6": {"plan_or_bits": 6, "codebook": "entropy"},
}


def small_separator(seed=0, scale_inputs=False):
    """A module with a `mask_net` of two blocks, norms folded and uneven."""
    torch.manual_seed(seed)
    model = torch.nn.Module()
    model.mask_net = mask_network(
        INPUTS,
        OUTPUTS,
        channels=8,
        hidden=16,
        blocks=2,
        layers=2,
        scale_inputs=scale_inputs,
    )
    for parent in list(model.mask_net.children()):
        for name in ("norm_in", "norm_out"):
            if hasattr(parent, name):
                affine = ChannelAffine(16)
                affine.weight.data.uniform_(0.5, 2.0)
                affine.bias.data.normal_(0.0, 0.5)
                setattr(parent, name, affine)
    if scale_inputs:
        model.mask_net.scale_in.weight.data[::2] = 8.0
    return model.eval().requires_grad_(False)


def packed(folder, form, scale_inputs=False, model=None):
    """Pack a small separator in one of the FORMS; the quantized module."""
    model = model or small_separator(scale_inputs=scale_inputs)
    if FORMS[form]:
        quantize_(model, **FORMS[form])
    save_packed(model, folder)
    return model


def mask_inputs(batch=1, frames=40, seed=1):
    """What the mask network reads."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, INPUTS, frames, generator=generator)


SMALL_SIZES = {"channels": 8, "hidden": 16, "blocks": 1, "layers": 2}


def small_models(folder):
    """The same small model at two budgets."""
    loaded = {}
    for bits in (8, 2):
        separator = build_separator(
            "hparams/models/separator_mini.yaml", **SMALL_SIZES
        )
        fold_norms_(separator.eval())
        quantize_(separator, bits)
        packed = folder / f"bits{bits}"
        save_separator(separator, packed)
        loaded[f"{bits} bit"] = QuantizedSeparator.from_pretrained(packed)
    return loaded


def audio_bytes(seconds=1.0, channels=7, rate=16000):
    """A WAV file of noise."""
    rng = np.random.default_rng(0)
    signal = 0.1 * rng.standard_normal((int(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, signal, rate, format="WAV")
    return file.getvalue()


def small_demo(models, folder):
    """A demo with one recording, whose name is no HTML."""
    demo = Demo(models, folder)
    path = folder / "built_in.wav"
    path.write_bytes(audio_bytes())
    alone = folder / "alone.wav"
    alone.write_bytes(audio_bytes(channels=1))
    demo.add_recording(
        path, "a <b>mixture</b>", [60.0, 120.0], talkers={60.0: alone}
    )
    return demo


@contextmanager
def served(demo):
    """The demo's server, in a thread."""
    with serve(demo) as server:
        thread = threading.Thread(
            target=server.serve_forever, args=[0.02], daemon=True
        )
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


TINY_RECIPE = Path(__file__).parent / "data/tiny_recipe"
PLAIN = (TINY_RECIPE / "train.yaml").read_text(encoding="utf-8")
UNIFORM = """
quantizer: !new:speechbrain_mpq.Quantizer
    targets: !ref <modules>
    bits: 4
"""


LEARNED = """
quantizer: !new:speechbrain_mpq.LearnedBits
    targets: !ref <modules>
    bits: 4
    interval: 2
    decisions: 2
"""


OPTIMIZER = "opt_class: !name:torch.optim.AdamW\n"
LEARNING = """opt_class: !name:speechbrain_mpq.learn_bits
    quantizer: !ref <quantizer>
    opt_class: !name:torch.optim.AdamW
"""


def script():
    """The recipe's train.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "tiny_train", TINY_RECIPE / "train.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quantized_yaml(kind):
    """Text of the hparams file: plain, uniform or learned."""
    if kind == "learned":
        assert OPTIMIZER in PLAIN
        return PLAIN.replace(OPTIMIZER, LEARNING) + LEARNED
    return PLAIN + {"plain": "", "uniform": UNIFORM}[kind]


def hparams_of(kind, folder, **overrides):
    """Freshly built hparams of the recipe."""
    overrides["output_folder"] = str(folder)
    return load_hyperpyyaml(quantized_yaml(kind), overrides)


def brain_of(hparams, **run_opts):
    """A Brain as the script makes it."""
    return script().TinyASR(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts={"device": "cpu", "noprogressbar": True, **run_opts},
        checkpointer=hparams["checkpointer"],
    )


def train_tiny(kind, folder, epochs=2, run_opts=None, **overrides):
    """A trained Brain, and its hparams."""
    hparams = hparams_of(kind, folder, epochs=epochs, **overrides)
    brain = brain_of(hparams, **(run_opts or {}))
    fit(brain, hparams)
    return brain, hparams


def fit(brain, hparams):
    """Train as the script does."""
    dataset, options = script().dataset, {"batch_size": 4}
    brain.fit(
        hparams["epoch_counter"],
        dataset(hparams["items"], seed=1),
        dataset(4, seed=2),
        train_loader_kwargs=dict(options),
        valid_loader_kwargs=dict(options),
    )


# Tiny folders that SpeechBrain's from_hparams loads, with random weights
PRETRAINER = """
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
"""

FEATURES = """
sample_rate: 16000
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: 8
"""

CTC = """
layers: !new:speechbrain.nnet.containers.LengthsCapableSequential
    - !new:speechbrain.nnet.RNN.LSTM
        input_size: 8
        hidden_size: 12
    - !new:speechbrain.nnet.linear.Linear
        input_size: 12
        n_neurons: 5
log_softmax: !new:speechbrain.nnet.activations.Softmax
    apply_log: True
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    compute_features: !ref <compute_features>
    layers: !ref <layers>
    log_softmax: !ref <log_softmax>
modules:
    encoder: !ref <encoder>  # a comment that stays
tokenizer: !new:speechbrain.dataio.encoder.CTCTextEncoder
decoding_function: !name:speechbrain.decoders.ctc_greedy_decode
    blank_id: 0
"""

ATTENTION = """
layers: !new:speechbrain.nnet.RNN.LSTM
    input_size: 8
    hidden_size: 12
embedding: !new:speechbrain.nnet.embedding.Embedding
    num_embeddings: 5
    embedding_dim: 4
attention: !new:speechbrain.nnet.RNN.AttentionalRNNDecoder
    enc_dim: 12
    input_size: 4
    rnn_type: gru
    attn_type: content
    hidden_size: 10
    attn_dim: 6
    num_layers: 1
output: !new:speechbrain.nnet.linear.Linear
    input_size: 10
    n_neurons: 5
model: !new:torch.nn.ModuleList
    - [!ref <layers>, !ref <embedding>, !ref <attention>, !ref <output>]
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    compute_features: !ref <compute_features>
    layers: !ref <layers>
decoder: !new:speechbrain.decoders.S2SRNNGreedySearcher
    embedding: !ref <embedding>
    decoder: !ref <attention>
    linear: !ref <output>
    bos_index: 0
    eos_index: 0
    min_decode_ratio: 0.0
    max_decode_ratio: 0.1
modules:
    encoder: !ref <encoder>
    decoder: !ref <decoder>
tokenizer: !new:tokenizer_of_the_test.Letters
"""

CLASSES = """
normalize: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: 8
    channels: [8, 8, 8, 8, 24]
    kernel_sizes: [5, 3, 3, 3, 1]
    dilations: [1, 2, 3, 4, 1]
    attention_channels: 4
    res2net_scale: 2
    se_channels: 4
    lin_neurons: 6
classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: 6
    out_neurons: 3
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <normalize>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder
"""

SEPARATION = """
sample_rate: 16000
num_spks: 2
encoder: !new:speechbrain.lobes.models.dual_path.Encoder
    kernel_size: 16
    out_channels: 8
block: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
    num_layers: 1
    d_model: 8
    nhead: 2
    d_ffn: 16
masknet: !new:speechbrain.lobes.models.dual_path.Dual_Path_Model
    num_spks: 2
    in_channels: 8
    out_channels: 8
    num_layers: 1
    K: 20
    intra_model: !ref <block>
    inter_model: !ref <block>
    norm: ln
decoder: !new:speechbrain.lobes.models.dual_path.Decoder
    in_channels: 8
    out_channels: 1
    kernel_size: 16
    stride: 8
    bias: False
modules:
    encoder: !ref <encoder>
    masknet: !ref <masknet>
    decoder: !ref <decoder>
"""

TOKENIZER = """
class Letters:
    def decode_ids(self, ids):
        return " ".join("_abcd"[i] for i in ids)
"""


def write_source(folder, hparams, loadables, others=()):
    """A folder that from_hparams loads, with random weights."""
    names = (*loadables, *others)
    lines = "".join(f"        {name}: !ref <{name}>\n" for name in names)
    text = hparams + PRETRAINER + lines
    folder.mkdir()
    (folder / "hyperparams.yaml").write_text(text)
    torch.manual_seed(0)
    loaded = load_hyperpyyaml(text)
    for name in loadables:
        torch.save(loaded[name].state_dict(), folder / f"{name}.ckpt")
    for name in others:
        labels = list("_abc ") if "tokenizer" in name else ["x", "y", "z"]
        loaded[name].update_from_iterable(labels, sequence_input=False)
        loaded[name].save(folder / f"{name}.ckpt")


ROOT = Path(__file__).parents[1]


TINY = ROOT / "tests/data/separator_tiny.yaml"
CORPUS = {"train": 24, "valid": 8, "test": 40}  # what all tests together need
ROOMS = {"train": 8, "valid": 6, "test": 6}
TINY_SIZES = {
    "utterances": {"train": 24, "valid": 8, "test": 12},
    "rooms": ROOMS,
    "mixtures": {"train": 16, "valid": 4, "test": 8},
    "number_of_epochs": 2,
    "calibration_mixtures": 2,
    "chunk_seconds": 1.0,
    "batch_size": 4,
    "examples": 0,
    "workers": 1,
}


def load_script(path):
    """A script of the repository as a module, known by a name of its own."""
    path = ROOT / path
    name = re.sub(r"\W", "_", str(path.relative_to(ROOT).with_suffix("")))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # whose file the experiment's folder copies
    spec.loader.exec_module(module)
    return module


# It asks pip for all packages
environment = functools.cache(get_environment_description)


@contextmanager
def like_a_process(script, arguments=(), folder=ROOT):
    """What a process has of its own is, inside, a script's; what it prints."""
    state = os.getcwd(), sys.argv, sys.path[:], sys.excepthook
    root, threads = logging.getLogger(), torch.get_num_threads()
    handlers, level = root.handlers[:], root.level
    os.chdir(folder)
    sys.argv = list(map(str, [script, *arguments]))
    sys.path.insert(0, str((ROOT / script).parent))
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    name = "speechbrain.utils.logger.get_environment_description"
    patch.setattr(name, environment)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield printed
    finally:
        patch.undo()
        os.chdir(state[0])
        sys.argv, sys.path[:], sys.excepthook = state[1:]
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        torch.set_num_threads(threads)
        torch.compiler.set_stance("default")


def call(script, *arguments, folder=ROOT, **changes):
    """Run a script's main() with some of its names changed; its output.

    It reads the command line, or takes it as an argument.
    """
    with like_a_process(script, arguments, folder) as printed:
        module = load_script(script)
        vars(module).update(changes)
        takes = module.main.__code__.co_argcount
        module.main(*[sys.argv[1:]] * takes)
    return printed.getvalue()


def flags(options):
    """Options as a command line has them."""
    pairs = ((f"--{key}", str(value)) for key, value in options.items())
    return [part for pair in pairs for part in pair]


def experiment(folder, hparams, **options):
    """Arguments of train.py, with tiny sizes."""
    options = {
        **TINY_SIZES,
        "separator_file": TINY,
        "data_folder": folder / "data",
        "results_folder": folder / "results",
        **options,
    }
    return [f"hparams/{hparams}", "--device=cpu", *flags(options)]


def command(folder, hparams, **options):
    """The whole command line."""
    line = experiment(folder, hparams, **options)
    return [sys.executable, "train.py", *line]


def plan_pictures(patch):
    """Have figures of pages made, but not drawn into images."""
    name = "speechbrain_mpq.evaluation.page._draw_png"
    patch.setattr(name, lambda draw, *colours: draw() and "data:,")


def run(folder, hparams, pictures=False, **options):
    """Run train.py in this process to its end; its output is returned.

    Plots take longer than the rest of a tiny run: unless they are asked for,
    its report has them planned, but not drawn.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            plan_pictures(patch)
        return call("train.py", *experiment(folder, hparams, **options))


def finished(line):
    """Output of a command line that ends well."""
    done = subprocess.run(
        list(map(str, line)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused_run(folder, hparams, **options):
    """Run the command, which must fail; its output is returned."""
    line = command(folder, hparams, **options)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stdout + done.stderr


def quality(path):
    """metrics.json without what depends on the machine's speed."""
    metrics = json.loads((path / "metrics.json").read_text())
    for key in ("wall_seconds", "seconds_per_hour"):
        metrics.pop(key)
    return metrics


def train_losses(folder):
    """Training loss of each epoch in a folder of results."""
    log = (folder / "1234/train_log.txt").read_text()
    return [
        float(line.split("train loss: ")[1].split()[0])
        for line in log.splitlines()
        if "train loss: " in line  # not bits, not what was scored
    ]


def read_rows(dataset="Embedded"):
    """The rows of tests/recipes of a dataset."""
    path = ROOT / f"tests/recipes/{dataset}.csv"
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def last_value(log, variable, epoch):
    """A value that the train log has for an epoch."""
    pattern = rf"epoch: {epoch}\b.*?{variable}: ([-+.\de]+)"
    return float(re.search(pattern, log)[1])


def start_row(row, shared, output, **options):
    """Run a row, with a folder for tests/tmp; its output folder."""
    line = row["test_debug_flags"].replace("tests/tmp", str(shared))
    options = {"output_folder": output, **options}
    line = [*shlex.split(line), "--device=cpu", *flags(options)]
    call(row["Script_file"], row["Hparam_file"], *line)
    return output


def run_row(row, shared):
    """Run a row and check it; its output folder."""
    output = shared / row["Hparam_file"].removesuffix(".yaml")
    start_row(row, shared, output)
    checks = row["test_debug_checks"]
    for name in re.search(r"file_exists=\[(.*?)\]", checks)[1].split(","):
        assert (output / name).exists(), name
    wanted = re.search(r"performance_check=\[(.*?)\]", checks)[1]
    file, variable, limit, epoch = (part.strip() for part in wanted.split(","))
    epoch = int(epoch.removeprefix("epoch: "))
    log = (output / file).read_text()
    last = last_value(log, variable, epoch)
    assert last <= float(limit.removeprefix("<="))
    assert last < last_value(log, variable, 1)
    return output


def published(path):
    """Bytes of a packed folder's file as today's version writes them."""
    content = Path(path).read_bytes()
    if path.name != "hyperparams.yaml":
        return content
    return with_current_names(content.decode()).encode()
