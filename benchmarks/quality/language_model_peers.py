"""Other tools at two bits on the language models: HQQ and torchao's PARQ.

> python benchmarks/quality/language_model_peers.py \
    recipes/SOTU/LM/hparams/lstm.yaml --data_folder data/sotu \
    --start_from results/lm_lstm/1234

They know linear layers only: every matrix of the LSTM and the tied embedding
are given to them as such, biases stay in float32. HQQ needs no training, PARQ
takes the steps that the fine-tuned rows of `language_models.py` take. GPTQ is
a row there, `calibrated_node_midrise_uniform_2`. Bytes are those of a
safetensors file that is read again. HQQ and torchao: `requirements.txt`.
"""

import argparse
import json
import runpy
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from language_models import KEPT, TRAINING, few_sentences
from speechbrain import Stage
from speechbrain.dataio.dataloader import make_dataloader
from stored import fill_, store_rows
from tqdm import tqdm

from speechbrain_mpq.decoders.text_corpus import read_corpus
from speechbrain_mpq.inference.language_model import LanguageModel
from speechbrain_mpq.training.checkpoints import load_best_
from speechbrain_mpq.utils import read_json, write_json

BITS = 2
MAX_GRAD_NORM = 5.0  # SpeechBrain's default


class Workbench:
    """The model in full precision and its data.

    Arguments
    ---------
    hparams_file : str
        Of `recipes/SOTU/LM`.
    data : Path
        Prepared corpus.
    start : Path
        Output folder of the model in full precision.
    work : Path
        For what is written on the way.
    seed : int
    """

    def __init__(self, hparams_file, data, start, work, seed=1234):
        script = Path(hparams_file).parents[1] / "train.py"
        self.recipe = runpy.run_path(str(script))
        self.start, self.work = start, work
        self.corpus, self.vocabulary = read_corpus(data)
        options = dict(zip(TRAINING[::2], TRAINING[1::2]))
        self.overrides = {
            **{key[2:]: json.loads(value) for key, value in options.items()},
            "data_folder": str(few_sentences(data)),
            "output_folder": str(work),
            "seed": seed,
        }
        self.steps = self.overrides["training_steps"]
        self.hparams_file = hparams_file

    def hparams(self):
        """Hyperparameters with the trained model, anew each time."""
        with open(self.hparams_file, encoding="utf-8") as file:
            hparams = load_hyperpyyaml(file, self.overrides)
        load_best_(hparams["model"], self.start, "", name="model", key="PPL")
        hparams["model"].eval()
        return hparams

    def perplexity(self, model):
        """Of the test text, with and without unknown words."""
        lm = LanguageModel(model.eval(), self.vocabulary)
        found = lm.perplexity(self.corpus["test"])
        return {key: found[key] for key in ("ppl", "ppl_known")}


def matrices(model):
    """Names of the parameters that are matrices."""
    return [n for n, p in model.named_parameters() if p.dim() == 2]


def hqq(bench):
    """HQQ with a scale and a zero point for 64 weights."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from peers.hqq import group_size
    from safetensors.torch import save_file

    model = bench.hparams()["model"]
    tensors, values = dict(model.named_parameters()), {}
    for name in matrices(model):
        weight = tensors.pop(name).detach()
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight.data.copy_(weight)
        size = group_size(weight.numel())
        layer = HQQLinear(
            linear,
            BaseQuantizeConfig(nbits=BITS, group_size=size, axis=1),
            compute_dtype=torch.float16,
            device="cpu",
        )
        values[name] = layer.dequantize().float()
        tensors[f"{name}.W_q"] = layer.W_q.data
        for key in ("scale", "zero"):
            tensors[f"{name}.{key}"] = layer.meta[key]
    path = bench.work / "hqq.safetensors"
    save_file({n: t.detach().contiguous() for n, t in tensors.items()}, path)
    fill_(model, values)
    return model, path.stat().st_size


def parq(bench):
    """Training with PARQ's proximal map, four levels a row."""
    from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import UnifQuantizer

    hparams = bench.hparams()
    model = hparams["model"]
    names = matrices(model)
    weights = [model.get_parameter(name) for name in names]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = QuantOptimizer(
        hparams["optimizer"](
            [{"params": others}, {"params": weights, "quant_bits": BITS}]
        ),
        UnifQuantizer(),
        # As for the separator: to the grid over the middle of the training.
        ProxPARQ(
            anneal_start=bench.steps // 10, anneal_end=bench.steps * 3 // 4
        ),
        quant_per_channel=True,
    )
    train_(bench, hparams, optimizer)
    grids = {}
    for name, weight in zip(names, weights):
        levels = optimizer.state[weight]["quants"]
        scale = levels[:, 1] - levels[:, 0]
        grids[name] = BITS, -(2 ** (BITS - 1) - 0.5), scale
    _, size = store_rows(model, grids, bench.work / "parq.safetensors")
    return model, size


def train_(bench, hparams, optimizer):
    """The recipe's training with an optimizer of its own, to the last step."""
    recipe = bench.recipe
    data, _ = recipe["dataio_prep"](hparams)
    brain = recipe["LM"](
        modules=hparams["modules"], hparams=hparams, run_opts={"device": "cpu"}
    )
    options = recipe["train_loader_options"](data["train"], hparams)
    loader = make_dataloader(data["train"], **options)
    torch.manual_seed(hparams["seed"])
    brain.modules.train()
    batches = list(loader)[: bench.steps]
    for step, batch in enumerate(tqdm(batches, "training", mininterval=30)):
        for group in optimizer.param_groups:
            group["lr"] = hparams["lr_schedule"].calculate_lr(step)
        output = brain.compute_forward(batch, Stage.TRAIN)
        brain.compute_objectives(output, batch, Stage.TRAIN).backward()
        parameters = brain.modules.parameters()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    brain.modules.eval()


TOOLS = {tool.__name__: tool for tool in (hqq, parq)}


def main():
    """Run the tools that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hparams", help="recipes/SOTU/LM/hparams/lstm.yaml")
    parser.add_argument("--data_folder", type=Path, required=True)
    parser.add_argument("--start_from", type=Path, required=True)
    parser.add_argument("--work", type=Path, default="results/lm_peers")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--only", nargs="+", choices=TOOLS, default=TOOLS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    bench = Workbench(
        options.hparams,
        options.data_folder,
        options.start_from,
        options.work,
        options.seed,
    )
    name = f"peers_{Path(options.hparams).stem}_{options.seed}.json"
    results = read_json(KEPT / name) if (KEPT / name).exists() else {}
    for tool in options.only:
        model, size = TOOLS[tool](bench)
        results[tool] = {
            **bench.perplexity(model),
            "bytes": size,
            "average_bits": BITS,
        }
        write_json(KEPT / name, results)
        print(f"{tool}: {results[tool]}", flush=True)


if __name__ == "__main__":
    main()
