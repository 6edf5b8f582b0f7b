"""Lattices, phone n-grams and graphs of LF-MMI."""

import itertools

import numpy as np
import pytest

from speechbrain_mpq.decoders.chain_graphs import (
    denominator_graph,
    estimate_ngram,
    numerator_graph,
    phone_lattice,
)


def paths(lattice, node=0, before=(), mass=1.0):
    """Every phone sequence of a lattice and its probability."""
    if lattice.final[node]:
        yield before, mass * lattice.final[node]
    for target, probability in lattice.arcs[node]:
        phone = lattice.phones[target]
        yield from paths(lattice, target, (*before, phone), mass * probability)


WORDS = [[[1], [2, 3]], [[3]], [[1, 2]]]


@pytest.mark.parametrize("edge", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("silence", [None, 0])
def test_lattice_is_a_distribution(edge, silence):
    lattice = phone_lattice(WORDS, silence, edge_silence=edge)
    masses = dict(paths(lattice))
    assert sum(masses.values()) == pytest.approx(1)
    silent = silence == 0
    assert any(0 in phones for phones in masses) == silent
    spoken = {tuple(p for p in phones if p) for phones in masses}
    assert spoken == {(1, 3, 1, 2), (2, 3, 3, 1, 2)}
    if silent and edge == 1:
        assert all(p[0] == 0 and p[-1] == 0 for p in masses)
    if silent and edge == 0:
        assert all(p[0] != 0 and p[-1] != 0 for p in masses)


def test_counts_are_expected_ones():
    lattice = phone_lattice(WORDS, silence=0)
    found = estimate_ngram([lattice], phones=4, smoothing=0)
    counts = np.zeros((5, 5))
    for phones, mass in paths(lattice):
        for pair in itertools.pairwise((-1, *phones, 4)):
            counts[pair[0] + 1, pair[1]] += mass
    counts /= counts.sum(1, keepdims=True)
    np.testing.assert_allclose(found.probabilities, counts, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4, 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("extra", [0, 3, 2000])
def test_ngram_sums_to_one_and_allows_its_transcripts(order, smoothing, extra):
    lattices = [phone_lattice(WORDS, silence=0), phone_lattice([[[3, 3]]])]
    model = estimate_ngram(lattices, 4, order, extra, smoothing)
    np.testing.assert_allclose(model.probabilities.sum(1), 1)
    assert len(model.histories) <= 5 + extra
    for lattice in lattices:
        for phones, _ in paths(lattice):
            state = 0
            for position, phone in enumerate(phones):
                assert model.probabilities[state, phone] > 0
                state = model.next_state[state, phone]
                history = model.histories[state]
                said = (-1, *phones[: position + 1])
                assert said[-len(history) :] == history
                assert len(history) < order
            assert model.probabilities[state, -1] > 0


def test_longer_histories_fit_better():
    generator = np.random.default_rng(0)
    lattices = [
        phone_lattice([[generator.integers(4, size=12).tolist()]])
        for _ in range(5)
    ]
    scores = []
    for order in (2, 3, 4):
        model = estimate_ngram(lattices, 4, order, smoothing=0)
        score = 0.0
        for lattice in lattices:
            ((phones, _),) = paths(lattice)
            state = 0
            for phone in phones:
                score += np.log(model.probabilities[state, phone])
                state = model.next_state[state, phone]
        scores.append(score)
    assert scores[0] < scores[1] < scores[2]


def test_min_frames_is_the_shortest_pronunciation():
    lattice = phone_lattice(WORDS, silence=0)
    model = estimate_ngram([lattice], phones=4)
    assert numerator_graph(lattice, model).min_frames == 4
    unseen = phone_lattice([[[2, 2]]])
    assert numerator_graph(unseen, model).min_frames == 2
    model = estimate_ngram([lattice], phones=4, smoothing=0)
    assert numerator_graph(unseen, model).min_frames is None


def test_denominator_arcs_are_probabilities():
    lattices = [phone_lattice(WORDS, silence=0)]
    for order in (2, 3, 4):
        graph = denominator_graph(estimate_ngram(lattices, 4, order))
        leaving = np.bincount(graph.sources, np.exp(graph.log_weights))
        np.testing.assert_allclose(leaving + np.exp(graph.final), 1)
        assert np.exp(graph.initial).sum() < 1  # the rest says nothing


def test_bad_input_names_the_utterance():
    with pytest.raises(ValueError, match="utterance u1: an empty transcript"):
        phone_lattice([], utterance="u1")
    with pytest.raises(ValueError, match="utterance u2: word 1"):
        phone_lattice([[[1]], [[]]], utterance="u2")
    model = estimate_ngram([phone_lattice([[[1]]])], phones=2)
    with pytest.raises(ValueError, match="utterance u3: phone 7 .* the 2"):
        numerator_graph(phone_lattice([[[7]]]), model, "u3")
    with pytest.raises(ValueError, match="phone 7 .* the 2"):
        estimate_ngram([phone_lattice([[[7]]])], phones=2)
    with pytest.raises(ValueError, match="a bigram"):
        estimate_ngram([phone_lattice([[[1]]])], phones=2, order=1)
    with pytest.raises(ValueError, match="at least one transcript"):
        estimate_ngram([], phones=2)
