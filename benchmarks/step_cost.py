"""What a quantizer costs in a training step of four kinds of models.

> python benchmarks/step_cost.py

Models of speechbrain.lobes at small sizes, where the share is largest, on
random input: an ECAPA-TDNN, a Conformer with a decoder, a recurrent CRDNN and
a Conv-TasNet. A step is what `Brain.fit_batch` does: forward, loss, backward,
clipping, Adam. Plain and quantized models ("weights": the block of
docs/plug-in.md, `vectors: False`; "all": biases and norms too) step in turns;
what is compared is CPU time of the process, every step with the plain one of
its own turn (see plug_in_cost.py).
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from plug_in import setting
from plug_in_cost import compared, in_turns
from speechbrain.lobes.models.conv_tasnet import Decoder, Encoder, MaskNet
from speechbrain.lobes.models.CRDNN import CRDNN
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR

from speechbrain_mpq import Quantizer
from speechbrain_mpq.utils import write_json

ROOT = Path(__file__).parents[1]
BLOCKS = {
    "plain": None,
    "weights": partial(Quantizer, bits=4, vectors=False, unreached="ignore"),
    "all": partial(Quantizer, bits=4, unreached="ignore"),
}
CLIP = 5.0  # SpeechBrain's max_grad_norm


def ecapa(batch):
    """Embeddings of 2 seconds, and a classifier of 100 speakers."""
    sizes = {"channels": [128] * 4 + [384], "attention_channels": 64}
    modules = torch.nn.ModuleDict(
        {
            "embedding": ECAPA_TDNN(80, lin_neurons=64, **sizes),
            "classifier": Classifier(64, out_neurons=100),
        }
    )
    x, target = torch.randn(batch, 200, 80), torch.randint(100, (batch,))

    def loss():
        scores = modules["classifier"](modules["embedding"](x)).squeeze(1)
        return torch.nn.functional.cross_entropy(scores, target)

    return modules, loss


def conformer(batch):
    """Six layers and a decoder of two, on 6 seconds after the front end."""
    model = TransformerASR(
        tgt_vocab=100,
        input_size=160,
        d_model=96,
        nhead=4,
        num_encoder_layers=6,
        num_decoder_layers=2,
        d_ffn=384,
        encoder_module="conformer",
        attention_type="RelPosMHAXL",
        normalize_before=True,
    )
    x, tokens = torch.randn(batch, 150, 160), torch.randint(1, 100, (batch, 20))

    def loss():
        encoded, decoded = model(x, tokens, torch.ones(batch))
        return encoded.square().mean() + decoded.square().mean()

    return torch.nn.ModuleDict({"transformer": model}), loss


def crdnn(batch):
    """Convolutions, a bidirectional LSTM and linear layers, 2 seconds."""
    model = CRDNN(
        input_shape=[None, None, 40],
        cnn_blocks=1,
        cnn_channels=(16,),
        rnn_layers=2,
        rnn_neurons=128,
        rnn_bidirectional=True,
        dnn_blocks=1,
        dnn_neurons=128,
    )
    x = torch.randn(batch, 200, 40)
    return torch.nn.ModuleDict({"crdnn": model}), lambda: model(
        x
    ).square().mean()


def conv_tasnet(batch):
    """Two talkers at 8 kHz, 2 seconds."""
    modules = torch.nn.ModuleDict(
        {
            "encoder": Encoder(16, 128),
            "masks": MaskNet(128, 64, 128, 3, 4, 2),
            "decoder": Decoder(16, 128),
        }
    )
    x = torch.randn(batch, 16000)

    def loss():
        mixture = modules["encoder"](x)
        masked = mixture.unsqueeze(0) * modules["masks"](mixture)
        return sum(modules["decoder"](one).square().mean() for one in masked)

    return modules, loss


MODELS = {
    "ecapa": (ecapa, 32),
    "conformer": (conformer, 16),
    "crdnn": (crdnn, 16),
    "conv_tasnet": (conv_tasnet, 4),
}


def stepper(make, batch, block):
    """A model's step."""
    torch.manual_seed(0)
    modules, loss = make(batch)
    if block:
        block(modules)
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-4)

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return modules, step


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--batch", type=int, help="instead of the usual ones")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/step_cost.json"
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Measure, print, write."""
    options = parse(arguments)
    torch.set_num_threads(1)
    report = {**setting(), "rounds": options.rounds, "models": {}}
    for name in options.models:
        make, batch = MODELS[name]
        batch = options.batch or batch
        made = {k: stepper(make, batch, block) for k, block in BLOCKS.items()}
        steps = {key: step for key, (_, step) in made.items()}
        rows = compared(in_turns(steps, options.rounds))
        parameters = [p.numel() for p in made["plain"][0].parameters()]
        size = {"parameters": sum(parameters), "tensors": len(parameters)}
        report["models"][name] = {**size, "batch": batch, **rows}
        for key, row in rows.items():
            low, high = row["quartiles"]
            print(
                f"{name:12}{key:8}{1000 * row['seconds']:8.0f} ms CPU a step"
                f"{row['more_percent']:+7.1f} % ({low:+.1f} to {high:+.1f})",
                flush=True,
            )
    write_json(options.out, report)


if __name__ == "__main__":
    main()
