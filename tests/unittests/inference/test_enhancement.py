"""The packed noise suppressor: loading, batches, streams, long files."""

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq.inference.enhancement import SpeechEnhancer, save_enhancer
from speechbrain_mpq.inference.folder import save_separator
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.lobes.models.nsnet2 import EarlyExitNsNet2, NsNet2
from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.quantization.quant_api import quantize_

SEPARATOR = "hparams/models/separator_mini.yaml"
SIZES = {"channels": 8, "hidden": 16, "blocks": 1, "layers": 2}


@pytest.fixture
def enhancer():
    """A small one."""
    torch.manual_seed(0)
    return SpeechEnhancer(EarlyExitNsNet2(side=8))


@pytest.mark.parametrize(
    "network",
    [
        EarlyExitNsNet2(
            side=4,
            concat=False,
            exits=(1, 5),
            input_mean=-7.0,
            input_std=4.5,
            thresholds=[[6e5, 0.5], [9e5, 0.25]],
        ),
        NsNet2(widths=(9, 8, 7, 6, 5)),
    ],
    ids=["split", "baseline"],
)
def test_a_packed_folder_is_what_was_packed(network, tmp_path):
    network = network.eval()
    noisy = torch.randn(1, 3000)
    save_enhancer(network, tmp_path / "float")
    loaded = SpeechEnhancer.from_pretrained(tmp_path / "float")
    assert loaded.model.settings == network.settings
    assert loaded.exits == network.exits
    with torch.no_grad():
        expected = network.enhance(noisy)
    assert torch.allclose(loaded.enhance_batch(noisy), expected, atol=1e-6)
    quantize_(network, 4, exclude=["*bias*"])
    save_enhancer(network, tmp_path / "packed")
    assert check_folder(tmp_path / "packed") == []
    loaded = SpeechEnhancer.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = network.enhance(noisy)
    assert torch.allclose(loaded.enhance_batch(noisy), expected, atol=1e-6)
    # SpeechBrain's way builds the same
    text = (tmp_path / "packed" / "hyperparams.yaml").read_text()
    hparams = load_hyperpyyaml(text)
    assert hparams["model"].settings == network.settings


def test_card_tells_of_exits(tmp_path):
    scores = {"pesq": 2.5, "si_snr": 15.0, "dnsmos": None}
    metadata = {
        "noisy": {"pesq": 2.0, "si_snr": 10.0},
        "exits": {"1": {"macs": 528135, **scores}},
    }
    save_enhancer(EarlyExitNsNet2(side=4), tmp_path, metadata)
    card = (tmp_path / "README.md").read_text()
    assert "# Noise suppression with early exits, 32 bits" in card
    assert "| 1 | 0.53 M | 2.50 | 15.00 | - |" in card
    assert "| noisy |  | 2.00 | 10.00 | - |" in card


def test_long_files_are_the_whole_in_pieces(enhancer, tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    noise = np.random.default_rng(0).standard_normal((50000, 2)) / 10
    soundfile.write(path, noise, 16000, "FLOAT")
    noise = torch.from_numpy(noise - noise.mean(0)).float()
    for exit in (0, 5):
        expected = enhancer.enhance_batch(noise.T, exit=exit).T
        for seconds in (4.0, 0.7):
            monkeypatch.setattr(
                "speechbrain_mpq.inference.enhancement.CHUNK_SECONDS", seconds
            )
            found = enhancer.enhance_file(path, exit=exit)
            assert torch.allclose(found, expected, atol=1e-5)


def test_lengths_end_in_silence(enhancer):
    noisy = torch.randn(2, 3000)
    whole = enhancer.enhance_batch(noisy)
    with pytest.raises(ValueError, match="lengths must be 2 relative"):
        enhancer.enhance_batch(noisy, torch.tensor([1.0, -0.5]))
    found = enhancer.enhance_batch(noisy, torch.tensor([1.0, 0.5]))
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[1, :1500], whole[1, :1500])
    assert not found[1, 1500:].any()


def test_integers_are_parts_of_full_scale(enhancer):
    noisy = torch.randn(1, 2000).clamp(-3, 3) / 4
    integers = (noisy * 2**15).round().short()
    found = enhancer.enhance_batch(integers)
    assert torch.allclose(found, enhancer.enhance_batch(noisy), atol=1e-3)


def test_full_scale_is_kept(enhancer, tmp_path, caplog):
    """A file that gets louder than full scale is clipped, and told of."""
    torch.nn.init.constant_(enhancer.model.layers[0].bias, 50.0)  # mask 1
    loud = 3 * np.sin(np.arange(4000))
    soundfile.write(tmp_path / "a.wav", loud, 16000, "FLOAT")
    out = enhancer.enhance_file(tmp_path / "a.wav", tmp_path / "b.wav", exit=0)
    assert "above full scale were clipped" in caplog.text
    assert np.abs(soundfile.read(out)[0]).max() <= 1
    enhancer.enhance_file(
        tmp_path / "a.wav", tmp_path / "c.wav", exit=0, subtype="FLOAT"
    )
    assert np.abs(soundfile.read(tmp_path / "c.wav")[0]).max() > 2


def test_a_model_that_puts_out_no_numbers(enhancer, tmp_path):
    with torch.no_grad():
        for parameter in enhancer.model.parameters():
            parameter.normal_().mul_(1e30)
    noise = torch.randn(2, 16000, generator=torch.manual_seed(0))
    path, out = tmp_path / "a.wav", tmp_path / "b.wav"
    soundfile.write(path, noise[0].numpy() / 9, 16000)
    for work in (
        lambda: enhancer.enhance_batch(noise),
        lambda: enhancer.stream().feed(noise[0]),
        lambda: enhancer.enhance_file(path, out),
    ):
        with pytest.raises(ValueError, match="puts out NaN or infinity"):
            work()
    assert not out.exists()


def test_bad_input(enhancer, tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        enhancer.enhance_batch(torch.full((1, 900), torch.nan))
    with pytest.raises(ValueError, match=r"\[batch, samples\]"):
        enhancer.enhance_batch(torch.ones(900))
    with pytest.raises(ValueError, match="no exits"):
        enhancer.stream(4)
    with pytest.raises(ValueError, match="no thresholds"):
        enhancer.stream("auto")
    path = tmp_path / "low.wav"
    soundfile.write(path, np.ones(900) / 2, 4000)
    with pytest.raises(ValueError, match="needs 8000 Hz or more"):
        enhancer.enhance_file(path)
    soundfile.write(path, np.ones(900) / 2, 16000)
    with pytest.raises(ValueError, match="no samples of type FLOAT"):
        enhancer.enhance_file(path, tmp_path / "a.flac", subtype="FLOAT")
    save_separator(build_separator(SEPARATOR, **SIZES).eval(), tmp_path)
    with pytest.raises(ValueError, match="suppresses no noise"):
        SpeechEnhancer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        SpeechEnhancer.from_pretrained("no_such_folder")
