"""Packed files from strangers: read whole, or refused with a reason.

Integers to bytes and back, against the format in words.
"""

import codecs
import itertools
import json
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import forge, published, refused_file
from safetensors.torch import load_file, save_file

from speechbrain_mpq.quantization import container
from speechbrain_mpq.quantization.codebook import codebook, has_zero
from speechbrain_mpq.quantization.container import (
    MAX_HEADER,
    digest,
    pack_bits,
    read_container,
    unpack_bits,
    write_container,
)
from speechbrain_mpq.quantization.packing import (
    load_packed_,
    read_model,
    save_packed,
)
from speechbrain_mpq.quantization.quant_api import named_tensors
from speechbrain_mpq.utils import strict_json

DATA = Path(__file__).parents[2] / "data"


GOLDEN = DATA / "packed"
MAKER = runpy.run_path(str(DATA / "make_golden.py"))


def write(path, header, payload=b"", length=None):
    """A file with any header, given as JSON text or as an object."""
    text = header if isinstance(header, str) else json.dumps(header)
    text = text.encode()
    length = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + text + payload)


def entry(**changed):
    """The description of a tensor of three floats, changed."""
    plain = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    return {**plain, **changed}


@pytest.mark.parametrize("version", [1, 2, 3, 5])
def test_golden_files_are_read_and_written_as_ever(tmp_path, version):
    model = MAKER["golden"](version)
    read = load_packed_(MAKER["toy"](), GOLDEN / str(version))
    state = read.state_dict()
    for name, tensor in named_tensors(model).items():
        stored = state[tensor.parameter_name][tensor.rows]
        assert torch.equal(stored, tensor.weight), name
    MAKER["write"](version, tmp_path)
    for file in (GOLDEN / str(version)).iterdir():
        if file.suffix != ".md":  # the card's words may change
            assert (tmp_path / file.name).read_bytes() == published(file)


def test_golden_files_hold_what_was_put_in():
    """Against the formula, not the quantizer."""
    packed = read_model(GOLDEN / "2")
    assert {tensor.bits for tensor in packed.quantized.values()} == {
        *(4, 1.6, 2, 8, 5)
    }
    name = "mask_net.tcn_0_0.conv_1x1_in.weight[2:4]"
    tensor = packed.quantized[name]
    steps = torch.arange(8) * 7 + 3
    assert tensor.bits == 2
    assert tensor.integers.flatten().tolist() == (2 * (steps % 4) - 3).tolist()
    assert set(packed.floats) == {
        "mask_net.conv_in.bias",
        "mask_net.conv_out.bias",
    }


def test_the_safetensors_library_reads_the_same(tmp_path):
    forge(tmp_path / "model.safetensors", lambda config, tensors: None)
    ours = read_container(tmp_path / "model.safetensors").tensors
    theirs = load_file(tmp_path / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_all_types_survive(tmp_path):
    tensors = {
        str(dtype).removeprefix("torch."): torch.tensor([[1, 0], [3, 1]]).to(
            dtype
        )
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
            *(torch.int64, torch.int32, torch.int16, torch.int8),
            *(torch.uint8, torch.bool),
        )
    }
    tensors["empty"], tensors["one"] = torch.zeros(0, 3), torch.tensor(2.0)
    write_container(tmp_path / "f", tensors, {"a": 1}, "1")
    container = read_container(tmp_path / "f")
    assert container.config == {"a": 1} and container.version == "1"
    assert container.content == (tmp_path / "f").read_bytes()
    for name, tensor in tensors.items():
        assert torch.equal(container.tensors[name], tensor), name
        assert container.tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "only 0 bytes"),
        (b"\x10\0\0\0", "only 4 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "a header of 92233"),
        (struct.pack("<Q", MAX_HEADER + 1) + b"{}", "a header of 16777217"),
        (struct.pack("<Q", 3) + b"{}", "a header of 3 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        (struct.pack("<Q", 2) + b"{\xff", "utf-8"),
        (struct.pack("<Q", 2) + b"{}", "not a packed model"),
        (struct.pack("<Q", 2) + b"{}" + b"x", "1 bytes of tensors where 0"),
    ],
)
def test_files_that_are_none(tmp_path, content, match):
    (tmp_path / "model.safetensors").write_bytes(content)
    refused_file(tmp_path / "model.safetensors", match)


@pytest.mark.parametrize(
    "header, match",
    [
        ({"a": entry(dtype="F8")}, "unknown type 'F8'"),
        ({"a": entry(dtype=["F32"])}, "unknown type"),
        ({"a": entry(dtype="F16")}, "space of another size"),
        ({"a": entry(shape=[-3])}, "a shape that is none"),
        ({"a": entry(shape=[3.0])}, "a shape that is none"),
        ({"a": entry(shape=[True])}, "a shape that is none"),
        ({"a": entry(shape=[2**62, 2**62])}, "a shape that is none"),
        ({"a": entry(shape=[0, 2**60], data_offsets=[0, 0])}, "shape"),
        ({"a": entry(shape=[1] * 100)}, "a shape that is none"),
        ({"a": entry(shape=[2**40])}, "space of another size"),
        ({"a": entry(data_offsets=[0, 2**40])}, "space of another size"),
        ({"a": entry(data_offsets=[4, 16])}, "does not follow"),
        ({"a": entry(data_offsets=[0])}, "offsets that are none"),
        ({"a": entry(data_offsets=[12, 0])}, "space of another size"),
        ({"a": entry(extra=1)}, "is not described by"),
        ({"a": [1]}, "is not described by"),
        ({"a": entry(), "b": entry()}, "does not follow"),
        ({"__metadata__": [1], "a": entry()}, "no strings"),
        ({"__metadata__": {"format": 1}, "a": entry()}, "no strings"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('{"__metadata__": {"format": "pt", "format": "pt"}}', "twice"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": ' + "[" * 200_000, "too deeply|Expecting"),
        ('{"a": ' + "9" * 10_000 + "}", "digits"),
        ('{"\\ud800": 1}', "surrogates"),
    ],
)
def test_headers_that_lie(tmp_path, header, match):
    write(tmp_path / "model.safetensors", header, bytes(12))
    refused_file(tmp_path / "model.safetensors", match)


def test_a_declared_terabyte_costs_nothing(tmp_path):
    """Neither the header nor a shape makes the reader reserve memory."""
    import tracemalloc

    huge = entry(shape=[2**38], data_offsets=[0, 2**40])
    tracemalloc.start()
    for length in (None, 2**40, MAX_HEADER):
        write(tmp_path / "model.safetensors", {"a": huge}, bytes(12), length)
        refused_file(tmp_path / "model.safetensors", "damaged")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_metadata_are_ours_and_no_more(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.ones(3)}
    save_file(tensors, path, {"format": "pt", "mpq_version": "1"})
    refused_file(
        path, "metadata are not format, mpq_version, mpq_config, sha256"
    )
    more = {"format": "pt", "mpq_version": "1", "mpq_config": "{}"}
    more["sha256"] = digest(tensors, "{}", "1")
    save_file(tensors, path, {**more, "more": ""})
    refused_file(path, "metadata are not")
    save_file(tensors, path, {**more, "sha256": more["sha256"].upper()})
    refused_file(path, "SHA-256 does not match")


def test_numbers_beyond_all_floats_are_no_json():
    assert strict_json("[1e300, -0.5]", packed=True) == [1e300, -0.5]
    for text in ("1e999", "-1e999", "NaN", "Infinity"):
        with pytest.raises(ValueError):
            strict_json(f"[{text}]", packed=True)


def test_header_that_an_editor_has_written(tmp_path):
    path = tmp_path / "f"
    write_container(path, {"a": torch.ones(2)}, {}, "1")
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    marked = codecs.BOM_UTF8 + content[8 : 8 + length].rstrip()
    start = struct.pack("<Q", len(marked))
    path.write_bytes(start + marked + content[8 + length :])
    refused_file(path, "BOM")
    assert read_container(_written(tmp_path, {"n": 2**70})).config["n"] == 2**70


def _written(folder, config):
    """A sound file with a configuration."""
    write_container(folder / "sound", {"a": torch.ones(2)}, config, "1")
    return folder / "sound"


def test_what_readers_refuse_is_not_written(tmp_path):
    model = torch.nn.Linear(2, 1)
    for extra in ("metadata", "architecture"):
        with pytest.raises(ValueError, match="not JSON compliant"):
            save_packed(model, tmp_path, **{extra: {"loss": float("nan")}})
    assert not list(tmp_path.iterdir())


def test_config_text_is_strict_json(tmp_path):
    tensors, config = {"a": torch.ones(2)}, '{"tensors":{},"tensors":{}}'
    metadata = {
        "format": "pt",
        "mpq_version": "1",
        "mpq_config": config,
        "sha256": digest(tensors, config, "1"),
    }
    save_file(tensors, tmp_path / "f", metadata)
    refused_file(tmp_path / "f", "the key 'tensors' twice")


def test_a_version_that_does_not_fit_its_description(tmp_path):
    tensors = {"a": torch.ones(2)}
    plain = {"granularity": "tensor", "tensors": {}}
    write_container(tmp_path / "f", tensors, plain, "3")
    refused_file(tmp_path / "f", "not what format 3 has")


def test_bools_are_bools(tmp_path):
    write_container(tmp_path / "f", {"a": torch.ones(2).bool()}, {}, "1")
    content = (tmp_path / "f").read_bytes()
    tensor = torch.tensor([1, 2], dtype=torch.uint8).view(torch.bool)
    new, old = digest({"a": tensor}, "{}", "1"), content[-300:]
    checksum = digest({"a": torch.ones(2).bool()}, "{}", "1")
    assert checksum.encode() in old
    forged = content.replace(checksum.encode(), new.encode())
    (tmp_path / "f").write_bytes(forged[:-1] + b"\x02")
    refused_file(tmp_path / "f", "holds no truth values")


@pytest.mark.parametrize("name", ["a/b", "a\\b", "w[0:2]", "a\nb", "\x9bm"])
def test_names_that_no_file_may_hold_are_refused_when_saving(tmp_path, name):
    model = torch.nn.Module()
    model.register_parameter(name, torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="is no name of a tensor"):
        save_packed(model, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


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


@pytest.mark.parametrize("bits", [1.6, *range(1, 17)])
def test_bits_survive_and_follow_the_written_format(bits):
    for kind, count in itertools.product(
        ("midtread", "midrise"), [0, 1, 7, 8, 33]
    ):
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


def test_pieces_leave_no_gaps(monkeypatch):
    """A large tensor is packed a piece at a time; the bytes are of one row."""
    monkeypatch.setattr(container, "PIECE", 40)
    generator = np.random.default_rng(0)
    for bits, count in itertools.product(range(1, 17), (0, 1, 39, 40, 41, 203)):
        numbers = generator.integers(0, 2**bits, count).astype(np.int32)
        text = "".join(f"{number:0{bits}b}"[::-1] for number in numbers)
        expected = [
            int(text[start : start + 8][::-1], 2)
            for start in range(0, len(text), 8)
        ]
        packed = container.bits_of_numbers(numbers, bits)
        assert packed.dtype == np.uint8 and packed.tolist() == expected
