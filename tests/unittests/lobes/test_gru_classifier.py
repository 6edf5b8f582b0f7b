"""Sounds to classes by an integer GRU; features that come with its file."""

import json

import pytest
import torch

from speechbrain_mpq.lobes.models.gru_classifier import (
    IntegerClassifier,
    NormalizedFbank,
    check_features,
)
from speechbrain_mpq.nnet.gru_conversion import (
    calibrate,
    convert,
    homogeneous_plan,
)
from speechbrain_mpq.nnet.integer_gru_file import save_integer_gru


def tone(frequency, samples=4000):
    """A sine at 8 kHz in a little noise."""
    time = torch.arange(samples) / 8000
    noise = 0.01 * torch.randn(samples)
    return 0.3 * torch.sin(2 * torch.pi * frequency * time) + noise


@pytest.fixture(scope="module")
def made():
    """A classifier that tells low from high, and its float GRU."""
    torch.manual_seed(0)
    sounds = [tone(300 + 1500 * (i % 2) + 20 * i) for i in range(16)]
    classes = torch.arange(16) % 2
    features = NormalizedFbank(8000, 12, 20)
    features.fit(sounds)
    inputs = torch.stack([features(sound) for sound in sounds])
    gru = torch.nn.GRU(12, 8, batch_first=True)
    linear = torch.nn.Linear(8, 2)
    parameters = [*gru.parameters(), *linear.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.02)
    for _ in range(30):
        optimizer.zero_grad()
        scores = linear(gru(inputs)[1][-1])
        torch.nn.functional.cross_entropy(scores, classes).backward()
        optimizer.step()
    plan = homogeneous_plan(gru, 6)
    calibration = calibrate(gru, [inputs])
    integer = convert(gru, plan, calibration, linear, ["low", "high"])
    integer.description["features"] = features.settings
    return IntegerClassifier(integer)


def test_statistics_are_those_of_training():
    torch.manual_seed(0)
    sounds = [torch.randn(8000) * scale for scale in (0.1, 1)]
    features = NormalizedFbank(8000, 12, 20)
    features.fit(sounds)
    frames = torch.cat([features(sound) for sound in sounds])
    assert torch.allclose(frames.mean(0), torch.zeros(12), atol=1e-3)
    assert torch.allclose(frames.std(0), torch.ones(12), atol=1e-3)
    again = NormalizedFbank(**json.loads(json.dumps(features.settings)))
    assert torch.equal(again(sounds[0]), features(sounds[0]))


def test_what_is_behind_is_cut():
    features = NormalizedFbank(8000, 12, 20, most_seconds=0.5)
    wave = torch.randn(8000)
    assert torch.equal(features(wave), features(wave[:4000]))


def test_classes_of_sounds(made, tmp_path):
    sounds = [tone(350, 3000), tone(1900, 4000), tone(400, 5000)]
    scores = made(sounds)
    assert scores.dtype == torch.int32
    assert scores.argmax(-1).tolist() == [0, 1, 0]
    for sound, row in zip(sounds, scores):  # whatever stands beside it
        assert torch.equal(made([sound])[0], row)
    save_integer_gru(tmp_path / "model.safetensors", made.integer)
    read = IntegerClassifier.read(tmp_path / "model.safetensors")
    assert torch.equal(read(sounds), scores)
    assert read.labels == ["low", "high"]


def test_silence_is_some_class(made):
    assert made([torch.zeros(4000)]).shape == (1, 2)


@pytest.mark.parametrize(
    "wave, match",
    [
        (torch.full((4000,), float("nan")), "NaN or infinity"),
        (torch.zeros(150), "at least 200 samples"),
        (torch.zeros(0), "at least 200 samples"),
        (torch.zeros(2, 4000), "one channel"),
    ],
    ids=["nan", "short", "empty", "stereo"],
)
def test_bad_sounds(made, wave, match):
    with pytest.raises(ValueError, match=match):
        made([wave])


@pytest.mark.parametrize(
    "key, value",
    [
        ("sample_rate", 8000.5),
        ("sample_rate", 10**9),
        ("n_mels", 10**6),
        ("n_mels", True),
        ("hop_length", 0),
        ("most_seconds", float("inf")),
        ("mean", [0.0]),
        ("mean", "0" * 12),
        ("deviation", [0.0] * 12),
        ("deviation", [float("nan")] * 12),
    ],
)
def test_forged_features(made, key, value):
    settings = {**made.features.settings, key: value}
    with pytest.raises(ValueError, match="out of their range"):
        check_features(settings)


def test_clear_errors(made):
    settings = made.features.settings
    for wrong in ([], {**settings, "code": 1}, {"n_mels": 12}):
        with pytest.raises(ValueError, match="features are sample_rate"):
            check_features(wrong)
    gru, inputs = torch.nn.GRU(5, 4), torch.randn(2, 3, 5)
    plan, calibration = homogeneous_plan(gru, 8), calibrate(gru, [inputs])
    integer = convert(gru, plan, calibration)
    with pytest.raises(ValueError, match="without a classifier"):
        IntegerClassifier(integer)
    integer = convert(gru, plan, calibration, torch.nn.Linear(4, 2))
    with pytest.raises(ValueError, match="does not say what its features"):
        IntegerClassifier(integer)
    integer.description["features"] = settings
    with pytest.raises(ValueError, match="12 features for a GRU of 5"):
        IntegerClassifier(integer)
