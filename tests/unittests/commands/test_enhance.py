"""`speechbrain-mpq enhance`: files, rates, channels, complaints."""

import io
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.inference.enhancement import SpeechEnhancer, save_enhancer
from speechbrain_mpq.lobes.models.nsnet2 import EarlyExitNsNet2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small packed model; its auto mode goes deep in some frames."""
    torch.manual_seed(0)
    network = EarlyExitNsNet2(side=8, thresholds=[[600e3, 0.9], [9e5, 0.8]])
    folder = tmp_path_factory.mktemp("packed")
    save_enhancer(network, folder)
    return str(folder)


def noise(samples, channels=1, seed=0):
    """Soft noise [samples, channels]."""
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal((samples, channels))


@pytest.fixture
def noisy(tmp_path, monkeypatch):
    """A recording, in the current folder."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("noisy.wav", noise(8000), 16000)
    return tmp_path / "noisy.wav"


def enhanced(folder, path, exit=None):
    """What the whole file becomes, offset aside."""
    waveform, _ = soundfile.read(path, dtype="float32")
    waveform = torch.from_numpy(waveform - waveform.mean(dtype=np.float64))
    model = SpeechEnhancer.from_pretrained(folder)
    return model.enhance_batch(waveform.float()[None], exit=exit)[0].numpy()


def test_exits(folder, noisy, capsys):
    arguments = ["enhance", "noisy.wav", "--model", folder]
    assert main(arguments) == 0
    assert capsys.readouterr() == ("noisy_enhanced.wav\n", "")
    found, rate = soundfile.read("noisy_enhanced.wav")
    assert rate == 16000
    assert np.allclose(found, enhanced(folder, noisy), atol=2**-15)
    choices = {
        1: ["--exit", "1"],
        3: ["--budget-macs", "1.0M"],
        0: ["--budget-macs", "70k"],
    }
    for exit, how in choices.items():
        assert main([*arguments, "-o", "out.flac", *how]) == 0
        found, _ = soundfile.read("out.flac")
        assert np.allclose(found, enhanced(folder, noisy, exit), atol=2**-15)


def test_an_exit_for_each_frame(folder, noisy):
    arguments = ["enhance", "noisy.wav", "--model", folder, "--exit", "auto"]
    assert main([*arguments, "-o", "a.wav", "--float"]) == 0
    found, _ = soundfile.read("a.wav", dtype="float32")
    stream = SpeechEnhancer.from_pretrained(folder).stream("auto")
    waveform, _ = soundfile.read(noisy, dtype="float32")
    waveform = torch.from_numpy(waveform - waveform.mean(dtype=np.float64))
    parts = [stream.feed(waveform.float()), stream.flush()]
    assert np.allclose(torch.cat(parts), found, atol=1e-6)


def test_pipe(folder, noisy):
    """WAV in, WAV out, nothing else on standard output."""
    command = [sys.executable, "-m", "speechbrain_mpq", "enhance", "-"]
    done = subprocess.run(
        [*command, "--model", folder, "-o", "-"],
        input=noisy.read_bytes(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    found, _ = soundfile.read(io.BytesIO(done.stdout))
    assert np.allclose(found, enhanced(folder, noisy), atol=2**-15)


def test_many_files_of_all_kinds(folder, noisy, tmp_path, capsys, caplog):
    both = noise(44100, channels=2, seed=1)
    soundfile.write("stereo.wav", both, 44100)
    soundfile.write("phone.wav", noise(8000), 8000)
    soundfile.write("short.wav", noise(100), 16000)
    soundfile.write("silent.wav", np.zeros(4000), 16000)
    soundfile.write("loud.wav", (9 * noise(4000)).clip(-1, 1), 16000)
    broken = noise(4000)
    broken[3000] = np.nan
    soundfile.write("broken.wav", broken, 16000, "FLOAT")
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write("empty.wav", np.zeros(0), 16000)
    before = sorted(tmp_path.iterdir())
    arguments = ["enhance", ".", "--model", folder, "-o", "clean/", "--quiet"]
    assert main(arguments) == 1
    errors = capsys.readouterr().err
    assert "NaN or infinity at 0.188 s" in errors
    assert "text.wav: cannot be read as audio" in errors
    assert "empty.wav: it is empty" in errors
    assert "3 of 9 recordings failed" in errors
    lengths = {
        path.stem: soundfile.info(path).frames
        for path in (tmp_path / "clean").iterdir()
    }
    assert lengths == {
        "loud_enhanced": 4000,
        "noisy_enhanced": 8000,
        "phone_enhanced": 16000,
        "short_enhanced": 100,
        "silent_enhanced": 4000,
        "stereo_enhanced": 16000,
    }
    assert not soundfile.read("clean/silent_enhanced.wav")[0].any()
    assert soundfile.info("clean/stereo_enhanced.wav").channels == 2
    assert "stereo.wav: resampled from 44100 to 16000 Hz" in caplog.text
    assert "nothing is above 4000 Hz" in caplog.text
    assert "silent.wav is silent" in caplog.text
    assert "of the samples are clipped" in caplog.text
    after = [p for p in sorted(tmp_path.iterdir()) if p.name != "clean"]
    assert after == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no.wav"], "no.wav: no such file"),
        (["noisy.wav", "--exit", "2"], "no exits [2]: there are (0, 1, 3, 5)"),
        (["noisy.wav", "--budget-macs", "5k"], "exit 0 takes 66049"),
        (
            ["noisy.wav", "--exit", "1", "--budget-macs", "5M"],
            "give an exit, or a budget",
        ),
        (["noisy.wav", "-o", "noisy.wav"], "noisy.wav is the input"),
        (["noisy.wav", "-o", "no/out.wav"], "no is no folder"),
        (["noisy.wav", "--device", "gpu"], "--device gpu cannot be used"),
    ],
)
def test_complaints(folder, noisy, capsys, arguments, message):
    assert main(["enhance", *arguments, "--model", folder]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--exit", "last", "neither the number of a layer"),
        ("--budget-macs", "many", "no number of multiplications"),
    ],
)
def test_values_that_are_none(noisy, capsys, option, value, message):
    with pytest.raises(SystemExit):
        main(["enhance", "noisy.wav", option, value])
    assert message in capsys.readouterr().err
