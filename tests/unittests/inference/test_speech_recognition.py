"""A packed hybrid recognizer: loading, words, refusals."""

import json

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq.decoders.ngram import Ngram, estimate_arpa
from speechbrain_mpq.decoders.vocabulary import Lexicon
from speechbrain_mpq.evaluation import results
from speechbrain_mpq.evaluation.task import find_task
from speechbrain_mpq.inference import speech_recognition
from speechbrain_mpq.inference.audio import AudioError
from speechbrain_mpq.inference.loading import load
from speechbrain_mpq.inference.quality_estimation import save_quality_estimator
from speechbrain_mpq.inference.registry import build, describe
from speechbrain_mpq.inference.speech_recognition import (
    HybridASR,
    Recognizer,
    save_recognizer,
)
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.lobes.models.dnsmos import BinaryDNSMOS
from speechbrain_mpq.lobes.models.tdnnf import TDNNF
from speechbrain_mpq.quantization.quant_api import quantize_

LEXICON = Lexicon(
    {"tea": [["t", "iy"]], "eat": [["iy", "t"]], "a": [["ah"], ["ey"]]}
)


def network(**options):
    torch.manual_seed(0)
    outputs = 2 * len(LEXICON.phones)
    model = TDNNF(40, outputs, 16, [4, 4, 4], [1, 0, 3], prefinal=8, **options)
    for head in filter(None, (model.chain, model.xent)):
        torch.nn.init.normal_(head.output.weight)
    return model.eval()


@pytest.fixture
def arpa(tmp_path):
    estimate_arpa(tmp_path / "any.arpa", ["tea eat", "a tea", "eat a"])
    return tmp_path / "any.arpa"


@pytest.fixture
def folder(tmp_path, arpa):
    return save_recognizer(network(), tmp_path / "asr", LEXICON, arpa)


@pytest.mark.parametrize("bits", [32, 4])
def test_loads_bit_for_bit(bits, tmp_path, arpa):
    model = network()
    if bits < 32:
        quantize_(model, bits, exclude=["xent.*"])
    folder = save_recognizer(model, tmp_path / "asr", LEXICON, arpa)
    loaded = HybridASR.from_pretrained(folder)
    feats = torch.randn(2, 50, 40)
    with torch.no_grad():
        assert torch.equal(loaded.model(feats), model(feats))
    assert loaded.model.xent is None and model.xent is not None
    assert check_folder(folder) == []
    assert loaded.lexicon.phones == LEXICON.phones


def test_nothing_is_executed(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("this could execute anything")

    for name in ("pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(name, refuse)
    # Were it read, this would end the tests.
    (folder / "hyperparams.yaml").write_text("a: !apply:os.abort []\n")
    assert HybridASR.from_pretrained(folder).vocabulary == ["a", "eat", "tea"]


def test_words_do_not_depend_on_the_batch(folder):
    model = HybridASR.from_pretrained(folder)
    torch.manual_seed(1)
    long, short = torch.randn(16000), torch.randn(8000)
    batch = torch.stack([long, torch.cat([short, torch.zeros(8000)])])
    lengths = torch.tensor([1, 0.5])
    words, numbers = model.transcribe_batch(batch, lengths)
    assert words[0] == model.transcribe_batch(long[None])[0][0]
    assert words[1].split() == [model.vocabulary[i] for i in numbers[1]]
    # The features pad an utterance's end: only the frames inside are its own.
    beside = model.outputs(batch, lengths)[1]
    (alone,) = model.outputs(short[None])
    assert abs(len(beside) - len(alone)) <= 1
    inside = len(alone) - 4  # what the context does not carry outside
    assert np.abs(beside[:inside] - alone[:inside]).max() < 0.2


def test_recordings_of_which_no_words_can_be_made(folder, tmp_path):
    """Each is told at once, by its name; an offset is no sound."""
    model, path = HybridASR.from_pretrained(folder), tmp_path / "a.wav"
    signal = np.random.default_rng(0).normal(size=16000) / 10
    broken = np.where(np.arange(16000) == 800, np.nan, signal)
    for wrong, rate, match in (
        (signal, 16001, "16001 Hz, an odd rate"),
        (signal[:300], 16000, "300 samples"),
        (broken, 16000, "NaN or infinity at 0.050 s"),
        (np.full(16000, 0.25), 16000, "it is silent"),
    ):
        soundfile.write(path, wrong, rate, "FLOAT")
        with pytest.raises(AudioError, match=f"a.wav: .*{match}"):
            model.read(path)
    soundfile.write(path, signal + 0.5, 16000, "FLOAT")
    wanted = torch.from_numpy(signal - signal.mean()).float()
    assert torch.allclose(model.read(path), wanted, atol=1e-6)


def test_transcribes_files(folder, tmp_path):
    model = HybridASR.from_pretrained(folder)
    signal = np.random.default_rng(0).normal(size=(16000, 2)) / 10
    soundfile.write(tmp_path / "a.wav", signal, 16000, "FLOAT")
    mono = torch.from_numpy(signal.mean(1)).float()
    expected = model.transcribe_batch(mono[None])[0][0]
    assert model.transcribe_file(tmp_path / "a.wav") == expected
    tone = np.sin(2 * np.pi * 440 * np.arange(48000) / 48000) / 3
    soundfile.write(tmp_path / "b.wav", np.stack([tone, tone], 1), 48000)
    resampled = model.read(tmp_path / "b.wav")
    assert resampled.shape == (16000,)
    wanted = torch.from_numpy(tone[::3]).float()
    assert (resampled - wanted)[200:-200].abs().max() < 1e-3
    soundfile.write(tmp_path / "cut.wav", signal, 16000, "PCM_16")
    content = (tmp_path / "cut.wav").read_bytes()
    place = content.index(b"data") + 4  # a header that tells of 100 bytes
    lying = content[:place] + (100).to_bytes(4, "little") + content[place + 4 :]
    (tmp_path / "cut.wav").write_bytes(lying)
    assert model.read(tmp_path / "cut.wav").shape == (16000,)
    soundfile.write(tmp_path / "c.wav", signal, 8000)
    with pytest.raises(ValueError, match="8000 Hz; the model needs 16000"):
        model.transcribe_file(tmp_path / "c.wav")
    (tmp_path / "d.wav").write_text("no sound")
    with pytest.raises(ValueError, match="d.wav: cannot be read as audio"):
        model.transcribe_file(tmp_path / "d.wav")
    with pytest.raises(FileNotFoundError, match="no file"):
        model.transcribe_file(tmp_path / "e.wav")


def test_a_network_that_puts_out_no_numbers(folder):
    """The search would make silence of it."""
    model = HybridASR.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.fill_(1e30)
    with pytest.raises(ValueError, match="puts out NaN or infinity"):
        model.transcribe_batch(torch.randn(1, 16000))


def test_refuses_bad_waveforms(folder):
    model = HybridASR.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"must be \[batch, samples\]"):
        model.transcribe_batch(torch.zeros(16000))
    with pytest.raises(ValueError, match="too short"):
        model.transcribe_batch(torch.zeros(1, 100))
    with pytest.raises(ValueError, match="NaN"):
        model.transcribe_batch(torch.full((1, 16000), torch.nan))
    for lengths in ([1.0, 1.0], [0.0], [1.5], [-0.5], [torch.nan], [16000]):
        with pytest.raises(ValueError, match="wav_lens must be 1 relative"):
            model.transcribe_batch(torch.zeros(1, 16000), lengths)
    assert isinstance(model.transcribe_batch(torch.zeros(1, 16000))[0][0], str)


def test_other_words_of_the_same_phones(folder, tmp_path):
    (tmp_path / "lexicon.txt").write_text("tatty t ey t iy\nate ey t\n")
    estimate_arpa(tmp_path / "lm", ["ate tatty"])
    model = HybridASR.from_pretrained(
        folder, tmp_path / "lexicon.txt", tmp_path / "lm"
    )
    words, _ = model.transcribe_batch(torch.randn(1, 16000))
    assert set(words[0].split()) <= {"tatty", "ate"}


def test_refuses_other_phones_and_words(folder, tmp_path, arpa):
    path = tmp_path / "lexicon.txt"
    path.write_text("tea t iy\neat iy t\na aa\n")
    with pytest.raises(ValueError, match=r"not in the phone set: \['aa'\]"):
        HybridASR.from_pretrained(folder, lexicon=path)
    path.write_bytes("tea t iy\ncafé t ey\n".encode("latin1"))
    with pytest.raises(ValueError, match="not UTF-8.*iconv"):
        HybridASR.from_pretrained(folder, lexicon=path)
    path.write_text("tea t iy\n")
    with pytest.raises(ValueError, match="without pronunciation, 'a', 'eat'"):
        HybridASR.from_pretrained(folder, lexicon=path)
    with pytest.raises(ValueError, match="is no ARPA file"):
        HybridASR.from_pretrained(folder, ngram=path)
    (folder / "lm.arpa").unlink()
    with pytest.raises(FileNotFoundError, match="lm.arpa: a recognizer needs"):
        HybridASR.from_pretrained(folder)
    with pytest.raises(ValueError, match="take the lexicon"):
        save_recognizer(network(), folder, Lexicon({"a": [["ah"]]}), arpa)


def test_refuses_other_models(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        HybridASR.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="wants a vector of the speaker"):
        HybridASR(network(speaker_size=4), LEXICON, None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 10**9}, "size must be"),
        ({"phones": ["!new:os.system"]}, "must be a phone"),
        ({"phones": ["a"]}, "cannot be built|a phone has two"),
        ({"strides": [1]}, "3 bottlenecks and 1 strides"),
    ],
)
def test_forged_architectures_are_refused(change, message):
    architecture = describe(network(xent=False))
    assert build(architecture, None).settings == network(xent=False).settings
    architecture["arguments"] |= change
    with pytest.raises(ValueError, match=message):
        build(architecture, None)


def test_task_counts_word_errors():
    task = find_task("speech recognition")
    items = [
        {"id": "a", "reference": "tea eat", "hypothesis": "tea"},
        {"id": "b", "reference": "a tea", "hypothesis": "a tea"},
    ]
    block = task.summarise(items)
    assert (block["wer"], block["deletions"], block["words"]) == (25.0, 1, 4)


def test_card_tells_how_to_use_it(folder):
    text = (folder / "README.md").read_text()
    assert "# Hybrid speech recognizer, 32 bits" in text
    assert "HybridASR.from_pretrained" in text
    config = json.loads((folder / "quantization_config.json").read_text())
    assert config["architecture"]["arguments"]["phones"] == LEXICON.phones
    assert load(folder).settings["phones"] == LEXICON.phones
    assert Ngram(folder / "lm.arpa").vocabulary == ["a", "eat", "tea"]


@pytest.mark.parametrize("name", ["lm.arpa", "lexicon.txt"])
def test_verification_needs_what_is_beside_the_weights(folder, name):
    assert check_folder(folder) == []
    content = (folder / name).read_text()
    (folder / name).write_text(content.replace("tea", "sea"))
    (problem,) = check_folder(folder)
    assert f"{name} is not the file that the folder was saved with" in problem
    with pytest.raises(ValueError, match="saved with: take that one, or name"):
        HybridASR.from_pretrained(folder)
    (folder / name).write_text(content)
    HybridASR.from_pretrained(folder)
    (folder / name).unlink()
    assert any(f"no {folder / name}" in one for one in check_folder(folder))


def test_folders_without_checksums_load(folder, monkeypatch):
    load_network = speech_recognition.load

    def of_before(path):
        model = load_network(path)
        model.settings["files_sha256"] = []
        return model

    monkeypatch.setattr(speech_recognition, "load", of_before)
    content = (folder / "lexicon.txt").read_text()
    (folder / "lexicon.txt").write_text(content.replace("tea", "sea"))
    with pytest.raises(ValueError, match="without pronunciation, 'tea'"):
        HybridASR.from_pretrained(folder)
    (folder / "lexicon.txt").write_text(content + "at ey t\n")
    HybridASR.from_pretrained(folder)


@pytest.mark.parametrize("silence, vowel", [("SIL", "IY1"), ("sil", "iy")])
def test_phones_of_any_kind_come_back(tmp_path, silence, vowel):
    lexicon = Lexicon({"tea": [["T", vowel]]}, silence=silence)
    torch.manual_seed(0)
    network = TDNNF(40, 6, 16, [4, 4], [1, 3], prefinal=4)
    estimate_arpa(tmp_path / "lm", ["tea"])
    folder = save_recognizer(network, tmp_path / "a", lexicon, tmp_path / "lm")
    model = HybridASR.from_pretrained(folder)
    assert model.lexicon.phones == lexicon.phones
    assert model.lexicon.pronunciations == lexicon.pronunciations


@pytest.mark.parametrize(
    "scale", [{"acoustic_scale": 0}, {"acoustic_scale": -1}, {"lm_scale": -1}]
)
def test_refuses_scales_that_no_search_is_made_for(folder, scale):
    with pytest.raises(ValueError, match="must be above 0"):
        HybridASR.from_pretrained(folder, **scale)


def test_refuses_folders_of_other_models(tmp_path):
    save_quality_estimator(BinaryDNSMOS(), tmp_path)
    with pytest.raises(ValueError, match="holds a BinaryDNSMOS, no TDNN-F"):
        HybridASR.from_pretrained(tmp_path)


def test_recognizer_stands_where_it_was():
    assert results.Recognizer is Recognizer
    with pytest.raises(AttributeError, match="no attribute 'Recogniser'"):
        _ = results.Recogniser
