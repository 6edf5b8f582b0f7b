"""Word errors against jiwer and by hand."""

import random

import jiwer
import pytest

from speechbrain_mpq.evaluation.wer import WordErrors, align, word_errors


def random_sentences(count, seed=0):
    chance = random.Random(seed)
    for _ in range(count):
        yield (
            " ".join(chance.choices("abcd", k=chance.randint(1, 9))),
            " ".join(chance.choices("abcd", k=chance.randint(0, 9))),
        )


def test_rate_agrees_with_jiwer():
    for reference, hypothesis in random_sentences(200):
        theirs = 100 * jiwer.wer(reference, hypothesis)
        assert word_errors(reference, hypothesis).rate == pytest.approx(theirs)


def test_alignment_rebuilds_both_sides():
    for reference, hypothesis in random_sentences(100, seed=1):
        edits = align(reference, hypothesis)
        said = [edit.reference for edit in edits if edit.reference]
        heard = [edit.hypothesis for edit in edits if edit.hypothesis]
        assert " ".join(said) == reference
        assert " ".join(heard) == hypothesis
        for kind, word, other in edits:
            assert (kind == "correct") == (word == other)


def test_each_kind_is_counted():
    assert word_errors("a b c", "a c") == WordErrors(0, 1, 0, 3)
    assert word_errors("a c", "a b c") == WordErrors(0, 0, 1, 2)
    assert word_errors("a b c", "a x c") == WordErrors(1, 0, 0, 3)
    assert word_errors("a b", "") == WordErrors(0, 2, 0, 2)
    assert word_errors([], ["x"]) == WordErrors(0, 0, 1, 0)


def test_ties_prefer_a_substitution():
    assert word_errors("a b", "b c") == WordErrors(2, 0, 0, 2)


def test_weights_change_the_alignment():
    kinds = [edit.kind for edit in align("a b", "b c", (3, 1, 1))]
    assert kinds == ["deletion", "correct", "insertion"]


def test_counts_add_up():
    total = sum((word_errors("a b", x) for x in ("a b", "a", "")), WordErrors())
    assert total == WordErrors(0, 3, 0, 6)
    assert total.rate == 50.0


def test_no_reference_word_has_no_rate():
    with pytest.raises(ValueError, match="no reference words"):
        word_errors("", "something").rate  # noqa: B018
