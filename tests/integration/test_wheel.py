"""The built wheel, installed alone: its commands run from an empty folder."""

import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parents[2]
MIB = 2**20


def run(*command, cwd):
    """Run a command without what the shell would add to the import path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building needs setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "speechbrain_mpq",
        source / "speechbrain_mpq",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet")
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, *options, "-w", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """`speechbrain-mpq` of an environment with nothing else of ours."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install")
    run(*pip, "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("**/site-packages")
    # Torch and the like; what is editable there is not followed
    packages.joinpath("others.pth").write_text("\n".join(_shared()))
    return binaries / "speechbrain-mpq"


def _shared():
    """Folders that the running environment takes packages from."""
    return [
        path
        for path in sys.path
        if path.endswith("site-packages") and Path(path).is_dir()
    ]


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 2 * MIB


def test_separate_runs_with_the_model_inside(command, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, (16000, 15))
    soundfile.write(tmp_path / "mix.wav", noise, 16000)
    options = ("--doa", "60", "-o", "anna.wav")
    run(command, "separate", "mix.wav", *options, cwd=tmp_path)
    speech, rate = soundfile.read(tmp_path / "anna.wav")
    assert rate == 16000 and speech.shape == (16000,) and speech.any()


def test_other_commands_know_the_model_inside(command, tmp_path):
    assert "[folder ...]" in run(command, "demo", "--help", cwd=tmp_path)
    checked = run(command, "verify", cwd=tmp_path)
    folder, _, verdict = checked.strip().rpartition(": ")
    assert verdict == "whole"
    assert not Path(folder).is_relative_to(ROOT)
    assert " bits on average" in run(command, "inspect", cwd=tmp_path)
