"""LibriSpeech in its real layout, made up."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from helpers import ROOT, load_script, read_rows

from speechbrain_mpq.decoders.vocabulary import Lexicon

(ROW,) = read_rows("LibriSpeech")
CMUDICT = "so S OW1\nbe B IY1\nit IH1 T\nit(2) AH0 T\n"


@pytest.fixture(scope="module")
def prepare():
    """The prepare step."""
    return load_script(ROOT / ROW["Data_prep_file"]).prepare_librispeech


def utterance(folder, key, words, seconds=1.0):
    """One utterance of a subset, in noise for speech."""
    speaker, chapter, _ = key.split("-")
    folder = folder / speaker / chapter
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, round(16000 * seconds))
    soundfile.write(folder / f"{key}.flac", noise, 16000)
    with open(folder / f"{speaker}-{chapter}.trans.txt", "a") as file:
        file.write(f"{key} {words}\n")


@pytest.fixture
def corpus(tmp_path):
    """A folder of subsets and a lexicon."""
    folder = tmp_path / "LibriSpeech"
    for split in ("train-clean-5", "dev-clean-2", "test-clean"):
        utterance(folder / split, "19-198-0000", "SO BE IT")
        utterance(folder / split, "19-198-0001", "SO BE THOU", seconds=2)
    (tmp_path / "cmudict.dict").write_text(CMUDICT)
    return folder


SUBSETS = {"train": ["train-clean-5"], "test": ["test-clean", "dev-clean-2"]}


def test_manifests_and_lexicon(prepare, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(corpus, out, tmp_path / "cmudict.dict", SUBSETS)
    told = capsys.readouterr().out
    assert "train: 1 utterances, 0.0 h; 1 have words" in told
    assert "test: 2 utterances, 0.0 h; 0 have words" in told
    train = json.loads((out / "train_speech.json").read_text())
    (entry,) = train.values()
    assert entry["words"] == "SO BE IT" and entry["length"] == 1
    assert soundfile.info(entry["wav"]).frames == 16000
    lexicon = Lexicon.read(out / "lexicon.txt")
    assert lexicon.pronunciations["IT"] == [["IH", "T"], ["AH", "T"]]
    test = json.loads((out / "test_speech.json").read_text())
    assert test["19-198-0001"]["words"] == "SO BE THOU"  # nothing is left out


def test_what_is_refused(prepare, corpus, tmp_path):
    lexicon = tmp_path / "cmudict.dict"
    with pytest.raises(ValueError, match="no lexicon: give cmudict"):
        prepare(corpus, tmp_path, None, SUBSETS)
    with pytest.raises(FileNotFoundError, match="unpack dev-other.tar.gz"):
        prepare(corpus, tmp_path, lexicon, {"valid": ["dev-other"]})
    other = tmp_path / "german.dict"
    other.write_text("ja Y AA\n")
    with pytest.raises(ValueError, match="nothing is left of train"):
        prepare(corpus, tmp_path, other, SUBSETS)
    audio = corpus / "train-clean-5/19/198/19-198-0001.flac"
    audio.write_bytes(b"fLaC")
    with pytest.raises(ValueError, match="0001.flac has 0 s.*unpack it anew"):
        prepare(corpus, tmp_path, lexicon, SUBSETS)
    audio.unlink()
    with pytest.raises(ValueError, match="trans.txt, line 2: no 19-198-0001"):
        prepare(corpus, tmp_path, lexicon, SUBSETS)
    shutil.rmtree(corpus / "train-clean-5/19")
    with pytest.raises(FileNotFoundError, match="as it is unpacked"):
        prepare(corpus, tmp_path, lexicon, SUBSETS)
