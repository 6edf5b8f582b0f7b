"""Kaldi's decoder against our own exact search and all word sequences."""

import itertools
import json
import math
import sys

import numpy as np
import pytest

from speechbrain_mpq.decoders import kaldi_decoder
from speechbrain_mpq.decoders.nbest import read_nbest, write_nbest
from speechbrain_mpq.decoders.ngram import Ngram, estimate_arpa
from speechbrain_mpq.decoders.viterbi import best_path, word_graph
from speechbrain_mpq.decoders.vocabulary import Lexicon

LEXICON = Lexicon(
    {
        "tea": [["t", "iy"]],
        "tee": [["t", "iy"]],  # sounds alike
        "teat": [["t", "iy", "t"]],  # begins alike
        "eat": [["iy", "t"]],
        "a": [["ah"], ["ey"]],
    }
)
SENTENCES = ["tea a eat", "a tee", "teat a", "eat tea", "a eat eat a"]


@pytest.fixture
def decoder_class():
    pytest.importorskip("kaldi_decoder")
    from speechbrain_mpq.decoders.kaldi_decoder import WordDecoder

    return WordDecoder


def ngram(folder, order=2):
    estimate_arpa(folder / "lm.arpa", SENTENCES, order)
    return Ngram(folder / "lm.arpa")


def noise(seed, frames):
    """Log-probabilities of no words in particular."""
    size = 2 * len(LEXICON.phones)
    outputs = 2 * np.random.default_rng(seed).normal(size=(frames, size))
    return outputs - np.log(np.exp(outputs).sum(1, keepdims=True))


@pytest.mark.parametrize("acoustic_scale, lm_scale", [(1, 1), (0.5, 1.5)])
@pytest.mark.parametrize("seed", range(3))
def test_one_best_is_that_of_the_exact_search(
    decoder_class, tmp_path, acoustic_scale, lm_scale, seed
):
    model = ngram(tmp_path)
    graph, labels = word_graph(
        LEXICON, model.vocabulary, model.bigram(model.vocabulary), lm_scale
    )
    outputs = noise(seed, 30)
    states, score = best_path(graph, acoustic_scale * outputs)
    numbers = [labels[s] for s in states if labels[s] is not None]
    words = [model.vocabulary[i] for i in numbers]
    decoder = decoder_class(LEXICON, model, acoustic_scale, lm_scale, beam=50.0)
    found = decoder.nbest(outputs, 1)
    assert found.hypotheses == [" ".join(words)]
    assert found.scores[0] == pytest.approx(score, abs=1e-3)
    (parts,) = found.details
    assert found.scores[0] == pytest.approx(
        acoustic_scale * parts["acoustic_scores"]
        + lm_scale * parts["lm_scores"]
    )
    assert parts["lm_scores"] == pytest.approx(math.fsum(model.score(words)))


UNEVEN = """\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-1 <s> 0
-0.5 </s>
-0.3 a -0.1
-0.6 eat 0

\\2-grams:
-2 a eat
-0.2 eat a

\\end\\
"""


def cheapest(text, labels, words):
    """Least cost of a word sequence in the text of G, by all of its paths."""
    arcs = [line.split() for line in text.splitlines()]
    ends = {int(a[0]): float(a[1]) for a in arcs if len(a) == 2}
    arcs = [(*map(int, a[:3]), float(a[4])) for a in arcs if len(a) == 5]
    costs = {0: 0.0}

    def back_off():
        for _ in range(3):  # the order and one more
            for one, other, label, cost in arcs:
                if label == len(words) + 1 and one in costs:
                    new = costs[one] + cost
                    costs[other] = min(new, costs.get(other, new))

    for label in labels:
        back_off()
        costs, old = {}, costs
        for one, other, own, cost in arcs:
            if own == label and one in old:
                new = old[one] + cost
                costs[other] = min(new, costs.get(other, new))
    back_off()
    return min(costs[s] + ends[s] for s in costs if s in ends)


def test_back_off_is_taken_where_it_is_the_more_probable(tmp_path):
    """As Kaldi does; the exact search takes the n-gram that there is."""
    (tmp_path / "lm.arpa").write_text(UNEVEN)
    model = Ngram(tmp_path / "lm.arpa")
    words = model.vocabulary
    text = kaldi_decoder._ngram_fst(model, words, scale=1.0)
    numbers = {word: i for i, word in enumerate(words, 1)}

    def found(*said):
        cost = cheapest(text, [numbers[word] for word in said], words)
        return -cost / math.log(10)

    # "eat" after "a" is listed with -2, backing off gives -0.1 - 0.6
    assert found("a", "eat") == pytest.approx(-0.3 - 0.7 - 0.5)
    assert sum(model.score(["a", "eat"])) / math.log(10) == pytest.approx(
        -0.3 - 2 - 0.5
    )
    bigram = model.bigram(words)
    place = {word: i for i, word in enumerate(words)}
    after = bigram.probabilities[place["a"] + 1]  # row 0: at the start
    assert np.log10(after[place["eat"]]) == pytest.approx(-2)
    # Where the listed one is the more probable, both take it.
    assert found("eat", "a") == pytest.approx(-0.6 - 0.2 - 0.1 - 0.5)
    assert sum(model.score(["eat", "a"])) / math.log(10) == pytest.approx(
        -0.6 - 0.2 - 0.1 - 0.5
    )


def aligned(outputs, phones):
    """Score of the best path of a phone sequence."""
    score = np.full(len(phones), -np.inf)
    score[0] = outputs[0, 2 * phones[0]]
    for row in outputs[1:]:
        entered = np.append(-np.inf, score[:-1]) + row[2 * np.array(phones)]
        score = np.maximum(score + row[2 * np.array(phones) + 1], entered)
    return score[-1]


def best_of_all(outputs, model, most):
    """Score of each word sequence of so many words, by trying all."""
    half, scores = math.log(0.5), {}
    for count in range(most + 1):
        for words in itertools.product(model.vocabulary, repeat=count):
            best = -np.inf
            said = LEXICON.encode(list(words))
            if sum(min(map(len, alternatives)) for alternatives in said) > len(
                outputs
            ):
                continue
            for phones in itertools.product(*said):
                for quiet in itertools.product([[], [0]], repeat=count + 1):
                    sequence = [*quiet[0]]
                    for word, after in zip(phones, quiet[1:]):
                        sequence += [*word, *after]
                    if 0 < len(sequence) <= len(outputs):
                        score = aligned(outputs, sequence)
                        best = max(best, score + half * (count + 1))
            if best > -np.inf:
                own = math.fsum(model.score(words))
                scores[" ".join(words)] = best + own
    return scores


@pytest.mark.parametrize("order", [2, 3])
def test_lists_are_the_best_of_all_word_sequences(
    decoder_class, tmp_path, order
):
    model, outputs = ngram(tmp_path, order), noise(7, 4)
    expected = best_of_all(outputs, model, most=4)
    decoder = decoder_class(LEXICON, model, beam=60.0, lattice_beam=60.0)
    found = decoder.nbest(outputs, 25)
    best = sorted(expected, key=lambda text: -expected[text])[:25]
    assert [expected[text] for text in found.hypotheses] == pytest.approx(
        found.scores, abs=1e-3
    )
    assert [expected[text] for text in best] == pytest.approx(
        found.scores, abs=1e-3
    )
    assert len(set(found.hypotheses)) == 25


def test_lists_can_be_rescored(decoder_class, tmp_path):
    decoder = decoder_class(LEXICON, ngram(tmp_path))
    lists = [decoder.nbest(noise(i, 20), 5, f"u{i}") for i in range(2)]
    write_nbest(tmp_path / "nbest.json", lists)
    again = read_nbest(tmp_path / "nbest.json")
    assert [row.hypotheses for row in again] == [r.hypotheses for r in lists]
    assert [row.scores for row in again] == [row.scores for row in lists]
    line = json.loads((tmp_path / "nbest.json").read_text().splitlines()[0])
    assert len(line["lm_scores"]) == len(line["acoustic_scores"]) == 5


def test_silence_has_no_words(decoder_class, tmp_path):
    model = ngram(tmp_path)
    outputs = np.full((10, 2 * len(LEXICON.phones)), -30.0)
    outputs[:, :2] = 0
    found = decoder_class(LEXICON, model).nbest(outputs, 1)
    assert found.hypotheses == [""]
    graph, labels = word_graph(
        LEXICON, model.vocabulary, model.bigram(model.vocabulary)
    )
    states, score = best_path(graph, outputs)
    assert [labels[s] for s in states] == [None]
    assert found.scores[0] == pytest.approx(score, abs=1e-3)


def test_search_is_made_again_with_a_wider_beam(
    decoder_class, tmp_path, monkeypatch
):
    model = ngram(tmp_path)
    outputs = 2 * np.random.default_rng(5).normal(size=(6, 10))
    wide = decoder_class(LEXICON, model).nbest(outputs, 1)
    found = decoder_class(LEXICON, model, beam=2).nbest(outputs, 1)
    assert found.hypotheses == wide.hypotheses
    module = sys.modules[decoder_class.__module__]
    monkeypatch.setattr(module, "WIDER", (1,))
    with pytest.raises(ValueError, match="6 frames: .* or a beam of 2 too"):
        decoder_class(LEXICON, model, beam=2).nbest(outputs)


def test_bad_input(decoder_class, tmp_path):
    decoder = decoder_class(LEXICON, ngram(tmp_path))
    with pytest.raises(ValueError, match="u1: outputs .* another model's"):
        decoder.nbest(np.zeros((5, 4)), utterance="u1")
    with pytest.raises(ValueError, match="u2: no word sequence fits its 0"):
        decoder.nbest(noise(0, 0), utterance="u2")
    with pytest.raises(ValueError, match="u3: outputs hold NaN"):
        decoder.nbest(noise(0, 5) * np.nan, utterance="u3")
    with pytest.raises(ValueError, match="at least one"):
        decoder.nbest(noise(0, 5), 0)
    with pytest.raises(ValueError, match="acoustic_scale 0 must be above 0"):
        decoder_class(LEXICON, ngram(tmp_path), acoustic_scale=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        decoder_class(LEXICON, ngram(tmp_path), silence_weight=1)
    with pytest.raises(ValueError, match="without pronunciation"):
        decoder_class(Lexicon({"a": [["ah"]]}), ngram(tmp_path))


def test_without_the_extra(monkeypatch, tmp_path):
    from speechbrain_mpq.decoders.kaldi_decoder import WordDecoder

    monkeypatch.setitem(sys.modules, "kaldifst", None)
    with pytest.raises(ImportError, match=r"speechbrain_mpq\[decode\]"):
        WordDecoder(LEXICON, ngram(tmp_path))
