"""Thousands of broken files: refused, or the original weights.

DAMAGED_FILES in the environment says how many of each format, 3500 say.
"""

import json
import os
import random
import runpy
import shutil
import time
from pathlib import Path

import pytest
import torch

from speechbrain_mpq.inference.loading import load
from speechbrain_mpq.quantization.container import (
    PackedModelError,
    read_container,
    write_container,
)
from speechbrain_mpq.quantization.packing import load_packed_, read_model

DATA = Path(__file__).parents[1] / "data"
MAKER = runpy.run_path(str(DATA / "make_golden.py"))
# Files for each of the formats
VERSIONS = [1, 2, 3, 5]
DAMAGED, FORGED = int(os.environ.get("DAMAGED_FILES", 800)), 300
SLOWEST = 5.0  # seconds of CPU for a file; thousands of times the usual
WORDS = (
    *(b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b'"', b"\\", b"{}"),
    *(b"[]", b"[", b"9" * 30, b"\x00", b"\xff", b"../", b" ", b'"a":1,'),
)
VALUES = (
    *(0, 1, -1, 2, 3, 17, 2**31, 2**63, 2**64, 1.6, 4.0, 1e300),
    *(True, None, "", "a", "../../x", "os.system", [], [1], [[1]], {}),
    *({"a": 1}, [2**40] * 3, "midrise", "channel", [4, 4], "x" * 2000),
)


def flip(content, draw, other):
    """One to three bits."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def cut(content, draw, other):
    """Too short, or too long."""
    if draw.random() < 0.7:
        return content[: draw.randrange(len(content))]
    return content + draw.randbytes(draw.randint(1, 40))


def edit_length(content, draw, other):
    """Another length of the header."""
    length = draw.choice(
        [draw.getrandbits(64), draw.randint(0, 2 * len(content)), 2**63, 0]
    )
    return length.to_bytes(8, "little") + content[8:]


def edit_header(content, draw, other):
    """Another word in the header, whose length is adjusted."""
    end = 8 + int.from_bytes(content[:8], "little")
    start = draw.randrange(8, end)
    stop = min(end, start + draw.choice((0, 1, 2, 5)))
    header = content[8:start] + draw.choice(WORDS) + content[stop:end]
    return len(header).to_bytes(8, "little") + header + content[end:]


def splice(content, draw, other):
    """A piece of this file or of another one in a wrong place."""
    source = draw.choice((content, other))
    size = draw.randint(1, 200)
    start = draw.randrange(len(source))
    piece = source[start : start + size]
    place = draw.randrange(len(content))
    stop = place + draw.choice((0, len(piece)))
    return content[:place] + piece + content[stop:]


MUTATIONS = (flip, cut, edit_length, edit_header, splice)


def outcome(read, folder):
    """What reading gives, None where it is refused; never anything else."""
    start = time.process_time()
    try:
        result = read(folder)
    except PackedModelError as error:
        assert str(folder) in str(error)
        result = None
    assert time.process_time() - start < SLOWEST
    return result


def state(folder):
    """The weights of a loaded toy."""
    return load_packed_(MAKER["toy"](), folder).state_dict()


def golden(version):
    """Bytes of a golden file."""
    folder = MAKER["FOLDER"] / str(version)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("version", VERSIONS)
def test_damaged_files(tmp_path, version):
    draw = random.Random(version)
    content, other = golden(version), golden(3 if version == 2 else 2)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    original, refused = state(tmp_path), 0
    for i in range(DAMAGED):
        changed = MUTATIONS[i % len(MUTATIONS)](content, draw, other)
        if changed == content:
            changed = cut(content, draw, other)
        path.write_bytes(changed)
        if outcome(read_model, tmp_path) is None:
            refused += 1
            continue
        loaded = state(tmp_path)
        assert all(torch.equal(loaded[n], original[n]) for n in original)
    # Blanks in the header are the only damage that may go unnoticed.
    assert refused > 0.98 * DAMAGED


def put_somewhere(tree, draw):
    """Another value, or another key, anywhere in a tree of JSON."""
    places = []

    def visit(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    visit(tree)
    node, key = draw.choice(places)
    if isinstance(node, dict) and draw.random() < 0.2:
        node[draw.choice(("a", "../b", "c/d", "e.f", ""))] = node.pop(key)
    else:
        node[key] = draw.choice(VALUES)


@pytest.mark.parametrize("version", VERSIONS)
def test_forged_files_with_a_checksum_that_fits(tmp_path, version):
    """Who can compute SHA-256 can make another model, but no other harm."""
    draw = random.Random(version)
    shutil.copytree(MAKER["FOLDER"] / str(version), tmp_path / "f")
    path, counts = tmp_path / "f/model.safetensors", {True: 0, False: 0}
    for _ in range(FORGED):
        path.write_bytes(golden(version))
        container = read_container(path)
        config = json.loads(json.dumps(container.config))
        for _ in range(draw.randint(1, 2)):
            put_somewhere(config, draw)
        write_container(path, container.tensors, config, str(version))
        packed = outcome(read_model, tmp_path / "f")
        counts[packed is None] += 1
        for tensor in packed.quantized.values() if packed else ():
            assert torch.isfinite(tensor.integers * tensor.alpha).all()
        if version >= 3:
            separator = outcome(load, tmp_path / "f")
            assert separator is None or packed is not None
    assert counts[True] > counts[False] or version >= 3


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_forged_language_models(tmp_path, kind):
    """Gates of other bits, tied weights: refused, or finite and of one size."""
    from speechbrain_mpq.decoders.vocabulary import Vocabulary
    from speechbrain_mpq.inference.language_model import save_language_model
    from speechbrain_mpq.lobes.models.language_models import (
        TiedRNNLM,
        TiedTransformerLM,
    )
    from speechbrain_mpq.quantization.quant_api import quantize_

    torch.manual_seed(0)
    lstm = kind == "lstm"
    model = TiedRNNLM(8, 4) if lstm else TiedTransformerLM(8, 4, 1, 1, 4)
    quantize_(model, 2, gates=True)
    save_language_model(model, tmp_path, Vocabulary("so be it is".split()))
    path, draw = tmp_path / "model.safetensors", random.Random(kind)
    whole, refused = path.read_bytes(), 0
    for _ in range(FORGED // 2):
        path.write_bytes(whole)
        container = read_container(path)
        config = json.loads(json.dumps(container.config))
        put_somewhere(config, draw)
        write_container(path, container.tensors, config, "3")
        loaded = outcome(load, tmp_path)
        refused += loaded is None
        if loaded is not None:
            found = sum(p.numel() for p in loaded.parameters())
            assert found == sum(p.numel() for p in model.parameters())
    assert refused > FORGED // 4
