"""The published speech recognizer, loaded by stock SpeechBrain."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from speechbrain.inference.ASR import EncoderASR

from speechbrain_mpq.evaluation.wer import word_errors
from speechbrain_mpq.simulation.corpus import utterance

FOLDER = Path(__file__).parents[3] / "pretrained" / "asr_mini"


FRESH_SEED = 4321  # neither sentences nor voices of the shipped corpus


@pytest.fixture
def recognizer(monkeypatch):
    def refuse(*args):
        raise OSError("the published folder must load offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return EncoderASR.from_hparams(source=str(FOLDER))


def test_folder_is_small():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 6 * 2**20


def test_transcribes_new_voices(recognizer):
    pytest.importorskip("espeakng_loader")
    errors = []
    for index in range(5):
        samples, entry = utterance("test", index, seed=FRESH_SEED)
        wavs = torch.from_numpy(samples.astype(np.float32) / 2**15)[None]
        words, _ = recognizer.transcribe_batch(wavs, torch.ones(1))
        errors.append(word_errors(entry["words"], words[0]))
    assert sum(e.errors for e in errors) < 0.15 * sum(e.words for e in errors)


def test_silence_has_no_words(recognizer):
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal((1, 16000))).float() * 1e-4
    words, _ = recognizer.transcribe_batch(noise, torch.ones(1))
    assert len(words[0].split()) <= 2
