"""The ceiling, against direct minimization and against solved plans."""

import numpy as np
import pytest
from scipy.optimize import minimize

from speechbrain_mpq.allocation.additivity import planned_gain_db
from speechbrain_mpq.allocation.ceiling import am_gm, ceiling, limited_bits
from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.allocation.solver import allocate_bits

ALL_BITS = tuple(range(1, 17))


def make_table(sensitivities, sizes, bits=ALL_BITS, floor=0.0):
    """Scores that follow the model of rounding."""
    names = [f"c{i}" for i in range(len(sizes))]
    return ScoreTable(
        {
            name: {b: floor + float(n * s * 4.0**-b) for b in bits}
            for name, s, n in zip(names, sensitivities, sizes)
        },
        {name: {f"{name}.weight": int(n)} for name, n in zip(names, sizes)},
    )


def random_model(seed, spread=2.0, clusters=6):
    """Sensitivities over some orders of magnitude, and sizes."""
    rng = np.random.default_rng(seed)
    sensitivities = np.exp(spread * rng.normal(size=clusters))
    return sensitivities, rng.integers(5, 50, clusters)


def best_by_descent(s, n, average, least, most):
    """Least damage of real-valued bits within limits, by a general solver."""
    found = minimize(
        lambda b: np.log(n @ (s * 4.0**-b)),
        np.full(len(s), float(average)),
        bounds=[(least, most)] * len(s),
        constraints={"type": "eq", "fun": lambda b: n @ (b - average)},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return np.exp(found.fun)


@pytest.mark.parametrize("seed", range(5))
def test_am_gm_is_what_the_best_bits_win(seed):
    s, n = random_model(seed)
    best = best_by_descent(s, n, 4, -100, 100)
    gain = n @ (s * 4.0**-4) / best
    assert am_gm(s, n) == pytest.approx(gain, rel=1e-4)
    table = make_table(s, n)
    assert ceiling(table, 4).am_gm_db == pytest.approx(10 * np.log10(gain))


@pytest.mark.parametrize("seed", range(5))
def test_limited_bits_are_the_best_within_limits(seed):
    s, n = random_model(seed, spread=5)
    for average in (2.0, 2.5, 4.0, 7.5, 8.0):
        bits = limited_bits(s, n, average, 2, 8)
        assert ((bits >= 2) & (bits <= 8)).all()
        assert n @ bits / n.sum() == pytest.approx(average)
        best = best_by_descent(s, n, average, 2, 8)
        assert n @ (s * 4.0**-bits) == pytest.approx(best, rel=1e-3)


def test_no_plan_wins_more_than_the_ceiling_and_fine_ones_reach_it():
    rng = np.random.default_rng(0)
    s = 4.0 ** rng.normal(size=200)
    table = make_table(s, rng.integers(800, 1000, 200))
    for bits in (2.5, 4, 6):
        plan = allocate_bits(table, average_bits=bits, min_bits=1)
        best = ceiling(table, bits)
        gain = planned_gain_db(table, plan)
        assert gain <= best.limited_db <= best.am_gm_db + 1e-9
        # Whole bits cost something: 0.26 dB by theory, evenly spread.
        assert gain == pytest.approx(best.limited_db, abs=0.5)


def test_equal_sensitivities_leave_nothing_to_win():
    table = make_table([3.0] * 4, [1, 10, 100, 1000])
    best = ceiling(table, 4)
    assert best.am_gm_db == pytest.approx(0, abs=1e-9)
    assert best.limited_db == pytest.approx(0, abs=1e-9)
    assert best.insensitive == 0


def test_a_common_floor_does_not_matter():
    s, n = random_model(0)
    with_floor = make_table(s, n, bits=(2, 4, 8), floor=100.0)
    plain = make_table(s, n, bits=(2, 4, 8))
    assert ceiling(with_floor, 4).am_gm_db == pytest.approx(
        ceiling(plain, 4).am_gm_db
    )


def test_insensitive_clusters_are_counted_and_bounded():
    table = make_table([4.0, 1.0, 0.0], [10, 10, 10], bits=(2, 4, 8))
    best = ceiling(table, 4)
    assert best.insensitive == 1
    expected = 10 * np.log10(am_gm([4.0, 1.0, 1.0], [1, 1, 1]))
    assert best.am_gm_db == pytest.approx(expected)
    nothing = make_table([0.0, 0.0], [10, 10])
    assert ceiling(nothing, 4).limited_db == 0
    assert ceiling(nothing, 4).insensitive == 2
    signed = ScoreTable(
        {"a": {2: -1.0, 4: 0.0}, "b": {2: 1.0, 4: 0.0}},
        {"a": {"a.weight": 8}, "b": {"b.weight": 8}},
        signed=True,
    )
    assert ceiling(signed, 3).insensitive == 1


def test_bad_input():
    with pytest.raises(ValueError, match="two candidates"):
        ceiling(make_table([1.0], [1], bits=(4,)), 4)
    for bits in (1, 9, float("nan")):
        with pytest.raises(ValueError, match="2 to 8"):
            ceiling(make_table([1.0], [1], bits=(2, 8)), bits)
