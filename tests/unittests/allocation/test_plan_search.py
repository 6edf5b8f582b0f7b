"""Whole plans of a model by its own metric; the page that says how."""

import re
from pathlib import Path

import pytest
import torch

from speechbrain_mpq.allocation import nsga2
from speechbrain_mpq.allocation.plan_search import PlanObjectives
from speechbrain_mpq.quantization.plan import BitPlan, Scheme, Selection
from speechbrain_mpq.quantization.quant_api import quantize_

PAGE = Path(__file__).parents[3] / "docs/plan-search.md"


def made(**options):
    """A model, its inputs, and the objectives of its plans."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 12),
        torch.nn.BatchNorm1d(12),
        torch.nn.PReLU(),
        torch.nn.Linear(12, 3),
    )
    inputs = torch.randn(20, 6)
    model(inputs)  # moves the statistics of the norm
    with torch.no_grad():
        wanted = model.eval()(inputs)

    def measure(model):
        assert not model.training
        with torch.no_grad():
            return (model(inputs) - wanted).square().mean().item()

    return (
        model.train(),
        inputs,
        PlanObjectives(model, measure, (2, 4, 8), **options),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheme": Scheme("channel", "midrise")},
        {"scheme": Scheme(rows=4)},
        {"selection": Selection(exclude=["*.bias", "1.*"])},
    ],
    ids=["all", "channel", "rows", "matrices"],
)
def test_is_what_quantize_gives(options):
    model, _, objectives = made(**options)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    bits = (2, 8, 4, 2, 8, 4, 4, 2)
    plan = dict(zip(objectives.genes, bits))
    error, size = objectives(plan)
    assert model.training and error > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    full = objectives.bit_plan(plan)
    selection = options.get("selection", Selection())
    scheme = options.get("scheme", Scheme())
    made_plan = quantize_(model, full, **selection.patterns, **vars(scheme))
    assert made_plan.bytes == full.bytes == size
    assert objectives.measure(model.eval()) == pytest.approx(error, rel=1e-5)


def test_plan_is_read_again(tmp_path):
    _, _, objectives = made()
    plan = objectives.bit_plan(dict.fromkeys(objectives.genes, 4))
    plan.save(tmp_path / "plan.json")
    assert BitPlan.load(tmp_path / "plan.json") == plan


def test_front_is_searched_and_resumed(tmp_path):
    _, _, objectives = made()
    evolution = nsga2.Evolution(8, 5, 1, (1, 3))
    options = {"checkpoint": tmp_path / "search.json", "progress": False}
    arguments = objectives.genes, objectives.candidate_bits, evolution
    options["settings"] = objectives.settings
    calls, measure = [], objectives.measure

    def interrupted(model):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return measure(model)

    objectives.measure = interrupted
    with pytest.raises(KeyboardInterrupt):
        nsga2.search(objectives, *arguments, **options)
    found = nsga2.search(objectives, *arguments, **options)
    # Besides the one that was cut short, one is made again to compare.
    assert len(calls) == len(found) + 2
    front = found.front()
    assert front[0].size < front[-1].size
    assert front[0].error > front[-1].error
    with torch.no_grad():  # the same shapes, trained on
        objectives.model[0].weight += 0.1
    with pytest.raises(ValueError, match="another search: its weights differ"):
        nsga2.search(
            objectives,
            *arguments,
            **{**options, "settings": objectives.settings},
        )
    other = made(scheme=Scheme(codebook="midrise"))[2].settings
    with pytest.raises(ValueError, match="another search: its scheme differ"):
        nsga2.search(objectives, *arguments, **{**options, "settings": other})
    options["settings"] = {"tensors": {}}
    with pytest.raises(ValueError, match="another search: its tensors differ"):
        nsga2.search(objectives, *arguments, **options)


def test_clear_errors():
    model, _, objectives = made()
    full = dict.fromkeys(objectives.genes, 4)
    with pytest.raises(ValueError, match="plan of another model"):
        objectives({**full, "decoder": 2})
    with pytest.raises(ValueError, match="plan of another model"):
        objectives({"0": 2})
    objectives.measure = lambda model: float("nan")
    with pytest.raises(ValueError, match="return a large number"):
        objectives(full)
    assert model.training
    with pytest.raises(ValueError, match="0.wieght"):
        PlanObjectives(model, None, (2,), Selection(include=["0.wieght"]))
    with pytest.raises(ValueError, match="candidate bits"):
        PlanObjectives(model, None, (2, 2))


def test_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("pymoo")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {}
    exec(block, names)
    assert names["plan"].bytes == names["chosen"].size
    assert len(names["found"]) > 20
    for name in ("search.json", "fronts.png", "genomes.png", "plan.json"):
        assert (tmp_path / name).stat().st_size > 100
