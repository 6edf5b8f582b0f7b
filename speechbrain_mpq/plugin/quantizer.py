"""The quantizer that a recipe's hparams file names."""

import os
from pathlib import Path

import torch
from speechbrain.utils.logger import get_logger
from torch.nn.modules.batchnorm import _BatchNorm

from ..quantization.coverage import coverage
from ..quantization.log_step import LogStep
from ..quantization.model_plan import bit_plan
from ..quantization.packing import save_packed
from ..quantization.plan import BitPlan
from ..quantization.quantizer import dequantize_, quantize_
from ..quantization.tensors import named_tensors, select
from .checkpoints import guard_loading
from .quantizer_options import (
    check_equal_bits,
    check_estimator,
    check_table,
    check_uniform_bits,
    check_unreached,
    refuse_unknown,
)
from .reach import watch_reach

logger = get_logger(__name__)


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
        refuse_unknown(type(self), unknown)
        check_table(granularity, rows, codebook)
        check_estimator(estimator)
        check_unreached(unreached)
        if not isinstance(bits, BitPlan | None):
            check_uniform_bits(bits)
        self.model = named_targets(targets)
        self.patterns = {"include": include, "exclude": exclude}
        self.table = {"granularity": granularity, "rows": rows}
        self.codebook = codebook
        self.estimator = estimator
        self.equal_bits = equal_bits
        self.unreached = unreached
        self._handles = []
        check_equal_bits(self.model, equal_bits, rows, **self.patterns)
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
        planned = isinstance(plan_or_bits, BitPlan)
        quantize_(
            self.model,
            plan_or_bits,
            **self.patterns,
            **self.table,
            estimator=self.estimator,
            # A plan has its own, the one that its bits were chosen for.
            codebook=None if planned else self.codebook,
        )
        self._freeze_scales_of_frozen()
        self._handles = guard_loading(self.model, self.any_bits)
        if self.unreached == "error":
            self._handles.append(watch_reach(self.model))
        plan = self.plan
        logger.info(
            f"Quantized {len(plan.tensors)} tensors in {len(plan.clusters)} "
            f"clusters to {plan.average_bits:.3f} bits on average, "
            f"{plan.bytes} bytes in all; {plan.rest_parameters} parameters "
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
        chosen = select(named_tensors(self.model), **self.patterns)
        for tensor in chosen:
            if isinstance(tensor.owners[0][0], _BatchNorm):
                raise ValueError(
                    f"{tensor.name} is of a batch norm, which SpeechBrain "
                    "replaces by a synchronized one under torchrun: add a "
                    "pattern for the norms to exclude, such as '*norm*'"
                )


def named_targets(targets):
    """The targets as one module, whose parameters have the targets' names.

    Arguments
    ---------
    targets : dict, list or torch.nn.Module
        As a YAML names them.

    Returns
    -------
    model : torch.nn.Module
        Holds the very modules.

    Example
    -------
    >>> list(named_targets({"net": torch.nn.PReLU()}).state_dict())
    ['net.weight']
    """
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
