"""DNSMOS P.808: its features, and the network where it is installed."""

import numpy as np
import pytest

from speechbrain_mpq.evaluation.mos import P808, log_mel, mel_bands


def test_bands():
    bands = mel_bands()
    assert bands.min() == 0
    hz = np.arange(161) * 16000 / 321
    centers = (bands * hz).sum(1) / bands.sum(1).clip(1e-12)
    wide = bands.astype(bool).sum(1) > 1
    assert (np.diff(centers[wide]) > 0).all()
    # equal areas, up to the bins' grid
    areas = bands[80:].sum(1) * 16000 / 321
    assert areas == pytest.approx(1, rel=0.3)


def test_features_of_a_tone():
    tone = np.sin(2 * np.pi * 3000 * np.arange(32000) / 16000)
    features = log_mel(0.1 * tone)
    assert features.shape == (200, 120) and features.dtype == np.float32
    assert features.max() == 1 and features.min() >= -1
    assert np.allclose(log_mel(tone), features, atol=1e-5)  # level is lost
    loudest = features[100].argmax()
    bin_of_tone = round(3000 * 321 / 16000)
    assert mel_bands()[loudest, bin_of_tone] > 0


def test_scores():
    pytest.importorskip("speechmos")
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    score = P808()
    noise = 0.1 * rng.standard_normal(16000)
    assert 1 < score(noise) < 3
    assert score(noise) == pytest.approx(score(0.1 * noise), abs=1e-3)
    with pytest.raises(ValueError, match="silent"):
        score(np.zeros(16000))
    with pytest.raises(ValueError, match="finite"):
        score(np.full(16000, np.nan))
