"""Search for the bottlenecks of a TDNN-F: supernet, architecture, controls.

Pipelined, as in "Towards green ASR" (Interspeech 2022): first the supernet is
trained with one candidate for each layer, drawn evenly anew in every step;
then its weights stay as they are, and the architecture is learned on utterances
that were held out. What comes out are files of bottlenecks, which networks are
trained with from scratch: those found, and beside them uniform and random ones
of the same number of parameters.
"""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from ..allocation.architecture_search import (
    ArchitectureSearch,
    ArchitectureWeights,
    annealed,
    expected_cost,
    random_architectures,
)
from ..lobes.models.tdnnf_supernet import (
    check_candidates,
    choose,
    mix,
    parameter_costs,
    supernet_,
    uniform_bottleneck,
)
from ..utils import atomic_write, write_json

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
