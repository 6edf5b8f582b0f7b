"""A Brain as a network that scores can look at.

Scores take a network, inputs and a loss. Here an input is the number of a
batch, and the network runs the Brain's own `compute_forward` on that batch,
and for a loss its own `compute_objectives`. Batches keep their own shapes.
"""

from contextlib import contextmanager

import speechbrain as sb
import torch
from speechbrain.dataio.dataloader import LoopedLoader
from torch.utils.data import DataLoader

from ..allocation.sweep import evaluating
from .distributions import find_distribution, tensors_in, to_log_probs

SEED = 0  # of whatever is random in a forward pass, the same for all passes


class BrainNetwork(torch.nn.Module):
    """A model whose forward is the Brain's pass over one of its batches.

    Arguments
    ---------
    model : torch.nn.Module
        What is scored; parameters keep the names that they have in it.
    brain : speechbrain.Brain
        Runs the passes.
    batches : list
        Batches of calibration data.
    stage : speechbrain.Stage
        That the Brain is told.
    """

    def __init__(self, model, brain, batches, stage):
        super().__init__()
        self._modules, self._parameters = model._modules, model._parameters
        # Past Module's own setter: a child may have any of these names.
        self.__dict__.update(
            run=lambda index: _pass(brain, batches[index], stage),
            batch_indices=torch.arange(len(batches)),  # the inputs of scores
        )


class Distribution(BrainNetwork):
    """Puts out the distribution of a batch, [1, ...], and notes its form.

    Arguments
    ---------
    output : callable or None
        Predictions -> distribution; None looks for it.
    *arguments : object
        Those of `BrainNetwork`.
    """

    def __init__(self, output, *arguments):
        super().__init__(*arguments)
        self.__dict__.update(find=output or find_distribution, form=None)

    def forward(self, batch_indices):
        """Logs of the distribution of one batch."""
        predictions, _ = self.run(int(batch_indices))
        logs, form = to_log_probs(self.find(predictions))
        if form != (self.form or form):
            raise ValueError(
                f"the output of batch {int(batch_indices)} looks {form}, "
                f"that of the batches before {self.form}: name it with output="
            )
        self.__dict__["form"] = form
        return logs[None]


class Objective(BrainNetwork):
    """Puts out the Brain's own loss of a batch, [1]."""

    def forward(self, batch_indices):
        """The loss of one batch."""
        _, objective = self.run(int(batch_indices))
        loss = objective()
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            return loss.reshape(1)
        sizes = [tuple(tensor.shape) for tensor in tensors_in(loss)]
        raise ValueError(
            "compute_objectives must return one tensor of one value to score "
            f"by the loss, not {type(loss).__name__} with tensors of {sizes}"
        )


def sum_of_losses(output, items):
    """The loss that scores ask for: the network has computed it.

    Example
    -------
    >>> sum_of_losses(torch.tensor([2.0]), slice(0, 1))
    tensor(2.)
    """
    del items
    return output.sum()


def calibration_batches(brain, dataset, count, loader_kwargs=None):
    """The first batches of some data, as the Brain would see them."""
    if count < 1:
        raise ValueError(f"calibration takes at least 1 batch, not {count}")
    if not isinstance(dataset, DataLoader | LoopedLoader):
        if hasattr(dataset, "__len__") and not len(dataset):
            raise ValueError(_EMPTY)
        dataset = brain.make_dataloader(
            dataset, sb.Stage.VALID, ckpt_prefix=None, **(loader_kwargs or {})
        )
    batches = [batch for _, batch in zip(range(count), dataset)]
    if not batches:
        raise ValueError(_EMPTY)
    return batches


_EMPTY = (
    "the calibration set is empty: give choose_bits data that the Brain can "
    "run on, such as the validation set. Scores that look at weights only "
    'need none with rounding="nearest"'
)


@contextmanager
def ready_to_score(brain, stage):
    """Eval mode and autocast as in a stage that the Brain has started."""
    with evaluating(brain.modules):
        brain.on_stage_start(stage, 1)
        with brain.evaluation_ctx:
            yield


def _pass(brain, batch, stage):
    """Predictions of a batch, and what computes their loss."""
    torch.manual_seed(SEED)
    predictions = brain.compute_forward(batch, stage)
    return predictions, lambda: brain.compute_objectives(
        predictions, batch, stage
    )
