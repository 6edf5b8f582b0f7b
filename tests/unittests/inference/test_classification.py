"""A packed classifier of words: loaded, called as SpeechBrain's, checked."""

import json

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq.inference.classification import (
    SpokenWordClassifier,
    matrix_plan,
    save_classifier,
)
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.lobes.models.gru_classifier import NormalizedFbank
from speechbrain_mpq.nnet.gru_conversion import (
    calibrate,
    convert,
    homogeneous_plan,
)


def made(**options):
    """An untrained integer GRU and the settings of its features."""
    torch.manual_seed(0)
    gru = torch.nn.GRU(12, 8, **options)
    linear = torch.nn.Linear(8 * (1 + gru.bidirectional), 3)
    plan = homogeneous_plan(gru, 8) | {"l0.input_new": 3}
    calibration = calibrate(gru, [torch.randn(4, 30, 12)])
    integer = convert(gru, plan, calibration, linear, ["one", "two", "three"])
    features = NormalizedFbank(8000, 12, 20)
    features.fit(torch.randn(3, 8000) / 9)
    return integer, features.settings


@pytest.fixture
def folder(tmp_path):
    """A packed classifier."""
    integer, settings = made()
    metadata = {"corpus": "made up", "seed": 1}
    return save_classifier(integer, tmp_path / "packed", settings, metadata)


def test_batch_is_each_alone(folder):
    classifier = SpokenWordClassifier.from_pretrained(folder)
    wavs, lengths = torch.randn(3, 8000) / 9, torch.tensor([1.0, 0.5, 0.75])
    scores, score, index, labels = classifier.classify_batch(wavs, lengths)
    assert scores.dtype == torch.int32 and scores.shape == (3, 3)
    for row in range(3):
        part = wavs[row, : int(8000 * lengths[row])]
        alone = classifier.classify_batch(part)
        assert torch.equal(alone[0][0], scores[row])
        assert (alone[1][0], alone[2][0]) == (score[row], index[row])
        assert (
            alone[3] == [labels[row]] == [["one", "two", "three"][index[row]]]
        )


def test_lengths_that_are_none(folder):
    classifier = SpokenWordClassifier.from_pretrained(folder)
    for lengths in ([1.0], [1.0, 0.0], [1.0, -0.5], [1.0, 1.1], [8000, 4000]):
        with pytest.raises(ValueError, match="wav_lens must be 2 relative"):
            classifier.classify_batch(torch.randn(2, 8000), lengths)


def test_files_of_any_rate(folder, tmp_path):
    classifier = SpokenWordClassifier.from_pretrained(folder)
    rng = np.random.default_rng(0)
    low = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) / 3
    low += rng.standard_normal(16000) / 200
    soundfile.write(tmp_path / "a.wav", low, 16000)
    scores = classifier.classify_file(tmp_path / "a.wav")[0]
    soundfile.write(tmp_path / "b.flac", low[::2], 8000)
    other = classifier.classify_file(tmp_path / "b.flac")[0]
    assert scores.shape == other.shape == (1, 3)
    spread = (other.max() - other.min()).item()
    assert (scores - other).abs().max() < 0.5 * spread


def test_bad_files(folder, tmp_path):
    classifier = SpokenWordClassifier.from_pretrained(folder)

    def refused(name, samples, match):
        if samples is not None:
            soundfile.write(tmp_path / name, samples, 8000, "FLOAT")
        with pytest.raises(ValueError, match=match):
            classifier.classify_file(tmp_path / name)

    refused("stereo.wav", np.zeros((800, 2)), "2 channels: give one")
    refused("short.wav", np.zeros(100), "short.wav: .* at least 200 samples")
    refused("empty.wav", np.zeros(0), "at least 200 samples")
    refused("nan.wav", np.full(800, np.nan), "NaN or infinity")
    (tmp_path / "text.wav").write_text("no sound")
    refused("text.wav", None, "no sound file")
    with pytest.raises(FileNotFoundError, match="no file"):
        classifier.classify_file(tmp_path / "nowhere.wav")
    with pytest.raises(ValueError, match="wav_lens must be 2 relative"):
        classifier.classify_batch(torch.zeros(2, 800), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"\[batch, samples\]"):
        classifier.classify_batch(torch.zeros(2, 1, 800))


def test_folder_is_whole(folder):
    assert check_folder(folder) == []
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: audio-classification" in card
    assert "one, two, three" in card and "KiB" in card
    path = folder / "quantization_config.json"
    config = json.loads(path.read_text())
    config["integer_gru"]["plan"]["l0.state"] = 2
    path.write_text(json.dumps(config))
    assert "is not what model.safetensors says" in check_folder(folder)[0]
    (folder / "README.md").unlink()
    (folder / "model.py").write_text("")
    assert [p.split(": ")[1] for p in check_folder(folder)[1:]] == [
        "no model card",
        "can execute code when it is loaded, and does not belong here",
    ]


@pytest.mark.parametrize("name", ["hyperparams.yaml", "activations.json"])
def test_files_of_other_models_are_told(folder, name):
    (folder / name).write_text("{}")
    (problem,) = check_folder(folder)
    assert f"{name}: does not belong here" in problem


def test_damaged_folders(folder, tmp_path):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-20])
    assert check_folder(folder)
    with pytest.raises(ValueError, match="is no integer GRU"):
        SpokenWordClassifier.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="packed classifier"):
        (tmp_path / "empty").mkdir()
        SpokenWordClassifier.from_pretrained(tmp_path / "empty")


def test_plan_counts_every_weight():
    integer, _ = made(num_layers=2, bidirectional=True)
    plan = matrix_plan(integer.description)
    weights = sum(
        cell.weight_ih.numel() + cell.weight_hh.numel()
        for cell in integer.cells.values()
    )
    weights += integer.classifier_weight.numel()
    assert sum(c.parameters for c in plan.clusters.values()) == weights
    assert plan.clusters["l0.input_new"].bits == 3
