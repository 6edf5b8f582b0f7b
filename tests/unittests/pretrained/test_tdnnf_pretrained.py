"""The published hybrid recognizers: whole, safe, and they hear new voices."""

from pathlib import Path

import numpy as np
import pytest
import torch

from speechbrain_mpq.evaluation.wer import WordErrors, word_errors
from speechbrain_mpq.inference.language_model import LanguageModel, rescore
from speechbrain_mpq.inference.speech_recognition import HybridASR, Recognizer
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.simulation.corpus import utterance

PRETRAINED = Path(__file__).parents[3] / "pretrained"
FOLDERS = sorted(PRETRAINED.glob("asr_tdnnf*"))
FRESH_SEED = 4321  # neither sentences nor voices of the shipped corpus


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    """Each of them."""
    return request.param


def test_folders_are_whole(folder):
    assert check_folder(folder) == []


def test_transcribes_new_voices(folder):
    pytest.importorskip("espeakng_loader")
    model, errors = HybridASR.from_pretrained(folder), WordErrors()
    for index in range(5):
        samples, entry = utterance("test", index, seed=FRESH_SEED)
        wavs = torch.from_numpy(samples.astype(np.float32) / 2**15)[None]
        words, _ = model.transcribe_batch(wavs)
        errors += word_errors(entry["words"], words[0])
    assert errors.rate < 15


def test_scores_separated_speech(folder):
    recognize = Recognizer(folder)
    rng = np.random.default_rng(0)
    noise = 1e-4 * rng.standard_normal(16000).astype(np.float32)
    assert len(recognize(torch.from_numpy(noise)).split()) <= 9


def test_reads_addresses_and_is_rescored():
    """A sentence of 5000 words, by a voice of the test, at 4 bits."""
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("kaldi_decoder")
    assert check_folder(PRETRAINED / "asr_sotu_4bit") == []
    model = HybridASR.from_pretrained(PRETRAINED / "asr_sotu_4bit")
    text = "the people of the united states are at peace with all nations"
    samples, _ = utterance("test", 3, FRESH_SEED, {"test": [text] * 4})
    wavs = torch.from_numpy(samples.astype(np.float32) / 2**15)[None]
    assert word_errors(text, model.transcribe_batch(wavs)[0][0]).rate < 20
    lists = model.nbest(wavs, beam=9.0, lattice_beam=6.0)
    assert 2 <= len(lists[0].hypotheses) <= 20
    assert word_errors(text, lists[0].hypotheses[0]).rate < 20
    lm = LanguageModel.from_pretrained(PRETRAINED / "lm_sotu_2bit")
    (ranked,) = rescore(lists, lm)
    assert word_errors(text, ranked.hypotheses[0]).rate < 20
