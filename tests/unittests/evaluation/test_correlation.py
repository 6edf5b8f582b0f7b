"""Correlations, and whether two predictors differ."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from speechbrain_mpq.evaluation.correlation import (
    mse,
    paired_bootstrap,
    pcc,
    srcc,
)


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


def test_refusals():
    with pytest.raises(ValueError, match=r"must be \[items\]"):
        pcc([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"must be \[items\]"):
        mse([], [])
    with pytest.raises(ValueError, match="NaN"):
        srcc([1, np.nan], [1, 2])
