"""Gradient descent on the architecture weights of a super-network (Eq. 11)."""

import torch
from speechbrain.utils.logger import get_logger
from torch.nn.utils import parametrize
from tqdm import tqdm

from .chain import evaluating
from .super_network import annealed, entropy, size_penalty

logger = get_logger(__name__)

LEAST_WEIGHT = 1e-300  # so that no score is infinite


class ArchitectureSearch:
    """Trains the choices of a super-network, all else being frozen.

    Arguments
    ---------
    network : torch.nn.Module
        Super-network, from `super_network_`.
    choices : list
        Its choices, one a cluster.
    candidate_bits : sequence of int
        Bits of what there is to choose from.
    shares : torch.Tensor
        [clusters], what each counts in the penalty.
    beta : float
        Weight of the penalty against the loss.
    lr : float
        Step of the logits per unit of the loss, at temperature 1.
    gumbel : bool
        Draw Gumbel-softmax samples instead of mixing by the softmax.
    """

    def __init__(
        self, network, choices, candidate_bits, shares, beta, lr, gumbel
    ):
        self.network = network
        self.choices = choices
        self.candidate_bits = candidate_bits
        self.shares = shares
        self.beta = beta
        self.lr = lr
        self.gumbel = gumbel

    def run(
        self, inputs, loss, epochs, batch, temperature, seed=0, progress=True
    ):
        """Search.

        Arguments
        ---------
        inputs : torch.Tensor
            [items, ...]
        loss : callable
            `loss(output, items)`: the summed loss of an output, `items` being
            the slice of the inputs that it belongs to.
        epochs : int
            Passes over the data.
        batch : int
            Items of one step.
        temperature : (float, float)
            At the beginning and at the end, geometric in between.
        seed : int
            Of the order of the batches and of the Gumbel noise.
        progress : bool
            Shows a progress bar.

        Returns
        -------
        history : list of dict
            Mean loss, penalty and entropy in bits of every epoch.
        """
        generator = torch.Generator().manual_seed(seed)
        starts = torch.arange(0, len(inputs), batch)
        steps = epochs * len(starts)
        temperatures = iter(annealed(*temperature, steps))
        history = []
        with (
            evaluating(self.network),
            tqdm(total=steps, desc="searching", disable=not progress) as bar,
        ):
            for _ in range(epochs):
                total = 0.0
                order = torch.randperm(len(starts), generator=generator)
                for start in starts[order].tolist():
                    items = slice(start, start + batch)
                    self._set_up(next(temperatures), generator)
                    total += self._step(inputs[items], loss, items)
                    bar.update()
                history.append(self._summary(total / len(inputs)))
        return history

    def weights(self):
        """Architecture weights without noise at temperature 1.

        Returns
        -------
        weights : torch.Tensor
            [clusters, candidates], float64, on the CPU.
        """
        logits = torch.stack([c.logits.detach() for c in self.choices])
        return logits.double().softmax(1).clamp_min(LEAST_WEIGHT).cpu()

    def _set_up(self, temperature, generator):
        """Temperature and, with Gumbel samples, the noise of the next step."""
        for choice in self.choices:
            choice.temperature.fill_(temperature)
            if self.gumbel:
                choice.draw(generator)

    def _step(self, inputs, loss, items):
        """One step of gradient descent; the summed loss before it."""
        inputs = inputs.to(self.choices[0].logits.device)
        with parametrize.cached():
            output = self.network(inputs)
        summed = loss(output, items)
        logits = [choice.logits for choice in self.choices]
        weights = torch.stack([choice.weights() for choice in self.choices])
        penalty = size_penalty(weights, self.candidate_bits, self.shares)
        objective = summed / len(inputs) + self.beta * penalty
        slopes = torch.autograd.grad(objective, logits)
        with torch.no_grad():
            for choice, slope in zip(self.choices, slopes):
                # The slope grows with 1 / temperature; the step does not.
                choice.logits -= self.lr * choice.temperature * slope
        return summed.item()

    def _summary(self, loss):
        """What an epoch has come to; also logged."""
        weights = self.weights()
        penalty = size_penalty(weights, self.candidate_bits, self.shares)
        summary = {
            "loss": loss,
            "penalty": self.beta * penalty.item(),
            "entropy": entropy(weights),
        }
        logger.info(
            "Search: loss {loss:.3f}, penalty {penalty:.3f}, entropy "
            "{entropy:.3f} bits".format(**summary)
        )
        return summary
