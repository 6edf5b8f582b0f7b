"""N-best lists: what is read, what is refused, what is written."""

import json

import pytest

from speechbrain_mpq.decoders.nbest import (
    NBest,
    one_best,
    read_nbest,
    write_nbest,
)

GOOD = {"id": "u1", "hypotheses": ["so be it", ""], "scores": [-2, -1.5]}


def written(tmp_path, *rows):
    """A file of rows, which are text or content."""
    path = tmp_path / "nbest.json"
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_read_and_written(tmp_path):
    path = written(tmp_path, GOOD, "", {**GOOD, "id": "u2"})
    lists = read_nbest(path)
    assert [row.id for row in lists] == ["u1", "u2"]
    ranked = [row.ranked() for row in lists]
    assert ranked[0].hypotheses == ["", "so be it"]
    assert one_best(ranked) == "u1\nu2\n"  # silence is the best
    write_nbest(path, ranked)
    assert read_nbest(path) == ranked


def test_equal_scores_keep_their_order():
    row = NBest("u", ["a", "b", "c"], [-1.0, -1.0, -0.5])
    assert row.ranked().hypotheses == ["c", "a", "b"]


@pytest.mark.parametrize(
    "row, match",
    [
        ("[1]", "line 1: a JSON object is wanted"),
        ("{so", "line 1: no JSON object"),
        ('{"id": "u", "id": "v"}', "the key 'id' twice"),
        ({"id": "u", "hypotheses": ["a"]}, "no 'scores'"),
        ({**GOOD, "id": 3}, "id 3 is no string"),
        ({**GOOD, "id": "a b"}, "'a b' is no string without blanks"),
        ({**GOOD, "hypotheses": [], "scores": []}, "'u1' has no hypotheses"),
        ({**GOOD, "hypotheses": ["a", 1]}, "no list of strings"),
        ({**GOOD, "scores": [-1]}, "2 hypotheses and needs as many scores"),
        ({**GOOD, "scores": [-1, "x"]}, "'x' is no number"),
        ({**GOOD, "scores": [-1, True]}, "True is no number"),
        ('{"id": "u", "hypotheses": ["a"], "scores": [NaN]}', "line 1"),
        ({**GOOD, "scores": [-1, 3]}, "a score of 3 is above 0.*costs"),
    ],
)
def test_what_is_refused(tmp_path, row, match):
    with pytest.raises(ValueError, match=match):
        read_nbest(written(tmp_path, row))


def test_ids_are_there_once(tmp_path):
    path = written(tmp_path, GOOD, {**GOOD, "id": "u2"}, GOOD)
    with pytest.raises(ValueError, match="line 3: id 'u1' is that of line 1"):
        read_nbest(path)


def test_signs(tmp_path):
    path = written(tmp_path, {**GOOD, "scores": [2, 1]})
    assert read_nbest(path, "costs")[0].ranked().hypotheses[0] == ""
    assert read_nbest(path, "any")[0].ranked().hypotheses[0] == "so be it"
    with pytest.raises(ValueError, match="a cost of -2 is below 0"):
        read_nbest(written(tmp_path, GOOD), "costs")
    with pytest.raises(ValueError, match="scores must be one of"):
        read_nbest(path, "cost")


def test_other_encodings_and_empty_files(tmp_path):
    path = tmp_path / "nbest.json"
    row = '{"id": "u", "hypotheses": ["café"], "scores": [-1]}'
    path.write_bytes(row.encode("latin1"))
    with pytest.raises(ValueError, match="line 1: not UTF-8.*iconv"):
        read_nbest(path)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no n-best list"):
        read_nbest(path)
