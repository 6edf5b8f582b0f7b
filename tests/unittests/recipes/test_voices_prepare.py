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
}
SPLITS = {"valid": ("kde_fi", "kde_he"), "test": ("kde_el", "kde_hu")}


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
        "test": {"kde_el", "kde_hu"},
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
    assert len(entries(tmp_path / "out", "test")) == 2 * voices.FEWEST
    (debs / "other_1_all.deb").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="other_1_all.deb cannot be unpacked"):
        voices.prepare_voices(debs, tmp_path / "out", SPLITS)


def test_examples_of_the_script():
    results = doctest.testmod(voices)
    assert results.attempted and not results.failed
