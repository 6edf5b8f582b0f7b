"""One budget for two models: the chain, its scores, the plans, the table."""

import doctest
import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq.allocation.output_scores import KLScores, MaskErrorScores
from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.quant_api import cluster_quantized

ROOT = Path(__file__).parents[3]


NAMES = ("joint_chain", "joint_plans", "joint_table")


@pytest.fixture(scope="module")
def scripts():
    """The scripts, which are in no package."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path[:] = before


@pytest.fixture(scope="module")
def models():
    """A tiny separator and a narrow recognizer, with new weights."""
    torch.manual_seed(0)
    separator = build_separator(ROOT / "tests/data/separator_tiny.yaml").eval()
    fold_norms_(separator)
    path = ROOT / "recipes/Embedded/ASR/CTC/hparams/inference.yaml"
    with open(path, encoding="utf-8") as source:
        encoder = load_hyperpyyaml(source, {"channels": 8})["encoder"].eval()
    return separator, encoder


@pytest.fixture(scope="module")
def heard(models):
    """What the chain needs of three mixtures."""
    torch.manual_seed(1)
    mixtures, doa = torch.randn(3, 4000, 2), torch.tensor([20.0, 70.0, 150.0])
    with torch.no_grad():
        inputs, reference = models[0].analyse(mixtures, doa)
        said = models[1](models[0](mixtures, doa))
    return inputs, (reference, mixtures[..., 0]), said


@pytest.fixture(scope="module")
def chain(scripts, models, heard):
    chain = scripts["joint_chain"].joint_chain(*models)
    chain.hearing.listen(*heard[1])
    return chain


@pytest.fixture(scope="module")
def tables(models, chain, heard):
    (inputs, (reference, _), _) = heard
    scores = KLScores((2, 4, 8), "categorical", chunk=len(inputs))
    where = {"prefix": "", "progress": False}
    end = scores(chain, inputs, **where)
    weights = reference.abs().square()
    mask_net = models[0].mask_net
    own = MaskErrorScores((2, 4, 8))(mask_net, inputs, weights, **where)
    return {"end": end, "own": own}


@torch.no_grad()
def test_chain_is_separator_and_recognizer(chain, heard):
    inputs, _, said = heard
    assert torch.equal(chain(inputs), said)
    twice = chain(torch.cat([inputs, inputs]))  # two tries side by side
    torch.testing.assert_close(twice, torch.cat([said, said]))


@torch.no_grad()
def test_scores_are_the_recognizers_divergence(chain, tables, heard):
    """Against one whole pass for a cluster, and torch's own divergence."""
    inputs, _, said = heard
    for cluster in (
        "conv_in",
        "tcn_0_1.d_conv",
        "convblock_1.convs.conv_0.conv",
    ):
        with cluster_quantized(chain, cluster, 2):
            output = chain(inputs)
        expected = F.kl_div(
            output.double(), said.double(), log_target=True, reduction="sum"
        )
        found = tables["end"].scores[cluster][2]
        assert found == pytest.approx(expected.item() / said[..., 0].numel())
        assert found > 0


def test_plans_share_the_bytes_and_joint_is_best_by_the_end(
    scripts, chain, tables
):
    stages = scripts["joint_chain"].separator_stages(chain)
    assert stages == ["conv_in", "tcn_0_0", "tcn_0_1", "conv_out"]
    plans = scripts["joint_plans"].plans_of(tables, stages, 4)
    uniform = plans["uniform"]
    assert list(plans) == ["uniform", "own", "end", "joint"]
    damage = {}
    for name, plan in plans.items():
        assert set(plan.clusters) == set(tables["end"].scores)
        assert plan.bytes <= uniform.bytes
        damage[name] = sum(
            tables["end"].scores[c][entry.bits]
            for c, entry in plan.clusters.items()
        )
    assert damage["joint"] <= damage["end"] <= damage["own"]
    assert damage["joint"] < damage["uniform"]
    shares = scripts["joint_plans"].shares
    assert shares(uniform, stages)["recognizer_bits"] == 4
    for name in ("own", "end"):
        halves = shares(plans[name], stages)
        assert max(halves["separator_bits"], halves["recognizer_bits"]) < 4.05


def test_doctests(scripts):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for name in ("joint_plans", "joint_table"):
        done = doctest.testmod(scripts[name], optionflags=flags)
        assert done.attempted and not done.failed
