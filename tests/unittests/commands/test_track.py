"""The command that follows a face: options of a wrong kind."""

import pytest

from speechbrain_mpq.__main__ import main


def test_target_that_is_neither_number_nor_largest(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["track", "video.mp4", "--target", "first"])
    said = capsys.readouterr().err
    assert "'first' is neither a number nor \"largest\"" in said
