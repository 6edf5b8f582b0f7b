"""The super-network of architecture search, and the terms of its objective.

It connects the candidates of every cluster by weights a that sum to one
(Eq. 11). It mixes weights, not outputs, which is the same thing and one pass
instead of one for each candidate: a convolution, a norm in eval mode or a
PReLU is affine in its own parameters, so that sum a_n f(x; W_n) equals
f(x; sum a_n W_n). All tensors of a cluster share the same a.

Equation numbers are those of "Mixed precision DNN quantization for overlapped
speech separation and recognition" (ICASSP 2022).
"""

import math
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch

from ..quantization.codebook import dequantize
from ..quantization.groups import first_row, split_name
from ..quantization.packing import MODEL_FILE, read_packed
from ..quantization.tensors import named_tensors
from .sweep import parametrized, replaced


class BitChoice(torch.nn.Module):
    """The architecture weights a of one cluster, as a softmax.

    Arguments
    ---------
    candidates : int
        Number of candidates.

    Example
    -------
    >>> choice = BitChoice(3)
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
        """a = softmax((logits + noise) / temperature), [candidates].

        With noise this is one draw of the Gumbel-softmax.
        """
        return torch.softmax((self.logits + self.noise) / self.temperature, 0)

    def draw(self, generator):
        """Draws new noise, which stays until the next draw.

        So that all tensors of the cluster, and modules that read a weight
        several times in one pass, see the same choice.
        """
        uniform = torch.rand(len(self.noise), generator=generator)
        tiny = torch.finfo(uniform.dtype).tiny
        gumbel = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
        self.noise.copy_(gumbel)


class WeightedCandidates(torch.nn.Module):
    """A parameter as the weighted sum of frozen candidates (Eq. 11).

    Only the choice is trained; what the parameter held before is not used.

    Arguments
    ---------
    values : sequence of torch.Tensor
        One tensor for each candidate, all of the parameter's shape.
    choice : BitChoice
        Shared by the tensors of a cluster.

    Example
    -------
    >>> from torch.nn.utils.parametrize import register_parametrization
    >>> layer, choice = torch.nn.PReLU(), BitChoice(2)
    >>> values = [torch.tensor([0.5]), torch.tensor([0.2])]
    >>> mixture = WeightedCandidates(values, choice)
    >>> _ = register_parametrization(layer, "weight", mixture)
    >>> layer(torch.tensor([-1.0, 2.0])).detach()
    tensor([-0.3500,  2.0000])
    """

    def __init__(self, values, choice):
        super().__init__()
        self.choice = choice
        self.register_buffer("values", torch.stack(list(values)).detach())

    def forward(self, weight):
        """The mixture, in the shape and type of the weight."""
        mixture = torch.tensordot(self.choice.weights(), self.values, 1)
        return mixture.to(weight.dtype)


def size_penalty(weights, candidate_bits, shares=None):
    """Sum over clusters and candidates of a sqrt(n), from Eq. 11.

    Arguments
    ---------
    weights : torch.Tensor
        Architecture weights a, [clusters, candidates].
    shares : torch.Tensor or None
        How much each cluster counts, [clusters]; 1 each if not given, as in
        the equation.
    """
    roots = torch.tensor([float(b) for b in candidate_bits]).sqrt()
    per_cluster = weights @ roots.to(weights)
    if shares is None:
        return per_cluster.sum()
    return per_cluster @ shares.to(weights)


def entropy(weights):
    """Mean entropy of the clusters' architecture weights, in bits.

    Arguments
    ---------
    weights : torch.Tensor
        [clusters, candidates].
    """
    nats = torch.special.entr(weights.double()).sum(1)
    return (nats / math.log(2)).mean().item()


def annealed(first, last, steps):
    """Temperatures of all steps, falling geometrically.

    Example
    -------
    >>> annealed(1.0, 0.25, 3)
    [1.0, 0.5, 0.25]
    """
    ratio = last / first
    return [first * ratio ** (i / max(steps - 1, 1)) for i in range(steps)]


def read_prototype(folder, bits, model):
    """The values of a uniform prototype for a model, by parameter name."""
    remedy = (
        f"make it with `python train.py hparams/uniform_4bit.yaml --bits {bits}"
        "` from the same separator_file"
    )
    if not Path(folder, MODEL_FILE).exists():
        raise FileNotFoundError(
            f"the super-network lacks its {bits}-bit prototype, there is no "
            f"{Path(folder, MODEL_FILE)}: {remedy}"
        )
    quantized, values = read_packed(folder)
    found = sorted({tensor.bits for tensor in quantized.values()})
    if found != [bits]:
        raise ValueError(
            f"{folder} is no uniform prototype of {bits} bits, it has {found}: "
            f"{remedy}"
        )
    groups = defaultdict(dict)
    for name, tensor in quantized.items():
        whole, rows = split_name(name)
        groups[whole][first_row(rows)] = dequantize(
            tensor.integers, tensor.alpha
        )
    for name, parts in groups.items():
        ordered = [parts[start] for start in sorted(parts)]
        values[name] = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
    wanted = {n: t.shape for n, t in named_tensors(model).items()}
    for name, shape in wanted.items():
        if name not in values or values[name].shape != shape:
            has = tuple(values[name].shape) if name in values else "missing"
            raise ValueError(
                f"{folder} is a prototype of another architecture, its {name} "
                f"is {has}, the model's {tuple(shape)}: {remedy}"
            )
    return {name: values[name] for name in wanted}


class _Groups(torch.nn.Module):
    """Mixtures of groups of output channels, side by side."""

    def __init__(self, mixtures):
        super().__init__()
        self.mixtures = torch.nn.ModuleList(mixtures)

    def forward(self, weight):
        """The mixture of the whole parameter."""
        return torch.cat([mixture(weight) for mixture in self.mixtures])


@contextmanager
def super_network(model, members, prototypes):
    """Every cluster of a model as a mixture of its prototypes, inside.

    A parameter that is in no cluster goes with the cluster of its module,
    such as the bias of a quantized convolution, as outputs are mixed; where
    there is none it becomes the mean of the prototypes. All comes back at the
    end.

    Yields
    ------
    choices : list of BitChoice
        One for each cluster.
    """
    choices = {name: BitChoice(len(prototypes)) for name in members}
    chosen = defaultdict(list)  # parameter -> its groups and their choices
    for cluster, names in members.items():
        for name in names:
            parameter, rows = split_name(name)
            chosen[parameter].append((rows, choices[cluster]))
    places, means = [], {}
    for name, tensor in named_tensors(model).items():
        weight = tensor.whole
        values = torch.stack([p[name].to(weight) for p in prototypes])
        if name not in chosen and tensor.cluster not in choices:
            means[name] = values.mean(0)
            continue
        groups = chosen.get(name) or [(..., choices[tensor.cluster])]
        groups = sorted(groups, key=lambda group: first_row(group[0]))
        mixtures = [
            WeightedCandidates([value[rows] for value in values], choice)
            for rows, choice in groups
        ]
        mixture = mixtures[0] if len(mixtures) == 1 else _Groups(mixtures)
        mixture = mixture.to(weight.device)
        places += [(*owner, mixture) for owner in tensor.owners]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        with replaced(model, means), parametrized(places), torch.enable_grad():
            yield list(choices.values())
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
