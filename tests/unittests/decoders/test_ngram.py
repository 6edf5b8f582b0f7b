"""N-grams as ARPA files, against those of the graphs."""

import math

import numpy as np
import pytest

from speechbrain_mpq.decoders.chain_graphs import (
    ctc_graph,
    estimate_ngram,
    numerator_graph,
    phone_lattice,
)
from speechbrain_mpq.decoders.ngram import Ngram, estimate_arpa

SENTENCES = ["a b c", "b a", "c c b a", "a"]
WORDS = ["a", "b", "c"]


def test_bigram_is_that_of_the_graphs(tmp_path):
    estimate_arpa(tmp_path / "lm", SENTENCES, smoothing=0.7)
    lattices = [
        phone_lattice([[[WORDS.index(w)]] for w in sentence.split()])
        for sentence in SENTENCES
    ]
    expected = estimate_ngram(lattices, 3, smoothing=0.7)
    found = Ngram(tmp_path / "lm").bigram(WORDS)
    np.testing.assert_allclose(
        found.probabilities, expected.probabilities, rtol=1e-5
    )
    np.testing.assert_array_equal(found.next_state, expected.next_state)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_one(order, tmp_path):
    estimate_arpa(tmp_path / "lm", SENTENCES, order)
    ngram = Ngram(tmp_path / "lm")
    assert ngram.vocabulary == WORDS
    for history in (["a"], ["b", "a"], ["c", "b"]):
        total = math.exp(ngram.score(history)[-1])  # the end
        for word in WORDS:
            total += math.exp(ngram.score([*history, word])[-2])
        assert total == pytest.approx(1, abs=1e-5)


def test_trigram_is_too_long_for_the_exact_search(tmp_path):
    estimate_arpa(tmp_path / "lm", SENTENCES, order=3)
    with pytest.raises(ValueError, match=r"order 3.*\[decode\]"):
        Ngram(tmp_path / "lm").bigram(WORDS)


def test_words_that_are_not_there(tmp_path):
    estimate_arpa(tmp_path / "lm", SENTENCES)
    with pytest.raises(ValueError, match="does not have 'd'"):
        Ngram(tmp_path / "lm").bigram([*WORDS, "d"])
    with pytest.raises(ValueError, match="at least one sentence"):
        estimate_arpa(tmp_path / "lm", [])


def test_ctc_graph_has_blanks_between_equal_phones():
    lattice = phone_lattice([[[1, 1, 2]]])
    ngram = estimate_ngram([lattice], phones=3)
    graph = ctc_graph(numerator_graph(lattice, ngram), blank=0)
    assert graph.min_frames == 4  # 1 0 1 2
    arcs = set(zip(graph.sources.tolist(), graph.targets.tolist()))
    phones = graph.entry.tolist()
    pairs = {(phones[a], phones[b]) for a, b in arcs}
    assert (1, 1) not in pairs
    assert {(1, 0), (0, 1), (1, 2), (0, 2), (2, 0)} == pairs
