"""Scores that compare a network's output with the full-precision one.

A subclass says what is compared and how; which weights are quantized for each
score, and how often the network has to run for it, is said here.
"""

import time

from ..quantization.plan import BitPlan
from ..quantization.quantizer import clusters
from ..quantization.tables import check_bits, check_codebook
from .chain import evaluating, in_stage, mean_errors, stages_of
from .cluster_values import (
    bits_of_clusters,
    chosen_values,
    values_of_clusters,
)
from .scores import ScoreTable, check_candidates
from .weights import named_under, table_sizes


class OutputScores:
    """What all scores have in common that compare a network's outputs.

    A score is a summed error over a summed scale. Any other module than a
    plain `nn.Sequential` is one single stage: then each cluster and candidate
    costs a full pass.

    Usually one cluster is quantized and all others are in full precision.
    With `given` the others have the bits of a plan, and the score is the error
    of the whole network, against full precision as ever. The table's details
    then hold "given_score", the error of that plan itself.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to try for each cluster.
    granularity : str
        Scales of a tensor, "tensor" or "channel" (see `quantize_`).
    chunk : int
        Items that go through the network at a time. Memory grows with chunk x
        candidates; the scores do not depend on it beyond rounding.
    given : BitPlan or int or None
        Bits of the clusters that are not being tried; those that a plan does
        not name stay in full precision.
    codebook : str
        Kind of quantization table, "midtread" or "midrise".
    rows : int or None
        Most output channels of a cluster: larger matrices and filters are
        cut into slices (see `clusters`).

    Example
    -------
    >>> import torch
    >>> network = torch.nn.Sequential(
    ...     torch.nn.Conv1d(1, 2, 1, bias=False),
    ...     torch.nn.Conv1d(2, 1, 1, bias=False),
    ... )
    >>> _ = network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    >>> _ = network[1].weight.data.fill_(1)
    >>> comparison = (
    ...     torch.ones(5, 1, 2),
    ...     lambda reference, output, items: (reference - output).abs().sum(),
    ...     lambda reference, items: reference.numel(),
    ... )
    >>> scores = OutputScores((2, 3))  # at 2 bits (1, 3) becomes (0, 3)
    >>> scores.table(network, *comparison, progress=False).scores
    {'0': {2: 1.0, 3: 0.0}, '1': {2: 0.0, 3: 0.0}}
    >>> scores = OutputScores((2, 3), given=2)
    >>> scores.table(network, *comparison, progress=False).scores
    {'0': {2: 1.0, 3: 0.0}, '1': {2: 1.0, 3: 1.0}}
    """

    method = ""
    signed = False
    needs = ()  # what a calibration has to provide

    def __init__(
        self,
        candidate_bits=(2, 4, 8, 16),
        granularity="tensor",
        chunk=8,
        given=None,
        codebook="midtread",
        rows=None,
    ):
        self.candidate_bits = check_candidates(candidate_bits)
        self.granularity = granularity
        self.chunk = chunk
        plan_or_none = given is None or isinstance(given, BitPlan)
        self.given = given if plan_or_none else check_bits(given)
        self.codebook = check_codebook(codebook)
        self.rows = rows

    def comparison(self, *calibration):
        """How outputs are compared on some data.

        Arguments
        ---------
        *calibration : object
            The values that `needs` names, in that order.

        Returns
        -------
        inputs, error, scale : tuple
            As `table` takes them.
        """
        raise NotImplementedError("a subclass says what is compared")

    def __call__(
        self,
        network,
        *calibration,
        include=("*",),
        exclude=(),
        prefix="mask_net",
        progress=True,
    ):
        """Score a network.

        Arguments
        ---------
        network : torch.nn.Module
            Full-precision network, fastest as a plain `nn.Sequential` of many
            stages; left as it was found.
        *calibration : object
            The values that `needs` names, in that order.
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
        return self.table(
            network,
            *self.comparison(*calibration),
            include=include,
            exclude=exclude,
            prefix=prefix,
            progress=progress,
        )

    def measure(
        self,
        network,
        plan_or_bits,
        *calibration,
        include=("*",),
        exclude=(),
        prefix="mask_net",
    ):
        """The error of a whole plan, in the unit of the scores.

        Arguments
        ---------
        network : torch.nn.Module
            Full-precision network, left as it was found.
        plan_or_bits : BitPlan or int
            Bits of all clusters.
        *calibration : object
            The values that `needs` names, in that order.
        include, exclude : sequence of str
            Patterns on parameter names with their prefix.
        prefix : str
            Name of the network in its model.

        Returns
        -------
        error : float
        """
        inputs, error, scale = self.comparison(*calibration)
        root = named_under(prefix, network)
        members = clusters(root, include, exclude, self.rows)
        given = bits_of_clusters(plan_or_bits, members, self.codebook)
        values = self._values(root, members, given, candidates=())
        with evaluating(network):
            _, measured = mean_errors(
                stages_of(network),
                self._chunks(inputs),
                {},
                (root, chosen_values(values, given)),
                error,
                scale,
            )
        return measured

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
        started = time.perf_counter()
        root = named_under(prefix, network)
        members = clusters(root, include, exclude, self.rows)
        given = bits_of_clusters(self.given, members, self.codebook)
        values = self._values(root, members, given, self.candidate_bits)
        stages = stages_of(network)
        tries = {
            cluster: in_stage(
                stages, prefix, [row[bits] for bits in self.candidate_bits]
            )
            for cluster, row in values.items()
        }
        with evaluating(network):
            errors, given_error = mean_errors(
                stages,
                self._chunks(inputs),
                tries,
                given and (root, chosen_values(values, given)),
                error,
                scale,
                progress,
            )
        details = {"items": len(inputs)}
        if given:
            details["given_score"] = given_error
        details["seconds"] = round(time.perf_counter() - started, 2)
        return ScoreTable(
            scores={
                cluster: dict(zip(self.candidate_bits, row))
                for cluster, row in errors.items()
            },
            **table_sizes(root, members, self.granularity),
            method=self.method,
            signed=self.signed,
            details=details,
            codebook=self.codebook,
        )

    def _chunks(self, inputs):
        """The inputs, some items at a time."""
        if not len(inputs):
            raise ValueError("scoring needs at least one item of input")
        return inputs.split(self.chunk)

    def _values(self, root, members, given, candidates):
        """values[cluster][bits], see `values_of_clusters`."""
        kind = self.granularity, self.codebook, self.rows
        return values_of_clusters(root, members, candidates, given, *kind)
