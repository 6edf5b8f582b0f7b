"""Packing from an output folder."""

import pytest

from speechbrain_mpq import pack_results
from speechbrain_mpq.training.packed_results import ANCHOR


def test_anchors_cannot_be_taken_for_those_of_another_loading():
    text = "a: &id001 (4, 4)\nb: *id001\nurl: http://x?a&id001\n"
    assert ANCHOR.sub(r"\1saved\2", text) == (
        "a: &saved001 (4, 4)\nb: *saved001\nurl: http://x?a&id001\n"
    )


def test_folders_without_a_training(tmp_path):
    with pytest.raises(FileNotFoundError, match="finished training"):
        pack_results(tmp_path)
