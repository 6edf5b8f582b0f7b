"""Files and checkpoints that are there whole or not at all."""

import json
import os
import shutil
from pathlib import Path

from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process

from ..whole_files import write_text

PARTIAL = "partial+"  # a name that SpeechBrain takes for no checkpoint


def write_json(path, content):
    """Write JSON so that a reader never sees a part of it.

    Arguments
    ---------
    path : pathlib.Path
    content : dict
        JSON-ready.

    Example
    -------
    >>> path = Path(getfixture("tmpdir")) / "times.json"
    >>> write_json(path, {"scores": 1.5})
    >>> path.read_text()
    '{"scores": 1.5}'
    """
    write_text(path, json.dumps(content))


class WholeCheckpointer(Checkpointer):
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
    >>> checkpointer = WholeCheckpointer(folder, {"layer": layer})
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
