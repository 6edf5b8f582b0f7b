"""Weights that others divide by: quantized to zero, they make infinity.

Layers of torch multiply by their weights. Others divide by them (widths,
temperatures), by the norms of their rows, or take their logarithm. Nobody can
see that in a weight, so it is tried: what a model puts out in evaluation is
looked at, and before a model is packed its modules of other classes are called
with random inputs of likely shapes. What is finite with float weights has to
be finite with quantized ones.
"""

import inspect
from contextlib import contextmanager

import torch

from .chains import chains, quantizer_of
from .parametrized import float_weights, is_traced, roots
from .tensors import is_expanded, is_torchs, named_tensors

_WHY = (
    "what is computed with it is NaN or infinite, and is not with its float "
    "values: some are quantized to zero, and something divides by them; give "
    "it more bits, or exclude: {}"
)


def watch_outputs(model):
    """Looks at what each part of a quantized model puts out in evaluation."""
    for root in roots(model):
        if "_once" in root.__dict__:
            handle = root.register_forward_hook(_look, with_kwargs=True)
            root.__dict__["_once"] += (handle,)


def _look(model, inputs, keywords, output):
    """After a forward in evaluation: refuse what float weights do not do."""
    if model.training or is_traced() or _is_finite(output):
        return
    if not _is_finite((inputs, keywords)):
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(), float_weights():
            finite = _is_finite(model.forward(*inputs, **keywords))
    except Exception:
        return  # it cannot be asked twice
    names = zeroed(model)
    if finite and names:
        raise ValueError(
            f"{type(model).__name__} puts out NaN or infinity, and does not "
            f"with float weights: some values of {', '.join(names)} are "
            "quantized to zero, and something divides by them: exclude: "
            f"{[f'*{name}' for name in names]}"
        )


def zeroed(model):
    """Names weights some values of which are quantized to zero.

    Those of classes that are not torch's, where there are any.
    """
    found = {
        name: tensor
        for name, tensor in named_tensors(model).items()
        if tensor.fake_quantize and _has_new_zeros(tensor)
    }
    others = [n for n, t in found.items() if not is_torchs(t.owners[0][0])]
    return others or list(found)


def _has_new_zeros(tensor):
    """Whether values are zero that are not in full precision."""
    weight = tensor.weight
    return bool(
        ((tensor.fake_quantize.levels(weight) == 0) & (weight != 0)).any()
    )


def not_finite(model):
    """Names weights that a model cannot be packed with.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized or not.

    Returns
    -------
    dict of str -> str
        Name -> why.

    Example
    -------
    >>> from speechbrain_mpq.quantization.quant_api import quantize_
    >>> class Divided(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.width = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
    ...
    ...     def forward(self, x):
    ...         return x / self.width
    >>> model = Divided()
    >>> _ = quantize_(model, 2)
    >>> list(not_finite(model))
    ['width']
    """
    found, owners = {}, {}
    for name, tensor in named_tensors(model).items():
        # Of a type that nothing computes with, or without values
        if tensor.reason or tensor.weight.is_meta:
            continue
        if not torch.isfinite(tensor.weight).all():
            found[name] = (
                "it has NaN or infinite values: its training has diverged. "
                "Take an earlier checkpoint"
            )
        elif tensor.fake_quantize and not is_torchs(tensor.owners[0][0]):
            if _has_new_zeros(tensor):
                owners.setdefault(tensor.owners[0][0], []).append(name)
    for module, names in owners.items():
        if not _stays_finite(module):
            found |= dict.fromkeys(names, _WHY.format(names))
    return found


def _stays_finite(module):
    """Whether no likely input makes NaN or infinity of quantized weights."""
    device = next(module.parameters()).device
    count = _required_inputs(module)
    with _evaluated(module), torch.no_grad(), torch.random.fork_rng():
        for shape in _likely_shapes(module):
            x = [torch.randn(shape, device=device) for _ in range(count)]
            try:
                with float_weights():
                    is_sound = _is_finite(module.forward(*x))
                if is_sound and not _is_finite(module.forward(*x)):
                    return False
            except Exception:
                continue  # it takes other inputs
    return True


def _required_inputs(module):
    """How many inputs a module takes at least."""
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    inputs = inspect.signature(module.forward).parameters.values()
    required = [i for i in inputs if i.kind in positional]
    return max(1, sum(i.default is i.empty for i in required))


def _likely_shapes(module):
    """Shapes of inputs that a module with such parameters may take."""
    sizes = {8}
    for attribute, chain in chains(module).items():
        if quantizer_of(chain) is not None:
            sizes |= set(getattr(module, attribute).shape)
    for size in sorted(sizes):
        yield from ((2, size), (2, 5, size), (2, size, 5), (2, size, 5, 5))


@contextmanager
def _evaluated(module):
    """Puts a module into evaluation mode inside; its buffers come back."""
    training = {inner: inner.training for inner in module.modules()}
    # Nobody can write to one that is expanded
    kept = [(b, b.clone()) for b in module.buffers() if not is_expanded(b)]
    module.eval()
    try:
        yield
    finally:
        for inner, was in training.items():
            inner.training = was
        with torch.no_grad():
            for buffer, values in kept:
                buffer.copy_(values)


def _is_finite(value):
    """Whether all tensors in something are finite."""
    if isinstance(value, torch.Tensor):
        floats = value.is_floating_point() or value.is_complex()
        return not floats or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return True
    return all(map(_is_finite, value))
