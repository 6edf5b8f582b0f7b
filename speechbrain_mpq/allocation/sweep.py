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
from operator import itemgetter

import torch
import torch.nn as nn
from speechbrain.utils.distributed import ddp_broadcast
from speechbrain.utils.logger import get_logger

from ..quantization.codebook import check_bits
from ..quantization.groups import split_name
from ..quantization.parametrized import attach, detach
from ..quantization.plan import BitPlan, Scheme, Selection
from ..quantization.quant_api import (
    clusters,
    fake_quantize,
    fit_tensor,
    written,
)
from ..quantization.tensors import named_tensors, near_misses
from ..utils import duration
from .scores import Scorer, ScoreTable
from .sharing import ResultLog, digest, process, share

logger = get_logger(__name__)


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


def quantized_values(root, names, bits, scheme=None, scales=None):
    """The values that tensors get at some bits.

    Arguments
    ---------
    scales : dict or None
        (name, bits) -> scale, where it is known; the others are added.

    Example
    -------
    >>> network = nn.Sequential(nn.PReLU(2))
    >>> _ = network[0].weight.data.copy_(torch.tensor([0.5, 0.1]))
    >>> quantized_values(network, ["0.weight"], 2)
    {'0.weight': tensor([0.5000, 0.0000])}
    """
    scheme, values = scheme or Scheme(), {}
    scales = {} if scales is None else scales
    for name in names:
        tensor = tensor_of(root, name)
        if (name, bits) not in scales:
            scales[name, bits] = fit_tensor(tensor, bits, scheme, name)
        alpha = scales[name, bits]
        values[name] = fake_quantize(tensor.weight, bits, scheme, alpha=alpha)
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


def _stages_of(network):
    """Named stages in order; a network that is no chain is its only stage."""
    if type(network).forward is nn.Sequential.forward:
        stages = list(network.named_children())
        weights = [id(w) for _, stage in stages for w in stage.parameters()]
        # Stages that share weights, or stand twice, change together.
        if len(stages) == len(network) and len(set(weights)) == len(weights):
            return stages
    return [("", network)]


def _stage_of(stages, prefix, names):
    """Index of the stage that a cluster's tensors are in, and its path."""
    for index, (stage, _) in enumerate(stages):
        path = "".join(f"{part}." for part in (prefix, stage) if part)
        if names[0].startswith(path):
            return index, path
    raise KeyError(names[0])


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


class _Sweep:
    """Errors of a network's output at each candidate, chunk by chunk.

    Results are named (chunk, cluster): summed errors, one for each candidate.
    With "" in place of a cluster it is what the full-precision output is
    divided by, the error of the base plan, and a digest of that output. A
    large model times all candidates would not fit into memory: scales are
    kept, values are made from them anew in each chunk.
    """

    def __init__(self, network, prefix, root, members, scorer):
        self.root, self.members = root, members
        self.candidates, self.scheme = scorer.candidate_bits, scorer.scheme
        self.stages = _stages_of(network)
        self.places = {
            cluster: _stage_of(self.stages, prefix, names)
            for cluster, names in members.items()
        }
        self._scales = {}  # (tensor, bits) -> scale
        self._chunk = None  # the one that is loaded
        self._base_plan = ExitStack()  # in which the base plan is in place
        self._early = {}  # results that were asked for beforehand

    def planned(self, bits):
        """Values of all tensors at their clusters' bits."""
        values = {}
        for cluster, width in bits.items():
            names = self.members[cluster]
            values |= quantized_values(self.root, names, width, self.scheme)
        return values

    @contextmanager
    def over(self, chunks, error, scale, base_values=None):
        """Ready to compute results of some chunks."""
        self.chunks, self.error, self.scale = chunks, error, scale
        self.base_values, self._plain = base_values, {}
        for name in base_values or ():
            self._plain[name] = tensor_of(self.root, name).weight.clone()
        with torch.no_grad():
            try:
                yield self
            finally:
                self._base_plan.close()
                self._chunk = None

    def __call__(self, name):
        """A result, see above."""
        if name in self._early:
            return self._early.pop(name)
        chunk, cluster = name
        if chunk != self._chunk:
            self._load(chunk)
        if not cluster:
            return self._summary
        errors = [
            self.error(self._reference, output, self._items)
            for output in self._outputs(cluster)
        ]
        return [float(error) for error in errors]

    def _load(self, chunk):
        """Run a chunk in full precision, and then at the base plan."""
        self._base_plan.close()
        start = sum(len(before) for before in self.chunks[:chunk])
        self._items = slice(start, start + len(self.chunks[chunk]))
        self._cache = self._inputs_of_stages(self.chunks[chunk])
        self._reference = reference = self._cache[-1]
        divisor, base_error = float(self.scale(reference, self._items)), 0.0
        if self.base_values is not None:
            self._base_plan.enter_context(replaced(self.root, self.base_values))
            self._cache = self._inputs_of_stages(self.chunks[chunk])
            errors = self.error(reference, self._cache[-1], self._items)
            base_error = float(errors)
        self._summary = [divisor, base_error, digest(reference)]
        self._chunk = chunk

    def _inputs_of_stages(self, inputs):
        """What goes into every stage and, last, the output of the chain."""
        first = next(w for _, s in self.stages for w in s.parameters())
        cache, self._seconds = [inputs.to(first.device)], []
        for _, stage in self.stages:
            started = time.perf_counter()
            cache.append(stage(cache[-1]))
            self._seconds.append(time.perf_counter() - started)
        if not isinstance(cache[-1], torch.Tensor):
            raise TypeError(
                "a network to be scored must return one tensor, not "
                f"{type(cache[-1]).__name__}; wrap it in a module that does"
            )
        return cache

    def _outputs(self, cluster):
        """The network's output at each candidate of one cluster."""
        index, path = self.places[cluster]
        _, changed = self.stages[index]
        inputs, outputs = self._cache[index], []
        for bits in self.candidates:
            values = self._values(cluster, bits)
            inside = {n.removeprefix(path): v for n, v in values.items()}
            with replaced(changed, inside):
                outputs.append(changed(inputs))
        output = torch.cat(outputs)
        for _, stage in self.stages[index + 1 :]:
            output = stage(output)
        return output.split(len(inputs))

    def _values(self, cluster, bits):
        """Values of a cluster's tensors, made from those in full precision."""
        names = self.members[cluster]
        own = {n: self._plain[n] for n in names if n in self._plain}
        with replaced(self.root, own):
            scheme, scales = self.scheme, self._scales
            return quantized_values(self.root, names, bits, scheme, scales)

    def costs(self):
        """Seconds that every result takes, by running the first chunk.

        Returns
        -------
        costs : dict
            Name of a result -> seconds, the same in all processes.
        first : list
            Names of those that tell whether weights and data are the same.
        """
        self._load(0)
        self._load(0)  # the first pass of all is slower than others
        steps = {
            cluster: len(self.candidates) * sum(self._seconds[index:])
            for cluster, (index, _) in self.places.items()
        }
        cheapest = min(steps, key=steps.get, default="")
        self((0, cheapest))  # scales are fitted, and all is in memory
        started = time.perf_counter()
        self._early[0, cheapest] = self((0, cheapest))
        took, estimate = time.perf_counter() - started, steps.get(cheapest, 0.0)
        # Copies and the comparison take time as well.
        factor = min(took / estimate, 1.0) if estimate else 1.0
        rest = max(took - estimate, 0.0)
        steps = {name: factor * cost + rest for name, cost in steps.items()}
        steps = {"": factor * sum(self._seconds), **steps}
        # By clusters, so that each one's scales are fitted in one process.
        costs = {
            (chunk, cluster): seconds * len(inputs) / len(self.chunks[0])
            for cluster, seconds in steps.items()
            for chunk, inputs in enumerate(self.chunks)
        }
        first = list(dict.fromkeys([(0, ""), (0, cheapest)]))
        return ddp_broadcast((costs, first))

    def totals(self, results):
        """Errors of every cluster and of the base plan, by the divisor."""
        divisor = base_error = 0.0
        totals = {c: [0.0] * len(self.candidates) for c in self.places}
        for chunk in range(len(self.chunks)):
            divisor += results[chunk, ""][0]
            base_error += results[chunk, ""][1]
            for cluster, row in totals.items():
                for which, error in enumerate(results[chunk, cluster]):
                    row[which] += error
        if not divisor:
            raise ValueError(
                "nothing to score: the full-precision output or its weights "
                "are all zero on this data"
            )
        errors = {n: [e / divisor for e in row] for n, row in totals.items()}
        return errors, base_error / divisor


class OutputScores(Scorer):
    """What all scorers have in common that compare a network's outputs.

    A score is a summed error over a summed scale. Any other module than a
    plain `nn.Sequential` is one single stage: then each cluster and candidate
    costs a full pass.

    Usually one cluster is quantized and all others are in full precision.
    With `given`, the base plan, the others have its bits, and the score is the
    error of the whole network, against full precision as ever. The table's
    details then hold "given_score", the error of the base plan itself.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to try for each cluster.
    chunk : int
        Items that go through the network at a time. Memory grows with chunk x
        candidates; the scores do not depend on it beyond rounding.
    given : BitPlan or int or None
        The base plan: bits of the clusters that are not being tried; those
        that it does not name stay in full precision.
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
        self.base_plan = given if plan_or_none else check_bits(given)

    def one_by_one(self):
        """A copy that passes single items, as those of other shapes need."""
        scorer = super().one_by_one()
        scorer.chunk = 1
        return scorer

    def comparison(self, *values):
        """How outputs are compared."""
        raise NotImplementedError("a subclass says what is compared")

    def score(self, network, values, selection, progress=True, folder=None):
        """Score a network, see `Scorer.score`."""
        compared = self.comparison(*(values[need] for need in self.needs))
        return self.table(network, *compared, selection, progress, folder)

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
        selection = Selection(include, exclude, prefix)
        compared = self.comparison(*values)
        sweep = self._sweep(network, selection)
        bits = self._bits(plan_or_bits, sweep)
        sweep.places = {}  # no cluster is scored
        with self._over(sweep, network, compared, bits):
            costs, first = sweep.costs()
            return sweep.totals(share(costs, sweep, witnesses=first))[1]

    def expected_seconds(
        self, network, *values, include=("*",), exclude=(), prefix=""
    ):
        """Tell how long scoring will take, by one pass and one cluster.

        Arguments
        ---------
        network : torch.nn.Module
        *values
            Those of `needs`, as for a call.
        include, exclude : sequence of str
            Patterns on parameter names.
        prefix : str
            Name of the network in its model.

        Returns
        -------
        float
            Of one process.
        """
        sweep = self._sweep(network, Selection(include, exclude, prefix))
        bits = self._bits(self.base_plan, sweep)
        with self._over(sweep, network, self.comparison(*values), bits):
            return sum(sweep.costs()[0].values())

    def table(
        self,
        network,
        inputs,
        error,
        scale,
        selection=None,
        progress=True,
        folder=None,
    ):
        """Score every cluster of a network at every candidate.

        Arguments
        ---------
        inputs : torch.Tensor
            [items, ...]; chunks of it are moved to the network's device.
        """
        started = time.perf_counter()
        selection = selection or Selection()
        sweep = self._sweep(network, selection)
        bits = self._bits(self.base_plan, sweep)
        log = ResultLog(folder, self._settings(sweep, selection, inputs))
        with self._over(sweep, network, (inputs, error, scale), bits):
            costs, first = sweep.costs()
            self._tell(sweep, sum(costs.values()), len(inputs))
            results = share(
                *(costs, sweep, log, first, "scoring", progress),
                order=itemgetter(0),  # one chunk after the other
            )
        log.close()
        errors, base_error = sweep.totals(results)
        details = {"items": len(inputs)}
        if bits:
            details["given_score"] = base_error
        details["seconds"] = round(time.perf_counter() - started, 2)
        return ScoreTable(
            scores={
                cluster: dict(zip(self.candidate_bits, row))
                for cluster, row in errors.items()
            },
            **table_sizes(sweep.root, sweep.members, self.scheme),
            method=self.method,
            signed=self.signed,
            details=details,
            codebook=self.scheme.codebook,
        )

    def _sweep(self, network, selection):
        """What scores a network's clusters."""
        root_and_members = scored_clusters(network, selection, self.scheme)
        return _Sweep(network, selection.prefix, *root_and_members, self)

    def _bits(self, plan_or_bits, sweep):
        """Bits of the clusters that have some while others are scored."""
        codebook = self.scheme.codebook
        return _bits_of_clusters(plan_or_bits, sweep.members, codebook)

    @contextmanager
    def _over(self, sweep, network, compared, bits):
        """A sweep over some inputs, some items at a time."""
        inputs, error, scale = compared
        if not len(inputs):
            raise ValueError("scoring needs at least one item of input")
        base_values = sweep.planned(bits) if bits else None
        chunks = inputs.split(self.chunk)
        with evaluating(network), sweep.over(chunks, error, scale, base_values):
            yield

    def _settings(self, sweep, selection, inputs):
        """What scores depend on besides weights and data, for JSON."""
        plan = isinstance(self.base_plan, BitPlan)
        return {
            "method": self.method,
            "candidate_bits": self.candidate_bits,
            "given": self.base_plan.to_dict() if plan else self.base_plan,
            "scheme": repr(self.scheme),
            "prefix": selection.prefix,
            "members": sweep.members,
            "items": len(inputs),
            "chunk": self.chunk,
        }

    def _tell(self, sweep, seconds, items):
        """Say how long it will take, before it begins."""
        _, count = process()
        shared = f" in {count} processes" if count > 1 else ""
        logger.info(
            f"Scoring {len(sweep.members)} clusters at "
            f"{len(self.candidate_bits)} candidates on {items} items takes "
            f"{duration(seconds / count)}{shared}"
        )
