"""Plans of a hybrid recognizer at equal bytes, without training.

> cd recipes/Embedded/ASR/TDNNF
> python ../../../../benchmarks/quality/recognizer_plans.py \
    ../../../../pretrained/asr_tdnnf hparams/train.yaml \
    --data_folder=data/embedded

For each seed another half of the validation utterances is what KL scores and
calibrated rounding look at, and random plans are drawn anew; the network in
full precision is the same. For each number of bits: the same ones everywhere
("uniform"), and plans by KL, by chance and by KL's scores dealt out in reverse,
all rounded in the same way and tested on the recipe's whole test. p is that of
MAPSSWE against full precision and, for plans, against uniform bits of the same
seed. What --out holds already is not measured again. Options that are not known
here are the recipe's.
"""

import argparse
import random
import statistics
from pathlib import Path

import numpy as np
import speechbrain as sb
import torch
from speechbrain.dataio.dataset import FilteredSortedDynamicItemDataset

from speechbrain_mpq import choose_bits
from speechbrain_mpq.commands.arguments import bits_number
from speechbrain_mpq.evaluation.significance import mapsswe
from speechbrain_mpq.evaluation.task import markdown_table
from speechbrain_mpq.evaluation.wer import WordErrors, word_errors
from speechbrain_mpq.experiments.hybrid_recognition import (
    load_data,
    make_brain,
)
from speechbrain_mpq.inference.loading import load
from speechbrain_mpq.inference.speech_recognition import save_recognizer
from speechbrain_mpq.quantization.plan import Scheme
from speechbrain_mpq.quantization.quant_api import dequantize_
from speechbrain_mpq.training.hparams_source import read_hparams
from speechbrain_mpq.utils import read_json, scratch_folder, write_json

PLANS = ("uniform", "kl", "random", "reversed")
CANDIDATES = (1, 2, 3, 4, 8)
BATCH = 20  # utterances


class Bench:
    """The recognizer in full precision and its test.

    Arguments
    ---------
    hparams : dict
        Of the recipe.
    folder : str or Path
        Published recognizer in full precision.
    options : argparse.Namespace
        codebook and candidates.
    tables : Path
        Folder of the score tables, one for each seed.
    """

    def __init__(self, hparams, folder, options, tables):
        self.hparams, self.scheme = hparams, Scheme(codebook=options.codebook)
        self.candidates, self.tables = options.candidates, tables
        self.data, self.graphs = load_data(hparams)
        self.model = load(folder)  # has no second head, which tests lack too
        self.full = {k: v.clone() for k, v in self.model.state_dict().items()}
        hparams["modules"]["model"] = self.model
        (name,) = hparams["test_sets"]
        options = {"ckpt_prefix": None, "batch_size": BATCH}
        self.test = list(
            self.brain().make_dataloader(
                self.data[name], sb.Stage.TEST, **options
            )
        )

    def brain(self):
        """A Brain that has chosen nothing yet, of the weights as they are."""
        return make_brain(self.graphs, self.hparams, {"device": "cpu"})

    def half(self, seed):
        """Half of the validation utterances."""
        data = self.data["valid"]
        keys = sorted(data.data)
        chosen = random.Random(seed).sample(keys, len(keys) // 2)
        return FilteredSortedDynamicItemDataset(data, sorted(chosen))

    def scores(self, plan, seed):
        """What `choose_bits` is asked for."""
        table = self.tables / f"{seed}/scores.json"
        stored = f"file={table}"
        return {
            "uniform": "uniform",
            "kl": f"table:{stored}" if table.exists() else "kl",
            "random": f"random:seed={seed}",
            "reversed": f"reversed:{stored}",
        }[plan]

    def quantize(self, plan, bits, seed):
        """Quantize the network in place; bytes of what is published."""
        dequantize_(self.model)
        self.model.load_state_dict(self.full)
        scores = self.scores(plan, seed)
        with scratch_folder() as folder:
            choose_bits(
                self.brain(),
                self.half(seed),
                scores,
                bits,
                scheme=self.scheme,
                loader_kwargs={"batch_size": BATCH},
                candidate_bits=self.candidates,
                min_bits=1,
                method="post_training",
                folder=self.tables / f"{seed}" if scores == "kl" else folder,
            )
            packed = save_recognizer(
                self.model,
                Path(folder, "packed"),
                self.graphs.lexicon,
                self.hparams["ngram_file"],
            )
            return (packed / "model.safetensors").stat().st_size

    @torch.inference_mode()
    def recognize(self):
        """Words of the whole test, id -> (reference, hypothesis)."""
        brain = self.brain()
        brain.modules.eval()
        brain.on_stage_start(sb.Stage.TEST, None)
        for batch in self.test:
            outputs = brain.compute_forward(batch, sb.Stage.TEST)
            brain.compute_objectives(outputs, batch, sb.Stage.TEST)
        return {
            item["id"]: (item["reference"], item["hypothesis"])
            for item in brain.items
        }


def error_rate(items):
    """Word error rate in percent."""
    errors = (word_errors(*pair) for pair in items.values())
    return sum(errors, WordErrors()).rate


def against(items, rival):
    """p of MAPSSWE of two systems."""
    rows = ((items[k][0], rival[k][1], items[k][1]) for k in items)
    return mapsswe(rows).p


def measure(bench, options, kept, save):
    """Measure what is missing among the results.

    Arguments
    ---------
    bench : Bench
    options : argparse.Namespace
        bits, seeds and plans.
    kept : dict
        "full" -> words; "bits/seed/plan" -> "bytes" and "items". Filled.
    save : callable
        Called after each system.
    """
    if "full" not in kept:
        kept["full"] = bench.recognize()
        save()
    for bits in options.bits:
        for seed in options.seeds:
            for plan in options.plans:
                key = f"{bits:g}/{seed}/{plan}"
                if key in kept:
                    continue
                size = bench.quantize(plan, bits, seed)
                kept[key] = {"bytes": size, "items": bench.recognize()}
                save()
                print(key, size, error_rate(kept[key]["items"]), flush=True)


def rows_of(kept):
    """Bytes, word errors and p of every system.

    Arguments
    ---------
    kept : dict
        From `measure`.

    Returns
    -------
    list of dict
    """
    rows = []
    for key, system in kept.items():
        if key == "full":
            continue
        bits, seed, plan = key.split("/")
        row = {"bits": float(bits), "seed": int(seed), "plan": plan}
        row |= {"bytes": system["bytes"], "wer": error_rate(system["items"])}
        row["p_full"] = against(system["items"], kept["full"])
        uniform = kept.get(f"{bits}/{seed}/uniform")
        if uniform and plan != "uniform":
            row["p_uniform"] = against(system["items"], uniform["items"])
        rows.append(row)
    return rows


def table(rows, full):
    """Means over the seeds as a table in Markdown."""
    heads = ("bits", "plan", "bytes", "WER % (seeds)", "p full", "p uniform")
    kinds = sorted({(row["bits"], PLANS.index(row["plan"])) for row in rows})
    lines = []
    for bits, number in kinds:
        plan = PLANS[number]
        own = [r for r in rows if (r["bits"], r["plan"]) == (bits, plan)]
        own.sort(key=lambda row: row["seed"])
        mean = statistics.mean(row["wer"] for row in own)
        each = ", ".join(f"{row['wer']:.2f}" for row in own)
        ps = [
            ", ".join(f"{row[k]:.2g}" for row in own if k in row)
            for k in ("p_full", "p_uniform")
        ]
        size = f"{round(np.mean([row['bytes'] for row in own])):,}"
        lines.append([f"{bits:g}", plan, size, f"{mean:.2f} ({each})", *ps])
    text = markdown_table(heads, lines).rstrip()
    return f"full precision: {full:.2f} %\n\n{text}"


def read_options(arguments=None):
    """Options of this script, and the recipe's."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("folder", help="published recognizer in full precision")
    add("hparams")
    add("--bits", nargs="+", type=bits_number, default=[2, 3, 4])
    add("--candidates", nargs="+", type=bits_number, default=CANDIDATES)
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--plans", nargs="+", default=list(PLANS), choices=PLANS)
    add("--codebook", default="entropy")
    add("--work", type=Path, default=Path("results/recognizer_plans"))
    add("--out", type=Path, help="JSON of the rows")
    return parser.parse_known_args(arguments)


def main(arguments=None):
    """Measure what the command line asks for and print the table."""
    options, extra = read_options(arguments)
    torch.set_num_threads(1)
    path, _, overrides = sb.parse_arguments([options.hparams, *extra])
    hparams = read_hparams(path, overrides)
    hparams["lexicon_file"] = Path(options.folder, "lexicon.txt")
    hparams["ngram_file"] = Path(options.folder, "lm.arpa")
    work = options.work / options.codebook
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(hparams, options.folder, options, work)
    file = work / "items.json"
    kept = read_json(file) if file.exists() else {}
    measure(bench, options, kept, lambda: write_json(file, kept))
    rows = rows_of(kept)
    full = error_rate(kept["full"])
    if options.out:
        write_json(options.out, {"full": full, "rows": rows})
    print(table(rows, full))


if __name__ == "__main__":
    main()
