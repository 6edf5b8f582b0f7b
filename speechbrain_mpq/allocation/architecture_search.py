"""Architecture search by gradient descent on the weights of candidates.

A super-network connects the candidates of each of its choices (the bits of a
cluster, the size of a bottleneck) by weights that sum to one. Its own weights
being frozen, the logits of these follow the gradient of

    loss + penalty

on held-out data: a softmax of the logits, or samples of the Gumbel-softmax
whose temperature falls until they are one-hot. "Towards green automatic speech
recognition" (Interspeech 2022) calls that pipelined, as the super-network is
trained before; "Neural architecture search for LF-MMI trained time delay
neural networks" (ICASSP 2021) has the formulas.
"""

import math

import torch
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)
LEAST_WEIGHT = 1e-300  # so that no score is infinite
DRAWS = 200_000  # architectures that random ones are picked from


class ArchitectureWeights(torch.nn.Module):
    """The weights lambda of one choice, as a softmax of logits.

    Arguments
    ---------
    candidates : int
        Number of candidates.

    Example
    -------
    >>> choice = ArchitectureWeights(3)
    >>> _ = choice.logits.data.copy_(torch.tensor([0.0, 1.0, 0.0]))
    >>> choice.weights().detach()
    tensor([0.2119, 0.5761, 0.2119])
    >>> _ = choice.temperature.fill_(0.01)
    >>> choice.noise[0] = 1.1  # one draw
    >>> choice.weights().detach().round(decimals=2)
    tensor([1., 0., 0.])
    """

    def __init__(self, candidates):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(candidates))
        self.register_buffer("noise", torch.zeros(candidates))
        self.register_buffer("temperature", torch.ones(()))

    def weights(self):
        """softmax((logits + noise) / temperature), [candidates].

        With noise this is one draw of the Gumbel-softmax.
        """
        return torch.softmax((self.logits + self.noise) / self.temperature, 0)

    def draw(self, generator):
        """Draws new noise, which stays until the next draw.

        So that all that hangs on the choice, and modules that read a weight
        several times in one pass, see the same one.
        """
        uniform = torch.rand(len(self.noise), generator=generator)
        tiny = torch.finfo(uniform.dtype).tiny
        gumbel = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
        self.noise.copy_(gumbel)


def expected_cost(weights, costs):
    """What an architecture costs on average: sum_l sum_i lambda_li C_li.

    Arguments
    ---------
    weights : torch.Tensor
        lambda, [choices, candidates].
    costs : torch.Tensor
        C, such as parameters, [choices, candidates].
    """
    return (weights * costs.to(weights)).sum()


def entropy(weights):
    """Mean entropy of the architecture weights, in bits.

    Arguments
    ---------
    weights : torch.Tensor
        [choices, candidates].
    """
    nats = torch.special.entr(weights.double()).sum(1)
    return (nats / math.log(2)).mean().item()


def annealed(first, last, steps):
    """Temperatures of all steps, falling geometrically.

    Example
    -------
    >>> annealed(1, 0.01, 3)
    [1.0, 0.1, 0.01]
    """
    if min(first, last) <= 0:
        raise ValueError(
            f"temperature must be positive, not {first} to {last}: 1 to 0.03 "
            "are usual"
        )
    ratio = last / first
    return [first * ratio ** (i / max(steps - 1, 1)) for i in range(steps)]


class ArchitectureSearch:
    """Trains the choices of a super-network, all else being frozen.

    The steps are those of plain gradient descent. The slope grows with one
    over the temperature; the step does not.

    Arguments
    ---------
    choices : list of ArchitectureWeights
        Which the super-network mixes its candidates by; all of as many.
    penalty : callable
        From weights [choices, candidates] to what is added to the loss.
    lr : float
        Step of the logits per unit of the loss, at temperature 1.
    temperatures : list of float
        Of all steps, see annealed.
    gumbel : bool
        Whether to draw Gumbel-softmax samples, one for each step, or to mix by
        the softmax.
    seed : int
        Of the samples.

    Example
    -------
    >>> choice, costs = ArchitectureWeights(2), torch.tensor([[1.0, 3.0]])
    >>> search = ArchitectureSearch(
    ...     [choice], lambda w: 0.5 * expected_cost(w, costs), 1.0, [1.0]
    ... )
    >>> # d/dlogit of w1 w2 = 1/4 times the difference of the costs, 1
    >>> summary = search.epoch([None], lambda batch: (torch.zeros(()), 1))
    >>> choice.logits.detach()
    tensor([ 0.2500, -0.2500])
    >>> summary
    {'loss': 0.0, 'penalty': 0.8775..., 'entropy': 0.9562...}
    """

    def __init__(
        self, choices, penalty, lr, temperatures, gumbel=False, seed=0
    ):
        self.choices = choices
        self.penalty = penalty
        self.lr = lr
        self.temperatures = temperatures
        self.gumbel = gumbel
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        self.history = []

    def epoch(self, batches, loss):
        """One step for each batch.

        Arguments
        ---------
        batches : iterable
        loss : callable
            From a batch to the sum of its losses, by the choices' present
            weights, and their number.

        Returns
        -------
        summary : dict
            Mean loss, penalty and entropy in bits; also logged and kept in the
            history.
        """
        total = count = 0
        for batch in batches:
            self._set_up()
            summed, items = loss(batch)
            self._step(summed / items)
            total, count = total + summed.item(), count + items
        weights = self.weights()
        summary = {
            "loss": total / count,
            "penalty": float(self.penalty(weights)),
            "entropy": entropy(weights),
        }
        logger.info(
            "Search: loss {loss:.3f}, penalty {penalty:.3f}, entropy "
            "{entropy:.3f} bits".format(**summary)
        )
        self.history.append(summary)
        return summary

    def weights(self):
        """Architecture weights [choices, candidates] without any noise."""
        logits = torch.stack([c.logits.detach() for c in self.choices])
        return logits.double().softmax(1).clamp_min(LEAST_WEIGHT).cpu()

    def state_dict(self):
        """All that a search needs to go on as if it had not stopped."""
        return {
            "logits": [choice.logits.detach() for choice in self.choices],
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "history": list(self.history),
        }

    def load_state_dict(self, state):
        """Go on from there.

        Arguments
        ---------
        state : dict
            Of state_dict, by a search of the same arguments.
        """
        with torch.no_grad():
            for choice, logits in zip(
                self.choices, state["logits"], strict=True
            ):
                choice.logits.copy_(logits)
        self.generator.set_state(state["generator"])
        self.steps = state["steps"]
        self.history = list(state["history"])

    def _set_up(self):
        """Temperature and, with Gumbel samples, the noise of the next step."""
        for choice in self.choices:
            choice.temperature.fill_(self.temperatures[self.steps])
            if self.gumbel:
                choice.draw(self.generator)
        self.steps += 1

    def _step(self, loss):
        """One step of gradient descent."""
        logits = [choice.logits for choice in self.choices]
        weights = torch.stack([choice.weights() for choice in self.choices])
        slopes = torch.autograd.grad(loss + self.penalty(weights), logits)
        with torch.no_grad():
            for choice, slope in zip(self.choices, slopes):
                choice.logits -= self.lr * choice.temperature * slope


def random_architectures(costs, target, count, seed=0, tolerance=0.01):
    """Architectures of about the same cost that know nothing.

    Drawn evenly from those whose cost is within the tolerance.

    Arguments
    ---------
    costs : torch.Tensor
        Of each candidate of each choice, [choices, candidates].
    target : float
        Cost of an architecture.
    count : int
        How many, all different.
    tolerance : float
        Relative to the target.

    Returns
    -------
    list of list of int
        For each architecture, the candidate of each choice.

    Example
    -------
    >>> costs = torch.tensor([[1.0, 2.0, 3.0]] * 2)
    >>> sorted(random_architectures(costs, target=4, count=3))
    [[0, 2], [1, 1], [2, 0]]
    """
    generator = torch.Generator().manual_seed(seed)
    choices, candidates = costs.shape
    drawn = torch.randint(candidates, (DRAWS, choices), generator=generator)
    cost = costs.double().gather(1, drawn.T).sum(0)
    near = drawn[(cost - target).abs() <= tolerance * target]
    architectures = list(dict.fromkeys(map(tuple, near.tolist())))[:count]
    if len(architectures) < count:
        raise ValueError(
            f"{len(architectures)} of {DRAWS} random architectures cost "
            f"{target:g} "
            f"within {tolerance:.1%}, {count} wanted: widen the tolerance"
        )
    return [list(choice) for choice in architectures]
