"""How well scores are predicted: correlations, and whether two differ."""

import numpy as np
from scipy.stats import rankdata


def pcc(predictions, labels):
    """Pearson's correlation.

    Arguments
    ---------
    predictions, labels : array_like
        [items].

    Returns
    -------
    float
        NaN where either is constant.

    Example
    -------
    >>> pcc([1, 2, 3], [2, 4, 6]), pcc([1, 1, 1], [2, 4, 6])
    (1.0, nan)
    """
    x, y = _checked(predictions, labels)
    x, y = x - x.mean(), y - y.mean()
    energy = np.sqrt((x @ x) * (y @ y))
    return round(float(x @ y / energy), 12) if energy > 0 else float("nan")


def srcc(predictions, labels):
    """Spearman's rank correlation.

    Arguments
    ---------
    predictions, labels : array_like
        [items].

    Returns
    -------
    float

    Example
    -------
    >>> srcc([1, 10, 100], [2, 4, 6])
    1.0
    """
    x, y = _checked(predictions, labels)
    return pcc(rankdata(x), rankdata(y))


def mse(predictions, labels):
    """Mean squared error.

    Arguments
    ---------
    predictions, labels : array_like
        [items].

    Returns
    -------
    float

    Example
    -------
    >>> mse([1, 2], [1, 4])
    2.0
    """
    x, y = _checked(predictions, labels)
    return float(np.mean((x - y) ** 2))


def paired_bootstrap(
    first, second, labels, measure=pcc, draws=2000, seed=1234, level=0.95
):
    """Interval of the difference between two predictors of the same items.

    Items are drawn with replacement, the same ones for both.

    Arguments
    ---------
    first, second, labels : array_like
        [items].
    measure : callable
        Takes (predictions, labels).
    draws : int
    seed : int
    level : float
        Share of the draws inside the interval.

    Returns
    -------
    difference : float
        Of all items, second minus first.
    low, high : float
        No difference is likely where zero lies between them.

    Example
    -------
    >>> labels = np.arange(50.0)
    >>> good, bad = labels + np.sin(labels), labels + 40 * np.sin(labels)
    >>> difference, low, high = paired_bootstrap(good, bad, labels)
    >>> low < difference < high < 0
    True
    """
    first, labels = _checked(first, labels)
    second, labels = _checked(second, labels)
    rng = np.random.default_rng(seed)
    differences = []
    for _ in range(draws):
        items = rng.integers(len(labels), size=len(labels))
        pair = [measure(x[items], labels[items]) for x in (first, second)]
        differences.append(pair[1] - pair[0])
    tail = (1 - level) / 2
    low, high = np.nanquantile(differences, [tail, 1 - tail])
    whole = measure(second, labels) - measure(first, labels)
    return whole, float(low), float(high)


def _checked(predictions, labels):
    """Both as float64 [items]."""
    x = np.asarray(predictions, dtype=np.float64)
    y = np.asarray(labels, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(
            f"predictions {x.shape} and labels {y.shape} must be [items]"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("predictions or labels hold NaN or infinity")
    return x, y
