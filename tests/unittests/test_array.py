"""Geometry of the array."""

import math

import pytest
import torch

from speechbrain_mpq.separation.array import (
    check_doa,
    linear_array,
    pair_phase,
    used_microphones,
)


def test_paper_array_is_symmetric_and_56_cm_long():
    positions = linear_array()
    assert positions.mul(100).round().tolist() == [
        *(0, 7, 13, 18, 22, 25, 27, 28, 29, 31, 34, 38, 43, 49, 56)
    ]
    mirrored = positions[-1] - positions.flip(0)
    torch.testing.assert_close(mirrored, positions)


def test_pair_phase_is_frequency_times_path_difference():
    phase = pair_phase(
        torch.tensor([60.0]), torch.tensor([0.2]), torch.tensor([1000.0])
    )
    path = 0.2 * 0.5  # metres: distance times cos(60 degrees)
    assert phase.item() == pytest.approx(2 * math.pi * 1000 * path / 343)


def test_used_microphones_include_the_reference():
    assert used_microphones([(3, 2)], reference=1) == [1, 2, 3]


@pytest.mark.parametrize("doa", [-0.1, 180.5, float("nan")])
def test_direction_out_of_range_is_refused(doa):
    with pytest.raises(ValueError, match="0 to 180 degrees"):
        check_doa(torch.tensor([90.0, doa]))
