"""Files that are right are read right; files that are wrong are refused."""

import io
import logging
import os
import re
import threading

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mpq.inference.audio import (
    AudioError,
    AudioFile,
    audio_format,
    read_segment,
    seekable,
    used_channels,
)
from speechbrain_mpq.inference.output import TargetOutput, output_paths
from speechbrain_mpq.lobes.models.separator import match_level

MICROPHONES = [1, 4, 15]


def noise(samples=20000, channels=15, scale=0.1):
    """Reproducible noise."""
    rng = np.random.default_rng(0)
    return (scale * rng.standard_normal((samples, channels))).astype("float32")


def write(path, signal, rate=16000, subtype="FLOAT"):
    """A file, and its path."""
    soundfile.write(path, signal, rate, subtype)
    return path


def opened(path):
    """A file for an array of 15 of which three are used."""
    return AudioFile(path, MICROPHONES, array_size=15)


def read(file, samples=3000):
    """The whole file."""
    return torch.cat(list(file.blocks(samples)))


@pytest.mark.parametrize("samples", [1, 20000, 10**6])
def test_all_microphones_or_the_used_ones(tmp_path, samples):
    signal = noise()
    whole = opened(write(tmp_path / "a.wav", signal))
    used = opened(write(tmp_path / "b.wav", signal[:, [0, 3, 14]]))
    expected = torch.from_numpy(signal[:, [0, 3, 14]])
    assert torch.equal(read(whole, max(samples, 700)), expected)
    assert torch.equal(read(used, max(samples, 700)), expected)
    assert torch.equal(read(whole), expected), "can be read twice"
    scan = whole.scan()
    assert scan.samples == 20000 and not scan.warnings
    rms = expected[:, 0].double().std(correction=0).item()
    assert scan.rms == pytest.approx(rms, rel=1e-6)


def test_higher_rates_are_resampled(tmp_path):
    resample = pytest.importorskip("torchaudio.functional").resample
    signal = noise(44100, 3)
    file = opened(write(tmp_path / "a.wav", signal, 44100))
    found = read(file, 5000)
    expected = resample(torch.from_numpy(signal.T), 44100, 16000).T
    assert len(found) == file.samples == file.scan().samples == 16000
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "signal, rate, message",
    [
        (noise(channels=2), 16000, r"2 channels; .* all 15 .* \[1, 4, 15\]"),
        (noise(channels=1), 16000, "1 channel; "),
        (noise(), 8000, "8000 Hz; .* 16000 Hz or more"),
        (noise(), 16001, "16001 Hz, an odd rate; resample it to 16000 Hz"),
        (noise(samples=511), 16000, "511 samples .* shorter"),
        (noise(samples=0), 16000, "0 samples"),
        (noise()[:, :1].repeat(15, 1), 16000, "no direction"),
    ],
)
def test_wrong_files(tmp_path, signal, rate, message):
    path = write(tmp_path / "bad.wav", signal, rate)
    with pytest.raises(AudioError, match=message) as caught:
        opened(path).scan()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_nan_is_found_where_it_is(tmp_path, value):
    signal = noise()
    signal[16000, 2] = value
    file = opened(write(tmp_path / "bad.wav", signal))
    with pytest.raises(AudioError, match="channel 3 .* at 1.000 s"):
        file.scan()


def test_unreadable_files(tmp_path):
    text = tmp_path / "text.wav"
    text.write_text("no audio at all")
    with pytest.raises(AudioError, match="text.wav: cannot be read as audio"):
        opened(text)
    with pytest.raises(FileNotFoundError, match="no such file"):
        opened(tmp_path / "nothing.wav")
    with pytest.raises(FileNotFoundError):
        opened(tmp_path)
    (tmp_path / "a.raw").write_bytes(bytes(4000))
    with pytest.raises(AudioError, match="with this ending has no header; con"):
        opened(tmp_path / "a.raw")
    soundfile.write(tmp_path / "a.caf", noise(64000, 3), 16000, "ALAC_16")
    content = (tmp_path / "a.caf").read_bytes()
    (tmp_path / "a.caf").write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match="a.caf: cannot be read as audio"):
        opened(tmp_path / "a.caf")
    whole = write(tmp_path / "a.flac", noise(channels=3), subtype="PCM_16")
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match="a.flac: it is damaged .*copy it ag"):
        opened(whole).scan()


@pytest.mark.skipif(
    "MP3" not in soundfile.available_formats(), reason="libsndfile has no MP3"
)
def test_a_part_of_a_compressed_file_is_taken_with_a_warning(tmp_path):
    """Its header tells how many samples the whole one had."""
    path = tmp_path / "a.mp3"
    soundfile.write(path, noise(channels=1), 16000, "MPEG_LAYER_III")
    whole = AudioFile(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    part = AudioFile(path)
    (warning,) = part.scan().warnings
    assert 0.3 * whole.frames < part.frames < 0.7 * whole.frames
    assert f"tells {whole.frames} samples, the file holds {part.frames}" in (
        warning
    )
    assert sum(map(len, part.blocks())) == part.frames


def test_truncated_wav_is_what_is_left(tmp_path):
    """libsndfile goes by the length of the file, not by its header."""
    path = write(tmp_path / "a.wav", noise())
    path.write_bytes(path.read_bytes()[:-60000])
    assert opened(path).scan().samples == 19000


def with_length(content, kind, declared):
    """An audio file whose header tells another length."""
    content = bytearray(content)
    if kind == "FLAC":
        content[21] &= 0xF0
        content[22:26] = declared.to_bytes(4, "big")
        return bytes(content)
    if kind == "RF64":
        place, size = content.find(b"ds64") + 16, 8
    elif kind == "AU":
        place, size = 8, 4
    else:
        marks = {"AIFF": b"SSND", "W64": b"data\xf3\xac", "CAF": b"data"}
        mark = marks.get(kind, b"data")
        place = content.find(mark) + (16 if kind == "W64" else 4)
        size = {"W64": 8, "CAF": 8}.get(kind, 4)
    order = "big" if kind in ("AIFF", "AU", "CAF") else "little"
    content[place : place + size] = declared.to_bytes(size, order)
    return bytes(content)


KINDS = ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC"]


@pytest.mark.parametrize("declared", [0, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_header_that_lies_loses_nothing(kind, declared):
    signal, file = noise(samples=9000, channels=3), io.BytesIO()
    soundfile.write(file, signal, 16000, "PCM_16", format=kind)
    whole = opened(io.BytesIO(file.getvalue()))
    assert whole.samples == 9000 and not whole.scan().warnings
    content = with_length(file.getvalue(), kind, declared)
    lying = opened(io.BytesIO(content))
    stats = lying.scan()
    assert lying.samples == stats.samples == 9000
    assert torch.equal(read(lying), read(whole))
    # A FLAC encoder that writes to a pipe does not know: no word of it
    if (kind, declared) != ("FLAC", 0):
        (warning,) = stats.warnings
        assert "its header tells" in warning


@pytest.mark.parametrize("declared", [None, 0, 1000])
@pytest.mark.parametrize("kind", ["FLAC", "WAV"])
def test_a_tag_before_the_file_hides_nothing(kind, declared):
    """Music players write ID3 tags, which libsndfile looks past."""
    signal, file = noise(samples=9000, channels=3), io.BytesIO()
    soundfile.write(file, signal, 16000, "PCM_16", format=kind)
    whole, content = opened(io.BytesIO(file.getvalue())), file.getvalue()
    if declared is not None:
        content = with_length(content, kind, declared)
    tag = b"ID3\x04\x00\x00\x00\x00\x01\x02" + bytes(130)
    tagged = opened(io.BytesIO(tag + content))
    assert tagged.scan().samples == whole.scan().samples == 9000
    assert torch.equal(read(tagged), read(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_segments_of_files_whose_header_lies(kind, tmp_path, caplog):
    signal, file = noise(samples=9000, channels=3), io.BytesIO()
    soundfile.write(file, signal, 16000, "PCM_16", format=kind)
    path, whole = tmp_path / "a", tmp_path / "b"
    path.write_bytes(with_length(file.getvalue(), kind, 1000))
    whole.write_bytes(file.getvalue())
    wanted = soundfile.read(whole, dtype="float32")[0]
    for start, stop in ((0, None), (100, 300), (8000, 9000), (8999, None)):
        samples, rate = read_segment(path, start, stop)
        assert rate == 16000
        np.testing.assert_array_equal(samples, wanted[start:stop])
    assert kind == "FLAC" or "its header tells" in caplog.text


def test_what_stands_behind_the_sound_is_no_sound():
    file = io.BytesIO()
    soundfile.write(file, noise(samples=9000, channels=3), 16000, format="WAV")
    more = b"LIST" + (6).to_bytes(4, "little") + b"INFOab"
    audio = opened(io.BytesIO(file.getvalue() + more))
    assert audio.samples == 9000 and not audio.scan().warnings


CODED = {
    "OGG": ("VORBIS", "it was cut off", "2 recordings one after the other"),
    "MP3": ("MPEG_LAYER_III", "tells 48000 samples", "appended to it is not"),
    "NIST": ("PCM_16", "tells 288000 bytes", "tells 288000 bytes"),
}


@pytest.mark.parametrize("kind", CODED)
def test_recordings_that_were_cut_off_or_appended_are_told(
    kind, tmp_path, caplog
):
    subtype, cut, appended = CODED[kind]
    channels = 3 if kind != "MP3" else 2
    signal, file = noise(48000, channels), io.BytesIO()
    soundfile.write(file, signal, 16000, subtype, format=kind)
    whole = file.getvalue()
    contents = [whole, whole[: len(whole) // 2], 2 * whole]
    path, lengths = tmp_path / "a", []
    for warning, content in zip(("", cut, appended), contents):
        caplog.clear()
        path.write_bytes(content)
        samples, _ = read_segment(path)
        assert warning in caplog.text and bool(warning) == bool(caplog.text)
        if kind != "MP3":
            audio = opened(path)
            warnings = audio.scan().warnings
            assert all(warning in text for text in warnings)
            assert len(warnings) == bool(warning)
            assert len(read(audio)) == len(samples)
        lengths.append(len(samples))
    assert lengths[0] == 48000 and 15000 < lengths[1] < 40000
    assert lengths[2] == (96000 + 1024 // 6 if kind == "NIST" else 48000)


RARE = {
    **dict.fromkeys(("VOC", "SVX", "MAT4"), ("", "it was cut off")),
    **dict.fromkeys(("AVR", "MPC2K"), ("", "header tells 48000 samples")),
    **dict.fromkeys(("PAF", "PVF", "IRCAM", "MAT5"), 2 * ("do not tell how",)),
}


@pytest.mark.parametrize("kind", RARE)
def test_rare_formats_that_were_cut_off_are_told(kind, tmp_path, caplog):
    channels = 1 if kind in ("SVX", "VOC") else 2
    file = io.BytesIO()
    signal = noise(48000, channels)
    soundfile.write(file, signal, 16000, "PCM_16", format=kind)
    content, path = file.getvalue(), tmp_path / "a"
    for part, warning in zip((1.0, 0.6), RARE[kind], strict=True):
        caplog.clear()
        path.write_bytes(content[: int(part * len(content))])
        samples, _ = read_segment(path)
        assert abs(len(samples) - part * 48000) < 500
        assert warning in caplog.text and bool(warning) == bool(caplog.text)
        told = "".join(AudioFile(path).scan().warnings)
        assert warning in told and bool(warning) == bool(told)


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF"])
def test_a_single_byte_that_is_missing_is_told(kind, tmp_path):
    soundfile.write(tmp_path / "a", noise(9000, 3), 16000, format=kind)
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:-1])
    assert opened(tmp_path / "a").scan().samples == 8999
    (warning,) = opened(tmp_path / "a").scan().warnings
    assert re.search(r"tells 540\d\d bytes of sound, the file holds", warning)


def test_a_length_for_pipes_is_no_lie():
    """As `arecord` and `ffmpeg` write it, who cannot go back."""
    file = io.BytesIO()
    soundfile.write(file, noise(samples=9000, channels=3), 16000, format="WAV")
    content = with_length(file.getvalue(), "WAV", 2**32 - 1)
    audio = opened(io.BytesIO(content))
    assert audio.samples == 9000 and not audio.scan().warnings


def test_constant_offsets_are_taken_off(tmp_path):
    signal = noise(channels=3).astype(np.float64)
    offsets = np.array([0.3, -0.1, 0.0])
    for rate in (16000, 48000):
        with_offset = opened(write(tmp_path / "a.wav", signal + offsets, rate))
        without = opened(write(tmp_path / "b.wav", signal, rate))
        stats = with_offset.scan(), without.scan()
        assert stats[0].rms == pytest.approx(stats[1].rms, rel=1e-3)
        assert torch.allclose(read(with_offset), read(without), atol=1e-7)
        assert read(with_offset).mean(0).abs().max() < 1e-5
    still = 0 * signal + offsets
    (warning,) = opened(write(tmp_path / "c.wav", still)).scan().warnings
    assert "is silent" in warning
    mono = signal[:, :1] + offsets
    with pytest.raises(AudioError, match="no direction"):
        opened(write(tmp_path / "d.wav", mono)).scan()


def test_any_name_and_any_pipe(tmp_path):
    signal = noise(samples=9000)
    path = write(tmp_path / "a.wav", signal)
    wanted = read(opened(path))
    latin = os.fsencode(tmp_path) + b"/aufnahme_\xe4.wav"
    try:
        os.link(path, latin)
    except OSError:
        pytest.skip("this file system has names of UTF-8 only")
    assert torch.equal(read(opened(os.fsdecode(latin))), wanted)
    with TargetOutput(os.fsdecode(latin)) as output:
        output.push(torch.ones(9), torch.ones(9))
        output.finish()
    assert soundfile.info(latin).frames == 9
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = path.read_bytes()
    writer = threading.Thread(target=pipe.write_bytes, args=[content])
    writer.start()
    file = opened(pipe)
    writer.join()
    assert torch.equal(read(file), wanted) and torch.equal(read(file), wanted)


def test_oddities_are_said(tmp_path):
    clipped = np.clip(20 * noise(), -1, 1)
    file = opened(write(tmp_path / "a.wav", clipped))
    (warning,) = file.scan().warnings
    assert "clipped" in warning and "a.wav" in warning
    dead = noise()
    dead[:, 3] = 0
    (warning,) = opened(write(tmp_path / "b.wav", dead)).scan().warnings
    assert "microphone 4 is silent" in warning
    for softness in (0, 1e-40):  # the latter is 0 where it is squared
        silence = opened(write(tmp_path / "c.wav", softness * noise())).scan()
        assert silence.rms == 0 and "silent" in silence.warnings[0]
        assert silence.silent


def test_streams_are_read_twice(tmp_path):
    path = write(tmp_path / "a.wav", noise())
    with open(path, "rb") as pipe, seekable(pipe) as stream:
        file = AudioFile(stream, MICROPHONES, 15, name="standard input")
        assert torch.equal(read(file), read(opened(path)))
        assert torch.equal(read(file), read(opened(path)))
    with pytest.raises(AudioError, match="standard input: cannot"):
        AudioFile(io.BytesIO(b""), MICROPHONES, 15, name="standard input")


def test_used_channels_names_the_recording():
    with pytest.raises(AudioError, match="^block: 14 channels"):
        used_channels(14, MICROPHONES, 15, "block")


def test_a_folder_that_cannot_be_written_to_is_found_first(
    tmp_path, monkeypatch
):
    def refuse(path, mode):
        raise PermissionError(f"Permission denied: {path}")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError):
        with TargetOutput(tmp_path / "a.wav"):
            pytest.fail("the work has begun")


def test_a_full_disk_leaves_what_was_there(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.wav"
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="a.wav cannot be written"):
            with TargetOutput(path) as output:
                output.push(torch.ones(20000), torch.ones(20000))
                resource.setrlimit(resource.RLIMIT_FSIZE, (9999, limits[1]))
                output.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("level", ["mixture", -30.0])
def test_one_gain_for_all(tmp_path, level):
    torch.manual_seed(0)
    estimate, mixture = 3 * torch.randn(5000), 0.1 * torch.randn(5000)
    mixture += 0.05 * estimate
    path = tmp_path / "out.wav"
    with TargetOutput(path, level, "FLOAT") as output:
        for piece in zip(estimate.split(999), mixture.split(999)):
            output.push(*piece)
        assert output.finish() == path
        assert not path.exists()
    found, rate = soundfile.read(path, dtype="float32")
    expected = match_level(estimate, mixture)
    if level != "mixture":
        expected *= 10 ** (level / 20) / expected.square().mean().sqrt()
    assert rate == 16000 and list(tmp_path.iterdir()) == [path]
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("subtype, peak", [(None, 1.0), ("FLOAT", 4.0)])
def test_nothing_is_clipped(tmp_path, caplog, subtype, peak):
    signal = torch.linspace(-4, 4, 1000)
    path = tmp_path / "a.wav"
    with caplog.at_level(logging.WARNING):
        with TargetOutput(path, subtype=subtype) as output:
            output.push(signal, signal)
            output.finish()
    found, _ = soundfile.read(path)
    assert np.abs(found).max() == pytest.approx(peak, rel=1e-3)
    assert np.allclose(found, signal * (peak / 4), atol=1e-4)
    assert ("12.0 dB softer" in caplog.text) == (subtype is None)


def test_silence_stays_silence():
    for level in ("mixture", -20.0):
        with TargetOutput(level=level) as output:
            output.push(torch.zeros(100), torch.ones(100))
            assert not output.finish().any()


@pytest.mark.parametrize("level", ["loud", None, float("nan"), 800, -1000])
def test_bad_levels(level):
    with pytest.raises(ValueError, match="level must be"):
        TargetOutput(level=level)


def test_bad_output_names(tmp_path):
    with pytest.raises(ValueError, match="has no samples of type PCM_77"):
        TargetOutput(tmp_path / "a.wav", subtype="PCM_77")
    with pytest.raises(ValueError, match="name a .wav"):
        audio_format("out")
    with pytest.raises(ValueError, match="different output files"):
        output_paths("a.wav", [60.0, 60.0])
    with pytest.raises(ValueError, match="2 directions"):
        output_paths(["a.wav"], [60.0, 70.0])
