"""Whether a packed model is that of a module."""

from collections import defaultdict

from .container import PackedModelError
from .row_groups import split_name


def check_fit(packed, targets):
    """Refuses a packed model that is not the given model's.

    Arguments
    ---------
    packed : PackedModel
    targets : dict of str -> torch.Tensor
        All tensors of the model by name, on the meta device or another.
    """
    problem = _difference(packed, targets)
    if problem:
        raise PackedModelError(
            packed.path,
            problem,
            "load it into the architecture that it was packed from",
        )


def _difference(packed, targets):
    """How a file's tensors differ from a model's; empty if they do not."""
    shapes = _shapes(packed)
    missing = sorted(set(targets) - set(shapes))
    unexpected = sorted(set(shapes) - set(targets))
    if missing or unexpected:
        return (
            f"another model: lacks {_some(missing)}; adds {_some(unexpected)}"
        )
    for name, target in targets.items():
        shape, dtype = shapes[name]
        if dtype is None and target.is_floating_point():
            dtype = target.dtype  # integers become any type of floats
        if (shape, dtype) != (tuple(target.shape), target.dtype):
            return (
                f"{name} is {shape} {dtype or 'quantized'}, the model's is "
                f"{tuple(target.shape)} {target.dtype}"
            )
    return ""


def _shapes(packed):
    """Parameter name -> (shape, type), the type None where quantized."""
    shapes = {n: (tuple(t.shape), t.dtype) for n, t in packed.floats.items()}
    rows = defaultdict(int)
    for name, tensor in packed.quantized.items():
        parameter, cut = split_name(name)
        shape = tuple(tensor.integers.shape)
        if cut is not ...:
            rows[parameter] += shape[0]
            shape = (rows[parameter], *shape[1:])
        shapes[parameter] = (shape, None)
    return shapes


def _some(names):
    """The first names of a list, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "nothing") + more
