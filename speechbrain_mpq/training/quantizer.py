"""The quantizer that a recipe's hparams file names.

It attaches fake quantizers in place when the YAML is loaded; what a YAML may
give it is checked there and then, as many options are used only after all data
is prepared. It sees no Brain and no optimizer. So it finds weights that no
loss reaches by listening to the steps of all optimizers, by torch's hook for
these, until it has seen those of its own; the hook goes when the answer is
known, and with the weights that it is about. One step is not enough to know:
layer drop leaves out other layers in each.
"""

import inspect
import logging
import os
import weakref
from collections import Counter
from pathlib import Path

import torch
from speechbrain.utils.logger import get_logger
from torch.nn.modules.batchnorm import _BatchNorm

from ..allocation.solver import equal_groups
from ..quantization.chains import listen_to_steps
from ..quantization.codebook import check_bits
from ..quantization.fake_quant import LogStep
from ..quantization.packing import packed_file_bytes, save_packed
from ..quantization.plan import BitPlan, Scheme, Selection, bit_plan
from ..quantization.quant_api import (
    clusters,
    coverage,
    dequantize_,
    quantize_,
    watch_scales,
)
from ..quantization.tensors import named_tensors, near_misses, select
from .checkpoints import guard_loading

logger = get_logger(__name__)
UNREACHED = ("error", "ignore")
LISTED = 12  # patterns in a message
PATIENCE = 20  # steps without any gradient: layer drop leaves out other layers


NO_SCRIPT = (
    "{} cannot be compiled by TorchScript while it is quantized: leave out "
    "--jit, or take it out of jit_module_keys; a packed model that is loaded "
    "can be compiled"
)


def _refuse_unknown(cls, unknown):
    """Refuses options that a class does not have."""
    for wrong in unknown:
        options = _option_names(cls)
        raise TypeError(
            f"{cls.__name__} has no option {wrong!r}"
            f"{near_misses(wrong, options)}: choose from {', '.join(options)}"
        )


def _option_names(cls):
    """Arguments of a class and of those that it inherits from."""
    named = (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    names = {}
    for base in inspect.getmro(cls):
        if "__init__" in vars(base):
            arguments = inspect.signature(base.__init__).parameters
            names.update(
                (name, None)
                for name, argument in list(arguments.items())[1:]
                if argument.kind in named
            )
    return list(names)


def as_list(patterns):
    """One pattern or several as a list.

    Example
    -------
    >>> as_list("qkv"), as_list(("qkv", "*.bias"))
    (['qkv'], ['qkv', '*.bias'])
    """
    return [patterns] if isinstance(patterns, str) else list(patterns)


def check_uniform_bits(bits):
    """Refuses what is no number of bits for all weights.

    Example
    -------
    >>> check_uniform_bits(4)
    >>> check_uniform_bits("4bit")
    Traceback (most recent call last):
    ...
    ValueError: bits must be an integer from 1 to 16 or 1.6, not '4bit': all ...
    """
    try:
        check_bits(bits)
    except ValueError as error:
        raise ValueError(
            f"{error}: all weights get them. Other averages need bits that "
            "differ: name LearnedBits, or let choose_bits choose"
        ) from error


def _check_estimator(estimator):
    """Refuses what makes no fake quantizers."""
    # A module can be called, too, but makes nothing.
    if not callable(estimator) or isinstance(estimator, torch.nn.Module):
        raise TypeError(
            "estimator must be a class, such as !name:speechbrain_mpq.LogStep, "
            f"not {estimator!r}"
        )


class Quantizer:
    """Quantizes the modules of a recipe in place, when its YAML is loaded.

    The modules keep their identity: `train.py`, optimizer, checkpoints and
    Pretrainer go on as before. Weights that are loaded later get scales that
    fit them.

    Arguments
    ---------
    targets : dict, list or torch.nn.Module
        What to quantize, usually ``!ref <modules>``. Names of parameters
        begin with the keys of a dict.
    bits : int, float, BitPlan or None
        Bits of every weight, 1 to 16, or 1.6; or a plan. None: not quantized
        before `choose_bits` is called.
    include : sequence of str
        fnmatch patterns on parameter names; each must match something.
    exclude : sequence of str
        Patterns of what to leave out; each must match something.
    granularity : str
        "tensor" or "channel": scales of a tensor.
    codebook : str
        "midtread" or "midrise".
    rows : int or None
        Most output channels that share one bit width (see `clusters`).
    gates : bool
        Each gate of each layer of an LSTM or GRU has bits of its own.
    estimator : type
        How quantized weights are trained.
    equal_bits : sequence of str
        What must get equal bits where bits are chosen (see `equal_groups`).
    vectors : bool
        Quantize biases, norms and all else of one dimension as well.
    unreached : str
        "error": refuse weights without a gradient in the first 20 steps.
        "ignore": later steps may reach them.
    **unknown : dict
        Refused, with the names that there are.

    Example
    -------
    >>> modules = {"encoder": torch.nn.Linear(8, 4)}
    >>> quantizer = Quantizer(modules, bits=2, exclude=["*.bias"])
    >>> quantizer.plan.bytes  # 32 x 2 / 8, a scale, 4 floats
    28
    >>> len(modules["encoder"].weight.unique()) <= 3
    True
    """

    any_bits = False  # whether it changes bits in training by itself
    method = None  # the estimation method of `choose_bits`

    def __init__(
        self,
        targets,
        bits=4,
        include=("*",),
        exclude=(),
        granularity="tensor",
        codebook="midtread",
        rows=None,
        estimator=LogStep,
        equal_bits=(),
        unreached="error",
        vectors=True,
        gates=False,
        **unknown,
    ):
        _refuse_unknown(type(self), unknown)
        self.scheme = Scheme(granularity, codebook, rows, gates)
        _check_estimator(estimator)
        _check_unreached(unreached)
        if not isinstance(bits, BitPlan | None):
            check_uniform_bits(bits)
        self.model = _named_targets(targets)
        self.requested = Selection(include, exclude), vectors
        if not vectors:
            exclude = [*as_list(exclude), *_vectors(self.model)]
        self.selection = Selection(include, exclude)
        self.estimator = estimator
        self.equal_bits = equal_bits
        self.unreached = unreached
        self._handles = []
        cut = {"rows": rows, "gates": gates}
        members = clusters(self.model, **self.selection.patterns, **cut)
        equal_groups(members, equal_bits)  # each rule must find something
        if bits is not None:
            self.quantize(bits)

    def quantize(self, plan_or_bits):
        """Give the modules these bits, fitted to their float weights.

        Arguments
        ---------
        plan_or_bits : BitPlan, int or float
            What they are quantized to from now on.
        """
        self._refuse_synchronized_norms()
        self.dequantize()
        quantize_(
            self.model,
            plan_or_bits,
            **self.selection.patterns,
            estimator=self.estimator,
            scheme=self.scheme,
        )
        self._freeze_scales_of_frozen()
        self._handles = guard_loading(self.model, self._bits_change)
        self._handles.append(watch_scales(self.model))
        if self.unreached == "error":
            self._handles += watch_gradients(self.model)
        _refuse_scripting(self.model)
        self._tell()

    def _tell(self):
        """Log what was done, as soon as there is a log."""
        plan = self.plan
        summary = (
            f"Quantized {len(plan.tensors)} tensors in {len(plan.clusters)} "
            f"clusters to {plan.average_bits:.3f} bits on average, "
            f"{packed_file_bytes(self.model)} bytes in all; "
            f"{plan.rest_parameters} parameters "
            "stay in full precision"
        )
        if logger.isEnabledFor(logging.INFO):
            logger.info(summary)
            return

        # A YAML is loaded before the script has a log.
        def tell(module, inputs):
            if logger.isEnabledFor(logging.INFO):
                handle.remove()
                logger.info(summary)

        tensors = named_tensors(self.model).values()
        first = next(t.fake_quantize for t in tensors if t.fake_quantize)
        handle = first.register_forward_pre_hook(tell)
        self._handles.append(handle)

    def use_method(self, method):
        """Quantize as an estimation method wants it from now on.

        Arguments
        ---------
        method : EstimationMethod
            That finds the weights.
        """
        self.method = method
        self.estimator = method.estimator

    def dequantize(self):
        """Make all parameters plain again; nothing if they are.

        Modules that something else has quantized are not touched.
        """
        if self._handles:
            dequantize_(self.model)
        while self._handles:
            self._handles.pop().remove()

    @property
    def _bits_change(self):
        """Whether a checkpoint may have other bits than the modules."""
        return self.any_bits or bool(self.method and not self.method.keeps_plan)

    @property
    def plan(self):
        """The BitPlan that the modules follow."""
        return bit_plan(self.model)

    def coverage(self):
        """Every tensor of the modules: its bits, or why it has none."""
        return coverage(self.model)

    def pack(self, folder):
        """Write the modules as a packed model.

        Arguments
        ---------
        folder : str or Path
            Made if it is not there.

        Returns
        -------
        path : Path
            The model.safetensors.
        """
        return save_packed(self.model, Path(folder))

    def _freeze_scales_of_frozen(self):
        """Scales are trained where their weights are."""
        for tensor in named_tensors(self.model).values():
            if tensor.fake_quantize and not tensor.parameter.requires_grad:
                tensor.fake_quantize.requires_grad_(False)

    def _refuse_synchronized_norms(self):
        """DDP in SpeechBrain swaps batch norms, which loses quantizers."""
        if "LOCAL_RANK" not in os.environ:
            return
        tensors = named_tensors(self.model)
        chosen = select(tensors, **self.selection.patterns)
        for tensor in chosen:
            if isinstance(tensor.owners[0][0], _BatchNorm):
                raise ValueError(
                    f"{tensor.name} is of a batch norm, which SpeechBrain "
                    "replaces by a synchronized one under torchrun: add a "
                    "pattern for the norms to exclude, such as '*norm*'"
                )


def _named_targets(targets):
    """The targets as one module, whose parameters have the targets' names."""
    if isinstance(targets, torch.nn.ModuleDict):
        # One of its own: under torchrun a Brain puts wrappers into that.
        targets = dict(targets.items())
    if isinstance(targets, torch.nn.Module):
        return targets
    if not isinstance(targets, dict | list | tuple) or not targets:
        raise TypeError(
            "targets must name modules, such as !ref <modules>, not "
            f"{targets!r}"
        )
    if not isinstance(targets, dict):
        targets = {str(index): module for index, module in enumerate(targets)}
    for name, module in targets.items():
        if not isinstance(module, torch.nn.Module):
            raise TypeError(
                f"target {name!r} is a {type(module).__name__}, not a "
                "torch.nn.Module: name modules, such as !ref <modules>"
            )
    return torch.nn.ModuleDict(targets)


def _vectors(model):
    """Names of all biases, norms and other vectors."""
    tensors = named_tensors(model).values()
    vectors = [tensor for tensor in tensors if tensor.is_vector]
    # Patterns have to name a tied parameter by all of its names.
    return [n for t in vectors for n in getattr(t, "names", [t.name])]


def _refuse_scripting(model):
    """Say what to do where TorchScript meets a quantized module."""

    def refuse(module):
        raise ValueError(NO_SCRIPT.format(type(module).__name__))

    owners = {
        type(owner)
        for tensor in named_tensors(model).values()
        if tensor.fake_quantize
        for owner, _ in tensor.owners
    }
    for cls in owners:  # of each module its own, made by torch's parametrize
        cls.__prepare_scriptable__ = refuse


def quantizer_of(
    brain,
    quantizer=None,
    include=("*",),
    exclude=(),
    vectors=True,
    scheme=None,
):
    """The quantizer of a Brain's modules; a new one where there is none."""
    own = getattr(getattr(brain, "hparams", None), "quantizer", None)
    quantizer = quantizer or own or getattr(brain, "chosen_quantizer", None)
    if quantizer is None:
        options = vars(scheme) if scheme else {}
        quantizer = Quantizer(
            brain.modules, None, include, exclude, vectors=vectors, **options
        )
        # Nothing else holds it, and the hooks are its own.
        brain.chosen_quantizer = quantizer
    elif not isinstance(quantizer, Quantizer):
        raise TypeError(
            "the hparams' quantizer must be a speechbrain_mpq.Quantizer, not "
            f"a {type(quantizer).__name__}"
        )
    elif (Selection(include, exclude), vectors) not in (
        quantizer.requested,
        (Selection(), True),
    ):
        raise ValueError(
            "include, exclude and vectors are the quantizer's, which is there "
            "already: give them in its block, or the same at every call"
        )
    if scheme not in (None, quantizer.scheme):
        raise ValueError(
            "the scheme is the quantizer's, which is there already: give it "
            "in its block, or the same at every call"
        )
    if quantizer.any_bits:
        raise ValueError(
            "the quantizer learns its bits in training: name a Quantizer, not "
            "LearnedBits, where choose_bits chooses them"
        )
    return quantizer


def _check_unreached(unreached):
    """Refuse unknown ways with weights that have no gradient."""
    if unreached not in UNREACHED:
        raise ValueError(
            f"unreached must be one of {UNREACHED}, not {unreached!r}"
        )


def watch_gradients(model):
    """Check in the first steps that every quantized weight has a gradient."""
    tensors = [t for t in named_tensors(model).values() if t.fake_quantize]
    watch = _Watch({tensor.name: tensor.parameter for tensor in tensors})
    steps = listen_to_steps(tensors[0].parameter, watch)

    def end(module, inputs):
        if watch.done:
            steps.remove()
            forwards.remove()

    forwards = tensors[0].fake_quantize.register_forward_pre_hook(end)
    return [steps, forwards]


class _Watch:
    """What has been seen of some quantized weights."""

    def __init__(self, weights):
        self.weights = {
            name: weakref.ref(weight) for name, weight in weights.items()
        }
        self.seen = set()  # names of weights that an optimizer has
        self.steps = Counter()  # of each optimizer
        self.missing = {}  # optimizer -> its weights without a gradient so far
        self.done = False  # torch lets no hook remove itself

    def __call__(self, optimizer, *_):
        """After a step: look at those weights that the optimizer has."""
        if self.done:
            return
        weights = {name: weight() for name, weight in self.weights.items()}
        if None in weights.values():  # the model is gone
            self.done = True
            return
        trained = {n: w for n, w in weights.items() if w.requires_grad}
        groups = optimizer.param_groups
        held = {id(weight) for group in groups for weight in group["params"]}
        mine = {n: w for n, w in trained.items() if id(w) in held}
        if not mine:
            return
        key = id(optimizer)
        self.steps[key] += 1
        self.seen.update(mine)
        without = {n for n, w in mine.items() if w.grad is None}
        missing = self.missing[key] = without & self.missing.get(key, without)
        left = sorted(set(trained) - self.seen)
        if missing and self.steps[key] >= PATIENCE:
            self.done = True
            names = [name for name in mine if name in missing]
            raise ValueError(_message(names, weights))
        if self.steps[key] == 1 and missing:
            names = [name for name in mine if name in missing]
            logger.warning(f"In the first step {_message(names, weights)}")
        if self.steps[key] == 2:
            _warn_of_others(left)
        is_settled = not left or self.steps[key] >= 2
        self.done = is_settled and not any(self.missing.values())


def _fewest_patterns(names, all_names):
    """Patterns that match some names, and none of the others."""
    others = set(all_names) - set(names)
    patterns = []
    for name in names:
        parts, pattern = name.split("."), name
        for depth in range(1, len(parts)):
            module = ".".join(parts[:depth]) + "."
            if not any(other.startswith(module) for other in others):
                pattern = f"{module}*"
                break
        if pattern not in patterns:
            patterns.append(pattern)
    return patterns


def _message(names, all_names):
    """What is wrong, and the ways out."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    patterns = _fewest_patterns(names, all_names)
    listed = ", ".join(f'"{pattern}"' for pattern in patterns[:LISTED])
    cut = ", ..." if patterns[LISTED:] else ""
    return (
        f"no loss reaches {', '.join(names[:3])}{more}, which the quantizer "
        f"covers: add exclude: [{listed}{cut}], take their modules out of its "
        'targets, or give it unreached: "ignore" where later steps reach them'
    )


def _warn_of_others(names):
    """Weights that no optimizer had by the second step of one."""
    if names:
        logger.warning(
            f"{len(names)} quantized tensors are trained by no optimizer yet, "
            f"{names[0]} first: they keep their values"
        )
