"""Tiny SpeechBrain folders of several classes, quantized by the command."""

import json
import re

import numpy as np
import pytest
import soundfile
import torch
from helpers import (
    ATTENTION,
    CLASSES,
    CTC,
    FEATURES,
    SEPARATION,
    TOKENIZER,
    write_source,
)

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.ptq.pretrained_folder import find_class
from speechbrain_mpq.ptq.task_metrics import frame_divergence
from speechbrain_mpq.quantization.packing import read_packed

FEW = ("--candidate-bits", "2", "4", "8")  # scoring takes less time


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Noises of three lengths, with everything that any class can want."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    entries = {}
    for i, samples in enumerate((4000, 3200, 3600)):
        audio = 0.1 * rng.standard_normal((3, samples))
        audio[0] = audio[1:].sum(0)
        for name, channel in zip(("", "_1", "_2"), audio, strict=True):
            soundfile.write(folder / f"{i}{name}.wav", channel, 16000)
        entries[f"item_{i}"] = {
            "wav": f"{{data_root}}/{i}.wav",
            "s1_wav": f"{{data_root}}/{i}_1.wav",
            "s2_wav": f"{{data_root}}/{i}_2.wav",
            "words": "a b",
            "label": "xyz"[i],
        }
    path = folder / "manifest.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def ctc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources") / "ctc"
    write_source(folder, FEATURES + CTC, ["layers"], ["tokenizer"])
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources") / "classifier"
    loadables = ["embedding_model", "classifier"]
    write_source(folder, FEATURES + CLASSES, loadables, ["label_encoder"])
    return folder


def command(source, name, manifest, output, *options, budget="4bit"):
    """Run `speechbrain-mpq quantize` in this process."""
    line = ["quantize", "--source", source, "--class", name]
    line += ["--calibration", manifest, "--budget", budget, "-o", output]
    return main([str(word) for word in (*line, *options)])


def outputs(name, source):
    """What an interface says of a fixed noise."""
    interface = find_class(name).from_hparams(source=str(source))
    wavs = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1)) / 9
    if name == "EncoderClassifier":
        return interface.classify_batch(wavs)[0]
    if name == "SepformerSeparation":
        return interface.separate_batch(wavs)
    return interface.encode_batch(wavs, torch.ones(2))


def test_recognizer(ctc, manifest, tmp_path, capsys):
    out = tmp_path / "packed"
    assert command(ctc, "EncoderASR", manifest, out) == 0
    printed, said = capsys.readouterr()
    assert re.search(r"can gain at about [\d.]+ dB(.*)gains [\d.]+ dB", said)
    assert "WER, % (3 items)" in printed and "MAPSSWE" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "hyperparams.yaml",
        "layers.ckpt",
        "quantization_config.json",
        "tokenizer.ckpt",
    ]
    assert "# a comment that stays" in (out / "hyperparams.yaml").read_text()
    quantized, _ = read_packed(out / "layers.ckpt")
    kinds = {name.rpartition(".")[2] for name in quantized}
    assert kinds == {"weight_ih_l0", "weight_hh_l0", "weight"}
    config = json.loads((out / "quantization_config.json").read_text())
    assert set(config["loadables"]) == {"layers"}
    stored = (out / "layers.ckpt").stat().st_size
    assert f"| {stored} |" in (out / "README.md").read_text()
    before, after = outputs("EncoderASR", ctc), outputs("EncoderASR", out)
    assert not torch.equal(before, after)


def test_gates_of_a_recognizer(ctc, manifest, tmp_path):
    out = tmp_path / "packed"
    options = ("--gates", "--candidate-bits", "2", "4", "8")
    assert command(ctc, "EncoderASR", manifest, out, *options) == 0
    quantized, _ = read_packed(out / "layers.ckpt")
    assert sum("weight_ih_l0[" in name for name in quantized) == 4
    assert outputs("EncoderASR", out).isfinite().all()


def test_many_bits_change_nearly_nothing(ctc, manifest, tmp_path):
    out = tmp_path / "packed"
    options = ("--candidate-bits", "16", "--rounding", "nearest", "--vectors")
    line = (ctc, "EncoderASR", manifest, out, *options)
    assert command(*line, budget="16bit") == 0
    quantized, floats = read_packed(out / "layers.ckpt")
    assert len(quantized) == 6 and not floats
    before, after = outputs("EncoderASR", ctc), outputs("EncoderASR", out)
    torch.testing.assert_close(before, after, atol=2e-3, rtol=0)


def test_budget_in_bytes_holds_for_the_file(ctc, manifest, tmp_path):
    sizes = {}
    for budget in ("1900B", "4kB"):
        out = tmp_path / budget
        assert command(ctc, "EncoderASR", manifest, out, budget=budget) == 0
        sizes[budget] = (out / "layers.ckpt").stat().st_size
    assert sizes["1900B"] <= 1900 < sizes["4kB"] <= 4000


def test_attention_recognizer(manifest, tmp_path, monkeypatch, capsys):
    (tmp_path / "tokenizer_of_the_test.py").write_text(TOKENIZER)
    monkeypatch.syspath_prepend(str(tmp_path))
    source, out = tmp_path / "attention", tmp_path / "packed"
    write_source(source, FEATURES + ATTENTION, ["model"])
    assert command(source, "EncoderDecoderASR", manifest, out, *FEW) == 0
    printed = capsys.readouterr().out
    assert "WER" in printed and "KL divergence" in printed
    quantized, _ = read_packed(out / "model.ckpt")
    assert any("attn" in name for name in quantized)
    outputs("EncoderDecoderASR", out)


def test_classifier(classifier, manifest, tmp_path, capsys):
    out = tmp_path / "packed"
    assert command(classifier, "EncoderClassifier", manifest, out, *FEW) == 0
    printed = capsys.readouterr().out
    assert re.search(r"error rate, % \(3 items\) +\d", printed)
    for name in ("embedding_model", "classifier"):
        assert read_packed(out / f"{name}.ckpt")[0]
    before = outputs("EncoderClassifier", classifier)
    assert outputs("EncoderClassifier", out).shape == before.shape


def test_modules_that_no_output_depends_on(
    classifier, manifest, tmp_path, capsys
):
    line = (classifier, "SpeakerRecognition", manifest, tmp_path / "packed")
    assert command(*line, "--candidate-bits", "2", "4") == 1
    said = capsys.readouterr().err
    assert "1 clusters do not change the outputs" in said
    assert "'classifier.*'" in said


def test_separator(manifest, tmp_path, capsys):
    source, out = tmp_path / "separator", tmp_path / "packed"
    write_source(source, SEPARATION, ["encoder", "masknet", "decoder"])
    assert command(source, "SepformerSeparation", manifest, out, *FEW) == 0
    assert "SI-SNR, dB (3 items)" in capsys.readouterr().out
    before = outputs("SepformerSeparation", source)
    after = outputs("SepformerSeparation", out)
    assert not torch.equal(before, after) and before.shape == after.shape


def test_without_a_reference_it_says_so(ctc, manifest, tmp_path, capsys):
    entries = json.loads(manifest.read_text())
    for entry in entries.values():
        del entry["words"]
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(entries))
    where = ("--data-root", manifest.parent)
    assert command(ctc, "EncoderASR", bare, tmp_path / "out", *where) == 0
    assert "No quality was measured" in capsys.readouterr().out
    more = (*where, "--reference", "text")
    assert command(ctc, "EncoderASR", bare, tmp_path / "two", *more) == 1
    assert "has no key 'text'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_name": "EncoderASM"}, "near misses: EncoderASR"),
        ({"class_name": "FastSpeech2"}, "is not served"),
        ({"budget": "4 apples"}, "is not understood"),
        ({"budget": "300B"}, "the files take at least"),
        ({"budget": "1bit"}, "out of reach"),
        ({"calibration": "none.json"}, "no such manifest"),
        ({"options": ["--audio-key", "path"]}, "no key 'path'"),
        ({"options": ["--exclude", "*conv*"]}, "near misses"),
        ({"options": ["--items", "0"]}, "at least one"),
    ],
)
def test_refuses(ctc, manifest, tmp_path, capsys, change, message):
    out = tmp_path / "out"
    name = change.get("class_name", "EncoderASR")
    audio = change.get("calibration", manifest)
    budget, options = change.get("budget", "4bit"), change.get("options", ())
    assert command(ctc, name, audio, out, *options, budget=budget) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_refuses_empty_manifests_and_full_folders(
    ctc, manifest, tmp_path, capsys
):
    empty, out = tmp_path / "empty.json", tmp_path / "out"
    empty.write_text("{}")
    assert command(ctc, "EncoderASR", empty, out) == 1
    assert "has no entries" in capsys.readouterr().err
    assert command(ctc, "EncoderASR", manifest, tmp_path) == 1
    assert "is not empty" in capsys.readouterr().err
    assert command(ctc, "EncoderASR", manifest, out) == 0
    again = tmp_path / "again"
    assert command(out, "EncoderASR", manifest, again) == 1
    assert "is quantized already" in capsys.readouterr().err


def test_divergence_against_torch():
    torch.manual_seed(0)
    p, q = torch.randn(2, 4, 5)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()),
        torch.distributions.Categorical(logits=q.double()),
    )
    torch.testing.assert_close(frame_divergence(p, q), expected)
    impossible = torch.tensor([0.0, -torch.inf])
    assert frame_divergence(impossible, impossible) == 0


def test_options_of_a_wrong_kind(ctc, manifest, tmp_path, capsys):
    line = (ctc, "EncoderASR", manifest, tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        command(*line, "--candidate-bits", "2", "few")
    assert "'few' is no number of bits, such as 4" in capsys.readouterr().err
    assert command(*line, "--candidate-bits", "2", "40") == 1
    assert "candidate bits [2, 40]: bits must be" in capsys.readouterr().err
    assert command(*line, "--device", "gpu") == 1
    assert "--device gpu cannot be used" in capsys.readouterr().err
