"""Which distribution a Brain's predictions are, to compare quantized ones with.

What `compute_forward` returns differs from recipe to recipe: a tensor, a
tuple of tensors and lengths, a dict, a PaddedBatch. Log-probabilities are
recognized by their values, not by their names.
"""

import torch

TOLERANCE = 1e-3  # of sums of probabilities; half floats have no more
EDGE = 1e-6  # masks keep this distance from 0 and 1, so that logits exist


class NoDistributionError(ValueError):
    """Predictions hold nothing that KL divergence is defined for."""


def distribution_type(tensor):
    """Which distribution a tensor holds."""
    if not tensor.is_floating_point() or tensor.dim() < 2 or not tensor.numel():
        return ""
    values = tensor.detach().float()
    if values.isnan().any():
        return ""
    if tensor.shape[-1] > 1:
        if (values <= TOLERANCE).all() and _sums_to_one(values.exp()):
            return "log_softmax"
        if (values >= 0).all() and _sums_to_one(values):
            return "softmax"
    inside = (values >= 0) & (values <= 1)
    return "sigmoid" if inside.all() else ""


def find_distributions(predictions):
    """All distributions in a Brain's predictions of the most telling kind.

    Log-probabilities come before probabilities and those before masks.
    """
    found = list(tensors_in(predictions))
    kinds = [distribution_type(tensor) for tensor in found]
    for kind in ("log_softmax", "softmax", "sigmoid"):
        if kind in kinds:
            return [tensor for tensor, k in zip(found, kinds) if k == kind]
    shapes = ", ".join(str(list(tensor.shape)) for tensor in found[:5])
    raise NoDistributionError(
        "the predictions hold no distribution to compare, only tensors of "
        f"shapes {shapes or 'none at all'}: give choose_bits output=, a "
        "function of the predictions that returns log-probabilities or a "
        'sigmoid mask, or use scores="loss" or "hessian", which need none'
    )


def find_output(predictions):
    """The first tensor in a Brain's predictions that its model put out."""
    return next((t for t in tensors_in(predictions) if t.requires_grad), None)


def to_log_probs(tensor):
    """A distribution as what KLScores takes, and which form of it.

    Example
    -------
    >>> to_log_probs(torch.tensor([[0.5, 0.25], [0.5, 1.0]]))[1]
    'bernoulli'
    >>> to_log_probs(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    (tensor([[ -0.6931,  -0.6931],
            [  0.0000, -87.3365]], dtype=torch.float64), 'categorical')
    """
    kind = distribution_type(tensor)
    if kind == "softmax":
        tensor = tensor.float().clamp_min(torch.finfo(torch.float32).tiny).log()
    if kind in ("log_softmax", "softmax"):
        # Float32 rows sum to one only nearly, which drowns small divergences.
        return tensor.double().log_softmax(-1), "categorical"
    if kind == "sigmoid":
        inside = tensor.float().clamp(EDGE, 1 - EDGE)
        return inside.logit(), "bernoulli"
    raise ValueError(
        f"output= returned a tensor of shape {list(tensor.shape)} that is "
        "neither log-probabilities, nor probabilities over the last axis, nor "
        "a mask from 0 to 1: end it with log_softmax or sigmoid"
    )


def tensors_in(predictions):
    """All tensors of nested predictions, in order.

    Yields
    ------
    torch.Tensor

    Example
    -------
    >>> one, two = torch.ones(1), torch.ones(2)
    >>> [len(t) for t in tensors_in({"a": (one, None), "b": [two, "text"]})]
    [1, 2]
    """
    if isinstance(predictions, torch.Tensor):
        yield predictions
    elif isinstance(predictions, dict):
        for value in predictions.values():
            yield from tensors_in(value)
    elif isinstance(predictions, list | tuple):
        for value in predictions:
            yield from tensors_in(value)
    elif hasattr(predictions, "__dict__"):
        yield from tensors_in(vars(predictions))


def _sums_to_one(values):
    """Whether all rows of the last axis sum to one."""
    return bool(((values.sum(-1) - 1).abs() < TOLERANCE).all())
