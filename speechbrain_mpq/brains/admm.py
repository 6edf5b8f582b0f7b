"""ADMM estimation in a Brain: what happens when.

Every step looks ahead and comes back to step (`extra_gradient`); after a
number of steps an outer iteration ends with the codebook and dual steps of
all tensors (`quantization.admm`). Validation sees the quantized copies.
"""

import json
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import main_process_only

from ..quantization.admm import ADMM
from ..quantization.admm_steps import relative_distance
from ..quantization.tensors import named_tensors
from .extra_gradient import ExtraGradient
from .files import write_json


@register_checkpoint_hooks
class ADMMTraining:
    """Outer iterations of ADMM and their record.

    A Brain calls `start` when its optimizer is there and a checkpoint is
    recovered, `look_ahead` before and `count_step` after each step,
    `validated` with each validation loss, and `finish` with the model to
    pack. The state belongs into the Brain's checkpoints.

    Arguments
    ---------
    history_file : str
        JSON to write: one row for each outer iteration.
    iteration_steps : int
        Optimizer steps in an outer iteration.
    penalty : float
        Weight g of the penalty in the first outer iteration.
    growth : float
        Factor on it after each outer iteration; 1 as in the paper.
    largest_penalty : float
        What it grows to at most.

    Example
    -------
    >>> from speechbrain_mpq.quantization.quantizer import quantize_
    >>> from .extra_gradient import AdamExtraGradient
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -0.75]]))
    >>> _ = quantize_(layer, 2, estimator=ADMM)
    >>> file = getfixture("tmpdir") / "admm.json"
    >>> admm = ADMMTraining(file, iteration_steps=1, penalty=1.0)
    >>> optimizer = AdamExtraGradient(layer.parameters())
    >>> admm.start(layer, optimizer)
    >>> layer(torch.zeros(1, 2)).sum().backward()  # no gradient but g's
    >>> optimizer.step()
    >>> layer.weight.data  # halfway to 0.875
    tensor([[ 0.9375, -0.8125]])
    >>> admm.count_step(1)
    >>> round(admm.history[0]["primal_residual"], 4)
    0.0712
    """

    def __init__(
        self,
        history_file,
        iteration_steps,
        penalty=1e-3,
        growth=1.0,
        largest_penalty=1.0,
    ):
        if iteration_steps < 1 or penalty <= 0 or growth < 1:
            raise ValueError(
                "ADMM needs iteration_steps >= 1, penalty > 0 and growth >= "
                f"1, not {iteration_steps}, {penalty} and {growth}"
            )
        self.history_file = Path(history_file)
        self.iteration_steps = iteration_steps
        self.first_penalty = penalty
        self.growth = growth
        self.largest_penalty = max(penalty, largest_penalty)
        self.history = []
        self._tensors = []
        self._optimizer = None

    @property
    def penalty(self):
        """Weight g in the outer iteration that is running."""
        grown = self.first_penalty * self.growth ** len(self.history)
        return min(grown, self.largest_penalty)

    def start(self, model, optimizer):
        """Begin, or go on with what a checkpoint has brought back.

        Arguments
        ---------
        model : torch.nn.Module
            Quantized with the estimator `ADMM`.
        optimizer : ExtraGradient
            Of its parameters.
        """
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
        for tensor in self._tensors:
            if not tensor.fake_quantize.started:
                tensor.fake_quantize.start(tensor.parameter)
        optimizer.estimators = {
            tensor.parameter: tensor.fake_quantize for tensor in self._tensors
        }
        optimizer.penalty = self.penalty
        self._optimizer = optimizer

    def look_ahead(self, brain, batch):
        """First half of an extra-gradient step; the Brain does the second.

        Arguments
        ---------
        brain : speechbrain.Brain
            Gives the loss.
        batch : object
            What the step is going to use too.
        """
        if brain.grad_accumulation_factor != 1 or brain.scaler.is_enabled():
            raise ValueError(
                "ADMM takes whole steps without loss scaling: set "
                "grad_accumulation_factor to 1 and --precision to fp32 or bf16"
            )
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

    def count_step(self, steps):
        """End an outer iteration where its steps are done.

        Arguments
        ---------
        steps : int
            Optimizer steps so far.
        """
        if steps % self.iteration_steps:
            return
        floats = [tensor.parameter for tensor in self._tensors]
        estimators = [tensor.fake_quantize for tensor in self._tensors]
        before = [estimator.projection.clone() for estimator in estimators]
        for estimator, weight in zip(estimators, floats):
            estimator.iterate(weight)
        now = [estimator.projection for estimator in estimators]
        row = {
            "iteration": len(self.history) + 1,
            "step": steps,
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
        """Note a validation loss and write the record.

        Arguments
        ---------
        loss : float
            Of the quantized model.

        Returns
        -------
        stats : dict
            The newest row, for a log.
        """
        if not self.history:
            raise ValueError(
                "validation came before the first outer iteration of ADMM: "
                f"lower iteration_steps from {self.iteration_steps} to the "
                "steps of an epoch or less"
            )
        self.history[-1]["valid_loss"] = float(loss)
        main_process_only(write_json)(self.history_file, self.history)
        return self.history[-1]

    def finish(self, model):
        """Put the quantized copies, as validated, into the model to pack.

        Arguments
        ---------
        model : torch.nn.Module
            With the checkpoint that is wanted recovered.
        """
        for tensor in _admm_tensors(model):
            tensor.fake_quantize.finish(tensor.parameter)

    @mark_as_saver
    def _save(self, path):
        """Keep the record, from which all else follows."""
        Path(path).write_text(json.dumps(self.history), encoding="utf-8")

    @mark_as_loader
    def _recover(self, path, end_of_epoch):
        """Go on from a record."""
        self.history = json.loads(Path(path).read_text(encoding="utf-8"))


def _admm_tensors(model):
    """The tensors that ADMM estimates."""
    return [
        tensor
        for tensor in named_tensors(model).values()
        if isinstance(tensor.fake_quantize, ADMM)
    ]
