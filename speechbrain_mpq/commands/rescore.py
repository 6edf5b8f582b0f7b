"""`speechbrain-mpq rescore`: n-best lists with a packed language model.

The lists are lines of JSON, from any recognizer:

  {"id": "utt1", "hypotheses": ["so be it", "so bee it"], "scores": [-41, -42]}

A hypothesis gets its own score, plus the weight times the language model's
log-probability, plus the bonus for each of its words. The best one of each list
is printed, `id word word ...`, or written with --best.
"""

import argparse
import math
import sys

from ..decoders.nbest import TOO_MANY, RescoringWeights
from ..utils import check_output, write_text
from .arguments import add_engine_options

HELP = "n-best lists of a recognizer with a packed language model"
EXAMPLE = """
  speechbrain-mpq rescore nbest.json --lm lm_lstm_2bit
  speechbrain-mpq rescore nbest.json --lm user/name --ngram lm.arpa --best hyp
  speechbrain-mpq rescore kaldi.json --scores costs --lm_weight 9 --lm FOLDER"""


def add_arguments(parser):
    """Say what the command line may hold."""
    add = parser.add_argument
    add("nbest", help="file of n-best lists, a JSON object on each line")
    add(
        "--lm",
        required=True,
        metavar="FOLDER",
        help="packed language model, or its name on the Hugging Face hub",
    )
    add(
        "--scores",
        choices=("log_probs", "costs", "any"),
        default="log_probs",
        help="what the lists' scores are: log_probs (none above 0), costs "
        "(none below 0, lower is better), any (higher is better)",
    )
    _add_weights(add)
    add_engine_options(parser, ("torch", "onnx"))
    add("--out", metavar="FILE", help="write all lists in their new order")
    add("--best", metavar="FILE", help="write the best hypotheses")


def _add_weights(add):
    """What the parts of a hypothesis's score count."""
    add(
        "--lm_weight",
        type=_number,
        default=RescoringWeights.lm_weight,
        help="of the language model's log-probability (default: %(default)s)",
    )
    add(
        "--word_bonus",
        type=_number,
        default=RescoringWeights.word_bonus,
        help="added for each word (default: %(default)s)",
    )
    add(
        "--ngram",
        metavar="ARPA",
        help="n-gram whose probabilities are mixed with the model's",
    )
    add(
        "--interpolation",
        type=_share,
        default=RescoringWeights.interpolation,
        help="the model's share in that mixture (default: %(default)s)",
    )
    add(
        "--unk_penalty",
        type=_number,
        default=RescoringWeights.unk_penalty,
        help="log-probability added for each unknown word: <unk> has that of "
        "all of them together (default: %(default)s, one in 22,000)",
    )
    add(
        "--unknown",
        choices=("unk", "error"),
        default="unk",
        help="what words outside the vocabulary are: <unk>, or an error; more "
        "than half of all are an error in any case",
    )


def run(options) -> int:
    """Rescore a file."""
    from ..decoders.nbest import one_best, read_nbest, write_nbest

    read = options.nbest, options.ngram, options.lm
    if options.out:
        check_output(options.out, *read, options.best)
    if options.best:
        check_output(options.best, *read)
    lists = read_nbest(options.nbest, options.scores)
    from ..decoders.ngram import Ngram
    from ..inference.language_model import LanguageModel, rescore

    ngram = Ngram(options.ngram) if options.ngram else None
    lm = LanguageModel.from_pretrained(
        options.lm, options.engine, options.threads
    )
    unknown, words = _check_words(lists, lm.vocabulary, options)
    told = f"{unknown} of {words} words unknown"
    if ngram:
        unknown = _check_ngram(lists, lm.vocabulary, ngram, options.ngram)
        told += f" ({unknown} to the n-gram)"
    weights = RescoringWeights(
        options.lm_weight,
        options.word_bonus,
        options.interpolation,
        options.unk_penalty,
    )
    bar = sys.stderr.isatty()
    ranked = rescore(lists, lm, weights, ngram, progress=bar)
    if options.out:
        write_nbest(options.out, ranked)
    if options.best:
        write_text(options.best, one_best(ranked))
    if not (options.out or options.best):
        _print(one_best(ranked))
    changed = sum(
        new.hypotheses[0] != old.ranked().hypotheses[0]
        for new, old in zip(ranked, lists)
    )
    empty = sum(not h.split() for row in lists for h in row.hypotheses)
    print(
        f"{len(lists)} lists, another best hypothesis in {changed}; {told}, "
        f"{empty} empty hypotheses",
        file=sys.stderr,
    )
    return 0


def _print(text):
    """Write UTF-8, whatever the terminal's encoding: words are no ornament."""
    if not hasattr(sys.stdout, "buffer"):  # a program's own stream
        sys.stdout.write(text)
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())


def _check_words(lists, vocabulary, options):
    """Count unknown words and all; refuse too many."""
    unknown = words = 0
    for row in lists:
        for text in row.hypotheses:
            try:
                missing = vocabulary.unknown(text)
            except ValueError as error:
                raise ValueError(f"{row.id}: {error}") from error
            if missing and options.unknown == "error":
                raise ValueError(
                    f"{row.id}: {missing[0]!r} is not in the vocabulary of "
                    f"{options.lm}: leave out --unknown error to take it as "
                    "<unk>"
                )
            unknown += len(missing)
            words += len(text.split())
    if words and unknown > TOO_MANY * words:
        raise ValueError(
            f"{unknown} of {words} words are not in the vocabulary of "
            f"{options.lm}, so that it says nothing about these lists: is it "
            "a model of this language, and are the hypotheses made of words, "
            "not of pieces of words?"
        )
    return unknown, words


def _check_ngram(lists, vocabulary, ngram, path):
    """Count the words that an n-gram does not know; refuse too many."""
    texts = (text for row in lists for text in row.hypotheses)
    words = [word for text in texts for word in vocabulary.split(text)]
    unknown = sum(word not in ngram.words for word in words)
    if unknown > TOO_MANY * len(words):
        raise ValueError(
            f"{unknown} of {len(words)} words are not in {path}: is it an "
            "n-gram of this language, with words in the case of the language "
            "model's vocabulary?"
        )
    return unknown


def _number(text):
    """A finite number of the command line."""
    value = _float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return value


def _share(text):
    """A number from 0 to 1."""
    value = _float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


def _float(text):
    """A number; NaN, which is refused everywhere, where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
