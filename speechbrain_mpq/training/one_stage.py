"""Bits and weights learned together, in one training run.

Training begins at the most bits, which harm nothing. After every few steps
the bits of all clusters are decided anew, within the budget, from the
gradients of the steps since and from the weights as they are by then; the
weights go on training at these bits. After the last decision only the weights
are trained. There are no prototypes, no scoring pass and no second training.

`OneStage` is the estimation method; `LearnedBits` and `learn_bits` do the same
in a recipe by its YAML alone.
"""

import copy
import weakref
from functools import partial

import torch
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from ..allocation.fisher import SquaredGradients, fitted
from ..allocation.scores import check_candidates
from ..allocation.solver import parse_budget
from ..quantization.chains import listen_to_steps
from ..quantization.codebook import check_bits
from ..quantization.groups import split_groups
from ..quantization.packing import save_packed
from ..quantization.plan import bit_plan
from ..quantization.tensors import named_tensors, select
from ..utils import scratch_folder
from .methods import ROUNDED, EstimationMethod
from .pipeline import allocate_within
from .quantizer import Quantizer


def learn_bits(
    parameters, quantizer, opt_class, **options
) -> torch.optim.Optimizer:
    """Makes an ordinary optimizer, after whose steps bits are decided.

    For the ``opt_class`` of a Brain, in place of the optimizer itself. What is
    known of the bits is kept in the optimizer's checkpoint.

    Arguments
    ---------
    parameters : iterable
        Parameters or groups of them, as a Brain gives them.
    quantizer : LearnedBits
        Whose bits are learned.
    opt_class : callable
        Makes the optimizer, such as torch.optim.AdamW.
    **options : dict
        Passed on: lr, weight_decay, ...

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq import LearnedBits
    >>> modules = torch.nn.ModuleDict({"net": torch.nn.Linear(8, 8)})
    >>> quantizer = LearnedBits(modules, bits=3, interval=1, decisions=1)
    >>> optimizer = learn_bits(
    ...     modules.parameters(), quantizer, torch.optim.SGD, lr=0.1
    ... )
    >>> modules["net"](torch.ones(8)).square().sum().backward()
    >>> quantizer.plan.average_bits
    16.0
    >>> optimizer.step()
    >>> quantizer.plan.average_bits <= 3
    True
    """
    optimizer = opt_class(parameters, **options)
    quantizer.follow(optimizer)
    return optimizer


logger = get_logger(__name__)


def change_bits_(model, plan):
    """Give a quantized model the bits of another plan; weights go on.

    Clusters that keep their bits keep their scales too, the others' are
    fitted to the weights as they are.
    """
    tensors = named_tensors(model)
    before = bit_plan(model).clusters
    changed = 0
    for name, cluster in plan.clusters.items():
        if cluster.bits == before[name].bits:
            continue
        changed += 1
        for member in cluster.tensors:
            tensor = tensors[member]
            state = fitted(tensor, cluster.bits).state_dict()
            # Values, not modules: the optimizer and hooks hold on to those.
            tensor.fake_quantize.load_state_dict(state)
    return changed


@register_checkpoint_hooks
class OneStage(EstimationMethod):
    """Decides on bits while the weights train.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to choose from; training begins at the most.
    interval : int
        Steps between two decisions.
    decisions : int
        How many there are.
    shrinks : bool
        An epoch of fewer steps makes their number the interval; otherwise its
        validation is refused.

    Example
    -------
    >>> from speechbrain_mpq import quantize_
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    ... )
    >>> one_stage = OneStage((2, 4, 8), interval=1, decisions=1)
    >>> plan = quantize_(model, one_stage.candidate_bits[-1])
    >>> one_stage.watch(model, {"average_bits": 3})
    >>> x = torch.tensor([[1.0] + [0.0] * 7])  # the first layer needs little
    >>> model(100 * x).square().sum().backward()
    >>> one_stage.end_step()
    >>> bit_plan(model).average_bits, one_stage.settled
    (3.0, True)
    """

    recoverable = "one_stage"
    keeps_plan = False
    rounding = "nearest"

    def __init__(
        self,
        candidate_bits=(2, 3, 4, 6, 8, 16),
        interval=20,
        decisions=4,
        shrinks=False,
    ):
        super().__init__()
        self.candidate_bits = check_candidates(candidate_bits)
        if interval < 1 or decisions < 1:
            raise ValueError(
                "one-stage learning needs at least one decision after at "
                f"least one step, not {decisions} after {interval} each"
            )
        self.interval = interval
        self.decisions = decisions
        self.shrinks = shrinks
        self.step = 0
        self.gradients = None

    def check(self, scheme, rounding, scorer):
        """Refuse what the method cannot do, before any work."""
        if scorer is not None:
            raise ValueError(
                "one_stage decides on the bits itself: leave scores out (null "
                "in a YAML)"
            )
        if rounding == "calibrated":
            raise ValueError(ROUNDED)

    def first_plan(self, limits) -> int:
        """The bits that training begins with, the most of the candidates.

        Arguments
        ---------
        limits : dict
            Those of `allocate_bits`.
        """
        least = max(self.candidate_bits[0], limits.get("min_bits", 0))
        bits = limits.get("average_bits", least)
        if not least <= bits <= self.candidate_bits[-1]:
            raise ValueError(
                f"{bits} bits on average cannot be reached with {least} to "
                f"{self.candidate_bits[-1]}, the candidates of one_stage"
            )
        return self.candidate_bits[-1]

    def after_step(self, brain):
        """After a step of the optimizer, see `end_step`."""
        self.end_step()

    def before_valid(self):
        """Before validation, see `require_decision`."""
        if self.shrinks and 0 < self.step < self.interval:
            logger.info(
                f"An epoch has {self.step} steps: bits are decided on after "
                f"each {self.step}, not {self.interval}"
            )
            self.interval = self.step
            self._decide()
            self.gradients.restart()
            if self.settled:
                self.gradients.close()
        self.require_decision()

    def watch(self, model, limits, store=None):
        """Watch a model from now on.

        Arguments
        ---------
        model : torch.nn.Module
            Quantized to the most of the candidate bits.
        limits : dict
            Of every decision, those of `allocate_bits`.
        store : PlanStore or None
            Where to leave the scores of the last decision.
        """
        self.gradients = SquaredGradients(model)
        self.limits = limits
        self.store = store

    @property
    def settled(self):
        """Whether the last decision has been made."""
        return self.step >= self.interval * self.decisions

    def end_step(self):
        """To be called after every step of the optimizer."""
        self.step += 1
        if self.step > self.interval * self.decisions:
            return
        self.gradients.end_step()
        if self.step % self.interval == 0:
            self._decide()
            self.gradients.restart()
        if self.settled:
            self.gradients.close()

    def _decide(self):
        """Give the model the best plan for the gradients seen so far."""
        table = self.gradients.table(self.candidate_bits)
        table.method = "one_stage"
        plan = allocate_within(table, self.limits, self._packed_bytes)
        changed = change_bits_(self.gradients.model, plan)
        logger.info(
            f"Decision {self.step // self.interval} of {self.decisions}: other "
            f"bits for {changed} of {len(plan.clusters)} clusters, "
            f"{plan.average_bits:.3f} on average, {plan.bytes} bytes"
        )
        if self.store and if_main_process():
            self.store.save_table(table)
            if self.store.settings is not None:  # nobody else keeps the plan
                self.store.save_plan(plan)

    def _packed_bytes(self, plan):
        """Bytes of the file that the model makes with other bits."""
        model = self.gradients.model
        tensors = named_tensors(model)
        before = {
            name: copy.deepcopy(tensor.fake_quantize.state_dict())
            for name, tensor in tensors.items()
            if tensor.fake_quantize
        }
        change_bits_(model, plan)
        try:
            with scratch_folder() as folder:
                return save_packed(model, folder).stat().st_size
        finally:
            for name, state in before.items():
                tensors[name].fake_quantize.load_state_dict(state)

    def require_decision(self):
        """Raise ValueError while the model is not within its budget.

        To be called before a model is validated: one at the most bits would
        pass for the best.
        """
        if self.step < self.interval:
            raise ValueError(
                f"validation after {self.step} steps comes before the first "
                f"decision on bits: lower interval, which is {self.interval}"
            )

    @mark_as_saver
    def _save(self, path):
        """For SpeechBrain's checkpoints."""
        state = {
            "step": self.step,
            "steps": self.gradients.steps,
            "sums": self.gradients.sums,
            "interval": self.interval,
        }
        torch.save(state, path)

    @mark_as_loader
    def _load(self, path, end_of_epoch):
        """For SpeechBrain's checkpoints."""
        del end_of_epoch
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.interval = state.get("interval", self.interval)
        self.gradients.steps = state["steps"]
        self.gradients.sums = state["sums"]
        if self.settled:
            self.gradients.close()


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
        scheme = self.scheme
        tensors = split_groups(
            named_tensors(self.model), scheme.rows, scheme.gates
        )
        for tensor in select(tensors, **self.selection.patterns):
            if not tensor.parameter.requires_grad:
                raise ValueError(
                    f"{tensor.name} is frozen, and without gradients there is "
                    "nothing to learn bits from: exclude it, or name a "
                    "Quantizer and let choose_bits choose"
                )
        super().quantize(plan_or_bits)
        limits = {**self.limit, "equal_bits": self.equal_bits}
        self.one_stage.watch(self.model, limits)
        tensors = named_tensors(self.model).values()
        first = next(t.fake_quantize for t in tensors if t.fake_quantize)
        self._unfollowed = listen_to_steps(
            self, partial(_check_followed, weakref.ref(self))
        )
        self._handles += [
            first.register_forward_pre_hook(self._check_validation),
            self._unfollowed,
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
        self._unfollowed.remove()

    def _end_step(self, *_):
        """After a step of the optimizer."""
        if not self.one_stage.settled:
            self.one_stage.gradients.forget_overflow()
        self.one_stage.end_step()

    def _check_validation(self, module, inputs):
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
        content = state.pop(STATE)
        weights = named_tensors(self.model)
        gradients = self.one_stage.gradients
        self.one_stage.step, gradients.steps = content["step"], content["steps"]
        gradients.sums = {
            name: total.to(weights[name].parameter.device)
            for name, total in content["sums"].items()
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
