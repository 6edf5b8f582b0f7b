"""The quantization tables: bits and levels."""

import numpy as np
import pytest
import torch

from speechbrain_mpq.quantization.codebook import codebook
from speechbrain_mpq.quantization.tables import (
    CODEBOOKS,
    MIDRISE_BITS,
    check_bits,
    has_zero,
    largest_level,
    table_bits,
)


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("bits", [1.6, *range(1, 17)])
def test_tables_are_symmetric_and_evenly_spaced(bits, kind):
    table = codebook(bits, 0.5, kind)
    assert torch.equal(table, -table.flip(0))
    assert table.max() == 0.5 * largest_level(bits, kind)
    assert len(table.diff().unique()) == 1
    assert (0 in table) == has_zero(bits, kind)


@pytest.mark.parametrize("bits", range(1, 17))
def test_the_default_has_the_papers_levels(bits):
    assert len(codebook(bits)) == (2 if bits == 1 else 2**bits - 1)
    assert has_zero(bits) == (bits > 1)


@pytest.mark.parametrize("bits", MIDRISE_BITS)
def test_midrise_uses_all_names_that_the_bits_have(bits):
    table = codebook(bits, kind="midrise")
    assert len(table) == 2**bits
    assert (table % 2 == 1).all() and table.max() <= 127  # int8


@pytest.mark.parametrize("bits", [1, 1.6, *range(7, 17)])
def test_other_bits_have_one_table(bits):
    assert torch.equal(codebook(bits), codebook(bits, kind="midrise"))


def test_three_levels():
    assert codebook(1.6).tolist() == [-1, 0, 1]
    assert table_bits(1.6) == 2


@pytest.mark.parametrize(
    "bits", [0, 17, -1, True, 4.0, 1.5, 1.61, float("nan"), "4", "1.6", None]
)
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="integer from 1 to 16 or 1.6"):
        codebook(bits)


def test_numpy_numbers_are_bits():
    assert len(codebook(np.int64(2))) == 3
    assert type(check_bits(np.int64(2))) is int
    assert type(check_bits(np.float64(1.6))) is float


def test_an_unknown_codebook_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="midtread.*midrise.*'mid-rise'"):
        largest_level(2, "mid-rise")
