"""Bits for the modules of a pretrained interface, within a budget."""

import tempfile

import torch

from ..allocation.solver import allocate_bits
from ..allocation.sweep import OutputScores
from ..quantization.packing import save_packed
from ..quantization.quantizer import dequantize_, quantize_
from ..quantization.tensors import named_tensors, select
from .pretrained_folder import shared_parameters
from .pretrained_outputs import InterfaceOutputs

ROUNDS = 4  # until the packed files fit: names and headers take bytes, too


class InterfaceScores(OutputScores):
    """Scores every cluster by what it does to an interface's outputs.

    Arguments
    ---------
    comparison : Comparison
        Of the interface, in full precision.
    **options
        See ``OutputScores``.
    """

    def __init__(self, comparison, **options):
        super().__init__(**options)
        self.method = comparison.method
        self.compared = comparison

    def comparison(self):
        """See ``OutputScores``: item numbers are the inputs."""
        compared = self.compared
        return torch.arange(len(compared)), compared.error, compared.scale


def chosen_names(network, modules, include=("*",), exclude=(), vectors=False):
    """Parameters of an interface that are to be quantized.

    Arguments
    ---------
    network : InterfaceOutputs
        The interface's modules.
    modules : dict of str -> torch.nn.Module
        What can be packed.
    include : sequence of str
        fnmatch patterns on parameter names; each must match something.
    exclude : sequence of str
        Patterns of what to leave out of these; each must match something.
    vectors : bool
        Whether to quantize parameters of one dimension: biases, norms.

    Returns
    -------
    list of str
    """
    tensors = named_tensors(network)
    chosen = select(tensors, include, exclude)
    if not vectors:
        chosen = [t for t in chosen if t.weight.dim() > 1]
    stored = set(shared_parameters(network, modules.values()))
    names = [t.name for t in chosen if t.name in stored]
    if not names:
        raise ValueError(
            "nothing to quantize: no parameter that the patterns leave is in "
            f"a file of the source that can be packed ({list(modules)})"
        )
    return names


def check_budget(network, modules, names, budget, candidate_bits, codebook):
    """Refuse a budget that no bits can keep, before any scoring.

    Arguments
    ---------
    network : InterfaceOutputs
        The interface's modules, plain; left so.
    modules : dict of str -> torch.nn.Module
        What will be packed.
    names : list of str
        From ``chosen_names``.
    budget : dict
        From ``parse_budget``.
    candidate_bits : sequence of int or float
        Bits to choose from.
    codebook : str
        Kind of all quantization tables.
    """
    low, high = min(candidate_bits), max(candidate_bits)
    average = budget.get("average_bits", low)
    if not low <= average <= high:
        raise ValueError(
            f"a budget of {average} bits is out of reach: the candidates are "
            f"{low} to {high} bits"
        )
    if "budget_bytes" not in budget:
        return
    plan = quantize_(network, low, include=names, codebook=codebook)
    dequantize_(network)
    least = _packed_bytes(network, modules, plan)
    if least > budget["budget_bytes"]:
        whole = sum(c.bytes for c in plan.clusters.values())
        raise ValueError(
            f"a budget of {budget['budget_bytes']} bytes is out of reach: the "
            f"files take at least {least} bytes, {whole} for weights of {low} "
            f"bits and {least - whole} for what stays in float, buffers and "
            "headers; exclude less, allow fewer bits, or allow more bytes"
        )


def score_interface(comparison, modules, names, progress=True, **options):
    """Score the clusters of an interface.

    Arguments
    ---------
    comparison : Comparison
        Of the interface, in full precision.
    modules : dict of str -> torch.nn.Module
        What will be packed.
    names : list of str
        From ``chosen_names``.
    progress : bool
        Shows a progress bar.
    **options
        See ``OutputScores``: candidate_bits, granularity, codebook, ...

    Returns
    -------
    ScoreTable
        Its rest are the parameters that the packed files hold in float.
    """
    network = InterfaceOutputs(comparison)
    scores = InterfaceScores(comparison, **options)
    table = scores(network, include=names, prefix="", progress=progress)
    stored = {id(p): p for m in modules.values() for p in m.parameters()}
    total = sum(p.numel() for p in stored.values())
    table.rest_parameters = total - sum(table.parameters.values())
    return table


def plan_interface(table, network, modules, budget, min_bits=2):
    """The best plan for a budget; one in bytes holds for the packed files.

    Arguments
    ---------
    table : ScoreTable
        From ``score_interface``.
    network : InterfaceOutputs
        The interface's modules, plain; left so.
    modules : dict of str -> torch.nn.Module
        What will be packed.
    budget : dict
        From ``parse_budget``.
    min_bits : int
        Least bits of any cluster.

    Returns
    -------
    BitPlan
    """
    if "average_bits" in budget:
        return allocate_bits(table, min_bits=min_bits, **budget)
    asked = budget["budget_bytes"]
    most = allocate_bits(table, average_bits=max(table.candidate_bits))
    allowed = min(asked, most.bytes)
    for _ in range(ROUNDS):
        plan = allocate_bits(table, min_bits=min_bits, budget_bytes=allowed)
        stored = _packed_bytes(network, modules, plan)
        if stored <= asked:
            return plan
        allowed = min(allowed - 1, asked - (stored - plan.bytes))
    raise ValueError(
        f"no plan found whose files take at most {asked} bytes: the last one "
        f"takes {stored}"
    )


def _packed_bytes(network, modules, plan):
    """Bytes of the files that a plan makes."""
    quantize_(network, plan)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return sum(
                save_packed(module, folder).stat().st_size
                for module in modules.values()
            )
    finally:
        dequantize_(network)
