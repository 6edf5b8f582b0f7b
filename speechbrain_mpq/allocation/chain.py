"""Passes through a chain of stages while the weights of one stage change.

The slow and obvious way is one pass through the network for every cluster and
candidate. Here everything before the changed stage of an `nn.Sequential` is
computed once, the changed stage once for each candidate, and the stages behind
it once for all candidates together, side by side on the batch dimension.

Layout: [items, channels, frames], or whatever the network takes with its items
in front. In eval mode an item must not depend on its neighbours.
"""

from contextlib import contextmanager

import torch
import torch.nn as nn
from tqdm import tqdm

from .weights import replaced


def stages_of(network):
    """Named stages in order; a network that is no chain is its only stage.

    Arguments
    ---------
    network : torch.nn.Module
        Any network.

    Returns
    -------
    stages : list of (str, torch.nn.Module)

    Example
    -------
    >>> [name for name, _ in stages_of(nn.Sequential(nn.PReLU(), nn.PReLU()))]
    ['0', '1']
    >>> [name for name, _ in stages_of(nn.PReLU())]
    ['']
    """
    if type(network).forward is nn.Sequential.forward:
        stages = list(network.named_children())
        weights = [id(w) for _, stage in stages for w in stage.parameters()]
        # Stages that share weights, or stand twice, change together.
        if len(stages) == len(network) and len(set(weights)) == len(weights):
            return stages
    return [("", network)]


def in_stage(stages, prefix, rows):
    """Index of a cluster's stage, and its tensors by their names in there.

    Arguments
    ---------
    stages : list of (str, torch.nn.Module)
        From `stages_of`.
    prefix : str
        What the tensors' names begin with before the name of the stage.
    rows : list of dict of str -> torch.Tensor
        Values of the cluster's tensors at every candidate.

    Returns
    -------
    index : int
    rows : list of dict of str -> torch.Tensor

    Example
    -------
    >>> stages = [("conv", nn.Conv1d(1, 1, 1)), ("relu", nn.PReLU())]
    >>> in_stage(stages, "net", [{"net.relu.weight": torch.ones(1)}])
    (1, [{'weight': tensor([1.])}])
    """
    some_name = next(iter(rows[0]))
    for index, (stage, _) in enumerate(stages):
        path = "".join(f"{part}." for part in (prefix, stage) if part)
        if some_name.startswith(path):
            inside = [
                {name.removeprefix(path): value for name, value in row.items()}
                for row in rows
            ]
            return index, inside
    raise KeyError(some_name)


def mean_errors(stages, chunks, tries, given, error, scale, progress=False):
    """Error of the output for every try, and where nothing is tried.

    Arguments
    ---------
    stages : list of (str, torch.nn.Module)
        The network, from `stages_of`, in eval mode.
    chunks : sequence of torch.Tensor
        The inputs in order, [items, ...] each.
    tries : dict
        tries[cluster] as from `in_stage`.
    given : tuple of (torch.nn.Module, dict) or None
        Module and values as for `replaced`: other weights than those of the
        reference, with which everything is tried.
    error, scale : callable
        See `OutputScores.table`.
    progress : bool
        Shows a progress bar.

    Returns
    -------
    errors : dict of str -> list of float
        errors[cluster], one for each of its tries: summed error over summed
        scale.
    given_error : float
        Error of the given weights alone; 0 for None.

    Example
    -------
    >>> stages = stages_of(nn.Sequential(nn.PReLU(init=0.5)))
    >>> difference = lambda reference, output, _: (output - reference).sum()
    >>> mean_errors(
    ...     stages,
    ...     [-torch.ones(3, 1), -torch.ones(1, 1)],
    ...     {"0": (0, [{"weight": torch.zeros(1)}])},
    ...     None,
    ...     difference,
    ...     lambda reference, items: len(reference),
    ... )
    ({'0': [0.5]}, 0.0)
    """
    totals = {name: [0.0] * len(rows) for name, (_, rows) in tries.items()}
    given_total, divisor, start = 0.0, 0.0, 0
    steps = len(chunks) * len(tries)
    bar = tqdm(total=steps, desc="scoring", disable=not progress)
    with bar, torch.no_grad():
        for inputs in chunks:
            items = slice(start, start + len(inputs))
            start = items.stop
            cache = _stage_inputs(stages, inputs)
            reference = cache[-1]
            divisor += float(scale(reference, items))
            with replaced(*given or (None, {})):
                if given:
                    cache = _stage_inputs(stages, inputs)
                    given_total += float(error(reference, cache[-1], items))
                for name, (index, rows) in tries.items():
                    outputs = _outputs(stages, index, rows, cache)
                    for which, output in enumerate(outputs):
                        totals[name][which] += error(reference, output, items)
                    bar.update()
    if not divisor:
        raise ValueError(
            "nothing to score: the full-precision output or its weights are "
            "all zero on this data"
        )
    errors = {
        name: [float(total) / divisor for total in row]
        for name, row in totals.items()
    }
    return errors, given_total / divisor


@contextmanager
def evaluating(network):
    """Eval mode inside; every module's own mode comes back.

    Arguments
    ---------
    network : torch.nn.Module
        Any network.

    Example
    -------
    >>> network = nn.PReLU()
    >>> with evaluating(network):
    ...     print(network.training)
    False
    >>> network.training
    True
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _stage_inputs(stages, inputs):
    """What goes into every stage and, last, the output of the chain."""
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


def _outputs(stages, index, rows, cache):
    """The network's output at each candidate of one cluster."""
    _, changed = stages[index]
    given = cache[index]
    outputs = []
    for values in rows:
        with replaced(changed, values):
            outputs.append(changed(given))
    output = torch.cat(outputs)
    for _, stage in stages[index + 1 :]:
        output = stage(output)
    return output.split(len(given))
