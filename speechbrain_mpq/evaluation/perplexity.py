"""Perplexity of a language model, with and without unknown words."""

import math


def perplexity(nats, words):
    """Perplexity of words with a negative log-probability.

    Arguments
    ---------
    nats : float
        Of all of them together.
    words : int

    Returns
    -------
    float
        NaN of no words; infinity where floats cannot hold it.

    Example
    -------
    >>> round(perplexity(2 * math.log(10), 2), 4)
    10.0
    """
    if not words:
        return math.nan
    try:
        return math.exp(nats / words)
    except OverflowError:
        return math.inf


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
    >>> import torch
    >>> measured = Perplexity(unk_index=0)
    >>> log_probs = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).double().log()
    >>> measured.append(log_probs, torch.tensor([0, 1]))
    >>> {name: round(n, 4) for name, n in measured.summarize().items()}
    {'PPL': 2.8284, 'PPL_known': 4.0, 'words': 2, 'unknown': 1}
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
        own = (
            -log_probs.detach().gather(-1, targets[..., None])[..., 0].double()
        )
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
            "PPL": perplexity(self.total, self.words),
            "PPL_known": perplexity(self.total - self.total_unknown, known),
            "words": self.words,
            "unknown": self.unknown,
        }
