"""Baselines, which a good score has to beat.

Scores that look at no data, and good ones dealt out in reverse. They go
through the same solver to the same bytes as any other score, so that a
difference between two plans is one between the scores alone. Scores of an
earlier run, from its file, are here as well: they look at no data either.
"""

from dataclasses import replace
from pathlib import Path

import torch

from .output_scores import KLScores
from .scores import DerivedScores, Scorer, ScoreTable
from .sharing import share
from .sweep import quantized_values, scored_clusters, table_sizes, tensor_of


class WeightScores(Scorer):
    """Scores a network without running it; a subclass says how."""

    def scores(self, root, members, parameters, progress):
        """Scores of every cluster; a subclass says them.

        Returns
        -------
        scores : dict
            scores[cluster][bits]
        """
        raise NotImplementedError("a subclass says the scores")

    def score(self, network, values, selection, progress=True, folder=None):
        """Score a network, see `Scorer.score`."""
        root, members = scored_clusters(network, selection, self.scheme)
        sizes = table_sizes(root, members, self.scheme)
        parameters = {
            cluster: sum(row.values())
            for cluster, row in sizes["tensors"].items()
        }
        return ScoreTable(
            scores=self.scores(root, members, parameters, progress),
            **sizes,
            method=self.method,
            codebook=self.scheme.codebook,
        )


def expected_noise(parameters, sensitivity, bits):
    """Damage of rounding: n s 2^(-2b), as each bit halves the step."""
    return parameters * sensitivity * 4.0**-bits


class RandomScores(WeightScores):
    """Sensitivities drawn at random: plans of equal bytes that know nothing.

    Each cluster's sensitivity per parameter is log-normal, and its loss
    increase falls with the bits as that of rounding does. An unlimited plan
    then has bits that are Gaussian around the budget whatever a cluster's
    size, as if the sensitivities of a real table had been dealt out anew. (A
    plan drawn evenly from all that fit would give most small clusters many
    bits or two, and be a weaker opponent.)

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to score.
    seed : int
        One plan for each.
    spread : float
        Standard deviation of the bits in an unlimited plan; that of the
        measured scores of the shipped separator is 1.1 to 1.8.
    **scheme : dict
        As for `Scorer`.

    Example
    -------
    >>> network = torch.nn.Sequential(torch.nn.PReLU(), torch.nn.PReLU(3))
    >>> table = RandomScores((2, 3), seed=1)(network)
    >>> [row[2] / row[3] for row in table.scores.values()]
    [4.0, 4.0]
    """

    method = "random"

    def __init__(
        self,
        candidate_bits=(2, 4, 8, 16),
        seed=0,
        spread=1.5,
        **scheme,
    ):
        super().__init__(candidate_bits, **scheme)
        self.seed = seed
        self.spread = spread

    def scores(self, root, members, parameters, progress):
        """Random sensitivities, in the order of the clusters."""
        generator = torch.Generator().manual_seed(self.seed)
        normal = torch.randn(
            len(members), generator=generator, dtype=torch.float64
        )
        sensitivities = 4.0 ** (self.spread * normal)
        return {
            cluster: {
                bits: expected_noise(parameters[cluster], sensitivity, bits)
                for bits in self.candidate_bits
            }
            for cluster, sensitivity in zip(members, sensitivities.tolist())
        }


class SizeScores(WeightScores):
    """Bits in the order of the clusters' sizes.

    A parameter's sensitivity is the number of parameters in its cluster, or
    one over it: bits then rise, or fall, by half a bit for each doubling of
    the size. With the smallest first every cluster adds the same loss at
    the same bits, and the cheap ones get more.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to score.
    largest_first : bool
        Whether the largest clusters get the most bits, or the smallest.
    **scheme : dict
        As for `Scorer`.

    Example
    -------
    >>> network = torch.nn.Sequential(torch.nn.PReLU(), torch.nn.PReLU(4))
    >>> SizeScores((2, 3), largest_first=True)(network).scores
    {'0': {2: 0.0625, 3: 0.015625}, '1': {2: 1.0, 3: 0.25}}
    """

    def __init__(
        self,
        candidate_bits=(2, 4, 8, 16),
        largest_first=True,
        **scheme,
    ):
        super().__init__(candidate_bits, **scheme)
        self.largest_first = largest_first
        self.method = "largest_first" if largest_first else "smallest_first"

    def scores(self, root, members, parameters, progress):
        """The model of rounding with sensitivity n or 1 / n."""
        power = 1 if self.largest_first else -1
        return {
            cluster: {
                bits: expected_noise(count, float(count) ** power, bits)
                for bits in self.candidate_bits
            }
            for cluster, count in parameters.items()
        }


class WeightErrorScores(WeightScores):
    """The squared error of the weights, without any curvature.

    ||f(T) - T||^2 of Eq. 9 with all traces equal, T being the values of all
    tensors of a cluster.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to score.
    normalized : bool
        Divide by ||T||^2: the share of the error in the cluster's energy.
    **scheme : dict
        As for `Scorer`.

    Example
    -------
    >>> network = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 1, bias=False))
    >>> _ = network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    >>> WeightErrorScores((2, 3))(network, progress=False).scores
    {'0': {2: 1.0, 3: 0.0}}
    """

    def __init__(
        self,
        candidate_bits=(2, 4, 8, 16),
        normalized=False,
        **scheme,
    ):
        super().__init__(candidate_bits, **scheme)
        self.normalized = normalized
        self.method = "relative_weight_error" if normalized else "weight_error"

    def scores(self, root, members, parameters, progress):
        """The measured error of every cluster at every candidate."""

        def row(cluster):
            return self._row(root, members[cluster])

        rows = share(parameters, row, title="scoring", progress=progress)
        return {
            cluster: dict(zip(self.candidate_bits, row))
            for cluster, row in rows.items()
        }

    def _row(self, root, names):
        """One cluster's error at every candidate."""
        weights = {n: tensor_of(root, n).weight.double() for n in names}
        energy = sum(float(w.square().sum()) for w in weights.values())
        # A cluster of zeros has no error to divide either.
        scale = energy if self.normalized and energy else 1.0
        row = []
        for bits in self.candidate_bits:
            values = quantized_values(root, names, bits, self.scheme)
            error = sum(
                float((values[name] - w).square().sum())
                for name, w in weights.items()
            )
            row.append(error / scale)
        return row


class StoredScores(Scorer):
    """The scores that an earlier run has left in its scores.json.

    Other budgets, candidates and controls then need no second sweep.

    Arguments
    ---------
    candidate_bits : sequence of int
        Some of those that were scored.
    file : str or Path
        A scores.json of the same model and scheme.
    **scheme : dict
        As for `Scorer`.

    Example
    -------
    >>> network = torch.nn.Sequential(torch.nn.PReLU(), torch.nn.PReLU(4))
    >>> path = getfixture("tmp_path") / "scores.json"
    >>> SizeScores((2, 3, 4))(network).save(path)
    >>> StoredScores((2, 4), path)(network).candidate_bits
    (2, 4)
    """

    method = "stored"

    def __init__(self, candidate_bits=(2, 4, 8, 16), file=None, **scheme):
        super().__init__(candidate_bits, **scheme)
        if not file or not Path(file).is_file():
            raise ValueError(
                f"no file {file} of scores: name the scores.json of an "
                "earlier run, as in table:file=results/kl_4bit/scores.json"
            )
        self.file = file

    def score(self, network, values, selection, progress=True, folder=None):
        """Read the scores of a network, see `Scorer.score`."""
        table = ScoreTable.load(self.file)
        root, members = scored_clusters(network, selection, self.scheme)
        sizes = table_sizes(root, members, self.scheme)
        if (table.tensors, table.codebook) != (
            sizes["tensors"],
            self.scheme.codebook,
        ):
            raise ValueError(
                f"{self.file} has scores of another model or scheme "
                f"({len(table.tensors)} clusters, codebook {table.codebook}; "
                f"here {len(members)}, {self.scheme.codebook}): give the "
                "options that it was made with, or score again"
            )
        missing = set(self.candidate_bits) - set(table.candidate_bits)
        if missing:
            raise ValueError(
                f"{self.file} has no scores at {sorted(missing)} bits, only "
                f"at {list(table.candidate_bits)}: choose among these as "
                "candidate bits, or score again"
            )
        scores = {
            cluster: {bits: row[bits] for bits in self.candidate_bits}
            for cluster, row in table.scores.items()
        }
        return replace(table, scores=scores, **sizes)


class ReversedScores(DerivedScores):
    """Good scores dealt out in reverse: the worst plan that they can make.

    What the cluster with the largest score per parameter has goes to the one
    with the smallest, and so on inwards.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to score.
    scores : Scorer or None
        What is reversed; None: `KLScores`.
    file : str, Path or None
        A scores.json to take instead, see `StoredScores`.
    **scheme : dict
        As for `Scorer`.

    Example
    -------
    >>> network = torch.nn.Sequential(torch.nn.PReLU(), torch.nn.PReLU(4))
    >>> scores = ReversedScores((2, 3), SizeScores((2, 3)))
    >>> scores(network).method
    'reversed_largest_first'
    """

    additive = False  # the scores are another cluster's

    def __init__(
        self, candidate_bits=(2, 4, 8, 16), scores=None, file=None, **scheme
    ):
        if file:
            scores = StoredScores(candidate_bits, file, **scheme)
        self.base = scores or KLScores(candidate_bits, **scheme)

    def score(self, network, values, selection, progress=True, folder=None):
        """Score a network, see `Scorer.score`."""
        table = self.base.score(network, values, selection, progress, folder)
        return replace(
            table,
            scores=reversed_scores(table),
            method=f"reversed_{table.method}",
        )


def reversed_scores(table):
    """Scores of a table, dealt out in reverse order of those per parameter.

    Arguments
    ---------
    table : ScoreTable

    Returns
    -------
    scores : dict
        scores[cluster][bits]

    Example
    -------
    >>> scores = {"small": {2: 8.0, 4: 1.0}, "large": {2: 4.0, 4: 2.0}}
    >>> tensors = {"small": {"a": 1}, "large": {"b": 2}}
    >>> reversed_scores(ScoreTable(scores, tensors))
    {'small': {2: 2.0, 4: 1.0}, 'large': {2: 16.0, 4: 2.0}}
    """
    counts, least = table.parameters, min(table.candidate_bits)
    # What the network does not use has no part in it.
    used = [name for name, row in table.scores.items() if any(row.values())]
    used.sort(key=lambda name: table.scores[name][least] / counts[name])
    donors = dict(zip(used, reversed(used)))
    scores = dict(table.scores)
    for cluster, donor in donors.items():
        share = counts[cluster] / counts[donor]
        row = table.scores[donor]
        scores[cluster] = {bits: share * x for bits, x in row.items()}
    return scores
