"""Pruned n-grams of the language models' text: the control at equal bytes.

> python benchmarks/quality/ngrams.py data/sotu --order 3 --min_count 3 6

Perplexity of the test text, counted as `evaluation.language_task` does. Bytes
are those of a trie as KenLM's quantized ones have it: the numbers of words in
as few bits as they need, eight bits for each probability and for each back-off
weight, and places in the next order. What eight bits cost in perplexity is not
counted, in the n-gram's favour.
"""

import argparse
import math
import tempfile
from pathlib import Path

from speechbrain_mpq.decoders.ngram import Ngram, estimate_arpa
from speechbrain_mpq.decoders.vocabulary import Vocabulary
from speechbrain_mpq.evaluation.task import markdown_lines
from speechbrain_mpq.evaluation.word_tasks import LANGUAGE_MODELLING

VALUE = 8  # bits of a probability or a back-off weight
COLUMNS = (
    "order",
    "least count",
    "n-grams",
    "PPL",
    "PPL of known words",
    "bytes",
)


def trie_bytes(counts):
    """Bytes of a quantized trie.

    Arguments
    ---------
    counts : list of int
        N-grams of each order, from single words on.

    Returns
    -------
    int

    Example
    -------
    >>> trie_bytes([4, 8])  # 4 x (8 + 8 + 3) and 8 x (2 + 8) bits
    20
    """
    word = math.ceil(math.log2(counts[0]))
    bits = 0
    for order, count in enumerate(counts):
        one = VALUE + (word if order else 0)  # the first are in their order
        if order + 1 < len(counts):
            one += VALUE + math.ceil(math.log2(counts[order + 1]))
        bits += count * one
    return math.ceil(bits / 8)


def test_items(ngram, lines, vocabulary):
    """Test items of the language modelling task, as a `LanguageModel` has."""
    for i, line in enumerate(lines):
        words = vocabulary.split(line)
        unknown = [w not in ngram.words or w == ngram.unknown for w in words]
        nats = [-x for x in ngram.score(words)]
        yield {
            "id": f"sentence_{i:07d}",
            "nats": sum(nats),
            "words": len(nats),
            "nats_unknown": sum(x for x, u in zip(nats, unknown) if u),
            "unknown": sum(unknown),
            "reference": line,
        }


def main():
    """Estimate, prune and test what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="prepared corpus")
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--min_count", type=int, nargs="+", default=[3, 6])
    options = parser.parse_args()
    vocabulary = Vocabulary.read(options.data / "vocab.txt")
    train, test = (
        (options.data / f"{split}.txt").read_text("utf-8").splitlines()
        for split in ("train", "test")
    )
    rows = (
        row(options, least, vocabulary, train, test)
        for least in options.min_count
    )
    for line in markdown_lines(COLUMNS, rows):
        print(line, flush=True)


def row(order, least, vocabulary, train, test):
    """Cells of the n-grams that are seen so often."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lm.arpa")
        words = set(vocabulary.words)
        estimate_arpa(path, train, order, None, words, least)
        ngram = Ngram(path)
        lines = path.read_text("utf-8").splitlines()[1 : order + 1]
    counts = [int(line.split("=")[1]) for line in lines]
    items = list(test_items(ngram, test, vocabulary))
    summary = LANGUAGE_MODELLING.summarise(items)
    return (
        order,
        least,
        f"{sum(counts):,}",
        f"{summary['ppl']:.1f}",
        f"{summary['ppl_known']:.1f}",
        f"{trie_bytes(counts):,}",
    )


if __name__ == "__main__":
    main()
