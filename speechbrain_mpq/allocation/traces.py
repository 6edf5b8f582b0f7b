"""Traces of the Hessian's diagonal blocks without the Hessian.

Equation numbers are those of "Mixed precision DNN quantization for overlapped
speech separation and recognition" (ICASSP 2022).

Traces of the Hessian from differences of first gradients.

For losses that autograd cannot differentiate twice: CTC, and recurrent layers
in fused kernels. Two gradients on both sides of the weights make a product of
the Hessian with a probe:

    H z = (g(w + h z) - g(w - h z)) / 2 h + O(h^2)

Kinks, as of a ReLU, count with the curvature that they have over the step,
where a second derivative does not see them.

Curvature of a network's mean loss by each of its weights.
"""

from contextlib import contextmanager

import torch
from tqdm import tqdm

from .sweep import evaluating

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
        known = traces.isfinite() & (traces != 0)
        self.logs += torch.where(known, traces.abs(), 1.0).log2()
        self.counts += known
        return traces


def block_traces(losses, blocks, probes, distribution, seed, progress=False):
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
    totals = torch.zeros(probes, len(blocks), dtype=torch.float64)

    def estimate():
        probe = [z.to(w) for z, w in zip(drawn.draw(), parameters)]
        return drawn.estimates(quadratic_forms(gradients, parameters, probe))

    steps = WARMUP_PROBES + probes * len(losses)
    with tqdm(total=steps, desc="Hessian", disable=not progress) as bar:
        for index, loss in enumerate(losses):
            gradients = torch.autograd.grad(
                loss(), parameters, create_graph=True, materialize_grads=True
            )
            for _ in range(WARMUP_PROBES if index == 0 else 0):
                estimate()
                bar.update()
            for row in totals:
                row += estimate()
                bar.update()
    return totals


STEP = 0.01  # of a tensor's root mean square; a 4-bit table rounds by more
SMALLEST = 0.1  # of all weights' root mean square, for tensors of zeros


def difference_traces(
    losses, weights, probes, distribution="rademacher", seed=0, progress=False
):
    """Traces of the diagonal blocks of a sum's Hessian (Eq. 10).

    Returns
    -------
    estimates : torch.Tensor
        [probes, blocks], float64: independent draws around the traces.
    """
    drawn = BalancedProbes([[w.shape] for w in weights], distribution, seed)
    lengths = _lengths(weights)
    totals = torch.zeros(probes, len(weights), dtype=torch.float64)

    def estimate(loss):
        step = STEP * (lengths / drawn.scales).min().item()
        probe = [z.to(w) for z, w in zip(drawn.draw(), weights)]
        return drawn.estimates(_forms(loss, weights, probe, step))

    steps = WARMUP_PROBES + probes * len(losses)
    with tqdm(total=steps, desc="Hessian", disable=not progress) as bar:
        for index, loss in enumerate(losses):
            for _ in range(WARMUP_PROBES if index == 0 else 0):
                estimate(loss)
                bar.update()
            for row in totals:
                row += estimate(loss)
                bar.update()
    return totals


def _lengths(weights):
    """What a step is relative to, [weights]: the root mean squares."""
    squares = [weight.detach().double().square() for weight in weights]
    total = sum(square.sum().item() for square in squares)
    count = sum(weight.numel() for weight in weights)
    least = max(SMALLEST * (total / count) ** 0.5, 1e-6)
    return torch.tensor([max(s.mean().item() ** 0.5, least) for s in squares])


def _forms(loss, weights, probe, step):
    """z'Hz of every weight's own part of the probe, [weights]."""
    ahead, behind = (
        _gradients_at(loss, weights, probe, side * step) for side in (1, -1)
    )
    return torch.stack(
        [
            (z.double() * (a.double() - b)).sum().cpu() / (2 * step)
            for z, a, b in zip(probe, ahead, behind)
        ]
    )


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


def network_traces(
    network,
    inputs,
    loss,
    weights,
    probes,
    distribution="gaussian",
    seed=0,
    chunk=1,
    progress=False,
    differences=False,
):
    """Traces of the mean loss's Hessian, one for each tensor (Eq. 10).

    The network is in eval mode meanwhile: batch normalization has fixed
    statistics, and items do not depend on each other.

    Arguments
    ---------
    inputs : torch.Tensor
        [items, ...]; chunks of it are moved to the network's device.

    Returns
    -------
    estimates : torch.Tensor
        [probes, tensors], float64; see `block_traces`.

    Example
    -------
    >>> network = torch.nn.Conv1d(1, 1, 1)
    >>> def loss(output, items):
    ...     return output.square().sum() / 2
    >>> inputs = torch.tensor([1.0, 2.0, 3.0, 0.0]).view(2, 1, 2)
    >>> network_traces(  # (1 + 4 + 9 + 0) / 2 items and (1 + 1 + 1 + 1) / 2
    ...     network, inputs, loss, list(network.parameters()), 500
    ... ).mean(0).round()
    tensor([7., 2.], dtype=torch.float64)
    """
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
        if differences:
            return difference_traces(
                losses, weights, probes, distribution, seed, progress
            )
        return block_traces(
            losses,
            [[weight] for weight in weights],
            probes,
            distribution,
            seed,
            progress,
        )


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
