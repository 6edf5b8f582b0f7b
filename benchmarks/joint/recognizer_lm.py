"""One budget in bytes for a recognizer and the language model behind it.

> python benchmarks/joint/recognizer_lm.py --bytes 515000 \
    --recognizer results/asr_kl/scores.json results/asr/published \
    --lm results/lm_kl/scores.json results/lm/published \
    --sentence 132 12

Each model has a score table, KL divergences of a frame and of a word, and a
folder in full precision, which tells what its file holds beside the weights. A
hypothesis is ranked by the sum of what both models say of a sentence: nats of a
sentence are what their scores have in common, those of a frame times the frames
of a sentence, those of a word times its words (--sentence).

Scores are of clusters that are rounded to nearest, one at a time. What is left
of their sum in a whole network, after calibrated rounding, --left says, and
--measure_recognizer and --measure_lm measure: of a quantized run with its
plan.json, on a manifest of recordings or on a text.

One allocation over the clusters of both makes the plan. The best plan of both
is the best one of each for the bytes that it gets: printed are the budgets that
`python -m speechbrain_mpq.run ... --scores table:file=scores.json --bits BITS`
finds the two with, and what the same bits on average in either would do.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from speechbrain_mpq import HybridASR, LanguageModel
from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.quantization.plan import FLOAT_BYTES, BitPlan
from speechbrain_mpq.utils import read_json, read_text, write_json

MODELS = ("recognizer", "lm")
SENTENCES = 40  # recordings that rounding is measured on
EVERY = 10  # sentence of a text


@dataclass
class Part:
    """One of the two models.

    Arguments
    ---------
    table : ScoreTable
        Without what stays in float.
    outside : int
        Bytes of its file that no plan changes.
    harm : float
        What a nat of its table counts, in nats of a sentence.
    """

    table: ScoreTable
    outside: int
    harm: float = 1.0

    @classmethod
    def read(cls, scores, folder, harm):
        """A part from its files.

        Arguments
        ---------
        scores : str or Path
            scores.json.
        folder : str or Path
            Packed folder in full precision.
        harm : float
            See Part.
        """
        table = replace(ScoreTable.load(scores), rest_parameters=0)
        size = Path(folder, "model.safetensors").stat().st_size
        outside = size - FLOAT_BYTES * sum(table.parameters.values())
        if outside < 0:
            raise ValueError(
                f"{folder} is smaller than the weights that {scores} is of: "
                "name the folder of this model in full precision"
            )
        return cls(table, outside, harm)

    def plan_of(self, bits):
        """Clusters of the plan for so many bits on average."""
        return allocate_bits(self.table, average_bits=bits, min_bits=1).clusters


def merged(parts):
    """One score table of all parts, in nats of a sentence.

    Arguments
    ---------
    parts : dict
        Name -> Part.

    Returns
    -------
    ScoreTable
        Clusters have the part's name in front of theirs.
    """
    candidates = set.intersection(
        *(set(part.table.candidate_bits) for part in parts.values())
    )
    rows, tensors, scales = {}, {}, {}
    for name, part in parts.items():
        for cluster, row in part.table.scores.items():
            key = f"{name}.{cluster}"
            rows[key] = {b: part.harm * row[b] for b in candidates}
            tensors[key] = part.table.tensors[cluster]
            scales[key] = part.table.scales[cluster]
    codebooks = {part.table.codebook for part in parts.values()}
    if len(codebooks) > 1:
        raise ValueError(f"tables of different codebooks: {sorted(codebooks)}")
    return ScoreTable(rows, tensors, scales, codebook=codebooks.pop())


def halves(plan, parts):
    """The clusters of each part in a plan of all."""
    return {
        name: {
            cluster.removeprefix(f"{name}."): bits
            for cluster, bits in plan.clusters.items()
            if cluster.startswith(f"{name}.")
        }
        for name in parts
    }


def budget_bits(table, clusters):
    """The budget that `allocate_bits` finds a plan with, in average bits.

    Arguments
    ---------
    table : ScoreTable
    clusters : dict
        Of the plan.

    Returns
    -------
    float
        Between two whole numbers as `allocate_bits` has it: by bytes of the
        uniform plans.
    """
    size = sum(cluster.bytes for cluster in clusters.values())

    def uniform(bits):
        return BitPlan.uniform(clusters, bits, 0, table.codebook).bytes

    low = max(bits for bits in range(1, 17) if uniform(bits) <= size)
    share = (size - uniform(low)) / (uniform(low + 1) - uniform(low))
    return low + share


def shared(parts, budget):
    """The plan of one budget, and how two other ways share it.

    Arguments
    ---------
    parts : dict
        Name -> Part.
    budget : int
        Bytes of both files.

    Returns
    -------
    dict
        Way -> part -> "bits" (the budget), "bytes" of the file and "harm" in
        nats of a sentence. Ways are "joint" and "equal": the same average
        bits in either.
    """
    outside = sum(part.outside for part in parts.values())
    whole = allocate_bits(
        merged(parts), budget_bytes=budget - outside, min_bits=1
    )
    ways = {"joint": halves(whole, parts)}
    weights = sum(
        c.parameters for half in ways["joint"].values() for c in half.values()
    )
    average = 8 * (budget - outside) / weights
    ways["equal"] = {
        name: part.plan_of(average) for name, part in parts.items()
    }
    return {
        way: {name: _row(parts[name], half) for name, half in plans.items()}
        for way, plans in ways.items()
    }


def _row(part, clusters):
    """What is told of one model's plan."""
    scores = part.table.scores
    return {
        "bits": budget_bits(part.table, clusters),
        "bytes": part.outside + sum(c.bytes for c in clusters.values()),
        "harm": part.harm
        * sum(scores[name][c.bits] for name, c in clusters.items()),
        "clusters": {name: c.bits for name, c in clusters.items()},
    }


def predicted(table, run):
    """Sum of the scores of a quantized run's plan."""
    plan = BitPlan.load(Path(run, "plan.json")).clusters
    return sum(row[plan[name].bits] for name, row in table.scores.items())


@torch.inference_mode()
def frame_divergence(full, rounded, wavs):
    """KL divergence of a frame's outputs from those in full precision.

    Arguments
    ---------
    full, rounded : HybridASR
    wavs : iterable of torch.Tensor
        [samples] each.

    Returns
    -------
    float
        Nats.
    """
    total, frames = 0.0, 0
    for wav in wavs:
        p, q = (
            torch.from_numpy(model.outputs(wav[None])[0]).double()
            for model in (full, rounded)
        )
        total += float((p.exp() * (p - q)).sum())
        frames += len(p)
    return total / frames


def word_divergence(full, rounded, sentences):
    """How much less log-probability a word of a text has.

    Arguments
    ---------
    full, rounded : LanguageModel
    sentences : list of str

    Returns
    -------
    float
        Nats; what KL divergence is the expectation of.
    """
    totals = []
    for model in (full, rounded):
        rows = model.score(sentences)
        words = sum(len(row.log_probs) for row in rows)
        totals.append(sum(float(sum(row.log_probs)) for row in rows) / words)
    return totals[0] - totals[1]


def left_of(options):
    """What is left of each model's scores, given or measured."""
    left = dict(zip(MODELS, options.left))
    if options.measure_recognizer:
        run, manifest = options.measure_recognizer
        full, rounded = (
            HybridASR.from_pretrained(folder)
            for folder in (options.recognizer[1], Path(run, "published"))
        )
        entries = list(read_json(manifest).values())[:SENTENCES]
        root = str(Path(manifest).parent)
        wavs = [
            full.read(entry["wav"].replace("{data_root}", root))
            for entry in entries
        ]
        left["recognizer"] = frame_divergence(full, rounded, wavs) / predicted(
            ScoreTable.load(options.recognizer[0]), run
        )
    if options.measure_lm:
        run, text = options.measure_lm
        full, rounded = (
            LanguageModel.from_pretrained(folder)
            for folder in (options.lm[1], Path(run, "published"))
        )
        sentences = read_text(text).splitlines()[::EVERY]
        left["lm"] = word_divergence(full, rounded, sentences) / predicted(
            ScoreTable.load(options.lm[0]), run
        )
    return left


def read_options(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    model = {"metavar": ("SCORES", "FOLDER"), "nargs": 2, "required": True}
    add("--recognizer", **model)
    add("--lm", **model)
    add("--bytes", type=int, required=True, help="of both files")
    add(
        "--sentence",
        type=float,
        nargs=2,
        default=(132, 12),
        metavar=("FRAMES", "WORDS"),
    )
    add("--left", type=float, nargs=2, default=(1.0, 1.0), metavar="SHARE")
    add("--measure_recognizer", nargs=2, metavar=("RUN", "MANIFEST"))
    add("--measure_lm", nargs=2, metavar=("RUN", "TEXT"))
    add("--out", type=Path, help="JSON")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Share the budget, and print how."""
    options = read_options(arguments)
    torch.set_num_threads(1)
    left = left_of(options)
    parts = {
        name: Part.read(*getattr(options, name), count * left[name])
        for name, count in zip(MODELS, options.sentence, strict=True)
    }
    ways = shared(parts, options.bytes)
    print(f"left of the scores: {left}")
    for way, rows in ways.items():
        size = sum(row["bytes"] for row in rows.values())
        harm = sum(row["harm"] for row in rows.values())
        print(f"{way}: {size} bytes, {harm:.3f} nats a sentence")
        for name, row in rows.items():
            print(
                f"  {name}: --bits {row['bits']:.5f}, {row['bytes']} bytes, "
                f"{row['harm']:.3f} nats"
            )
    if options.out:
        write_json(options.out, {"left": left, "ways": ways})


if __name__ == "__main__":
    main()
