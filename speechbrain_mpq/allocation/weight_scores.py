"""Scores that need a network's weights only: what they have in common."""

from ..quantization.quantizer import clusters
from ..quantization.tables import check_codebook
from .scores import ScoreTable, check_candidates
from .weights import named_under, table_sizes


class WeightScores:
    """Scores a network without running it; a subclass says how.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to score.
    granularity : str
        Scales of a tensor, "tensor" or "channel" (see `quantize_`).
    codebook : str
        Kind of quantization table, "midtread" or "midrise".
    rows : int or None
        Most output channels of a cluster (see `clusters`).
    """

    method = ""
    needs = ()  # a calibration has to provide nothing

    def __init__(
        self,
        candidate_bits=(2, 4, 8, 16),
        granularity="tensor",
        codebook="midtread",
        rows=None,
    ):
        self.candidate_bits = check_candidates(candidate_bits)
        self.granularity = granularity
        self.codebook = check_codebook(codebook)
        self.rows = rows

    def scores(self, root, members, parameters, progress):
        """Scores of every cluster; a subclass says them.

        Arguments
        ---------
        root : torch.nn.Module
            Full-precision network under its prefix.
        members : dict of str -> list of str
            Cluster name -> names of its parameters.
        parameters : dict of str -> int
            Cluster name -> number of its parameters.
        progress : bool
            Shows a progress bar where it takes time.

        Returns
        -------
        scores : dict
            scores[cluster][bits]
        """
        raise NotImplementedError("a subclass says the scores")

    def __call__(
        self,
        network,
        include=("*",),
        exclude=(),
        prefix="mask_net",
        progress=True,
    ):
        """Score a network.

        Arguments
        ---------
        network : torch.nn.Module
            Full-precision network, left as it was found.
        include, exclude : sequence of str
            Patterns on parameter names with their prefix.
        prefix : str
            Name of the network in its model; cluster names begin with it.
        progress : bool
            Shows a progress bar where it takes time.

        Returns
        -------
        table : ScoreTable
        """
        root = named_under(prefix, network)
        members = clusters(root, include, exclude, self.rows)
        sizes = table_sizes(root, members, self.granularity)
        parameters = {
            cluster: sum(row.values())
            for cluster, row in sizes["tensors"].items()
        }
        return ScoreTable(
            scores=self.scores(root, members, parameters, progress),
            **sizes,
            method=self.method,
            codebook=self.codebook,
        )
