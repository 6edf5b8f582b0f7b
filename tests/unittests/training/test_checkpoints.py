"""Checkpoints that were cut short are not taken for checkpoints."""

import pytest
import torch

from speechbrain_mpq.training.checkpoints import AtomicCheckpointer


class Interrupted(Exception):
    """Stands in for a kill."""


def test_interrupted_save_leaves_the_last_whole_checkpoint(tmp_path):
    layer = torch.nn.Linear(2, 1)
    checkpointer = AtomicCheckpointer(tmp_path, {"layer": layer})
    checkpointer.save_and_keep_only({"loss": 1.0}, min_keys=["loss"])
    weight = layer.weight.detach().clone()

    def interrupt(obj, path):
        path.write_bytes(b"half")
        raise Interrupted

    layer.weight.data.add_(1)
    checkpointer.custom_save_hooks["layer"] = interrupt
    with pytest.raises(Interrupted):
        checkpointer.save_and_keep_only({"loss": 0.5}, min_keys=["loss"])

    fresh = torch.nn.Linear(2, 1)
    again = AtomicCheckpointer(tmp_path, {"layer": fresh})
    # Somebody may be writing who only looks on here
    assert list(tmp_path.glob("partial+*"))
    checkpoint = again.recover_if_possible(min_key="loss")
    assert checkpoint.meta["loss"] == 1.0
    assert torch.equal(fresh.weight, weight)
    again.save_checkpoint()
    assert not list(tmp_path.glob("partial+*"))
    assert len(list(tmp_path.iterdir())) == 2


def test_only_the_best_and_the_latest_are_kept(tmp_path):
    layer = torch.nn.Linear(2, 1)
    checkpointer = AtomicCheckpointer(tmp_path, {"layer": layer})
    for loss in (3.0, 1.0, 2.0):
        layer.weight.data.fill_(loss)
        checkpointer.save_and_keep_only({"loss": loss}, min_keys=["loss"])
    checkpointer.recover_if_possible(min_key="loss")
    assert layer.weight.tolist() == [[1.0, 1.0]]
    assert len(checkpointer.list_checkpoints()) == 2
