"""Files appear whole or not at all."""

import pytest

from speechbrain_mpq.whole_files import whole_file, write_text, write_whole


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.wav"
    path.write_text("before")
    with pytest.raises(KeyError), whole_file(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="make it first"):
        with whole_file(tmp_path / "no" / "out.wav"):
            pass


def failing():
    """Content that breaks off."""
    yield b"half"
    raise KeyError


def test_broken_content_leaves_what_was_there(tmp_path):
    path = tmp_path / "model.bin"
    write_whole(path, [b"one, ", b"two"])
    with pytest.raises(KeyError):
        write_whole(path, failing())
    assert path.read_bytes() == b"one, two"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_and_links_are_replaced(tmp_path):
    other, path = tmp_path / "other.txt", tmp_path / "link.txt"
    other.write_text("mine")
    path.symlink_to(other)
    write_text(path, "Grüße")
    assert path.read_bytes() == "Grüße".encode() and not path.is_symlink()
    assert other.read_text() == "mine"
