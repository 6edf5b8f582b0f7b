"""ADMM training: the printed step, a known optimum, a Brain, bad input.

Optimizers that look ahead: Adam's direction, and steps in order.
"""

import json
from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter
from torch.utils.data import DataLoader, TensorDataset

from speechbrain_mpq import choose_bits
from speechbrain_mpq.quantization.admm import ADMM
from speechbrain_mpq.quantization.fake_quant import FakeQuantize
from speechbrain_mpq.quantization.packing import load_packed_, save_packed
from speechbrain_mpq.quantization.plan import BitPlan, Scheme
from speechbrain_mpq.quantization.quant_api import bit_plan, quantize_
from speechbrain_mpq.quantization.tensors import named_tensors
from speechbrain_mpq.training.admm_training import (
    AdamExtraGradient,
    ADMMTraining,
    ExtraGradient,
)


def with_optimizer(optimizer):
    """What a method asks a Brain for."""
    return SimpleNamespace(optimizers_dict={"opt_class": optimizer})


class Weight(torch.nn.Module):
    """A vector to be estimated."""

    def __init__(self, values):
        super().__init__()
        self.weight = torch.nn.Parameter(values.clone())


def test_the_printed_update_of_a_scalar_by_hand(tmp_path):
    """F = (T - 3)^2 / 2 from T = 1, one bit: f = 1, then lam = 0."""
    model = Weight(torch.tensor([1.0]))
    quantize_(model, 1, estimator=ADMM)
    admm = ADMMTraining(tmp_path / "admm.json", iteration_steps=1)
    optimizer = ExtraGradient(model.parameters())
    admm.start(with_optimizer(optimizer), model)
    state = model.parametrizations.weight[0]
    state.dual.fill_(0.5)

    def gradient():
        optimizer.zero_grad()
        (model.weight - 3).square().sum().div(2).backward()

    gradient()
    optimizer.extrapolate()
    # grad L = -2 + 0.001 (1 - 1 + 0.5) = -1.9995;  Tbar = 1 + 0.02 x 1.9995
    assert model.weight.item() == pytest.approx(1.03999, abs=1e-7)
    gradient()
    optimizer.step()
    # grad L = -1.96001 + 0.001 (0.03999 + 0.5);  T = 1 - 0.001 grad L
    assert model.weight.item() == pytest.approx(1.00195947, abs=1e-7)
    admm.after_step(None)
    # f = T + lam = 1.50195947, as one value has a scale of its own
    assert state.alpha.item() == pytest.approx(1.50195947, abs=1e-6)
    assert state.dual.item() == pytest.approx(0.0, abs=1e-6)
    expected = pytest.approx(0.5 / 1.00195947, rel=1e-5)
    assert admm.history[0]["primal_residual"] == expected


def test_adam_steps_follow_the_levels_of_coarse_codebooks(tmp_path):
    torch.manual_seed(0)
    start = torch.randn(4, 50)
    for bits in (2, 8):
        model = Weight(start)
        quantize_(model, bits, granularity="channel", estimator=ADMM)
        optimizer = AdamExtraGradient(model.parameters(), lr=0.1)
        admm = ADMMTraining(tmp_path / "a", 9, penalty=1e-9)
        admm.start(with_optimizer(optimizer), model)
        model.weight.sum().backward()
        optimizer.step()
        rms = start.square().mean().sqrt()
        levels = (
            model.parametrizations.weight[0].alpha if bits == 2 else rms / 6
        )
        expected = (start - 0.1 * levels).expand_as(start)
        torch.testing.assert_close(model.weight.detach(), expected)


def quadratics(problems=4, count=6):
    """Losses with correlated weights, one for each row, and their optima."""
    curvatures, optima = [], []
    for seed in range(problems):
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(count, 4, generator=generator)
        curvatures.append(mixing @ mixing.T + 0.1 * torch.eye(count))
        optima.append(torch.randn(count, generator=generator))
    curvatures, optima = torch.stack(curvatures), torch.stack(optima)

    def losses(weights):  # [..., problems, count]
        error = weights - optima
        return torch.einsum("...pi,pij,...pj->...p", error, curvatures, error)

    return losses, optima, curvatures


def best_quantized(losses, optima, curvatures):
    """Least losses of all three-level vectors, each with its best scale."""
    values = torch.tensor([-1.0, 0.0, 1.0])
    levels = torch.cartesian_prod(*[values] * optima.shape[1])  # [V, count]
    products = torch.einsum("vi,pij->pvj", levels, curvatures)
    power = torch.einsum("pvi,vi->pv", products, levels)
    along = torch.einsum("pvi,pi->pv", products, optima)
    scales = torch.where(power > 0, along / power.clamp_min(1e-9), 0.0)
    return losses(scales.T[..., None] * levels[:, None]).amin(0)


@pytest.mark.parametrize(
    "kind, options, penalty, growth",
    [
        (ExtraGradient, {"lr": 0.005, "extrapolation": 1.0}, 2.0, 1.05),
        (AdamExtraGradient, {"lr": 0.03, "extrapolation": 1.0}, 0.02, 1.05),
    ],
)
def test_admm_ends_in_better_quantized_weights_than_rounding(
    tmp_path, kind, options, penalty, growth
):
    losses, optima, curvatures = quadratics()
    model = Weight(optima)
    # A scale for each row: as many problems that know nothing of another.
    quantize_(model, 2, granularity="channel", estimator=ADMM)
    rounded = losses(model.eval().weight).sum().item()
    admm = ADMMTraining(tmp_path / "a", 5, penalty, growth, 1e3)
    optimizer = kind(model.parameters(), **options)
    admm.start(with_optimizer(optimizer), model)
    model.train()
    lowest = torch.full((len(optima),), torch.inf)
    for step in range(1, 401):
        for half in (optimizer.extrapolate, optimizer.step):
            optimizer.zero_grad()
            losses(model.weight).sum().backward()
            half()
        admm.after_step(None)
        if step % 5 == 0:  # as validation chooses
            values = losses(model.parametrizations.weight[0].projection)
            lowest = torch.minimum(lowest, values.detach())
    assert admm.history[-1]["primal_residual"] < 0.02
    reached = lowest.sum().item()
    best = best_quantized(losses, optima, curvatures).sum().item()
    assert best - 1e-4 <= reached
    # At least two thirds of what there is to win.
    assert reached - best < (rounded - best) / 3


class Regression(sb.Brain):
    """A Brain that calls what a quantization Brain calls."""

    def compute_forward(self, batch, stage):
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions, batch, stage):
        return (predictions - batch[1]).square().mean()

    def on_fit_start(self):
        super().on_fit_start()
        self.hparams.admm.start(self, self.modules)

    def on_fit_batch_start(self, batch, should_step):
        self.hparams.admm.before_step(self, batch)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        self.hparams.admm.after_step(self)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage == sb.Stage.VALID:
            self.hparams.admm.validated(stage_loss)
            self.checkpointer.save_and_keep_only(
                {"loss": float(stage_loss)}, min_keys=["loss"]
            )


def data(seed):
    """Batches of a linear problem."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(32, 6, generator=generator)
    mixing = torch.randn(6, 3, generator=torch.Generator().manual_seed(9))
    return DataLoader(TensorDataset(inputs, inputs @ mixing), batch_size=4)


def fitted(
    folder,
    epochs,
    opt_class=AdamExtraGradient,
    iteration_steps=3,
    estimator=ADMM,
    plan=2,
    run_opts=None,
    **settings,
):
    """A Brain after training in a folder, and its model."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    quantize_(model, plan, exclude=["*.bias"], estimator=estimator)
    admm = ADMMTraining(
        folder / "admm.json", iteration_steps, 0.05, 1.2, **settings
    )
    counter = EpochCounter(epochs)
    brain = Regression(
        modules={"model": model},
        opt_class=lambda params: opt_class(params, extrapolation=1.0),
        hparams={"admm": admm},
        run_opts={"device": "cpu", **(run_opts or {})},
        checkpointer=Checkpointer(
            folder / "save",
            {"model": model, "admm": admm, "counter": counter},
        ),
    )
    brain.fit(counter, data(1), data(2), progressbar=False)
    return brain, model


def test_a_killed_run_continues_bit_exactly(tmp_path):
    _, whole = fitted(tmp_path / "whole", 4)
    fitted(tmp_path / "parts", 2)
    _, resumed = fitted(tmp_path / "parts", 4)
    states = resumed.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, states[name]), name
    texts = [
        (tmp_path / run / "admm.json").read_text() for run in ("whole", "parts")
    ]
    assert texts[0] == texts[1]


def test_the_record_has_every_iteration(tmp_path):
    fitted(tmp_path, 4)  # 4 epochs of 8 steps, iterations of 3
    rows = json.loads((tmp_path / "admm.json").read_text())
    assert [row["step"] for row in rows] == list(range(3, 31, 3))
    assert [row["iteration"] for row in rows] == list(range(1, 11))
    validated = [row["step"] for row in rows if row["valid_loss"] is not None]
    assert validated == [6, 15, 24, 30]
    assert rows[-1]["primal_residual"] < rows[0]["primal_residual"]
    assert rows[1]["penalty"] == pytest.approx(0.06)


def test_what_was_validated_is_packed_at_mixed_widths(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    content = quantize_(model, 2, exclude=["*.bias"]).to_dict()
    content["clusters"]["1"]["bits"] = 8
    clusters = {"version": 1, "clusters": content["clusters"]}
    plan = BitPlan.from_dict({**clusters, "rest_parameters": 11})
    brain, model = fitted(tmp_path / "run", 3, plan=plan)
    brain.checkpointer.recover_if_possible(min_key="loss")
    brain.hparams.admm.finish(model)
    assert bit_plan(model).to_dict() == plan.to_dict()
    save_packed(model, tmp_path / "packed")
    fresh = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    load_packed_(fresh, tmp_path / "packed")
    with torch.no_grad():
        losses = [(fresh(x) - y).square().mean() for x, y in data(2)]
    rows = json.loads((tmp_path / "run/admm.json").read_text())
    validated = [r["valid_loss"] for r in rows if r["valid_loss"] is not None]
    assert sum(losses).item() / len(losses) == pytest.approx(min(validated))


def test_one_table_of_the_whole_model_is_what_is_packed(tmp_path):
    fitted(tmp_path / "run", 1, global_table=True)
    # A killed run goes on with it.
    brain, model = fitted(tmp_path / "run", 3, global_table=True)
    brain.hparams.admm.finish(model)
    save_packed(model, tmp_path / "packed")
    fresh = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    load_packed_(fresh, tmp_path / "packed")
    sizes = torch.cat(
        [layer.weight.detach().abs().flatten() for layer in fresh]
    )
    assert len(sizes[sizes > 0].unique()) == 1  # levels -1, 0 and 1
    _, apart = fitted(tmp_path / "apart", 1)
    scales = [
        t.fake_quantize.alpha
        for t in named_tensors(apart).values()
        if t.fake_quantize
    ]
    assert scales[0] != scales[1]


def test_one_table_excludes_one_a_row(tmp_path):
    method = ADMMTraining(tmp_path / "admm.json", global_table=True)
    method.check(Scheme(), "nearest", None)
    with pytest.raises(ValueError, match="leave out global_table"):
        method.check(Scheme("channel"), "nearest", None)


def test_rescaling_keeps_the_multiplier(tmp_path):
    """Dual variable times penalty is the same before and after growth."""
    duals = []
    for growth in (1.0, 2.0):
        torch.manual_seed(0)
        model = Weight(torch.randn(9))
        quantize_(model, 2, estimator=ADMM)
        admm = ADMMTraining(tmp_path / "a", 1, 0.1, growth)
        optimizer = AdamExtraGradient(model.parameters())
        admm.start(with_optimizer(optimizer), model)
        admm.after_step(None)
        duals.append(admm.penalty * model.parametrizations.weight[0].dual)
    torch.testing.assert_close(duals[0], duals[1])


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="estimator"):
        fitted(tmp_path / "a", 1, estimator=FakeQuantize)
    with pytest.raises(ValueError, match="opt_class"):
        fitted(tmp_path / "b", 1, opt_class=lambda p, **_: torch.optim.Adam(p))
    with pytest.raises(ValueError, match="lower iteration_steps"):
        fitted(tmp_path / "c", 1, iteration_steps=9)
    options = {"grad_accumulation_factor": 2}
    with pytest.raises(ValueError, match="grad_accumulation_factor"):
        fitted(tmp_path / "d", 1, run_opts=options)
    with pytest.raises(ValueError, match="penalty > 0"):
        ADMMTraining(tmp_path / "e", 1, penalty=0.0)
    with pytest.raises(ValueError, match="negative"):
        ExtraGradient([torch.zeros(1)], extrapolation=-1.0)


def test_adam_direction_is_torchs_and_steps_follow_the_tensor():
    torch.manual_seed(0)
    start, gradients = 3 * torch.randn(20), torch.randn(6, 20)
    ours = torch.nn.Parameter(start.clone())
    theirs = torch.nn.Parameter(start.clone())
    optimizer = AdamExtraGradient([ours], lr=0.06, extrapolation=0.5)
    adam = torch.optim.Adam([theirs], betas=(0.9, 0.99))
    for gradient in gradients:
        rms = theirs.detach().square().mean().sqrt().item()
        adam.param_groups[0]["lr"] = 0.01 * rms
        ours.grad = theirs.grad = gradient
        before = ours.detach().clone()
        optimizer.extrapolate()
        ahead = ours.detach() - before
        optimizer.step()
        adam.step()
        torch.testing.assert_close(ours, theirs)
        # The look-ahead is half of the step that the same gradient gives.
        torch.testing.assert_close(
            ahead, 0.5 * (ours.detach() - before), atol=1e-6, rtol=1e-3
        )


def test_a_step_without_its_look_ahead_is_refused():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.sum().backward()
    with pytest.raises(RuntimeError, match="extrapolate"):
        ExtraGradient([weight]).step()


def test_steps_of_a_schedule_that_warms_up_from_nothing_and_decays():
    weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = AdamExtraGradient([weight], lr=0.0, step=0.03)
    other = torch.nn.Parameter(weight.detach().clone())
    same = AdamExtraGradient([other], lr=0.01, step=0.03)
    for lr, shared in ((0.0, None), (0.001, 0.01), (2.0, 0.01), (1.0, 0.005)):
        optimizer.param_groups[0]["lr"] = lr
        before = weight.detach().clone()
        weight.grad = torch.ones(2)
        optimizer.step()
        if shared is None:
            assert torch.equal(weight, before)
            optimizer.state.clear()
            continue
        same.param_groups[0]["lr"] = shared
        other.grad = torch.ones(2)
        same.step()
        assert torch.allclose(weight, other)


def test_weights_that_result_from_others_are_refused_before_scoring():
    layers = {"plain": torch.nn.Linear(4, 4), "normed": torch.nn.Linear(4, 4)}
    torch.nn.utils.parametrizations.weight_norm(layers["normed"])
    brain = sb.Brain(
        torch.nn.ModuleDict(layers), torch.optim.SGD, {"output_folder": "none"}
    )
    with pytest.raises(ValueError, match="pulls a parameter itself.* normed"):
        choose_bits(brain, None, "kl", method="admm")  # no data to score on


@pytest.mark.parametrize("ratio, changes", [(1.5, True), (2.5, False)])
def test_levels_freeze_at_a_penalty_of_twice_the_step(ratio, changes, tmp_path):
    """What docs/language-models.md says of ADMM's penalty.

    T + lam settles step / penalty levels from f where the gradient always
    has the same sign, and has to come half a level far.
    """
    step = 0.03
    layer = torch.nn.Linear(64, 1, bias=False)
    layer.weight.data.copy_((torch.arange(64) % 3 - 1.0)[None])
    quantize_(layer, 2, estimator=ADMM)
    admm = ADMMTraining(
        tmp_path / "admm.json", iteration_steps=40, penalty=ratio * step
    )
    optimizer = AdamExtraGradient(layer.parameters(), lr=step)
    brain = sb.Brain({"layer": layer})
    brain.optimizers_dict = {"opt_class": optimizer}
    admm.start(brain, layer)
    (tensor,) = named_tensors(layer).values()
    before = tensor.fake_quantize.projection.clone()
    for _ in range(40 * 30):
        optimizer.zero_grad()
        layer.weight[0, 1].backward()  # always down, of one weight
        optimizer.step()
        admm.after_step(brain)
    after = tensor.fake_quantize.projection
    assert (before[0, 1] != after[0, 1]).item() == changes
    kept = torch.arange(64) != 1
    assert torch.equal(before[0, kept].sign(), after[0, kept].sign())
