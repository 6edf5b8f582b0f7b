"""Integers to bytes and back, against the format in words."""

import pytest
import torch

from speechbrain_mpq.quantization.bit_packing import pack_bits, unpack_bits
from speechbrain_mpq.quantization.codebook import codebook
from speechbrain_mpq.quantization.tables import CODEBOOKS, has_zero


def slow_pack(integers, bits, kind):
    """One code after another, lowest bit first; at 1.6 bits base 3."""
    if bits == 1.6:
        groups = [integers[i : i + 5] for i in range(0, len(integers), 5)]
        return [sum((v + 1) * 3**i for i, v in enumerate(g)) for g in groups]
    stream = []
    for value in integers:
        if has_zero(bits, kind):
            code = value + 2 ** (bits - 1)
        else:
            code = (value + 2**bits - 1) // 2
        stream += [(code >> bit) & 1 for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    starts = range(0, len(stream), 8)
    return [sum(stream[s + i] << i for i in range(8)) for s in starts]


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 33])
@pytest.mark.parametrize("bits", [1.6, *range(1, 17)])
def test_bits_survive_and_follow_the_written_format(bits, count, kind):
    torch.manual_seed(int(bits))
    table = codebook(bits, kind=kind).int()
    integers = table[torch.randint(len(table), (count,))]
    integers[:2] = table[[0, -1]][:count]
    data = pack_bits(integers, bits, kind)
    assert data.dtype == torch.uint8
    assert data.tolist() == slow_pack(integers.tolist(), bits, kind)
    assert torch.equal(unpack_bits(data, bits, (count,), kind), integers)


@pytest.mark.parametrize("bits", [1.6, 4])
def test_shape_comes_back(bits):
    integers = torch.arange(-7, 8).reshape(3, 5)
    integers = integers.clamp(-1, 1) if bits == 1.6 else integers
    restored = unpack_bits(pack_bits(integers, bits), bits, (3, 5))
    assert torch.equal(restored, integers.int())


@pytest.mark.parametrize(
    "bits, value, kind",
    [
        (1, 0, "midtread"),
        (1, 3, "midtread"),
        (1.6, 2, "midtread"),
        (2, 2, "midtread"),
        (4, -8, "midtread"),
        (2, 0, "midrise"),
        (2, 2, "midrise"),
        (2, -5, "midrise"),
    ],
)
def test_integers_outside_of_the_codebook_are_refused(bits, value, kind):
    with pytest.raises(ValueError, match=f"{bits}-bit codebook"):
        pack_bits(torch.tensor([1, value]), bits, kind)


def test_bytes_that_cannot_be_are_refused():
    wrong = torch.tensor([243], dtype=torch.uint8)
    with pytest.raises(ValueError, match="over 242"):
        unpack_bits(wrong, 1.6, (5,))
    with pytest.raises(ValueError, match="6 values of 1.6 bits take 2 bytes"):
        unpack_bits(wrong, 1.6, (6,))
