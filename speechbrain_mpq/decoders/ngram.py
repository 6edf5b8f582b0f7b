"""N-gram language models, read from ARPA files by SpeechBrain."""

import math

from speechbrain.lm.arpa import read_arpa
from speechbrain.lm.ngram import BackoffNgramLM

from .vocabulary import BOS, EOS

_UNKNOWN = ("<unk>", "<UNK>")


class Ngram:
    """Log-probabilities of the words of sentences.

    Arguments
    ---------
    path : str or Path
        ARPA file.

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
            with open(path, encoding="utf-8") as file:
                _, grams, backoffs = read_arpa(file)
        except (ValueError, IndexError) as error:
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
        known = [
            word if word in self.words else self.unknown or word
            for word in words
        ]
        context, scores = (BOS,), []
        for word in [*known, EOS]:
            scores.append(math.log(10) * self.model.logprob(word, context))
            context = (*context, word)[-(self.model.top_order - 1) :]
            if self.model.top_order == 1:
                context = ()
        return scores
