"""Recipes of TDNN-F with N-best lists: SOTU, LibriSpeech, Switchboard."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from helpers import ROOT, load_script, read_rows, run_row

from speechbrain_mpq import HybridASR
from speechbrain_mpq.decoders.nbest import read_nbest
from speechbrain_mpq.evaluation.wer import oracle_errors, word_errors

ROW = next(row for row in read_rows("SOTU") if row["Task"] == "ASR")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder in the place of tests/tmp."""
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("kaldi_decoder")
    return tmp_path_factory.mktemp("reading")


@pytest.fixture(scope="module")
def trained(shared):
    """Output folder of the row."""
    return run_row(ROW, shared)


def test_dictionarys_notice_is_found_through_the_link(monkeypatch):
    folder = ROOT / "recipes/SOTU/ASR/TDNNF"
    monkeypatch.syspath_prepend(str(folder))
    script = load_script(folder / "sotu_speech_prepare.py")
    assert "Carnegie Mellon" in script.LICENSE.read_text(encoding="utf-8")


def test_lists_references_and_results_agree(trained):
    for name in ("clean", "noisy"):
        lists = read_nbest(trained / f"{name}_nbest.json")
        lines = (trained / f"{name}_refs.txt").read_text().splitlines()
        references = dict(line.split(" ", 1) for line in lines)
        assert [row.id for row in lists] == list(references)
        assert len(lists) == 3
        metrics = json.loads((trained / name / "metrics.json").read_text())
        found = [
            word_errors(references[row.id], row.hypotheses[0]) for row in lists
        ]
        errors = sum(counts.errors for counts in found)
        words = sum(counts.words for counts in found)
        assert metrics["average"]["wer"] == pytest.approx(100 * errors / words)
        pairs = [(references[row.id], row.hypotheses) for row in lists]
        assert oracle_errors(pairs).errors <= errors
    assert (trained / "wer_noisy.txt").read_text()


def test_published_folder_makes_the_lists(trained, shared):
    data = shared / "sotu_speech"
    test = json.loads((data / "test_speech.json").read_text())
    model = HybridASR.from_pretrained(trained / "published")
    assert model.vocabulary == model.ngram.vocabulary
    # Alone as in its batch: the longest one, which nothing was put behind
    key = max(test, key=lambda name: test[name]["length"])
    path = test[key]["wav"].replace("{data_root}", str(data))
    found = model.nbest(model.read(path)[None], count=3, ids=[key])[0]
    lists = read_nbest(trained / "clean_nbest.json")
    (there,) = [row for row in lists if row.id == key]
    assert found.hypotheses == there.hypotheses
    assert found.scores == pytest.approx(there.scores, abs=0.01)


def test_table_lists_every_file():
    folder = ROOT / "recipes/SOTU/ASR"
    found = {p.relative_to(ROOT).as_posix() for p in folder.rglob("*.yaml")}
    assert found == {ROW["Hparam_file"]}


def test_librispeech(speech, tmp_path):
    """The words of the embedded corpus in the layout of LibriSpeech."""
    pytest.importorskip("kaldi_decoder")
    speech(tmp_path / "embedded")
    parts = {"train": "train-clean-5", "valid": "dev-clean-2"}
    for split, part in {**parts, "test": "test-clean"}.items():
        path = tmp_path / f"embedded/{split}_speech.json"
        entries = json.loads(path.read_text())
        lines = []
        folder = tmp_path / "LibriSpeech" / part / "7/8"
        folder.mkdir(parents=True)
        for number, entry in enumerate(list(entries.values())[:12]):
            wav = entry["wav"].replace("{data_root}", str(path.parent))
            shutil.copy(wav, folder / f"7-8-{number:04d}.flac")
            lines.append(f"7-8-{number:04d} {entry['words'].upper()}\n")
        (folder / "7-8.trans.txt").write_text("".join(lines))
    shutil.copy(
        ROOT / "recipes/Embedded/ASR/TDNNF/lexicon.txt",
        tmp_path / "cmudict.txt",
    )
    (row,) = read_rows("LibriSpeech")
    output = run_row(row, tmp_path)
    lists = read_nbest(output / "test-clean_nbest.json")
    assert all(text == text.upper() for text in lists[0].hypotheses)


def test_switchboard(speech, tmp_path):
    """The words of the embedded corpus in the layout of Switchboard."""
    pytest.importorskip("kaldi_decoder")
    speech(tmp_path / "embedded")
    manifest = tmp_path / "embedded/train_speech.json"
    entries = list(json.loads(manifest.read_text()).values())
    folder = tmp_path / "swb_text"
    (tmp_path / "swb1").mkdir()
    folder.mkdir()
    for number, first in zip((2001, 2005, 2010), (0, 5, 10)):
        lines, sound = [], np.zeros((2000, 2))
        for entry in entries[first : first + 5]:
            wav = entry["wav"].replace("{data_root}", str(manifest.parent))
            samples = soundfile.read(wav)[0][::2]  # 8 kHz will do
            start = len(sound) / 8000
            sound = np.concatenate([sound, np.stack([samples] * 2, 1)])
            key = f"sw{number}A-ms98-a-{len(lines):04d}"
            stop = len(sound) / 8000
            lines.append(f"{key} {start} {stop} {entry['words']}\n")
        path = tmp_path / f"swb1/sw0{number}.sph"
        soundfile.write(path, sound, 8000, "ULAW", format="NIST")
        (folder / f"sw{number}A-ms98-a-trans.text").write_text("".join(lines))
    lexicon = ROOT / "recipes/Embedded/ASR/TDNNF/lexicon.txt"
    shutil.copy(lexicon, tmp_path / "cmudict.txt")
    (row,) = read_rows("Switchboard")
    output = run_row(row, tmp_path)
    assert len(read_nbest(output / "held-out_nbest.json")) == 5
