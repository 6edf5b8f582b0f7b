"""Freed memory stays in the process.

Files appear whole or not at all.
"""

import os
import subprocess
import sys

import pytest

from speechbrain_mpq.utils import (
    atomic_write,
    keep_freed_memory,
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
