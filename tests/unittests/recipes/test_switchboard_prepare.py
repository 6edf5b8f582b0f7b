"""Switchboard in its real layout, made up."""

import json

import numpy as np
import pytest
import soundfile
from helpers import ROOT, load_script

from speechbrain_mpq.decoders.vocabulary import Lexicon

CMUDICT = "so S OW1\nbe B IY1\nit IH1 T\nyeah Y AE1\n"
RATE = 8000
# Side, start, stop and text; A hums low, B high
SPOKEN = (
    ("A", 0.0, 0.5, "[silence]"),
    ("A", 0.5, 1.5, "so be [noise] it"),
    ("B", 1.25, 2.0, "[laughter-yeah]"),
    ("A", 2.0, 2.75, "so be thou"),
)


@pytest.fixture(scope="module")
def script():
    """The prepare step, imported as the recipe does it."""
    folder = ROOT / "recipes/Switchboard/ASR/TDNNF"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield load_script(folder / "switchboard_prepare.py")


@pytest.fixture
def corpus(tmp_path):
    """Folders of recordings and transcripts of three conversations."""
    times = np.arange(3 * RATE) / RATE
    hums = [0.3 * np.sin(2 * np.pi * hertz * times) for hertz in (200, 1000)]
    (tmp_path / "swb1/disc1").mkdir(parents=True)
    for name in (2001, 2005, 2010):
        path = tmp_path / f"swb1/disc1/sw0{name}.sph"
        sound = np.stack(hums, 1)
        soundfile.write(path, sound, RATE, "ULAW", format="NIST")
        folder = tmp_path / f"text/{name // 100}/{name}"
        folder.mkdir(parents=True)
        for side in "AB":
            rows = [row for row in SPOKEN if row[0] == side]
            lines = [
                f"sw{name}{side}-ms98-a-{i:04d} {start} {stop} {text}\n"
                for i, (_, start, stop, text) in enumerate(rows, 1)
            ]
            path = folder / f"sw{name}{side}-ms98-a-trans.text"
            path.write_text("".join(lines))
    (tmp_path / "cmudict.dict").write_text(CMUDICT)
    return tmp_path


def prepare(script, corpus):
    """Prepare it in this process's worker; the folder that was written."""
    script.prepare_switchboard(
        corpus / "swb1",
        corpus / "text",
        corpus / "out",
        corpus / "cmudict.dict",
        workers=1,
    )
    return corpus / "out"


def test_sides_are_cut_at_their_times(script, corpus, capsys):
    out = prepare(script, corpus)
    told = capsys.readouterr().out
    assert "train: 2 utterances, 0.0 h; 1 have" in told  # thou
    assert "test: 3 utterances, 0.0 h; 0 have" in told
    entries = json.loads((out / "test_speech.json").read_text())
    words = {key[6:7] + key[-1]: e["words"] for key, e in entries.items()}
    assert words == {"A2": "so be it", "B1": "yeah", "A3": "so be thou"}
    for key, entry in entries.items():
        path = entry["wav"].replace("{data_root}", str(out))
        samples, rate = soundfile.read(path)
        assert rate == 16000 and len(samples) == entry["length"] * rate
        pitch = np.abs(np.fft.rfft(samples)).argmax() / entry["length"]
        assert pitch == pytest.approx(200 if key[6] == "A" else 1000, abs=2)
        assert entry["speaker"] == key[:7]
    assert Lexicon.read(out / "lexicon.txt").covers("so be it")


def test_conversations_are_shared_out_as_for_language_models(script, corpus):
    out = prepare(script, corpus)
    text_prepare = load_script(
        "recipes/Switchboard/switchboard_text_prepare.py"
    )
    text = text_prepare.read_switchboard(corpus / "text")
    for split, names in script.split_documents(text).items():
        entries = json.loads((out / f"{split}_speech.json").read_text())
        assert {key[:6] for key in entries} == set(names)


def test_what_is_there_is_kept(script, corpus):
    out = prepare(script, corpus)
    files = {p: p.stat().st_mtime_ns for p in out.rglob("*.flac")}
    gone = next(iter(files))
    gone.unlink()
    prepare(script, corpus)
    again = {p: p.stat().st_mtime_ns for p in out.rglob("*.flac")}
    assert again.keys() == files.keys()
    assert {p for p in files if again[p] != files[p]} == {gone}


def shorter(corpus):
    """A recording that was copied in part."""
    path = corpus / "swb1/disc1/sw02005.sph"
    samples, rate = soundfile.read(path)
    soundfile.write(path, samples[: 2 * rate], rate, "ULAW", format="NIST")


def mono(corpus):
    """A recording of one side."""
    path = corpus / "swb1/disc1/sw02005.sph"
    samples, rate = soundfile.read(path)
    soundfile.write(path, samples[:, 0], rate, "ULAW", format="NIST")


def packed(corpus):
    """A recording that libsndfile does not know."""
    path = corpus / "swb1/disc1/sw02005.sph"
    path.write_bytes(b"NIST_1A\n   1024\nsample_coding -s26 shorten")


def missing(corpus):
    """A recording that is not there."""
    (corpus / "swb1/disc1/sw02005.sph").unlink()


def foreign(corpus):
    """A lexicon of other words."""
    (corpus / "cmudict.dict").write_text("ja Y AA1\n")


@pytest.mark.parametrize(
    "damage, message",
    [
        (shorter, r"sw2005A-ms98-a-0003 is at 2 to 2.75 s.*has 2 s"),
        (mono, "sw02005.sph has 1 channels, not 2"),
        (packed, "sw02005.sph cannot be read.*sph2pipe"),
        (missing, "no recording of 1 conversations.*sw02005.sph"),
        (foreign, "nothing is left of .*another language"),
    ],
)
def test_damage_is_named(script, corpus, damage, message):
    damage(corpus)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(script, corpus)
    assert not (corpus / "out/train_speech.json").exists()
