"""SpeechBrain's interfaces of all kinds, quantized and loaded again.

Against the source's own class with the weights that the packed files hold. The
kinds that take long or more packages are run by the benchmark only.
"""

import pytest
import torch
from helpers import ROOT, load_script

from speechbrain_mpq.ptq.calibration_data import read_texts

BENCHMARK = load_script(ROOT / "benchmarks/speechbrain_interfaces.py")
ROWS = BENCHMARK.read_table()
QUICK = [
    "EncoderDecoderS2UT",
    "VAD",
    "MelSpectrogramEncoder",
    "WaveformEncoder",
    "Speech_Emotion_Diarization",
    "WaveformEnhancement",
    "HIFIGAN",
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Three noises with texts."""
    return BENCHMARK.write_manifest(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", QUICK)
def test_outputs_are_those_of_the_packed_weights(
    name, manifest, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    told = BENCHMARK.one_row(name, ROWS[name], tmp_path, manifest, (2, 8))
    assert told["same_bits"] and told["changed"]
    assert told["bytes"]["packed"] < 0.45 * told["bytes"]["source"]


@pytest.mark.parametrize("name", [n for n in ROWS if "refused" in ROWS[n]])
def test_what_is_refused_says_why(name, manifest, tmp_path):
    told = BENCHMARK.one_row(name, ROWS[name], tmp_path, manifest)
    assert ROWS[name]["refused"] in told["refused"]


def test_same_tells_bits_apart():
    one = {"a": torch.ones(2), "b": ["x"]}
    assert BENCHMARK.same(one, {"a": torch.ones(2), "b": ["x"]})
    assert not BENCHMARK.same(one, {"a": torch.ones(2), "b": ["y"]})
    assert not BENCHMARK.same(one, {"a": torch.ones(2) + 1e-7, "b": ["x"]})


def test_texts_of_a_manifest():
    entries = {"a": {"wav": "a.wav", "label": "one", "other": "two"}}
    assert read_texts(entries)[0].audio == "one"
    assert read_texts(entries, "other")[0].audio == "two"
    with pytest.raises(ValueError, match="'a' has no text under words, only"):
        read_texts(entries, "words")
    with pytest.raises(ValueError, match="name its key by --text-key"):
        read_texts({"a": {"wav": "a.wav", "words": ["no", "text"]}})
