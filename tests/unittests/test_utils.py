"""Files appear whole or not at all, JSON is strict, memory stays."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from speechbrain_mpq import utils
from speechbrain_mpq.locks import check_folder
from speechbrain_mpq.utils import (
    atomic_write,
    check_output,
    error_text,
    keep_freed_memory,
    open_input,
    read_json,
    save_figure,
    strict_json,
    write_chunks,
    write_text,
)

# How often the system had to give a page for buffers that had been freed
FAULTS = """
import resource
from speechbrain_mpq.utils import keep_freed_memory
print({keep})
for count in range(6):
    if count == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = b"x" * 2**26
    del buffer
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep):
    """What a fresh process says, and its page faults, glibc as it comes."""
    kept = {k: v for k, v in os.environ.items() if "MALLOC_" not in k}
    kept.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)],
        capture_output=True,
        text=True,
        check=True,
        env=kept,
    )
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_buffers_are_not_taken_from_the_system_again():
    said, count = faults("keep_freed_memory()")
    if said == "False":
        pytest.skip("no glibc")
    given_back = faults(None)[1]
    assert given_back >= 5  # one at least for each, if pages are large
    assert count * 5 < given_back


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_own_settings_are_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "")
    assert keep_freed_memory() is False


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.wav"
    path.write_text("before")
    with pytest.raises(KeyError), atomic_write(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="make it first"):
        with atomic_write(tmp_path / "no" / "out.wav"):
            pass


def failing():
    """Content that breaks off."""
    yield b"half"
    raise KeyError


def test_broken_content_leaves_what_was_there(tmp_path):
    path = tmp_path / "model.bin"
    write_chunks(path, [b"one, ", b"two"])
    with pytest.raises(KeyError):
        write_chunks(path, failing())
    assert path.read_bytes() == b"one, two"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_and_links_are_replaced(tmp_path):
    other, path = tmp_path / "other.txt", tmp_path / "link.txt"
    other.write_text("mine")
    path.symlink_to(other)
    write_text(path, "Grüße")
    assert path.read_bytes() == "Grüße".encode() and not path.is_symlink()
    assert other.read_text() == "mine"


@pytest.mark.parametrize("size", [200, 230, 255])
def test_names_as_long_as_names_may_be(tmp_path, size):
    for name in ("a" * size, "ä" * (size // 2)):
        with atomic_write(tmp_path / name) as part:
            part.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"


WRITING = """
import sys, time
from pathlib import Path
from speechbrain_mpq.signals import exit_on_signals
from speechbrain_mpq.utils import atomic_write, scratch_folder
folder = Path(sys.argv[1])
with exit_on_signals(), atomic_write(folder / "out.wav") as part:
    part.write_text("half")
    with scratch_folder(folder) as scratch:
        (scratch / "recording.wav").write_text("private")
        print("writing", flush=True)
        time.sleep(60 * (len(sys.argv) == 2))
"""


def writing(folder, *more):
    """A process that writes a file, as far as it gets."""
    command = [sys.executable, "-c", WRITING, str(folder), *more]

    def heeded():  # also where the tests themselves run behind nohup
        for name in ("SIGHUP", "SIGINT"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)

    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=heeded,
    )
    assert process.stdout.readline() == b"writing\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_leaves_nothing_behind(tmp_path, name):
    process = writing(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(getattr(signal, name))
    number = getattr(signal, name)
    # Python's own way of Ctrl-C ends by the signal
    assert process.wait(30) in (128 + number, -number)
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_leave_is_tidied_up_by_the_next(tmp_path):
    pytest.importorskip("fcntl")
    killed, alive = writing(tmp_path), writing(tmp_path)
    killed.kill()
    killed.wait(30)
    assert len(list(tmp_path.iterdir())) == 4
    following = writing(tmp_path, "at once")
    assert following.wait(30) == 0
    # What a living process writes is left alone
    assert len(list(tmp_path.iterdir())) == 2 + 1
    alive.terminate()
    assert alive.wait(30) == 128 + signal.SIGTERM
    for process in (killed, alive, following):
        process.stdout.close()
    assert [p.name for p in tmp_path.iterdir()] == ["out.wav"]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("[" * 100000, "nested too deeply"),
        (f"[{'9' * 400}]", "more than 64 bits"),
        (f"[{'9' * 5000}]", "more than 64 bits"),
        ("[1e999]", "no finite number"),
        ("[NaN]", "NaN is no JSON"),
        ('{"a": 1, "a": 1}', "twice"),
        ('["\\ud800"]', "surrogates"),
    ],
)
def test_json_that_readers_would_differ_on(tmp_path, text, problem):
    path = tmp_path / "track.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=problem):
        strict_json(text.encode())


def test_byte_order_marks_are_no_content(tmp_path):
    path = tmp_path / "mixtures.json"
    path.write_text('{"a": 18446744073709551615}', "utf-8-sig")
    assert read_json(path) == strict_json(path.read_bytes()) == {"a": 2**64 - 1}
    with pytest.raises(ValueError, match="BOM"):
        strict_json(path.read_bytes(), packed=True)
    assert strict_json(f"[{2**70}]", packed=True) == [2**70]


def test_pipes_are_read_and_not_waited_for(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=["[1]"])
    writer.start()
    assert read_json(pipe) == [1]
    writer.join()
    monkeypatch.setattr(utils, "PIPE_SECONDS", 0.2)
    with pytest.raises(OSError, match="nobody wrote to this pipe"):
        open_input(pipe)
    slow = os.open(pipe, os.O_RDWR)  # somebody who has not yet begun
    threading.Timer(0.5, os.write, [slow, b"late"]).start()
    with open_input(pipe) as file:
        assert file.read(4) == b"late"
    os.close(slow)
    with pytest.raises(FileNotFoundError, match="neither a file nor a pipe"):
        open_input(tmp_path)


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    """As /dev/null does, which a superuser could replace by a file."""
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "sound")
    reader.join()
    assert read == ["sound"] and pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_full_device_is_named():
    with pytest.raises(OSError) as caught:
        write_text("/dev/full", "sound")
    assert error_text(caught.value) == "/dev/full: No space left on device"


def test_the_name_of_standard_output_becomes_no_file(tmp_path, monkeypatch):
    """Of those who do not take it for standard output."""
    monkeypatch.chdir(tmp_path)
    for check in (check_output, check_folder):
        with pytest.raises(ValueError, match="- is no name here"):
            check("-")
    assert os.listdir(tmp_path) == []


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "in.json").write_text("{}")
    (tmp_path / "link").symlink_to("in.json")
    check_output(tmp_path / "out.json", tmp_path / "in.json", None)
    for name in ("in.json", "link"):
        with pytest.raises(ValueError, match="is the input"):
            check_output(tmp_path / name, tmp_path / "in.json")
    (tmp_path / "model").mkdir()
    own = tmp_path / "model" / "lm.arpa"
    check_output(own, tmp_path / "model")
    own.write_text("of a model that is read for it")
    with pytest.raises(ValueError, match="is the input"):
        check_output(own, tmp_path / "model")
    with pytest.raises(ValueError, match="more than 255 bytes"):
        check_output(tmp_path / ("a" * 256))
    with pytest.raises(FileNotFoundError, match="make it first"):
        check_output(tmp_path / "no" / "out.json")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_output(tmp_path)


def test_a_full_disk_is_told_with_its_file(tmp_path):
    with pytest.raises(OSError) as told, atomic_write(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error_text(told.value).startswith(f"{tmp_path / 'a.json'}: No space")
    assert not list(tmp_path.iterdir())


def test_a_figure_is_saved_whole_or_not_at_all(tmp_path):
    class Figure:
        """One that the disk has no room for."""

        def savefig(self, file, format, dpi):
            """Write a part."""
            file.write(b"half")
            assert (format, dpi) == ("png", 150)
            raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        save_figure(Figure(), tmp_path / "a.png", dpi=150)
    assert (tmp_path / "a.png").read_bytes() == b"old"
