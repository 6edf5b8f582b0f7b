"""Bits that are learned in an ordinary training, from its own gradients."""

import weakref
from functools import partial

from torch.optim.optimizer import register_optimizer_step_post_hook

from ..allocation.scores import check_candidates
from ..brains.one_stage import OneStage
from ..quantization.cutting import cut
from ..quantization.tables import check_bits
from ..quantization.tensors import named_tensors, select
from .budget import parse_budget
from .quantizer import Quantizer

STATE = "learned_bits"  # key in the optimizer's checkpoint


class LearnedBits(Quantizer):
    """A quantizer that learns the bits of every cluster while weights train.

    Training begins at the most bits. After every few steps the bits of all
    clusters are decided anew, within the budget, from the gradients since; see
    `OneStage`. Needs `learn_bits` as the recipe's optimizer.

    Arguments
    ---------
    targets : dict, list or torch.nn.Module
        What to quantize, usually ``!ref <modules>``.
    bits : float
        Budget: bits on average.
    candidate_bits : sequence of int
        Bits to choose from.
    interval : int
        Steps between two decisions; validation must not come before the first.
        More are better where training begins with random weights.
    decisions : int
        How many there are.
    min_bits : int
        Least bits of any cluster.
    **options : dict
        Those of `Quantizer`.

    Example
    -------
    >>> import torch
    >>> quantizer = LearnedBits({"net": torch.nn.PReLU()}, bits=3)
    >>> quantizer.plan.average_bits  # until the first decision
    16.0
    """

    any_bits = True

    def __init__(
        self,
        targets,
        bits=4,
        candidate_bits=(2, 3, 4, 6, 8, 16),
        interval=20,
        decisions=5,
        min_bits=2,
        **options,
    ):
        if not check_bits(min_bits) <= max(check_candidates(candidate_bits)):
            raise ValueError(
                f"min_bits {min_bits} is more than any of the candidate bits "
                f"{candidate_bits}"
            )
        self.one_stage = OneStage(candidate_bits, interval, decisions)
        candidates = self.one_stage.candidate_bits
        self.limit = {**parse_budget(bits), "min_bits": min_bits}
        average = self.limit.get("average_bits")
        lowest = max(candidates[0], min_bits)
        if average is None or not lowest <= average <= candidates[-1]:
            raise ValueError(
                f"bits must lie between {lowest} and {candidates[-1]}, the "
                f"candidates, not {bits!r}"
            )
        self.followed = False
        super().__init__(targets, candidates[-1], **options)

    def quantize(self, plan_or_bits):
        """Start at these bits, and watch gradients from now on."""
        tensors = cut(named_tensors(self.model), self.table["rows"])
        for tensor in select(tensors, **self.patterns):
            if not tensor.parameter.requires_grad:
                raise ValueError(
                    f"{tensor.name} is frozen, and without gradients there is "
                    "nothing to learn bits from: exclude it, or name a "
                    "Quantizer and let choose_bits choose"
                )
        super().quantize(plan_or_bits)
        self.one_stage.start(
            self.model, **self.limit, equal_bits=self.equal_bits
        )
        tensors = named_tensors(self.model).values()
        first = next(t.fake_quantize for t in tensors if t.fake_quantize)
        self._handles += [
            first.register_forward_pre_hook(self._check_validation),
            register_optimizer_step_post_hook(
                partial(_check_followed, weakref.ref(self))
            ),
        ]

    def follow(self, optimizer):
        """Decide on bits after the steps of an optimizer.

        Arguments
        ---------
        optimizer : torch.optim.Optimizer
            Of all quantized weights that are trained; its checkpoints carry
            what is known of the bits.
        """
        held = _held(optimizer)
        for name, tensor in named_tensors(self.model).items():
            weight = tensor.parameter
            quantized = tensor.fake_quantize and weight.requires_grad
            if quantized and id(weight) not in held:
                raise ValueError(
                    f"{name} is quantized, but the optimizer does not train "
                    "it: take its module out of the quantizer's targets"
                )
        optimizer.register_step_post_hook(self._end_step)
        optimizer.register_state_dict_post_hook(self._add_state)
        optimizer.register_load_state_dict_pre_hook(self._take_state)
        self.followed = True

    def _end_step(self, *_):
        """After a step of the optimizer."""
        if not self.one_stage.settled:
            self.one_stage.gradients.forget_overflow()
        self.one_stage.end_step()

    def _check_validation(self, module, given):
        """Forward hook: a model at the most bits would pass for the best."""
        if not module.training and self.one_stage.step:
            self.one_stage.require_decision()

    def _add_state(self, optimizer, state):
        """Into the optimizer's checkpoint."""
        state[STATE] = {
            "step": self.one_stage.step,
            "steps": self.one_stage.gradients.steps,
            "sums": dict(self.one_stage.gradients.sums),
        }

    def _take_state(self, optimizer, state):
        """Out of the optimizer's checkpoint."""
        if STATE not in state:
            raise ValueError(
                "the checkpoint's training learned no bits: begin in another "
                "output_folder, and load its weights with a Pretrainer"
            )
        found = state.pop(STATE)
        weights = named_tensors(self.model)
        gradients = self.one_stage.gradients
        self.one_stage.step, gradients.steps = found["step"], found["steps"]
        gradients.sums = {
            name: total.to(weights[name].parameter.device)
            for name, total in found["sums"].items()
        }
        if self.one_stage.settled:
            gradients.close()


def _held(optimizer):
    """Identities of all parameters of an optimizer."""
    groups = optimizer.param_groups
    return {id(weight) for group in groups for weight in group["params"]}


def _check_followed(reference, optimizer, *_):
    """After a step of any optimizer: the bits must learn from it."""
    quantizer = reference()
    if quantizer is None or quantizer.followed:
        return
    held = _held(optimizer)
    if any(id(p) in held for p in quantizer.model.parameters()):
        raise ValueError(
            "LearnedBits learns nothing without its optimizer: in the hparams "
            "make it `!name:speechbrain_mpq.learn_bits`, with quantizer: !ref "
            "<quantizer> and opt_class: the optimizer's own `!name:`"
        )
