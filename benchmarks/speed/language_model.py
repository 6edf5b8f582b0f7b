"""Milliseconds a word of rescoring, in PyTorch and with the stored integers.

> python benchmarks/speed/language_model.py recipes/SOTU/LM/data/sotu/test.txt \
    pretrained/lm_sotu_2bit

Lists of 20 hypotheses are made of the sentences of a text: each, and 19 copies
in which one word in five is another. One thread; each system in a process of
its own, turn by turn; medians over the rounds of the processor's time and of
the ratio of a turn, the processor's time to load and the most memory beyond
what importing the libraries takes.
Perplexity is that of the sentences themselves.
"""

import argparse
import importlib
import multiprocessing
import random
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from speechbrain_mpq.decoders.vocabulary import SPECIAL
from speechbrain_mpq.evaluation.task import markdown_lines

HYPOTHESES = 20
CHANGED = 0.2  # of the words of a hypothesis
ENGINES = ("torch", "onnx")
COLUMNS = ("model", "engine", "ms a word", "times", "load s", "MiB", "PPL")


def lists_of(sentences, vocabulary):
    """Lists of hypotheses that are alike, as recognizers give them."""
    chance = random.Random(0)
    lists = []
    for sentence in sentences:
        words = sentence.split()
        lists.append([sentence])
        for _ in range(HYPOTHESES - 1):
            other = [
                chance.choice(vocabulary) if chance.random() < CHANGED else word
                for word in words
            ]
            lists[-1].append(" ".join(other))
    return lists


_held = {}  # what this process measures


def load(folder, engine, sentences):
    """Load a system in this process; what that took, and its perplexity."""
    import torch

    from speechbrain_mpq import LanguageModel
    from speechbrain_mpq.utils import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    importlib.import_module(
        "speechbrain_mpq.inference.engines.integer_onnx"
    )  # what libraries take is not ours
    imported = peak_mib()
    start = time.process_time()
    lm = LanguageModel.from_pretrained(folder, engine=engine)
    loaded = time.process_time() - start
    _held["lm"] = lm
    words = [word for word in lm.vocabulary.words if word not in SPECIAL]
    _held["lists"] = lists_of(sentences, words)
    lm.score(_held["lists"][0])
    return {
        "load_seconds": loaded,
        "ppl": lm.perplexity(sentences)["ppl"],
        "imported_mib": imported,
    }


def score():
    """Score all lists once; milliseconds a word and the most memory so far."""
    words = sum(len(text.split()) + 1 for row in _held["lists"] for text in row)
    start = time.process_time()
    for row in _held["lists"]:
        _held["lm"].score(row, batch=HYPOTHESES)
    return 1000 * (time.process_time() - start) / words, peak_mib()


def measured(folder, sentences, rounds):
    """What the engines take for a model, a process each, turn by turn.

    Returns
    -------
    dict
        engine -> what it took; "times", the median over the rounds of what
        the first engine took over what this one did.
    """
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = {
            engine: stack.enter_context(ProcessPoolExecutor(1, spawn))
            for engine in ENGINES
        }
        rows = {
            engine: pool.submit(load, folder, engine, sentences).result()
            for engine, pool in pools.items()
        }
        turns = [
            {engine: p.submit(score).result() for engine, p in pools.items()}
            for _ in range(rounds)
        ]
    for engine, row in rows.items():
        took = [turn[engine][0] for turn in turns]
        row["ms_a_word"] = statistics.median(took)
        row["peak_mib"] = turns[-1][engine][1] - row["imported_mib"]
        row["times"] = statistics.median(
            turn[ENGINES[0]][0] / turn[engine][0] for turn in turns
        )
    return rows


def peak_mib():
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    """Measure all systems and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a sentence on each line")
    parser.add_argument("folders", nargs="+", help="packed language models")
    parser.add_argument("--lists", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", type=int, nargs=2, default=(5, 15))
    options = parser.parse_args()
    least, most = options.words
    lines = options.text.read_text(encoding="utf-8").splitlines()
    sentences = [x for x in lines if least <= len(x.split()) <= most]
    sentences = sentences[: options.lists]
    rows = (
        (
            Path(folder).name,
            engine,
            f"{row['ms_a_word']:.4f}",
            f"{row['times']:.1f}",
            f"{row['load_seconds']:.1f}",
            f"{row['peak_mib']:.0f}",
            f"{row['ppl']:.2f}",
        )
        for folder in options.folders
        for engine, row in measured(folder, sentences, options.rounds).items()
    )
    for line in markdown_lines(COLUMNS, rows):
        print(line, flush=True)


if __name__ == "__main__":
    main()
