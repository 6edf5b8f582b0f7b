"""One process works in a folder at a time, whatever becomes of the others."""

import os
import signal

import pytest

from speechbrain_mpq.locks import (
    IN_USE,
    alone_in,
    folder_in_use,
    hold_folder,
    one_at_a_time,
)

BUSY = 7  # exit status of a process that was refused


def forked(work):
    """Run something in another process.

    Arguments
    ---------
    work : callable

    Returns
    -------
    int
        Its process number.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BlockingIOError:
        status = BUSY
    finally:
        os._exit(status)


def end_of(child):
    """Exit status of a process."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def enter(folder, **options):
    """Work in a folder for no time."""
    with alone_in(folder, **options):
        pass


def test_a_folder_is_held_once(tmp_path):
    held = hold_folder(tmp_path)
    with pytest.raises(BlockingIOError, match="another process is at work"):
        hold_folder(tmp_path)
    assert hold_folder(tmp_path, again=True) is held
    held.close()
    held = hold_folder(tmp_path)
    del held  # the lock ends with whoever kept it, and leaves nothing
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_moved_folder_is_not_that_of_the_next(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    first = hold_folder(folder)
    folder.rename(tmp_path / "aside")
    folder.mkdir()
    second = hold_folder(folder, again=True)
    assert second is not first
    first.close()
    assert folder_in_use(folder)


def test_forked_children_do_not_take_their_parents_lock_away(tmp_path):
    held = hold_folder(tmp_path)
    assert end_of(forked(held.__del__)) == 0
    assert end_of(forked(lambda: hold_folder(tmp_path))) == BUSY
    held.close()


@pytest.mark.parametrize("beside", [False, True])
def test_another_process_is_refused_meanwhile(tmp_path, beside):
    folder = tmp_path / "model"
    with alone_in(folder, beside=beside), alone_in(folder, beside=beside):
        refused = forked(lambda: enter(folder, beside=beside))
        assert end_of(refused) == BUSY
    assert not list(tmp_path.iterdir())
    enter(folder, beside=beside)
    assert not list(tmp_path.iterdir())


def test_another_process_waits_and_finds_what_is_made(tmp_path):
    made = []

    @one_at_a_time
    def prepare(data_folder, *, text):
        made.append((data_folder / "a.txt").exists())
        (data_folder / "a.txt").write_text(text)

    def wait():
        prepare(tmp_path, text="second")
        assert made == [True]

    with alone_in(tmp_path):
        child = forked(wait)
        prepare(tmp_path, text="first")
    assert end_of(child) == 0
    assert (tmp_path / "a.txt").read_text() == "second"


def test_workers_of_a_killed_process_hold_nothing(tmp_path):
    reader, writer = os.pipe()
    ready, told = os.pipe()

    def leave_a_worker():
        with alone_in(tmp_path):
            forked(lambda: (os.write(told, b"1"), os.read(reader, 1)))
            os.kill(os.getpid(), signal.SIGKILL)

    assert end_of(forked(leave_a_worker)) == -signal.SIGKILL
    assert os.read(ready, 1) == b"1"
    assert (tmp_path / IN_USE).exists()
    assert not folder_in_use(tmp_path)
    enter(tmp_path)
    os.write(writer, b"1")  # its end
    for end in (reader, writer, ready, told):
        os.close(end)


def test_a_folder_that_nothing_can_be_written_to_is_only_read(
    tmp_path, monkeypatch
):
    def refuse(path, *_):
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr("builtins.open", refuse)
    with alone_in(tmp_path, wait=True):
        pass
