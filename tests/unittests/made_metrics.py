"""Items, metrics and finished runs, for the tests of tables."""

import random

from speechbrain_mpq.evaluation.files import write_json
from speechbrain_mpq.evaluation.metrics import summarise

ANGLES = (3.0, 20.0, 60.0, 180.0)


def make_items(seed=0, per_bucket=3):
    chance = random.Random(seed)
    items = []
    for angle in ANGLES * per_bucket:
        words = chance.choices(["red", "blue", "nine", "go"], k=4)
        heard = [word if chance.random() < 0.8 else "x" for word in words]
        items.append(
            {
                "id": f"{len(items):04d}",
                "angle": angle,
                "si_snr": chance.gauss(7, 3),
                "si_snr_mixture": chance.gauss(0, 3),
                "pesq": chance.uniform(1, 4),
                "reference": " ".join(words),
                "hypothesis": " ".join(heard),
            }
        )
    return items


def make_metrics(system="kl", bits=4, items=None, **more):
    return {
        "system": system,
        "bits": bits,
        **summarise(items or make_items()),
        **more,
    }


def write_run(folder, items, **more):
    """A finished run with its items."""
    folder.mkdir(parents=True)
    write_json(folder / "test_items.json", items)
    write_json(folder / "metrics.json", make_metrics(items=items, **more))
