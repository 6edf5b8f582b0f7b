"""Stages of the hybrid recognizer: what cannot be aligned is named."""

from types import SimpleNamespace

import pytest
import torch

from speechbrain_mpq.experiments.hybrid_recognition import HybridRecognition


def test_utterances_too_short_for_ctc_are_named_once(caplog):
    brain = SimpleNamespace(lf_mmi=SimpleNamespace(left_out={}))
    keys = ["fits", "repeats", "long"]
    phones, lengths = [[1, 2, 1], [1, 1, 2], [1, 2, 1, 2]], [3, 3, 3]
    for _ in range(2):
        HybridRecognition.name_too_short(brain, keys, phones, lengths)
    assert brain.lf_mmi.left_out == dict.fromkeys(
        keys[1:], "4 frames at least, 3 there"
    )
    assert len(caplog.records) == 2
    # PyTorch's CTC knows the same ones
    log_probs = torch.zeros(3, 3, 4).log_softmax(2)
    for key, said in zip(keys, phones):
        loss = HybridRecognition.ctc(
            brain, log_probs[:1], [said], torch.tensor([3])
        )
        assert (loss == 0) == (key != "fits")


def test_ctc_is_per_frame():
    log_probs = torch.zeros(1, 4, 2).log_softmax(2)
    loss = HybridRecognition.ctc(None, log_probs, [[1]], torch.tensor([4]))
    # Ten of the sixteen paths of four frames are one run of phone 1
    expected = -torch.tensor(10 / 16).log() / 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
