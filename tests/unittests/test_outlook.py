"""What a score table foresees, as files."""

import json

import pytest
import torch

from speechbrain_mpq.allocation.mask_error import MaskErrorScores
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.brains.outlook import write_additivity, write_outlook


@pytest.fixture
def scored():
    """A network whose two layers matter very differently, and its scores."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv1d(8, 8, 1, bias=False),
        torch.nn.Conv1d(8, 8, 1, bias=False),
    )
    network[0].weight.data[:, 1:] *= 0.01
    data = torch.randn(4, 8, 20), torch.ones(4, 8, 20)
    scorer = MaskErrorScores((2, 3, 4, 8))
    return scorer, network, data, scorer(network, *data, progress=False)


def test_ceiling_bounds_what_the_plan_wins(scored, tmp_path):
    table = scored[-1]
    plan = allocate_bits(table, average_bits=4)
    foreseen = write_outlook(tmp_path, table, plan, bits=4, min_bits=2)
    assert json.loads((tmp_path / "ceiling.json").read_text()) == foreseen
    assert 0 <= foreseen["limited_db"] <= foreseen["am_gm_db"] + 1e-9


def test_predicted_curve_falls_with_the_bytes(scored, tmp_path):
    table = scored[-1]
    plan = allocate_bits(table, average_bits=3)
    write_outlook(tmp_path, table, plan, bits=3, min_bits=2)
    curve = json.loads((tmp_path / "pareto.json").read_text())
    points = curve["points"]
    assert [p["bytes"] for p in points] == sorted(p["bytes"] for p in points)
    scores = [p["score"] for p in points]
    assert scores == sorted(scores, reverse=True)
    assert curve["chosen"]["bytes"] == plan.bytes


def test_additivity_has_the_chosen_and_the_uniform_plans(scored, tmp_path):
    scorer, network, data, table = scored
    plan = allocate_bits(table, average_bits=4)
    where = {"include": ["*"], "exclude": [], "prefix": "mask_net"}
    write_additivity(tmp_path, table, plan, scorer, network, data, **where)
    rows = json.loads((tmp_path / "additivity.json").read_text())
    assert [row["plan"] for row in rows] == [
        *("chosen", "uniform 2", "uniform 3", "uniform 4", "uniform 8"),
    ]
    fine = rows[-1]  # small damages add up
    assert fine["measured"] == pytest.approx(fine["predicted"], rel=0.2)
