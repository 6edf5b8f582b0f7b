"""Optimizers of ADMM's primal problem: extra-gradient steps with a penalty.

A step looks ahead first and goes by the gradient that it finds there:

    Tbar = T - eta1 grad L(T),    T <- T - eta2 grad L(Tbar)

so that each needs two gradients on the same batch: `extrapolate()` takes the
first, `step()` the second. With no look-ahead (`extrapolation=0`) these are
plain gradient steps.
"""

import torch

from ..quantization.admm_steps import augmented_gradient, proximal_step

SMALLEST_RMS = 1e-3  # of a tensor that steps are relative to
FINE_LEVEL = 1 / 6  # of the root mean square; about a level at five bits


class ExtraGradient(torch.optim.Optimizer):
    """Extra-gradient steps on the augmented Lagrangian, as in the paper.

    Parameters that are not quantized take the same steps without penalty.

    Arguments
    ---------
    params : iterable of torch.nn.Parameter
        What to train.
    lr : float
        Step size eta2.
    extrapolation : float
        Look-ahead eta1 in units of the step size; the paper's 0.02 / 0.001.

    Example
    -------
    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = ExtraGradient([weight], lr=0.25, extrapolation=2.0)
    >>> weight.square().sum().backward()  # gradient 2
    >>> optimizer.extrapolate()
    >>> weight.item()
    0.0
    >>> optimizer.zero_grad()
    >>> weight.square().sum().backward()  # gradient 0 there
    >>> optimizer.step()
    >>> weight.item()
    1.0
    """

    def __init__(self, params, lr=0.001, extrapolation=20.0, **defaults):
        if lr < 0 or extrapolation < 0:
            raise ValueError(
                f"lr and extrapolation must not be negative, not {lr!r} and "
                f"{extrapolation!r}"
            )
        defaults.update(lr=lr, extrapolation=extrapolation)
        super().__init__(params, defaults)
        self.penalty = 0.0
        self.estimators = {}  # parameter -> its ADMM parametrization
        self._origins = {}  # parameter -> where the look-ahead started

    @property
    def looks_ahead(self):
        """Whether a step needs `extrapolate()` before."""
        return any(group["extrapolation"] for group in self.param_groups)

    @torch.no_grad()
    def extrapolate(self):
        """Go to Tbar, from where `step()` comes back."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._origins[parameter] = parameter.clone()
                if parameter.grad is not None:
                    size = group["extrapolation"]
                    self._move(parameter, parameter, group, size, keep=False)

    @torch.no_grad()
    def step(self, closure=None):
        """Step from T by the gradient at Tbar.

        Arguments
        ---------
        closure : None
            There for torch's interface only.
        """
        if closure is not None:
            raise ValueError("extra-gradient steps take no closure")
        if self.looks_ahead and not self._origins:
            raise RuntimeError(
                "call extrapolate() with a gradient of the same batch before "
                "step(), or construct with extrapolation=0"
            )
        for group in self.param_groups:
            for parameter in group["params"]:
                origin = self._origins.pop(parameter, parameter)
                if parameter.grad is None:
                    parameter.copy_(origin)
                else:
                    self._move(parameter, origin, group, 1.0, keep=True)

    def _move(self, parameter, origin, group, size, keep):
        """Set a parameter to `size` steps from an origin, by its gradient."""
        gradient = parameter.grad
        estimator = self.estimators.get(parameter)
        if estimator is not None:
            gradient = augmented_gradient(
                gradient,
                parameter,
                estimator.projection,
                estimator.dual,
                self.penalty,
            )
        parameter.copy_(origin - size * group["lr"] * gradient)


class AdamExtraGradient(ExtraGradient):
    """Extra-gradient steps by Adam's direction, in units of the codebook.

    Made for runs of a few hundred steps. A step changes a weight by about
    `lr` of the distance of its codebook's levels, so that tensors of all
    sizes and widths can change levels; finer codebooks than of five bits, and
    parameters that are not quantized, count as of five. The penalty is apart
    from the direction, as a proximal step, and means the same for every
    tensor: a step takes away penalty / (1 + penalty) of T - f + lam.

    Arguments
    ---------
    params : iterable of torch.nn.Parameter
        What to train.
    lr : float
        Step size in levels.
    extrapolation : float
        Look-ahead in units of the step.
    betas : tuple of float
        Adam's forgetting factors of the gradient and of its square.
    eps : float
        Added to the root of the latter.

    Example
    -------
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0, 0.0, 5.0]))
    >>> optimizer = AdamExtraGradient([weight], lr=0.6, extrapolation=0.0)
    >>> (weight * torch.tensor([1.0, 1.0, 0.0, -9.0])).sum().backward()
    >>> optimizer.step()  # a tenth of the root mean square, 3.5355
    >>> weight.data
    tensor([ 2.6464, -4.3536,  0.0000,  5.3536])
    """

    def __init__(
        self,
        params,
        lr=0.03,
        extrapolation=0.0,
        betas=(0.9, 0.99),
        eps=1e-8,
    ):
        super().__init__(params, lr, extrapolation, betas=betas, eps=eps)

    def _move(self, parameter, origin, group, size, keep):
        """Set a parameter to `size` steps from an origin, by its gradient."""
        direction = self._direction(parameter, group, keep)
        rms = origin.square().mean().sqrt().clamp_min(SMALLEST_RMS)
        level = FINE_LEVEL * rms
        estimator = self.estimators.get(parameter)
        if estimator is not None:
            level = torch.maximum(level, estimator.alpha)
        moved = origin - size * group["lr"] * level * direction
        if estimator is not None:
            moved = proximal_step(
                moved,
                estimator.projection,
                estimator.dual,
                size * self.penalty,
            )
        parameter.copy_(moved)

    def _direction(self, parameter, group, keep):
        """Adam's direction; its averages change only where they are kept."""
        state, gradient = self.state[parameter], parameter.grad
        zero = torch.zeros_like(parameter)
        forget_mean, forget_square = group["betas"]
        mean = torch.lerp(gradient, state.get("mean", zero), forget_mean)
        square = torch.lerp(
            gradient.square(), state.get("square", zero), forget_square
        )
        step = state.get("step", torch.tensor(0.0)) + 1
        if keep:
            state.update(mean=mean, square=square, step=step)
        mean = mean / (1 - forget_mean**step)
        square = square / (1 - forget_square**step)
        return mean / (square.sqrt() + group["eps"])
