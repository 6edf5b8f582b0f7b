"""The quantizer that a recipe's hparams file names.

It attaches fake quantizers in place when the YAML is loaded; what a YAML may
give it is checked there and then, as many options are used only after all data
is prepared. Weights that no loss reaches are found after the first step, by
the hook that torch calls after the step of any optimizer.
"""

import inspect
import os
import weakref
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.logger import get_logger
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..allocation.solver import equal_groups
from ..quantization.codebook import check_bits
from ..quantization.fake_quant import LogStep
from ..quantization.packing import packed_file_bytes, save_packed
from ..quantization.plan import BitPlan, bit_plan
from ..quantization.quant_api import clusters, coverage, dequantize_, quantize_
from ..quantization.scheme import Scheme, Selection
from ..quantization.tensors import named_tensors, near_misses, select
from .checkpoints import guard_loading, recover_whole

logger = get_logger(__name__)
UNREACHED = ("error", "ignore")


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
    found = {}
    for base in inspect.getmro(cls):
        if "__init__" in vars(base):
            arguments = inspect.signature(base.__init__).parameters
            found.update(
                (name, None)
                for name, argument in list(arguments.items())[1:]
                if argument.kind in named
            )
    return list(found)


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


def _check_unreached(unreached):
    """Refuses unknown ways with weights that have no gradient."""
    if unreached not in UNREACHED:
        raise ValueError(
            f"unreached must be one of {UNREACHED}, not {unreached!r}"
        )


def _watch_unused_parameters(model):
    """Check after one step that every quantized weight had a gradient."""
    return register_optimizer_step_post_hook(_Watch(model))


class _Watch:
    """What has been seen of the quantized weights of a model."""

    def __init__(self, model):
        self.weights = {
            name: weakref.ref(tensor.parameter)
            for name, tensor in named_tensors(model).items()
            if tensor.fake_quantize
        }
        self.seen = {}  # optimizer -> names of its weights
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
        second = id(optimizer) in self.seen
        self.seen.setdefault(id(optimizer), set(mine))
        left = set(trained).difference(*self.seen.values())
        unreached = [n for n, w in mine.items() if w.grad is None]
        self.done = bool(second or unreached or not left)
        if second:
            _warn_of_others(sorted(left))
        elif unreached:
            raise ValueError(_message(unreached))


def _message(names):
    """What is wrong, and the three ways out."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    module = names[0].rpartition(".")[0]
    return (
        f"no loss reaches {', '.join(names[:3])}{more}, which the quantizer "
        f"covers: take {module!r} out of its targets, add '{module}.*' to its "
        'exclude, or give it unreached: "ignore" where later steps reach it'
    )


def _warn_of_others(names):
    """Weights that no optimizer had by the second step of one."""
    if names:
        logger.warning(
            f"{len(names)} quantized tensors are trained by no optimizer yet, "
            f"{names[0]} first: they keep their values"
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
    estimator : type
        How quantized weights are trained.
    equal_bits : sequence of str
        What must get equal bits where bits are chosen (see `equal_groups`).
    unreached : str
        "error": refuse weights without a gradient after the first step.
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

    any_bits = False  # whether bits change in training

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
        **unknown,
    ):
        _refuse_unknown(type(self), unknown)
        self.scheme = Scheme(granularity, codebook, rows)
        self.selection = Selection(include, exclude)
        _check_estimator(estimator)
        _check_unreached(unreached)
        if not isinstance(bits, BitPlan | None):
            check_uniform_bits(bits)
        self.model = _named_targets(targets)
        self.estimator = estimator
        self.equal_bits = equal_bits
        self.unreached = unreached
        self._handles = []
        members = clusters(self.model, **self.selection.patterns, rows=rows)
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
        self._handles = guard_loading(self.model, self.any_bits)
        if self.unreached == "error":
            self._handles.append(_watch_unused_parameters(self.model))
        plan = self.plan
        logger.info(
            f"Quantized {len(plan.tensors)} tensors in {len(plan.clusters)} "
            f"clusters to {plan.average_bits:.3f} bits on average, "
            f"{packed_file_bytes(self.model)} bytes in all; "
            f"{plan.rest_parameters} parameters "
            "stay in full precision"
        )

    def dequantize(self):
        """Make all parameters plain again; nothing if they are.

        Modules that something else has quantized are not touched.
        """
        if self._handles:
            dequantize_(self.model)
        while self._handles:
            self._handles.pop().remove()

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
    if isinstance(targets, torch.nn.Module):
        return targets
    if not isinstance(targets, dict):
        targets = {str(index): module for index, module in enumerate(targets)}
    for name, module in targets.items():
        if not isinstance(module, torch.nn.Module):
            raise TypeError(
                f"target {name!r} is a {type(module).__name__}, not a "
                "torch.nn.Module: name modules, such as !ref <modules>"
            )
    return torch.nn.ModuleDict(targets)


def quantizer_of(brain, quantizer=None, include=("*",), exclude=()):
    """The quantizer of a Brain's modules; a new one where there is none."""
    own = getattr(getattr(brain, "hparams", None), "quantizer", None)
    quantizer = quantizer or own or getattr(brain, "chosen_quantizer", None)
    if quantizer is None:
        quantizer = Quantizer(brain.modules, None, include, exclude)
        # Nothing else holds it, and the hooks are its own.
        brain.chosen_quantizer = quantizer
    elif not isinstance(quantizer, Quantizer):
        raise TypeError(
            "the hparams' quantizer must be a speechbrain_mpq.Quantizer, not "
            f"a {type(quantizer).__name__}"
        )
    elif Selection(include, exclude) not in (quantizer.selection, Selection()):
        raise ValueError(
            "include and exclude are the quantizer's, which is there already: "
            "give them in its block, or the same at every call"
        )
    if quantizer.any_bits:
        raise ValueError(
            "the quantizer learns its bits in training: name a Quantizer, not "
            "LearnedBits, where choose_bits chooses them"
        )
    return quantizer


def pack_results(output_folder, packed=None, min_key=None, max_key=None):
    """Writes the best checkpoint of a quantized training as a packed model.

    Builds the modules anew from the folder's own hyperparams.yaml, and needs
    neither `train.py` nor data.

    Arguments
    ---------
    output_folder : str or Path
        That of the training: hyperparams.yaml and, where bits were chosen,
        plan.json are read. The hparams need `modules` and `checkpointer`.
    packed : str or Path or None
        Folder to write; output_folder/packed if not given.
    min_key, max_key : str or None
        Which checkpoint, as in `Brain.evaluate`; the latest if not given.

    Returns
    -------
    path : Path
        The model.safetensors.
    """
    folder = Path(output_folder)
    source = folder / "hyperparams.yaml"
    if not source.exists():
        raise FileNotFoundError(
            f"no {source}: name the output_folder of a finished training"
        )
    with open(source, encoding="utf-8") as text:
        hparams = load_hyperpyyaml(text)
    missing = [key for key in ("modules", "checkpointer") if key not in hparams]
    if missing:
        raise ValueError(
            f"{source} has no key {missing[0]!r}, which this needs"
        )
    quantizer = _quantizer(hparams, folder)
    found = recover_whole(
        hparams["checkpointer"], min_key=min_key, max_key=max_key
    )
    if found is None:
        raise ValueError(
            f"no checkpoint in {hparams['checkpointer'].checkpoints_dir}: "
            "finish the training first"
        )
    return quantizer.pack(packed or folder / "packed")


def _quantizer(hparams, folder):
    """The quantizer of the hparams, or one for the plan that was chosen."""
    plan = folder / "plan.json"
    quantizer = hparams.get("quantizer")
    if quantizer is None:
        if not plan.exists():
            raise ValueError(
                f"{folder} is of no quantized training: its hyperparams.yaml "
                "has no quantizer, and it holds no plan.json"
            )
        return Quantizer(hparams["modules"], BitPlan.load(plan))
    if plan.exists():
        quantizer.quantize(BitPlan.load(plan))
    return quantizer
