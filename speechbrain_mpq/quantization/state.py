"""What a model is besides its weights: buffers, and state of other kinds.

SpeechBrain's modules may keep state outside of ``state_dict``, with hooks that
save and load it (``mark_as_saver``): ``InputNormalization`` does so with its
statistics. torch's modules may have an extra state. Both are stored as plain
values and tensors, never as pickles: JSON, in bytes, under the module's name
and "@saver" or "@extra", and its tensors behind it, "@saver.0".

Large buffers are stored once where they are equal, not at all where their
class makes the same ones for every new module, and as integers where these are
exact (dropout masks, zeros).
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import torch
from torch.nn.parameter import UninitializedTensorMixin

from ..utils import scratch_folder, strict_json
from .codebook import TERNARY_BITS, dequantize, nearest_levels
from .container import DTYPES
from .fake_quant import FakeQuantize
from .tensors import NamedTensor, plain_buffers

SAVER, EXTRA, SAME = "@saver", "@extra", "@same"
LARGE = 4096  # bytes from which a buffer is worth a second look
PLAIN = (type(None), bool, int, float, str)

# Classes whose buffers follow from their sizes: how to make another one.
_MADE_ALIKE = {
    "speechbrain.lobes.models.transformer.Transformer.PositionalEncoding": (
        lambda m: type(m)(m.pe.shape[-1], m.pe.shape[-2])
    ),
    "speechbrain.lobes.models.dual_path.PositionalEncoding": (
        lambda m: type(m)(m.pe.shape[-1], m.pe.shape[-2])
    ),
    "speechbrain.lobes.models.dual_path.PyTorchPositionalEncoding": (
        lambda m: type(m)(m.pe.shape[-1], m.dropout.p, m.pe.shape[0])
    ),
    "speechbrain.nnet.attention.PrecomputedRoPESinusoids": (
        lambda m: type(m)(*m.cosines.shape, m.cosines.dtype, "cpu")
    ),
}


class NotStorableError(ValueError):
    """A state that no packed file can hold."""


class JsonText(str):
    """A file of JSON, as a module's own hook writes and reads it."""


def stored_buffers(model):
    """Finds the persistent buffers of a model but those of its quantizers."""
    try:
        stored = model.state_dict(keep_vars=True)
    except Exception as error:
        raise ValueError(
            f"the model's own state_dict hook fails ({error!r}): it wants a "
            "weight that has another name while it is quantized; exclude that "
            "weight, or the module"
        ) from error
    return {n: b for n, b in plain_buffers(model).items() if n in stored}


def made_alike(model):
    """Names the large buffers that every new module of their class has."""
    alike = set()
    for path, module in model.named_modules():
        kind = type(module)
        make = _MADE_ALIKE.get(f"{kind.__module__}.{kind.__qualname__}")
        if make is None or not any(map(_is_large, module._buffers.values())):
            continue
        try:
            new = make(module)._buffers
        except (AttributeError, TypeError, ValueError, RuntimeError):
            continue  # of another version of SpeechBrain
        for name, buffer in module._buffers.items():
            if _is_large(buffer) and _same(buffer, new.get(name)):
                alike.add(f"{path}.{name}" if path else name)
    return alike


def equal_buffers(buffers):
    """Finds large buffers that are equal to one before them."""
    first, equal = {}, {}
    for name in sorted(n for n, b in buffers.items() if _is_large(b)):
        buffer = buffers[name]
        if buffer.dtype not in DTYPES:
            continue
        digest = hashlib.sha256(_bytes(buffer)).digest()
        key = buffer.dtype, tuple(buffer.shape), digest
        if first.setdefault(key, name) != name:
            equal[name] = first[key]
    return equal


def as_integers(name, buffer, granularity="tensor"):
    """Describes a large buffer as integers, where these are exact.

    Example
    -------
    >>> masks = torch.tensor([0.0, 1.25]).repeat(2000)
    >>> as_integers("masks", masks).fake_quantize
    FakeQuantize(bits=1.6, scales=1, codebook=midtread)
    >>> as_integers("window", torch.hann_window(4000)) is None
    True
    """
    if not (_is_large(buffer) and buffer.is_floating_point()):
        return None
    buffer = buffer.detach().cpu()
    magnitude = buffer.abs()
    largest = magnitude.max()
    between = (magnitude != 0) & (magnitude != largest)
    if not torch.isfinite(largest) or between.any():
        return None
    bits = TERNARY_BITS if largest > 0 and (magnitude == 0).any() else 1
    tensor = NamedTensor(name, buffer)
    alpha = largest.float().expand(tensor.scale_shape(granularity)).clone()
    exact = dequantize(nearest_levels(buffer, bits, alpha), alpha, buffer.dtype)
    if not _same(exact, buffer):  # negative zeros, or finer than float32
        return None
    tensor.fake_quantize = FakeQuantize(bits, alpha)
    return tensor


def module_states(model):
    """Collects what modules keep outside of parameters and buffers."""
    states, refused = {}, {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for kind, read in ((SAVER, _saved_state), (EXTRA, _extra_state)):
            try:
                state = read(module)
                if state is not None:
                    encode(state, prefix + kind)  # whether it can be
                    states[prefix + kind] = state
            except NotStorableError as error:
                refused[prefix + kind] = str(error)
    return states, refused


def set_module_states(model, states):
    """Give modules back what `module_states` collected, or change nothing."""
    before, _ = module_states(model)
    try:
        _set(model, states)
        after, _ = module_states(model)
        for name in states:
            if encoded(after.get(name)) != encoded(states[name]):
                raise ValueError(f"{name} is another after loading it")
    except Exception:
        _set(model, {n: before[n] for n in states if n in before})
        raise


def encoded(state):
    """Writes a state as bytes, to compare it."""
    if state is None:
        return []
    tensors = encode(state, "").values()
    return [f"{t.dtype}{tuple(t.shape)}".encode() + _bytes(t) for t in tensors]


def encode(state, name):
    """Writes a state as tensors.

    Arguments
    ---------
    state : object
        None, numbers, strings and tensors in lists, tuples and dictionaries.
    name : str
        Of the state.

    Returns
    -------
    dict of str -> torch.Tensor
        The first one holds JSON.

    Example
    -------
    >>> tensors = encode({"count": 3, "mean": torch.ones(2)}, "@saver")
    >>> list(tensors), bytes(tensors["@saver"].tolist())
    (['@saver', '@saver.0'], b'{"dict":[["count",3],["mean",{"tensor":0}]]}')
    >>> decode_states(dict(tensors))
    ({}, {'@saver': {'count': 3, 'mean': tensor([1., 1.])}})
    """
    tensors = []
    try:
        tree = _encode(state, tensors)
        text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False)
        if strict_json(text, packed=True) != tree:
            raise NotStorableError("it does not come back from JSON")
    except (RecursionError, UnicodeError, ValueError) as error:
        raise NotStorableError(str(error)) from error
    content = torch.tensor(list(text.encode()), dtype=torch.uint8)
    parts = {f"{name}.{i}": tensor for i, tensor in enumerate(tensors)}
    return {name: content, **parts}


def decode_states(floats):
    """Takes the states out of the tensors of a file, which may be anybody's."""
    plain = {n: t for n, t in floats.items() if "@" not in n}
    kept = {n: t for n, t in floats.items() if n not in plain}
    same = kept.pop(SAME, None)
    if same is not None:
        plain = _with_equal(plain, _json_of(same))
    states = {}
    for name in sorted(kept):
        if name.rpartition(".")[2] not in (SAVER, EXTRA):
            continue
        content = kept.pop(name)
        parts, index = [], 0
        while (part := kept.pop(f"{name}.{index}", None)) is not None:
            parts.append(part)
            index += 1
        used = []
        states[name] = _decode(_json_of(content), parts, used)
        if sorted(used) != list(range(len(parts))):
            raise ValueError(f"{name} does not use each of its tensors once")
    if kept:
        raise ValueError(f"{min(kept)} is of no state")
    return plain, states


def _with_equal(floats, same):
    """Buffers that are stored under one name only under all of them."""
    if not isinstance(same, dict):
        raise ValueError(f"{SAME} is no JSON object")
    floats = dict(floats)
    for name, first in same.items():
        if name in floats or not isinstance(first, str) or "@" in name:
            raise ValueError(f"{name[:80]!r} is stored twice")
        floats[name] = floats[first]
    return floats


def _json_of(content):
    """What a tensor of bytes holds."""
    if content.dtype != torch.uint8 or content.dim() != 1:
        raise ValueError("a state that is no vector of bytes")
    return strict_json(bytes(content.numpy()), packed=True)


def _encode(state, tensors):
    """A state as what JSON can hold; tensors go to a list."""
    if isinstance(state, torch.Tensor):
        if state.dtype not in DTYPES or state.layout != torch.strided:
            raise NotStorableError(f"tensors of {state.dtype} have no place")
        tensors.append(state.detach().cpu().contiguous())
        return {"tensor": len(tensors) - 1}
    if isinstance(state, JsonText):
        return {"json": str(state)}
    if type(state) in PLAIN:
        if isinstance(state, float) and not math.isfinite(state):
            return {"float": str(state)}
        return state
    if type(state) is list:
        return [_encode(value, tensors) for value in state]
    if type(state) in (tuple, torch.Size):
        return {"tuple": [_encode(value, tensors) for value in state]}
    if isinstance(state, dict):
        pairs = state.items()
        both = [[_encode(k, tensors), _encode(v, tensors)] for k, v in pairs]
        return {"dict": both}
    raise NotStorableError(f"a {type(state).__name__} has no place in a file")


def _decode(tree, tensors, used):
    """Undoes ``_encode``; ValueError or the like where nobody wrote it."""
    if isinstance(tree, list):
        return [_decode(value, tensors, used) for value in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        if type(value) is not int or not 0 <= value < len(tensors):
            raise ValueError("a state without its tensor")
        used.append(value)
        return tensors[value]
    if kind == "float" and value in ("nan", "inf", "-inf"):
        return float(value)
    if kind == "json" and isinstance(value, str):
        strict_json(value, packed=True)  # what cannot execute anything
        return JsonText(value)
    if kind == "tuple" and isinstance(value, list):
        return tuple(_decode(v, tensors, used) for v in value)
    if kind == "dict" and isinstance(value, list):
        pairs = [[_decode(v, tensors, used) for v in pair] for pair in value]
        return dict(pairs)
    raise ValueError(f"a state with {kind[:40]!r}")


def _hooks():
    """SpeechBrain's hooks for checkpoints, if anybody has imported it."""
    return sys.modules.get("speechbrain.utils.checkpoints")


def own_hook(module, kind):
    """Finds a hook for checkpoints that a module's class brought along."""
    if _hooks() is None:
        return None
    defaults = getattr(_hooks(), f"DEFAULT_{kind}_HOOKS")
    base = next((k for k in type(module).__mro__ if k in defaults), None)
    return None if base in (None, torch.nn.Module) else defaults[base]


def read_saved(module):
    """Reads what a module's own hook saves."""
    hook = own_hook(module, "SAVE")
    with scratch_folder() as folder:
        path = Path(folder) / "state"
        # Past the wrapper that lets the main process save alone.
        getattr(hook, "__wrapped__", hook)(module, path)
        if not path.is_file():
            raise NotStorableError("its own hook saves no single file")
        content = path.read_bytes()
        if content[:2] == b"PK":
            try:
                return torch.load(path, "cpu", weights_only=True)
            except Exception as error:
                raise NotStorableError(
                    "its own hook saves more than tensors and plain values"
                ) from error
    try:
        # JSON is no pickle: whoever loads it can be given it.
        text = JsonText(content.decode())
        strict_json(text, packed=True)
    except ValueError as error:
        raise NotStorableError(
            "its own hook saves neither a state of torch nor JSON"
        ) from error
    return text


def _saved_state(module):
    """What a module's own hook saves, where it is not in state_dict too."""
    hook = own_hook(module, "SAVE")
    if hook is None:
        return None
    try:
        state = read_saved(module)
    except NotStorableError:
        raise
    except Exception as error:
        raise NotStorableError(f"its own hook fails ({error!r})") from error
    # Adapters save what is trained, heads leave out what is frozen.
    rest, held = _split_held(state, module.state_dict())
    if _is_nothing(rest) and (held or state == {}):
        return None
    if own_hook(module, "LOAD") is None:
        raise NotStorableError("its own hook saves what none loads")
    return None if _is_nothing(rest) else rest


def _split_held(state, own):
    """A state without what ``state_dict`` holds too, and the latter."""
    # Its weights are stored with the others, quantized ones as integers.
    if not isinstance(state, dict):
        return state, {}
    rest, held = {}, {}
    for key, value in state.items():
        if isinstance(value, dict):
            rest[key], inner = _split_held(value, own)
            if inner:
                held[key] = inner
        elif _is_held(key, value, own):
            held[key] = value
        else:
            rest[key] = value
    return rest, held


def _is_held(key, value, own):
    """Whether a tensor is in a state dict, by the end of its name there."""
    if not isinstance(value, torch.Tensor) or not isinstance(key, str):
        return False
    return any(
        f".{name}".endswith(f".{key}") and _same(value, other.to(value.dtype))
        for name, other in own.items()
        if isinstance(other, torch.Tensor)
    )


def _joined(held, rest):
    """Undoes ``_split_held``."""
    if not isinstance(rest, dict) or not isinstance(held, dict):
        return rest
    inner = {k: _joined(held.get(k), value) for k, value in rest.items()}
    return {**held, **inner}


def _is_nothing(state):
    """Whether a state is that of a module which has seen no data."""
    if isinstance(state, torch.Tensor):
        return not state.numel()
    if isinstance(state, dict):
        return all(map(_is_nothing, state.values()))
    return not state


def _extra_state(module):
    """What a module has as its extra state, or None."""
    if type(module).get_extra_state is torch.nn.Module.get_extra_state:
        return None
    state = module.get_extra_state()
    if state is None:
        raise NotStorableError("an extra state of None")
    return state


def _set(model, states):
    """Give modules their states."""
    for name, state in states.items():
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        if kind == EXTRA:
            module.set_extra_state(state)
            continue
        with scratch_folder() as folder:
            file = Path(folder) / "state"
            state = _completed(module, state)
            if isinstance(state, JsonText):
                file.write_text(state, encoding="utf-8")
            else:
                torch.save(state, file)
            own_hook(module, "LOAD")(module, file, True)


def _completed(module, state):
    """A state with what was not stored in it, as the module has that."""
    try:
        _, held = _split_held(read_saved(module), module.state_dict())
    except NotStorableError:
        return state
    return _joined(held, state) if held else state


def unknown_state(model, stored_ids):
    """Names what is in ``state_dict`` and neither parameter nor buffer."""
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    names |= {n for n, _ in model.named_buffers(remove_duplicate=False)}
    return {
        name: "in state_dict, but neither parameter nor buffer"
        for name, value in model.state_dict(keep_vars=True).items()
        if name not in names
        and id(value) not in stored_ids
        and not name.endswith("_extra_state")
    }


def why_not(name, tensor):
    """Tells why a tensor cannot be stored; empty where it can."""
    if isinstance(tensor, UninitializedTensorMixin):
        return "without a shape before the first forward"
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.dtype not in DTYPES:
        return f"its type {tensor.dtype} is not supported"
    if tensor.layout != torch.strided:
        return f"its layout {tensor.layout} is not supported"
    if "@" in name:
        return "its name is taken by the format"
    return ""


def _is_large(buffer):
    """Whether a buffer is worth a second look."""
    if buffer is None or isinstance(buffer, UninitializedTensorMixin):
        return False
    size = buffer.numel() * buffer.element_size()
    return size >= LARGE and buffer.device.type != "meta"


def _same(one, other):
    """Whether two tensors are the same, bit for bit."""
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return _bytes(one) == _bytes(other)


def _bytes(tensor):
    """A tensor's bytes."""
    tensor = tensor.detach().cpu().contiguous().reshape(-1)
    return tensor.view(torch.uint8).numpy().tobytes()
