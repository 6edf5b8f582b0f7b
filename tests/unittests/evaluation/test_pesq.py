"""Wide-band PESQ: range, order and the cases without a score."""

import sys

import numpy as np
import pytest
import torch

from speechbrain_mpq.evaluation.pesq import pesq_many, wideband_pesq


def speechlike(seed=0, seconds=1.0):
    """Bursts of harmonics, enough of a voice for PESQ to find utterances."""
    time = np.arange(int(16000 * seconds)) / 16000
    rng = np.random.default_rng(seed)
    voice = sum(np.sin(2 * np.pi * 130 * k * time) / k for k in range(1, 20))
    voice = voice * (np.sin(2 * np.pi * 3 * time) > 0)
    return voice, rng.standard_normal(len(time))


def test_more_noise_scores_lower():
    target, noise = speechlike()
    scores = [wideband_pesq(target + g * noise, target) for g in (0, 0.05, 0.5)]
    assert scores[0] == pytest.approx(4.644, abs=1e-3)
    assert scores[0] > scores[1] > scores[2] > 1


def test_level_does_not_matter_and_tensors_are_taken():
    target, noise = speechlike()
    estimate = target + 0.1 * noise
    quiet = torch.tensor(1e-3 * estimate)
    assert wideband_pesq(quiet, target) == pytest.approx(
        wideband_pesq(estimate, target), abs=1e-3
    )


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda x: 0 * x, "silent"),
        (lambda x: x[:3000], "fewer than 0.25 s"),
        (lambda x: x * np.nan, "NaN"),
        (lambda x: x[None], "must be"),
        (lambda x: x[:-1], "one length"),
    ],
)
def test_undefined_scores_name_the_reason(spoil, reason):
    target, _ = speechlike()
    with pytest.raises(ValueError, match=reason):
        wideband_pesq(spoil(target), target)


def test_only_16_khz():
    target, _ = speechlike()
    with pytest.raises(ValueError, match="resample"):
        wideband_pesq(target, target, sample_rate=8000)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", None)
    target, _ = speechlike()
    with pytest.raises(ImportError, match=r"speechbrain_mpq\[evaluate\]"):
        wideband_pesq(target, target)


def test_processes_keep_the_order():
    target, noise = speechlike(seconds=0.5)
    pairs = [(target + g * noise, target) for g in (0.5, 0.0, 0.1)]
    alone = pesq_many(pairs, workers=1)
    assert pesq_many(pairs, workers=2) == alone
    assert alone == [wideband_pesq(*pair) for pair in pairs]


def test_many_with_one_undefined():
    target, _ = speechlike(seconds=0.5)
    pairs = [(target, target), (0 * target, target)]
    with pytest.raises(ValueError, match="pair 1: PESQ is undefined"):
        pesq_many(pairs, workers=2)
    scores = pesq_many(pairs, workers=2, skip_undefined=True)
    assert scores == [pytest.approx(4.644, abs=1e-3), None]
