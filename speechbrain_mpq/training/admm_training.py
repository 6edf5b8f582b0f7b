"""ADMM estimation in a Brain: its optimizers, and what happens when.

The primal problem is solved by extra-gradient steps with a penalty. A step
looks ahead first and goes by the gradient that it finds there:

    Tbar = T - eta1 grad L(T),    T <- T - eta2 grad L(Tbar)

so that each needs two gradients on the same batch: `extrapolate()` takes the
first, `step()` the second. With no look-ahead (`extrapolation=0`) these are
plain gradient steps.

After a number of steps an outer iteration ends with the codebook and dual
steps of all tensors (`quantization.admm`). Validation sees the quantized
copies.
"""

import json
from functools import partial
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import main_process_only

from ..quantization.admm import (
    ADMM,
    augmented_gradient,
    iterate_with_one_table,
    proximal_step,
    relative_distance,
    start_with_one_table,
)
from ..quantization.tensors import named_tensors
from ..utils import read_text, strict_json, write_json
from .methods import ROUNDED, EstimationMethod

SMALLEST_RMS = 1e-3  # of a tensor that steps are relative to
FINE_LEVEL = 1 / 6  # of the root mean square; about a level at five bits


class ExtraGradient(torch.optim.Optimizer):
    """Extra-gradient steps on the augmented Lagrangian, as in the paper.

    Parameters that are not quantized take the same steps without penalty.

    Arguments
    ---------
    params : iterable of torch.nn.Parameter
        What to train.
    lr : float
        Step size eta2.
    extrapolation : float
        Look-ahead eta1 in units of the step size; the paper's 0.02 / 0.001.
    step : float or None
        Step size at the largest `lr` so far, where that is of a recipe whose
        schedule changes it: steps shrink with it. None: `lr` itself.

    Example
    -------
    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = ExtraGradient([weight], lr=0.25, extrapolation=2.0)
    >>> weight.square().sum().backward()  # gradient 2
    >>> optimizer.extrapolate()
    >>> weight.item()
    0.0
    >>> optimizer.zero_grad()
    >>> weight.square().sum().backward()  # gradient 0 there
    >>> optimizer.step()
    >>> weight.item()
    1.0
    """

    def __init__(
        self, params, lr=0.001, extrapolation=20.0, step=None, **defaults
    ):
        if lr < 0 or extrapolation < 0:
            raise ValueError(
                f"lr and extrapolation must not be negative, not {lr!r} and "
                f"{extrapolation!r}"
            )
        unit = 1.0 if step is None else _unit(step, lr)
        defaults.update(lr=lr, extrapolation=extrapolation, unit=unit)
        defaults["largest"] = step
        super().__init__(params, defaults)
        self.penalty = 0.0
        # parameter -> rows and ADMM parametrization of each of its slices
        self.estimators = {}
        self._origins = {}  # parameter -> where the look-ahead started

    @property
    def looks_ahead(self):
        """Whether a step needs `extrapolate()` before."""
        return any(group["extrapolation"] for group in self.param_groups)

    def _follow_schedules(self):
        """A schedule that has warmed up to more means the same step by it."""
        for group in self.param_groups:
            if group["largest"] is not None:
                unit = _unit(group["largest"], group["lr"])
                group["unit"] = min(group["unit"] or unit, unit)

    @torch.no_grad()
    def extrapolate(self):
        """Go to Tbar, from where `step()` comes back."""
        self._follow_schedules()
        for group in self.param_groups:
            for parameter in group["params"]:
                self._origins[parameter] = parameter.clone()
                if parameter.grad is not None:
                    size = group["extrapolation"]
                    self._move(parameter, parameter, group, size, keep=False)

    @torch.no_grad()
    def step(self, closure=None):
        """Step from T by the gradient at Tbar.

        Arguments
        ---------
        closure : None
            There for torch's interface only.
        """
        if closure is not None:
            raise ValueError("extra-gradient steps take no closure")
        if self.looks_ahead and not self._origins:
            raise RuntimeError(
                "call extrapolate() with a gradient of the same batch before "
                "step(), or construct with extrapolation=0"
            )
        self._follow_schedules()
        for group in self.param_groups:
            for parameter in group["params"]:
                origin = self._origins.pop(parameter, parameter)
                if parameter.grad is None:
                    parameter.copy_(origin)
                else:
                    self._move(parameter, origin, group, 1.0, keep=True)

    def _move(self, parameter, origin, group, size, keep):
        """Set a parameter to `size` steps from an origin, by its gradient."""
        gradient = parameter.grad.clone()
        for rows, estimator in self.estimators.get(parameter, ()):
            gradient[rows] = augmented_gradient(
                gradient[rows],
                parameter[rows],
                estimator.projection,
                estimator.dual,
                self.penalty,
            )
        parameter.copy_(origin - size * group["lr"] * group["unit"] * gradient)


def _unit(step, lr):
    """What a learning rate is multiplied by; 0 where it does not say."""
    return step / lr if lr else 0.0


class AdamExtraGradient(ExtraGradient):
    """Extra-gradient steps by Adam's direction, in units of the codebook.

    Made for runs of a few hundred steps. A step changes a weight by about
    `lr` of the distance of its codebook's levels, so that tensors of all
    sizes and widths can change levels; finer codebooks than of five bits, and
    parameters that are not quantized, count as of five. The penalty is apart
    from the direction, as a proximal step, and means the same for every
    tensor: a step takes away penalty / (1 + penalty) of T - f + lam.

    Arguments
    ---------
    params : iterable of torch.nn.Parameter
        What to train.
    lr : float
        Step size in levels.
    extrapolation : float
        Look-ahead in units of the step.
    betas : tuple of float
        Adam's forgetting factors of the gradient and of its square.
    step : float or None
        See `ExtraGradient`.
    eps : float
        Added to the root of the latter.

    Example
    -------
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0, 0.0, 5.0]))
    >>> optimizer = AdamExtraGradient([weight], lr=0.6, extrapolation=0.0)
    >>> (weight * torch.tensor([1.0, 1.0, 0.0, -9.0])).sum().backward()
    >>> optimizer.step()  # a tenth of the root mean square, 3.5355
    >>> weight.data
    tensor([ 2.6464, -4.3536,  0.0000,  5.3536])
    """

    def __init__(
        self,
        params,
        lr=0.03,
        extrapolation=0.0,
        betas=(0.9, 0.99),
        eps=1e-8,
        step=None,
    ):
        super().__init__(params, lr, extrapolation, step, betas=betas, eps=eps)

    def _move(self, parameter, origin, group, size, keep):
        """Set a parameter to `size` steps from an origin, by its gradient."""
        direction = self._direction(parameter, group, keep)
        length = size * group["lr"] * group["unit"]
        for rows, estimator in self.estimators.get(parameter, [(..., None)]):
            start = origin[rows]
            rms = start.square().mean().sqrt().clamp_min(SMALLEST_RMS)
            level = FINE_LEVEL * rms
            if estimator is not None:
                level = torch.maximum(level, estimator.alpha)
            moved = start - length * level * direction[rows]
            if estimator is not None:
                moved = proximal_step(
                    moved,
                    estimator.projection,
                    estimator.dual,
                    size * self.penalty,
                )
            parameter[rows] = moved

    def _direction(self, parameter, group, keep):
        """Adam's direction; its averages change only where they are kept."""
        state, gradient = self.state[parameter], parameter.grad
        zero = torch.zeros_like(parameter)
        forget_mean, forget_square = group["betas"]
        mean = torch.lerp(gradient, state.get("mean", zero), forget_mean)
        square = torch.lerp(
            gradient.square(), state.get("square", zero), forget_square
        )
        step = state.get("step", torch.tensor(0.0)) + 1
        if keep:
            state.update(mean=mean, square=square, step=step)
        mean = mean / (1 - forget_mean**step)
        square = square / (1 - forget_square**step)
        return mean / (square.sqrt() + group["eps"])


STEP = 0.03  # of a codebook's level, where a recipe's optimizer is replaced
PRINTED_STEP = 0.001  # eta2 of the paper


@register_checkpoint_hooks
class ADMMTraining(EstimationMethod):
    """Estimation by ADMM: its outer iterations and their record.

    Arguments
    ---------
    history_file : str or None
        JSON to write: one row for each outer iteration; None: the Brain's
        output_folder/admm.json, if it has one. Then the Brain's optimizer is
        replaced by `AdamExtraGradient`, too.
    iteration_steps : int
        Optimizer steps in an outer iteration.
    penalty : float
        Weight g of the penalty in the first outer iteration.
    growth : float
        Factor on it after each outer iteration; 1 as in the paper.
    largest_penalty : float
        What it grows to at most.
    step : float
        Where the Brain's optimizer is replaced: step in units of the
        codebook's levels at the largest learning rate of the recipe.
    printed : bool
        Replaces it by the paper's `ExtraGradient` with steps of 0.001 behind
        a look-ahead of 0.02, and starts scales at 1, as printed there.
    global_table : bool
        One scale for all tensors of the same bits, the paper's global ADMM,
        where there would be one a tensor. The packed file has it beside each.

    Example
    -------
    >>> from speechbrain_mpq.quantization.quant_api import quantize_
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -0.75]]))
    >>> _ = quantize_(layer, 2, estimator=ADMM)
    >>> file = getfixture("tmpdir") / "admm.json"
    >>> admm = ADMMTraining(file, iteration_steps=1, penalty=1.0)
    >>> optimizer = AdamExtraGradient(layer.parameters())
    >>> brain = sb.Brain({"layer": layer})
    >>> brain.optimizers_dict = {"opt_class": optimizer}
    >>> admm.start(brain, layer)
    >>> layer(torch.zeros(1, 2)).sum().backward()  # no gradient but g's
    >>> optimizer.step()
    >>> layer.weight.data  # halfway to 0.875
    tensor([[ 0.9375, -0.8125]])
    >>> admm.after_step(brain)
    >>> round(admm.history[0]["primal_residual"], 4)
    0.0712
    """

    recoverable = "admm"
    rounding = "nearest"

    def __init__(
        self,
        history_file=None,
        iteration_steps=10,
        penalty=1e-3,
        growth=1.0,
        largest_penalty=1.0,
        step=STEP,
        printed=False,
        global_table=False,
    ):
        super().__init__(partial(ADMM, first_alpha=1.0) if printed else ADMM)
        if iteration_steps < 1 or penalty <= 0 or growth < 1:
            raise ValueError(
                "ADMM needs iteration_steps >= 1, penalty > 0 and growth >= "
                f"1, not {iteration_steps}, {penalty} and {growth}"
            )
        self.replaces_optimizer = history_file is None
        self.history_file = history_file and Path(history_file)
        self.iteration_steps = iteration_steps
        self.first_penalty = penalty
        self.growth = growth
        self.largest_penalty = max(penalty, largest_penalty)
        self.step = PRINTED_STEP if printed else step
        self.kind = ExtraGradient if printed else AdamExtraGradient
        self.global_table = global_table
        self.history = []
        self.steps = 0
        self._tensors = []
        self._optimizer = None

    @property
    def penalty(self):
        """Weight g in the outer iteration that is running."""
        grown = self.first_penalty * self.growth ** len(self.history)
        return min(grown, self.largest_penalty)

    def check(self, scheme, rounding, scorer):
        """Refuse what the method cannot do, before any work."""
        super().check(scheme, rounding, scorer)
        if rounding == "calibrated":
            raise ValueError(ROUNDED)
        if self.global_table and scheme.granularity != "tensor":
            raise ValueError(
                f"one table for all and granularity {scheme.granularity!r} "
                "exclude each other: leave out global_table, or ask for "
                '"tensor"'
            )

    def check_brain(self, brain):
        """Refuse a Brain whose optimizer cannot be replaced."""
        _check_steps(brain)
        own = type(brain).init_optimizers is not sb.Brain.init_optimizers
        if self.replaces_optimizer and (own or brain.opt_class is None):
            raise ValueError(
                f"ADMM has an optimizer of its own, and {type(brain).__name__} "
                "makes its optimizers itself, not by opt_class: use another "
                'method, such as "log_step"'
            )

    def check_tensors(self, tensors):
        """Refuse weights that result from others, before they are scored."""
        names = [t.name for t in tensors if t.chain is not None]
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise ValueError(
                f"ADMM pulls a parameter itself to its quantized values, and "
                f"{names[0]}{more} results from parametrizations of the "
                "module, such as weight norm: exclude it, remove them, or use "
                'another method, such as "log_step"'
            )

    def prepare(self, brain):
        """Put ADMM's own optimizer in the place of the Brain's."""
        if not self.replaces_optimizer:
            return
        plain = brain.opt_class

        def make(parameters):
            parameters = list(parameters)
            lr = plain(parameters).param_groups[0].get("lr", self.step)
            return self.kind(parameters, lr=float(lr), step=self.step)

        brain.opt_class = make
        folder = getattr(brain.hparams, "output_folder", None)
        self.history_file = folder and Path(folder) / "admm.json"

    def start(self, brain, model):
        """Begin, or go on with what a checkpoint has brought back."""
        (optimizer,) = brain.optimizers_dict.values()
        self._tensors = _admm_tensors(model)
        if not self._tensors:
            raise ValueError(
                "no parameter is estimated by ADMM: name it in the YAML, "
                "`estimator: !name:speechbrain_mpq.ADMM`, or `admm: null`"
            )
        if not isinstance(optimizer, ExtraGradient):
            raise ValueError(
                "ADMM needs an optimizer that knows its penalty, not "
                f"{type(optimizer).__name__}: let `opt_class` be "
                "ExtraGradient or AdamExtraGradient"
            )
        self._start_tensors()
        optimizer.estimators = {}
        for tensor in self._tensors:
            own = optimizer.estimators.setdefault(tensor.parameter, [])
            own.append((tensor.rows, tensor.fake_quantize))
        optimizer.penalty = self.penalty
        self._optimizer = optimizer

    def _start_tensors(self):
        """Begin with all tensors that no checkpoint has brought back."""
        fresh = [t for t in self._tensors if not t.fake_quantize.started]
        if self.global_table and fresh:
            start_with_one_table(*_parts(self._tensors))
            return
        for tensor in fresh:
            tensor.fake_quantize.start(tensor.weight)

    def before_step(self, brain, batch):
        """First half of an extra-gradient step; the Brain does the second."""
        _check_steps(brain)
        if not self._optimizer.looks_ahead:
            return
        with brain.training_ctx:
            outputs = brain.compute_forward(batch, sb.Stage.TRAIN)
            loss = brain.compute_objectives(outputs, batch, sb.Stage.TRAIN)
        brain.check_loss_isfinite(loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            self._optimizer.param_groups[0]["params"], brain.max_grad_norm
        )
        self._optimizer.extrapolate()
        self._optimizer.zero_grad()

    def after_step(self, brain):
        """End an outer iteration where its steps are done."""
        self.steps += 1
        if self.steps % self.iteration_steps == 0:
            self._iterate()

    def _iterate(self):
        """End an outer iteration."""
        estimators, floats = _parts(self._tensors)
        before = [estimator.projection.clone() for estimator in estimators]
        if self.global_table:
            iterate_with_one_table(estimators, floats)
        else:
            for estimator, weight in zip(estimators, floats):
                estimator.iterate(weight)
        now = [estimator.projection for estimator in estimators]
        row = {
            "iteration": len(self.history) + 1,
            "step": self.steps,
            "penalty": self.penalty,
            "primal_residual": relative_distance(floats, now),
            "codebook_change": relative_distance(now, before),
            "valid_loss": None,
        }
        self.history.append(row)
        # What ADMM carries over is g lam: lam shrinks as the penalty grows.
        for estimator in estimators:
            estimator.dual.mul_(row["penalty"] / self.penalty)
        self._optimizer.penalty = self.penalty

    def validated(self, loss):
        """Note a validation loss and write the record."""
        if not self.history and self.replaces_optimizer:
            self._iterate()  # an epoch of fewer steps, whatever the recipe
        if not self.history:
            raise ValueError(
                "validation came before the first outer iteration of ADMM: "
                f"lower iteration_steps from {self.iteration_steps} to the "
                "steps of an epoch or less"
            )
        self.history[-1]["valid_loss"] = float(loss)
        if self.history_file:
            main_process_only(write_json)(self.history_file, self.history)
        return {"primal residual": self.history[-1]["primal_residual"]}

    def finish(self, model):
        """Put the quantized copies, as validated, into the model to pack."""
        for tensor in _admm_tensors(model):
            tensor.fake_quantize.finish(tensor.weight)

    @mark_as_saver
    def _save(self, path):
        """Keep the record, from which all else follows."""
        state = {"steps": self.steps, "history": self.history}
        Path(path).write_text(json.dumps(state), encoding="utf-8")

    @mark_as_loader
    def _recover(self, path, end_of_epoch):
        """Go on from a record."""
        state = strict_json(read_text(path))
        if isinstance(state, list):  # of earlier versions: the history alone
            steps = state[-1]["step"] if state else 0
            state = {"history": state, "steps": steps}
        self.history, self.steps = state["history"], state["steps"]


def _check_steps(brain):
    """Refuse a Brain whose steps are not of whole gradients."""
    if brain.grad_accumulation_factor != 1 or brain.scaler.is_enabled():
        raise ValueError(
            "ADMM takes whole steps without loss scaling: set "
            "grad_accumulation_factor to 1 and --precision to fp32 or bf16"
        )


def _admm_tensors(model):
    """The tensors that ADMM estimates."""
    return [
        tensor
        for tensor in named_tensors(model).values()
        if isinstance(tensor.fake_quantize, ADMM)
    ]


def _parts(tensors):
    """Estimators and float weights of tensors."""
    estimators = [tensor.fake_quantize for tensor in tensors]
    return estimators, [tensor.weight for tensor in tensors]
