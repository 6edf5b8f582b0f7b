"""N-best lists of a recognizer: read, checked, ordered anew, written.

A file holds a JSON object on each line:

    {"id": "utt1", "hypotheses": ["so be it", "so bee it"],
     "scores": [-41.2, -41.9]}

`scores` are the recognizer's, one for each hypothesis. An empty hypothesis is
a recognizer's word for silence and counts as a sentence without words; a list
without hypotheses is an error, as is everything else that could only be left
out.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..utils import open_input, strict_json, write_text

SIGNS = ("log_probs", "costs", "any")  # of scores
KEYS = ("id", "hypotheses", "scores")
TOO_MANY = 0.5  # share of unknown words that no text of the language has


@dataclass(frozen=True)
class RescoringWeights:
    """What the parts of a score count.

    Example
    -------
    >>> RescoringWeights().lm_weight
    0.5
    """

    lm_weight: float = 0.5  # of the language model's log-probability
    word_bonus: float = 0.0  # added for each word
    interpolation: float = 0.5  # the model's share where there is an n-gram
    unk_penalty: float = -10.0  # added for each unknown word


@dataclass
class NBest:
    """The hypotheses of one utterance.

    Arguments
    ---------
    id : str
    hypotheses : list of str
    scores : list of float
        Higher is better; what the lists are ordered by.
    details : list of dict
        For each hypothesis, parts of its score by name.

    Example
    -------
    >>> nbest = NBest("u1", ["so bee it", "so be it"], [-2.0, -1.0])
    >>> nbest.ranked().hypotheses
    ['so be it', 'so bee it']
    """

    id: str
    hypotheses: list
    scores: list
    details: list = field(default_factory=list)

    def ranked(self):
        """The best first; of equal ones, the one that came first."""
        order = sorted(range(len(self.scores)), key=lambda i: -self.scores[i])
        return NBest(
            self.id,
            [self.hypotheses[i] for i in order],
            [self.scores[i] for i in order],
            [self.details[i] for i in order] if self.details else [],
        )

    def to_dict(self):
        """The content of a line."""
        parts = {
            name: [row[name] for row in self.details]
            for name in (self.details[0] if self.details else ())
        }
        return {
            "id": self.id,
            "hypotheses": self.hypotheses,
            "scores": self.scores,
            **parts,
        }


def read_nbest(path, sign="log_probs"):
    """Read a file of n-best lists.

    Arguments
    ---------
    path : str or Path
        UTF-8 text.
    sign : str
        What the scores are: "log_probs" (none above 0, higher is better),
        "costs" (none below 0, lower is better) or "any" (higher is better).

    Returns
    -------
    list of NBest
        Costs with their sign changed.

    Example
    -------
    >>> path = getfixture("tmpdir") / "nbest.json"
    >>> row = '{"id": "u1", "hypotheses": ["a", "b"], "scores": [1, 2]}'
    >>> _ = path.write(row)
    >>> read_nbest(path, "costs")[0].scores
    [-1.0, -2.0]
    >>> read_nbest(path)
    Traceback (most recent call last):
    ...
    ValueError: ...nbest.json, line 1: a score of 1 is above 0, which no ...
    """
    if sign not in SIGNS:
        raise ValueError(f"scores must be one of {SIGNS}, not {sign!r}")
    path = Path(path)
    lists, lines = [], {}
    with open_input(path) as file:
        content = file.read()
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            nbest = _parse(strict_json(line), sign)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{place}: not UTF-8 ({error}): convert the file, for example "
                "with iconv -f latin1 -t utf-8"
            ) from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place}: no JSON object ({error}): each line must hold one, "
                "such as "
                '{"id": "u1", "hypotheses": ["so be it"], "scores": [-4.2]}'
            ) from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if nbest.id in lines:
            raise ValueError(
                f"{place}: id {nbest.id!r} is that of line {lines[nbest.id]}, "
                "too: give every utterance an id of its own"
            )
        lines[nbest.id] = number
        lists.append(nbest)
    if not lists:
        raise ValueError(f"{path} holds no n-best list")
    return lists


def _parse(content, sign):
    """NBest of the content of a line."""
    if not isinstance(content, dict):
        raise ValueError(f"a JSON object is wanted, with {', '.join(KEYS)}")
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise ValueError(f"no {missing[0]!r}: the keys are {', '.join(KEYS)}")
    key, texts, scores = (content[name] for name in KEYS)
    if not isinstance(key, str) or not key or key.split() != [key]:
        raise ValueError(f"id {key!r} is no string without blanks")
    if not isinstance(texts, list) or not all(
        isinstance(text, str) for text in texts
    ):
        raise ValueError(f"hypotheses of {key!r} are no list of strings")
    if not texts:
        raise ValueError(
            f"{key!r} has no hypotheses: give at least one, which may be an "
            'empty string, ""'
        )
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise ValueError(
            f"{key!r} has {len(texts)} hypotheses and needs as many scores"
        )
    return NBest(key, texts, [_score(score, sign) for score in scores])


def _score(score, sign):
    """A score of which more is better."""
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"a score of {score!r} is no number")
    if sign == "log_probs" and score > 0:
        raise ValueError(
            f"a score of {score} is above 0, which no log-probability is: "
            "give --scores costs where lower is better, or --scores any where "
            "higher is better all the same"
        )
    if sign == "costs" and score < 0:
        raise ValueError(
            f"a cost of {score} is below 0: give --scores log_probs where "
            "these are log-probabilities, or --scores any for other scores of "
            "which higher is better"
        )
    return -float(score) if sign == "costs" else float(score)


def write_nbest(path, lists):
    """Write n-best lists, a line each."""
    rows = [
        json.dumps(row.to_dict(), ensure_ascii=False, allow_nan=False)
        for row in lists
    ]
    write_text(path, "\n".join(rows) + "\n")


def one_best(lists):
    """Best hypothesis of each list, as Kaldi's text files have it.

    Arguments
    ---------
    lists : list of NBest
        Ranked.

    Returns
    -------
    str
        `id word word ...` on each line.
    """
    # Whatever white space a hypothesis has, its line is one line.
    lines = [" ".join([row.id, *row.hypotheses[0].split()]) for row in lists]
    return "\n".join(lines) + "\n"
