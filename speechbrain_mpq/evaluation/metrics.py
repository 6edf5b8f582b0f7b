"""Averages over the test set by angle bucket, as metrics.json holds them.

An item is a dict with the results of one test mixture:
`{"id", "angle", "si_snr", "si_snr_mixture", "pesq", "reference",
"hypothesis"}` and, where these were recognised too, `"hypothesis_mixture"` and
`"hypothesis_target"`, which give `wer_mixture` and `wer_target`. The angle is
the one between the two speakers in degrees; `pesq` may be None where it is
undefined or was not measured.
"""

import hashlib
import json
import math
from statistics import fmean

from .mapsswe import mapsswe
from .wer import WordErrors, word_errors

# Degrees between the speakers, [low, high); 180 belongs to the last.
BUCKETS = ((0, 15), (15, 45), (45, 90), (90, 180))
BUCKET_NAMES = tuple(f"{low}-{high}" for low, high in BUCKETS)
AVERAGED = ("si_snr", "pesq", "wer")
SAME_DB = 0.01  # more between two mixtures: they are not the same one
_ITEM_KEYS = (
    "id",
    "angle",
    "si_snr",
    "si_snr_mixture",
    "pesq",
    "reference",
    "hypothesis",
)


def bucket_of(angle):
    """Name of the bucket that an angle between two speakers falls in."""
    for name, (low, high) in zip(BUCKET_NAMES, BUCKETS):
        if low <= angle < high or angle == high == 180:
            return name
    raise ValueError(f"an angle of {angle} degrees is not within 0 to 180")


def summarise(items):
    """Average the items of one system by bucket, as metrics.json has it.

    A bucket without items has None for every average, and so has then the
    average over the buckets, which is the unweighted mean of all four.

    Arguments
    ---------
    items : list[dict]
        One dict per test mixture, see the module's text.

    Returns
    -------
    dict
        `{"test_set": hash, "buckets": {name: {...}}, "average": {...}}`.
        `confusions` is the share of items with an SI-SNR below 0 dB, `wer` is
        in percent, `pesq_n` counts the items with a PESQ.
    """
    by_bucket = {name: [] for name in BUCKET_NAMES}
    for item in items:
        _check_item(item)
        by_bucket[bucket_of(item["angle"])].append(item)
    buckets = {name: _bucket(inside) for name, inside in by_bucket.items()}
    average = {
        key: _mean([bucket[key] for bucket in buckets.values()])
        for key in AVERAGED
    }
    return {
        "test_set": hash_test_set(items),
        "buckets": buckets,
        "average": average,
    }


def hash_test_set(items):
    """Hash of what was tested: ids, buckets and references, in any order.

    Arguments
    ---------
    items : list[dict]
        One dict per test mixture.

    Example
    -------
    >>> items = [{"id": i, "angle": 20, "reference": "yes"} for i in "ab"]
    >>> hash_test_set(items) == hash_test_set(items[::-1])
    True
    >>> hash_test_set(items) == hash_test_set(items[:1])
    False
    """
    rows = sorted(
        [str(item["id"]), bucket_of(item["angle"]), item["reference"]]
        for item in items
    )
    ids = [row[0] for row in rows]
    twice = {a for a, b in zip(ids, ids[1:]) if a == b}
    if twice:
        raise ValueError(f"items occur twice: {', '.join(sorted(twice))}")
    text = json.dumps(rows, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def significance(items, baseline_items, against="fp32"):
    """MAPSSWE of a system against a baseline, as metrics.json has it.

    Arguments
    ---------
    items : list[dict]
        Items of the system.
    baseline_items : list[dict]
        Items of the baseline on the same test set, in any order.
    """
    if hash_test_set(items) != hash_test_set(baseline_items):
        raise ValueError(
            f"this system and {against} were scored on different test sets: "
            "evaluate both again on one"
        )
    theirs = {str(item["id"]): item for item in baseline_items}
    pairs = [(item, theirs[str(item["id"])]) for item in items]
    for own, other in pairs:
        levels = [item.get("si_snr_mixture", 0.0) for item in (own, other)]
        if abs(levels[0] - levels[1]) > SAME_DB:
            raise ValueError(
                f"{own['id']} was another mixture when {against} was scored: "
                "evaluate both again on one test set"
            )
    result = mapsswe(
        (own["reference"], own["hypothesis"], other["hypothesis"])
        for own, other in pairs
    )
    return {
        "against": against,
        "z": result.z,
        "p": result.p,
        "segments": result.segments,
    }


def _check_item(item):
    """Raise where an item lacks a key or holds a number that is none."""
    missing = [key for key in _ITEM_KEYS if key not in item]
    if missing:
        raise ValueError(
            f"item {item.get('id', '?')!r} lacks {', '.join(missing)}"
        )
    for key in ("si_snr", "si_snr_mixture", "pesq"):
        value = item[key]
        if value is None and key == "pesq":
            continue
        if not math.isfinite(value):
            raise ValueError(f"item {item['id']!r}: {key} is {value}")


def _bucket(items):
    """Averages of the items of one bucket."""
    said = [item["reference"] for item in items]
    words = _errors(said, [item["hypothesis"] for item in items])
    pesq = [item["pesq"] for item in items if item["pesq"] is not None]
    low = [item["si_snr"] < 0 for item in items]
    bucket = {
        "n": len(items),
        "si_snr": _mean([item["si_snr"] for item in items]),
        "si_snr_mixture": _mean([item["si_snr_mixture"] for item in items]),
        "pesq": _mean(pesq),
        "pesq_n": len(pesq),
        "wer": words.rate if words.words else None,
        "words": words.words,
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
        "confusions": _mean(low),
    }
    for signal in ("mixture", "target"):
        heard = [item.get(f"hypothesis_{signal}") for item in items]
        if words.words and None not in heard:
            bucket[f"wer_{signal}"] = _errors(said, heard).rate
    return bucket


def _errors(references, hypotheses):
    """Word errors of many utterances together."""
    pairs = zip(references, hypotheses)
    return sum((word_errors(*pair) for pair in pairs), WordErrors())


def _mean(values):
    """Mean, or None where there is no value or one is None."""
    if not values or None in values:
        return None
    return float(fmean(values))
