"""Mixtures from the device against those of the loader."""

import numpy as np
import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch
from test_mixtures import Bank, speech  # noqa: F401

from speechbrain_mpq.simulation.dataio import (
    DeviceMixer,
    _is_symmetric,
    mix_batch_,
    training_mixtures,
)
from speechbrain_mpq.simulation.mixtures import MixtureMaker


class HalfBank(Bank):
    """With responses that half precision holds, as those on disk."""

    def __init__(self):
        super().__init__()
        self._rirs = self._rirs.astype(np.float16)


@pytest.mark.parametrize("seconds", [0.7, 1.5, 4.0])
def test_device_and_loader_make_the_same(speech, seconds):  # noqa: F811
    maker = MixtureMaker(speech, HalfBank(), mirror=True)
    mixer = DeviceMixer(maker.rooms, seconds)
    mirrored = set()
    for maker.epoch in range(3):
        mirrored |= {maker.draw(key)["mirrored"] for key in speech}
        rendered = training_mixtures(maker, seconds)
        dry = training_mixtures(maker, seconds, dry=True)
        batch = PaddedBatch([dry[i] for i in range(8)])
        mix_batch_(mixer, batch, "cpu")
        for i in range(8):
            for name in ("mixture", "targets"):
                made = getattr(batch, name).data[i]
                torch.testing.assert_close(
                    made, rendered[i][name], rtol=1e-4, atol=2e-5
                )
            assert torch.equal(batch.doa.data[i], rendered[i]["doa"])
    assert mirrored == {True, False}


def test_a_batch_mixes_as_its_items_alone(speech):  # noqa: F811
    maker = MixtureMaker(speech, HalfBank())
    mixer = DeviceMixer(maker.rooms, 1.0)
    dry = training_mixtures(maker, 1.0, dry=True)
    together = PaddedBatch([dry[i] for i in range(8)])
    mix_batch_(mixer, together, "cpu")
    alone = PaddedBatch([dry[3]])
    mix_batch_(mixer, alone, "cpu")
    torch.testing.assert_close(
        together.mixture.data[3:4], alone.mixture.data, rtol=1e-4, atol=2e-5
    )


def test_rooms_of_different_lengths_lie_in_one_bank():
    bank = HalfBank()
    rirs = {0: bank._rirs[0], 1: bank._rirs[1, :3, :, :50]}
    bank.doa[1] = bank.doa[1][:3]
    bank.rirs = lambda room, who: rirs[room][list(who)].astype(np.float32)
    responses = DeviceMixer(bank, 1.0).responses.numpy()
    assert responses.shape == (2, 5, 3, 400)
    np.testing.assert_array_equal(responses[0], rirs[0])
    np.testing.assert_array_equal(responses[1, :3, :, :50], rirs[1])
    assert not responses[1, 3:].any() and not responses[1, :, :, 50:].any()


@pytest.mark.parametrize(
    "positions, symmetric",
    [
        ([0.0, 0.05, 0.1], True),
        ([0.0, 0.05, 0.15], False),
        ([[0.0, 0.0], [0.05, 0.0], [0.1, 0.0]], False),  # planar
    ],
)
def test_only_what_looks_alike_from_both_ends_is_mirrored(positions, symmetric):
    assert _is_symmetric(np.array(positions), [1, 2, 3]) == symmetric
