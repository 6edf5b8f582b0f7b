"""`speechbrain-mpq inspect` and `verify`: the numbers are the model's own."""

import io
import json
import re
import sys

import pytest

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.commands.inspect import plot_lines
from speechbrain_mpq.inference.folder import save_separator
from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.quant_api import coverage, quantize_

SIZES = {"channels": 8, "hidden": 16, "blocks": 1, "layers": 2}


def small_separator():
    """Without weights that mean anything."""
    path = "hparams/models/separator_mini.yaml"
    separator = build_separator(path, **SIZES).eval()
    fold_norms_(separator)
    return separator


@pytest.fixture(scope="module")
def separator():
    separator = small_separator()
    quantize_(separator, 4, include="mask_net.tcn_*", exclude=["*.norm*"])
    return separator


@pytest.fixture(scope="module")
def folder(separator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    save_separator(separator, folder)
    return folder


def test_coverage_is_the_model_s(separator, folder, capsys):
    assert main(["inspect", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    rows = {row["tensor"]: row for row in shown["tensors"]}
    expected = {
        row["tensor"]: row
        for row in coverage(separator)
        if not row["tensor"].startswith("features.")  # constants, not stored
    }
    assert set(rows) == set(expected)
    for name, row in expected.items():
        for key in ("cluster", "shape", "parameters", "stored_bits", "bytes"):
            assert rows[name][key] == row[key], (name, key)
        assert bool(rows[name]["reason"]) == (row["asked_bits"] is None)
    size = (folder / "model.safetensors").stat().st_size
    assert shown["bytes"] == size and shown["average_bits"] == 4
    total = sum(p.numel() for p in small_separator().parameters())
    assert shown["parameters"] == total
    assert shown["compression"] == pytest.approx(4 * total / size, abs=0.01)
    assert shown["array"]["microphones"] == separator.features.microphones
    assert shown["payload_bytes"] == sum(r["bytes"] for r in expected.values())


def test_tables(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    size = (folder / "model.safetensors").stat().st_size
    assert f"({size:,} bytes)" in printed and "4 bits on average" in printed
    assert "microphone array\n" in printed and "90° straight ahead" in printed
    row = r"mask_net.tcn_0_1.d_conv.weight +16 x 1 x 3 +4 +1 +0.03\n"
    assert re.search(row, printed)
    assert re.search(
        r"conv_out.bias +514 +32 +0 +2.01  stored as float", printed
    )
    assert re.search(r"mask_net.tcn_0_1( +4){5}\n", printed)


def test_text_plot():
    bits = {"conv_in": 16, "x.tcn_0_10.prelu_in": 1.6, "x.tcn_0_10.d_conv": 2}
    bits |= {"rnn.0.weight": 4, "x.tcn_0_11.d_conv": 8}
    lines = plot_lines({k: {"bits": v} for k, v in bits.items()})
    assert lines[0] == "conv_in       " + "█" * 16 + " 16"
    assert lines[1] == "rnn.0.weight  " + "█" * 4 + " 4"
    assert lines[3].split() == ["prelu_in", "d_conv"]
    assert lines[4].split() == ["x.tcn_0_10", "1.6", "2"]
    assert lines[5].split() == ["x.tcn_0_11", "8"]
    assert "floating point" in plot_lines({})[0]


def test_full_precision(tmp_path, capsys):
    save_separator(small_separator(), tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "none: the model is in floating point" in printed
    plot = ["--plot", str(tmp_path / "bits.png")]
    assert main(["inspect", str(tmp_path), *plot]) == 1
    assert "nothing to plot" in capsys.readouterr().err


def test_plot(folder, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bits.png"
    assert main(["inspect", str(folder), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["bits.pgn", "nowhere/bits.png", "a.png"])
def test_a_plot_is_checked_before_the_folder_is_read(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.png").mkdir()
    nothing, plot = str(tmp_path / "no model"), str(tmp_path / name)
    assert main(["inspect", nothing, "--plot", plot]) == 1
    assert plot in capsys.readouterr().err


def test_verify(folder, tmp_path, capsys):
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: whole\n"
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert main(["verify", str(folder), str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"{folder}: whole" in printed and "SHA-256" in printed
    assert main(["inspect", str(tmp_path)]) == 1
    assert "SHA-256" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    assert "no such file" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_of_another_encoding(tmp_path, encoding, monkeypatch):
    separator = small_separator()
    quantize_(separator, 4)
    save_separator(separator, tmp_path)
    content = io.BytesIO()
    text = io.TextIOWrapper(content, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", text)
    assert main(["inspect", str(tmp_path)]) == 0
    text.flush()
    assert b"  #### 4" in content.getvalue()
