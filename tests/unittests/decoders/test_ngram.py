"""N-grams as ARPA files, against those of the graphs, and damaged ones."""

import math
import os
import threading
from collections import Counter

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


@pytest.mark.parametrize("smoothing", [1.0, 0.7, None])
def test_words_that_are_all_followed_by_all(smoothing, tmp_path):
    words = [f"w{index}" for index in range(10)]
    text = [f"{first} {second}" for first in words for second in words]
    text += [*words, ""]
    estimate_arpa(tmp_path / "lm", text, smoothing=smoothing)
    ngram = Ngram(tmp_path / "lm")
    for history in ([], ["w3"]):
        total = math.exp(ngram.score(history)[-1])
        for word in words:
            total += math.exp(ngram.score([*history, word])[-2])
        assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("smoothing", [1.0, None])
@pytest.mark.parametrize("order", [2, 3])
def test_what_is_left_to_the_back_off(order, smoothing, tmp_path):
    options = {"smoothing": smoothing, "vocabulary": {"a", "b"}}
    text = [*SENTENCES, "a b a b"]
    estimate_arpa(tmp_path / "all", text, order, **options)
    estimate_arpa(tmp_path / "lm", text, order, min_count=2, **options)
    ngram, whole = Ngram(tmp_path / "lm"), Ngram(tmp_path / "all")
    assert ngram.vocabulary == ["a", "b"]  # c is <unk>
    pairs = Counter(
        pair
        for line in text
        for words in [f"<s> {line} </s>".replace("c", "<unk>").split()]
        for pair in zip(words, words[1:])
    )
    kept = {(h[0], w) for h, ws in ngram.model.ngrams[2].items() for w in ws}
    assert kept == {pair for pair, count in pairs.items() if count > 1}
    for history in ([], ["a"], ["b", "a"], ["c", "b"]):
        total = math.exp(ngram.score(history)[-1])  # the end
        for word in ("a", "b", "c"):
            score = ngram.score([*history, word])[-2]
            total += math.exp(score)
            if order == 2 and ((history or ["<s>"])[-1], word) in kept:
                assert score == whole.score([*history, word])[-2]
        assert total == pytest.approx(1, abs=1e-5)


def test_witten_bell(tmp_path):
    estimate_arpa(tmp_path / "lm", ["a a b", "a"], smoothing=None)
    # After a: a, b and the end once each; three words have followed.
    # Alone: 3 of a, 1 of b, 2 ends and one more each, of 9.
    expected = [(1 + 3 * p / 9) / (3 + 3) for p in (4, 3)]
    found = Ngram(tmp_path / "lm").score(["a", "a", "b"])[1:]
    assert [math.exp(x) for x in found[:1]] == pytest.approx(expected[:1])
    found = Ngram(tmp_path / "lm").score(["a"])[1:]
    assert [math.exp(x) for x in found] == pytest.approx(expected[1:])


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


ARPA = """\\data\\
ngram 1=3
ngram 2=1

\\1-grams:
-0.5 so -0.5
-0.5 </s>
-99 <s> -0.25

\\2-grams:
-0.3 so so

\\end\\
"""


def read(folder, text, encoding="utf-8"):
    """The n-grams of a file."""
    (folder / "lm.arpa").write_text(text, encoding=encoding)
    return Ngram(folder / "lm.arpa")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_an_editor_has_written_is_read(tmp_path, encoding):
    scores = read(tmp_path, ARPA, encoding).score(["so", "so"])
    assert [round(score / 2.302585, 4) for score in scores] == [
        *(-0.75, -0.3, -1.0)
    ]


def test_a_pipe_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    pipe = tmp_path / "pipe"
    writer = threading.Thread(target=pipe.write_text, args=[ARPA])
    writer.start()
    assert Ngram(pipe).model.top_order == 2
    writer.join()


@pytest.mark.parametrize("length", range(0, len(ARPA) - 8, 7))
def test_a_file_that_was_cut_is_an_error_not_a_wait(tmp_path, length):
    with pytest.raises(ValueError, match="is no ARPA file"):
        read(tmp_path, ARPA[:length])


@pytest.mark.parametrize(
    "old, new, match",
    [
        ("1=3", "1=4", "3 of 4 1-grams"),
        ("2=1", "2=0", "1 of 0 2-grams"),
        ("-0.5 so", "0.5 so", "so: a log-probability of 0.5"),
        ("-0.5 so", "nan so", "so: a log-probability of nan"),
        ("-0.3 so so", "inf so so", "so so: a log-probability of inf"),
        ("so -0.5", "so nan", "so: a back-off weight of nan"),
        ("</s>", "end", "no </s> among its words"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, old, new, match):
    with pytest.raises(ValueError, match=match):
        read(tmp_path, ARPA.replace(old, new))
