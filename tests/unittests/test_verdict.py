"""What the report says of two systems: by the test, in words."""

import random

from report_material import make_metrics

from speechbrain_mpq.evaluation.marks import compare
from speechbrain_mpq.evaluation.verdict import verdict


def test_verdict_follows_the_test():
    fp32 = make_metrics("fp32", 32, 1)
    for z, p, words in (
        (0.5, 0.6, "no significant change"),
        (3.0, 0.003, "significantly more word errors"),
        (-3.0, 0.003, "significantly fewer word errors"),
    ):
        test = {"against": "fp32", "z": z, "p": p, "segments": 50}
        headline, sentences = verdict(
            [make_metrics("kl", 4, 2, mapsswe=test), fp32]
        )
        assert words in headline
        outcome = "is not significant" if p > 0.05 else "is significant"
        assert outcome in sentences[-1]
    untested = verdict([make_metrics("kl", 4, 2), fp32])
    assert "word error rate +10.0 points" in untested[0]
    assert "not tested" in untested[1][-1]


def test_comparison_is_computed_from_items():
    chance = random.Random(0)
    words = "abcdefghij"
    items = {"kl": [], "uniform": []}
    for index in range(30):
        for system, rate in (("kl", 0.1), ("uniform", 0.5)):
            heard = [w if chance.random() > rate else "x" for w in words]
            items[system].append(
                {
                    "id": index,
                    "angle": 5,
                    "reference": " ".join(words),
                    "hypothesis": " ".join(heard),
                }
            )
    pair = [{"system": s, "bits": 4, "items": x} for s, x in items.items()]
    test = compare(*pair)
    assert test["against"] == "uniform"
    assert test["z"] < -2 and test["p"] < 0.05
    assert compare({**pair[0], "items": None}, pair[1]) is None
