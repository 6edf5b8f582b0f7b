"""The shipped separator separates unseen voices in unseen rooms."""

import statistics

import pytest
import torch

from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.inference.engines.engine import load_network
from speechbrain_mpq.inference.separation import QuantizedSeparator
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.packing import load_packed_
from speechbrain_mpq.quantization.quant_api import dequantize_, quantize_
from speechbrain_mpq.simulation.dataio import listed_mixtures
from speechbrain_mpq.simulation.mixtures import (
    MixtureMaker,
    fixed_mixtures,
    load_speech,
)
from speechbrain_mpq.simulation.rooms import RoomBank, prepare_rooms

pytest.importorskip("espeakng_loader")


pytest.importorskip("pyroomacoustics")


@pytest.fixture(scope="module")
def separator():
    path = "hparams/models/separator_mini.yaml"
    separator = build_separator(path).eval()
    fold_norms_(separator)
    return load_packed_(separator, "pretrained/separator_mini")


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory, separator):
    from speechbrain_mpq.simulation.corpus import prepare_speech

    folder = tmp_path_factory.mktemp("corpus")
    prepare_speech(folder, train=0, valid=0, test=12, workers=1, progress=False)
    microphones = separator.features.microphones
    prepare_rooms(folder, {"test": 6}, microphones, 1234, 1, False)
    bank = RoomBank(folder, "test", 6)
    speech = load_speech(folder / "test_speech.json", folder)
    maker = MixtureMaker(speech, bank)
    return listed_mixtures(maker, fixed_mixtures(maker, 8))


def improvement(separator, mixtures, turn=False):
    """Median SI-SNR improvement in dB; `turn` steers to the other talker."""
    gains = []
    for item in mixtures:
        drawn, target = item["drawn"], item["targets"][:, 0]
        doa = drawn["doa_interferer"] if turn else drawn["doa"]
        with torch.no_grad():
            estimate = separator(item["mixture"][None], torch.tensor([doa]))[0]
        before = si_snr(item["mixture"][:, 0], target)
        gains.append((si_snr(estimate, target) - before).item())
    return statistics.median(gains)


@pytest.fixture(scope="module")
def gain(separator, mixtures):
    """That of full precision."""
    return improvement(separator, mixtures)


def test_it_separates_and_the_direction_steers_it(separator, mixtures, gain):
    assert gain > 6
    assert improvement(separator, mixtures, turn=True) < 0


def test_uniform_two_bits_hurt(separator, mixtures, gain):
    quantize_(separator, 2, exclude=["mask_net.conv_*.bias"])
    after = improvement(separator, mixtures)
    dequantize_(separator)
    assert after < gain - 3


def test_four_bits_are_as_good(mixtures, gain):
    folder = "pretrained/separator_mini_4bit"
    assert check_folder(folder) == []
    quantized = QuantizedSeparator.from_pretrained(folder).separator
    assert improvement(quantized, mixtures) > gain - 0.3


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_four_bits_run_in_int8(engine, mixtures):
    pytest.importorskip({"onnx": "onnxruntime"}.get(engine, engine))
    folder = "pretrained/separator_mini_4bit"
    reference = QuantizedSeparator.from_pretrained(folder).separator
    item = mixtures[0]
    with torch.no_grad():
        inputs, _ = reference.analyse(item["mixture"][None], item["doa"][None])
        expected = reference.mask_net(inputs)
    mask = load_network(folder, engine)(inputs)
    error = (mask - expected).square().mean() / expected.square().mean()
    assert error < 0.01  # 20 dB


def test_output_has_the_level_of_the_talker(separator, mixtures):
    item = mixtures[1]
    target = item["targets"][:, 0]
    with torch.no_grad():
        estimate = separator(item["mixture"][None], item["doa"][None])[0, 0]
    assert 0.7 < (estimate.std() / target.std()).item() < 1.4
