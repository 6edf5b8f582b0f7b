"""The score table: what it refuses, and scores.json."""

import json

import pytest

from speechbrain_mpq.allocation.scores import ScoreTable, check_candidates


def make_table(**changes):
    """A table of two clusters."""
    content = {
        "scores": {
            "conv": {2: 0.1 + 0.2, 4: 1e-17},
            "norm": {2: 0.0, 4: 0.0},
        },
        "tensors": {
            "conv": {"conv.weight": 12},
            "norm": {"norm.weight": 3, "norm.bias": 3},
        },
        "rest_parameters": 7,
        "method": "bernoulli_kl",
        "details": {"seconds": 1.5},
    }
    return ScoreTable(**(content | changes))


def test_save_and_load_keep_everything(tmp_path):
    table = make_table(scales={"conv": 4})
    table.save(tmp_path / "scores.json")
    assert ScoreTable.load(tmp_path / "scores.json") == table
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_keys_are_strings_in_the_file_and_integers_in_memory(tmp_path):
    make_table().save(tmp_path / "scores.json")
    content = json.loads((tmp_path / "scores.json").read_text())
    assert set(content["clusters"]["conv"]["scores"]) == {"2", "4"}
    assert content["clusters"]["norm"]["parameters"] == 6
    loaded = ScoreTable.load(tmp_path / "scores.json")
    assert set(loaded.scores["conv"]) == {2, 4}


def test_1_6_bits_and_the_codebook_survive_the_file(tmp_path):
    scores = {"conv": {1.6: 0.3, 2: 0.1}, "norm": {1.6: 0.0, 2: 0.0}}
    table = make_table(scores=scores, codebook="midrise")
    table.save(tmp_path / "scores.json")
    assert ScoreTable.load(tmp_path / "scores.json") == table
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["candidate_bits"] == [1.6, 2]
    assert set(content["clusters"]["conv"]["scores"]) == {"1.6", "2"}
    assert content["codebook"] == "midrise"
    make_table().save(tmp_path / "scores.json")
    assert "codebook" not in (tmp_path / "scores.json").read_text()


def test_an_unknown_codebook_is_refused():
    with pytest.raises(ValueError, match="codebook must be one of"):
        make_table(codebook="other")


def test_counts():
    table = make_table()
    assert table.parameters == {"conv": 12, "norm": 6}
    assert table.scales == {"conv": 1, "norm": 2}
    assert table.candidate_bits == (2, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-9])
def test_bad_score_is_refused_by_name(bad):
    scores = {"conv": {2: 0.1, 4: 0.0}, "norm": {2: 0.0, 4: bad}}
    with pytest.raises(ValueError, match="norm at 4 bits"):
        make_table(scores=scores)


def test_a_signed_method_may_score_below_zero_but_not_nan():
    scores = {"conv": {2: -0.1}, "norm": {2: 0.0}}
    assert make_table(scores=scores, signed=True).scores == scores
    scores["norm"][2] = float("nan")
    with pytest.raises(ValueError, match="norm at 2 bits"):
        make_table(scores=scores, signed=True)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda c: c.update(rest_parameters="7"), "rest_parameters is '7'"),
        (lambda c: c.update(signed="false"), "signed is 'false'"),
        (lambda c: c.update(method=None), "method is None"),
        (lambda c: c["clusters"]["conv"].update(scales=True), "scales of conv"),
        (
            lambda c: c["clusters"]["conv"]["scores"].update({"2": True}),
            "conv has True where a number",
        ),
    ],
)
def test_a_file_with_other_kinds_of_values_is_refused(tmp_path, change, told):
    path = tmp_path / "scores.json"
    make_table().save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="scores.json.*score again") as caught:
        ScoreTable.load(path)
    assert told in str(caught.value)


def test_missing_candidate_is_refused_by_name():
    with pytest.raises(ValueError, match=r"norm has no score at \[4\] bits"):
        make_table(scores={"conv": {2: 0.0, 4: 0.0}, "norm": {2: 0.0}})


def test_scores_and_tensors_must_have_the_same_clusters():
    with pytest.raises(ValueError, match="norm"):
        make_table(scores={"conv": {2: 0.0}})
    with pytest.raises(ValueError, match="at least one cluster"):
        make_table(scores={}, tensors={})


def test_other_files_are_refused_by_path(tmp_path):
    path = tmp_path / "scores.json"
    make_table().save(path)
    text = path.read_text()
    newer = text.replace('"version": 1', '"version": 99')
    no_norm = text.replace('"norm.bias": 3', '"norm.bias": "x"')
    for broken in (newer, text[: len(text) // 2], "[]", "{}", no_norm):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"scores\.json"):
            ScoreTable.load(path)
    path.write_text(newer)
    with pytest.raises(ValueError, match="version 99"):
        ScoreTable.load(path)


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "scores.json"
    make_table().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        make_table(details={"seconds": float("nan")}).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "bad", [[], [4.0], [0], [17], [2, 2], [1.5], ["4"], [True], 4]
)
def test_bad_candidates(bad):
    with pytest.raises(ValueError, match="candidate bits"):
        check_candidates(bad)
