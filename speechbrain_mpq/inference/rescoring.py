"""N-best lists ordered anew by a language model, and a recognizer that does so.

A hypothesis gets its own score, plus the weight times the language model's
log-probability, plus the bonus for each of its words.
"""

import math
import sys

import torch
from speechbrain.decoders.ctc import CTCBeamSearcher

from ..decoders.nbest import TOO_MANY, NBest, RescoringWeights
from .language_model import LanguageModel
from .speech_recognition import HybridASR, Recognizer

LONG = 2000  # hypotheses from which on a bar shows that they are scored
HYPOTHESES = 20  # of a list
BEAM = 50  # of the CTC search
ENOUGH_WORDS = 200  # to judge whether a model knows them


def rescore(lists, lm, weights=None, ngram=None, progress=False):
    """Score all hypotheses anew, and order the lists by it.

    Arguments
    ---------
    lists : list of NBest
    lm : LanguageModel
    weights : RescoringWeights or None
    ngram : Ngram or None
        Its probabilities are mixed with the model's.
    progress : bool
        Whether to show a bar where there is much to do.

    Returns
    -------
    list of NBest
        Ranked, with "recognizer_scores" and "lm_scores" as details.
    """
    weights = weights or RescoringWeights()
    texts = [text for row in lists for text in row.hypotheses]
    progress = progress and len(texts) > LONG
    scored = iter(zip(texts, lm.score(texts, progress=progress)))
    ranked = []
    for row in lists:
        scores, details = [], []
        for own in row.scores:
            text, words = next(scored)
            log_prob = _log_prob(text, words, lm, weights, ngram)
            bonus = weights.word_bonus * len(text.split())
            score = own + weights.lm_weight * log_prob + bonus
            if not math.isfinite(score):
                raise ValueError(
                    f"{row.id}: {text!r} has a score of {score}, with a "
                    f"log-probability of {log_prob:g}: the language model has "
                    "diverged, or --lm_weight or --word_bonus is too large"
                )
            scores.append(score)
            details.append({"recognizer_scores": own, "lm_scores": log_prob})
        new = NBest(row.id, row.hypotheses, scores, details)
        ranked.append(new.ranked())
    return ranked


class RescoringRecognizer(Recognizer):
    """A recognizer whose N-best lists a language model has the last word on.

    Arguments
    ---------
    source : str
        As for `Recognizer`.
    rescorer : str or Path
        Packed language model, a folder or a name on the hub.
    lm_weight : float
        Of its log-probability.
    device : str or torch.device

    Example
    -------
    >>> recognize = RescoringRecognizer(  # doctest: +SKIP
    ...     "pretrained/asr_mini", "pretrained/lm_sotu_2bit"
    ... )
    >>> recognize(waveform)  # doctest: +SKIP
    'place the green boxes behind q one please'
    """

    def __init__(self, source, rescorer, lm_weight=0.5, device="cpu"):
        super().__init__(source, device)
        self.rescorer = rescorer
        self.lm = LanguageModel.from_pretrained(rescorer)
        self.weights = RescoringWeights(lm_weight)
        self._searcher = None
        self._unknown = self._words = 0

    def __call__(self, waveform):
        """Words of one waveform, [samples]."""
        batch = torch.as_tensor(waveform, device=self.device)[None]
        with torch.inference_mode():
            nbest = self._nbest(batch)
        (ranked,) = rescore([nbest], self.lm, self.weights)
        best = ranked.hypotheses[0].strip().lower()  # as `Recognizer` does
        self._unknown += len(self.lm.vocabulary.unknown(best))
        self._words += len(best.split())
        enough = self._words >= ENOUGH_WORDS
        if enough and self._unknown > TOO_MANY * self._words:
            raise ValueError(
                f"{self._unknown} of {self._words} words are not in the "
                f"vocabulary of {self.rescorer}: take a language model of "
                "this corpus, or leave the rescorer out"
            )
        return best

    def _nbest(self, batch):
        """The hypotheses of one waveform, [1, samples]."""
        if isinstance(self.model, HybridASR):
            (nbest,) = self.model.nbest(batch, count=HYPOTHESES)
            return nbest
        log_probs = self.model.encode_batch(batch, torch.ones(1))
        if self._searcher is None:
            self._searcher = _ctc_searcher(self.model)
        found = self._searcher(log_probs.cpu(), torch.ones(1))[0]
        texts = [h.text.strip() for h in found]
        return NBest("utterance", texts, [float(h.score) for h in found])


def _ctc_searcher(interface):
    """SpeechBrain's beam search for the tokens of an `EncoderASR`."""
    tokenizer = interface.tokenizer
    if hasattr(tokenizer, "ind2lab"):
        labels = [tokenizer.ind2lab[i] for i in range(len(tokenizer.ind2lab))]
    elif hasattr(tokenizer, "id_to_piece"):
        size = tokenizer.get_piece_size()
        labels = [tokenizer.id_to_piece(i) for i in range(size)]
    else:
        raise ValueError(
            f"a {type(tokenizer).__name__} does not tell its tokens: leave "
            "the rescorer out"
        )
    return CTCBeamSearcher(
        blank_index=getattr(interface.hparams, "blank_index", 0),
        vocab_list=labels,
        beam_size=BEAM,
        topk=HYPOTHESES,
    )


def _log_prob(text, words, lm, weights, ngram):
    """Log-probability of a sentence by the model, or by it and an n-gram."""
    total = words.total
    if ngram:
        share = weights.interpolation
        others = ngram.score(lm.vocabulary.split(text))
        pairs = zip(words.log_probs.tolist(), others)
        total = sum(
            _log(share * math.exp(own) + (1 - share) * math.exp(other))
            for own, other in pairs
        )
    return total + weights.unk_penalty * int(words.unknown.sum())


def _log(probability):
    """A logarithm that zero has one of, too."""
    return math.log(max(probability, sys.float_info.min))
