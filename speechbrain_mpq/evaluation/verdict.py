"""What the numbers of a system say against its baselines, in words."""

from .mapsswe import SIGNIFICANCE_LEVEL
from .marks import compare
from .systems import FULL_PRECISION, label, size_text


def verdict(metrics):
    """Headline and sentences on the first of several systems.

    Arguments
    ---------
    metrics : list[dict]
        Metrics of the system, then of its baselines.

    Returns
    -------
    tuple[str, list[str]]
        One line, and sentences with the numbers.

    Example
    -------
    >>> def system(name, bits, size, wer):
    ...     average = {"si_snr": 7.0, "pesq": 1.6, "wer": wer}
    ...     return {
    ...         "system": name,
    ...         "bits": bits,
    ...         "model_bytes": size,
    ...         "average": average,
    ...         "buckets": {},
    ...     }
    >>> kl, fp32 = system("kl", 4, 2**18, 22.0), system("fp32", 32, 2**21, 21.0)
    >>> test = {"against": "fp32", "z": 0.8, "p": 0.42, "segments": 90}
    >>> verdict([{**kl, "mapsswe": test}, fp32])[0]
    'kl 4 bit: 8.0 times smaller, no significant change in word errors'
    """
    system, *baselines = metrics
    full = [m for m in baselines if m["bits"] >= FULL_PRECISION]
    headline = label(system)
    if full:
        headline += f": {_headline(system, full[0])}"
    sentences = [_gain(system)]
    sentences += [_comparison(system, baseline) for baseline in baselines]
    return headline, [sentence for sentence in sentences if sentence]


def _headline(system, full):
    """Compression and loss against full precision, in one line."""
    parts = []
    if system.get("model_bytes") and full.get("model_bytes"):
        ratio = full["model_bytes"] / system["model_bytes"]
        parts.append(f"{ratio:.1f} times smaller")
    test = compare(system, full)
    if test is None:
        difference = _difference(system, full, "wer")
        if difference is not None:
            parts.append(f"word error rate {difference:+.1f} points")
    elif test["p"] >= SIGNIFICANCE_LEVEL:
        parts.append("no significant change in word errors")
    else:
        more = "more" if test["z"] > 0 else "fewer"
        parts.append(f"significantly {more} word errors")
    return ", ".join(parts)


def _gain(system):
    """Sentence on what separation does to the mixture."""
    before = [b["si_snr_mixture"] for b in system["buckets"].values()]
    after = system["average"]["si_snr"]
    if not before or None in before or after is None:
        return None
    before = sum(before) / len(before)
    return (
        f"Separation takes the SI-SNR from {before:.2f} dB in the mixture to "
        f"{after:.2f} dB, the mean of the four angle buckets."
    )


def _comparison(system, baseline):
    """Sentence on the system against one baseline."""
    parts = []
    for key, unit, decimals in (
        ("wer", "points WER", 1),
        ("si_snr", "dB SI-SNR", 2),
        ("pesq", "PESQ", 2),
    ):
        difference = _difference(system, baseline, key)
        if difference is not None:
            parts.append(f"{difference:+.{decimals}f} {unit}")
    sizes = [m.get("model_bytes") for m in (system, baseline)]
    size = ""
    if all(sizes):
        size = f" ({size_text(sizes[0])} against {size_text(sizes[1])})"
    if not parts:
        return None
    text = f"Against {label(baseline)}{size}: {', '.join(parts)}."
    test = compare(system, baseline)
    if test is None:
        return f"{text} The difference in word errors was not tested."
    outcome = "is" if test["p"] < SIGNIFICANCE_LEVEL else "is not"
    return (
        f"{text} The difference in word errors {outcome} significant "
        f"(MAPSSWE, z = {test['z']:.2f}, {_p_text(test['p'])}, "
        f"{test['segments']} segments)."
    )


def _p_text(p):
    """A p value; small ones as a bound."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def _difference(system, baseline, key):
    """System minus baseline on average, or None where one is unknown."""
    ours, theirs = system["average"][key], baseline["average"][key]
    return None if ours is None or theirs is None else ours - theirs
