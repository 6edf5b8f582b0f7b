"""Sentences of the grammar."""

import numpy as np

from speechbrain_mpq.simulation.sentences import sentence, vocabulary


def test_same_generator_same_sentence():
    first = [sentence(np.random.default_rng(7)) for _ in range(2)]
    assert first[0] == first[1]
    assert sentence(np.random.default_rng(8)) != first[0]


def test_sentences_use_every_word_and_no_other():
    rng = np.random.default_rng(0)
    words = [word for _ in range(1500) for word in sentence(rng).split()]
    assert set(words) == set(vocabulary())


def test_words_are_lower_case_letters_without_the_rhyming_ones():
    words = vocabulary()
    assert 60 <= len(words) <= 80
    assert all(word.isalpha() and word.islower() for word in words)
    letters = {word for word in words if len(word) == 1}
    assert letters
    assert not letters & set("bcdegptvzajk")


def test_mean_length_is_eight_to_nine_words():
    rng = np.random.default_rng(0)
    lengths = [len(sentence(rng).split()) for _ in range(500)]
    assert set(lengths) == {8, 9}
