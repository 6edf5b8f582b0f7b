"""Whole bit plans of a model, evaluated by its own metric.

Scores judge one cluster at a time and a knapsack adds them up; here a plan is
judged as it is: all clusters are quantized at once, the metric is measured,
and the weights come back. `nsga2.search` and its baselines search with it.
"""

import math

from ..quantization.plan import BitPlan, ClusterBits, Scheme, Selection
from .scores import check_candidates
from .sharing import weights_digest
from .sweep import (
    evaluating,
    quantized_values,
    replaced,
    scored_clusters,
    table_sizes,
)


class PlanObjectives:
    """Error and bytes of bit plans: what `nsga2.search` takes as `evaluate`.

    Arguments
    ---------
    model : torch.nn.Module
        In full precision.
    measure : callable
        Takes the model, in eval mode and quantized, and returns an error:
        lower is better. The same weights must give the same error.
    candidate_bits : sequence of int
        Bits that clusters may get.
    selection : Selection or None
        Which parameters; None: all.
    scheme : Scheme or None
        How values are represented.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq.allocation.nsga2 import Evolution, search
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.PReLU())
    >>> inputs = torch.randn(9, 4)
    >>> wanted = model(inputs)
    >>> def measure(model):
    ...     return (model(inputs) - wanted).square().mean().item()
    >>> objectives = PlanObjectives(model, measure, (2, 4, 8))
    >>> objectives.genes
    ('0', '1')
    >>> found = search(objectives, objectives.genes, (2, 4, 8), Evolution(5, 3))
    >>> smallest = found.front()[0].plan
    >>> smallest, objectives.bit_plan(smallest).bytes
    ({'0': 2, '1': 2}, 23)
    >>> torch.equal(model(inputs), wanted)
    True
    """

    def __init__(
        self, model, measure, candidate_bits, selection=None, scheme=None
    ):
        self.model, self.measure = model, measure
        self.candidate_bits = check_candidates(candidate_bits)
        self.scheme = scheme or Scheme()
        clusters = scored_clusters(model, selection or Selection(), self.scheme)
        self.root, self.members = clusters
        if not self.members:
            raise ValueError("no cluster to quantize: select some parameters")
        self.sizes = table_sizes(self.root, self.members, self.scheme)
        self._scales = {}  # (tensor, bits) -> scale: values would fill memory

    @property
    def genes(self):
        """Names of the clusters."""
        return tuple(self.members)

    @property
    def settings(self):
        """What tells this search from those of other models; for JSON."""
        sizes = self.sizes["tensors"].items()
        return {
            "tensors": {name: dict(tensors) for name, tensors in sizes},
            "scheme": repr(self.scheme),
            "weights": weights_digest(self.model),
        }

    def bit_plan(self, plan):
        """The plan as the rest of the package has it.

        Arguments
        ---------
        plan : dict of str -> int
            Cluster -> bits.

        Returns
        -------
        BitPlan
            For `quantize_`, `choose_bits`' folder, or plan.json.
        """
        self._check(plan)
        scales = self.sizes["scales"]
        clusters = {
            name: ClusterBits.of(tensors, scales[name], plan[name])
            for name, tensors in self.sizes["tensors"].items()
        }
        rest = self.sizes["rest_parameters"]
        return BitPlan(clusters, rest, self.scheme.codebook)

    def __call__(self, plan):
        """Error of the quantized model, and bytes of the plan."""
        size = self.bit_plan(plan).bytes
        values = {}
        for name, bits in plan.items():
            values |= quantized_values(
                self.root, self.members[name], bits, self.scheme, self._scales
            )
        with replaced(self.root, values), evaluating(self.model):
            error = float(self.measure(self.model))
        if not math.isfinite(error):
            raise ValueError(
                f"the metric is {error} for the plan {plan}: return a large "
                "number where a model does not work"
            )
        return error, size

    def _check(self, plan):
        """Refuses plans of other models."""
        foreign = sorted(set(plan) ^ set(self.members))
        if foreign:
            raise ValueError(
                f"a plan of another model: {foreign[:3]} are not in both"
            )
