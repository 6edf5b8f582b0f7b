"""N-best lists with a language model behind them, and its recognizer."""

import math
from types import SimpleNamespace

import pytest
import torch
from speechbrain.dataio.encoder import CTCTextEncoder

from speechbrain_mpq.decoders.nbest import NBest
from speechbrain_mpq.decoders.vocabulary import Vocabulary
from speechbrain_mpq.inference.language_model import (
    LanguageModel,
    save_language_model,
)
from speechbrain_mpq.inference.rescoring import (
    RescoringRecognizer,
    RescoringWeights,
    rescore,
)
from speechbrain_mpq.lobes.models.language_models import TiedRNNLM

WORDS = "so be it bee".split()
TOKENS = "_ abceiost"  # the blank first


@pytest.fixture
def folder(tmp_path):
    """A model that likes every word better than "bee"."""
    torch.manual_seed(0)
    model = TiedRNNLM(len(Vocabulary(WORDS)), 8)
    with torch.no_grad():
        model.out.w.bias[Vocabulary(WORDS).numbers["bee"]] = -20.0
    return save_language_model(model, tmp_path / "lm", Vocabulary(WORDS))


def recognizer(folder, spelled, lm_weight=0.5):
    """One that has heard what is spelled, in a posterior's columns."""
    made = RescoringRecognizer.__new__(RescoringRecognizer)
    made.device, made.rescorer = "cpu", folder
    made.lm = LanguageModel.from_pretrained(folder)
    made.weights = RescoringWeights(lm_weight)
    made._searcher, made._unknown, made._words = None, 0, 0
    tokenizer = CTCTextEncoder()
    tokenizer.update_from_iterable(TOKENS)
    probabilities = torch.full((1, len(spelled), len(TOKENS)), 1e-4)
    for frame, column in enumerate(spelled):
        for token, probability in column.items():
            probabilities[0, frame, TOKENS.index(token)] = probability
    made.model = SimpleNamespace(
        tokenizer=tokenizer,
        hparams=SimpleNamespace(blank_index=0),
        encode_batch=lambda wavs, lengths: probabilities.log(),
    )
    return made


# "so be it" or "so bee it": a blank between two e, or one long e
SPELLED = [
    *({"s": 1}, {"o": 1}, {" ": 1}, {"b": 1}, {"e": 1}),
    *({"_": 0.55, "e": 0.45}, {"e": 1}, {" ": 1}, {"i": 1}, {"t": 1}),
]


def test_the_language_model_has_the_last_word(folder):
    alone = recognizer(folder, SPELLED, lm_weight=0.0)
    assert alone(torch.zeros(100)) == "so bee it"
    assert recognizer(folder, SPELLED)(torch.zeros(100)) == "so be it"


def test_another_language_is_refused(folder):
    spelled = [{"c": 1}, {" ": 1}] * 300
    with pytest.raises(ValueError, match="words are not in the vocabulary"):
        recognizer(folder, spelled)(torch.zeros(100))


def test_scores_are_sums(folder):
    lm = LanguageModel.from_pretrained(folder)
    lists = [NBest("u", ["so bee it", "so it", ""], [-1.0, -2.0, -9.0])]
    weights = RescoringWeights(lm_weight=0.7, word_bonus=0.3)
    (ranked,) = rescore(lists, lm, weights)
    for text, score, parts in zip(
        ranked.hypotheses, ranked.scores, ranked.details
    ):
        own = parts["recognizer_scores"] + 0.7 * parts["lm_scores"]
        assert score == pytest.approx(own + 0.3 * len(text.split()))
        (words,) = lm.score([text])
        assert parts["lm_scores"] == pytest.approx(words.total)
    assert ranked.scores == sorted(ranked.scores, reverse=True)


def test_infinite_scores_are_refused(folder):
    lm = LanguageModel.from_pretrained(folder)
    lists = [NBest("u", ["so"], [-1.0])]
    with pytest.raises(ValueError, match="u: 'so' has a score of"):
        rescore(lists, lm, RescoringWeights(word_bonus=math.inf))
