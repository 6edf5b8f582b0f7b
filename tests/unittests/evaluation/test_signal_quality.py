"""SI-SNR, PESQ and DNSMOS: closed forms, order, cases without a score."""

import math
import sys

import numpy as np
import pytest
import torch
from speechbrain.nnet.losses import cal_si_snr

from speechbrain_mpq.evaluation.signal_quality import (
    P808,
    log_mel,
    mel_bands,
    pesq_many,
    si_snr,
    wideband_pesq,
)


def orthogonal_pair(n=64):
    time = torch.arange(n) * (2 * math.pi / n)
    return torch.sin(3 * time), torch.sin(7 * time)


@pytest.mark.parametrize("ratio", [-6.0, 0.0, 13.5])
def test_orthogonal_noise_gives_the_energy_ratio(ratio):
    target, noise = orthogonal_pair()
    estimate = target + 10 ** (-ratio / 20) * noise
    assert si_snr(estimate, target).item() == pytest.approx(ratio, abs=1e-4)


def test_scale_and_mean_do_not_matter():
    generator = torch.Generator().manual_seed(1)
    estimate, target = torch.randn(2, 500, generator=generator)
    plain = si_snr(estimate, target)
    assert torch.allclose(si_snr(-7 * estimate, 0.3 * target), plain, atol=1e-4)
    assert torch.allclose(si_snr(estimate + 3, target - 2), plain, atol=1e-3)
    with_mean = si_snr(estimate + 3, target - 2, zero_mean=False)
    assert not torch.allclose(with_mean, plain, atol=1e-1)


def test_agrees_with_speechbrain():
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(4, 800, generator=generator)
    estimate = target + torch.randn(4, 800, generator=generator)
    theirs = -cal_si_snr(
        target.T.unsqueeze(-1).clone(), estimate.T.unsqueeze(-1).clone()
    )
    assert torch.allclose(si_snr(estimate, target), theirs.flatten(), atol=1e-4)


def test_silent_signals_stay_finite_and_low():
    loud, silent = torch.ones(100).cumsum(0), torch.zeros(100)
    assert si_snr(loud, silent) < si_snr(0.1 * loud, silent) < -50
    assert si_snr(silent, loud).item() == pytest.approx(0.0)
    assert si_snr(silent, silent).item() == pytest.approx(0.0)


def test_gradient_climbs():
    target, noise = orthogonal_pair()
    estimate = (target + noise).requires_grad_()
    si_snr(estimate, target).backward()
    better = estimate.detach() + 0.1 * estimate.grad
    assert si_snr(better, target) > si_snr(estimate, target)


def test_gradient_is_finite_for_silence():
    estimate = torch.zeros(50, requires_grad=True)
    si_snr(estimate, torch.randn(50)).backward()
    assert torch.isfinite(estimate.grad).all()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="cut both"):
        si_snr(torch.zeros(2, 10), torch.zeros(2, 9))
    with pytest.raises(ValueError, match="without a sample"):
        si_snr(torch.zeros(2, 0), torch.zeros(2, 0))


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
