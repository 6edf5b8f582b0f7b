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


NAMES = ("chain", "budget")


@pytest.fixture(scope="module")
def scripts():
    """The scripts, which are in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks/joint")
        yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        del sys.modules[name]


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
def mixed(models):
    """What the chain needs of three mixtures, and what it should give."""
    torch.manual_seed(1)
    mixtures, doa = torch.randn(3, 4000, 2), torch.tensor([20.0, 70.0, 150.0])
    with torch.no_grad():
        inputs, reference = models[0].analyse(mixtures, doa)
        expected = models[1](models[0](mixtures, doa))
    return inputs, (reference, mixtures[..., 0]), expected


@pytest.fixture(scope="module")
def chain(scripts, models, mixed):
    chain = scripts["chain"].joint_chain(*models)
    chain.bridge.set_mixtures(*mixed[1])
    return chain


@pytest.fixture(scope="module")
def tables(models, chain, mixed):
    (inputs, (reference, _), _) = mixed
    scores = KLScores((2, 4, 8), "categorical", chunk=len(inputs))
    where = {"prefix": "", "progress": False}
    end = scores(chain, inputs, **where)
    weights = reference.abs().square()
    mask_net = models[0].mask_net
    own = MaskErrorScores((2, 4, 8))(mask_net, inputs, weights, **where)
    return {"end": end, "own": own}


@torch.no_grad()
def test_chain_is_separator_and_recognizer(chain, mixed):
    inputs, _, expected = mixed
    assert torch.equal(chain(inputs), expected)
    twice = chain(torch.cat([inputs, inputs]))  # two tries side by side
    torch.testing.assert_close(twice, torch.cat([expected, expected]))


@torch.no_grad()
def test_scores_are_the_recognizers_divergence(chain, tables, mixed):
    """Against one whole pass for a cluster, and torch's own divergence."""
    inputs, _, reference = mixed
    for cluster in (
        "conv_in",
        "tcn_0_1.d_conv",
        "convblock_1.convs.conv_0.conv",
    ):
        with cluster_quantized(chain, cluster, 2):
            output = chain(inputs)
        expected = F.kl_div(
            output.double(),
            reference.double(),
            log_target=True,
            reduction="sum",
        )
        found = tables["end"].scores[cluster][2]
        assert found == pytest.approx(
            expected.item() / reference[..., 0].numel()
        )
        assert found > 0


def test_plans_share_the_bytes_and_joint_is_best_by_the_end(
    scripts, chain, tables
):
    stages = scripts["chain"].separator_stages(chain)
    assert stages == ["conv_in", "tcn_0_0", "tcn_0_1", "conv_out"]
    plans = scripts["budget"].plans_of(tables, stages, 4)
    uniform = plans["uniform"]
    assert list(plans) == ["uniform", "own", "end", "joint"]
    loss = {}
    for name, plan in plans.items():
        assert set(plan.clusters) == set(tables["end"].scores)
        assert plan.bytes <= uniform.bytes
        loss[name] = sum(
            tables["end"].scores[c][entry.bits]
            for c, entry in plan.clusters.items()
        )
    assert loss["joint"] <= loss["end"] <= loss["own"]
    assert loss["joint"] < loss["uniform"]
    shares = scripts["budget"].shares
    assert shares(uniform, stages)["recognizer_bits"] == 4
    for name in ("own", "end"):
        halves = shares(plans[name], stages)
        assert max(halves["separator_bits"], halves["recognizer_bits"]) < 4.05


def test_doctests(scripts):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    done = doctest.testmod(scripts["budget"], optionflags=flags)
    assert done.attempted and not done.failed
