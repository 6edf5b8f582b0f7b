"""Chains of parametrizations whose last one is a quantizer, and its scale.

A scale is fitted to the float values. Optimizers change these in small steps,
which the scale is trained for. Others write to ``model.parameters()`` whatever
they like: initializations, clipped weights, another set that is swapped in. So
norms are noted when an optimizer is done, before any hook of others behind its
step; where they are others by more than a tenth before the next forward, and a
new scale would fit much better, it is fitted again.
"""

import copy
import sys
import weakref
from functools import cache

import torch
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .fake_quant import FakeQuantize
from .groups import RowGroups

QUANTIZERS = (FakeQuantize, RowGroups)
JUMP = 0.1  # of a norm: what is written at once
TOLERANCE = 4.0  # of squared errors: a trained scale fits about as well
_WATCHED = weakref.WeakSet()  # chains whose norms are noted after steps
_LISTENERS = {}  # key -> what is called after all optimizers' steps
# What runs while an optimizer steps, its closures and its hooks
_STEP = Optimizer.profile_hook_step(Optimizer.step).__code__


class Fixed(torch.nn.Module):
    """Stands for parametrizations whose result is known: passes it on.

    ``remove_parametrizations`` and SpeechBrain's ``remove_weight_norm`` find
    something to remove.
    """

    def forward(self, weight):
        """Passes the weight on."""
        return weight

    def right_inverse(self, weight):
        """Gives what ``module.weight = value`` stores: the value itself."""
        return weight


def chains(module):
    """Finds the parametrizations of a module's own weights."""
    # Past __getattr__, which adapters pass on to the module that they wrap.
    own = module._modules.get("parametrizations")
    if not isinstance(own, torch.nn.ModuleDict):
        return {}
    return {n: c for n, c in own.items() if isinstance(c, ParametrizationList)}


def quantizer_of(chain):
    """Gives the quantizer of a chain of parametrizations, or None."""
    last = chain[len(chain) - 1]
    if isinstance(last, QUANTIZERS):
        return last
    if any(isinstance(inner, QUANTIZERS) for inner in chain):
        raise ValueError(
            f"{type(last).__name__} was registered on a weight that is "
            "quantized already: register it first, then quantize"
        )
    return None


def is_own(chain):
    """Tells whether a module has parametrizations besides a quantizer."""
    return not isinstance(chain[0], (*QUANTIZERS, Fixed))


def float_weight(chain):
    """Computes what a chain's quantizer gets, or all of it without one."""
    if isinstance(chain[0], QUANTIZERS):
        return chain.original
    count = len(chain) - (quantizer_of(chain) is not None)
    if chain.is_tensor:
        value = chain[0](chain.original)
    else:
        parts = [getattr(chain, f"original{i}") for i in range(chain.ntensors)]
        value = chain[0](*parts)
    for index in range(1, count):
        value = chain[index](value)
    return value


@torch.no_grad()
def fit_again(chain):
    """Fits the scale of a chain to its float weight, if it does not fit.

    Arguments
    ---------
    chain : torch.nn.utils.parametrize.ParametrizationList
        Of one weight, quantized.

    Returns
    -------
    dict or None
        State of the quantizer before; None where it was left as it was.
    """
    quantizer, weight = quantizer_of(chain), float_weight(chain).double()

    def error():
        return (quantizer(weight) - weight).square().sum()

    before, old = copy.deepcopy(quantizer.state_dict()), error()
    # That of rounding to so many bits; few values may be met by chance.
    usual = weight.square().sum() / 4 ** min(_bits(quantizer))
    if old <= TOLERANCE * usual:
        return None
    quantizer.refit(float_weight(chain))
    if old > TOLERANCE * error():
        return before
    quantizer.load_state_dict(before)
    return None


def _bits(quantizer):
    """Bits of all groups of a weight."""
    if isinstance(quantizer, RowGroups):
        return [inner.stored_bits for inner in quantizer.quantizers]
    return [quantizer.stored_bits]


def note(some):
    """Notes the norms of what chains compute their weights from."""
    some = [chain for chain in some if _is_watched(chain)]
    for chain, norms in zip(some, _norms(some)):
        chain.__dict__["norms"] = norms
        chain.__dict__.pop("replaced", None)
        _WATCHED.add(chain)


def follow_writes(some):
    """Fits the scales of chains whose float values others have written to.

    Arguments
    ---------
    some : iterable of torch.nn.utils.parametrize.ParametrizationList
    """
    some = [chain for chain in some if _is_watched(chain)]
    for chain, norms in zip(some, _norms(some)):
        before = chain.__dict__.get("norms", norms)
        jumped = any(abs(a - b) > JUMP * b for a, b in zip(norms, before))
        if jumped and _is_stepping():
            continue  # what closures see is noted when the step is done
        chain.__dict__["norms"] = norms
        _WATCHED.add(chain)
        if jumped:
            _follow_jump(chain, before)


def _is_stepping():
    """Whether an optimizer's step is what has called this."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _STEP:
        frame = frame.f_back
    return frame is not None


def _follow_jump(chain, before):
    """Fits a scale to other values, or takes that of these very values."""
    replaced, state = chain.__dict__.get("replaced", (None, None))
    if chain.norms == replaced:  # another set was swapped in, and out again
        # Its parameters were swapped with the others.
        quantizer_of(chain).load_state_dict(state, strict=False)
        del chain.__dict__["replaced"]
        return
    trained = {name for name, _ in quantizer_of(chain).named_parameters()}
    state = fit_again(chain)
    if state is not None:
        state = {n: value for n, value in state.items() if n not in trained}
        chain.__dict__.setdefault("replaced", (before, state))
        chain.__dict__["norms"] = _norms([chain])[0]


def _is_watched(chain):
    """Whether a chain has a scale that is fitted to float values."""
    # ADMM has projections of its own, and fits them in every iteration.
    last = chain._modules[str(len(chain._modules) - 1)]
    kind = last.quantizers[0] if isinstance(last, RowGroups) else last
    is_fitted = isinstance(kind, FakeQuantize)
    return is_fitted and not getattr(kind, "needs_parameter", False)


def _norms(some):
    """Norms of the parameters of each chain, those of scales included."""
    held = [_held(chain) for chain in some]
    flat = [parameter.detach() for own in held for parameter in own]
    if not flat or any(parameter.is_meta for parameter in flat):
        return []
    with torch.no_grad():
        norms = torch._foreach_norm(flat)
    if len({norm.device for norm in norms}) == 1 and norms[0].is_cuda:
        norms = torch.stack([norm.float() for norm in norms])  # waits once
        norms = norms.tolist()
    else:
        norms = [norm.item() for norm in norms]
    norms = iter(norms)
    return [[next(norms) for _ in own] for own in held]


def _held(chain):
    """Parameters of a chain, past what torch takes to find them."""
    held = list(chain._parameters.values())
    for inner in chain._modules.values():
        deep = inner._modules
        held += inner.parameters() if deep else inner._parameters.values()
    return [parameter for parameter in held if parameter is not None]


class _StepHandle:
    """A place among the listeners that can be given up."""

    def remove(self):
        """Listen no more."""
        _LISTENERS.pop(self, None)


def _note_after(optimizer, args, kwargs):
    """Torch's one hook before steps: norms are noted first behind them."""
    hooks = optimizer._optimizer_step_post_hooks
    if _note_step not in hooks.values():
        handle = optimizer.register_step_post_hook(_note_step)
        hooks.move_to_end(handle.id, last=False)


def _note_step(optimizer, args, kwargs):
    """Behind a step, before hooks of others, which may write to weights."""
    groups = optimizer.param_groups
    held = {id(weight) for group in groups for weight in group["params"]}
    note([chain for chain in _WATCHED if _is_trained(chain, held)])


def _tell_listeners(optimizer, args, kwargs):
    """Torch's one hook behind steps; listeners may come and go meanwhile."""
    for called in list(_LISTENERS.values()):
        called(optimizer, args, kwargs)


def _is_trained(chain, held):
    """Whether an optimizer holds any parameter of a chain."""
    return any(id(parameter) in held for parameter in _held(chain))


@cache
def hook_optimizers():
    """Hang the hooks in, once."""
    register_optimizer_step_pre_hook(_note_after)
    return register_optimizer_step_post_hook(_tell_listeners)


def listen_to_steps(owner, called):
    """Call a hook after all optimizers' steps, while an owner lives.

    Torch's own hooks may not be removed while it calls them, and owners die
    whenever Python collects them: so there is one hook that stays.
    """
    hook_optimizers()
    listening = _StepHandle()
    _LISTENERS[listening] = called
    weakref.finalize(owner, listening.remove)
    return listening
