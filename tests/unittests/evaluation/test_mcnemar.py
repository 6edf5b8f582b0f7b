"""McNemar's exact test against scipy's binomial test."""

import numpy as np
import pytest
from scipy.stats import binomtest

from speechbrain_mpq.evaluation.mcnemar import mcnemar


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
