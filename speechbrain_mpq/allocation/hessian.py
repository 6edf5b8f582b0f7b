"""Score by curvature: the Hessian's traces times squared quantization errors.

Equation numbers are those of "Mixed precision DNN quantization for overlapped
speech separation and recognition" (ICASSP 2022). Traces of diagonal blocks are
estimated with probes z (Hutchinson), without the Hessian. For losses that
autograd cannot differentiate twice, CTC and recurrent layers in fused kernels,
two gradients on both sides of the weights make a product with a probe:

    H z = (g(w + h z) - g(w - h z)) / 2 h + O(h^2)

Kinks, as of a ReLU, count with the curvature that they have over the step,
where a second derivative does not see them.
"""

import time
from collections import defaultdict
from contextlib import contextmanager
from itertools import accumulate

import torch
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from ..quantization.groups import split_name
from ..quantization.tensors import named_tensors
from .scores import Scorer, ScoreTable
from .sharing import (
    ResultLog,
    digest,
    gathered,
    process,
    share,
    weights_digest,
)
from .sweep import (
    evaluating,
    parametrized,
    quantized_values,
    scored_clusters,
    table_sizes,
    tensor_of,
)

# They only find the scales; their estimates do not count.
WARMUP_PROBES = 10
DISTRIBUTIONS = {
    "gaussian": lambda shape, generator: torch.randn(
        shape, generator=generator
    ),
    "rademacher": lambda shape, generator: (
        torch.randint(2, shape, generator=generator) * 2.0 - 1.0
    ),
}
STEP = 0.01  # of a tensor's root mean square; a 4-bit table rounds by more
SMALLEST = 0.1  # of all weights' root mean square, for tensors of zeros
logger = get_logger(__name__)
NOISY = 0.5  # standard error over trace from which a cluster is warned of
TRACES = ("total", "average")
LOSS = "loss of the first items"


def quadratic_forms(gradients, parameters, probe):
    """z'Hz of every parameter's own part of the probe: a summand of Eq. 10.

    One Hessian-vector product, a backward pass through the gradients, serves
    all parameters. Part c of H z is H_cc z_c plus what the other parts of the
    probe add by the cross blocks; times z_c these have zero mean, as the parts
    are independent of each other.

    Returns
    -------
    forms : torch.Tensor
        [parameters], float64.
    """
    # A gradient that depends on no parameter has no graph, and no curvature.
    curved = [i for i, g in enumerate(gradients) if g.requires_grad]
    if not curved:
        return torch.zeros(len(parameters), dtype=torch.float64)
    products = torch.autograd.grad(
        [gradients[i] for i in curved],
        parameters,
        [probe[i] for i in curved],
        retain_graph=True,
        materialize_grads=True,
    )
    forms = [
        (z * product).sum(dtype=torch.float64)
        for z, product in zip(probe, products, strict=True)
    ]
    return torch.stack(forms).cpu()


class BalancedProbes:
    """Random probes whose part for each block has a scale of its own.

    With one scale for all, a block with little curvature drowns in what the
    cross blocks bring over from the others. A block's part is scaled with
    1 / sqrt(|e|), |e| the geometric mean of its estimates so far, and its
    estimate divided by the scale squared. The scale does not depend on the
    probe that it is used for, so that the estimate stays unbiased, and is a
    power of two, which rounds nothing.

    Arguments
    ---------
    shapes : list of list of torch.Size
        Shapes of the tensors of each block.
    distribution : str
        "gaussian" or "rademacher", both of variance one.
    seed : int
        Of the random numbers, the same on every device.

    Example
    -------
    >>> probes = BalancedProbes([[(2,)], [(1,)]], "rademacher", seed=0)
    >>> probes.estimates(torch.tensor([64.0, 1.0]))
    tensor([64.,  1.], dtype=torch.float64)
    >>> [part.abs() for part in probes.draw()]  # 1 / sqrt(64), 1 / sqrt(1)
    [tensor([0.1250, 0.1250]), tensor([1.])]
    """

    def __init__(self, shapes, distribution, seed):
        self.shapes = [shape for block in shapes for shape in block]
        lengths = torch.tensor([len(block) for block in shapes])
        self.block = torch.arange(len(shapes)).repeat_interleave(lengths)
        self.values = DISTRIBUTIONS[distribution]
        self.generator = torch.Generator().manual_seed(seed)
        self.logs = torch.zeros(len(shapes), dtype=torch.float64)
        self.counts = torch.zeros(len(shapes), dtype=torch.float64)

    @property
    def scales(self):
        """Scale of each block, [blocks]; one where nothing is known."""
        return torch.exp2((-0.5 * self.logs / self.counts.clamp_min(1)).round())

    def draw(self):
        """A probe: one tensor for each shape."""
        scales = self.scales[self.block].tolist()
        return [
            self.values(shape, self.generator) * scale
            for shape, scale in zip(self.shapes, scales)
        ]

    def estimates(self, forms):
        """Trace of each block from the last probe's forms; learns the scales.

        Arguments
        ---------
        forms : torch.Tensor
            z'Hz, one value for each tensor.

        Returns
        -------
        traces : torch.Tensor
            [blocks], float64.
        """
        traces = torch.zeros_like(self.logs)
        traces.index_add_(0, self.block, forms.double())
        traces /= self.scales.square()
        nonzero = traces.isfinite() & (traces != 0)
        self.logs += torch.where(nonzero, traces.abs(), 1.0).log2()
        self.counts += nonzero
        return traces


def block_traces(
    losses,
    blocks,
    probes,
    distribution="gaussian",
    seed=0,
    progress=False,
    log=None,
):
    """Traces of the diagonal blocks of a sum's Hessian (Eq. 10).

    Every summand gets probes of its own: for the same number of
    Hessian-vector products that is never worse than probing the sum when all
    summands are convex, and far better when they curve in different
    directions. One graph of a summand's gradient serves all of its probes.

    Returns
    -------
    estimates : torch.Tensor
        [probes, blocks], float64: independent draws of noise around the
        traces. Their mean is the estimate, their spread its error.
    """
    parameters = [weight for block in blocks for weight in block]
    shapes = [[weight.shape for weight in block] for block in blocks]
    drawn = BalancedProbes(shapes, distribution, seed)
    products = _SecondDerivatives(losses, parameters)
    return _estimates(drawn, products, len(losses), probes, progress, log)


def difference_traces(
    losses,
    weights,
    probes,
    distribution="rademacher",
    seed=0,
    progress=False,
    log=None,
):
    """Traces of the diagonal blocks of a sum's Hessian (Eq. 10).

    Returns
    -------
    estimates : torch.Tensor
        [probes, blocks], float64: independent draws around the traces.
    """
    drawn = BalancedProbes([[w.shape] for w in weights], distribution, seed)
    products = _Differences(losses, weights)
    return _estimates(drawn, products, len(losses), probes, progress, log)


def _estimates(drawn, products, summands, probes, progress, log):
    """Estimates of all traces, [probes, blocks], added up over the summands."""
    # Each probe depends on the scales that those before it have led to. So
    # processes look ahead: they compute probes side by side with the scales of
    # now, and throw away those before which the scales have turned out others.
    log = ResultLog(None, None) if log is None else log
    rank, count = process()
    team = min(products.team, count)  # processes that make one estimate
    steps = [(0, None)] * WARMUP_PROBES  # summand, row of the totals
    steps += [
        (index, row) for index in range(summands) for row in range(probes)
    ]
    totals = torch.zeros(probes, len(drawn.logs), dtype=torch.float64)
    finished, done = dict(log.known), 0
    hidden = rank or not progress
    with tqdm(total=len(steps), desc="Hessian", disable=hidden) as bar:
        while done < len(steps):
            scales = drawn.scales
            name, alike = f"probe {done}", digest(scales)
            if (name, alike) in finished:
                drawn.draw()
                estimates, states = [finished[name, alike]], []
            else:
                ahead = min(count // team, len(steps) - done)
                probe, states = _draw(drawn, ahead, rank // team)
                part, place = None, done + rank // team
                if probe is not None:
                    part = products(steps[place][0], probe, scales)
                parts = gathered(part)[: ahead * team]
                estimates = [
                    sum(parts[start : start + team], [])
                    for start in range(0, len(parts), team)
                ]
                if probe is not None and rank % team == 0:
                    log.add((f"probe {place}", alike), estimates[rank // team])
            before = done
            for forms in estimates:
                estimate = drawn.estimates(
                    torch.tensor(forms, dtype=torch.float64)
                )
                row = steps[done][1]
                if row is not None:
                    totals[row] += estimate
                done += 1
                bar.update()
                if not torch.equal(scales, drawn.scales):
                    break
            if states:
                drawn.generator.set_state(states[done - before - 1])
    return totals


def _draw(drawn, count, own):
    """One's own of the next probes, and the generator's state after each."""
    probe, states = None, []
    for number in range(count):
        values = drawn.draw()
        states.append(drawn.generator.get_state())
        if number == own:
            probe = values
    return probe, states


class _SecondDerivatives:
    """z'Hz of summands, by differentiating their gradients."""

    team = 1

    def __init__(self, losses, parameters):
        self.losses, self.parameters = losses, parameters
        self._index = self._gradients = None

    def __call__(self, index, probe, scales):
        """The forms of one summand's Hessian, a float for each parameter."""
        del scales
        if index != self._index:
            self._index, self._gradients = index, None  # frees the graph
            self._gradients = torch.autograd.grad(
                self.losses[index](),
                self.parameters,
                create_graph=True,
                materialize_grads=True,
            )
        probe = [z.to(w) for z, w in zip(probe, self.parameters)]
        forms = quadratic_forms(self._gradients, self.parameters, probe)
        return forms.tolist()


class _Differences:
    """z'Hz of summands, by gradients on both sides of the weights.

    Two processes take a side each.
    """

    team = 2

    def __init__(self, losses, weights):
        self.losses, self.weights = losses, weights
        self._lengths = _lengths(weights)

    def __call__(self, index, probe, scales):
        """The forms of one summand's Hessian, a float for each weight."""
        # Of a team, one process gives those of the first weights, the other
        # those of the rest.
        step = STEP * (self._lengths / scales).min().item()
        loss, weights = self.losses[index], self.weights
        probe = [z.to(w) for z, w in zip(probe, weights)]
        rank, count = process()
        if count == 1:
            sides = (
                _gradients_at(loss, weights, probe, side * step)
                for side in (1, -1)
            )
            return _forms(probe, *sides, step)
        second = rank % 2
        own = _gradients_at(loss, weights, probe, -step if second else step)
        middle = _middle([weight.numel() for weight in weights])
        halves = slice(None, middle), slice(middle, None)
        kept = halves[second]
        theirs = _exchanged(own[halves[1 - second]], own[kept], rank ^ 1)
        sides = (theirs, own[kept]) if second else (own[kept], theirs)
        return _forms(probe[kept], *sides, step)


def _middle(sizes):
    """How many of some weights are about half of all their values."""
    ends = [0, *accumulate(sizes)]
    return min(range(len(ends)), key=lambda n: abs(2 * ends[n] - ends[-1]))


def _exchanged(given, like, other):
    """Give another process some tensors, and take as many as are like these."""
    sent = [torch.distributed.isend(g.contiguous(), other) for g in given]
    taken = [torch.empty_like(g).contiguous() for g in like]
    for tensor in taken:
        torch.distributed.recv(tensor, other)
    for request in sent:
        request.wait()
    return taken


def _lengths(weights):
    """What a step is relative to, [weights]: the root mean squares."""
    squares = [weight.detach().double().square() for weight in weights]
    total = sum(square.sum().item() for square in squares)
    count = sum(weight.numel() for weight in weights)
    least = max(SMALLEST * (total / count) ** 0.5, 1e-6)
    return torch.tensor([max(s.mean().item() ** 0.5, least) for s in squares])


def _forms(probe, ahead, behind, step):
    """z'Hz of every weight's own part of the probe."""
    forms = [
        (z.double() * (a.double() - b)).sum().cpu() / (2 * step)
        for z, a, b in zip(probe, ahead, behind)
    ]
    return torch.stack(forms).tolist() if forms else []


def _gradients_at(loss, weights, probe, step):
    """Gradients with the weights moved along the probe."""
    with _moved(weights, probe, step):
        return torch.autograd.grad(loss(), weights, materialize_grads=True)


@contextmanager
def _moved(weights, probe, step):
    """Weights moved along a probe; the old values come back bit-exact."""
    saved = [weight.detach().clone() for weight in weights]
    try:
        for weight, z in zip(weights, probe):
            weight.data.add_(z, alpha=step)
        yield
    finally:
        for weight, value in zip(weights, saved):
            weight.data.copy_(value)


def _network_traces(
    network,
    inputs,
    loss,
    weights,
    chunk=1,
    differences=False,
    log=None,
    **probing,
):
    """Traces of the mean loss's Hessian, one for each tensor (Eq. 10)."""
    if not len(inputs):
        raise ValueError("scoring needs at least one item of input")

    def summand(start):
        items = slice(start, min(start + chunk, len(inputs)))
        value = loss(network(inputs[items].to(weights[0].device)), items)
        _check_loss(value)
        return value / len(inputs)

    losses = [
        lambda start=start: summand(start)
        for start in range(0, len(inputs), chunk)
    ]
    with evaluating(network), _differentiable(network, weights):
        # Whether weights and data are the same, here and before.
        share({LOSS: 1}, lambda _: losses[0]().item(), log, [LOSS])
        if differences:
            return difference_traces(losses, weights, log=log, **probing)
        blocks = [[weight] for weight in weights]
        return block_traces(losses, blocks, log=log, **probing)


@contextmanager
def _differentiable(network, weights):
    """Gradients for these weights only; the old flags come back."""
    flags = [(weight, weight.requires_grad) for weight in network.parameters()]
    network.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)


def _check_loss(value):
    """Refuses what autograd would refuse less clearly."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise TypeError(
            "the loss must return one tensor of one value, the sum over its "
            f"items, not {value!r}"
        )
    if not value.requires_grad:
        raise ValueError(
            "the loss has no gradient by the network's weights: compute it "
            "from the output without detach() or torch.no_grad()"
        )


class HessianScores(Scorer):
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
    chunk : int
        Items that share a probe. One has the least error and memory, and on a
        CPU is as fast as more.
    seed : int
        Of the probes.
    differences : bool
        Take differences of first gradients, for losses that cannot be
        differentiated twice, as CTC (see `difference_traces`).
    **scheme : dict
        As for `Scorer`.

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
    {'0': {2: 20.0, 3: 0.0}}
    >>> table.details["traces"]
    {'0': {'trace': 20.0, 'standard_error': 0.0}}
    """

    needs = ("inputs", "loss")

    def __init__(
        self,
        candidate_bits=(2, 4, 8, 16),
        probes=50,
        trace="total",
        distribution="gaussian",
        chunk=1,
        seed=1234,
        differences=False,
        **scheme,
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
        super().__init__(candidate_bits, **scheme)
        self.probes = probes
        self.trace = trace
        self.distribution = distribution
        self.chunk = chunk
        self.seed = seed
        self.differences = differences
        self.method = f"{trace}_hessian_trace"

    def one_by_one(self):
        """A copy that passes single items."""
        scorer = super().one_by_one()
        scorer.chunk = 1
        return scorer

    def score(self, network, values, selection, progress=True, folder=None):
        """Score a network, see `Scorer.score`.

        The loss must be one that can be differentiated twice, or
        `differences` be True.
        """
        started = time.perf_counter()
        inputs, loss = values["inputs"], values["loss"]
        root, members = scored_clusters(network, selection, self.scheme)
        log = ResultLog(folder, self._settings(network, members, len(inputs)))
        errors = self._squared_errors(root, members, log)
        traces, tensor_traces = self._traces(
            network, inputs, loss, root, members, progress, log
        )
        log.close()
        _report(traces, self.probes)
        sizes = table_sizes(root, members, self.scheme)
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
            scores=scores,
            **sizes,
            method=self.method,
            details=details,
            codebook=self.scheme.codebook,
        )

    def _settings(self, network, members, items):
        """What scores depend on besides the data, for JSON."""
        own = {
            name: value for name, value in vars(self).items() if name[0] != "_"
        }
        return {
            **own,
            "scheme": repr(self.scheme),
            "members": members,
            "items": items,
            "weights": weights_digest(network),
        }

    def _squared_errors(self, root, members, log):
        """errors[cluster][bits][tensor]: ||f(w) - w||^2."""

        def rows(cluster):
            names = members[cluster]
            weights = {n: tensor_of(root, n).weight for n in names}
            errors = []
            for bits in self.candidate_bits:
                values = quantized_values(root, names, bits, self.scheme)
                row = [_squared_error(weights[n], values[n]) for n in names]
                errors.append(row)
            return errors

        costs = {
            cluster: sum(tensor_of(root, n).weight.numel() for n in names)
            for cluster, names in members.items()
        }
        return {
            cluster: {
                bits: dict(zip(members[cluster], row))
                for bits, row in zip(self.candidate_bits, errors)
            }
            for cluster, errors in share(costs, rows, log).items()
        }

    def _traces(self, network, inputs, loss, root, members, progress, log):
        """Traces of the mean loss's Hessian by cluster, and by tensor."""
        names = [name for row in members.values() for name in row]
        with _leaves(root, names) as weights:
            estimates = _network_traces(
                network,
                inputs,
                loss,
                weights,
                probes=self.probes,
                distribution=self.distribution,
                seed=self.seed,
                chunk=self.chunk,
                progress=progress,
                differences=self.differences,
                log=log,
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


class _Joined(torch.nn.Module):
    """A parameter put together from groups of its output channels."""

    def __init__(self, parts):
        super().__init__()
        self.parts = torch.nn.ParameterList(parts)

    def forward(self, whole):
        """The groups side by side, instead of the parameter itself."""
        return torch.cat(list(self.parts))


@contextmanager
def _leaves(root, names):
    """Parameters to differentiate by; groups of channels as their own."""
    leaves, groups = {}, defaultdict(list)
    for name in names:
        tensor = tensor_of(root, name)
        if tensor.rows is ... and tensor.chain is None:
            leaves[name] = tensor.parameter
        else:
            leaves[name] = torch.nn.Parameter(tensor.weight.clone())
            groups[split_name(name)[0]].append(leaves[name])
    places = []
    for parameter, parts in groups.items():
        owners = named_tensors(root)[parameter].owners
        places += [(*owner, _Joined(parts)) for owner in owners]
    with parametrized(places):
        yield [leaves[name] for name in names]


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
    relative_errors = sorted(
        row["standard_error"] / abs(row["trace"])
        for row in traces.values()
        if row["trace"]
    )
    if relative_errors:
        logger.info(
            f"Hessian traces of {len(traces)} clusters with {probes} probes: "
            f"standard error {relative_errors[len(relative_errors) // 2]:.1%} "
            f"in the median, {relative_errors[-1]:.1%} at most"
        )
    if noisy:
        logger.warning(
            f"{len(noisy)} of {len(traces)} Hessian traces are negative or "
            f"have a standard error above {NOISY:.0%} of them: "
            f"{', '.join(noisy[:5])}{', ...' if len(noisy) > 5 else ''}. "
            "More probes or more calibration items make them sharper"
        )
