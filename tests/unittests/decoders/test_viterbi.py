"""The search for words against all paths."""

import itertools

import numpy as np
import pytest

from speechbrain_mpq.decoders.chain_graphs import (
    denominator_graph,
    estimate_ngram,
    numerator_graph,
    phone_lattice,
)
from speechbrain_mpq.decoders.ngram import Ngram, estimate_arpa
from speechbrain_mpq.decoders.viterbi import (
    ExactDecoder,
    best_path,
    word_graph,
)
from speechbrain_mpq.decoders.vocabulary import Lexicon

LEXICON = Lexicon(
    {"tea": [["t", "iy"]], "eat": [["iy", "t"]], "a": [["ah"], ["ey"]]}
)
WORDS = ["tea", "eat", "a"]


def bigram():
    said = [[0, 2, 1], [2, 0], [1, 2]]
    sentences = [phone_lattice([[[w]] for w in words]) for words in said]
    return estimate_ngram(sentences, phones=3)


def test_best_path_is_the_best_of_all():
    lattice = phone_lattice([[[0, 1]], [[1, 0], [0]]])
    graph = denominator_graph(estimate_ngram([lattice], phones=2))
    outputs = np.random.default_rng(0).normal(size=(5, 4))
    weights = np.full((graph.states,) * 2, -np.inf)
    weights[graph.sources, graph.targets] = graph.log_weights
    best = -np.inf
    # A path is a state in each frame, and whether it has been entered anew.
    for states in itertools.product(range(graph.states), repeat=5):
        for anew in itertools.product([False, True], repeat=4):
            score = graph.initial[states[0]] + graph.final[states[-1]]
            score += outputs[0, graph.entry[states[0]]]
            for t, enters in enumerate(anew, start=1):
                if enters:
                    score += weights[states[t - 1], states[t]]
                    score += outputs[t, graph.entry[states[t]]]
                elif states[t] == states[t - 1]:
                    score += outputs[t, graph.loop[states[t]]]
                else:
                    score = -np.inf
            best = max(best, score)
    _, found = best_path(graph, outputs)
    assert found == pytest.approx(best)


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("silent", [False, True])
def test_words_of_clear_outputs(scale, silent):
    graph, labels = word_graph(LEXICON, WORDS, bigram(), scale)
    numbers = LEXICON.numbers
    said = ["t", "iy", "ey", "iy", "t"]  # tea a eat
    if silent:
        said = ["sil", *said[:2], "sil", *said[2:], "sil"]
    outputs = []
    for phone in said:
        for pdf in (0, 1, 1):
            outputs.append(np.zeros(2 * len(LEXICON.phones)))
            outputs[-1][2 * numbers[phone] + pdf] = 10
    states, _ = best_path(graph, np.stack(outputs))
    words = [WORDS[labels[s]] for s in states if labels[s] is not None]
    assert words == ["tea", "a", "eat"]


def test_no_path():
    lattice = phone_lattice([[[0, 1]]])
    graph = numerator_graph(lattice, estimate_ngram([lattice], phones=2))
    assert best_path(graph, np.zeros((1, 4))) == ([], -np.inf)


def test_bigram_of_other_words():
    with pytest.raises(ValueError, match="a bigram of 2 words.* 3 words"):
        word_graph(LEXICON, WORDS[:2], bigram())


@pytest.mark.parametrize("ctc", [False, True])
def test_a_graph_of_another_model_is_refused(ctc, tmp_path):
    estimate_arpa(tmp_path / "lm.arpa", ["tea eat", "a"])
    decoder = ExactDecoder(LEXICON, Ngram(tmp_path / "lm.arpa"), ctc=ctc)
    width = len(LEXICON.phones) * (1 if ctc else 2)
    decoder(np.zeros((9, width)))
    with pytest.raises(ValueError, match="graph of .*another model's lexicon"):
        decoder(np.zeros((9, width + 2)))
