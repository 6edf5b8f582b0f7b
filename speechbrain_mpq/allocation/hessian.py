"""Curvature of the task's loss times squared quantization error as a score.

Equation numbers are those of "Mixed precision DNN quantization for overlapped
speech separation and recognition" (ICASSP 2022).
"""

import time
from collections import defaultdict
from contextlib import contextmanager

import torch
from speechbrain.utils.logger import get_logger

from ..quantization.groups import split_name
from ..quantization.tensors import named_tensors
from .scores import Scorer, ScoreTable
from .sweep import (
    parametrized,
    quantized_values,
    scored_clusters,
    table_sizes,
    tensor_of,
)
from .traces import DISTRIBUTIONS, network_traces

logger = get_logger(__name__)
NOISY = 0.5  # standard error over trace from which a cluster is warned of
TRACES = ("total", "average")


class HessianScores(Scorer):
    """Scores every cluster by Tr(H) ||f(w) - w||^2 (Eq. 9).

    H is the cluster's block of the Hessian of the task's loss, averaged over
    the items, and its trace is estimated with random probes (Eq. 10). Every
    `chunk` of items is probed `probes` times, each time with other random
    values. The table's details hold the estimated traces of all clusters and
    tensors with their standard errors, over the probes and for these items.

    A trace below its standard error, and any negative one, is scored as the
    standard error: what noise hides may be that large, and would otherwise be
    quantized for free.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to try for each cluster.
    probes : int
        Random probes, 2 or more (the paper's m).
    trace : str
        "total": Eq. 9 as printed. It weighs a cluster with its size, and
        where tensors differ charges the error of one with the curvature of
        another (a norm's bias with that of its weight). "average": each tensor
        by itself, its trace divided by its parameters; the score is then twice
        the loss that an error without direction costs, which is too little
        where correlated inputs add the errors up, as in a first layer.
    distribution : str
        Of the probes: "gaussian" as in the paper, or "rademacher" (+-1),
        which is exact where the Hessian is diagonal.
    chunk : int
        Items that share a probe. One has the least error and memory, and on a
        CPU is as fast as more.
    seed : int
        Of the probes.
    differences : bool
        Take differences of first gradients, for losses that cannot be
        differentiated twice, as CTC (see `difference_traces`).
    **scheme : dict
        As for `Scorer`.

    Example
    -------
    >>> import torch
    >>> network = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 1, bias=False))
    >>> _ = network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    >>> def loss(output, items):
    ...     return output.square().sum()
    >>> scores = HessianScores((2, 3), distribution="rademacher")
    >>> table = scores(network, torch.ones(4, 1, 5), loss, progress=False)
    >>> table.scores  # 2 weights x 2 x 5 frames, times (0, 3) for (1, 3)
    {'0': {2: 20.0, 3: 0.0}}
    >>> table.details["traces"]
    {'0': {'trace': 20.0, 'standard_error': 0.0}}
    """

    needs = ("inputs", "loss")

    def __init__(
        self,
        candidate_bits=(2, 4, 8, 16),
        probes=50,
        trace="total",
        distribution="gaussian",
        chunk=1,
        seed=1234,
        differences=False,
        **scheme,
    ):
        if trace not in TRACES:
            raise ValueError(
                f"trace must be one of {list(TRACES)}, not {trace!r}"
            )
        if distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution must be one of {list(DISTRIBUTIONS)}, not "
                f"{distribution!r}"
            )
        if not isinstance(probes, int) or probes < 2:
            raise ValueError(
                f"probes must be an integer of 2 or more, not {probes!r}: one "
                "alone has no standard error"
            )
        super().__init__(candidate_bits, **scheme)
        self.probes = probes
        self.trace = trace
        self.distribution = distribution
        self.chunk = chunk
        self.seed = seed
        self.differences = differences
        self.method = f"{trace}_hessian_trace"

    def one_by_one(self):
        """A copy that passes single items."""
        scorer = super().one_by_one()
        scorer.chunk = 1
        return scorer

    def score(self, network, values, selection, progress=True):
        """Score a network, see `Scorer.score`.

        The loss must be one that can be differentiated twice, or
        `differences` be True.
        """
        started = time.perf_counter()
        inputs, loss = values["inputs"], values["loss"]
        root, members = scored_clusters(network, selection, self.scheme)
        errors = self._squared_errors(root, members)
        traces, tensor_traces = self._traces(
            network, inputs, loss, root, members, progress
        )
        _report(traces, self.probes)
        sizes = table_sizes(root, members, self.scheme)
        scores = {}
        for cluster, lengths in sizes["tensors"].items():
            if self.trace == "total":
                weights = dict.fromkeys(lengths, _at_least(traces[cluster]))
            else:
                weights = {
                    name: _at_least(tensor_traces[name]) / length
                    for name, length in lengths.items()
                }
            scores[cluster] = {
                bits: sum(weights[name] * row[name] for name in lengths)
                for bits, row in errors[cluster].items()
            }
        details = {
            "items": len(inputs),
            "seconds": round(time.perf_counter() - started, 2),
            "probes": self.probes,
            "distribution": self.distribution,
            "traces": traces,
            "tensor_traces": tensor_traces,
        }
        return ScoreTable(
            scores=scores,
            **sizes,
            method=self.method,
            details=details,
            codebook=self.scheme.codebook,
        )

    def _squared_errors(self, root, members):
        """errors[cluster][bits][tensor]: ||f(w) - w||^2."""
        errors = {cluster: {} for cluster in members}
        for cluster, names in members.items():
            for bits in self.candidate_bits:
                values = quantized_values(root, names, bits, self.scheme)
                errors[cluster][bits] = {
                    name: _squared_error(tensor_of(root, name).weight, value)
                    for name, value in values.items()
                }
        return errors

    def _traces(self, network, inputs, loss, root, members, progress):
        """Traces of the mean loss's Hessian by cluster, and by tensor."""
        names = [name for row in members.values() for name in row]
        with _leaves(root, names) as weights:
            estimates = network_traces(
                network,
                inputs,
                loss,
                weights,
                probes=self.probes,
                distribution=self.distribution,
                seed=self.seed,
                chunk=self.chunk,
                progress=progress,
                differences=self.differences,
            )
        columns = dict(zip(names, estimates.unbind(1)))
        clustered = {
            cluster: sum(columns[name] for name in row)
            for cluster, row in members.items()
        }
        return (
            {name: _summary(column) for name, column in table.items()}
            for table in (clustered, columns)
        )


class _Joined(torch.nn.Module):
    """A parameter put together from groups of its output channels."""

    def __init__(self, parts):
        super().__init__()
        self.parts = torch.nn.ParameterList(parts)

    def forward(self, whole):
        """The groups side by side, instead of the parameter itself."""
        return torch.cat(list(self.parts))


@contextmanager
def _leaves(root, names):
    """Parameters to differentiate by; groups of channels as their own."""
    leaves, groups = {}, defaultdict(list)
    for name in names:
        tensor = tensor_of(root, name)
        if tensor.rows is ... and tensor.chain is None:
            leaves[name] = tensor.parameter
        else:
            leaves[name] = torch.nn.Parameter(tensor.weight.clone())
            groups[split_name(name)[0]].append(leaves[name])
    places = []
    for parameter, parts in groups.items():
        owners = named_tensors(root)[parameter].owners
        places += [(*owner, _Joined(parts)) for owner in owners]
    with parametrized(places):
        yield [leaves[name] for name in names]


def _squared_error(weight, quantized):
    """||f(w) - w||^2, the second factor of Eq. 9."""
    return (quantized.double() - weight.double()).square().sum().item()


def _summary(estimates):
    """Mean of the probes, and its standard error."""
    error = estimates.std() / len(estimates) ** 0.5
    return {"trace": estimates.mean().item(), "standard_error": error.item()}


def _at_least(row):
    """The trace to score with: what noise hides counts as the noise."""
    return max(row["trace"], row["standard_error"])


def _report(traces, probes):
    """Log how well the traces are known; warn where they are not."""
    noisy = [
        name
        for name, row in traces.items()
        if row["standard_error"] > NOISY * abs(row["trace"]) or row["trace"] < 0
    ]
    known = sorted(
        row["standard_error"] / abs(row["trace"])
        for row in traces.values()
        if row["trace"]
    )
    if known:
        logger.info(
            f"Hessian traces of {len(traces)} clusters with {probes} probes: "
            f"standard error {known[len(known) // 2]:.1%} in the median, "
            f"{known[-1]:.1%} at most"
        )
    if noisy:
        logger.warning(
            f"{len(noisy)} of {len(traces)} Hessian traces are negative or "
            f"have a standard error above {NOISY:.0%} of them: "
            f"{', '.join(noisy[:5])}{', ...' if len(noisy) > 5 else ''}. "
            "More probes or more calibration items make them sharper"
        )
