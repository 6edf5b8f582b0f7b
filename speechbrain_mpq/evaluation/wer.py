"""Count word errors by minimum-edit alignment."""

from dataclasses import dataclass
from typing import NamedTuple

CORRECT = "correct"
SUBSTITUTION = "substitution"
DELETION = "deletion"
INSERTION = "insertion"


class Edit(NamedTuple):
    """One step of an alignment; a word that is not there is None."""

    kind: str
    reference: str | None
    hypothesis: str | None


@dataclass(frozen=True)
class WordErrors:
    """Counts of word errors; instances add up.

    Example
    -------
    >>> total = WordErrors(1, 0, 0, 4) + WordErrors(0, 1, 1, 6)
    >>> total.errors, total.words, total.rate
    (3, 10, 30.0)
    """

    # substitutions, deletions, insertions: errors by kind
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0  # words of the reference

    def __add__(self, other):
        """Counts of both together."""
        return WordErrors(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.words + other.words,
        )

    @property
    def errors(self):
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self):
        """Word error rate in percent; above 100 where insertions abound."""
        if self.words == 0:
            raise ValueError("no reference words: the error rate is undefined")
        return 100 * self.errors / self.words


def align(reference, hypothesis, weights=(1, 1, 1)):
    """Align two word sequences at the least cost.

    Of alignments with equal cost, the one is taken that, read from the last
    word to the first, pairs two words where it can, else deletes, else
    inserts. One substitution is thus preferred to two shifted words.

    Arguments
    ---------
    reference : str | list[str]
        Words that were said; a string is split at white space.
    hypothesis : str | list[str]
        Words that were recognised.
    weights : tuple[int, int, int]
        Costs of a substitution, a deletion and an insertion.

    Returns
    -------
    list[Edit]
        Steps in order.
    """
    reference, hypothesis = _words(reference), _words(hypothesis)
    costs = _costs(reference, hypothesis, weights)
    substitution, deletion, _ = weights
    edits = []
    i, j = len(reference), len(hypothesis)
    while i or j:
        cost = costs[i][j]
        if i and j:
            same = reference[i - 1] == hypothesis[j - 1]
            step = 0 if same else substitution
            if cost == costs[i - 1][j - 1] + step:
                i, j = i - 1, j - 1
                kind = CORRECT if same else SUBSTITUTION
                edits.append(Edit(kind, reference[i], hypothesis[j]))
                continue
        if i and cost == costs[i - 1][j] + deletion:
            i -= 1
            edits.append(Edit(DELETION, reference[i], None))
        else:
            j -= 1
            edits.append(Edit(INSERTION, None, hypothesis[j]))
    return edits[::-1]


def word_errors(reference, hypothesis):
    """Count the word errors of one utterance.

    Arguments
    ---------
    reference : str | list[str]
        Words that were said.
    hypothesis : str | list[str]
        Words that were recognised.
    """
    kinds = [edit.kind for edit in align(reference, hypothesis)]
    insertions = kinds.count(INSERTION)
    return WordErrors(
        kinds.count(SUBSTITUTION),
        kinds.count(DELETION),
        insertions,
        len(kinds) - insertions,
    )


def oracle_errors(pairs):
    """Count the errors of the best hypotheses of N-best lists.

    Arguments
    ---------
    pairs : iterable of (str, sequence of str)
        Reference and hypotheses of each list.

    Returns
    -------
    WordErrors

    Example
    -------
    >>> oracle_errors([("so be it", ["so bee it", "so be it"])]).rate
    0.0
    """
    total = WordErrors()
    for reference, hypotheses in pairs:
        errors = [word_errors(reference, words) for words in hypotheses]
        total += min(errors, key=lambda counts: counts.errors)
    return total


def _words(text):
    """Words of a string, or the sequence itself."""
    return text.split() if isinstance(text, str) else list(text)


def _costs(reference, hypothesis, weights):
    """Least cost of aligning every pair of beginnings, as rows."""
    substitution, deletion, insertion = weights
    costs = [[j * insertion for j in range(len(hypothesis) + 1)]]
    for word in reference:
        above = costs[-1]
        row = [above[0] + deletion]
        for j, other in enumerate(hypothesis):
            pair = above[j] + (0 if word == other else substitution)
            row.append(min(pair, above[j + 1] + deletion, row[j] + insertion))
        costs.append(row)
    return costs
