"""Perplexity of a language model, with and without unknown words."""

import math

import torch


class Perplexity:
    """Perplexity over all words and sentence ends.

    Where <unk> stands for many words its probability is that of all of them
    together, which no other vocabulary compares with: the perplexity of the
    known words alone leaves the places out where the text has an unknown one.

    Arguments
    ---------
    unk_index : int
        Number of <unk>.

    Example
    -------
    >>> perplexity = Perplexity(unk_index=0)
    >>> log_probs = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    >>> perplexity.append(log_probs, torch.tensor([0, 1]))
    >>> perplexity.summarize()  # 1 / sqrt(0.5 x 0.25); 1 / 0.25
    {'PPL': 2.82842..., 'PPL_known': 4.0, 'words': 2, 'unknown': 1}
    """

    def __init__(self, unk_index):
        self.unk_index = unk_index
        self.words = self.unknown = 0
        self.total = self.total_unknown = 0.0  # nats

    def append(self, log_probs, targets):
        """Count some words.

        Arguments
        ---------
        log_probs : torch.Tensor
            [words, vocabulary]
        targets : torch.Tensor
            [words]
        """
        own = -log_probs.gather(-1, targets[..., None])[..., 0].double()
        unknown = targets == self.unk_index
        self.words += targets.numel()
        self.unknown += int(unknown.sum())
        self.total += float(own.sum())
        self.total_unknown += float(own[unknown].sum())

    def summarize(self):
        """Perplexities and what they were counted over.

        Returns
        -------
        dict
            "PPL", "PPL_known" (without <unk>), "words" and "unknown"; a
            perplexity of no words is NaN.
        """
        known = self.words - self.unknown
        return {
            "PPL": _exp(self.total, self.words),
            "PPL_known": _exp(self.total - self.total_unknown, known),
            "words": self.words,
            "unknown": self.unknown,
        }


def _exp(total, words):
    """Perplexity of a sum of nats; infinite where floats cannot hold it."""
    if not words:
        return math.nan
    try:
        return math.exp(total / words)
    except OverflowError:
        return math.inf
