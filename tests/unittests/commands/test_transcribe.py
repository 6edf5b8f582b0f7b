"""`speechbrain-mpq transcribe`: recordings in, words and N-best lists out."""

import io
import os

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.decoders.nbest import read_nbest
from speechbrain_mpq.decoders.ngram import estimate_arpa
from speechbrain_mpq.decoders.vocabulary import Lexicon
from speechbrain_mpq.inference.speech_recognition import save_recognizer
from speechbrain_mpq.lobes.models.tdnnf import TDNNF


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    lexicon = Lexicon({"tea": [["t", "iy"]], "eat": [["iy", "t"]]})
    estimate_arpa(tmp_path / "lm.arpa", ["tea eat", "eat"])
    network = TDNNF(40, 6, 8, [4], [3], prefinal=4)
    torch.nn.init.normal_(network.chain.output.weight)
    save_recognizer(network, tmp_path / "asr", lexicon, tmp_path / "lm.arpa")
    rng = np.random.default_rng(0)
    for name in ("one", "the other"):
        signal = rng.normal(size=8000) / 10
        soundfile.write(tmp_path / f"{name}.wav", signal, 16000)
    (tmp_path / "more").mkdir()
    soundfile.write(tmp_path / "more/one.wav", signal, 16000)
    return tmp_path


def transcribe(folder, *options, files=("one.wav", "the other.wav")):
    paths = [str(folder / file) for file in files]
    arguments = ["--model", str(folder / "asr"), *map(str, options)]
    return main(["transcribe", *paths, *arguments])


def test_prints_the_words_of_each_file(folder, capsys):
    assert transcribe(folder) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["one", "the_other"]
    assert {word for line in lines for word in line[1:]} <= {"tea", "eat"}


def test_lists_begin_with_the_words(folder, capsys):
    pytest.importorskip("kaldi_decoder")
    transcribe(folder)
    words = capsys.readouterr().out
    assert transcribe(folder, "--nbest", 3, "--out", folder / "n.json") == 0
    assert capsys.readouterr().out == words
    lists = read_nbest(folder / "n.json")  # scores are log-probabilities
    best = [f"{row.id} {row.hypotheses[0]}".rstrip() for row in lists]
    assert best == words.splitlines()


def test_names_that_are_no_text_are_written_all_the_same(folder):
    pytest.importorskip("kaldi_decoder")
    file = os.fsdecode(b"caf\xe9.wav")
    try:
        (folder / "one.wav").rename(folder / file)
    except OSError:
        pytest.skip("a file system of names in UTF-8")
    out = folder / "n.json"
    options = ("--nbest", 2, "--out", out)
    assert transcribe(folder, *options, files=[file]) == 0
    assert read_nbest(out)[0].id == "caf\\xe9"


def test_folders_patterns_and_pipes_as_for_other_commands(
    folder, capsys, monkeypatch
):
    assert transcribe(folder) == 0
    expected = sorted(capsys.readouterr().out.splitlines())
    for names in (["."], ["*.wav"], [".", "one.wav"]):
        assert transcribe(folder, files=names) == 0
        assert sorted(capsys.readouterr().out.splitlines()) == expected
    content = io.BytesIO((folder / "one.wav").read_bytes())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(content))
    arguments = ["transcribe", "-", "--model", str(folder / "asr")]
    assert main(arguments) == 0
    said = capsys.readouterr().out.rstrip()
    assert said == expected[0].replace("one", "standard_input", 1)


def test_a_bad_file_stops_no_other(folder, capsys):
    (folder / "bad.wav").write_text("no sound")
    assert transcribe(folder, files=["bad.wav", "one.wav"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("one ")
    assert "bad.wav: cannot be read as audio" in said.err


@pytest.mark.parametrize(
    "options, files, message",
    [
        (["--nbest", "3"], ["one.wav"], "belong together"),
        (["--out", "a.json"], ["one.wav"], "belong together"),
        (["--nbest", "3", "--out", "no/a"], ["one.wav"], "no such folder"),
        (["--nbest", "3", "--out", "."], ["one.wav"], "is a folder"),
        ([], ["none.wav"], "no such file"),
        ([], ["none*.wav"], "no file has such a name"),
        ([], ["one.wav", "more/one.wav"], "the same id, 'one'"),
        ([], ["one.wav", "asr"], "no audio files"),
    ],
)
def test_refuses(folder, capsys, options, files, message):
    assert transcribe(folder, *options, files=files) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["one.wav", "asr/lm.arpa", "asr/lexicon.txt"])
def test_lists_are_written_over_nothing_that_is_read(folder, capsys, name):
    path = folder / name
    content = path.read_bytes()
    assert transcribe(folder, "--nbest", 3, "--out", path) == 1
    assert "is the input" in capsys.readouterr().err
    assert path.read_bytes() == content
