"""Strings of the voices recipe, from made-up recordings in the real layouts."""

import doctest
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechbrain_mpq.simulation.recordings import RMS

SCRIPT = Path(__file__).parents[3] / "recipes/Voices/voices_prepare.py"
spec = importlib.util.spec_from_file_location("voices_prepare", SCRIPT)
voices = importlib.util.module_from_spec(spec)
spec.loader.exec_module(voices)

needs_ffmpeg = pytest.mark.skipif(
    not shutil.which("ffmpeg"), reason="no ffmpeg program"
)
# packages' own paths, one talker a line
LAYOUT = {
    "kde_fi": "ktuberling-data/usr/share/ktuberling/sounds/fi/{}.ogg",
    "kde_he": "klettres-data/usr/share/klettres/he/alpha/{}.ogg",
    "kde_el": "ktuberling-data/usr/share/ktuberling/sounds/el/{}.wav",
    "kde_hu": "klettres-data/usr/share/klettres/hu/syllab/{}.ogg",
    "fillets_cs_m": "x/usr/share/games/fillets-ng/sound/music/cs/a-m-{}.ogg",
    "fillets_cs_v": "x/usr/share/games/fillets-ng/sound/magnet/cs/a-v-{}.ogg",
    "asterisk_it_f_Menardi": (
        "y/usr/share/asterisk/sounds/it_IT_f_Menardi/letters/{}.wav"
    ),
    "pocketsphinx_librivox": (
        "z/usr/share/pocketsphinx/test/data/librivox/{}.wav"
    ),
}
SPLITS = {
    "valid": ("kde_fi", "kde_he"),
    "test": ("kde_el", "kde_hu", "pocketsphinx_librivox"),
}


def syllables(rng, seconds, rate):
    """Noise that comes and goes four times a second, as speech does."""
    time = np.arange(round(seconds * rate)) / rate
    envelope = np.sin(2 * np.pi * 2 * time) ** 4
    return 0.3 * envelope * rng.uniform(-1, 1, len(time))


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder of what the packages hold."""
    folder = tmp_path_factory.mktemp("packages")
    rng = np.random.default_rng(0)
    for pattern in LAYOUT.values():
        for number in range(6):
            path = folder / pattern.format(f"word{number}")
            path.parent.mkdir(parents=True, exist_ok=True)
            silence = np.zeros(4000)
            speech = syllables(rng, 2.5, 16000)
            sound = np.concatenate([silence, speech, silence])
            stereo = np.stack([sound, sound], 1)
            soundfile.write(path, stereo if number == 1 else sound, 16000)
    music = folder / LAYOUT["fillets_cs_m"].format("song")
    soundfile.write(music, 0.3 * np.sin(np.arange(48000) / 9), 16000)
    effect = folder / "x/usr/share/games/fillets-ng/sound/magnet/cs/voda1.ogg"
    soundfile.write(effect, syllables(rng, 1, 16000), 16000)
    damaged = folder / LAYOUT["kde_el"].format("broken")
    damaged.write_bytes(b"RIFF....")
    return folder


@pytest.fixture(scope="module", autouse=True)
def known():
    """Worker processes look for the script among the modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "voices_prepare", voices)
        yield


@pytest.fixture(scope="module")
def prepared(packages, tmp_path_factory):
    """What the recipe makes of it."""
    if not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg program")
    folder = tmp_path_factory.mktemp("voices")
    voices.prepare_voices(packages, folder, SPLITS)
    return folder


def entries(folder, split):
    """A manifest."""
    return json.loads((folder / f"{split}_speech.json").read_text())


def test_talkers_are_in_one_split(prepared):
    found = {
        split: {e["speaker"] for e in entries(prepared, split).values()}
        for split in ("train", "valid", "test")
    }
    assert found == {
        "train": {"fillets_cs_m", "fillets_cs_v", "asterisk_it_f_Menardi"},
        "valid": {"kde_fi", "kde_he"},
        "test": {"kde_el", "kde_hu", "pocketsphinx_librivox"},
    }


def test_strings_are_long_enough_and_level(prepared):
    for entry in entries(prepared, "train").values():
        path = entry["wav"].replace("{data_root}", str(prepared))
        samples, rate = soundfile.read(path)
        assert rate == 16000 and samples.ndim == 1
        assert 3 <= len(samples) / rate == entry["length"] < 12
        loud = np.sqrt(np.mean(samples[samples != 0] ** 2))
        assert loud == pytest.approx(RMS, rel=0.15)
        # 250 ms of silence at both ends of a recording are gone
        assert np.abs(samples[:3200]).max() > 0.02


def test_music_effects_and_damage_are_left_out(packages, tmp_path, capsys):
    if not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg program")
    voices.prepare_voices(packages, tmp_path, SPLITS, workers=1)
    said = capsys.readouterr().err
    for kind, name in (
        ("music or noise, without pauses", "a-m-song.ogg"),
        ("cannot be decoded", "broken.wav"),
    ):
        (line,) = [line for line in said.splitlines() if kind in line]
        assert line.startswith("left out 1 recordings") and name in line
    clips = [path.name for path in tmp_path.glob("clips/fillets_cs_m/*")]
    assert len(clips) == 7  # with the song's empty file, not judged again
    assert not [*tmp_path.glob("clips/*/voda1*")]


def test_again_it_writes_the_same_and_keeps_what_is_there(packages, prepared):
    before = {
        path: path.stat().st_mtime_ns
        for path in prepared.rglob("strings/*/*.flac")
    }
    text = (prepared / "train_speech.json").read_text()
    lost, *_ = sorted(before)
    content = lost.read_bytes()
    lost.unlink()
    voices.prepare_voices(packages, prepared, SPLITS)
    assert lost.read_bytes() == content
    assert (prepared / "train_speech.json").read_text() == text
    del before[lost]
    assert all(p.stat().st_mtime_ns == then for p, then in before.items())


def test_licenses_are_named(prepared):
    found = json.loads((prepared / "licenses.json").read_text())
    assert found["ktuberling-data"]["license"].startswith("GPL-2+")
    assert "klettres-data" in found and "asterisk-prompt-es-co" not in found


@needs_ffmpeg
def test_too_few_held_out_talkers_are_named_before_any_work(packages, tmp_path):
    with pytest.raises(ValueError, match="kde_xx.*mixtures need two.*--valid"):
        voices.prepare_voices(
            packages, tmp_path, {**SPLITS, "valid": ("kde_xx", "kde_fi")}
        )
    assert not (tmp_path / "clips").exists()
    with pytest.raises(ValueError, match="valid and test"):
        both = {"valid": SPLITS["test"], "test": SPLITS["test"]}
        voices.prepare_voices(packages, tmp_path, both)


@needs_ffmpeg
def test_a_folder_of_something_else_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(FileNotFoundError, match="apt-get download"):
        voices.prepare_voices(tmp_path, tmp_path / "out", SPLITS)
    with pytest.raises(FileNotFoundError, match="no folder"):
        voices.prepare_voices(tmp_path / "not", tmp_path / "out", SPLITS)


@needs_ffmpeg
@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg-deb")
def test_packages_are_unpacked_and_damage_is_named(packages, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(packages, root)
    (root / "DEBIAN").mkdir()
    control = "Package: made-up\nVersion: 1\nArchitecture: all\n"
    control += "Maintainer: nobody <nobody@example.org>\nDescription: none\n"
    (root / "DEBIAN/control").write_text(control)
    debs = tmp_path / "debs"
    debs.mkdir()
    command = ["dpkg-deb", "-b", str(root), str(debs / "made-up_1_all.deb")]
    subprocess.run(command, check=True, capture_output=True)
    voices.prepare_voices(debs, tmp_path / "out", SPLITS)
    strings = len(SPLITS["test"]) * voices.FEWEST
    assert len(entries(tmp_path / "out", "test")) == strings
    (debs / "other_1_all.deb").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="other_1_all.deb cannot be unpacked"):
        voices.prepare_voices(debs, tmp_path / "out", SPLITS)


def test_examples_of_the_script():
    results = doctest.testmod(voices)
    assert results.attempted and not results.failed


def recorded(folder, who, sound, count=4):
    """A talker's recordings, where a package has them."""
    for number in range(count):
        path = folder / LAYOUT[who].format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, sound(number), 16000)


@needs_ffmpeg
@pytest.mark.parametrize("who", ["kde_fi", "fillets_cs_v"])
@pytest.mark.parametrize("bad", ["music", "short"])
def test_talkers_without_speech_are_named_before_any_string(
    who, bad, tmp_path, capsys
):
    rng, tone = np.random.default_rng(0), 0.3 * np.sin(np.arange(48000) / 9)
    for name in {*LAYOUT} - {"asterisk_it_f_Menardi", who}:
        recorded(tmp_path, name, lambda _: syllables(rng, 2.5, 16000))
    sounds = {"music": lambda _: tone, "short": lambda _: tone[:1200]}
    recorded(tmp_path, who, sounds[bad])
    split = "valid" if who == "kde_fi" else "train"
    with pytest.raises(ValueError, match=f"of the {split} talkers .*two; get"):
        voices.prepare_voices(tmp_path, tmp_path / "out", SPLITS, workers=1)
    assert f"left out 1 talkers, with less than 8 s of speech: {who}" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out/strings").exists()


@needs_ffmpeg
@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg-deb")
@pytest.mark.parametrize("content", [b"", b"<html>", None, "nothing in it"])
def test_packages_that_are_none(content, packages, tmp_path):
    """Empty, something else, cut off; or whole, without any recording."""
    tree, deb = tmp_path / "tree", tmp_path / "debs/voice_1_all.deb"
    (tree / "DEBIAN").mkdir(parents=True)
    control = "Package: voice\nVersion: 1\nArchitecture: all\n"
    control += "Maintainer: a <a@b.c>\nDescription: x\n"
    (tree / "DEBIAN/control").write_text(control)
    if content is None:
        shutil.copytree(packages, tree / "usr")
    deb.parent.mkdir()
    command = ["dpkg-deb", "-b", str(tree), str(deb)]
    subprocess.run(command, check=True, capture_output=True)
    if content is None:
        content = deb.read_bytes()[: deb.stat().st_size // 2]
    match = "holds neither"
    if isinstance(content, bytes):
        deb.write_bytes(content)
        match = "voice_1_all.deb cannot be unpacked"
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        voices.prepare_voices(deb.parent, tmp_path / "out", SPLITS)
    deb.rename(deb.with_suffix(".bad"))
    (deb.parent / "a_1_all.deb").write_bytes(b"")
    with pytest.raises(ValueError, match="a_1_all.deb cannot be unpacked"):
        voices.prepare_voices(deb.parent, tmp_path / "out", SPLITS)
    left = {path.name for path in tmp_path.glob("out/unpacked/*")}
    assert "voice.part" not in left  # nobody may find half of it
