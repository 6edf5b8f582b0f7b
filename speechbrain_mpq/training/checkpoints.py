"""Checkpoints that are whole, and that fit the model they are loaded into.

A checkpoint is on the disk before it gets its name; one that is damaged all
the same is passed over for the one before it. A full-precision state dict that
arrives at a quantized model gets scales that are fitted to it; a quantized one
brings its own, and must be of the same bits. Neither may lack anything, as
SpeechBrain's Pretrainer loads non-strictly and would only warn; but what hooks
of a class or a checkpointer save is a part on purpose, as of adapters, and may.
"""

import copy
import math
import os
import shutil
import sys
import zipfile
from functools import partial, wraps
from pathlib import Path

import torch
import yaml
from speechbrain.utils import checkpoints as hooks
from speechbrain.utils.checkpoints import METAFNAME, Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.logger import get_logger
from speechbrain.utils.parameter_transfer import Pretrainer

from ..quantization.chains import chains, quantizer_of
from ..quantization.state import NotStorableError, own_hook, read_saved
from ..quantization.unpacking import MODEL_FILE, load_packed_

logger = get_logger(__name__)

_ZIP, _PICKLE = b"PK", b"\x80"  # what files of torch.save begin with
PARTIAL = "partial+"  # a name that SpeechBrain takes for no checkpoint


def load_best_(network, folder, hint, name="network", key="loss"):
    """Load a network from the best checkpoint of another run of a recipe.

    Arguments
    ---------
    network : torch.nn.Module
    folder : str or Path
        Output folder of that run; its checkpoints are in `save`. Or a packed
        folder, such as what the run has published.
    hint : str
        What to give for the network to be the same, for the message where it
        is another one.
    name : str
        Under which the checkpointer saved the network.
    key : str
        What the best checkpoint has least of.
    """
    if Path(folder, MODEL_FILE).is_file():
        load_packed_(network, folder)
        return
    best, save = None, Path(folder) / "save"
    if save.is_dir():  # a Checkpointer would make it
        best = Checkpointer(save).find_checkpoint(min_key=key)
    if best is None:
        raise ValueError(
            f"no trained checkpoint in {save}: name the output folder of a "
            "finished training with --start_from, or a packed folder"
        )
    state = torch.load(best.paramfiles[name], weights_only=True)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{folder} has another network: {hint}") from error


def check_same_network(network, checkpointer, hint, name="network"):
    """Refuse to go on from checkpoints of a network of other sizes.

    Arguments
    ---------
    network : torch.nn.Module
        What the newest checkpoint will be loaded into.
    checkpointer : speechbrain.utils.checkpoints.Checkpointer
    hint : str
        What to do about it, for the message.
    name : str
        Under which the checkpointer saves the network.
    """
    newest = checkpointer.find_checkpoint()
    if newest is None or name not in newest.paramfiles:
        return
    path = newest.paramfiles[name]
    if not zipfile.is_zipfile(path) or _zip_damage(path):
        return  # which the loading tells
    state = torch.load(path, weights_only=True)
    # Names that only one of them has are those of quantized weights.
    for key, own in network.state_dict().items():
        saved = state.get(key, own)
        if saved.shape != own.shape:
            raise ValueError(
                f"{newest.path} is of another network ({key} is "
                f"{list(saved.shape)}, here {list(own.shape)}): {hint}"
            )


class AtomicCheckpointer(Checkpointer):
    """A Checkpointer whose checkpoints survive a kill while being written.

    SpeechBrain's own writes the file by which it later knows a checkpoint
    first, so that one cut short would be loaded. Here everything is written
    under another name, put on the disk, and renamed in the end. A checkpoint
    that is damaged all the same is passed over with a warning.

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
    _told = frozenset()  # damaged folders that were warned of

    def save_checkpoint(self, *args, **kwargs):
        """Saves as SpeechBrain does; renames the folder when it is complete.

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

    def recover_if_possible(
        self,
        importance_key=None,
        max_key=None,
        min_key=None,
        ckpt_predicate=None,
    ):
        """Loads the checkpoint that is asked for, or the next whole one.

        Arguments
        ---------
        importance_key, max_key, min_key, ckpt_predicate
            As for SpeechBrain's Checkpointer.

        Returns
        -------
        Checkpoint
            None where there is none.
        """
        ranked = self.find_checkpoints(
            importance_key, max_key, min_key, ckpt_predicate
        )
        if not ranked:
            self._check_diverged(max_key or min_key)
        names = self._required()
        held = [names & set(checkpoint.paramfiles) for checkpoint in ranked]
        damaged = []
        for checkpoint, own in zip(ranked, held):
            problem = self._damage(checkpoint, ranked)
            lost = set().union(*held) - own
            if not problem and lost:
                problem = f"{min(lost)} is not there, as in others"
            if not problem:
                for path, why in damaged:
                    logger.warning(
                        f"{path} is damaged ({why}): loading "
                        f"{checkpoint.path} in its place"
                    )
                self.load_checkpoint(checkpoint)
                return checkpoint
            damaged.append((checkpoint.path, problem))
        unlisted = self._damaged_folders()
        damaged += [(path, why) for path, why in unlisted.items()]
        if damaged and not (ranked == [] and self.list_checkpoints()):
            listed = "; ".join(f"{path} ({why})" for path, why in damaged)
            raise ValueError(
                f"no whole checkpoint is left: {listed}. Delete them to begin "
                "anew, or copy whole ones there"
            )
        logger.info("Would load a checkpoint here, but none found yet.")
        return None

    def _check_diverged(self, key):
        """Raise ValueError where all there is to choose by is NaN."""
        values = [c.meta[key] for c in self.list_checkpoints() if key in c.meta]
        if values and not any(map(_is_finite, values)):
            raise ValueError(
                f"no checkpoint in {self.checkpoints_dir} has a finite {key}: "
                "the training has diverged; train again with a smaller lr"
            )

    def _damage(self, checkpoint, others):
        """What is wrong with a checkpoint's files; empty if nothing is."""
        for name, path in checkpoint.paramfiles.items():
            start = _start(path)
            if not path.is_file() and not path.is_dir():
                return f"{path.name} is no file"
            zipped = any(  # as it is elsewhere
                _start(other.paramfiles[name]).startswith(_ZIP)
                for other in (checkpoint, *others)
                if name in other.paramfiles
            )
            by_torch = zipped or self._is_torch_saved(name)
            if path.is_dir() and not by_torch:
                continue
            if not start.strip(b"\0"):
                return f"{path.name} is empty"
            problem = ""
            if start.startswith(_ZIP):
                problem = _zip_damage(path)
            elif by_torch and not start.startswith(_PICKLE):
                problem = f"{path.name} is none that torch.save wrote"
            elif name in self.recoverables:
                end = checkpoint.meta["end-of-epoch"]
                problem = _text_damage(self.recoverables[name], path, end)
            if problem:
                return problem
        return ""

    def _is_torch_saved(self, name):
        """Whether something is saved as SpeechBrain saves modules."""
        own = self.recoverables.get(name)
        hook = hooks.get_default_hook(own, hooks.DEFAULT_LOAD_HOOKS)
        return (
            hook is hooks.torch_recovery and name not in self.custom_load_hooks
        )

    def find_checkpoints(
        self,
        importance_key=None,
        max_key=None,
        min_key=None,
        ckpt_predicate=None,
        max_num_checkpoints=None,
    ):
        """Finds checkpoints as SpeechBrain does, those of NaN passed over.

        Arguments
        ---------
        importance_key, max_key, min_key, ckpt_predicate, max_num_checkpoints
            As for SpeechBrain's Checkpointer.

        Returns
        -------
        list of Checkpoint
        """
        key = max_key or min_key

        def is_measured(checkpoint):
            chosen = ckpt_predicate is None or ckpt_predicate(checkpoint)
            value = checkpoint.meta.get(key, 0.0)
            return chosen and _is_finite(value)

        return super().find_checkpoints(
            importance_key,
            max_key,
            min_key,
            is_measured if key else ckpt_predicate,
            max_num_checkpoints,
        )

    def _required(self):
        """Names of what SpeechBrain refuses to load without."""
        if self.allow_partial_load:
            return set()
        optional = self.optional_recoverables
        return {
            name
            for name in self.recoverables
            if not optional.get(name) and "dataloader" not in name
        }

    def list_checkpoints(self):
        """Lists the checkpoints whose own description can be read.

        Returns
        -------
        list of Checkpoint
        """
        damaged = self._damaged_folders()
        for path, why in damaged.items():
            if path not in self._told:
                logger.warning(f"{path} is damaged ({why}): passed over")
        self._told = self._told | set(damaged)
        folders = [p for p in self._list_checkpoint_dirs() if p not in damaged]
        return self._construct_checkpoint_objects(folders)

    def _damaged_folders(self):
        """Folders of checkpoints whose description cannot be read -> why."""
        damaged = {}
        for folder in self._list_checkpoint_dirs():
            try:
                text = (folder / METAFNAME).read_text(encoding="utf-8")
                meta = yaml.safe_load(text)
            except (yaml.YAMLError, UnicodeError) as error:
                problem = str(error).splitlines()[0]
                damaged[folder] = f"{METAFNAME} is no YAML: {problem}"
                continue
            if (
                not isinstance(meta, dict)
                or not _is_finite(meta.get("unixtime"))
                or not isinstance(meta.get("end-of-epoch"), bool)
            ):
                damaged[folder] = f"{METAFNAME} is not complete"
        return damaged

    def _renamed(self, checkpoint):
        """A complete checkpoint under its final name, on the disk."""
        final = checkpoint.path.with_name(
            checkpoint.path.name.removeprefix(PARTIAL)
        )
        for path in [*checkpoint.path.rglob("*"), checkpoint.path]:
            _to_disk(path)
        old = final.with_name(f"{PARTIAL}old-{final.name}")
        if final.exists():  # a name that was asked for again
            os.replace(final, old)
        os.replace(checkpoint.path, final)
        _to_disk(final.parent)
        shutil.rmtree(old, ignore_errors=True)
        paramfiles = {
            name: final / path.name
            for name, path in checkpoint.paramfiles.items()
        }
        return checkpoint._replace(path=final, paramfiles=paramfiles)

    def _new_checkpoint_dirpath(self):
        """A name that is no checkpoint's yet."""
        path = super()._new_checkpoint_dirpath()
        return path.with_name(PARTIAL + path.name)

    def _custom_checkpoint_dirpath(self, name):
        """A name that was asked for, while it is no checkpoint's yet."""
        path = super()._custom_checkpoint_dirpath(name)
        return path.with_name(PARTIAL + path.name)


def _is_finite(value):
    """Whether something is a number that others can be compared with."""
    return isinstance(value, int | float) and math.isfinite(value)


def recover_whole(checkpointer, **keys):
    """Recovers from any Checkpointer's best whole checkpoint."""
    whole = AtomicCheckpointer.__new__(AtomicCheckpointer)
    whole.__dict__ = vars(checkpointer).copy()
    return whole.recover_if_possible(**keys)


def _to_disk(path):
    """Wait until a file or the names in a folder are on the disk."""
    if os.name != "posix" and path.is_dir():
        return  # other systems have no such thing
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _start(path):
    """The first bytes of a file; none where there is no file."""
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(512)


def _zip_damage(path):
    """What is wrong with a file that torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as content:
            broken = content.testzip()
    except Exception as error:  # whatever the bytes may be taken for
        return f"{path.name}: {error}"
    return f"{path.name}: {broken} is not what it was" if broken else ""


def _text_damage(recoverable, path, end_of_epoch):
    """What is wrong with a text that a small object saves; told by a copy."""
    hook = hooks.get_default_hook(recoverable, hooks.DEFAULT_LOAD_HOOKS)
    if not isinstance(recoverable, EpochCounter) or hook is None:
        return ""  # only who wrote it knows
    try:
        hook(copy.deepcopy(recoverable), path, end_of_epoch)
    except (ValueError, TypeError, LookupError) as error:
        return f"{path.name}: {error}"
    return ""


WholeCheckpointer = AtomicCheckpointer  # its name in earlier YAML files

# What says which table a tensor has
TABLE = ("bits", "ternary", "midrise", "entropy")


def guard_loading(model, any_bits=False):
    """Checks whatever is loaded into a quantized model.

    Modules that save only a part of themselves on purpose, such as
    SpeechBrain's AdaptedModel, save the scales of their quantized weights
    with it from then on.

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
        if _saves_a_part(module):
            _complete_saver(type(module))
        if not chains(module):
            continue
        check = partial(_check, any_bits=any_bits)
        handles.append(module.register_load_state_dict_pre_hook(check))
    return handles


def _saves_a_part(module):
    """Whether a module's own hook saves a part of its quantized state."""
    if own_hook(module, "SAVE") is None or not _scales(module):
        return False
    try:
        saved = read_saved(module)
    except NotStorableError:
        return False
    own = module.state_dict().keys()
    return isinstance(saved, dict) and saved.keys() < own


def _scales(module):
    """What quantizers add to the state of a module, by its names there."""
    scales = {}
    for path, inner in module.named_modules():
        for attribute, chain in chains(inner).items():
            quantizer = quantizer_of(chain)
            if quantizer is not None:
                name = f"{path}.parametrizations.{attribute}.{len(chain) - 1}."
                scales.update(quantizer.state_dict(prefix=name.lstrip(".")))
    return scales


def _complete_saver(kind):
    """Let a class's own hook save scales, too."""
    defaults = hooks.DEFAULT_SAVE_HOOKS
    owner = next(k for k in kind.__mro__ if k in defaults)
    plain = defaults[owner]
    if not hasattr(plain, "completed"):
        defaults[owner] = _saves_scales(plain)


def _saves_scales(plain):
    """A hook that saves what another one does, and the scales."""

    @wraps(plain)
    def save(module, path):
        plain(module, path)
        scales = _scales(module)
        if scales and if_main_process():
            state = torch.load(path, "cpu", weights_only=True)
            torch.save({**scales, **state}, path)

    save.completed = True
    return save


def _loads_a_part():
    """Whether what is loading is a hook that may leave out something."""
    # Such hooks are functions of users; only who called them is known. torch
    # tells hooks no `strict`.
    callers = {
        Checkpointer._call_load_hooks.__code__,
        Pretrainer._call_load_hooks.__code__,
    }
    frame = sys._getframe(1)
    while frame is not None and frame.f_code not in callers:
        code = frame.f_code
        if code is hooks.torch_parameter_transfer.__code__:
            return False
        if code is hooks.torch_recovery.__code__:
            load = type(frame.f_locals["obj"]).load_state_dict
            if load is torch.nn.Module.load_state_dict:  # it is strict
                return False
        frame = frame.f_back
    return frame is not None


def _check(module, state_dict, prefix, *_, any_bits):
    """Before loading: refuse what lacks a tensor or has other tables."""
    for attribute, chain in chains(module).items():
        if quantizer_of(chain) is None:
            continue
        inside = f"{prefix}parametrizations.{attribute}."
        own = chain.state_dict()
        missing = [name for name in own if inside + name not in state_dict]
        if missing and _loads_a_part():
            missing = _complete_part(chain, prefix + attribute, inside, missing)
        if missing == list(own):
            raise ValueError(
                f"the checkpoint lacks {prefix + attribute!r}, which is "
                "quantized here: load one of this architecture; a part of it "
                "on purpose into the modules of that part (model.encoder."
                "load_state_dict), or leave the others out of the quantizer's "
                "targets"
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


def _complete_part(chain, name, inside, missing):
    """What a part that was saved on purpose lacks, and should not."""
    scales = f"{len(chain) - 1}."
    floats = [n for n in chain.state_dict() if not n.startswith(scales)]
    if set(floats) <= set(missing):
        return []  # they keep what they have, or are fixed
    quantizer = [n for n in missing if n.startswith(scales)]
    if quantizer == missing and any(n.endswith(".bits") for n in missing):
        logger.warning(
            f"{name}: its scales were not saved beside it, and are fitted "
            "anew where they do not fit what was loaded"
        )
        chain.took_part = True
        return []
    return missing


def _check_tables(name, inside, own, state_dict, any_bits):
    """Refuse a checkpoint that is quantized to another plan."""
    for key, value in own.items():
        kind = key.split(".")[-1]
        stored = state_dict.get(inside + key)
        if kind not in TABLE or stored is None:
            continue
        if any_bits and kind not in ("midrise", "entropy"):
            continue
        if not torch.equal(stored.cpu(), value.cpu()):
            raise ValueError(
                f"the checkpoint is quantized to another plan: {name!r} has "
                f"{kind} {stored.item()} there and {value.item()} here. Ask "
                "for its bits and codebook, or train in another output_folder"
            )
