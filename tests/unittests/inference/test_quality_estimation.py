"""Quality of recordings: windows, lengths, levels, rates and bad input."""

import logging

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq import QualityEstimator, check_folder, quantize_
from speechbrain_mpq.inference.quality_estimation import save_quality_estimator
from speechbrain_mpq.lobes.models.dnsmos import (
    DNSMOS,
    PAPER,
    BinaryDNSMOS,
    BitDNSMOS,
    LogMel,
)

SMALL = [[8, True], [8, True], [16, False]]


@pytest.fixture(scope="module")
def estimator():
    torch.manual_seed(0)
    return QualityEstimator(DNSMOS(SMALL, (8, 8), measure="any"))


def speechlike(seconds, rate=16000):
    """Noise with pauses, [samples]."""
    rng = np.random.default_rng(0)
    count = round(seconds * rate)
    talks = np.repeat(rng.random(count // 1600 + 1), 1600)[:count]
    return 0.1 * talks * rng.standard_normal(count)


def written(path, waveform, rate=16000, subtype="FLOAT"):
    """A file with this sound."""
    soundfile.write(path, waveform, rate, subtype)
    return path


def test_windows_are_scored_by_the_network_at_one_level(estimator, tmp_path):
    wave = torch.from_numpy(speechlike(5.2)).float()
    found = estimator.estimate_file(written(tmp_path / "a.wav", wave.numpy()))
    starts = [start for start, _ in found.windows]
    assert starts == [0.0, 1.5, pytest.approx(2.2)]
    assert found.seconds == pytest.approx(5.2) and found.measure == "any"
    wave = wave - wave.mean()
    wave = wave * 0.05 / wave.square().mean().sqrt()
    with torch.no_grad():
        windows = [wave[round(16000 * s) :][:48000] for s in starts]
        expected = [estimator.network(LogMel()(w[None]))[0] for w in windows]
    scores = [score for _, score in found.windows]
    assert np.allclose(scores, expected, atol=1e-5)
    assert found.score == pytest.approx(np.mean(scores))


def test_files_and_batches_agree_at_any_level_and_length(estimator, tmp_path):
    for seconds in (0.3, 3.0, 4.6, 11.0):
        wave = speechlike(seconds)
        path = written(tmp_path / "a.wav", wave)
        score = estimator.estimate_file(path).score
        batch = torch.from_numpy(np.stack([wave, 0.01 * wave]))
        assert torch.allclose(
            estimator.estimate_batch(batch), torch.tensor(score), atol=1e-4
        )
    padded = torch.from_numpy(np.pad(wave, (0, len(wave))))[None]
    half = estimator.estimate_batch(padded, torch.tensor([0.5]))
    assert half.item() == pytest.approx(score, abs=1e-4)


def test_other_rates_and_channels(estimator, tmp_path):
    wave = torch.from_numpy(speechlike(4)).float()
    from torchaudio.functional import resample

    high = resample(wave, 16000, 48000).numpy()
    low = estimator.estimate_batch(wave[None]).item()
    path = written(tmp_path / "high.wav", high, 48000)
    assert estimator.estimate_file(path).score == pytest.approx(low, abs=0.02)
    both = np.stack([np.zeros(64000), wave.numpy()], axis=1)
    path = written(tmp_path / "two.wav", both)
    second = estimator.estimate_file(path, channel=2).score
    assert second == pytest.approx(low, abs=1e-4)
    with pytest.raises(ValueError, match="two.wav: it is silent"):
        estimator.estimate_file(path)
    with pytest.raises(ValueError, match="2 channels; there is no channel 3"):
        estimator.estimate_file(path, channel=3)


def test_pauses_have_no_share(estimator):
    wave = torch.from_numpy(speechlike(6)).float()
    padded = torch.cat([wave, torch.zeros(96000)])
    found = estimator.estimate_batch(padded[None])
    padded = padded - padded.mean()
    padded = padded * 0.05 / padded.square().mean().sqrt()
    # windows of the pause alone are left out; one at its edge is not
    starts = [0, 24000, 48000, 72000]
    scores = [estimator._score(padded[start:][:48000]) for start in starts]
    assert found.item() == pytest.approx(np.mean(scores), abs=1e-5)


def test_scores_stay_in_the_range_of_the_measure():
    network = DNSMOS(SMALL, dense=(8, 8), measure="pesq")
    wave = torch.from_numpy(speechlike(1)).float()[None]
    for bias, score in ((-3.0, 1.0), (30.0, 4.65)):
        network.output.bias.data.fill_(bias)
        estimated = QualityEstimator(network).estimate_batch(wave)
        assert estimated.item() == pytest.approx(score)


@pytest.mark.parametrize(
    ("wave", "rate", "message"),
    [
        (np.zeros(16000), 16000, "it is silent: there is nothing to judge"),
        (np.full(16000, 0.3), 16000, "it is silent"),
        (np.r_[np.ones(8000), np.nan], 16000, "holds NaN or infinity"),
        (speechlike(1, 8000), 8000, "sampled at 8000 Hz"),
        (speechlike(0.02), 16000, "shorter than one window"),
    ],
)
def test_bad_recordings(estimator, tmp_path, wave, rate, message):
    path = written(tmp_path / "bad.wav", wave, rate)
    with pytest.raises(ValueError, match=f"bad.wav: .*{message}"):
        estimator.estimate_file(path)


def test_bad_waveforms(estimator):
    wave = torch.from_numpy(speechlike(1)).float()[None]
    for wrong, message in (
        (wave[0], r"wavs must be \[batch, samples\]"),
        (torch.zeros(2, 16000), "waveform 0: it is silent"),
        (torch.full((1, 16000), torch.nan), "waveform 0: holds NaN"),
        (wave[:, :500], "waveform 0: 500 samples are shorter than one window"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.estimate_batch(wrong)
    for lens in (torch.tensor([0.0]), torch.tensor([2.0]), torch.ones(2)):
        with pytest.raises(ValueError, match="wav_lens must be 1 relative"):
            estimator.estimate_batch(wave, lens)


def test_clipped_and_short_ones_are_scored_with_a_warning(
    estimator, tmp_path, caplog
):
    wave = (20 * speechlike(1)).clip(-1, 1)
    path = written(tmp_path / "loud.wav", wave)
    with caplog.at_level(logging.WARNING):
        assert np.isfinite(estimator.estimate_file(path).score)
    assert "% of the samples are clipped" in caplog.text
    assert "1.00 s are repeated to fill 3 s" in caplog.text


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("binary_weights", [False, True])
def test_packed_binary_networks_keep_their_scores(
    tmp_path, signed, binary_weights
):
    torch.manual_seed(0)
    network = BinaryDNSMOS(
        signed, 1.0, binary_weights, shape=SMALL, measure="any"
    ).eval()
    wave = torch.from_numpy(speechlike(3)).float()[None]
    if not binary_weights:
        quantize_(network, 4)
    folder = save_quality_estimator(network, tmp_path / "packed")
    assert check_folder(folder) == []
    loaded = QualityEstimator.from_pretrained(folder)
    assert loaded.estimate_batch(wave) == QualityEstimator(
        network
    ).estimate_batch(wave)
    features = LogMel()(0.05 * wave / wave.square().mean().sqrt())
    bits, graph = BitDNSMOS(loaded.network), loaded.network
    assert float(bits(features[0])) == graph(features).item()


def test_bytes_of_four_bits(tmp_path):
    network = BinaryDNSMOS(shape=PAPER)
    quantize_(network, 4)
    folder = save_quality_estimator(network, tmp_path)
    size = (folder / "model.safetensors").stat().st_size
    assert 45_697 / 2 < size < 24_500


def test_other_models_and_forged_sizes_are_refused(tmp_path):
    from speechbrain_mpq.inference.registry import build
    from speechbrain_mpq.utils import BUNDLED_MODEL

    with pytest.raises(ValueError, match="Separator, which predicts no speech"):
        QualityEstimator.from_pretrained(BUNDLED_MODEL)
    sizes = DNSMOS(SMALL).settings
    for key, value, message in (
        ("shape", [[8, 1]], "must be one of"),
        ("shape", [8], r"must be \[channels, pooled\]"),
        ("shape", [[2**20, True]], "from 1 to 4096"),
        ("measure", "!ref x", "a name of letters"),
        ("dense", [], "list of 1 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            build({"class": "DNSMOS", "arguments": {**sizes, key: value}}, None)


def test_the_model_that_comes_with_the_package():
    from speechbrain_mpq.utils import BUNDLED_QUALITY_MODEL

    assert check_folder(BUNDLED_QUALITY_MODEL) == []
    estimator = QualityEstimator.from_pretrained()
    assert isinstance(estimator.network, BinaryDNSMOS)
    noise = torch.randn(1, 48000, generator=torch.manual_seed(0))
    assert estimator.estimate_batch(noise).item() < 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_diverged_model_has_no_score(value):
    """Within the limits of PESQ infinity would be the best there is."""
    network = DNSMOS(SMALL, (8, 8), measure="pesq")
    torch.nn.init.constant_(list(network.parameters())[-1], value)
    estimator = QualityEstimator(network)
    with pytest.raises(ValueError, match="the model puts out"):
        estimator.estimate_batch(torch.from_numpy(speechlike(3.0))[None])
