"""`speechbrain-mpq separate`: files, pipes, complaints."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.inference.folder import save_separator
from speechbrain_mpq.inference.separation import QuantizedSeparator
from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.quant_api import quantize_
from speechbrain_mpq.vision.face_tracking import FaceTrack, frame_doas
from speechbrain_mpq.vision.video import Video, mouth_pictures


def write_video(path, frames, fps):
    """A film without loss."""
    import cv2

    height, width = frames[0].shape[:2]
    code = cv2.VideoWriter_fourcc(*"FFV1")
    path = path.with_suffix(".mkv")
    writer = cv2.VideoWriter(str(path), code, fps, (width, height))
    for frame in frames:
        writer.write(np.asarray(frame, np.uint8))
    writer.release()
    return path


SIZES = {"channels": 8, "hidden": 16, "blocks": 1, "layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small packed model."""
    path = "hparams/models/separator_mini.yaml"
    separator = build_separator(path, **SIZES).eval()
    fold_norms_(separator)
    quantize_(separator, 4)
    folder = tmp_path_factory.mktemp("packed")
    save_separator(separator, folder)
    return str(folder)


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    """A recording, in the current folder."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).standard_normal((16000, 15))
    soundfile.write("mix.wav", 0.1 * noise, 16000)
    return tmp_path / "mix.wav"


def expected(folder, mixture, doa):
    """What the interface gives."""
    model = QuantizedSeparator.from_pretrained(folder)
    return model.separate_file(mixture, doa).numpy()


def same(path, signal):
    """Whether a 16-bit file holds a signal."""
    found, rate = soundfile.read(path)
    return rate == 16000 and np.allclose(found, signal, atol=2**-15)


def test_one_direction(folder, mixture, capsys):
    arguments = ["separate", str(mixture), "--model", folder]
    assert main([*arguments, "--doa", "60", "-o", "out.wav"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "out.wav\n" and printed.err == ""
    assert same("out.wav", expected(folder, mixture, 60))
    assert main([*arguments, "--doa", "60"]) == 0
    assert capsys.readouterr().out == "mix_60.wav\n"
    face = ["--face", "160", "--width", "480", "-o", "face.flac"]
    assert main([*arguments, *face]) == 0
    assert same("face.flac", expected(folder, mixture, 60))


def test_several_directions(folder, mixture, capsys):
    arguments = ["separate", str(mixture), "--model", folder, "--float"]
    arguments += ["--doa", "60", "112.5", "--level", "-30", "-o", "out.wav"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "out_60.wav\nout_112.5.wav\n"
    signal, _ = soundfile.read("out_60.wav")
    assert soundfile.info("out_60.wav").subtype == "FLOAT"
    rms = np.sqrt(np.mean(signal**2))
    assert 20 * np.log10(rms) == pytest.approx(-30, abs=0.01)


def test_pipe(folder, mixture, tmp_path):
    """WAV in, WAV out, nothing else on standard output."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "speechbrain_mpq", "separate", "-"),
            *("--doa", "60", "--model", folder, "-o", "-"),
        ],
        input=mixture.read_bytes(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert same(io.BytesIO(done.stdout), expected(folder, mixture, 60))
    assert list(tmp_path.iterdir()) == [mixture]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no.wav", "--doa", "60"], "no.wav: no such file"),
        (["mix.wav", "--doa", "200"], "DOA must lie in 0 to 180"),
        (["mix.wav", "--face", "10"], "--width"),
        (["mix.wav", "--face", "10", "--width", "5"], "not in a picture"),
        (["mix.wav", "--doa", "6", "-o", "x.mp5"], "name a .wav"),
        (["mix.wav", "--doa", "6", "-o", "no/x.wav"], "make it first"),
        (["mix.wav", "--doa", "6", "-o", "mix.wav"], "is the input"),
        (["mix.wav", "--doa", "6", "7", "-o", "-"], "one direction"),
        (["mix.wav", "--doa", "6", "6", "-o", "x.wav"], "different"),
        (["bad.wav", "--doa", "6"], "bad.wav: cannot be read as audio"),
        (["mono.wav", "--doa", "6"], "mono.wav: 1 channel; the model needs"),
    ],
)
def test_complaints(folder, mixture, capsys, arguments, message):
    (mixture.parent / "bad.wav").write_text("text")
    soundfile.write("mono.wav", np.ones(16000) / 2, 16000)
    before = {p: p.read_bytes() for p in mixture.parent.iterdir()}
    assert main(["separate", *arguments, "--model", folder]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert {p: p.read_bytes() for p in mixture.parent.iterdir()} == before


@pytest.fixture(scope="module")
def watching_folder(tmp_path_factory):
    """A small packed model that looks at lips."""
    torch.manual_seed(0)
    path = Path(__file__).parents[2] / "data/separator_av_tiny.yaml"
    separator = build_separator(path).eval()
    fold_norms_(separator)
    folder = tmp_path_factory.mktemp("watching")
    save_separator(separator, folder)
    return str(folder)


@pytest.fixture
def film(mixture):
    """A second of two patches beside each other, and the track of one."""
    pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (25, 48, 96, 3), dtype=np.uint8)
    boxes = np.tile([10.0, 4, 32, 32], (25, 1))
    boxes[20:] = np.nan
    path = write_video(mixture.parent / "talk.mp4", list(frames), 25)
    doas = np.linspace(40, 50, 25)
    FaceTrack(doas, boxes, 25, 96, 48).save(mixture.parent / "track.json")
    return path


def test_a_face_is_followed_and_its_lips_are_seen(
    watching_folder, mixture, film, capsys, caplog
):
    arguments = ["separate", str(mixture), "--model", watching_folder]
    arguments += ["--track", "track.json", "-o", "out.wav"]
    assert main([*arguments, "--video", str(film)]) == 0
    assert capsys.readouterr().out == "out.wav\n"
    track = FaceTrack.load("track.json")
    lips = mouth_pictures(Video(film), track.boxes, (8, 8))
    model = QuantizedSeparator.from_pretrained(watching_folder)
    doas = frame_doas(track, 63)[None]
    assert same("out.wav", model.separate_file(mixture, doas, lips=lips)[0])
    assert main(arguments) == 0  # it moves, and nothing is seen
    assert "goes by sound alone" in caplog.text and capsys.readouterr()
    assert same("out.wav", model.separate_file(mixture, doas)[0])
    assert main(arguments[:-2]) == 0
    assert capsys.readouterr().out == "mix_44.wav\n"


@pytest.mark.parametrize("seconds", [0.6, 1.4])
def test_film_and_sound_may_differ_by_half_a_second(
    watching_folder, film, tmp_path, seconds
):
    noise = np.random.default_rng(0).standard_normal((16000, 15))
    noise = np.resize(noise, (int(16000 * seconds), 15))
    soundfile.write("other.wav", 0.1 * noise, 16000)
    arguments = ["separate", "other.wav", "--model", watching_folder]
    arguments += ["--track", "track.json", "-o", "out.wav"]
    assert main([*arguments, "--video", str(film)]) == 0
    assert soundfile.info("out.wav").frames == len(noise)


def test_complaints_about_films(
    folder, watching_folder, mixture, film, tmp_path, capsys
):
    def complaint(model, *arguments):
        line = ["separate", str(mixture), "--model", model, *arguments]
        assert main(line) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.splitlines()) == 1
        return printed.err

    see = ["--track", "track.json", "--video", str(film)]
    assert "leave out --video" in complaint(folder, *see)
    said = complaint(watching_folder, "--doa", "45", *see[2:])
    assert "speechbrain-mpq track" in said
    (tmp_path / "text.json").write_text("{}")
    said = complaint(watching_folder, "--track", "text.json")
    assert "text.json is not a track" in said
    said = complaint(watching_folder, "--track", "gone.json")
    assert "gone.json" in said
    short = write_video(tmp_path / "short.mp4", [np.zeros((48, 96, 3))] * 9, 25)
    said = complaint(watching_folder, *see[:3], str(short))
    assert "25 face boxes, but only 9 frames" in said
    wide = write_video(tmp_path / "wide.mp4", [np.zeros((24, 48, 3))] * 25, 25)
    said = complaint(watching_folder, *see[:3], str(wide))
    assert "the track is from a video of 96 x 48 pixels" in said
    fast = write_video(tmp_path / "fast.mp4", [np.zeros((48, 96, 3))] * 25, 50)
    said = complaint(watching_folder, *see[:3], str(fast))
    assert "has 96 x 48 pixels at 50 frames a second" in said
    said = complaint(watching_folder, "--doa", "45", "--width", "9")
    assert "--width belongs to --face" in said
    soundfile.write("long.wav", np.random.randn(48000, 7) / 9, 16000)
    assert main(["separate", "long.wav", "--model", folder, *see[:2]]) == 1
    assert "the sound lasts 2.99 s" in capsys.readouterr().err
    assert not list(tmp_path.glob("*_44.wav"))


@pytest.mark.parametrize("doa", [["60"], ["60", "120"]])
def test_output_to_a_device(folder, mixture, capfd, doa):
    """Nothing is written but the sound, and nothing is kept."""
    arguments = ["separate", str(mixture), "--model", folder, "--doa", *doa]
    assert main([*arguments, "-o", os.devnull]) == 0
    assert capfd.readouterr().out == ""
    assert not os.path.isfile(os.devnull)
    assert os.listdir() == ["mix.wav"]


def test_output_to_a_pipe(folder, mixture, tmp_path, capsys):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    arguments = ["separate", str(mixture), "--model", folder, "--doa", "60"]
    assert main([*arguments, "-o", str(pipe)]) == 0
    reader.join()
    found, rate = soundfile.read(io.BytesIO(read[0]))
    assert rate == 16000 and capsys.readouterr().out == ""
    assert np.abs(found - expected(folder, mixture, 60)).max() < 1e-4
    assert main([*arguments, "120", "-o", str(pipe)]) == 1
    assert "as many different output files" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["-o", "--model"])
def test_an_empty_value_is_refused(folder, mixture, capsys, option):
    """As the shell gives for a variable that is not set."""
    with pytest.raises(SystemExit):
        main(["separate", str(mixture), "--doa", "60", option, ""])
    assert "it is empty: give a value" in capsys.readouterr().err


def test_a_device_that_is_none(folder, mixture, capsys):
    arguments = ["separate", str(mixture), "--doa", "60", "--model", folder]
    assert main([*arguments, "--device", "gpu"]) == 1
    assert "--device gpu cannot be used" in capsys.readouterr().err


def test_a_model_that_is_none(mixture, capsys, tmp_path):
    arguments = ["separate", str(mixture), "--doa", "60", "--model"]
    assert main([*arguments, "no_such_folder"]) == 1
    assert "no_such_folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([*arguments, str(tmp_path / "empty")]) == 1
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["separate", "inspect", "verify", "demo"])
def test_help_has_examples(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"speechbrain-mpq {name} packed" in capsys.readouterr().out or (
        name == "separate"
    )


def test_usage_errors(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["separate", "mix.wav", "--model", "packed"])
    assert stopped.value.code == 2
    assert "--doa" in capsys.readouterr().err


def test_progress_on_long_files(folder, tmp_path, capsys):
    path = tmp_path / "long.wav"
    noise = np.random.default_rng(0).standard_normal((21 * 16000, 7))
    soundfile.write(path, 0.1 * noise, 16000)
    arguments = ["separate", str(path), "--model", folder, "--doa", "60"]
    arguments += ["-o", str(tmp_path / "out.wav")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "21/21" in printed.err and printed.out.count("\n") == 1
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("threads", ["-1", "0", "two", "99999"])
def test_threads_that_are_none(threads, capsys):
    for command in (
        ["separate", "mix.wav", "--doa", "6", "--model", "packed"],
        ["demo", "packed"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--threads", threads])
        assert stopped.value.code == 2
        assert "is not a whole number from 1" in capsys.readouterr().err


def test_closed_input(folder, mixture, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as `<&-` leaves it
    assert main(["separate", "-", "--doa", "60", "--model", folder]) == 1
    assert "standard input is closed" in capsys.readouterr().err


def test_a_pipe_with_a_name(folder, mixture, capsys):
    """As `<(...)` and /dev/stdin are."""
    os.mkfifo("pipe")
    content = mixture.read_bytes()
    writer = threading.Thread(
        target=Path("pipe").write_bytes, args=[content], daemon=True
    )
    writer.start()
    assert main(["separate", "pipe", "--doa", "60", "--model", folder]) == 0
    assert capsys.readouterr().out == "separated_60.wav\n"
    assert same("separated_60.wav", expected(folder, mixture, 60))


def test_a_name_too_long_is_found_before_the_work(folder, mixture, capsys):
    out = "a" * 253 + ".wav"
    arguments = ["separate", str(mixture), "--doa", "60", "--model", "none"]
    assert main([*arguments, "-o", out]) == 1
    assert "more than 255 bytes for a name" in capsys.readouterr().err


@pytest.fixture
def shelf(mixture):
    """Three recordings and a bad one in a folder, another elsewhere."""
    rng = np.random.default_rng(1)
    folder = mixture.parent / "shelf"
    folder.mkdir()
    for name in ("a.wav", "b.flac", "c.wav"):
        noise = 0.1 * rng.standard_normal((16000, 7))
        soundfile.write(folder / name, noise, 16000)
    (folder / "bad.wav").write_text("text")
    (folder / "notes.txt").write_text("text")
    return folder


@pytest.mark.parametrize("given", [["shelf"], ["shelf/*.wav", "shelf/b.flac"]])
def test_a_bad_file_stops_no_other(folder, shelf, capsys, given):
    """One model for all; the rest is separated as if alone."""
    arguments = ["separate", *given, "--model", folder, "--doa", "60"]
    assert main([*arguments, "-o", "out"]) == 1
    printed = capsys.readouterr()
    expect = {f"out/{name}_60.wav" for name in "abc"}
    assert set(printed.out.split()) == expect
    assert {str(p) for p in Path("out").iterdir()} == expect
    assert "bad.wav: cannot be read as audio" in printed.err
    assert "1 of 4 recordings failed: shelf/bad.wav" in printed.err
    assert "3 recordings: 3.0 s of sound in" in printed.err
    assert "x real time" in printed.err and "4/4" in printed.err
    assert same("out/b_60.wav", expected(folder, shelf / "b.flac", 60))


def test_several_recordings_and_directions(folder, shelf, capsys):
    (shelf / "bad.wav").unlink()
    arguments = ["separate", "shelf", "shelf/a.wav", "--model", folder]
    arguments += ["--doa", "60", "90", "--quiet"]
    assert main(arguments) == 0  # into the current folder
    printed = capsys.readouterr()
    assert printed.err == "" and len(printed.out.split()) == 6
    assert same("c_90.wav", expected(folder, shelf / "c.wav", 90))


def test_output_into_a_folder(folder, mixture, capsys):
    arguments = ["separate", "mix.wav", "--doa", "60", "--model", folder]
    assert main([*arguments, "-o", "new/"]) == 0
    assert capsys.readouterr().out == "new/mix_60.wav\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["mix.wav", "shelf/a.wav", "shelf/../shelf/a.wav", "-o", "x.wav"],
            "x/",
        ),
        (["shelf/a.wav", "other", "-o", "out"], "both become a_60.wav: rename"),
        (
            ["shelf", "mix.wav", "-o", "-"],
            "standard output takes one recording",
        ),
        (["mix.wav", "a_60.wav", "shelf/a.wav"], "a_60.wav is one of the rec"),
        (["mix.wav", "-"], "- is standard input: give it alone"),
        (["*.ogg"], "*.ogg: no file has such a name"),
        (["empty"], "empty: no audio files"),
        (["shelf", "-o", "no/where"], "no is no folder: make it first"),
        (["shelf", "-o", "notes"], "-o notes is no folder: name another"),
        (["mix.wav", "-o", "notes/"], "-o notes is no folder: name another"),
    ],
)
def test_names_are_checked_before_the_work(
    shelf, mixture, capsys, arguments, message
):
    """No model is loaded: there is none."""
    for name in ("other/a.flac", "a_60.wav"):
        Path(name).parent.mkdir(exist_ok=True)
        soundfile.write(name, np.zeros((16000, 7)), 16000)
    Path("empty").mkdir()
    Path("notes").touch()
    before = sorted(mixture.parent.rglob("*"))
    doa = [] if "--doa" in arguments else ["--doa", "60"]
    assert main(["separate", *arguments, *doa, "--model", "none"]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert sorted(mixture.parent.rglob("*")) == before


def test_equal_names_are_found_before_talkers_are(shelf, capsys):
    soundfile.write("a.wav", np.zeros((16000, 7)), 16000)
    arguments = ["separate", "a.wav", "shelf/a.wav", "--doa", "auto"]
    assert main([*arguments, "--model", "none"]) == 1
    assert "both become a_...wav: rename" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, meant",
    [
        ("seperate mix.wav", "separate"),
        ("--verison", "--version"),
        ("separate mix.wav --dao 60", "--doa"),
        ("separate mix.wav --doa 60 --engine onx", "onnx"),
        ("locate mix.wav --talker=2 --jsno", "--json"),
        ("inspect packed --plto bits.png", "--plot"),
        ("verify --hepl", "--help"),
        ("export packed --calibraton x", "--calibration"),
        ("demo --mixture a.wav --prot 80", "--port"),
        ("table results --agianst fp32", "--against"),
        ("track video.mp4 --neer 60", "--near"),
        ("quantize --sorce asr", "--source"),
    ],
)
def test_typing_errors_are_answered_with_what_is_near(line, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"did you mean {meant}?")
