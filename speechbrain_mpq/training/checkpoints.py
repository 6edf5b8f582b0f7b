"""Files and checkpoints that are there whole or not at all.

What happens when a state dict arrives at a quantized model.

A full-precision one gets scales that are fitted to it. A quantized one brings
its own, and must be of the same bits. Neither may lack anything: SpeechBrain's
Pretrainer loads non-strictly and would only warn.
"""

import os
import shutil
from functools import partial
from pathlib import Path

import torch
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from torch.nn.utils import parametrize

from ..quantization.quant_api import requantize_

PARTIAL = "partial+"  # a name that SpeechBrain takes for no checkpoint


class AtomicCheckpointer(Checkpointer):
    """A Checkpointer whose checkpoints survive a kill while being written.

    SpeechBrain's own writes the file by which it later knows a checkpoint
    first, so that one cut short would be loaded. Here everything is written
    under another name, and renamed in the end.

    Arguments
    ---------
    checkpoints_dir : str
        Where the checkpoints are.
    **kwargs
        As for SpeechBrain's Checkpointer.

    Example
    -------
    >>> import torch
    >>> folder = str(getfixture("tmpdir"))
    >>> layer = torch.nn.Linear(1, 1)
    >>> checkpointer = AtomicCheckpointer(folder, {"layer": layer})
    >>> checkpoint = checkpointer.save_checkpoint()
    >>> checkpoint.path.name.startswith("CKPT+")
    True
    """

    _tidy = False  # whether what a killed run left has been removed

    def save_checkpoint(self, *args, **kwargs):
        """As SpeechBrain's; renames the folder when it is complete.

        All processes wait for that: what they do next is list the
        checkpoints, and each deletion is waited for by all. Lists that differ
        would leave them waiting for each other.
        """
        if not self._tidy and if_main_process():
            for left in Path(self.checkpoints_dir).glob(f"{PARTIAL}*"):
                shutil.rmtree(left)
            self._tidy = True
        checkpoint = super().save_checkpoint(*args, **kwargs)
        if checkpoint is not None:  # the main process
            checkpoint = self._renamed(checkpoint)
        ddp_barrier()
        return checkpoint

    def _renamed(self, checkpoint):
        """A complete checkpoint under its final name."""
        final = checkpoint.path.with_name(
            checkpoint.path.name.removeprefix(PARTIAL)
        )
        os.replace(checkpoint.path, final)
        paramfiles = {
            name: final / path.name
            for name, path in checkpoint.paramfiles.items()
        }
        return checkpoint._replace(path=final, paramfiles=paramfiles)

    def _new_checkpoint_dirpath(self):
        """A name that is no checkpoint's yet."""
        path = super()._new_checkpoint_dirpath()
        return path.with_name(PARTIAL + path.name)


WholeCheckpointer = AtomicCheckpointer  # its name in earlier YAML files

TABLE = ("bits", "ternary", "midrise")  # what says which table a tensor has


def guard_loading(model, any_bits=False):
    """Checks and refits whatever is loaded into a quantized model.

    Example
    -------
    >>> from speechbrain_mpq import quantize_
    >>> layer = torch.nn.PReLU()
    >>> plan, handles = quantize_(layer, 2), guard_loading(layer)
    >>> _ = layer.load_state_dict({"weight": torch.tensor([0.7])})
    >>> round(layer.weight.item(), 4)  # the scale fits the new weight
    0.7
    """
    handles = []
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        check = partial(_check, any_bits=any_bits)
        handles += [
            module.register_load_state_dict_pre_hook(check),
            module.register_load_state_dict_post_hook(_refit),
        ]
    return handles


def _check(module, state_dict, prefix, *_, any_bits):
    """Before loading: refuse what lacks a tensor or has other tables."""
    for attribute, chain in getattr(module, "parametrizations", {}).items():
        inside = f"{prefix}parametrizations.{attribute}."
        own = chain.state_dict()
        missing = [name for name in own if inside + name not in state_dict]
        if missing == list(own):
            raise ValueError(
                f"the checkpoint lacks {prefix + attribute!r}, which is "
                "quantized here: load one of this architecture, or load these "
                "modules without it and leave it out of the quantizer's targets"
            )
        # Added later, and with a default: see FakeQuantize.
        missing = [n for n in missing if n.split(".")[-1] not in TABLE]
        if missing:
            raise ValueError(
                f"the checkpoint has {prefix + attribute!r} quantized in "
                f"another way: it lacks {inside + missing[0]!r}. Give the "
                "quantizer the estimator, granularity and rows that it was "
                "trained with"
            )
        _check_tables(prefix + attribute, inside, own, state_dict, any_bits)


def _check_tables(name, inside, own, state_dict, any_bits):
    """Refuse a checkpoint that is quantized to another plan."""
    for key, value in own.items():
        kind = key.split(".")[-1]
        found = state_dict.get(inside + key)
        if kind not in TABLE or found is None:
            continue
        if any_bits and kind != "midrise":
            continue
        if not torch.equal(found.cpu(), value.cpu()):
            raise ValueError(
                f"the checkpoint is quantized to another plan: {name!r} has "
                f"{kind} {found.item()} there and {value.item()} here. Ask for "
                "its bits and codebook, or train in another output_folder"
            )


def _refit(module, incompatible):
    """After loading: fit scales to float values that have arrived."""
    for chain in getattr(module, "parametrizations", {}).values():
        if chain.__dict__.pop("took_float", False):
            requantize_(module)
            return
