"""One budget for a recognizer and its language model; the whole system."""

import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.evaluation.significance import mapsswe
from speechbrain_mpq.quantization.plan import BitPlan

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
BITS = (1, 2, 4, 8)


def script(name):
    """A benchmark, which is in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS / Path(name).parent)
        return importlib.import_module(Path(name).name)


@pytest.fixture(scope="module")
def joint():
    return script("joint/recognizer_lm")


@pytest.fixture(scope="module")
def whole():
    return script("quality/whole_system")


def random_table(seed, clusters):
    """Scores that fall with the bits, of clusters of other sizes."""
    rng = np.random.default_rng(seed)
    rows, sizes = {}, {}
    for i in range(clusters):
        harm = float(rng.exponential()) * 10
        rows[f"c{i}"] = {b: harm * 4.0**-b for b in BITS}
        sizes[f"c{i}"] = {f"c{i}.weight": int(rng.integers(100, 900))}
    return ScoreTable(rows, sizes, codebook="entropy")


def saved(table, folder, outside):
    """Files of a model in full precision."""
    folder.mkdir(parents=True)
    table.save(folder / "scores.json")
    weights = 4 * sum(table.parameters.values())
    (folder / "model.safetensors").write_bytes(bytes(weights + outside))
    return folder / "scores.json", folder


def test_the_budget_is_shared_as_no_better_pair_of_plans_is(joint, tmp_path):
    tables = {"recognizer": random_table(0, 3), "lm": random_table(1, 3)}
    harms = {"recognizer": 30.0, "lm": 5.0}
    parts = {
        name: joint.Part.read(
            *saved(table, tmp_path / name, outside=70), harms[name]
        )
        for name, table in tables.items()
    }
    budget = 140 + sum(
        sum(t.parameters.values()) * 3 // 8 for t in tables.values()
    )
    ways = joint.shared(parts, budget)
    assert sum(row["bytes"] for row in ways["joint"].values()) <= budget
    found = sum(row["harm"] for row in ways["joint"].values())

    # All 4^6 plans, with bytes counted here
    merged = [
        (harms[name], row, sum(tables[name].tensors[cluster].values()))
        for name, table in tables.items()
        for cluster, row in table.scores.items()
    ]
    least = min(
        sum(harm * row[b] for (harm, row, _), b in zip(merged, plan))
        for plan in itertools.product(BITS, repeat=6)
        if sum(-(-n * b // 8) + 4 for (*_, n), b in zip(merged, plan)) + 140
        <= budget
    )
    assert found == pytest.approx(least)
    assert found <= sum(row["harm"] for row in ways["equal"].values())
    # What is printed finds the same plans for each model alone
    for name, row in ways["joint"].items():
        alone = allocate_bits(
            tables[name], average_bits=row["bits"], min_bits=1
        )
        bits = {c: entry.bits for c, entry in alone.clusters.items()}
        assert bits == row["clusters"]


def test_tables_that_cannot_be_merged_are_refused(joint, tmp_path):
    table = random_table(0, 2)
    path, folder = saved(table, tmp_path / "one", 10)
    (folder / "model.safetensors").write_bytes(b"small")
    with pytest.raises(ValueError, match="in full precision"):
        joint.Part.read(path, folder, 1.0)
    other = ScoreTable(table.scores, table.tensors)
    parts = {"a": joint.Part(table, 0), "b": joint.Part(other, 0)}
    with pytest.raises(ValueError, match="different codebooks"):
        joint.merged(parts)


def test_divergences_and_what_plans_foretell(joint, tmp_path):
    class Recognizer:
        def __init__(self, shift):
            self.shift = shift

        def outputs(self, wavs):
            logits = torch.tensor([[0.0, self.shift]]).repeat(3, 1)
            return [logits.log_softmax(1).numpy()]

    p = torch.tensor([0.0, 0.0]).softmax(0)
    q = torch.tensor([0.0, 1.0]).softmax(0)
    expected = float((p * (p / q).log()).sum())
    got = joint.frame_divergence(
        Recognizer(0.0), Recognizer(1.0), [torch.zeros(9)] * 2
    )
    assert got == pytest.approx(expected, rel=1e-5)

    table = random_table(2, 2)
    plan = BitPlan.uniform(allocate_bits(table, average_bits=2).clusters, 4)
    plan.save(tmp_path / "plan.json")
    assert joint.predicted(table, tmp_path) == pytest.approx(
        sum(row[4] for row in table.scores.values())
    )


def write_run(folder, hypotheses, size):
    """A recognizer's run with lists of one hypothesis."""
    (folder / "published").mkdir(parents=True)
    (folder / "published/model.safetensors").write_bytes(bytes(size))
    rows = [
        {
            "id": f"u{i}",
            "hypotheses": [text],
            "scores": [-1.0],
            "acoustic_scores": [-1.0],
        }
        for i, text in enumerate(hypotheses)
    ]
    lines = "\n".join(map(json.dumps, rows))
    (folder / "clean_nbest.json").write_text(lines)
    words = [f"u{i} a b c d\n" for i in range(len(rows))]
    (folder / "clean_refs.txt").write_text("".join(words))
    return str(folder)


def test_rows_have_errors_bytes_and_significance(whole, tmp_path):
    right, wrong, bad = "a b c d", "a b c x", "a x c"
    texts = [
        [right] * 30,
        [right] * 29 + [bad],
        [wrong] * 10 + [bad] * 10 + [right] * 10,
    ]
    systems = [
        (f"s{i}", write_run(tmp_path / f"{i}", said, size), whole.NONE)
        for i, (said, size) in enumerate(zip(texts, (900, 300, 100)))
    ]
    rows = whole.measured(systems, whole.Hypotheses(None, ["clean"]))
    assert [row["times"] for row in rows] == [1, 3, 9]
    wers = [row["sets"]["clean"]["wer"] for row in rows]
    assert wers == pytest.approx([0, 100 * 2 / 120, 100 * 30 / 120])
    expected = mapsswe((right, *pair) for pair in zip(texts[1], texts[2])).p
    assert rows[2]["sets"]["clean"]["p"][1] == expected < 0.05
    assert rows[1]["sets"]["clean"]["p"][0] > 0.05
    text = whole.table(rows)
    assert "| 2 | s2 | 100 | 0 | 100 | 9.0 | 25.00 | < 0.001 |" in text


def test_systems_of_other_tests_are_refused(whole, tmp_path):
    first = write_run(tmp_path / "first", ["a b c d"], 9)
    second = write_run(tmp_path / "second", ["a b c d"] * 2, 9)
    systems = [("one", first, whole.NONE), ("two", second, whole.NONE)]
    with pytest.raises(ValueError, match="another test"):
        whole.measured(systems, whole.Hypotheses(None, ["clean"]))


def test_no_sentence_is_scored_twice(whole):
    class Model:
        vocabulary, scored = None, []

        def score(self, texts, progress=False):
            self.scored += texts
            return [len(text) for text in texts]

    lm = whole.Once(Model())
    assert lm.score(["a", "bcd", "a"]) == [1, 3, 1]
    assert lm.score(["bcd", "ef"]) == [3, 2]
    assert lm.lm.scored == ["a", "bcd", "ef"]


def test_times_are_ratios_within_a_round():
    speed = script("speed/recognizer")
    rows = {
        "float": [dict.fromkeys(speed.STAGES, s) for s in (1.0, 3.0, 9.0)],
        "bits": [dict.fromkeys(speed.STAGES, s) for s in (0.5, 1.5, 9.0)],
    }
    result = speed.factors(rows, seconds=10.0)
    assert result["float"]["network"] == (0.3, 1.0)
    assert result["bits"]["with rescoring"] == (4 * 0.15, 2.0)
    assert "| bits | 0.1500 | 2.00 | 0.3000 | 2.00 |" in speed.table(result)


def test_plans_are_compared_with_uniform_bits_of_their_seed():
    plans = script("quality/recognizer_plans")
    right, wrong, bad = "a b c d", "a b c x", "a x c"

    def items(*said):
        return {f"u{i}": (right, text) for i, text in enumerate(said)}

    worse = items(*[wrong] * 8, *[bad] * 8, *[right] * 4)
    kept = {
        "full": items(*[right] * 20),
        "2/1/uniform": {"bytes": 9, "items": worse},
        "2/1/kl": {"bytes": 8, "items": items(*[right] * 19, bad)},
        "2/2/kl": {"bytes": 8, "items": worse},
    }
    rows = plans.rows_of(kept)
    assert [row["wer"] for row in rows] == [30.0, 2.5, 30.0]
    expected = mapsswe(
        (right, old[1], new[1])
        for old, new in zip(
            worse.values(), kept["2/1/kl"]["items"].values(), strict=True
        )
    )
    assert rows[1]["p_uniform"] == expected.p < 0.05 < rows[1]["p_full"]
    assert "p_uniform" not in rows[0] and "p_uniform" not in rows[2]
    text = plans.table(rows, 0.0)
    assert "| 2 | kl | 8 | 16.25 (2.50, 30.00) |" in text
