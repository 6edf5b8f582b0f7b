"""Traces of the Hessian's diagonal blocks without the Hessian.

Equation numbers are those of "Mixed precision DNN quantization for overlapped
speech separation and recognition" (ICASSP 2022).
"""

import torch
from tqdm import tqdm

PILOTS = 10  # probes that only find the scales; their estimates do not count

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

    Arguments
    ---------
    gradients : sequence of torch.Tensor
        Of a scalar by each parameter, with their own graph
        (`create_graph=True`), which is kept.
    parameters : sequence of torch.Tensor
        In the same order.
    probe : sequence of torch.Tensor
        Random values of the parameters' shapes.

    Returns
    -------
    forms : torch.Tensor
        [parameters], float64.

    Example
    -------
    >>> x, y = (torch.ones(1, requires_grad=True) for _ in range(2))
    >>> loss = (x**2 + 3 * x * y + 4 * y**2).sum()  # H: 2 3, 3 8
    >>> gradients = torch.autograd.grad(loss, (x, y), create_graph=True)
    >>> probe = torch.tensor([1.0]), torch.tensor([-1.0])
    >>> quadratic_forms(gradients, (x, y), probe)  # 2 - 3 and 8 - 3
    tensor([-1.,  5.], dtype=torch.float64)
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

    Arguments
    ---------
    losses : sequence of callable
        Each computes one summand, a scalar tensor, from the parameters.
    blocks : list of list of torch.Tensor
        Parameters of each block; they require gradients.
    probes : int
        Probes of each summand, 2 or more.
    distribution : str
        "gaussian" or "rademacher".
    seed : int
        Of the probes.
    progress : bool
        Shows a progress bar.

    Returns
    -------
    estimates : torch.Tensor
        [probes, blocks], float64: independent draws of noise around the
        traces. Their mean is the estimate, their spread its error.

    Example
    -------
    >>> x = torch.ones(3, requires_grad=True)
    >>> y = torch.ones(1, requires_grad=True)
    >>> losses = [lambda: (x**2).sum(), lambda: 5 * y.square().sum()]
    >>> block_traces(losses, [[x], [y]], 2, "rademacher", seed=0)
    tensor([[ 6., 10.],
            [ 6., 10.]], dtype=torch.float64)
    """
    parameters = [weight for block in blocks for weight in block]
    shapes = [[weight.shape for weight in block] for block in blocks]
    drawn = BalancedProbes(shapes, distribution, seed)
    totals = torch.zeros(probes, len(blocks), dtype=torch.float64)

    def estimate():
        probe = [z.to(w) for z, w in zip(drawn.draw(), parameters)]
        return drawn.estimates(quadratic_forms(gradients, parameters, probe))

    steps = PILOTS + probes * len(losses)
    with tqdm(total=steps, desc="Hessian", disable=not progress) as bar:
        for index, loss in enumerate(losses):
            gradients = torch.autograd.grad(
                loss(), parameters, create_graph=True, materialize_grads=True
            )
            for _ in range(PILOTS if index == 0 else 0):
                estimate()
                bar.update()
            for row in totals:
                row += estimate()
                bar.update()
    return totals
