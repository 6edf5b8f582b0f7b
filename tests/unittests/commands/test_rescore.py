"""`speechbrain-mpq rescore`: lists in, lists and best hypotheses out."""

import json
import math
import os
import subprocess
import sys
import threading

import pytest
import torch

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.decoders.nbest import read_nbest
from speechbrain_mpq.decoders.vocabulary import Vocabulary
from speechbrain_mpq.inference.language_model import (
    LanguageModel,
    save_language_model,
)
from speechbrain_mpq.lobes.models.language_models import TiedRNNLM
from speechbrain_mpq.quantization.quant_api import quantize_

WORDS = "so be it is the state".split()
ARPA = """\\data\\
ngram 1=6
ngram 2=1

\\1-grams:
-1.0 so -0.5
-1.0 be -0.5
-1.0 the -0.5
-0.5 </s>
-99 <s> -0.25
-2.0 <unk>

\\2-grams:
-0.3 so be

\\end\\
"""


@pytest.fixture
def folder(tmp_path):
    """A packed model of 4 bits, and two lists."""
    torch.manual_seed(0)
    model = TiedRNNLM(10, 8)
    torch.nn.init.normal_(model.out.w.bias)
    quantize_(model, 4, gates=True)
    save_language_model(model, tmp_path / "lm", Vocabulary(WORDS))
    rows = [
        {
            "id": "u2",
            "hypotheses": ["so be it", "so is it"],
            "scores": [-3, -3],
        },
        {
            "id": "u1",
            "hypotheses": ["", "the st", "BE"],
            "scores": [-1, -2, -9],
        },
    ]
    path = tmp_path / "nbest.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def call(folder, *options):
    """Run the command."""
    files = [str(folder / "nbest.json"), "--lm", str(folder / "lm")]
    return main(["rescore", *files, *options])


def test_best_first(folder, capsys):
    out = str(folder / "out.json")
    assert call(folder, "--out", out, "--unk_penalty", "0") == 0
    assert "1 of 9 words unknown, 1 empty" in capsys.readouterr().err
    lm = LanguageModel.from_pretrained(folder / "lm")
    before = {row.id: row for row in read_nbest(folder / "nbest.json")}
    after = read_nbest(folder / "out.json")
    assert [row.id for row in after] == ["u2", "u1"]  # as they came
    for row in after:
        own = dict(zip(before[row.id].hypotheses, before[row.id].scores))
        assert set(row.hypotheses) == set(own)
        for text, score in zip(row.hypotheses, row.scores):
            (words,) = lm.score([text])
            assert score == pytest.approx(own[text] + words.total / 2)
        assert row.scores == sorted(row.scores, reverse=True)
    line = json.loads((folder / "out.json").read_text().splitlines()[0])
    assert list(line) == [
        *("id", "hypotheses", "scores", "recognizer_scores", "lm_scores")
    ]


def test_one_best_to_a_file_or_the_screen(folder, capsys):
    assert call(folder, "--lm_weight", "0") == 0
    assert capsys.readouterr().out == "u2 so be it\nu1\n"
    call(folder, "--lm_weight", "0", "--best", str(folder / "best.txt"))
    assert capsys.readouterr().out == ""
    assert (folder / "best.txt").read_text() == "u2 so be it\nu1\n"
    call(folder, "--lm_weight", "0", "--word_bonus", "2")
    assert capsys.readouterr().out == "u2 so be it\nu1 the st\n"


def test_mixed_with_an_ngram(folder):
    (folder / "lm.arpa").write_text(ARPA)
    lm = LanguageModel.from_pretrained(folder / "lm")
    out = folder / "out.json"
    call(folder, "--ngram", str(folder / "lm.arpa"), "--out", str(out))
    row = json.loads(out.read_text().splitlines()[0])
    place = row["hypotheses"].index("so be it")
    (words,) = lm.score(["so be it"])
    # so after <s>: backed off; be after so: found; it: <unk>; </s>
    ngram = [10**-1.25, 10**-0.3, 10 ** (-0.5 - 2), 10**-0.5]
    mixed = [
        (math.exp(own) + other) / 2
        for own, other in zip(words.log_probs.tolist(), ngram)
    ]
    expected = sum(map(math.log, mixed))
    assert row["lm_scores"][place] == pytest.approx(expected, rel=1e-5)


def test_an_ngram_of_other_words(folder, capsys):
    path = folder / "lm.arpa"
    path.write_text(ARPA)
    call(folder, "--ngram", str(path))
    # of so be it, so is it, the st and BE: it, is, it and st
    assert "1 of 9 words unknown (4 to the n-gram)" in capsys.readouterr().err
    path.write_text(ARPA.replace("so", "SO").replace("be", "BE"))
    assert call(folder, "--ngram", str(path)) == 1
    assert f"8 of 9 words are not in {path}" in capsys.readouterr().err


def test_unknown_words(folder, capsys):
    assert call(folder, "--unknown", "error") == 1
    assert "u1: 'st' is not in the vocabulary" in capsys.readouterr().err
    out = folder / "out.json"
    scores = []
    for penalty in ("0", "-5.0"):
        call(folder, "--unk_penalty", penalty, "--out", str(out))
        row = json.loads(out.read_text().splitlines()[1])
        scores.append(row["lm_scores"][row["hypotheses"].index("the st")])
    assert scores[1] == pytest.approx(scores[0] - 5)


@pytest.mark.parametrize(
    "row, options, match",
    [
        ({"hypotheses": ["x y z so"], "scores": [-1]}, (), "3 of 4 words"),
        ({"hypotheses": ["so"], "scores": [2]}, (), "a score of 2 is above 0"),
        ({"hypotheses": ["so </s>"], "scores": [-1]}, (), "u: 'so </s>' holds"),
        (
            {"hypotheses": ["so"], "scores": [-1]},
            ("--scores", "costs"),
            "below",
        ),
        ({"hypotheses": [], "scores": []}, (), "has no hypotheses"),
        ({"hypotheses": ["so"], "scores": [-1]}, ("--ngram", "no"), "no: no"),
        (
            {"hypotheses": ["so"], "scores": [-1]},
            ("--out", "none/out.json"),
            "none is no folder: make it first",
        ),
    ],
)
def test_errors_of_one_line(folder, capsys, row, options, match):
    (folder / "nbest.json").write_text(json.dumps({"id": "u", **row}))
    assert call(folder, *options) == 1
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1


def test_no_arpa_file(folder, capsys):
    (folder / "lm.arpa").write_text("so be it")
    assert call(folder, "--ngram", str(folder / "lm.arpa")) == 1
    assert "lm.arpa is no ARPA file" in capsys.readouterr().err


def test_options_that_mean_nothing(folder):
    for option in ("--lm_weight=nan", "--interpolation=1.5"):
        with pytest.raises(SystemExit):
            call(folder, option)


def test_the_stored_integers_rank_alike(folder, capsys):
    pytest.importorskip("onnxruntime", reason="the extra onnx is missing")
    pytest.importorskip("onnx", reason="the extra onnx is missing")
    assert call(folder, "--lm_weight", "3") == 0
    exact = capsys.readouterr().out
    assert call(folder, "--lm_weight", "3", "--engine", "onnx") == 0
    assert capsys.readouterr().out == exact


@pytest.mark.parametrize(
    "options, message",
    [
        (["--out", "."], "is a folder: name a file in it"),
        (["--best", "no/where"], "no is no folder"),
        (["--out", "nbest.json"], "is the input"),
        (["--best", "x", "--out", "x"], "or another output"),
        (["--out", "none/vocab.txt"], "is the input"),
        (["--best", "none/vocab.txt"], "is the input"),
    ],
)
def test_outputs_are_checked_before_the_work(
    folder, capsys, monkeypatch, options, message
):
    monkeypatch.chdir(folder)
    (folder / "none").mkdir(exist_ok=True)
    (folder / "none/vocab.txt").touch()
    before = (folder / "nbest.json").read_text()
    assert main(["rescore", "nbest.json", "--lm", "none", *options]) == 1
    assert message in capsys.readouterr().err
    assert (folder / "nbest.json").read_text() == before


def test_scores_that_are_no_numbers_order_nothing(folder, capsys):
    out = folder / "out.json"
    assert call(folder, "--lm_weight", "1e308", "--out", str(out)) == 1
    assert "u2: 'so be it' has a score of -inf" in capsys.readouterr().err
    assert not out.exists()


def test_a_hypothesis_is_one_line(folder, capsys):
    row = {"id": "u1", "hypotheses": ["so\nbe\tit"], "scores": [-1]}
    (folder / "nbest.json").write_text(json.dumps(row))
    assert call(folder) == 0
    assert capsys.readouterr().out == "u1 so be it\n"


def test_words_are_utf8_whatever_the_terminal(folder):
    row = {"id": "u1", "hypotheses": ["so café it be"], "scores": [-1]}
    (folder / "nbest.json").write_text(json.dumps(row))
    command = [sys.executable, "-m", "speechbrain_mpq", "rescore"]
    command += [str(folder / "nbest.json"), "--lm", str(folder / "lm")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.stdout == "u1 so café it be\n".encode()


def test_lists_from_a_pipe(folder, capsys):
    content = (folder / "nbest.json").read_text()
    (folder / "nbest.json").unlink()
    os.mkfifo(folder / "nbest.json")
    pipe = folder / "nbest.json"
    writer = threading.Thread(target=pipe.write_text, args=[content])
    writer.start()
    assert call(folder, "--lm_weight", "0") == 0
    writer.join()
    assert capsys.readouterr().out == "u2 so be it\nu1\n"
