"""The published hybrid recognizers: whole, safe, and they hear new voices."""

from pathlib import Path

import numpy as np
import pytest
import torch

from speechbrain_mpq.evaluation.wer import WordErrors, word_errors
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
