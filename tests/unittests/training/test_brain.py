"""Experiments of our own: every scorer, and every way to find weights."""

from types import SimpleNamespace

import pytest
import torch

from speechbrain_mpq import (
    LearnedStep,
    LogStep,
    PostTraining,
    StraightThrough,
)
from speechbrain_mpq.allocation.output_scores import WeightedErrorScores
from speechbrain_mpq.quantization.plan import BitPlan, bit_plan
from speechbrain_mpq.training.admm_training import ADMMTraining
from speechbrain_mpq.training.brain import QuantizationBrain
from speechbrain_mpq.training.choose import SCORERS
from speechbrain_mpq.training.one_stage import OneStage

FEW = (2, 4, 8)
# All but the one that reads the scores of an earlier run from its file
ALL = {n: s for n, s in SCORERS.items() if n != "table"}
ALL["mask_error"] = WeightedErrorScores
ESTIMATORS = (PostTraining, StraightThrough, LearnedStep, LogStep)


def network():
    """A separator in small: its mask network is what is scored."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv1d(3, 8, 3, padding=1),
        torch.nn.PReLU(8),
        torch.nn.Conv1d(8, 4, 1),
    )
    return torch.nn.ModuleDict({"net": net}).eval()


def calibration():
    """What an experiment gives: see `Separation.calibration`."""

    def loss(output, items):
        return (output - 1).square().sum()

    inputs = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1))
    return {"inputs": inputs, "weights": torch.ones(2, 4, 20), "loss": loss}


def experiment(folder, model, **more):
    """A Brain with what base.yaml says of quantization."""
    hparams = {
        "output_folder": folder,
        "bits": 4,
        "scores": None,
        "min_bits": 2,
        "granularity": "tensor",
        "codebook": "midtread",
        "rows": None,
        "quantize_include": ["*"],
        "quantize_exclude": [],
        "estimator": PostTraining,
        "admm": None,
        "one_stage": None,
        "round_calibrated": False,
        **more,
    }
    options = {"device": "cpu", "noprogressbar": True}
    return QuantizationBrain(model, None, hparams, options)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_every_scorer_decides_on_an_experiment(name, rounded, tmp_path):
    model = network()
    scores = ALL[name](FEW)
    brain = experiment(
        tmp_path, model, scores=scores, round_calibrated=rounded, bits=4.5
    )
    brain.quantize(model, "net", calibration)
    plan = BitPlan.load(tmp_path / "plan.json")
    assert plan == bit_plan(model) and 2 < plan.average_bits <= 4.5
    assert {c.bits for c in plan.clusters.values()} <= set(FEW)
    assert (tmp_path / "scores.json").exists()
    again = network()
    experiment(tmp_path, again, scores=scores).quantize(again, "net", None)
    assert bit_plan(again) == plan  # the one that is there


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_is_attached(estimator, tmp_path):
    model = network()
    brain = experiment(tmp_path, model, estimator=estimator)
    brain.quantize(model, "net", calibration)
    assert bit_plan(model).average_bits == 4
    assert brain.trains == (estimator is not PostTraining)
    assert brain.method.estimator is estimator


@pytest.mark.parametrize("key, method", [("admm", ADMMTraining)])
def test_methods_of_their_own_keep_their_plan(key, method, tmp_path):
    model = network()
    brain = experiment(tmp_path, model, **{key: method()})
    assert isinstance(brain.method, method) and brain.trains
    brain.quantize(model, "net", calibration)
    assert bit_plan(model).average_bits == 4


def test_one_stage_begins_at_the_most_bits(tmp_path):
    model = network()
    scorer = OneStage(candidate_bits=FEW)
    brain = experiment(tmp_path, model, one_stage=scorer)
    brain.quantize(model, "net", calibration)
    assert bit_plan(model).average_bits > 4 and not brain.method.keeps_plan


def test_in_full_precision_nothing_is_quantized(tmp_path):
    model = network()
    brain = experiment(tmp_path, model, bits=32, scores=SimpleNamespace())
    brain.quantize(model, "net", None)
    assert not (tmp_path / "plan.json").exists()
    assert "parametrizations" not in "".join(model.state_dict())
