"""What a quantizer costs in a training step of four kinds of models.

> python benchmarks/step_cost.py --models ecapa

Models as SpeechBrain's recipes build them (VoxCeleb ECAPA-TDNN, LibriSpeech
Conformer-small and RNNLM, WSJ0Mix Conv-TasNet), with batches that one CPU
thread has time for, on random input; and small ones ("tiny"), where the share
is largest. A step is what `Brain.fit_batch` does: forward, loss, backward,
clipping, Adam. All systems step in turns; what is compared is CPU time of the
process, every step with the plain one of its own turn (see plug_in_cost.py).

Systems: "log_step" is the block of docs/plug-in.md with `vectors: False` and
the default estimator, "learned_step", "straight_through" and "admm" the same
with another one; "all" quantizes biases and norms, too. "machinery" attaches
quantizers that pass the weight on: what is left is quantizing itself.
"parametrize" is torch's parametrization with the same, without this package's
reading once in a forward.

With --memory every system takes two steps in a process of its own, and the
peak of its memory above what was there before the model is given.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from plug_in import setting
from plug_in_cost import compared, in_turns, mib
from speechbrain.lobes.models import conv_tasnet, dual_path
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
from speechbrain.lobes.models.RNNLM import RNNLM
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.losses import get_si_snr_with_pitwrapper
from torch.nn.functional import cross_entropy, ctc_loss
from torch.nn.utils import parametrize

from speechbrain_mpq import Quantizer
from speechbrain_mpq.quantization.admm import ADMM
from speechbrain_mpq.quantization.fake_quant import (
    FakeQuantize,
    LearnedStep,
    LogStep,
)
from speechbrain_mpq.quantization.tensors import named_tensors
from speechbrain_mpq.training.admm_training import AdamExtraGradient
from speechbrain_mpq.utils import write_json

ROOT = Path(__file__).parents[1]
CLIP = 5.0  # SpeechBrain's max_grad_norm
BITS = 4
ADMM_STEPS = 10  # of an outer iteration, whose share each step is given


class PassedOn(FakeQuantize):
    """A quantizer that does nothing."""

    def forward(self, weight):
        """Passes the weight on."""
        return weight


def ecapa(batch, channels=1024, embedding=192, speakers=7205):
    """VoxCeleb/SpeakerRec/hparams/train_ecapa_tdnn.yaml, 3 seconds."""
    last = 3 * channels
    modules = torch.nn.ModuleDict(
        {
            "embedding_model": ECAPA_TDNN(
                80, channels=[channels] * 4 + [last], lin_neurons=embedding
            ),
            "classifier": Classifier(embedding, out_neurons=speakers),
        }
    )
    x, target = torch.randn(batch, 301, 80), torch.randint(speakers, (batch,))

    def loss():
        scores = modules["classifier"](modules["embedding_model"](x))
        return cross_entropy(30 * scores.squeeze(1), target)

    return modules, loss


def conformer(batch, layers=12, decoder_layers=4, d_model=144, tokens=5000):
    """LibriSpeech/ASR/transformer/hparams/conformer_small.yaml, 6 seconds."""
    front = ConvolutionFrontEnd(
        (8, 10, 80),
        num_blocks=2,
        num_layers_per_block=1,
        out_channels=(64, 32),
        kernel_sizes=(3, 3),
        strides=(2, 2),
        residuals=(False, False),
    )
    transformer = TransformerASR(
        tgt_vocab=tokens,
        input_size=640,
        d_model=d_model,
        nhead=4,
        num_encoder_layers=layers,
        num_decoder_layers=decoder_layers,
        d_ffn=1024 if d_model == 144 else 4 * d_model,
        activation=torch.nn.GELU,
        encoder_module="conformer",
        attention_type="RelPosMHAXL",
        normalize_before=True,
        causal=False,
    )
    heads = {
        name: Linear(input_size=d_model, n_neurons=tokens)
        for name in ("seq_lin", "ctc_lin")
    }
    parts = {"CNN": front, "Transformer": transformer, **heads}
    modules = torch.nn.ModuleDict(parts)
    x, words = (
        torch.randn(batch, 601, 80),
        torch.randint(3, tokens, (batch, 20)),
    )
    lengths = torch.full((batch,), 20)

    def loss():
        encoded, decoded = transformer(
            front(x), words, torch.ones(batch), pad_idx=0
        )
        log_p = modules["ctc_lin"](encoded).log_softmax(-1).transpose(0, 1)
        frames = torch.full((batch,), len(log_p))
        by_word = modules["seq_lin"](decoded).flatten(0, 1)
        ctc = ctc_loss(log_p, words, frames, lengths)
        return 0.3 * ctc + 0.7 * cross_entropy(by_word, words.flatten())

    return modules, loss


def conv_tasnet_(batch, channels=256, hidden=512, blocks=6, repeats=4):
    """WSJ0Mix/separation/hparams/convtasnet.yaml, 4 seconds at 8 kHz."""
    masks = conv_tasnet.MaskNet(
        N=channels,
        B=channels,
        H=hidden,
        P=3,
        X=blocks,
        R=repeats,
        C=2,
        norm_type="gLN",
        causal=True,
        mask_nonlinear="relu",
    )
    modules = torch.nn.ModuleDict(
        {
            "encoder": dual_path.Encoder(16, channels),
            "masknet": masks,
            "decoder": dual_path.Decoder(
                channels, 1, kernel_size=16, stride=8, bias=False
            ),
        }
    )
    x, targets = torch.randn(batch, 32000), torch.randn(batch, 32000, 2)

    def loss():
        mixture = modules["encoder"](x)
        masked = mixture.unsqueeze(0) * modules["masknet"](mixture)
        voices = [modules["decoder"](one) for one in masked]
        return get_si_snr_with_pitwrapper(
            targets, torch.stack(voices, dim=-1)
        ).mean()

    return modules, loss


def lstm(batch, neurons=2048, embedding=128, tokens=1000, length=40):
    """LibriSpeech/LM/hparams/RNNLM.yaml, sentences of 40 tokens."""
    model = RNNLM(
        output_neurons=tokens,
        embedding_dim=embedding,
        rnn_layers=2,
        rnn_neurons=neurons,
        dnn_blocks=1,
        dnn_neurons=512 if neurons == 2048 else neurons,
        dropout=0.0,
    )
    words = torch.randint(tokens, (batch, length + 1))

    def loss():
        scores = model(words[:, :-1]).flatten(0, 1)
        return cross_entropy(scores, words[:, 1:].flatten())

    return torch.nn.ModuleDict({"model": model}), loss


MODELS = {  # name -> how it is made, and its batch
    "ecapa": (ecapa, 8),
    "conformer": (conformer, 8),
    "conv_tasnet": (conv_tasnet_, 1),
    "lstm": (lstm, 20),
    "ecapa_tiny": (
        partial(ecapa, channels=128, embedding=64, speakers=100),
        8,
    ),
    "conformer_tiny": (
        partial(conformer, layers=6, decoder_layers=2, d_model=96, tokens=100),
        4,
    ),
    "conv_tasnet_tiny": (
        partial(conv_tasnet_, channels=64, hidden=128, blocks=4, repeats=2),
        1,
    ),
    "lstm_tiny": (partial(lstm, neurons=256), 20),
}


def weights_of(modules):
    """Attribute and owner of what the block quantizes of the modules."""
    for tensor in named_tensors(modules).values():
        if tensor.weight.dim() > 1:
            yield from tensor.owners


def parametrized_by_torch(modules):
    """Torch's parametrization of the weights, which passes them on."""
    for owner, attribute in list(weights_of(modules)):
        parametrize.register_parametrization(
            owner, attribute, torch.nn.Identity()
        )


def block(estimator=LogStep, vectors=False):
    """A quantizer as a recipe's block makes it."""
    return partial(
        Quantizer,
        bits=BITS,
        vectors=vectors,
        estimator=estimator,
        unreached="ignore",
    )


SYSTEMS = {
    "plain": None,
    "log_step": block(),
    "all": block(vectors=True),
    "straight_through": block(FakeQuantize),
    "learned_step": block(LearnedStep),
    "admm": block(ADMM),
    "machinery": block(PassedOn),
    "parametrize": parametrized_by_torch,
}


def stepper(make, batch, attach, admm=False):
    """A model, and its step."""
    torch.manual_seed(0)
    modules, loss = make(batch)
    if attach:
        attach(modules)
    parameters = list(modules.parameters())
    if admm:
        optimizer, outer = admm_optimizer(modules, parameters)
    else:
        optimizer = torch.optim.Adam(parameters, lr=1e-4)
        outer = None

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if outer:
            outer()

    return modules, step


def admm_optimizer(modules, parameters):
    """ADMM's optimizer and outer iterations, as `ADMMTraining` has them."""
    optimizer = AdamExtraGradient(parameters)
    tensors = [t for t in named_tensors(modules).values() if t.fake_quantize]
    for tensor in tensors:
        tensor.fake_quantize.start(tensor.weight)
        own = [(tensor.rows, tensor.fake_quantize)]
        optimizer.estimators[tensor.parameter] = own
    optimizer.penalty, count = 1e-3, 0

    def outer():
        nonlocal count
        count += 1
        if count % ADMM_STEPS == 0:
            for tensor in tensors:
                tensor.fake_quantize.iterate(tensor.weight)

    return optimizer, outer


def made(name, batch, system):
    """A model, quantized or not, and its step."""
    make, usual = MODELS[name]
    admm = system == "admm"
    return stepper(make, batch or usual, SYSTEMS[system], admm)


def peak_mib(options, name, system):
    """The most memory of two steps in a process of its own, MiB."""
    command = [sys.executable, __file__, "--models", name]
    command += ["--systems", system, "--one_peak"]
    if options.batch:
        command += ["--batch", str(options.batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one_peak(options):
    """Print the peak of this process."""
    before = mib("VmRSS")
    (name,), (system,) = options.models, options.systems
    _, step = made(name, options.batch, system)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    step()
    print(json.dumps(mib("VmHWM") - before))


def measure(options, name):
    """All systems of one model."""
    make, usual = MODELS[name]
    steps, sizes = {}, {}
    for system in options.systems:
        modules, steps[system] = made(name, options.batch, system)
        if system == "plain":
            counts = [p.numel() for p in modules.parameters()]
            sizes = {"parameters": sum(counts), "tensors": len(counts)}
            sizes["quantized"] = len(list(weights_of(modules)))
    rows = compared(in_turns(steps, options.rounds))
    steps.clear()
    for system, row in rows.items():
        low, high = row["quartiles"]
        line = f"{name:17}{system:17}{1000 * row['seconds']:8.0f} ms CPU a step"
        line += f"{row['more_percent']:+7.1f} % ({low:+.1f} to {high:+.1f})"
        if options.memory:
            row["peak_mib"] = peak_mib(options, name, system)
            line += f"{row['peak_mib']:8.0f} MiB"
        print(line, flush=True)
    return {**sizes, "batch": options.batch or usual, **rows}


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=MODELS
    )
    parser.add_argument(
        "--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS
    )
    parser.add_argument(
        "--batch", type=int, help="instead of the usual ones; ecapa needs 2"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one_peak", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/step_cost.json"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds: quartiles take two or more")
    return options


def main(arguments=None):
    """Measure, print, write."""
    options = parse(arguments)
    torch.set_num_threads(1)
    if options.one_peak:
        return one_peak(options)
    report = {**setting(), "rounds": options.rounds, "models": {}}
    for name in options.models:
        report["models"][name] = measure(options, name)
    write_json(options.out, report)


if __name__ == "__main__":
    main()
