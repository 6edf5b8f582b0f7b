"""Significance: NIST SCTK's check vector, slow walks, scipy's tests."""

import random

import numpy as np
import pytest
from scipy.stats import binomtest, pearsonr, spearmanr

from speechbrain_mpq.evaluation.significance import (
    mapsswe,
    mcnemar,
    mse,
    paired_bootstrap,
    pcc,
    segments,
    srcc,
)
from speechbrain_mpq.evaluation.wer import align, word_errors


def state_machine(reference, hypothesis_1, hypothesis_2, min_good=2):
    """Errors by segment from the states that SCTK draws: b, e and g."""
    sides = []
    for hypothesis in (hypothesis_1, hypothesis_2):
        gaps, inserted = [], 0
        for edit in align(reference, hypothesis, (4, 3, 3)):
            if edit.kind == "insertion":
                inserted += 1
            else:
                gaps.append((inserted, edit.kind != "correct"))
                inserted = 0
        sides.append(gaps + [(inserted, False)])
    events = []
    for index, ((in_1, bad_1), (in_2, bad_2)) in enumerate(zip(*sides)):
        if in_1 or in_2:
            events.append((in_1, in_2))
        if index + 1 < len(sides[0]):
            events.append((int(bad_1), int(bad_2)))
    state, good, counts, found = "b", 0, [0, 0], []
    for event in events:
        if any(event):
            state = "e"
            counts = [counts[0] + event[0], counts[1] + event[1]]
        elif state != "b":
            good = good + 1 if state == "g" else 1
            state = "g"
            if good == min_good:
                found.append(tuple(counts))
                state, counts = "b", [0, 0]
    return found + ([tuple(counts)] if state != "b" else [])


def spoiled(words, chance):
    heard = []
    for word in words:
        kind = chance.random()
        if kind > 0.2:
            heard.append(word)
        elif kind > 0.1:
            heard.append("x")
        if kind < 0.05:
            heard.append("y")
    return heard


@pytest.mark.parametrize("min_good", [1, 2, 3])
def test_segments_agree_with_the_state_machine(min_good):
    chance = random.Random(min_good)
    for _ in range(300):
        words = chance.choices("abcdefgh", k=chance.randint(1, 14))
        heard = spoiled(words, chance), spoiled(words, chance)
        found = segments(words, *heard, min_good=min_good)
        expected = state_machine(words, *heard, min_good=min_good)
        assert [(s.errors_1, s.errors_2) for s in found] == expected


def test_no_error_is_lost():
    chance = random.Random(9)
    for _ in range(100):
        words = chance.choices("abcdefgh", k=10)
        one, two = spoiled(words, chance), spoiled(words, chance)
        edits = [e.kind for e in align(words, one, (4, 3, 3))]
        wrong = len(edits) - edits.count("correct")
        found = segments(words, one, two)
        assert sum(s.errors_1 for s in found) == wrong
        assert wrong >= word_errors(words, one).errors


def test_bounds_share_the_right_words_between():
    found = segments("a b c d e f g h", "a b c x e f g h", "a b c d e f x h")
    assert [(s.start, s.stop) for s in found] == [(1, 6), (4, 8)]


def test_one_right_word_does_not_end_a_segment():
    found = segments("a b c d e", "x b y d e", "a b c d e")
    assert found == [(0, 5, 2, 0)]


def test_insertions_are_errors():
    assert segments("a b", "x a b", "a b") == [(0, 2, 1, 0)]
    assert segments("a b", "a b", "a b x y") == [(0, 2, 0, 2)]


def test_sctk_check_vector():
    """SCTK test1a: 3 segments in 2 sentences, 9 against 7 errors."""
    pairs = [
        ("a b c d e f g h", "w x y z e f g p", "a w x y e f g h"),
        ("a b c d", "w x y z", "w x y z"),
    ]
    result = mapsswe(pairs)
    assert sum(s.errors_1 for p in pairs for s in segments(*p)) == 9
    assert sum(s.errors_2 for p in pairs for s in segments(*p)) == 7
    assert result.segments == 3
    assert result.mean == pytest.approx(0.667, abs=5e-4)
    assert result.std == pytest.approx(0.577, abs=5e-4)
    assert result.z == pytest.approx(2.0)
    assert result.p == pytest.approx(0.0455, abs=1e-4)
    assert result.significant


def test_swapping_the_systems_turns_the_sign():
    chance = random.Random(3)
    pairs = []
    for _ in range(40):
        words = chance.choices("abcdefgh", k=8)
        pairs.append((words, spoiled(words, chance), spoiled(words, chance)))
    forth = mapsswe(pairs)
    back = mapsswe([(words, two, one) for words, one, two in pairs])
    assert forth.z == -back.z != 0
    assert forth.p == back.p


def test_without_variation_nothing_is_significant():
    assert mapsswe([("a", "a", "a")]) == (0, 1, 0, 0, 0)
    always = mapsswe([("a", "x", "a")] * 5)
    assert (always.z, always.p, always.mean) == (0, 1, 1)


def test_min_good_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        segments("a", "b", "a", min_good=0)


def walk_paths(reference, hypothesis_1, hypothesis_2, min_good=2):
    """Errors by segment, walking two alignments by index to both ends."""
    paths = [
        [edit.kind for edit in align(reference, hypothesis, (4, 3, 3))]
        for hypothesis in (hypothesis_1, hypothesis_2)
    ]
    at, last_good = [0, 0], [0, 0]
    state, good, found = "b", 0, []

    def right(side):
        inside = at[side] < len(paths[side])
        return inside and paths[side][at[side]] == "correct"

    def store(ends):
        counts = []
        for path, last, end in zip(paths, last_good, ends):
            span = path[max(0, last - (min_good - 1)) : end + 1]
            counts.append(len(span) - span.count("correct"))
        found.append(tuple(counts))

    while any(i < len(path) for i, path in zip(at, paths)):
        for side, path in enumerate(paths):
            while at[side] < len(path) and path[at[side]] == "insertion":
                at[side] += 1
                state = "e"
        if not (right(0) and right(1)):
            state = "e"
        elif state == "b":
            last_good = list(at)
        else:
            good = good + 1 if state == "g" else 1
            state = "g"
            if good == min_good:
                store(at)
                last_good, state = list(at), "b"
        at = [min(i + 1, len(path)) for i, path in zip(at, paths)]
    if state != "b":
        store([i - 1 for i in at])
    return found


def added(words, chance):
    """Words with some more between, before and behind them."""
    heard = list(words)
    for _ in range(chance.choice([0, 0, 1, 2])):
        heard.insert(chance.randint(0, len(heard)), "z")
    return heard


@pytest.mark.parametrize("min_good", [1, 2, 3])
def test_segments_agree_with_a_walk_along_the_paths(min_good):
    chance = random.Random(min_good)
    for _ in range(400):
        words = chance.choices("abcdefgh", k=chance.randint(0, 12))
        outputs = [added(spoiled(words, chance), chance) for _ in range(2)]
        expected = walk_paths(words, *outputs, min_good)
        found = segments(words, *outputs, min_good)
        assert [(s.errors_1, s.errors_2) for s in found] == expected
        swapped = segments(words, *outputs[::-1], min_good)
        assert [s[:2] for s in swapped] == [s[:2] for s in found]


def test_insertions_behind_the_last_word_count_for_both():
    assert segments("a b", "a b", "a b x y") == [(0, 2, 0, 2)]
    assert segments("a b", "a b x y", "a b") == [(0, 2, 2, 0)]
    assert segments("a b", "a b z", "a b x y") == [(0, 2, 1, 2)]


def test_is_the_binomial_test():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.random((2, 60)) < [[0.8], [0.6]]
        result = mcnemar(first, second)
        disagree = result.only_first + result.only_second
        wanted = binomtest(result.only_first, disagree).pvalue
        assert result.p == pytest.approx(wanted)
        assert mcnemar(second, first).p == result.p
        assert result.significant == (result.p < 0.05)


def test_other_lengths_are_refused():
    with pytest.raises(ValueError):
        mcnemar([True], [True, False])


def test_known_measures():
    rng = np.random.default_rng(0)
    labels = rng.standard_normal(100)
    guess = (labels + rng.standard_normal(100)).round(1)  # with ties
    assert pcc(guess, labels) == pytest.approx(pearsonr(guess, labels)[0])
    assert srcc(guess, labels) == pytest.approx(spearmanr(guess, labels)[0])
    assert mse(labels + 2, labels) == pytest.approx(4)


def test_interval_holds_what_is_the_same():
    rng = np.random.default_rng(0)
    labels = rng.standard_normal(200)
    first, second = labels + rng.standard_normal((2, 200))
    difference, low, high = paired_bootstrap(first, second, labels, draws=200)
    assert low < 0 < high and low < difference < high
    same = paired_bootstrap(first, second, labels, draws=200)
    assert same == (difference, low, high)
    worse = labels + 3 * rng.standard_normal(200)
    _, low, high = paired_bootstrap(first, worse, labels, draws=200)
    assert high < 0
    _, low, high = paired_bootstrap(first, worse, labels, mse, draws=200)
    assert low > 0


def test_interval_over_seeds_is_that_of_the_mean_difference():
    """Squared errors are means over items: the interval is known."""
    rng = np.random.default_rng(0)
    labels = rng.standard_normal(400)
    own = rng.standard_normal(400)  # what all seeds get wrong
    first = labels + own + 0.5 * rng.standard_normal((3, 400))
    second = labels + 1.1 * own + 0.5 * rng.standard_normal((3, 400))
    errors = [((x - labels) ** 2).mean(0) for x in (first, second)]
    each = errors[1] - errors[0]
    found, low, high = paired_bootstrap(first, second, labels, mse)
    assert found == pytest.approx(each.mean())
    half = 1.96 * each.std() / 20
    assert low == pytest.approx(found - half, abs=0.1 * half)
    assert high == pytest.approx(found + half, abs=0.1 * half)
    # Items are drawn for all seeds alike: what they share is no noise.
    _, low, high = paired_bootstrap(first, first + 0.1, labels, mse)
    shifted = (((first + 0.1 - labels) ** 2) - (first - labels) ** 2).mean(0)
    half = 1.96 * shifted.std() / 20
    assert high - low == pytest.approx(2 * half, rel=0.1)


def test_refusals():
    with pytest.raises(ValueError, match=r"must be \[items\]"):
        pcc([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"must be \[items\]"):
        mse([], [])
    with pytest.raises(ValueError, match="NaN"):
        srcc([1, np.nan], [1, 2])
