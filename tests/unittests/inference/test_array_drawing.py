"""Arrays are drawn to scale, with the microphones that are used."""

import pytest

from speechbrain_mpq.inference.array_drawing import array_of, draw_array
from speechbrain_mpq.inference.card import model_card
from speechbrain_mpq.inference.registry import describe
from speechbrain_mpq.lobes.models.separator import Separator
from speechbrain_mpq.lobes.models.spatial_features import (
    LINEAR_15_SPACINGS,
    SpatialFeatures,
)


def separator_of(**settings):
    """Without weights that mean anything."""
    return Separator(SpatialFeatures(**settings), 4, 8, 3, 1, 1)


def test_the_shipped_array_has_a_column_a_centimetre():
    array = array_of(describe(separator_of()))
    assert array["spacings_cm"] == list(LINEAR_15_SPACINGS)
    assert array["microphones"] == [1, 4, 6, 8, 10, 12, 15]
    lines = draw_array(**array)
    row = lines[1].removeprefix("180°  ").removesuffix("  0°")
    assert len(row) == 57
    assert [i for i, c in enumerate(row) if c == "#"] == [
        *(0, 18, 25, 28, 31, 38, 56)
    ]
    assert row.count("o") == 8
    assert lines[2].split() == ["mic", *map(str, array["microphones"])]
    assert lines[3].split() == ["cm", *"0 18 25 28 31 38 56".split()]
    ahead = lines[0].index("90") + len("90° straight ahead") / 2
    assert ahead == pytest.approx(6 + 57 / 2, abs=1)


@pytest.mark.parametrize(
    "spacings", [[0.5] * 40, [100.0, 3.0], [0.0], [33.3] * 3, [1] * 1000]
)
def test_any_array_fits(spacings):
    used = list(range(1, len(spacings) + 2, 2))
    lines = draw_array(spacings, used)
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("180°  ") and lines[1].endswith("  0°")


def test_cards_have_it_where_there_is_an_array():
    architecture = describe(separator_of(pairs=[(3, 1)], spacings_cm=[4, 5]))
    card = model_card({"plan": None, "architecture": architecture}, 1)
    drawing = "\n".join(draw_array([4, 5], [1, 3]))
    assert f"## The array\n\n```\n{drawing}\n```" in card
    assert "## The array" not in model_card({"plan": None}, 1)
    other = {"class": "Linear", "arguments": {"features": 3}}
    assert array_of(other) is None and array_of(None) is None
