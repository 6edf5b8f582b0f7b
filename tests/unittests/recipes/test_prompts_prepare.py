"""Asterisk's prompts: layout of the packages, texts, splits."""

import gzip
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, load_script

from speechbrain_mpq.decoders.vocabulary import Lexicon

TEXT = """; Core Asterisk Sounds in English

activated: Activated.
beep: [this is a simple beep tone]
digits/0: zero
menu: Press * or 1, then # for more.
unknown: Zyzzyva.
nowhere: There is no such recording.
"""
CMUDICT = "ACTIVATED  T\nZERO  Z\nPRESS  P\nSTAR  S\nOR  R\nONE  W\nTHEN  DH\n"
CMUDICT += "POUND  P\nFOR  F\nMORE  M\n"


@pytest.fixture
def module(monkeypatch):
    """The prepare step, which imports its neighbour."""
    monkeypatch.syspath_prepend(ROOT / "recipes/Voices")
    yield load_script(ROOT / "recipes/Voices/prompts_prepare.py")
    sys.modules.pop("voices_prepare", None)


@pytest.fixture
def packages(tmp_path):
    """What the packages unpack to, and a lexicon."""
    folder = tmp_path / "packages"
    texts = folder / "usr/share/doc/asterisk-core-sounds-en"
    texts.mkdir(parents=True)
    content = gzip.compress(TEXT.encode())
    (texts / "core-sounds-en.txt.gz").write_bytes(content)
    sounds = folder / "usr/share/asterisk/sounds/en_US_f_Allison"
    (sounds / "digits").mkdir(parents=True)
    ffmpeg = shutil.which("ffmpeg")
    if not ffmpeg:
        ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    tone = np.sin(np.arange(16000)) * 2**14
    command = [ffmpeg, "-v", "error", "-f", "s16le", "-ar", "16000", "-i", "-"]
    for key in ("activated", "beep", "digits/0", "menu", "unknown"):
        subprocess.run(
            [*command, "-f", "g722", str(sounds / f"{key}.g722")],
            input=tone.astype(np.int16).tobytes(),
            check=True,
        )
    (tmp_path / "cmudict").write_text(CMUDICT)
    return folder


def test_speech_and_manifests(module, packages, tmp_path, monkeypatch, capsys):
    splits = {"digits/0": "valid", "menu": "test"}
    monkeypatch.setattr(module, "split_of", lambda k: splits.get(k, "train"))
    out = tmp_path / "out"
    module.prepare_prompts(packages, out, tmp_path / "cmudict", workers=1)
    told = capsys.readouterr().out
    assert "1 prompts have words that the lexicon lacks" in told
    words = {}
    for split in ("train", "valid", "test"):
        entries = json.loads((out / f"{split}_speech.json").read_text())
        for key, entry in entries.items():
            words[key] = entry["words"]
            assert entry["length"] == pytest.approx(1, abs=0.1)
            path = entry["wav"].replace("{data_root}", str(out))
            assert module.seconds_of(module.Path(path)) == entry["length"]
    assert words == {
        "activated": "activated",
        "digits_0": "zero",
        "menu": "press star or one then pound for more",
    }
    assert "star" in Lexicon.read(out / "lexicon.txt").pronunciations


def test_what_is_missing(module, packages, tmp_path):
    with pytest.raises(ValueError, match="no lexicon: give cmudict"):
        module.prepare_prompts(packages, tmp_path, None)
    shutil.rmtree(packages / "usr/share/doc")
    with pytest.raises(FileNotFoundError, match="download asterisk-core-sou"):
        module.prepare_prompts(packages, tmp_path, tmp_path / "cmudict")


def test_splits_are_of_all_sizes(module):
    counts = dict.fromkeys(("train", "valid", "test"), 0)
    for number in range(1000):
        counts[module.split_of(f"prompt-{number}")] += 1
    assert counts["train"] == pytest.approx(800, abs=60)
    assert counts["valid"] == pytest.approx(100, abs=40)
