"""Search for the bottlenecks of a TDNN-F: supernet, architecture, controls.

Pipelined, as in "Towards green ASR" (Interspeech 2022): first the supernet is
trained with one candidate for each layer, drawn evenly anew in every step;
then its weights stay as they are, and the architecture is learned on utterances
that were held out. What comes out are files of bottlenecks, which networks are
trained with from scratch: those found, and beside them uniform and random ones
of the same number of parameters.

A layer of the supernet has the two matrices of its largest candidate, and the
candidate of n dimensions uses the first n rows of the one and columns of the
other ("Neural architecture search for LF-MMI trained time delay neural
networks", ICASSP 2021). Rows of a semi-orthogonal matrix are semi-orthogonal:
keeping the large one so keeps all candidates so.
"""

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from speechbrain.utils.logger import get_logger
from torch.nn.functional import conv1d
from tqdm import tqdm

from ..allocation.architecture_search import (
    ArchitectureSearch,
    ArchitectureWeights,
    annealed,
    expected_cost,
    random_architectures,
)
from ..lobes.models.tdnnf import TDNNFLayer
from ..utils import atomic_write, write_json


def mixed_outputs(outputs, weights):
    """What a layer of all candidates puts out: sum_i lambda_i phi(W_i h).

    Arguments
    ---------
    outputs : iterable of torch.Tensor
        phi(W_i h) of each candidate.
    weights : torch.Tensor
        lambda, [candidates].

    Example
    -------
    >>> mixed_outputs([torch.ones(2), torch.zeros(2)], torch.tensor([0.3, 0.7]))
    tensor([0.3000, 0.3000])
    """
    return sum(weight * output for weight, output in zip(weights, outputs))


def layer_parameters(size, bottleneck, stride):
    """Parameters of a TDNNFLayer: two matrices and one bias.

    Example
    -------
    >>> layer_parameters(1536, 160, stride=3), layer_parameters(1536, 160, 0)
    (984576, 493056)
    """
    taps = 2 if stride else 1
    return 2 * taps * size * bottleneck + size


def check_candidates(candidates, size):
    """Bottlenecks that a layer can be searched for, as a tuple.

    Arguments
    ---------
    candidates : sequence of int
        At least two, each larger than the one before.
    size : int
        Dimensions of the layers.
    """
    candidates = tuple(candidates)
    rising = all(a < b for a, b in zip(candidates, candidates[1:]))
    whole = all(type(n) is int and n > 0 for n in candidates)
    if len(candidates) < 2 or not whole or not rising:
        raise ValueError(
            f"candidates {list(candidates)}: give two bottlenecks or more, as "
            "whole numbers that increase, such as [8, 16, 24]"
        )
    if candidates[-1] > size:
        raise ValueError(
            f"candidate {candidates[-1]} is more than the {size} dimensions of "
            "the layer: leave it out"
        )
    return candidates


class SupernetLayer(TDNNFLayer):
    """TDNN-F layer with one of several bottlenecks, or a mixture of all.

    Arguments
    ---------
    size : int
        Dimensions of input and output.
    candidates : sequence of int
        Bottlenecks, increasing.
    stride : int
        See TDNNFLayer.
    **options : dict
        As for TDNNFLayer.

    Example
    -------
    >>> layer = SupernetLayer(8, [2, 4], stride=1)
    >>> x = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0))
    >>> layer.chosen = 0  # the first candidate
    >>> small = layer(x)
    >>> layer.mixture = lambda: torch.tensor([1.0, 0.0])
    >>> torch.allclose(layer(x), small, atol=1e-6)
    True
    """

    def __init__(self, size, candidates, stride, **options):
        candidates = check_candidates(candidates, size)
        super().__init__(size, candidates[-1], stride, **options)
        self.candidates = candidates
        self.chosen = len(candidates) - 1
        self.mixture = None  # where it is set, a function: lambda

    def forward(self, x):
        """Features [B, size, T] to [B, size, T - 2 stride]."""
        if self.mixture is not None:
            outputs = map(self._activated, self._affine_outputs(x))
            y = mixed_outputs(outputs, self.mixture())
        else:
            n = self.candidates[self.chosen]
            y = self._conv(x, self.linear.weight[:n])
            weight = self.affine.weight[:, :n].contiguous()
            y = self._activated(self._conv(y, weight, self.affine.bias))
        return self._with_bypass(y, x)

    def _conv(self, x, weight, bias=None):
        """One of the two maps, by a part of its weight."""
        return conv1d(x, weight, bias, dilation=self.linear.dilation)

    def _affine_outputs(self, x):
        """W_i x + b of each candidate; each adds its columns to the last."""
        bottleneck = self._conv(x, self.linear.weight)
        starts = (0, *self.candidates)
        total, bias = 0, self.affine.bias
        for start, stop in zip(starts, self.candidates):
            columns = self.affine.weight[:, start:stop].contiguous()
            total = total + self._conv(bottleneck[:, start:stop], columns, bias)
            bias = None
            yield total


def supernet_(model, candidates):
    """Give all layers of a network all candidates, in place.

    The layers are new ones; what they had learned is lost.

    Arguments
    ---------
    model : TDNNF
    candidates : sequence of int
        Bottlenecks, increasing, of every layer.

    Returns
    -------
    TDNNF
        The model.

    Example
    -------
    >>> from speechbrain_mpq.lobes.models.tdnnf import TDNNF
    >>> model = TDNNF(5, 6, size=16, bottlenecks=[4] * 2, strides=[1, 3])
    >>> model = supernet_(model, [2, 4, 8])
    >>> choose(model, [0, 2])
    >>> model(torch.zeros(1, 9, 5)).shape
    torch.Size([1, 3, 6])
    >>> costs, others = parameter_costs(model)
    >>> costs
    tensor([[144, 272, 528],
            [144, 272, 528]])
    """
    size = model.settings["size"]
    layers = [
        SupernetLayer(
            size, candidates, old.stride, bypass=old.bypass, scale=old.scale
        )
        for old in model.layers
    ]
    model.layers = torch.nn.ModuleList(layers)
    model.settings["bottlenecks"] = [layers[0].candidates[-1]] * len(layers)
    return model


def choose(model, choice):
    """One candidate of each layer, the others being out of play.

    Arguments
    ---------
    model : TDNNF
        Of supernet_.
    choice : sequence of int
        Index of each layer's candidate.
    """
    for layer, index in zip(model.layers, choice, strict=True):
        layer.chosen, layer.mixture = index, None


def mix(model, weights):
    """All candidates of each layer, mixed by weights.

    Arguments
    ---------
    model : TDNNF
        Of supernet_.
    weights : sequence of callable
        For each layer, a function whose value is lambda, [candidates].
    """
    for layer, mixture in zip(model.layers, weights, strict=True):
        layer.mixture = mixture


def parameter_costs(model):
    """Parameters of each candidate, and those of all that is not searched.

    Arguments
    ---------
    model : TDNNF
        Of supernet_.

    Returns
    -------
    costs : torch.Tensor
        [layers, candidates].
    others : int
        Of the rest, without the head that only training needs.
    """
    size = model.settings["size"]
    costs = torch.tensor(
        [
            [layer_parameters(size, n, layer.stride) for n in layer.candidates]
            for layer in model.layers
        ]
    )
    parts = [m for name, m in model.named_children() if name != "xent"]
    counted = sum(p.numel() for m in parts for p in m.parameters())
    return costs, counted - int(costs[:, -1].sum())


def uniform_bottleneck(model, parameters):
    """The one bottleneck of all layers whose network is next in size.

    Arguments
    ---------
    model : TDNNF
        Of supernet_.
    parameters : int
        Of all searched layers together.
    """
    size = model.settings["size"]

    def distance(n):
        count = partial(layer_parameters, size, n)
        return abs(sum(count(la.stride) for la in model.layers) - parameters)

    return min(range(1, size + 1), key=distance)


logger = get_logger(__name__)


def use_batch_statistics(model, only=True):
    """Whether norms have the statistics of the batch only.

    The running ones of a supernet are of the mean of all architectures, which
    is none of them.

    Arguments
    ---------
    model : TDNNF
    only : bool
        Whether running statistics are neither used nor changed; train() and
        eval() come before.
    """
    for module in model.modules():
        if hasattr(module, "track_running_stats"):
            module.track_running_stats = not only
            module.train(only or model.training)


@contextmanager
def frozen(model):
    """Weights and running statistics that stay, and no dropout, inside."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    model.requires_grad_(False).eval()
    use_batch_statistics(model)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(training)
        use_batch_statistics(model, False)


class BottleneckSearch:
    """Search for one bottleneck of each layer of a TDNN-F.

    Arguments
    ---------
    candidates : sequence of int
        Bottlenecks to choose from, increasing.
    penalties : sequence of float
        eta: what the loss (LF-MMI, per frame) has added for a network with
        all of the largest candidates; others count by the parameters of their
        layers. There is one search for each.
    held_out : float
        Share of the training utterances that the architecture is learned on.
    epochs : int
        Passes over these.
    lr : float
        See ArchitectureSearch.
    temperature : tuple of float
        At the beginning and at the end.
    gumbel : bool
        Whether to sample; else candidates are mixed by the softmax.
    controls : int
        Random architectures of the same size to write beside each.
    tolerance : float
        Of their sizes, relative.
    seed : int
        Of the held-out utterances and of all that is drawn.

    Example
    -------
    >>> search = BottleneckSearch([2, 4], held_out=0.25)
    >>> trained, held_out = search.split(["a", "b", "c", "d"])
    >>> len(trained), len(held_out)
    (3, 1)
    """

    def __init__(
        self,
        candidates,
        penalties=(0.03,),
        held_out=0.05,
        epochs=12,
        lr=500.0,
        temperature=(1, 0.03),
        gumbel=True,
        controls=3,
        tolerance=0.01,
        seed=0,
    ):
        self.candidates = check_candidates(candidates, float("inf"))
        penalties = list(penalties)
        if not penalties or min(penalties) < 0:
            raise ValueError(
                f"penalties {penalties}: give one or more, none below 0"
            )
        if not 0 < held_out < 1:
            raise ValueError(f"held_out {held_out}: give a share, such as 0.05")
        if epochs < 1:
            raise ValueError(f"{epochs} epochs of search: give 1 or more")
        annealed(*temperature, 1)  # an error before all work
        self.penalties = penalties
        self.held_out = held_out
        self.epochs = epochs
        self.lr = lr
        self.temperature = tuple(temperature)
        self.gumbel = gumbel
        self.controls = controls
        self.tolerance = tolerance
        self.seed = seed

    def split(self, keys):
        """Utterances for the weights, and those for the architecture.

        Arguments
        ---------
        keys : iterable of str

        Returns
        -------
        trained, held_out : list of str
        """
        keys = sorted(keys)
        count = round(self.held_out * len(keys))
        if not 0 < count < len(keys):
            raise ValueError(
                f"held_out {self.held_out} of {len(keys)} utterances leaves "
                "none for the architecture or for the weights"
            )
        order = np.random.default_rng(self.seed).permutation(len(keys))
        held = set(order[:count].tolist())
        return (
            [key for i, key in enumerate(keys) if i not in held],
            [key for i, key in enumerate(keys) if i in held],
        )

    def prepare(self, model):
        """Make a network the supernet, in place.

        Arguments
        ---------
        model : TDNNF
        """
        supernet_(model, self.candidates)

    def draw(self, model, step):
        """The candidates of one training step, the same ones in every run.

        Arguments
        ---------
        model : TDNNF
            After prepare.
        step : int
        """
        rng = np.random.default_rng((self.seed, step))
        drawn = rng.integers(len(self.candidates), size=len(model.layers))
        choose(model, drawn.tolist())

    def widest(self, model):
        """Choose the largest candidates.

        Arguments
        ---------
        model : TDNNF
            After prepare.
        """
        choose(model, [len(self.candidates) - 1] * len(model.layers))

    def run(self, model, batches, loss, folder, progress=True):
        """Learn an architecture for each penalty, and write the files.

        A search that was interrupted goes on behind its last epoch, to the
        same result.

        Arguments
        ---------
        model : TDNNF
            A trained supernet.
        batches : callable
            From an epoch, counted from 0, to its batches, as many in each.
        loss : callable
            From a batch to its mean loss.
        folder : str or Path
            For searched_<penalty>.json, uniform_<penalty>.json and
            random_<penalty>_<number>.json.

        Returns
        -------
        list of list of int
            Bottlenecks for each penalty.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        networks = []
        for penalty in self.penalties:
            state = folder / f"search_{penalty}.ckpt"
            with frozen(model):
                search = self._searched(
                    model, penalty, batches, loss, state, progress
                )
            self.widest(model)
            weights = search.weights()
            choice = weights.argmax(1).tolist()
            details = {
                "penalty": penalty,
                "weights": weights.tolist(),
                "history": search.history,
            }
            self._write(model, choice, folder, f"{penalty}", details)
            networks.append(self._bottlenecks(choice))
            logger.info("Penalty %s: bottlenecks %s", penalty, networks[-1])
        return networks

    def _searched(self, model, penalty, batches, loss, state, progress):
        """A search that has come to its end."""
        steps = len(batches(0))
        search = self._search(model, penalty, steps)
        settings = [
            *(list(self.candidates), penalty, self.held_out, self.epochs),
            *(self.lr, list(self.temperature), self.gumbel, self.seed, steps),
        ]
        if state.exists():
            saved = torch.load(state, weights_only=True)
            if saved["settings"] != settings:
                raise ValueError(
                    f"{state} is of another search: take it away, or give "
                    "another output folder"
                )
            search.load_state_dict(saved["search"])
        with tqdm(
            initial=search.steps,
            total=self.epochs * steps,
            desc=f"penalty {penalty}",
            disable=not progress,
        ) as bar:

            def one(batch):
                bar.update()
                return loss(batch), 1

            for epoch in range(len(search.history), self.epochs):
                search.epoch(batches(epoch), one)
                with atomic_write(state) as part:
                    content = {
                        "settings": settings,
                        "search": search.state_dict(),
                    }
                    torch.save(content, part)
        return search

    def _search(self, model, penalty, steps):
        """The search at its beginning."""
        costs, _ = parameter_costs(model)
        costs = costs / costs[:, -1].sum()
        device = next(model.parameters()).device
        choices = [
            ArchitectureWeights(len(self.candidates)).to(device)
            for _ in model.layers
        ]
        mix(model, [choice.weights for choice in choices])
        return ArchitectureSearch(
            choices,
            lambda weights: penalty * expected_cost(weights, costs),
            self.lr,
            annealed(*self.temperature, self.epochs * steps),
            self.gumbel,
            self.seed,
        )

    def _bottlenecks(self, choice):
        """Dimensions of the candidates."""
        return [self.candidates[index] for index in choice]

    def _write(self, model, choice, folder, name, details):
        """The files of an architecture and of its controls."""
        costs, others = parameter_costs(model)
        cost = int(costs[range(len(choice)), choice].sum())
        n = uniform_bottleneck(model, cost)
        write_json(
            folder / f"searched_{name}.json",
            {
                "bottlenecks": self._bottlenecks(choice),
                "parameters": others + cost,
                **details,
            },
        )
        write_json(
            folder / f"uniform_{name}.json",
            {"bottlenecks": [n] * len(choice)},
        )
        for i in range(self.controls):
            (folder / f"random_{name}_{i + 1}.json").unlink(missing_ok=True)
        try:
            drawn = random_architectures(
                costs, cost, self.controls, self.seed, self.tolerance
            )
        except ValueError as error:
            logger.warning("Penalty %s has no random controls: %s", name, error)
            return
        for i, control in enumerate(drawn):
            write_json(
                folder / f"random_{name}_{i + 1}.json",
                {"bottlenecks": self._bottlenecks(control)},
            )
