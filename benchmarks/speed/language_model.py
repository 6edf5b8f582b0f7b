"""Milliseconds a word of rescoring, in PyTorch and with the stored integers.

> python benchmarks/speed/language_model.py recipes/SOTU/LM/data/sotu/test.txt \
    pretrained/lm_sotu_2bit

Lists of 20 hypotheses are made of the sentences of a text: each, and 19 copies
in which one word in five is another. One thread; each system in a process of
its own, in turn for some rounds; the median of the processor's time, the time
to load and the most memory beyond what importing the libraries takes.
Perplexity is that of the sentences themselves.
"""

import argparse
import importlib
import multiprocessing
import random
import resource
import statistics
import time
from pathlib import Path

HYPOTHESES = 20
CHANGED = 0.2  # of the words of a hypothesis
ENGINES = ("torch", "onnx")


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


def measured(folder, engine, sentences, rounds):
    """What one system takes, in this process."""
    import torch

    from speechbrain_mpq import LanguageModel
    from speechbrain_mpq.utils import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    importlib.import_module(
        "speechbrain_mpq.inference.engines.integer_onnx"
    )  # what libraries take is not ours
    imported = peak_mib()
    start = time.perf_counter()
    lm = LanguageModel.from_pretrained(folder, engine=engine)
    loaded = time.perf_counter() - start
    lists = lists_of(sentences, lm.vocabulary.words)
    words = sum(len(text.split()) + 1 for row in lists for text in row)
    lm.score(lists[0])
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for row in lists:
            lm.score(row, batch=HYPOTHESES)
        times.append(time.process_time() - start)
    return {
        "engine": engine,
        "ms_a_word": 1000 * statistics.median(times) / words,
        "load_seconds": loaded,
        "peak_mib": peak_mib() - imported,
        "ppl": lm.perplexity(sentences)["ppl"],
    }


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
    spawn = multiprocessing.get_context("spawn")
    print("| model | engine | ms a word | times | load s | MiB | PPL |")
    print("|---|---|---|---|---|---|---|")
    for folder in options.folders:
        first = None
        for engine in ENGINES:
            with spawn.Pool(1) as pool:
                given = (folder, engine, sentences, options.rounds)
                row = pool.apply(measured, given)
            first = first or row["ms_a_word"]
            print(
                f"| {Path(folder).name} | {engine} | {row['ms_a_word']:.4f} | "
                f"{first / row['ms_a_word']:.1f} | {row['load_seconds']:.1f} | "
                f"{row['peak_mib']:.0f} | {row['ppl']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
