"""What a network's output does when one cluster at a time is quantized.

The slow and obvious way is one pass through the network for every cluster and
candidate. Here everything before the changed stage of an `nn.Sequential` is
computed once, the changed stage once for each candidate, and the stages behind
it once for all candidates together, side by side on the batch dimension.

Layout: [items, channels, frames], or whatever the network takes with its items
in front. In eval mode an item must not depend on its neighbours.
"""

import math
import time
from contextlib import contextmanager

import torch
import torch.nn as nn
from tqdm import tqdm

from ..quantization.codebook import scale_shape
from ..quantization.quantizer import cluster_quantized, clusters
from .scores import ScoreTable, check_candidates


class OutputScores:
    """What all scores have in common that compare a network's outputs.

    A score is a summed error over a summed scale. Any other module than a
    plain `nn.Sequential` is one single stage: then each cluster and candidate
    costs a full pass.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to try for each cluster.
    granularity : str
        Scales of a tensor, "tensor" or "channel" (see `quantize_`).
    chunk : int
        Items that go through the network at a time. Memory grows with chunk x
        candidates; the scores do not depend on it beyond rounding.

    Example
    -------
    >>> network = nn.Sequential(nn.Conv1d(1, 2, 1, bias=False), nn.ReLU())
    >>> _ = network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    >>> table = OutputScores((2, 3)).table(
    ...     network,
    ...     torch.ones(5, 1, 2),
    ...     lambda reference, output, items: (reference - output).abs().sum(),
    ...     lambda reference, items: reference.numel(),
    ...     progress=False,
    ... )
    >>> table.scores  # (1, 3) becomes (0, 3) or (2, 2) at 2 bits
    {'0': {2: 0.5, 3: 0.0}}
    """

    method = ""
    signed = False

    def __init__(
        self, candidate_bits=(2, 4, 8, 16), granularity="tensor", chunk=8
    ):
        self.candidate_bits = check_candidates(candidate_bits)
        self.granularity = granularity
        self.chunk = chunk

    def table(
        self,
        network,
        inputs,
        error,
        scale,
        include=("*",),
        exclude=(),
        prefix="",
        progress=True,
    ):
        """Score every cluster of a network at every candidate.

        Arguments
        ---------
        network : torch.nn.Module
            Full-precision network, left as it was found.
        inputs : torch.Tensor
            [items, ...]; chunks of it are moved to the network's device.
        error : callable
            `error(reference, output, items)`: the summed error of an output
            against the full-precision one, a tensor of one value; `items` is
            the slice of the inputs that both belong to.
        scale : callable
            `scale(reference, items)`: what a chunk adds to the divisor.
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
        if not len(inputs):
            raise ValueError("scoring needs at least one item of input")
        started = time.perf_counter()
        root = _named_under(prefix, network)
        members = clusters(root, include, exclude)
        stages = _stages(network)
        tries = {
            cluster: _in_stage(stages, prefix, quantized)
            for cluster, quantized in self._quantized(root, members)
        }
        chunks = inputs.split(self.chunk)
        with _evaluating(network), torch.no_grad():
            errors = _mean_errors(stages, chunks, tries, error, scale, progress)
        seconds = round(time.perf_counter() - started, 2)
        return ScoreTable(
            scores={
                name: dict(zip(self.candidate_bits, row))
                for name, row in errors.items()
            },
            **_sizes(root, members, self.granularity),
            method=self.method,
            signed=self.signed,
            details={"items": len(inputs), "seconds": seconds},
        )

    def _quantized(self, root, members):
        """Each cluster with its tensors at every candidate, by name.

        Fitting the scales is slow and needs no data: once, not once a chunk.
        """
        for cluster, names in members.items():
            row = []
            for bits in self.candidate_bits:
                with cluster_quantized(
                    root, cluster, bits, names, (), self.granularity
                ):
                    row.append({n: _tensor(root, n).clone() for n in names})
            yield cluster, row


def _named_under(prefix, network):
    """A module around the network whose parameters carry the prefix."""
    for name in reversed(prefix.split(".") if prefix else []):
        network = nn.ModuleDict({name: network})
    return network


def _tensor(root, name):
    """A parameter by name, as its module sees it."""
    module, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(module), attribute).detach()


def _sizes(root, members, granularity):
    """What a score table says of every cluster besides its scores."""
    tensors, scales = {}, {}
    for cluster, names in members.items():
        shapes = [tuple(_tensor(root, name).shape) for name in names]
        tensors[cluster] = dict(zip(names, map(math.prod, shapes)))
        scales[cluster] = sum(
            math.prod(scale_shape(shape, granularity)) for shape in shapes
        )
    total = sum(weight.numel() for weight in root.parameters())
    inside = sum(sum(row.values()) for row in tensors.values())
    return {
        "tensors": tensors,
        "scales": scales,
        "rest_parameters": total - inside,
    }


@contextmanager
def _evaluating(network):
    """Eval mode inside; every module's own mode comes back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _stages(network):
    """Named stages in order; a network that is no chain is its only stage."""
    if type(network).forward is nn.Sequential.forward:
        stages = list(network.named_children())
        weights = [id(w) for _, stage in stages for w in stage.parameters()]
        # Stages that share weights, or stand twice, change together.
        if len(stages) == len(network) and len(set(weights)) == len(weights):
            return stages
    return [("", network)]


def _in_stage(stages, prefix, quantized):
    """Index of a cluster's stage, and its tensors by their names in there."""
    some_name = next(iter(quantized[0]))
    for index, (stage, _) in enumerate(stages):
        path = "".join(f"{part}." for part in (prefix, stage) if part)
        if some_name.startswith(path):
            row = [
                {name.removeprefix(path): value for name, value in one.items()}
                for one in quantized
            ]
            return index, row
    raise KeyError(some_name)


def _mean_errors(stages, chunks, tries, error, scale, progress):
    """errors[cluster], a list of candidates: summed error / summed scale."""
    totals = {name: [0.0] * len(row) for name, (_, row) in tries.items()}
    divisor, start = 0.0, 0
    steps = len(chunks) * len(tries)
    with tqdm(total=steps, desc="scoring", disable=not progress) as bar:
        for inputs in chunks:
            items = slice(start, start + len(inputs))
            start = items.stop
            cache = _stage_inputs(stages, inputs)
            reference = cache[-1]
            divisor += float(scale(reference, items))
            for name, (index, row) in tries.items():
                outputs = _outputs(stages, index, row, cache)
                for which, output in enumerate(outputs):
                    totals[name][which] += error(reference, output, items)
                bar.update()
    if not divisor:
        raise ValueError(
            "nothing to score: the full-precision output or its weights are "
            "all zero on this data"
        )
    return {
        name: [float(total) / divisor for total in row]
        for name, row in totals.items()
    }


def _stage_inputs(stages, inputs):
    """What goes into every stage and, last, the full-precision output."""
    weight = next(w for _, stage in stages for w in stage.parameters())
    cache = [inputs.to(weight.device)]
    for _, stage in stages:
        cache.append(stage(cache[-1]))
    if not isinstance(cache[-1], torch.Tensor):
        raise TypeError(
            "a network to be scored must return one tensor, not "
            f"{type(cache[-1]).__name__}; wrap it in a module that does"
        )
    return cache


def _outputs(stages, index, row, cache):
    """The network's output at each candidate of one cluster."""
    _, changed = stages[index]
    given = cache[index]
    outputs = []
    for values in row:
        with _replaced(changed, values):
            outputs.append(changed(given))
    output = torch.cat(outputs)
    for _, stage in stages[index + 1 :]:
        output = stage(output)
    return output.split(len(given))


@contextmanager
def _replaced(module, values):
    """Other values in some parameters; the old ones come back bit-exact.

    In place, not by `functional_call`: that one leaves a module which stands
    twice in a network with the new values.
    """
    saved = {n: module.get_parameter(n).clone() for n in values}
    try:
        for name, value in values.items():
            module.get_parameter(name).copy_(value)
        yield
    finally:
        for name, value in saved.items():
            module.get_parameter(name).copy_(value)
