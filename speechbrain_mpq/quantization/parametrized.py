"""Quantizers in their place: behind a module's weight, as a parametrization.

The module keeps its identity and its float weight (``original``), which the
optimizer goes on training. A quantizer comes last: where a module has
parametrizations of its own, such as weight norm, it is the weight that they
result in which is quantized.

Reading a quantized weight computes it. It is computed once in a forward pass
of the whole model (see ``computed_once``), and in one of the module that owns
it. What is read outside of the module's own forward may be written to, as
initializations do: what was written counts as the float weight from the next
reading on, with a scale that fits it.
"""

import threading
import weakref
from contextlib import contextmanager
from functools import partial, wraps

import torch
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from .chains import (
    Fixed,
    chains,
    fit_again,
    float_weight,
    follow_writes,
    hook_optimizers,
    is_own,
    note,
    quantizer_of,
)
from .fake_quant import FakeQuantize

LOOK_FOR_HOOKS = (
    torch.nn.MultiheadAttention,
    torch.nn.Transformer,
    torch.nn.TransformerDecoder,
    torch.nn.TransformerDecoderLayer,
    torch.nn.TransformerEncoder,
    torch.nn.TransformerEncoderLayer,
)


class Constant(torch.nn.Module):
    """Puts a value in the place of whatever a weight results in.

    Arguments
    ---------
    value : torch.Tensor
        Of the weight's shape.
    """

    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self, weight):
        """Gives the value."""
        return self.value


def attach(module, attribute, fake_quantize):
    """Quantizes one weight of a module from now on."""
    if chains(module):
        _unshare_class_(module)
    parametrize.register_parametrization(module, attribute, fake_quantize)
    hook = partial(_accept_full_precision, attribute)
    chain = module.parametrizations[attribute]
    chain.load_hooks = (
        module.register_load_state_dict_pre_hook(hook),
        module.register_load_state_dict_post_hook(_refit_loaded),
    )
    chain.save_hook = chain.register_state_dict_pre_hook(_settle_before)
    _own_class_(module, attribute)
    hook_optimizers()
    note([chain])


def detach(module, attribute, keep_quantized=False):
    """Undoes ``attach``."""
    chain = module.parametrizations[attribute]
    settle(chain)
    quantized = chain().detach().clone()
    _unshare_class_(module)
    for handle in (*chain.load_hooks, chain.save_hook):
        handle.remove()
    if len(chain) > 1:
        del chain.load_hooks, chain.save_hook
        chain.pop(len(chain) - 1)
        _plain_class_(module, attribute)
        if keep_quantized:
            fix_(module, attribute, quantized)
        return
    parametrize.remove_parametrizations(
        module, attribute, leave_parametrized=False
    )
    _plain_class_(module, attribute)
    if keep_quantized:
        with torch.no_grad():
            getattr(module, attribute).copy_(quantized)


def _unshare_class_(module):
    """Give a parametrized module a class of its own."""
    # torch edits the class that it made for the module, and a deep copy of the
    # module shares that class.
    kind = type(module)
    module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))


def copies_apart(model):
    """Lets what is done to deep copies of a model be done to these only.

    ``remove_parametrizations`` of a copy would edit the class that it shares
    with the module, whose weight would be gone: SpeechBrain's HiFiGAN recipe
    makes such copies to listen to.
    """
    for module in model.modules():
        kind = type(module)
        plain = vars(kind).get("__deepcopy__")  # torch's, made for this class
        if chains(module) and plain and not hasattr(plain, "plain"):
            kind.__deepcopy__ = _apart(plain)


def _apart(plain):
    """A deep copy that has a class of its own."""

    @wraps(plain)
    def copied(self, memo):
        is_copied = id(self) in memo
        with _without_graph(self):
            copy = plain(self, memo)
        if not is_copied and type(copy) is type(self):
            _unshare_class_(copy)
        return copy

    copied.plain = plain
    return copied


@contextmanager
def _without_graph(module):
    """Hides what a recurrent layer has computed last, which torch cannot copy.

    It computes that anew in every forward.
    """
    computed = module.__dict__.get("_flat_weights")
    if computed is not None:
        module.__dict__["_flat_weights"] = []
    try:
        yield
    finally:
        if computed is not None:
            module.__dict__["_flat_weights"] = computed


def fix_(module, attribute, value):
    """Replaces a module's own parametrizations of a weight by their result."""
    old = module.parametrizations[attribute]
    trained = any(parameter.requires_grad for parameter in old.parameters())
    with torch.no_grad():
        like = module.parametrizations[attribute]()
        value = value.to(like).clone()
    parameter = torch.nn.Parameter(value, requires_grad=trained)
    new = ParametrizationList([Fixed()], parameter)
    module.parametrizations[attribute] = new.train(old.training)


def old_weight_norm(module):
    """Names the directions of ``torch.nn.utils.weight_norm`` in a module.

    Other than ``torch.nn.utils.parametrizations.weight_norm`` it computes the
    weight in a hook, where no quantizer can follow.
    """
    hooks = module._forward_pre_hooks.values()
    return {f"{h.name}_v" for h in hooks if isinstance(h, WeightNorm)}


def _accept_full_precision(attribute, module, state_dict, prefix, *_):
    """Lets a checkpoint of the plain module load into the quantized one."""
    inside = f"{prefix}parametrizations.{attribute}."
    chain = chains(module).get(attribute)
    if chain is None:  # removed by remove_parametrizations
        return
    arrived = state_dict.pop(f"{prefix}{attribute}", None)
    if arrived is not None:
        state_dict[f"{inside}original"] = arrived
    elif is_own(chain):
        last = f"{inside}{len(chain) - 1}."
        floats = f"{inside}original"
        inner = [name for name in state_dict if name.startswith(inside)]
        quantized = any(name.startswith(last) for name in inner)
        if quantized or not any(name.startswith(floats) for name in inner):
            return
    else:
        return
    chain.took_float = True  # for whoever wants to fit the scale again
    for name, value in chain.state_dict().items():
        state_dict.setdefault(f"{inside}{name}", value)


def _refit_loaded(module, incompatible):
    """After loading: fit scales to float values that have arrived."""
    del incompatible
    for attribute, chain in chains(module).items():
        if quantizer_of(chain) is None:
            continue
        if chain.__dict__.pop("took_float", False):
            refit_chain(chain, attribute)
        elif chain.__dict__.pop("took_part", False):
            fit_again(chain)
        note([chain])


class _Pass(threading.local):
    """What was computed in the forward passes that are running."""

    def __init__(self):
        self.depth = 0  # of modules whose forward is running
        self.weights = {}  # (chain, ...) -> versions and quantized weight
        self.owners = []  # modules that are running and own a weight
        self.floats = False  # whether weights are read as they are trained


_PASS = _Pass()
# What was read and may have been written to since: chain -> tensor, values.
_READ = weakref.WeakKeyDictionary()


def roots(model):
    """Finds the modules of a model that are called from outside."""
    if isinstance(model, torch.nn.ModuleDict | torch.nn.ModuleList):
        for child in model.children():
            yield from roots(child)
    # torch's own transformers look for hooks, and then run otherwise.
    elif not isinstance(model, LOOK_FOR_HOOKS):
        yield model


def computed_once(model):
    """Computes each quantized weight once in every forward of a model."""
    for root in roots(model):
        inner = [c for m in root.modules() for c in chains(m).values()]
        if not inner or "_once" in root.__dict__:
            continue
        root.__dict__["_chains"] = inner
        before = root.register_forward_pre_hook(_enter, prepend=True)
        after = root.register_forward_hook(_leave, always_call=True)
        root.__dict__["_once"] = before, after


def computed_always(model):
    """Undoes ``computed_once``."""
    for module in model.modules():
        for handle in module.__dict__.pop("_once", ()):
            handle.remove()
        module.__dict__.pop("_chains", None)


def _enter(model, inputs):
    """Before a model's forward."""
    del inputs
    if not _PASS.depth and not is_traced():
        follow_writes(model.__dict__.get("_chains", ()))
    _PASS.depth += 1
    _PASS.owners.append(None)


def _leave(*_):
    """After a model's forward, whether it failed or not."""
    if not _PASS.depth:  # it failed before it began
        return
    _PASS.owners.pop()
    _PASS.depth -= 1
    if not _PASS.depth:
        _PASS.weights.clear()


@contextmanager
def float_weights():
    """Lets quantized weights be read in full precision inside."""
    _PASS.floats = True
    try:
        yield
    finally:
        _PASS.floats = False


def settle(chain):
    """Takes over what was written into the weight that was last read.

    Arguments
    ---------
    chain : torch.nn.utils.parametrize.ParametrizationList
        Of one weight, quantized.
    """
    if not _READ:
        return
    read = _READ.pop(chain, None)
    if read is None:
        return
    tensor, values = read[0].detach(), read[1]
    if tensor.shape == values.shape and torch.equal(tensor, values):
        return
    quantizer = quantizer_of(chain)
    if quantizer is None:
        return
    with torch.no_grad():
        tensor = tensor.to(values).expand_as(values)
        weight = float_weight(chain)
        if weight is not chain._parameters.get("original"):
            raise RuntimeError(
                "a quantized weight that has other parametrizations was "
                "written to in place: assign to it, or write before "
                "quantizing"
            )
        # Where nothing was written the float value is more than was read.
        weight.copy_(torch.where(tensor == values, weight, tensor))
        quantizer.refit(weight)


def _settle_before(chain, *_):
    """Before a chain's state is saved."""
    settle(chain)
    follow_writes([chain])


def _own_class_(module, attribute):
    """Give the class that torch made for the module its way of reading."""
    kind = type(module)
    read, write = vars(kind)[attribute].fget, vars(kind)[attribute].fset
    if not hasattr(read, "plain"):

        def fget(self):
            return _read(self, attribute, read)

        def fset(self, value):
            _write(self, attribute, write, value)

        fget.plain = read
        fset.plain = write
        setattr(kind, attribute, property(fget, fset))
    if "forward" not in vars(kind):
        kind.forward = _in_a_pass(kind.forward)
        kind.register_parameter = _refusing(kind.register_parameter)
        if hasattr(kind, "reset_parameters"):
            kind.reset_parameters = _then_refit(kind.reset_parameters)


def _plain_class_(module, attribute):
    """Undo ``_own_class_`` where the class is still torch's."""
    kind = type(module)
    own = vars(kind).get(attribute)
    if isinstance(own, property) and hasattr(own.fget, "plain"):
        plain = property(own.fget.plain, own.fset.plain)
        setattr(kind, attribute, plain)
    left = chains(module).values()
    if left and not any(quantizer_of(chain) for chain in left):
        for name in ("forward", "reset_parameters", "register_parameter"):
            if hasattr(vars(kind).get(name), "plain"):
                delattr(kind, name)


def _in_a_pass(plain):
    """A module's own forward, in which every weight is computed once."""

    @wraps(plain)
    def forward(self, *arguments, **keywords):
        if not _PASS.depth and not is_traced():
            follow_writes(chains(self).values())
        _PASS.depth += 1
        _PASS.owners.append(self)
        try:
            return plain(self, *arguments, **keywords)
        finally:
            _leave()

    forward.plain = plain
    return forward


def _refusing(plain):
    """A module's way to take parameters, but for those that are quantized."""

    @wraps(plain)
    def register_parameter(self, name, parameter):
        if name in chains(self) and parameter is not None:
            raise ValueError(
                f"{name} is quantized, and cannot become another parameter: "
                f"write values to it (module.{name}.data.copy_), and tie "
                "parameters before they are quantized"
            )
        plain(self, name, parameter)

    register_parameter.plain = plain
    return register_parameter


def _then_refit(plain):
    """A module's own way to begin anew, which may set scales, too."""

    @wraps(plain)
    def reset_parameters(self, *arguments, **keywords):
        result = plain(self, *arguments, **keywords)
        refit_(self)
        return result

    reset_parameters.plain = plain
    return reset_parameters


def refit_(module):
    """Fits the scales of a module's own weights again."""
    for attribute, chain in chains(module).items():
        settle(chain)
        if quantizer_of(chain) is not None:
            refit_chain(chain, attribute)
            note([chain])


@torch.no_grad()
def refit_chain(chain, name):
    """Fits the scale of a chain; NaN and infinity are refused by name."""
    weight = float_weight(chain)
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{name} has NaN or infinite values: load sound weights"
        )
    quantizer_of(chain).refit(weight)


def _write(module, attribute, write, value):
    """``module.weight = value``: the float weight, which the scale follows."""
    settle(module.parametrizations[attribute])
    _PASS.weights.clear()
    write(module, value)


def _read(module, attribute, read):
    """The quantized weight, computed or as it was in the same pass."""
    if is_traced():
        return read(module)
    chain = module._modules["parametrizations"]._modules[attribute]
    settle(chain)
    if _PASS.floats:
        return float_weight(chain)
    if not _PASS.depth:
        follow_writes([chain])
    own = bool(_PASS.owners) and _PASS.owners[-1] is module
    if not _PASS.depth or parametrize._cache_enabled or _recorded():
        value = _computed(chain, module, read)
    else:
        key = id(chain), torch.is_grad_enabled()
        versions = _versions(chain)
        cached = _PASS.weights.get(key)
        if cached is None or cached[0] != versions or cached[1] is not chain:
            value = _computed(chain, module, read)
            cached = versions, chain, value
            _PASS.weights[key] = cached
        value = cached[2]
    if own and getattr(module, "max_norm", None) is not None:
        # torch's tables write to the rows that they look up.
        return value.clone()
    if not own:
        _READ[chain] = value, value.detach().clone()
    return value


def is_traced():
    """Whether a compiler looks on, which must see what is computed only."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _as_parameter(chain, value):
    """A weight that requires gradients where its parameter does."""
    # Without gradients, too, as a parameter does: matrix products round
    # otherwise, and SpeechBrain's complex layers leave out a bias that does
    # not.
    if value.requires_grad or torch.is_grad_enabled():
        return value
    trained = any(p.requires_grad for p in chain._parameters.values())
    return value.detach().requires_grad_() if trained else value


def _recorded():
    """Whether a segment is checkpointed: all of it is computed again later."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _versions(chain):
    """What changes when anything that a weight depends on is written to."""
    only = _only_quantizer(chain)
    if only is None:
        held = [*chain.parameters(), *chain.buffers()]
    else:
        held = [chain._parameters["original"], *only._parameters.values()]
        held += only._buffers.values()
    if held[0].is_inference():  # they have no versions
        return object()
    return [tensor._version for tensor in held]


def _only_quantizer(chain):
    """The quantizer of a chain that consists of nothing else, or None."""
    modules = chain._modules
    only = modules.get("0") if len(modules) == 1 else None
    plain = isinstance(only, FakeQuantize) and "original" in chain._parameters
    return only if plain else None


def _computed(chain, module, read):
    """A quantized weight, past what torch does for chains of several."""
    only = _only_quantizer(chain)
    if only is None:
        quantizer_of(chain)  # refuses one that is not the last
    if only is None or parametrize._cache_enabled:
        return _as_parameter(chain, read(module))
    return _as_parameter(chain, only(chain._parameters["original"]))
