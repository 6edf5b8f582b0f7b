"""N-gram language models: estimated, written as ARPA files, and read.

SpeechBrain's reader believes what it reads, and waits without end for a section
that was cut off: what a file declares is held against what it has.
"""

import codecs
import math
from collections import Counter, defaultdict

import numpy as np
from speechbrain.lm.arpa import read_arpa
from speechbrain.lm.ngram import BackoffNgramLM

from ..utils import open_input, write_text
from .chain_graphs import START, PhoneNgram
from .vocabulary import BOS, EOS, SPECIAL

ROUNDING = 1e-3  # by which a log-probability may be above 0
NOTHING = 1e-9  # a rest of probabilities that is rounding
_UNKNOWN = ("<unk>", "<UNK>")


class Ngram:
    """Log-probabilities of the words of sentences.

    Arguments
    ---------
    path : str or Path
        ARPA file, or a pipe.

    Example
    -------
    >>> path = getfixture("tmpdir") / "lm.arpa"
    >>> grams = "-0.3010 a -0.3010\\n-0.6021 </s>\\n-99 <s> 0"
    >>> _ = path.write(
    ...     "\\\\data\\\\\\nngram 1=3\\nngram 2=1\\n\\n"
    ...     f"\\\\1-grams:\\n{grams}\\n\\n"
    ...     "\\\\2-grams:\\n-0.1249 a a\\n\\n\\\\end\\\\\\n"
    ... )
    >>> [round(math.exp(x), 3) for x in Ngram(path).score("a a".split())]
    [0.5, 0.75, 0.125]
    """

    def __init__(self, path):
        try:
            with open_input(path) as file:
                counts, grams, backoffs = read_arpa(_lines(file))
            _check(counts, grams, backoffs)
        except (ValueError, IndexError, EOFError) as error:
            raise ValueError(f"{path} is no ARPA file ({error})") from error
        self.model = BackoffNgramLM(grams, backoffs)
        self.words = grams[1][()]
        self.unknown = next((w for w in _UNKNOWN if w in self.words), None)

    def score(self, words):
        """Log-probabilities of words and of the sentence's end.

        Arguments
        ---------
        words : list of str
            Those that the model does not know count as its <unk>; they have
            no probability where it has none.

        Returns
        -------
        list of float
            Natural logarithms, one more than words.
        """
        in_vocabulary = [
            word if word in self.words else self.unknown or word
            for word in words
        ]
        context, scores = (BOS,), []
        for word in [*in_vocabulary, EOS]:
            scores.append(math.log(10) * self.model.logprob(word, context))
            context = (*context, word)[-(self.model.top_order - 1) :]
            if self.model.top_order == 1:
                context = ()
        return scores

    @property
    def vocabulary(self):
        """Words that can be said, in order of the alphabet."""
        return sorted(set(self.words) - {*SPECIAL, *_UNKNOWN})

    def bigram(self, words):
        """Probabilities of all pairs of words, for an exact search.

        Arguments
        ---------
        words : sequence of str

        Returns
        -------
        PhoneNgram
            Of order 2, with the numbers of words for phones.
        """
        if self.model.top_order > 2:
            raise ValueError(
                f"an n-gram of order {self.model.top_order}: the exact search "
                "takes a bigram; decode with pip install "
                "'speechbrain_mpq[decode]'"
            )
        missing = sorted(set(words) - set(self.words))
        if missing:
            raise ValueError(f"the n-gram does not have {missing[0]!r}")
        one = self.model.top_order == 1
        base = math.log(10)
        probabilities = np.array(
            [
                [
                    math.exp(
                        base * self.model.logprob(w, () if one else (before,))
                    )
                    for w in (*words, EOS)
                ]
                for before in (BOS, *words)
            ]
        )
        size = len(words)
        return PhoneNgram(
            2,
            [(START,), *((i,) for i in range(size))],
            probabilities,
            np.tile(1 + np.arange(size), (size + 1, 1)),
        )


def estimate_arpa(
    path, sentences, order=2, smoothing=1.0, vocabulary=None, min_count=1
):
    """Write the n-gram of some sentences as an ARPA file.

    Each history gets `smoothing` counts beside its own, spread as the shorter
    history has it, and single words one each: what `estimate_ngram` does, with
    back-off weights for all that has not been seen.

    Arguments
    ---------
    path : str or Path
    sentences : iterable of str
        Words between white space.
    order : int
        2 for a bigram.
    smoothing : float or None
        Above 0. None: as many as different words have followed the history
        (Witten-Bell), for large texts.
    vocabulary : collection of str, optional
        Other words count as <unk>.
    min_count : int
        Pairs and longer n-grams that occur less often are left to the back-off.

    Example
    -------
    >>> path = getfixture("tmp_path") / "lm.arpa"
    >>> estimate_arpa(path, ["a b", "a"])
    >>> [round(math.exp(x), 2) for x in Ngram(path).score(["a", "b"])]
    [0.79, 0.42, 0.69]
    """
    if order < 1 or not (smoothing is None or smoothing > 0) or min_count < 1:
        raise ValueError(
            f"order {order}, smoothing {smoothing}, min_count {min_count}: at "
            "least 1, above 0 or None, at least 1"
        )
    counts = _counted(sentences, order, vocabulary)
    model = _Interpolated(counts, smoothing, min_count)
    grams = {length: [] for length in range(1, order + 1)}
    grams[1].append((-99.0, (BOS,)))
    for history in sorted(counts):
        for word in model.kept(history):
            weight = math.log10(model.probability(history, word))
            grams[len(history) + 1].append((weight, (*history, word)))
    lines = ["\\data\\"]
    lines += [f"ngram {n}={len(rows)}" for n, rows in grams.items()]
    for length, rows in grams.items():
        lines += ["", f"\\{length}-grams:"]
        for weight, gram in rows:
            line = f"{weight:.7f}\t{' '.join(gram)}"
            if length < order and gram[-1] != EOS:
                line += f"\t{math.log10(model.backoff(gram)):.7f}"
            lines.append(line)
    write_text(path, "\n".join([*lines, "", "\\end\\", ""]))


def _counted(sentences, order, vocabulary):
    """History -> how often each word follows it."""
    counts = defaultdict(Counter)
    for sentence in sentences:
        own_words = sentence.split()
        if vocabulary is not None:
            own_words = [
                w if w in vocabulary else _UNKNOWN[0] for w in own_words
            ]
        words = (BOS, *own_words, EOS)
        for end in range(1, len(words)):
            for begin in range(max(end - order + 1, 0), end + 1):
                counts[words[begin:end]][words[end]] += 1
    if not counts:
        raise ValueError("an n-gram needs at least one sentence")
    return counts


class _Interpolated:
    """Probabilities and back-off weights of counts."""

    def __init__(self, counts, smoothing, min_count):
        self.counts, self.smoothing = counts, smoothing
        self.min_count = min_count
        self.singles = counts[()]
        self.total = sum(self.singles.values()) + len(self.singles)
        self.weights = {}

    def kept(self, history):
        """Words whose n-gram with a history is written."""
        seen = self.counts[history] if history in self.counts else {}
        least = self.min_count if history else 1
        return sorted(word for word, count in seen.items() if count >= least)

    def probability(self, history, word):
        """Interpolated with all shorter histories."""
        if not history:
            return (self.singles[word] + 1) / self.total
        seen = self.counts[history]
        extra = self.smoothing or len(seen)
        shorter = extra * self.probability(history[1:], word)
        return (seen[word] + shorter) / (seen.total() + extra)

    def backoff(self, history):
        """Weight of what is not written after a history."""
        if history not in self.weights:
            words = self.kept(history)
            here = sum(self.probability(history, word) for word in words)
            below = sum(self._read(history[1:], word) for word in words)
            left = 1 - below
            # Where every word is written there is nothing to weigh.
            nothing = left < NOTHING
            self.weights[history] = 1.0 if nothing else (1 - here) / left
        return self.weights[history]

    def _read(self, history, word):
        """Probability that a reader of the file finds."""
        seen = self.counts[history]
        if not history or seen[word] >= self.min_count:
            return self.probability(history, word)
        return self.backoff(history) * self._read(history[1:], word)


def _lines(file):
    """Lines of a file; EOFError to a reader that wants more of them."""
    for number, line in enumerate(file):
        if not number:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield line.decode("utf-8")
    raise EOFError("it ends before its \\end\\")


def _check(counts, grams, backoffs):
    """Refuse sections that were cut, and what is no probability."""
    for order, count in counts.items():
        number = sum(map(len, grams[order].values()))
        if number != count:
            raise ValueError(f"{number} of {count} {order}-grams are there")
        for context, words in grams[order].items():
            for word, value in words.items():
                if not -math.inf <= value <= ROUNDING:
                    name = " ".join([*context, word])
                    raise ValueError(f"{name}: a log-probability of {value}")
        for context, value in backoffs[order].items():
            if not value < math.inf:
                name = " ".join(context)
                raise ValueError(f"{name}: a back-off weight of {value}")
    if EOS not in grams.get(1, {}).get((), {}):
        raise ValueError(f"no {EOS} among its words")
