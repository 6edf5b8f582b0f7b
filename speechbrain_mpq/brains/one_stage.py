"""Bits and weights learned together, in one training run.

Training begins at the most bits, which harm nothing. After every few steps
the bits of all clusters are decided anew, within the budget, from the
gradients of the steps since and from the weights as they are by then; the
weights go on training at these bits. After the last decision only the weights
are trained. There are no prototypes, no scoring pass and no second training.
"""

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
from ..allocation.solver import allocate_bits
from ..quantization.model_plan import bit_plan
from ..quantization.tensors import named_tensors

logger = get_logger(__name__)


def change_bits_(model, plan):
    """Give a quantized model the bits of another plan; weights go on.

    Clusters that keep their bits keep their scales too, the others' are
    fitted to the weights as they are.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized model, changed in place.
    plan : BitPlan
        A plan of the same clusters.

    Returns
    -------
    changed : int
        Clusters whose bits are others now.

    Example
    -------
    >>> from speechbrain_mpq import quantize_
    >>> from speechbrain_mpq.quantization.plan import BitPlan
    >>> layer = torch.nn.PReLU()
    >>> before = quantize_(layer, 8)
    >>> change_bits_(layer, BitPlan.uniform(before.clusters, 4))
    1
    >>> bit_plan(layer).average_bits
    4.0
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
class OneStage:
    """Decides on bits while the weights train.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to choose from; training begins at the most.
    interval : int
        Steps between two decisions.
    decisions : int
        How many there are.

    Example
    -------
    >>> from speechbrain_mpq import quantize_
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    ... )
    >>> one_stage = OneStage((2, 4, 8), interval=1, decisions=1)
    >>> plan = quantize_(model, one_stage.candidate_bits[-1])
    >>> one_stage.start(model, average_bits=3)
    >>> x = torch.tensor([[1.0] + [0.0] * 7])  # the first layer needs little
    >>> model(100 * x).square().sum().backward()
    >>> one_stage.end_step()
    >>> bit_plan(model).average_bits, one_stage.settled
    (3.0, True)
    """

    def __init__(
        self, candidate_bits=(2, 3, 4, 6, 8, 16), interval=20, decisions=4
    ):
        self.candidate_bits = check_candidates(candidate_bits)
        if interval < 1 or decisions < 1:
            raise ValueError(
                "one-stage learning needs at least one decision after at "
                f"least one step, not {decisions} after {interval} each"
            )
        self.interval = interval
        self.decisions = decisions
        self.step = 0
        self.gradients = None

    def start(
        self,
        model,
        average_bits,
        min_bits=2,
        scores_file=None,
        equal_bits=(),
    ):
        """Watch a model from now on.

        Arguments
        ---------
        model : torch.nn.Module
            Quantized to the most of the candidate bits.
        average_bits : float
            Budget of every decision.
        min_bits : int
            Least bits of any cluster.
        scores_file : str or Path or None
            Where to leave the scores of the last decision.
        equal_bits : sequence of str
            Clusters that must share one bit width (see `equal_groups`).
        """
        self.gradients = SquaredGradients(model)
        self.budget = {
            "average_bits": average_bits,
            "min_bits": min_bits,
            "equal_bits": equal_bits,
        }
        self.scores_file = scores_file

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
        plan = allocate_bits(table, **self.budget)
        changed = change_bits_(self.gradients.model, plan)
        logger.info(
            f"Decision {self.step // self.interval} of {self.decisions}: other "
            f"bits for {changed} of {len(plan.clusters)} clusters, "
            f"{plan.average_bits:.3f} on average, {plan.bytes} bytes"
        )
        if self.scores_file and if_main_process():
            table.save(self.scores_file)

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
        }
        torch.save(state, path)

    @mark_as_loader
    def _load(self, path, end_of_epoch):
        """For SpeechBrain's checkpoints."""
        del end_of_epoch
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.gradients.steps = state["steps"]
        self.gradients.sums = state["sums"]
        if self.settled:
            self.gradients.close()
