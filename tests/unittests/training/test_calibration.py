"""Hooks of `fit` that a Brain's passes need, and what they must not leave."""

import random

import numpy as np
import pytest
import speechbrain as sb
import torch
from helpers import brain_of, fit, hparams_of, script

from speechbrain_mpq import choose_bits
from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.training.calibration import Rehearsal

LOADER = {"batch_size": 4}
TinyASR = script().TinyASR


def made(cls, folder, seed=5):
    """A Brain of a class before fit, always of the same weights."""
    torch.manual_seed(seed)
    brain = brain_of(hparams_of("plain", folder))
    brain.__class__ = cls
    return brain


def scores_of(brain, folder, scores="loss"):
    """The table that choose_bits leaves."""
    data = script().dataset(4, seed=2)
    choose_bits(brain, data, scores, 4, loader_kwargs=LOADER, progress=False)
    return ScoreTable.load(folder / "scores.json").scores


class Starting(TinyASR):
    """Its loss reads what its on_fit_start sets, as Tacotron2's does."""

    def on_fit_start(self):
        """Set it, some before and some after the optimizers are there."""
        self.weights = dict.fromkeys(sb.Stage, 1.0)
        self.hparams.started = random.random() + np.random.rand()
        super().on_fit_start()
        self.rate = self.optimizer.param_groups[0]["lr"]

    def compute_objectives(self, predictions, batch, stage):
        """The plain loss."""
        assert self.rate > 0 and self.hparams.started
        loss = super().compute_objectives(predictions, batch, stage)
        return loss * self.weights[stage]


class Staged(TinyASR):
    """Its loss reads what only the start of a training stage sets."""

    def on_stage_start(self, stage, epoch=None):
        """Set it."""
        if stage == sb.Stage.TRAIN:
            self.weight = 1.0

    def compute_objectives(self, predictions, batch, stage):
        """The plain loss."""
        loss = super().compute_objectives(predictions, batch, stage)
        return loss * self.weight


@pytest.mark.parametrize("cls", [Starting, Staged])
def test_scores_are_those_of_a_brain_without_hooks(tmp_path, cls):
    plain = scores_of(made(TinyASR, tmp_path / "plain"), tmp_path / "plain")
    hooked = scores_of(made(cls, tmp_path / "hooks"), tmp_path / "hooks")
    assert hooked == plain


@pytest.mark.parametrize("cls", [Starting, Staged])
def test_nothing_is_left_of_a_rehearsal(tmp_path, cls):
    brain = made(cls, tmp_path)
    recoverables = dict(brain.checkpointer.recoverables)
    states = random.getstate(), np.random.get_state()[1].tolist()
    scores_of(brain, tmp_path)
    assert not {"weights", "rate", "optimizer", "weight"} & set(vars(brain))
    assert not hasattr(brain.hparams, "started")
    assert brain.checkpointer.recoverables == recoverables
    assert brain.optimizers_dict is None
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    fit(brain, hparams_of("plain", tmp_path))  # which starts as it should
    assert brain.optimizers_dict


def test_no_checkpoint_is_read_or_written(tmp_path):
    brain = made(Starting, tmp_path)
    brain.checkpointer.save_checkpoint()
    with torch.no_grad():
        for parameter in brain.modules.parameters():
            parameter.add_(1)
    before = {n: p.clone() for n, p in brain.modules.named_parameters()}
    with Rehearsal(brain, sb.Stage.VALID).started():
        assert brain.rate > 0
    for name, parameter in brain.modules.named_parameters():
        assert torch.equal(parameter, before[name])
    assert len(brain.checkpointer.list_checkpoints()) == 1


def test_on_fit_start_runs_once_and_stages_start_anew(tmp_path):
    class Counting(Starting):
        calls = []

        def on_fit_start(self):
            self.calls.append("fit")
            super().on_fit_start()

        def on_stage_start(self, stage, epoch=None):
            self.calls.append(stage)
            assert self.weights

    scores_of(made(Counting, tmp_path), tmp_path)
    assert Counting.calls.count("fit") == 1
    assert Counting.calls.count(sb.Stage.VALID) >= 2  # scores and rounding
    assert sb.Stage.TRAIN not in Counting.calls


def test_what_nothing_sets_is_named(tmp_path):
    class Unset(TinyASR):
        def compute_objectives(self, predictions, batch, stage):
            return self.last_loss

    with pytest.raises(ValueError, match="Unset reads 'last_loss' when it"):
        scores_of(made(Unset, tmp_path), tmp_path)


def test_errors_of_other_objects_stay_what_they_are(tmp_path):
    class Mistaken(TinyASR):
        def compute_objectives(self, predictions, batch, stage):
            return predictions[0].nothing

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        scores_of(made(Mistaken, tmp_path), tmp_path)


def test_a_stage_that_trains_is_refused(tmp_path):
    class Trains(Staged):
        def on_stage_start(self, stage, epoch=None):
            if stage == sb.Stage.TRAIN:
                self.fit([1], None)

    with pytest.raises(ValueError, match="Trains trains in its on_stage_start"):
        scores_of(made(Trains, tmp_path), tmp_path)
