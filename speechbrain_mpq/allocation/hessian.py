"""Curvature of the task's loss times squared quantization error as a score.

Equation numbers are those of "Mixed precision DNN quantization for overlapped
speech separation and recognition" (ICASSP 2022).
"""

import time

from speechbrain.utils.logger import get_logger

from ..quantization.quant_api import clusters
from .scores import ScoreTable, check_candidates
from .sweep import named_under, quantized_values, table_sizes, tensor_of
from .traces import DISTRIBUTIONS, network_traces

logger = get_logger(__name__)
NOISY = 0.5  # standard error over trace from which a cluster is warned of
TRACES = ("total", "average")


class HessianScores:
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
    granularity : str
        Scales of a tensor, "tensor" or "channel" (see `quantize_`).
    chunk : int
        Items that share a probe. One has the least error and memory, and on a
        CPU is as fast as more.
    seed : int
        Of the probes.
    differences : bool
        Take differences of first gradients, for losses that cannot be
        differentiated twice, as CTC (see `difference_traces`).

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
    {'mask_net.0': {2: 20.0, 3: 0.0}}
    >>> table.details["traces"]
    {'mask_net.0': {'trace': 20.0, 'standard_error': 0.0}}
    """

    needs = ("inputs", "loss")  # what a calibration has to provide

    def __init__(
        self,
        candidate_bits=(2, 4, 8, 16),
        probes=50,
        trace="total",
        distribution="gaussian",
        granularity="tensor",
        chunk=1,
        seed=1234,
        differences=False,
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
        self.candidate_bits = check_candidates(candidate_bits)
        self.probes = probes
        self.trace = trace
        self.distribution = distribution
        self.granularity = granularity
        self.chunk = chunk
        self.seed = seed
        self.differences = differences
        self.method = f"{trace}_hessian_trace"

    def __call__(
        self,
        network,
        inputs,
        loss,
        include=("*",),
        exclude=(),
        prefix="mask_net",
        progress=True,
    ):
        """Score a network.

        Arguments
        ---------
        network : torch.nn.Module
            Full-precision network, scored in eval mode; left as it was found.
        inputs : torch.Tensor
            [items, ...]; chunks of it are moved to the network's device.
        loss : callable
            `loss(output, items)`: the summed loss of an output, a scalar that
            can be differentiated twice; `items` is the slice of the inputs.
        include, exclude : sequence of str
            Patterns on parameter names with their prefix.
        prefix : str
            Name of the network in its model; cluster names begin with it.
        progress : bool
            Shows a progress bar.

        Returns
        -------
        table : ScoreTable
        """
        started = time.perf_counter()
        root = named_under(prefix, network)
        members = clusters(root, include, exclude)
        errors = self._squared_errors(root, members)
        traces, tensor_traces = self._traces(
            network, inputs, loss, root, members, progress
        )
        _report(traces, self.probes)
        sizes = table_sizes(root, members, self.granularity)
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
            scores=scores, **sizes, method=self.method, details=details
        )

    def _squared_errors(self, root, members):
        """errors[cluster][bits][tensor]: ||f(w) - w||^2."""
        errors = {cluster: {} for cluster in members}
        for cluster, names in members.items():
            for bits in self.candidate_bits:
                values = quantized_values(
                    root, cluster, names, bits, self.granularity
                )
                errors[cluster][bits] = {
                    name: _squared_error(tensor_of(root, name), value)
                    for name, value in values.items()
                }
        return errors

    def _traces(self, network, inputs, loss, root, members, progress):
        """Traces of the mean loss's Hessian by cluster, and by tensor."""
        names = [name for row in members.values() for name in row]
        estimates = network_traces(
            network,
            inputs,
            loss,
            [root.get_parameter(name) for name in names],
            self.probes,
            self.distribution,
            self.seed,
            self.chunk,
            progress,
            self.differences,
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
