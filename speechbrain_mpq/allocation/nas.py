"""Bits by architecture search in a super-network of uniform prototypes.

The super-network connects the candidates of every cluster by weights a that
sum to one (Eq. 11); gradient descent on these finds them, all else being
frozen. It mixes weights, not outputs, which is the same thing and one pass
instead of one for each candidate: a convolution, a norm in eval mode or a
PReLU is affine in its own parameters, so that sum a_n f(x; W_n) equals
f(x; sum a_n W_n). All tensors of a cluster share the same a.

Equation numbers are those of "Mixed precision DNN quantization for overlapped
speech separation and recognition" (ICASSP 2022); Gumbel-softmax samples and
their temperatures are those of "Towards green automatic speech recognition"
(Interspeech 2022).
"""

import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from speechbrain.utils.logger import get_logger
from torch.nn.utils import parametrize
from tqdm import tqdm

from ..quantization.codebook import dequantize
from ..quantization.groups import first_row, split_name
from ..quantization.packing import MODEL_FILE, read_packed
from ..quantization.tensors import named_tensors
from .architecture_search import (
    ArchitectureSearch,
    ArchitectureWeights,
    annealed,
)
from .scores import Scorer, ScoreTable
from .sweep import (
    evaluating,
    parametrized,
    replaced,
    scored_clusters,
    table_sizes,
)

logger = get_logger(__name__)


class WeightedCandidates(torch.nn.Module):
    """A parameter as the weighted sum of frozen candidates (Eq. 11).

    Only the choice is trained; what the parameter held before is not used.

    Arguments
    ---------
    values : sequence of torch.Tensor
        One tensor for each candidate, all of the parameter's shape.
    choice : ArchitectureWeights
        Shared by the tensors of a cluster.

    Example
    -------
    >>> from torch.nn.utils.parametrize import register_parametrization
    >>> layer, choice = torch.nn.PReLU(), ArchitectureWeights(2)
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


def read_prototype(folder, bits, model):
    """The values of a uniform prototype for a model, by parameter name."""
    remedy = (
        f"make it with `python train.py hparams/uniform_4bit.yaml --bits {bits}"
        "` from the same model"
    )
    if not Path(folder, MODEL_FILE).exists():
        raise FileNotFoundError(
            f"the super-network lacks its {bits}-bit prototype, there is no "
            f"{Path(folder, MODEL_FILE)}: {remedy}"
        )
    quantized, values = read_packed(folder)
    widths = sorted({tensor.bits for tensor in quantized.values()})
    if widths != [bits]:
        raise ValueError(
            f"{folder} is no uniform prototype of {bits} bits, it has "
            f"{widths}: "
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
    expected = {n: t.shape for n, t in named_tensors(model).items()}
    for name, shape in expected.items():
        if name not in values or values[name].shape != shape:
            has = tuple(values[name].shape) if name in values else "missing"
            raise ValueError(
                f"{folder} is a prototype of another architecture, its {name} "
                f"is {has}, the model's {tuple(shape)}: {remedy}"
            )
    return {name: values[name] for name in expected}


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
    choices : list of ArchitectureWeights
        One for each cluster.
    """
    choices = {name: ArchitectureWeights(len(prototypes)) for name in members}
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


SHARES = {  # parameters of each cluster -> what each counts in the penalty
    "sum": torch.ones_like,
    "mean": lambda parameters: torch.ones_like(parameters) / len(parameters),
    "size": lambda parameters: parameters / parameters.sum(),
}


class NASScores(Scorer):
    """Scores candidates by their architecture weights (Eq. 11).

    Each cluster is a mixture of its versions in the uniform prototypes. The
    mixture's weights follow the gradient of

        loss + beta * sum a sqrt(n)

    on held-out data while all else is frozen; the score is -log a. So the
    plan of a budget is the most likely one among those that fit into it. In a
    cluster whose most likely candidate is a small one, more bits score worse;
    `allocate_bits` takes that for no gain, which spends what is to spare by
    size alone. A penalty that outweighs the loss makes all clusters so, and
    is warned of.

    The steps are those of plain gradient descent: whatever normalizes them,
    as Adam does, makes a harmless cluster as decided as a harmful one, and
    the solver compares clusters.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to choose from; there must be a prototype of each.
    beta : float
        Weight of the penalty against the loss.
    shares : str
        How much a cluster counts in the penalty: "sum", 1 as printed; "mean",
        1 / clusters; "size", its share of the parameters.
    gumbel : bool
        Draw Gumbel-softmax samples instead of mixing by the softmax.
    temperature : tuple of float or None
        At the beginning and at the end, geometric in between; (1, 0.03) with
        Gumbel samples and (1, 1) without if not given.
    epochs : int
        Passes over the data.
    batch : int
        Items of one step.
    lr : float
        Step of the logits per unit of the loss, at temperature 1.
    seed : int
        Of the order of the batches and of the Gumbel noise.
    **scheme : dict
        As for `Scorer`; that of the prototypes.

    Example
    -------
    >>> from pathlib import Path
    >>> from speechbrain_mpq import quantize_, save_packed
    >>> folder = Path(getfixture("tmpdir"))
    >>> for bits, value in {2: 0.5, 4: 1.0}.items():
    ...     prototype = torch.nn.Sequential(torch.nn.PReLU(init=value))
    ...     plan = quantize_(prototype, bits)
    ...     path = save_packed(prototype, folder / str(bits))
    >>> def loss(output, items):
    ...     return (output + 1).square().sum()
    >>> scores = NASScores((2, 4), beta=0, epochs=1, batch=4, lr=1.0)
    >>> table = scores(
    ...     torch.nn.Sequential(torch.nn.PReLU()),
    ...     torch.full((4, 1, 1), -1.0),
    ...     loss,
    ...     {2: folder / "2", 4: folder / "4"},
    ...     progress=False,
    ... )
    >>> # d/dlogit = a (dL/dW) (W - mean) = 1/2 x (-1/2) x (-+1/4)
    >>> {bits: round(x, 4) for bits, x in table.scores["0"].items()}
    {2: 0.7576, 4: 0.6326}
    """

    needs = ("inputs", "loss", "prototypes")
    additive = False  # likelihoods, not damages that add up
    shared = False  # each step of the search starts from the one before

    def __init__(
        self,
        candidate_bits=(2, 4, 8, 16),
        beta=0.5,
        shares="sum",
        gumbel=False,
        temperature=None,
        epochs=4,
        batch=8,
        lr=2.0,
        seed=0,
        **scheme,
    ):
        if shares not in SHARES:
            raise ValueError(
                f"shares must be one of {list(SHARES)}, not {shares!r}"
            )
        super().__init__(candidate_bits, **scheme)
        self.beta = beta
        self.share = SHARES[shares]
        self.gumbel = gumbel
        self.temperature = temperature or ((1, 0.03) if gumbel else (1, 1))
        if min(self.temperature) <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.epochs = epochs
        self.batch = batch
        self.lr = lr
        self.seed = seed
        self.method = "gumbel_nas" if gumbel else "nas"

    def one_by_one(self):
        """A copy whose steps are of single items."""
        scorer = super().one_by_one()
        scorer.batch = 1
        return scorer

    def score(self, network, values, selection, progress=True, folder=None):
        """Search in the super-network, see `Scorer.score`.

        The inputs are best held out from the training of the prototypes, a
        dict of bits -> packed folder of the uniform system of these bits. The
        table's details hold the learned weights of every cluster and, for
        each epoch, the mean loss, the penalty and the entropy in bits.
        """
        inputs, loss = values["inputs"], values["loss"]
        if not len(inputs):
            raise ValueError("a search needs at least one item of input")
        started = time.perf_counter()
        root, members = scored_clusters(network, selection, self.scheme)
        sizes = table_sizes(root, members, self.scheme)
        prototypes = self._read(values["prototypes"], root)
        with super_network(root, members, prototypes) as choices:
            search = self._search(choices, sizes["tensors"], len(inputs))
            with evaluating(network):
                self._run(search, network, inputs, loss, progress)
            weights = search.weights()
        self._warn_of_penalty(weights)
        return ScoreTable(
            scores={
                name: dict(zip(self.candidate_bits, row))
                for name, row in zip(members, weights.log().neg().tolist())
            },
            **sizes,
            method=self.method,
            details={
                "items": len(inputs),
                "seconds": round(time.perf_counter() - started, 2),
                "history": search.history,
                "weights": dict(zip(members, weights.tolist())),
            },
            codebook=self.scheme.codebook,
        )

    def _search(self, choices, tensors, items):
        """The search over the choices of a super-network."""
        parameters = [float(sum(row.values())) for row in tensors.values()]
        shares = self.share(torch.tensor(parameters))

        def penalty(weights):
            return self.beta * size_penalty(
                weights, self.candidate_bits, shares
            )

        steps = self.epochs * -(-items // self.batch)
        temperatures = annealed(*self.temperature, steps)
        return ArchitectureSearch(
            choices, penalty, self.lr, temperatures, self.gumbel, self.seed
        )

    def _run(self, search, network, inputs, loss, progress):
        """All epochs, with the inputs' batches in another order in each."""
        starts = torch.arange(0, len(inputs), self.batch)
        device = search.choices[0].logits.device

        def summed(start):
            items = slice(start, start + self.batch)
            batch = inputs[items].to(device)
            with parametrize.cached():
                output = network(batch)
            bar.update()
            return loss(output, items), len(batch)

        steps = self.epochs * len(starts)
        with tqdm(total=steps, desc="searching", disable=not progress) as bar:
            for _ in range(self.epochs):
                order = torch.randperm(len(starts), generator=search.generator)
                search.epoch(starts[order].tolist(), summed)

    def _read(self, prototypes, root):
        """Values of the candidates' prototypes."""
        missing = sorted(set(self.candidate_bits) - set(prototypes or {}))
        if missing:
            raise ValueError(
                f"the super-network lacks prototypes of {missing} bits: name "
                "the uniform systems' file with --prototypes "
                "hparams/uniform_4bit.yaml, or take these bits out of "
                "candidate_bits"
            )
        return [
            read_prototype(prototypes[bits], bits, root)
            for bits in self.candidate_bits
        ]

    def _warn_of_penalty(self, weights):
        """Say so where the data had no say."""
        least = (weights.argmax(1) == 0).double().mean().item()
        if least > 0.8:
            logger.warning(
                f"{100 * least:.0f} % of the clusters prefer the least bits: "
                "the penalty outweighs the loss and says nothing of them; "
                'lower beta, or share it with shares="mean" or "size"'
            )
