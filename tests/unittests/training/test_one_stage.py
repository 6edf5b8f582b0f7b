"""Bits and weights in one run: decisions, budget, resume, bad settings."""

import pytest
import speechbrain as sb
import torch
import torch.nn as nn
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.quantization.fake_quant import FakeQuantize, LearnedStep
from speechbrain_mpq.quantization.plan import BitPlan, bit_plan
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.quantization.tensors import named_tensors
from speechbrain_mpq.training.checkpoints import AtomicCheckpointer
from speechbrain_mpq.training.one_stage import OneStage, change_bits_
from speechbrain_mpq.training.pipeline import PlanStore

BITS = (2, 4, 8)


def make_network():
    """Three layers of one size; what leaves the first hardly matters."""
    torch.manual_seed(0)
    network = nn.Sequential()
    for name in ("quiet", "loud", "last"):
        network.add_module(name, nn.Linear(16, 16, bias=False))
    network.quiet.weight.data *= 1e-3
    network.loud.weight.data += torch.eye(16) * 10
    return network


class Regression(sb.Brain):
    """Learns a fixed map; the hook is the one that a recipe needs."""

    def compute_forward(self, batch, stage):
        skip = batch[:, :16]
        network = self.modules.network
        return network.last(network.loud(network.quiet(skip) + skip))

    def compute_objectives(self, predictions, batch, stage):
        return (predictions - batch[:, 16:]).square().mean()

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        if should_step:
            self.hparams.one_stage.end_step()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        self.checkpointer.save_checkpoint()


def fit(folder, epochs, one_stage, estimator=LearnedStep):
    """Start, or continue, a run; the network is returned."""
    network = make_network()
    quantize_(network, one_stage.candidate_bits[-1], estimator=estimator)
    limits = {"average_bits": 4, "min_bits": 2}
    one_stage.watch(network, limits, PlanStore(folder))
    counter = EpochCounter(epochs)
    checkpointer = AtomicCheckpointer(
        str(folder / "save"),
        {"network": network, "counter": counter, "one_stage": one_stage},
    )
    brain = Regression(
        {"network": network},
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        {"one_stage": one_stage},
        {"device": "cpu", "noprogressbar": True},
        checkpointer,
    )
    data = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    brain.fit(counter, torch.utils.data.DataLoader(data, batch_size=2))
    return network


def bits_of(network):
    return {n: c.bits for n, c in bit_plan(network).clusters.items()}


def test_decisions_meet_the_budget_and_spare_what_does_not_matter(tmp_path):
    one_stage = OneStage(BITS, interval=4, decisions=3)  # 5 steps an epoch
    network = fit(tmp_path, 4, one_stage)
    assert one_stage.settled and one_stage.step == 20
    bits = bits_of(network)
    uniform = BitPlan.uniform(bit_plan(network).clusters, 4)
    assert bit_plan(network).bytes <= uniform.bytes
    assert bits["quiet"] == 2 and max(bits["loud"], bits["last"]) > 4
    table = ScoreTable.load(tmp_path / "scores.json")
    assert table.method == "one_stage" and table.details["steps"] == 4
    plan = allocate_bits(table, average_bits=4)
    assert {n: c.bits for n, c in plan.clusters.items()} == bits


@pytest.mark.parametrize("killed_after", [1, 3])
def test_continued_run_ends_like_an_uninterrupted_one(tmp_path, killed_after):
    """After one epoch of three it is in the middle of an interval."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = fit(whole, 5, OneStage(BITS, interval=4, decisions=3))
    fit(parts, killed_after, OneStage(BITS, interval=4, decisions=3))
    network = fit(parts, 5, OneStage(BITS, interval=4, decisions=3))
    assert bits_of(network) == bits_of(expected)
    for name, value in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    assert (whole / "scores.json").read_text() == (
        parts / "scores.json"
    ).read_text()


def test_training_begins_in_nearly_full_precision(tmp_path):
    one_stage = OneStage((2, 4, 16), interval=100, decisions=1)
    network = fit(tmp_path, 1, one_stage)
    assert set(bits_of(network).values()) == {16} and not one_stage.settled
    with pytest.raises(ValueError, match="lower interval, which is 100"):
        one_stage.require_decision()
    settled = OneStage(BITS, interval=5, decisions=1)
    fit(tmp_path / "other", 1, settled)
    settled.require_decision()


@pytest.mark.parametrize("estimator", [FakeQuantize, LearnedStep])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"codebook": "midrise"},
        {"granularity": "channel"},
        {"rows": 5},
    ],
)
def test_changed_clusters_are_as_if_quantized_so_at_once(estimator, kind):
    network, fresh = make_network(), make_network()
    before = quantize_(network, 8, estimator=estimator, **kind)
    trained = list(network.parameters())
    for tensor in named_tensors(network).values():
        tensor.fake_quantize.set_scale(tensor.fake_quantize.alpha * 1.1)
    kept = network.last.weight.detach().clone()
    clusters = BitPlan.uniform(before.clusters, 1.6).clusters
    last = [name for name in clusters if name.startswith("last")]
    clusters |= {name: before.clusters[name] for name in last}
    plan = BitPlan(clusters, codebook=before.codebook)
    assert change_bits_(network, plan) == len(clusters) - len(last)
    assert bit_plan(network) == plan
    kind = {k: v for k, v in kind.items() if k != "rows"}  # plan's names
    quantize_(fresh, plan, estimator=estimator, **kind)
    assert torch.equal(network.loud.weight, fresh.loud.weight)
    assert torch.equal(network.last.weight, kept)
    # The optimizer holds on to the same parameters.
    assert all(a is b for a, b in zip(trained, network.parameters()))
    assert change_bits_(network, plan) == 0


def test_bad_settings():
    with pytest.raises(ValueError, match="candidate bits"):
        OneStage((2, 2))
    with pytest.raises(ValueError, match="at least one decision"):
        OneStage(BITS, decisions=0)
    with pytest.raises(ValueError, match="at least one step"):
        OneStage(BITS, interval=0)
