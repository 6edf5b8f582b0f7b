"""`speechbrain-mpq demo`: what it offers, and how it starts and ends."""

import builtins
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.commands.demo import (
    model_names,
    simulate_mixtures,
    talker_file,
)
from speechbrain_mpq.inference.demo_server import DemoServer
from speechbrain_mpq.inference.folder import save_separator
from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.utils import BUNDLED_MODEL

SIZES = {"channels": 8, "hidden": 16, "blocks": 1, "layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small packed model."""
    path = "hparams/models/separator_mini.yaml"
    folder = tmp_path_factory.mktemp("packed")
    save_separator(build_separator(path, **SIZES).eval(), folder)
    return str(folder)


@pytest.fixture
def served(monkeypatch):
    """States of the pages that were served until somebody interrupted."""
    states = []

    def serve_forever(server):
        states.append(server.demo.state())
        raise KeyboardInterrupt

    monkeypatch.setattr(DemoServer, "serve_forever", serve_forever)
    return states


def recording(path, channels=7):
    """A file of noise."""
    noise = np.random.default_rng(0).standard_normal((9000, channels))
    soundfile.write(path, 0.1 * noise, 16000)
    return str(path)


def test_recordings_are_offered(folder, served, tmp_path, capsys):
    files = [recording(tmp_path / name) for name in ("a.wav", "b.wav")]
    arguments = ["demo", folder, "--port", "0", "--mixtures", *files]
    assert main(arguments) == 130
    printed = capsys.readouterr().out
    assert re.match(r"http://127\.0\.0\.1:\d+/  \(stop it", printed)
    (state,) = served
    assert [r["name"] for r in state["recordings"]] == ["a.wav", "b.wav"]


def test_bad_recordings_are_said_at_once(folder, served, tmp_path, capsys):
    bad = recording(tmp_path / "stereo.wav", channels=2)
    assert main(["demo", folder, "--port", "0", "--mixtures", bad]) == 1
    assert "stereo.wav: 2 channels" in capsys.readouterr().err and not served


def test_without_the_extra(folder, served, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "pyroomacoustics":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["demo", folder, "--port", "0"]) == 130
    assert "speechbrain_mpq[simulate]" in capsys.readouterr().out
    assert served[0]["recordings"] == []


def test_simulated_mixtures(tmp_path):
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("pyroomacoustics")
    made = simulate_mixtures([1, 8, 15], tmp_path, count=2)
    assert len(made) == 2
    apart = []
    for name, path, doas in made:
        info = soundfile.info(path)
        assert (info.channels, info.samplerate) == (3, 16000)
        apart.append(abs(doas[0] - doas[1]))
        assert f"{apart[-1]:.0f}° apart" in name
        mixture, _ = soundfile.read(path)
        alone = [soundfile.read(talker_file(path, doa))[0] for doa in doas]
        # Both together are what microphone 1 hears
        assert np.allclose(sum(alone), mixture[:, 0], atol=2e-4)
    assert apart[0] > apart[1]


def test_names_of_models():
    assert list(model_names(["a/packed", "b/packed"])) == ["a", "b"]
    assert list(model_names(["a", "a/packed"])) == ["a", "a/packed"]
    assert list(model_names([BUNDLED_MODEL])) == ["separator_voices_4bit"]
    assert list(model_names(["a/x/1/packed", "b/x/1/packed"])) == ["a", "b"]
    two = model_names(["r/x/1/packed", "r/y/2/packed"])
    assert list(two) == ["x/1", "y/2"]
    assert list(model_names(["r/kl_4bit/1234/packed"])) == ["kl_4bit/1234"]
    assert list(model_names(["a", "./a"])) == ["a"]


SERVING = """
import sys
from speechbrain_mpq.__main__ import main
sys.exit(main(["demo", sys.argv[1], "--port", "0", "--mixtures", sys.argv[2]]))
"""


def test_a_page_that_is_ended_takes_its_recordings_along(folder, tmp_path):
    path, scratch = recording(tmp_path / "a.wav"), tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING, folder, path],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert process.stdout.readline().startswith(b"http")
    assert list(scratch.rglob("*.wav"))
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    process.stdout.close()
    assert list(scratch.iterdir()) == []
