"""Scores that compare a network's output with the full-precision one.

The slow and obvious way is one pass through the network for every cluster and
candidate. Here everything before the changed stage of an `nn.Sequential` is
computed once, the changed stage once for each candidate, and the stages behind
it once for all candidates together, side by side on the batch dimension. Any
other network is one single stage.

Names carry the name of the network in its model, so that patterns and cluster
names are those of the whole model. Layout: [items, channels, frames], or
whatever the network takes with its items in front. In eval mode an item must
not depend on its neighbours.
"""

import math
import time
from contextlib import ExitStack, contextmanager

import torch
import torch.nn as nn
from tqdm import tqdm

from ..quantization.codebook import check_bits
from ..quantization.groups import split_name
from ..quantization.parametrized import attach, detach
from ..quantization.plan import BitPlan, Scheme, Selection
from ..quantization.quant_api import clusters, fake_quantize, written
from ..quantization.tensors import named_tensors, near_misses
from .scores import Scorer, ScoreTable


def scored_clusters(network, selection, scheme):
    """The clusters of a network, by their names in its model.

    Example
    -------
    >>> selection = Selection(prefix="net")
    >>> scored_clusters(nn.Sequential(nn.PReLU()), selection, Scheme())[1]
    {'net.0': ['net.0.weight']}
    """
    root = _named_under(selection.prefix, network)
    cut = {"rows": scheme.rows, "gates": scheme.gates}
    return root, clusters(root, **selection.patterns, **cut)


def _named_under(prefix, network):
    """A module around the network whose parameters carry the prefix."""
    for name in reversed(prefix.split(".") if prefix else []):
        network = nn.ModuleDict({name: network})
    return network


def tensor_of(root, name):
    """A tensor of a module by name, or some output channels of it.

    Arguments
    ---------
    name : str
        Such as "conv.weight" or "conv.weight[0:32]".

    Example
    -------
    >>> tensor_of(nn.Sequential(nn.PReLU(init=0.5)), "0.weight").weight
    tensor([0.5000])
    """
    name, rows = split_name(name)
    path, _, attribute = name.rpartition(".")
    tensor = named_tensors(root.get_submodule(path))[attribute]
    return tensor if rows is ... else tensor.slice(rows)


def table_sizes(root, members, scheme):
    """What a score table says of every cluster besides its scores.

    Example
    -------
    >>> network = nn.Sequential(nn.Linear(3, 2))
    >>> sizes = table_sizes(network, {"0": ["0.weight"]}, Scheme("channel"))
    >>> sizes["tensors"], sizes["scales"], sizes["rest_parameters"]
    ({'0': {'0.weight': 6}}, {'0': 2}, 2)
    """
    tensors, scales = {}, {}
    for cluster, names in members.items():
        held = {name: tensor_of(root, name) for name in names}
        tensors[cluster] = {n: t.weight.numel() for n, t in held.items()}
        scales[cluster] = sum(
            math.prod(tensor.scale_shape(scheme.granularity))
            for tensor in held.values()
        )
    total = sum(weight.numel() for weight in root.parameters())
    inside = sum(sum(row.values()) for row in tensors.values())
    return {
        "tensors": tensors,
        "scales": scales,
        "rest_parameters": total - inside,
    }


def quantized_values(root, names, bits, scheme=None):
    """The values that tensors get at some bits.

    Example
    -------
    >>> network = nn.Sequential(nn.PReLU(2))
    >>> _ = network[0].weight.data.copy_(torch.tensor([0.5, 0.1]))
    >>> quantized_values(network, ["0.weight"], 2)
    {'0.weight': tensor([0.5000, 0.0000])}
    """
    values = {}
    for name in names:
        tensor = tensor_of(root, name)
        shape = tensor.scale_shape((scheme or Scheme()).granularity)
        values[name] = fake_quantize(tensor.weight, bits, scheme, name, shape)
    return values


@contextmanager
def replaced(module, values):
    """Other values in some parameters; the old ones come back bit-exact.

    In place, not by `functional_call`: that one leaves a module which stands
    twice in a network with the new values. No gradients.

    Arguments
    ---------
    module : torch.nn.Module
        Module that the names start from.
    values : dict of str -> torch.Tensor
        Name of a parameter or slice -> its value inside the ``with`` block.

    Example
    -------
    >>> layer = nn.PReLU(init=0.5)
    >>> with replaced(layer, {"weight": torch.ones(1)}):
    ...     print(layer.weight.item())
    1.0
    >>> layer.weight.item()
    0.5
    """
    with torch.no_grad(), ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(written(tensor_of(module, name), value))
        yield


@contextmanager
def parametrized(places):
    """Parameters computed by other modules inside; then plain again."""
    order = {
        id(module): (module, list(module._parameters)) for module, *_ in places
    }
    attached = []
    try:
        for module, attribute, parametrization in places:
            attach(module, attribute, parametrization)
            attached.append((module, attribute))
        yield
    finally:
        for module, attribute in attached:
            detach(module, attribute)
        for module, names in order.values():  # plans list tensors in it
            own = module._parameters
            for name in names:
                own[name] = own.pop(name)


def _bits_of_clusters(plan_or_bits, members, codebook="midtread"):
    """Bits of those clusters of a network that have any."""
    if plan_or_bits is None:
        return {}
    if not isinstance(plan_or_bits, BitPlan):
        return dict.fromkeys(members, check_bits(plan_or_bits))
    plan = plan_or_bits
    if plan.codebook != codebook:
        raise ValueError(
            f"the plan is of {plan.codebook} tables, the scores are of "
            f"{codebook}: give both the same codebook"
        )
    unknown = sorted(set(plan.clusters) - set(members))
    if unknown:
        raise ValueError(
            f"the plan's cluster {unknown[0]!r} is none of the network's "
            f"{len(members)}{near_misses(unknown[0], members)}"
        )
    return {name: entry.bits for name, entry in plan.clusters.items()}


def _values_of_clusters(root, members, candidates, given, scheme):
    """Values of all tensors at all candidates and at the given bits."""
    return {
        cluster: {
            bits: quantized_values(root, names, bits, scheme)
            for bits in dict.fromkeys((*candidates, given.get(cluster)))
            if bits is not None
        }
        for cluster, names in members.items()
    }


def _chosen_values(values, bits):
    """The values of all tensors at their cluster's bits."""
    chosen = {}
    for cluster, width in bits.items():
        chosen |= values[cluster][width]
    return chosen


def _stages_of(network):
    """Named stages in order; a network that is no chain is its only stage."""
    if type(network).forward is nn.Sequential.forward:
        stages = list(network.named_children())
        weights = [id(w) for _, stage in stages for w in stage.parameters()]
        # Stages that share weights, or stand twice, change together.
        if len(stages) == len(network) and len(set(weights)) == len(weights):
            return stages
    return [("", network)]


def _in_stage(stages, prefix, rows):
    """Index of a cluster's stage, and its tensors by their names in there."""
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


def _mean_errors(stages, chunks, tries, given, error, scale, progress=False):
    """Error of the output for every try, and where nothing is tried."""
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


class OutputScores(Scorer):
    """What all scorers have in common that compare a network's outputs.

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
    chunk : int
        Items that go through the network at a time. Memory grows with chunk x
        candidates; the scores do not depend on it beyond rounding.
    given : BitPlan or int or None
        Bits of the clusters that are not being tried; those that a plan does
        not name stay in full precision.
    **scheme : dict
        As for `Scorer`.

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

    def __init__(
        self, candidate_bits=(2, 4, 8, 16), chunk=8, given=None, **scheme
    ):
        super().__init__(candidate_bits, **scheme)
        self.chunk = chunk
        plan_or_none = given is None or isinstance(given, BitPlan)
        self.given = given if plan_or_none else check_bits(given)

    def one_by_one(self):
        """A copy that passes single items, as those of other shapes need."""
        scorer = super().one_by_one()
        scorer.chunk = 1
        return scorer

    def comparison(self, *values):
        """How outputs are compared."""
        raise NotImplementedError("a subclass says what is compared")

    def score(self, network, values, selection, progress=True):
        """Score a network, see `Scorer.score`."""
        compared = self.comparison(*(values[need] for need in self.needs))
        return self.table(network, *compared, selection, progress)

    def measure(
        self,
        network,
        plan_or_bits,
        *values,
        include=("*",),
        exclude=(),
        prefix="",
    ):
        """The error of a whole plan, in the unit of the scores."""
        inputs, error, scale = self.comparison(*values)
        selection = Selection(include, exclude, prefix)
        root, members = scored_clusters(network, selection, self.scheme)
        given = _bits_of_clusters(plan_or_bits, members, self.scheme.codebook)
        values = _values_of_clusters(root, members, (), given, self.scheme)
        with evaluating(network):
            _, measured = _mean_errors(
                _stages_of(network),
                self._chunks(inputs),
                {},
                (root, _chosen_values(values, given)),
                error,
                scale,
            )
        return measured

    def table(
        self, network, inputs, error, scale, selection=None, progress=True
    ):
        """Score every cluster of a network at every candidate.

        Arguments
        ---------
        inputs : torch.Tensor
            [items, ...]; chunks of it are moved to the network's device.
        """
        started = time.perf_counter()
        selection, scheme = selection or Selection(), self.scheme
        root, members = scored_clusters(network, selection, scheme)
        given = _bits_of_clusters(self.given, members, scheme.codebook)
        values = _values_of_clusters(
            root, members, self.candidate_bits, given, scheme
        )
        stages = _stages_of(network)
        tries = {
            cluster: _in_stage(
                stages,
                selection.prefix,
                [row[bits] for bits in self.candidate_bits],
            )
            for cluster, row in values.items()
        }
        with evaluating(network):
            errors, given_error = _mean_errors(
                stages,
                self._chunks(inputs),
                tries,
                given and (root, _chosen_values(values, given)),
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
            **table_sizes(root, members, scheme),
            method=self.method,
            signed=self.signed,
            details=details,
            codebook=scheme.codebook,
        )

    def _chunks(self, inputs):
        """The inputs, some items at a time."""
        if not len(inputs):
            raise ValueError("scoring needs at least one item of input")
        return inputs.split(self.chunk)
