"""`speechbrain-mpq locate`, and `separate` that goes by it."""

import io
import json
import sys

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.inference.folder import save_separator
from speechbrain_mpq.inference.separation import QuantizedSeparator
from speechbrain_mpq.lobes.models.separator import Separator
from speechbrain_mpq.lobes.models.spatial_features import (
    SPEED_OF_SOUND,
    SpatialFeatures,
    linear_array,
)

DOAS = (62, 118)


def save_model(folder, pairs):
    """A small packed model of some pairs of microphones."""
    torch.manual_seed(0)
    separator = Separator(SpatialFeatures(pairs), 4, 8, 3, 1, 2).eval()
    return str(save_separator(separator, folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pairs = [(15, 1), (8, 1), (12, 4), (10, 6)]
    return save_model(tmp_path_factory.mktemp("packed"), pairs)


def scene(doas, samples=48000):
    """Bursts of noise as plane waves on 15 microphones, [samples, mics]."""
    rng = np.random.default_rng(0)
    waves = 1e-4 * rng.standard_normal((samples, 15))
    frequencies = np.fft.rfftfreq(samples, 1 / 16000)[:, None]
    for doa in doas:
        talks = np.repeat(rng.random(24) < 0.5, samples // 24)
        signal = 0.1 * rng.standard_normal(samples) * talks
        advance = np.cos(np.radians(doa)) * linear_array().numpy()
        turned = np.exp(2j * np.pi * frequencies * advance / SPEED_OF_SOUND)
        spectrum = np.fft.rfft(signal)[:, None] * turned
        waves += np.fft.irfft(spectrum, samples, axis=0)
    return waves


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    """Two talkers, in the current folder."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("mix.wav", scene(DOAS), 16000, "FLOAT")
    return "mix.wav"


def test_talkers_are_printed(folder, mixture, capsys):
    assert main(["locate", mixture, "--model", folder]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "mix.wav: 2 talkers"
    found = sorted(float(line.split("°")[0]) for line in lines)
    assert found == pytest.approx(DOAS, abs=1)
    assert all("█" in line and "% of all onsets" in line for line in lines)
    arguments = ["locate", mixture, "--model", folder, "--talkers", "1"]
    assert main(arguments) == 0
    assert "mix.wav: 1 talker\n" in capsys.readouterr().out


def test_json(folder, mixture, capsys):
    assert main(["locate", mixture, "--model", folder, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = QuantizedSeparator.from_pretrained(folder).locate_file(mixture)
    assert shown["mixture"] == "mix.wav" and len(shown["curve"]) == 181
    assert shown["curve"] == pytest.approx(found.curve.tolist(), abs=1e-5)
    assert [t["doa"] for t in shown["talkers"]] == pytest.approx(
        [talker.doa for talker in found.talkers], abs=0.06
    )
    shares = [talker["share"] for talker in shown["talkers"]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1


def test_a_pipe(folder, mixture, tmp_path, monkeypatch, capsys):
    """As in test_separate.py, where it is one indeed."""
    piped = io.BytesIO((tmp_path / mixture).read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(piped))
    assert main(["locate", "-", "--model", folder]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("standard input: 2 talkers")


def test_noise_is_nobody(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).standard_normal((32000, 15))
    soundfile.write("noise.wav", 0.1 * noise, 16000)
    assert main(["locate", "noise.wav", "--model", folder]) == 0
    assert "nobody stands out" in capsys.readouterr().out
    arguments = ["separate", "noise.wav", "--model", folder, "--doa", "auto"]
    assert main(arguments) == 1
    assert "say where with --doa DEGREES" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["locate"], ["separate", "--doa", "auto"]])
def test_complaints(folder, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    soundfile.write("still.wav", np.zeros((16000, 15)), 16000)
    soundfile.write("mono.wav", np.ones(16000) / 2, 16000)
    two = save_model(tmp_path / "two", [(15, 1)])
    soundfile.write("mix.wav", scene(DOAS), 16000)
    for name, model, message in (
        ("still.wav", folder, "still.wav: it is silent"),
        ("mono.wav", folder, "mono.wav: 1 channel; the model needs"),
        ("no.wav", folder, "no.wav: no such file"),
        ("mix.wav", two, "2 microphones cannot tell where talkers are"),
    ):
        arguments = [command[0], name, *command[1:], "--model", model]
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert message in printed.err and printed.out == ""
        assert len(printed.err.splitlines()) == 1


def test_every_talker_is_separated(folder, mixture, capsys):
    arguments = ["separate", mixture, "--model", folder, "--doa", "auto"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "mix_62.wav\nmix_118.wav\n"
    model = QuantizedSeparator.from_pretrained(folder)
    expected = model.separate_file(mixture, 62.0).numpy()
    signal, _ = soundfile.read("mix_62.wav")
    assert np.allclose(signal, expected, atol=2**-15)
    assert main([*arguments, "-o", "out.flac"]) == 0
    assert capsys.readouterr().out == "out_62.flac\nout_118.flac\n"


def test_one_talker_s_file_tells_the_direction(folder, mixture, capsys):
    soundfile.write("one.wav", scene([40]), 16000)
    arguments = ["separate", "one.wav", "--model", folder, "--doa", "auto"]
    assert main([*arguments, "-o", "out.wav"]) == 0
    assert capsys.readouterr().out == "out_40.wav\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--doa", "auto", "60"], "auto alone"),
        (["--doa", "auto", "-o", "-"], "finds several"),
        (["--doa", "auto", "-o", "no/x.wav"], "make it first"),
    ],
)
def test_auto_is_all(folder, mixture, capsys, arguments, message):
    assert main(["separate", mixture, "--model", folder, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_neither_degrees_nor_auto(mixture, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["separate", mixture, "--model", "packed", "--doa", "left"])
    assert stopped.value.code == 2
    assert "neither a number of degrees nor auto" in capsys.readouterr().err


def test_a_direction_with_little_sound(folder, mixture, caplog):
    arguments = ["separate", mixture, "--model", folder, "--doa", "62", "90"]
    assert main(arguments) == 0
    (record,) = caplog.records
    assert "hardly any sound comes from 90 degrees" in record.message
    assert "talkers are heard at" in record.message
    for doa in DOAS:
        assert f"{doa}" in record.message
