"""Metrics of items: buckets, averages, words, significance."""

import random

import numpy as np
import pytest
from helpers import make_items

from speechbrain_mpq.evaluation.metrics import significance, summarise
from speechbrain_mpq.evaluation.separation_task import BUCKET_NAMES, bucket_of


def test_bucket_bounds():
    expected = {0: 0, 14.999: 0, 15: 1, 45: 2, 89.9: 2, 90: 3, 180: 3}
    for angle, index in expected.items():
        assert bucket_of(angle) == BUCKET_NAMES[index]
    for angle in (-0.1, 180.1, float("nan")):
        with pytest.raises(ValueError, match="0 to 180"):
            bucket_of(angle)


def test_average_is_the_unweighted_mean_of_the_buckets():
    items = make_items(per_bucket=2)
    items.append({**items[0], "id": "more", "si_snr": 40.0})
    summary = summarise(items)
    buckets = summary["buckets"]
    assert [buckets[name]["n"] for name in BUCKET_NAMES] == [3, 2, 2, 2]
    for key in ("si_snr", "pesq", "wer"):
        mean = np.mean([bucket[key] for bucket in buckets.values()])
        assert summary["average"][key] == pytest.approx(mean)
    assert summary["average"]["si_snr"] != pytest.approx(
        np.mean([item["si_snr"] for item in items])
    )


def test_word_error_rate_is_over_the_words_of_the_bucket():
    texts = [("a", "x"), ("a b c", "a b c"), ("a b", "b c d e")]
    items = [
        {**item, "angle": 5, "reference": said, "hypothesis": heard}
        for item, (said, heard) in zip(make_items(), texts)
    ]
    bucket = summarise(items)["buckets"]["0-15"]
    assert bucket["words"] == 6
    assert bucket["wer"] == pytest.approx(100 * 5 / 6)
    errors = [bucket[k] for k in ("substitutions", "deletions", "insertions")]
    assert errors == [3, 0, 2]
    assert "wer_mixture" not in bucket


def test_confusions_and_missing_pesq():
    items = [{**item, "angle": 5} for item in make_items()[:4]]
    for item, si_snr in zip(items, (-1.0, 0.0, 3.0, 4.0)):
        item["si_snr"] = si_snr
        item["hypothesis_mixture"] = item["reference"]
    items[0]["pesq"] = None
    summary = summarise(items)
    bucket = summary["buckets"]["0-15"]
    assert bucket["confusions"] == 0.25
    assert bucket["pesq_n"] == 3
    assert bucket["pesq"] == np.mean([item["pesq"] for item in items[1:]])
    assert bucket["wer_mixture"] == 0
    assert "wer_target" not in bucket
    assert summary["buckets"]["15-45"]["si_snr"] is None
    assert summary["average"] == {"si_snr": None, "pesq": None, "wer": None}


def test_broken_items_are_named():
    items = make_items()
    del items[3]["pesq"]
    with pytest.raises(ValueError, match="'0003' lacks pesq"):
        summarise(items)
    items = make_items()
    items[1]["si_snr"] = float("nan")
    with pytest.raises(ValueError, match="'0001': si_snr is nan"):
        summarise(items)
    with pytest.raises(ValueError, match="occur twice: 0000"):
        summarise(make_items()[:1] * 2)


def test_significance_is_of_the_same_mixtures():
    items = make_items()
    other = [{**item} for item in items]
    other[3]["si_snr_mixture"] += 0.1
    with pytest.raises(ValueError, match="0003 was another mixture when fp32"):
        significance(items, other)


def test_significance_pairs_items_by_id():
    items = make_items(per_bucket=10)
    perfect = [{**item, "hypothesis": item["reference"]} for item in items]
    shuffled = random.Random(1).sample(perfect, len(perfect))
    test = significance(items, shuffled, against="fp32")
    assert test["against"] == "fp32"
    assert test["z"] > 0 and 0 < test["p"] < 1
    assert significance(shuffled, items)["z"] == -test["z"]
    with pytest.raises(ValueError, match="different test sets"):
        significance(items, perfect[1:])
