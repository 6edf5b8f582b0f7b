"""Entropy-coded integers: lossless, near their entropy, safe to read."""

import sys

import numpy as np
import pytest
import torch

from speechbrain_mpq.quantization.codebook import largest_level
from speechbrain_mpq.quantization.container import (
    PackedModelError,
    pack_bits,
    unpack_bits,
)
from speechbrain_mpq.quantization.entropy_coding import (
    LIKELIEST,
    VALUES_PER_BYTE,
    check_claims,
    decode_packed,
    encode_packed,
)
from speechbrain_mpq.quantization.packing import (
    load_packed_,
    packed_file_bytes,
    read_model,
    save_packed,
)
from speechbrain_mpq.quantization.quant_api import quantize_

WIDTHS = [(b, c) for b in (1, 1.6, 2, 3, 4, 5, 6, 7, 8, 10, 11, 16)
          for c in ("midtread", "midrise")]  # fmt: skip


def drawn(bits, codebook, count, spread=0.3, seed=0):
    """Integers of a table, small ones more often."""
    rng = np.random.default_rng(seed)
    largest = largest_level(bits, codebook)
    values = rng.laplace(0, spread * max(largest, 1), count)
    # the levels of a table: all integers, or every other one
    if bits == 1 or (codebook == "midrise" and 2 <= bits <= 6):
        values = 2 * np.floor(values / 2) + 1
    values = np.clip(np.round(values), -largest, largest)
    return torch.from_numpy(values.astype(np.int32))


def entropy_bytes(integers):
    """What no coder with a model of single values goes below."""
    _, counts = np.unique(integers.numpy(), return_counts=True)
    share = counts / counts.sum()
    return -(counts * np.log2(share)).sum() / 8


@pytest.mark.parametrize(("bits", "codebook"), WIDTHS)
@pytest.mark.parametrize("count", [1, 7, 192, 20000])
def test_coding_is_lossless_and_close_to_the_entropy(bits, codebook, count):
    integers = drawn(bits, codebook, count)
    packed = pack_bits(integers, bits, codebook)
    described = [(bits, count)]
    coded = encode_packed(packed, described, codebook)
    again = decode_packed(coded, described, codebook)
    assert torch.equal(again, packed)
    found = unpack_bits(again, bits, (count,), codebook)
    assert torch.equal(found, integers)
    assert len(coded) <= len(packed) + 1 + 4  # the kind; words of the coder
    if count == 20000 and 2 <= bits <= 8:
        assert len(coded) < 1.005 * entropy_bytes(integers) + 520


def test_tensors_of_all_kinds_in_one_stream():
    sizes = [(4, 3000), (16, 50), (1, 9), (2, 0), (4, 5), (1.6, 700), (8, 4000)]
    tensors = [
        drawn(b, "midtread", n, seed=i) for i, (b, n) in enumerate(sizes)
    ]
    pieces = [pack_bits(t, b) for t, (b, _) in zip(tensors, sizes)]
    packed = torch.cat(pieces)
    coded = encode_packed(packed, sizes)
    assert torch.equal(decode_packed(coded, sizes), packed)
    assert len(coded) < 0.95 * len(packed)


@pytest.mark.parametrize("value", [0, 3, -7])
def test_one_level_alone_costs_what_keeps_readers_safe(value):
    integers = torch.full((100000,), value, dtype=torch.int32)
    integers[7] = 1
    described = [(4, len(integers))]
    coded = encode_packed(pack_bits(integers, 4), described)
    assert torch.equal(decode_packed(coded, described), pack_bits(integers, 4))
    floor = -np.log2(LIKELIEST) * len(integers) / 8
    assert floor <= len(coded) < 1.2 * floor
    assert len(integers) < VALUES_PER_BYTE * len(coded)


def test_claims_are_refused_before_anything_is_reserved():
    coded = torch.zeros(1000, dtype=torch.uint8)
    for described in ([(4, 2**40)], [(4, 70000)], [(4, 0)] * 1001):
        with pytest.raises(ValueError, match="integers in 1000 bytes"):
            check_claims(len(coded), described)
        with pytest.raises(ValueError, match="integers in 1000 bytes"):
            decode_packed(coded, described)


def test_damaged_streams_are_errors_or_other_integers():
    """Without the checksum of a file: no crash, no other kind of error."""
    sizes = [(4, 3000), (1.6, 700), (8, 40), (16, 5)]
    tensors = [
        drawn(b, "midtread", n, seed=i) for i, (b, n) in enumerate(sizes)
    ]
    packed = torch.cat([pack_bits(t, b) for t, (b, _) in zip(tensors, sizes)])
    coded = encode_packed(packed, sizes).numpy()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = coded.copy()
        place = rng.integers(min(60, len(coded)) if rng.random() < 0.7
                             else len(coded))  # fmt: skip
        damaged[place] ^= 1 << rng.integers(8)
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(1, len(damaged))]
        try:
            found = decode_packed(torch.from_numpy(damaged), sizes)
            assert len(found) == len(packed)
        except (ValueError, IndexError):
            refused += 1
    assert refused > 50


def small_model():
    """A few layers, as trained: bell-shaped weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(8, 64, 3), torch.nn.ReLU(), torch.nn.Conv1d(64, 64, 3)
    )
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


@pytest.mark.parametrize("codebook", ["midtread", "midrise"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("rows", [None, 16])
def test_a_coded_file_is_the_same_model(tmp_path, codebook, granularity, rows):
    model = small_model()
    scheme = {"codebook": codebook, "granularity": granularity, "rows": rows}
    quantize_(model, 4, **scheme)
    plain = save_packed(model, tmp_path / "plain")
    coded = save_packed(model, tmp_path / "coded", entropy_coded=True)
    sizes = [path.stat().st_size for path in (plain, coded)]
    assert sizes[1] < 0.95 * sizes[0]
    assert packed_file_bytes(model) == sizes[0]
    assert packed_file_bytes(model, entropy_coded=True) == sizes[1]
    packed = read_model(coded)
    assert packed.version == 5 and packed.header["coding"] == "range"
    loaded = load_packed_(small_model(), tmp_path / "coded")
    other = load_packed_(small_model(), tmp_path / "plain")
    sound = torch.randn(2, 8, 20)
    assert torch.equal(loaded(sound), model(sound))
    for name, value in other.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_transposed_convolution_keeps_its_axes(tmp_path):
    model = torch.nn.Sequential(torch.nn.ConvTranspose1d(16, 8, 4))
    quantize_(model, 4, granularity="channel")
    save_packed(model, tmp_path, entropy_coded=True)
    assert read_model(tmp_path).header["axes"] == {"0.weight": [1]}
    loaded = load_packed_(
        torch.nn.Sequential(torch.nn.ConvTranspose1d(16, 8, 4)), tmp_path
    )
    sound = torch.randn(2, 16, 20)
    assert torch.equal(loaded(sound), model(sound))


def test_full_precision_has_nothing_to_code(tmp_path):
    with pytest.raises(ValueError, match="leave out entropy_coded"):
        save_packed(small_model(), tmp_path, entropy_coded=True)
    assert not [*tmp_path.iterdir()]


def test_sizes_of_a_plan_alone_are_not_known():
    model = small_model()
    plan = quantize_(small_model(), 4)
    with pytest.raises(ValueError, match="quantize_ it by the plan first"):
        packed_file_bytes(model, plan, entropy_coded=True)


def test_a_reader_without_the_coder_says_what_to_install(tmp_path, monkeypatch):
    model = small_model()
    quantize_(model, 4)
    save_packed(model, tmp_path, entropy_coded=True)
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match="pip install constriction"):
        read_model(tmp_path)


def test_another_coding_is_refused(tmp_path):
    from speechbrain_mpq.quantization.container import (
        read_container,
        write_container,
    )

    model = small_model()
    quantize_(model, 4)
    path = save_packed(model, tmp_path, entropy_coded=True)
    container = read_container(path)
    for config in (
        {**container.config, "coding": "huffman"},
        {**container.config, "bits": [16] * len(container.config["bits"])},
    ):
        write_container(path, container.tensors, config, "5")
        with pytest.raises(PackedModelError, match="inconsistent"):
            read_model(path)
