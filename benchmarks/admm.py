"""What ADMM does to a language model, step by step, beside straight-through.

> python benchmarks/admm.py results/lm_lstm/1234 data/sotu --bits 2

Prints, after some of 200 steps, the perplexity of the quantized copy and of
the float weights on a part of the validation sentences, how many weights have
another level than rounding gave them, and how far the float weights have gone.
Settings are those of `ADMMTraining`. One thread; no files are written.
"""

import argparse
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_mpq.decoders.vocabulary import Vocabulary
from speechbrain_mpq.evaluation.task import markdown_lines
from speechbrain_mpq.evaluation.word_tasks import perplexity
from speechbrain_mpq.lobes.models.language_models import TiedRNNLM
from speechbrain_mpq.quantization.admm import ADMM
from speechbrain_mpq.quantization.fake_quant import FakeQuantize
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.quantization.scheme import Scheme
from speechbrain_mpq.quantization.tensors import named_tensors
from speechbrain_mpq.training.admm_training import ADMMTraining

STEPS = 200
SHOWN = (20, 40, 80, 120, 160, 200)
RATE, WARMUP, LAST = 1e-3, 20, 220  # the recipe's schedule when fine-tuning
SENTENCES = {"train": slice(3, None, 8), "valid": slice(None, None, 24)}
WORDS = {"train": 1200, "valid": 2000}  # of a batch
SEEDS = {"train": 0, "valid": 1}  # of the order of batches
CLIP = 5.0
COLUMNS = ("run", "steps", "PPL", "PPL in float", "levels changed", "moved")
RUNS = {  # name -> settings; none: straight through
    "straight through": None,
    "admm": {"penalty": 0.03, "growth": 1.09},
    "constant penalty": {"penalty": 0.03},
    "smaller steps": {"penalty": 0.003, "growth": 1.15, "step": 0.006},
    "longer iterations": {
        "penalty": 0.02,
        "growth": 1.5,
        "step": 0.012,
        "iteration_steps": 50,
    },
    "as printed": {"penalty": 1e-3, "printed": True},
}


def batches(data, split, vocabulary):
    """Batches (tokens, targets), [sentences, words], of alike lengths."""
    lines = (data / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    encode = vocabulary.encode_as_ids
    rows = sorted((encode(x) for x in lines[SENTENCES[split]]), key=len)
    groups, group = [], []
    for row in rows:
        group.append(row)
        if len(group) * (len(row) + 1) >= WORDS[split]:
            groups.append(group)
            group = []
    generator = torch.Generator().manual_seed(SEEDS[split])
    order = torch.randperm(len(groups), generator=generator).tolist()
    return [_padded(groups[i], vocabulary) for i in order]


def _padded(rows, vocabulary):
    """Tokens and targets of a group of sentences."""
    shape = len(rows), max(map(len, rows)) + 1
    tokens = torch.full(shape, vocabulary.pad_index)
    targets = tokens.clone()
    for i, row in enumerate(rows):
        tokens[i, : len(row) + 1] = torch.tensor([vocabulary.bos_index, *row])
        targets[i, : len(row) + 1] = torch.tensor([*row, vocabulary.eos_index])
    return tokens, targets


def loss_of(model, batch):
    """Mean cross-entropy of a batch."""
    tokens, targets = batch
    inside = targets != 0
    logits = model(tokens)[0]
    return torch.nn.functional.cross_entropy(logits[inside], targets[inside])


@torch.no_grad()
def measured(model, data, in_float=False):
    """Perplexity in evaluation mode, of the float weights where asked."""
    model.eval()
    for module in model.modules():
        if isinstance(module, ADMM):
            module.train(in_float)
    nats = words = 0
    for batch in data:
        count = int((batch[1] != 0).sum())
        nats += count * loss_of(model, batch).item()
        words += count
    model.train()
    return perplexity(nats, words)


class Run:
    """One way to train a model at equal bits.

    Arguments
    ---------
    model : TiedRNNLM
        In full precision.
    bits : int
    settings : dict or None
        Of `ADMMTraining`; None: straight through.
    """

    def __init__(self, model, bits, settings):
        self.model = model.train()
        self.admm = settings and ADMMTraining(**settings)
        quantize_(
            model,
            bits,
            exclude=("*bias*",),
            estimator=self.admm.estimator if self.admm else FakeQuantize,
            scheme=Scheme(gates=True),
        )
        tensors = named_tensors(model).values()
        self.tensors = [t for t in tensors if t.fake_quantize is not None]
        self.first = [(t.weight.clone(), self.levels(t)) for t in self.tensors]
        parameters = list(model.parameters())
        if self.admm:
            kind, step = self.admm.kind, self.admm.step
            self.optimizer = kind(parameters, lr=RATE, step=step)
        else:
            self.optimizer = torch.optim.AdamW(
                parameters, lr=RATE, weight_decay=1e-6
            )
        self.brain = SimpleNamespace(
            optimizers_dict={"model": self.optimizer},
            grad_accumulation_factor=1,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
        )
        if self.admm:
            self.admm.start(self.brain, model)

    @staticmethod
    def levels(tensor):
        """Levels that a tensor has when it is read."""
        quantizer = tensor.fake_quantize
        if getattr(quantizer, "started", False):
            return (quantizer.projection / quantizer.alpha).round()
        return quantizer.levels(tensor.weight).detach()

    def gradient(self, batch):
        """Leave the gradient of a batch."""
        self.optimizer.zero_grad()
        loss_of(self.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)

    def step(self, number, batch):
        """A step of training."""
        warm = (number + 1) / WARMUP, (LAST - number) / (LAST - WARMUP)
        self.optimizer.param_groups[0]["lr"] = RATE * min(warm)
        self.gradient(batch)
        if self.admm and self.optimizer.looks_ahead:
            self.optimizer.extrapolate()
            self.gradient(batch)
        self.optimizer.step()
        if self.admm:
            self.admm.after_step(self.brain)

    def cells(self, data):
        """What the table says now."""
        changed = total = moved = power = 0
        for tensor, (weight, levels) in zip(self.tensors, self.first):
            changed += int((self.levels(tensor) != levels).sum())
            total += levels.numel()
            moved += float((tensor.weight - weight).detach().square().sum())
            power += float(weight.square().sum())
        quantized = measured(self.model, data)
        in_float = measured(self.model, data, True) if self.admm else math.nan
        return (
            f"{quantized:.1f}",
            f"{in_float:.1f}",
            f"{100 * changed / total:.1f} %",
            f"{math.sqrt(moved / power):.2f}",
        )


def main():
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="of recipes/SOTU/LM, finished")
    parser.add_argument("data", type=Path, help="prepared corpus")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    vocabulary = Vocabulary.read(options.data / "vocab.txt")
    train, valid = (batches(options.data, x, vocabulary) for x in SENTENCES)
    best = Checkpointer(options.run / "save").find_checkpoint(min_key="PPL")
    state = torch.load(best.paramfiles["model"], weights_only=True)
    vocab, size = state["embedding.Embedding.weight"].shape
    layers = sum("weight_ih" in name for name in state)

    def rows():
        for name in options.only:
            torch.manual_seed(0)
            model = TiedRNNLM(vocab=vocab, size=size, layers=layers)
            model.load_state_dict(state)
            run = Run(model, options.bits, RUNS[name])
            for number in range(STEPS):
                run.step(number, train[number % len(train)])
                if number + 1 in SHOWN:
                    yield name, number + 1, *run.cells(valid)

    for line in markdown_lines(COLUMNS, rows()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
