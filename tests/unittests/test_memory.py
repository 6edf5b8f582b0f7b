"""Freed memory stays in the process."""

import os
import subprocess
import sys

import pytest

from speechbrain_mpq.memory import keep_freed_memory

# How often the system had to give a page for buffers that had been freed
FAULTS = """
import resource
from speechbrain_mpq.memory import keep_freed_memory
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
