"""Word errors of N-best lists that many language models have rescored.

> python benchmarks/quality/rescoring.py \
    --test clean clean.json clean_refs --test noisy noisy.json noisy_refs \
    --own acoustic_scores --ngram first_pass.arpa \
    --lm full results/lm_lstm/1234/published \
    --lm ste_uniform_2 results/rows/lstm/ste_uniform_2_1234/published

Lists are those that `speechbrain-mpq rescore` reads, references `id word word
...` on each line; --own names the scores that stay, where a first-pass model
of language is in `scores`. Models are mixed with the n-gram half and half.
What they count and the bonus of a word are the same for all: given, or chosen
for the first model on the lists of --tune. p is that of MAPSSWE against the
first model. Milliseconds a word are the processor's, of the network alone.
"""

import argparse
import hashlib
import itertools
import json
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
from language_models import word_cells

from speechbrain_mpq import LanguageModel
from speechbrain_mpq.decoders.nbest import (
    NBest,
    RescoringWeights,
    read_nbest,
)
from speechbrain_mpq.decoders.ngram import Ngram
from speechbrain_mpq.evaluation.significance import mapsswe
from speechbrain_mpq.evaluation.task import markdown_table
from speechbrain_mpq.evaluation.wer import WordErrors, word_errors
from speechbrain_mpq.inference.language_model import rescore
from speechbrain_mpq.utils import read_json, strict_json, write_json

LM_WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3)
BONUSES = (-1.0, 0.0, 1.0, 2.0, 3.0)
errors_of = lru_cache(maxsize=None)(word_errors)


def read_references(path, lists):
    """References of some lists.

    Arguments
    ---------
    path : str or Path
        `id word word ...` on each line.
    lists : list of NBest

    Returns
    -------
    dict
        id -> words; every list has one.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    references = {}
    for line in lines:
        key, _, words = line.partition(" ")
        references[key] = words
    missing = [row.id for row in lists if row.id not in references]
    if missing:
        raise ValueError(f"{path} has no reference of {missing[0]!r}")
    return references


def chosen(lists, weights=None):
    """Best hypothesis of each list.

    Arguments
    ---------
    lists : list of NBest
        With "recognizer_scores" and "lm_scores" where there are weights.
    weights : tuple of float or None
        What the language model counts and the bonus of a word; None: the
        scores of the lists.

    Returns
    -------
    dict
        id -> hypothesis
    """
    if weights is None:
        return {row.id: row.ranked().hypotheses[0] for row in lists}
    scale, bonus = weights
    best = {}
    for row in lists:
        scores = [
            part["recognizer_scores"]
            + scale * part["lm_scores"]
            + bonus * len(text.split())
            for text, part in zip(row.hypotheses, row.details)
        ]
        best[row.id] = NBest(row.id, row.hypotheses, scores).ranked()
        best[row.id] = best[row.id].hypotheses[0]
    return best


def oracle(lists, references):
    """The hypothesis of each list with the fewest errors."""
    return {
        row.id: min(
            row.hypotheses,
            key=lambda text: errors_of(references[row.id], text).errors,
        )
        for row in lists
    }


def error_rate(hypotheses, references):
    """Word error rate in percent."""
    errors = (errors_of(references[k], t) for k, t in hypotheses.items())
    return sum(errors, WordErrors()).rate


def tuned(lists, references):
    """The weights with the fewest errors on some rescored lists."""
    return min(
        itertools.product(LM_WEIGHTS, BONUSES),
        key=lambda weights: error_rate(chosen(lists, weights), references),
    )


class Timed:
    """A language model that counts words and the processor's seconds.

    It scores no lists twice.
    """

    def __init__(self, lm):
        self.lm, self.vocabulary = lm, lm.vocabulary
        self.seconds = self.words = 0
        self.known = {}

    def encode(self, sentences):
        """See `LanguageModel.encode`."""
        return self.lm.encode(sentences)

    def score(self, texts, progress=False):
        """See `LanguageModel.score`."""
        key = tuple(texts)
        if key not in self.known:
            self.known[key] = self._score(texts, progress)
        return self.known[key]

    def _score(self, texts, progress):
        """Score what has not been scored before."""
        started = time.process_time()
        scores = self.lm.score(texts, progress=progress)
        self.seconds += time.process_time() - started
        self.words += sum(len(row.log_probs) for row in scores)
        return scores

    @property
    def milliseconds(self):
        """Of a word or a sentence's end."""
        return 1000 * self.seconds / self.words


class Remembering:
    """An n-gram that scores no sentence twice."""

    def __init__(self, ngram):
        self.ngram, self.known = ngram, {}

    def score(self, words):
        """See `Ngram.score`."""
        key = tuple(words)
        if key not in self.known:
            self.known[key] = self.ngram.score(words)
        return self.known[key]


class Bench:
    """Lists, references and the n-gram.

    Arguments
    ---------
    sets : dict
        name -> (lists, references); "tune" may be one of them.
    ngram : Ngram or None
    own : dict or None
        name -> lists with the scores that stay; None: those of the sets.
    weights : tuple of float
        What a model counts and the bonus of a word.
    """

    def __init__(self, sets, ngram=None, own=None, weights=(1.0, 0.0)):
        self.sets = sets
        self.own = own or {name: lists for name, (lists, _) in sets.items()}
        self.ngram = ngram and Remembering(ngram)
        self.weights = weights
        self.first = {}  # its hypotheses, by set

    def rescored(self, lm, name, share=0.5):
        """Lists of a set with the scores of a model mixed with the n-gram."""
        weights = RescoringWeights(interpolation=share)
        return rescore(self.own[name], lm, weights, self.ngram)

    def choose_weights(self, lm):
        """Choose what all models count, where there are lists for it."""
        if "tune" in self.sets:
            _, references = self.sets["tune"]
            self.weights = tuned(self.rescored(lm, "tune"), references)

    def wer_row(self, best):
        """Error rates of hypotheses by set, and p against the first model."""
        row = {}
        for name, own in best.items():
            _, references = self.sets[name]
            row[name] = {"wer": error_rate(own, references)}
            if name in self.first:
                test = mapsswe(
                    (references[k], self.first[name][k], own[k]) for k in own
                )
                row[name]["p"] = test.p
        return row

    def passes(self):
        """Rows of the first pass and of the oracle."""
        tests = {n: s for n, s in self.sets.items() if n != "tune"}
        return {
            "first pass": self.wer_row(
                {n: chosen(lists) for n, (lists, _) in tests.items()}
            ),
            "oracle": self.wer_row(
                {n: oracle(*pair) for n, pair in tests.items()}
            ),
        }

    def row(self, lm, share=0.5):
        """Error rates of a model."""
        best = {
            name: chosen(self.rescored(lm, name, share), self.weights)
            for name in self.sets
            if name != "tune"
        }
        self.first = self.first or best
        return self.wer_row(best)


def table(rows):
    """Results as a table in Markdown."""
    names = list(next(iter(rows.values()))["sets"])
    heads = [head for name in names for head in (f"WER {name}", "p")]
    lines = []
    for name, row in rows.items():
        cells = [name]
        for own in row["sets"].values():
            cells += word_cells(own)
        time_a_word = row.get("ms")
        cells.append("" if time_a_word is None else f"{time_a_word:.3f}")
        size = row.get("bytes")
        cells.append("" if size is None else f"{size:,}")
        lines.append(cells)
    return markdown_table(
        ("system", *heads, "ms a word", "bytes"), lines
    ).rstrip()


def read_options():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    lists = {"metavar": ("LISTS", "REFERENCES"), "nargs": 2}
    add("--tune", **lists)
    add("--lm_weight", type=float, default=1.0, help="without --tune")
    add("--word_bonus", type=float, default=0.0, help="without --tune")
    add("--own", metavar="KEY", help="scores that stay (default: scores)")
    lists = {"metavar": ("NAME", "LISTS", "REFERENCES"), "nargs": 3}
    add("--test", required=True, action="append", **lists)
    folder = {"metavar": ("NAME", "FOLDER"), "nargs": 2}
    add("--lm", required=True, action="append", **folder)
    add("--ngram", help="ARPA file, in the same half-and-half mixture for all")
    add("--scores", default="log_probs", help="as for speechbrain-mpq rescore")
    add("--out", type=Path, help="JSON; models in it are not run again")
    return parser.parse_args()


def read_sets(options):
    """Lists and references of the command line, and the scores that stay."""
    named = [("tune", *options.tune)] if options.tune else []
    sets, own = {}, {}
    for name, path, references in [*named, *options.test]:
        lists = read_nbest(path, options.scores)
        sets[name] = lists, read_references(references, lists)
        own[name] = with_own_scores(path, lists, options.own or "scores")
    return sets, own


def digests(options):
    """Checksums of all files that results depend on, by name."""
    files = {name: path for name, path, _ in options.test}
    if options.tune:
        files["tune"] = options.tune[0]
    if options.ngram:
        files["ngram"] = options.ngram
    return {
        name: hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for name, path in files.items()
    }


def with_own_scores(path, lists, key):
    """Lists whose scores are those of another key of their file."""
    if key == "scores":
        return lists
    text = Path(path).read_text(encoding="utf-8")
    rows = [strict_json(line) for line in text.splitlines() if line.strip()]
    missing = [row["id"] for row in rows if key not in row]
    if missing:
        raise ValueError(f"{path} has no {key!r} of {missing[0]!r}: see --own")
    return [
        NBest(new.id, new.hypotheses, [float(x) for x in row[key]])
        for new, row in zip(lists, rows, strict=True)
    ]


def main():
    """Rescore with all models and print the table."""
    options = read_options()
    torch.set_num_threads(1)
    sets, own = read_sets(options)
    ngram = Ngram(options.ngram) if options.ngram else None
    weights = options.lm_weight, options.word_bonus
    bench = Bench(sets, ngram, own, weights)
    setting = {"weights": list(weights), "lists": digests(options)}
    kept = {}
    if options.out and options.out.exists():
        earlier = read_json(options.out)
        if earlier["setting"] == setting:
            kept = earlier["rows"]
    rows = {name: {"sets": row} for name, row in bench.passes().items()}
    for number, (name, folder) in enumerate(options.lm):
        if number and name in kept:
            rows[name] = kept[name]
            continue
        lm = Timed(LanguageModel.from_pretrained(folder))
        if not number:
            bench.choose_weights(lm)
        rows[name] = {
            "sets": bench.row(lm),
            "ms": lm.milliseconds,
            "bytes": Path(folder, "model.safetensors").stat().st_size,
        }
        if bench.ngram and not number:
            rows["n-gram alone"] = {"sets": bench.row(lm, share=0.0)}
        if options.out:
            content = {"setting": setting, "rows": {**kept, **rows}}
            write_json(options.out, content)
        print(name, json.dumps(rows[name]["sets"]), file=sys.stderr, flush=True)
    scale, bonus = bench.weights
    print(f"language model x {scale}, {bonus:+} a word\n")
    print(table(rows))


if __name__ == "__main__":
    main()
