"""`speechbrain-mpq quality`: files, folders, pipes, JSON, and bad input."""

import io
import json
import sys

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.inference.quality_estimation import save_quality_estimator
from speechbrain_mpq.lobes.models.dnsmos import BinaryDNSMOS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    network = BinaryDNSMOS(
        shape=[[8, True], [8, False]], dense=(8, 8), measure="any"
    )
    return str(save_quality_estimator(network, tmp_path_factory.mktemp("q")))


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """Two recordings in the current folder."""
    monkeypatch.chdir(tmp_path)
    wave = 0.1 * np.random.default_rng(0).standard_normal(64000)
    for name in ("a.wav", "b.flac"):
        soundfile.write(name, wave, 16000)
    return wave


def test_a_score_a_file(talk, model, capsys):
    assert main(["quality", "a.wav", ".", "--model", model]) == 0
    scores = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for _, name in scores] == ["a.wav", "b.flac"]
    assert scores[0][0] == scores[1][0]


def test_json_has_the_windows(talk, model, capsys):
    assert main(["quality", "*.wav", "--json", "--model", model]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recording"] == "a.wav" and found["measure"] == "any"
    assert [window["start"] for window in found["windows"]] == [0.0, 1.0]
    mean = np.mean([window["score"] for window in found["windows"]])
    assert found["score"] == pytest.approx(mean, abs=1e-3)


def test_standard_input(talk, model, capsys, monkeypatch):
    assert main(["quality", "a.wav", "--model", model]) == 0
    score = capsys.readouterr().out.split()[0]
    with open("a.wav", "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert main(["quality", "-", "--model", model]) == 0
    assert capsys.readouterr().out.split(maxsplit=1) == [
        score,
        "standard input\n",
    ]


def test_a_bad_file_stops_no_other(talk, model, capsys):
    soundfile.write("0.wav", np.zeros(16000), 16000)
    assert main(["quality", ".", "--model", model]) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 2
    assert "0.wav: it is silent" in output.err
    assert "1 of 3 recordings failed: 0.wav" in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.wav"], "no.wav: no such file"),
        (["*.ogg"], "*.ogg: no file has such a name"),
        (["-", "a.wav"], "- is standard input: give it alone"),
        (["a.wav", "--model", "nowhere"], "nowhere is neither a folder"),
        (["a.wav", "--channel", "2"], "there is no channel 2"),
    ],
)
def test_typing_errors(talk, model, capsys, arguments, message):
    if "--model" not in arguments:
        arguments = [*arguments, "--model", model]
    assert main(["quality", *arguments]) == 1
    output = capsys.readouterr()
    assert message in output.err and not output.out


def test_names_that_look_like_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-call.wav").touch()
    with pytest.raises(SystemExit):
        main(["quality", "-call.wav"])
    assert (
        "(write the file -call.wav as ./-call.wav)" in capsys.readouterr().err
    )
