"""Model cards: what the hub reads, numbers that are true, drawn arrays."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from speechbrain_mpq import QuantizedSeparator, save_separator
from speechbrain_mpq.inference.card import (
    array_of,
    draw_array,
    model_card,
    read_sample,
    write_sample,
)
from speechbrain_mpq.inference.folder import write_card
from speechbrain_mpq.inference.registry import describe
from speechbrain_mpq.inference.verification import check_folder
from speechbrain_mpq.lobes.models.separator import Separator, build_separator
from speechbrain_mpq.lobes.models.spatial_features import (
    LINEAR_15_SPACINGS,
    SpatialFeatures,
)

GOLDEN = Path(__file__).parents[2] / "data/packed/3"


CONFIG = {
    "plan": {
        "average_bits": 2.5001,
        "rest_parameters": 100,
        "clusters": {
            "a": {"bits": 2, "parameters": 700, "tensors": ["a.weight"]},
            "b": {"bits": 4, "parameters": 200, "tensors": ["b.weight"]},
        },
    },
    "metadata": {"seed": 7},
}


def scores(shift=0.0, **more):
    """Content of a metrics.json."""
    names = {"0-15": 6.0, "15-45": 9.0}
    return {
        "system": "kl",
        "average_bits": 2.5001,
        "model_bytes": 2**19,
        "fp32_bytes": 2**22,
        "corpus": "embedded",
        "seed": 7,
        "buckets": {
            name: {"n": 5, "si_snr": snr - shift, "pesq": 1.5, "wer": 20.0}
            for name, snr in names.items()
        },
        "average": {"si_snr": 7.5 - shift, "pesq": 1.5, "wer": 20.04},
        **more,
    }


def front_matter(text):
    """What the hub reads."""
    start, matter, rest = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter), rest


def table_row(text, *start):
    """Cells of the row that begins in a certain way."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    (row,) = [row for row in rows if tuple(row[: len(start)]) == start]
    return row[len(start) :]


def test_front_matter():
    text = model_card(CONFIG, 2**19, base_model="me/base", license="cc0-1.0")
    matter, _ = front_matter(text)
    assert matter == {
        "library_name": "speechbrain",
        "license": "cc0-1.0",
        "pipeline_tag": "audio-to-audio",
        "base_model": "me/base",
        "base_model_relation": "quantized",
        "tags": [
            *("speechbrain_mpq", "speech-separation", "multi-channel"),
            *("quantized", "2.5-bit", "mixed-precision"),
        ],
    }


def test_the_hubs_own_reader_understands_it():
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(model_card(CONFIG, 2**19, base_model="me/base"))
    assert card.data.base_model == "me/base"
    assert card.data.library_name == "speechbrain"
    assert "2.5-bit" in card.data.tags


def test_full_precision_has_no_base():
    text = model_card({"plan": None}, 2**22, base_model="me/base")
    matter, rest = front_matter(text)
    assert "base_model" not in matter and "quantized" not in matter["tags"]
    assert table_row(rest, "bits of a weight") == ["32 (full precision)"]
    assert "## Bit plan" not in rest and "## Results" not in rest


def test_numbers_come_from_the_metrics():
    whole = scores(-0.5, average_bits=32, model_bytes=2**22, system="fp32")
    test = {"against": "fp32", "p": 0.0312, "z": 2.0, "segments": 70}
    text = model_card(CONFIG, 2**19, scores(mapsswe=test), whole)
    _, rest = front_matter(text)
    quality = ["7.50", "1.50", "20.0"]
    assert table_row(rest, "this model", "2.5") == ["0.50", *quality]
    assert table_row(rest, "full precision", "32", "4.00")[0] == "8.00"
    assert table_row(rest, "15-45", "this model") == ["9.00", "1.50", "20.0"]
    assert table_row(rest, "15-45", "full precision")[0] == "9.50"
    assert table_row(rest, "times smaller") == ["8.0"]
    assert table_row(rest, "corpus") == ["embedded"]
    assert table_row(rest, "seed") == ["7"]
    assert "p = 0.0312 over 70 segments" in rest


def test_bits_and_bytes_that_a_recipe_does_not_say_are_the_files():
    metrics = scores()
    del metrics["average_bits"], metrics["model_bytes"]
    card = model_card(CONFIG, 2**19, metrics)
    assert "| this model | 2.5 | 0.50 | 7.50 |" in card


def test_the_plan_in_short():
    _, rest = front_matter(model_card(CONFIG, 500))
    assert table_row(rest, "2", "1") == ["700", "70.0 %"]
    assert table_row(rest, "4", "1") == ["200", "20.0 %"]
    assert table_row(rest, "32 (left alone)") == ["-", "100", "10.0 %"]


def test_values_that_are_missing_are_left_open():
    metrics = scores()
    metrics["average"]["pesq"] = None
    _, rest = front_matter(model_card(CONFIG, 2**19, metrics))
    assert table_row(rest, "this model", "2.5")[2] == "-"
    assert "full precision" in rest  # its size is known, its scores are not
    assert "MAPSSWE" not in rest


def test_a_sample_is_named_where_it_is():
    sample = {"doa": 72.5, "title": "a talk", "license": "MIT", "channels": 7}
    card = model_card(CONFIG, 1, sample=sample)
    assert 'model.separate_file("sample.flac", doa=72.5, out=' in card
    assert "a talk, 7 microphones; the talker at 72.5 degrees is" in card
    assert "(sample_separated.flac)" in card
    assert "Licence of both: MIT." in card
    nameless = model_card(CONFIG, 1, sample={**sample, "doa": None})
    assert '"sample.flac", doa=60' in nameless and "MIT" not in nameless
    assert "sample" not in model_card(CONFIG, 1)


def test_lips_are_told_of_where_the_model_has_them():
    visual = {"front_end": "light", "height": 24, "width": 32}
    config = {**CONFIG, "architecture": {"arguments": {"visual": visual}}}
    card = model_card(config, 2**19)
    assert "separator with lips" in card and "24 x 32 pixels" in card
    assert "lips=lips" in card
    assert "lips" not in model_card(CONFIG, 2**19)


def test_the_card_of_a_folder_is_about_that_folder():
    config = json.loads((GOLDEN / "quantization_config.json").read_text())
    size = (GOLDEN / "model.safetensors").stat().st_size
    text = (GOLDEN / "README.md").read_text()
    assert text == model_card(config, size)
    assert f"{size:,} bytes" in text


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


CIRCLE = [
    *([5, 0], [2.5, 4.33], [-2.5, 4.33]),
    *([-5, 0], [-2.5, -4.33], [2.5, -4.33]),
]


def test_planar_arrays_are_drawn_from_above():
    separator = separator_of(pairs=[(2, 5), (1, 4)], positions_cm=CIRCLE)
    array = array_of(describe(separator))
    assert array == {"positions_cm": CIRCLE, "microphones": [1, 2, 4, 5]}
    lines = draw_array(**array)
    assert max(map(len, lines)) <= 80
    (level,) = [line for line in lines if line.startswith("180°")]
    assert level.split() == ["180°", "4", "1", "0°"]
    top = lines.index(next(line for line in lines if "2" in line))
    assert lines[top].split() == ["o", "2"] and top < lines.index(level)
    assert lines[top].index("2") > lines[top].index("o")
    assert lines[0].strip() == "90°"
    assert "at (5, 0), (2.5, 4.33)," in "\n".join(lines)


@pytest.mark.parametrize("scale", [0.01, 1.0, 900.0])
@pytest.mark.parametrize("flat", [1.0, 1e-3])
def test_any_planar_array_fits(scale, flat):
    rng = np.random.default_rng(0)
    positions = (scale * rng.uniform(-1, 1, (40, 2)) * [1, flat]).round(5)
    used = list(range(1, 41, 3))
    lines = draw_array(positions_cm=positions.tolist(), microphones=used)
    assert max(map(len, lines)) <= 80


def test_cards_have_it_where_there_is_an_array():
    architecture = describe(separator_of(pairs=[(3, 1)], spacings_cm=[4, 5]))
    card = model_card({"plan": None, "architecture": architecture}, 1)
    drawing = "\n".join(draw_array([4, 5], [1, 3]))
    assert f"## The array\n\n```\n{drawing}\n```" in card
    assert "## The array" not in model_card({"plan": None}, 1)
    other = {"class": "Linear", "arguments": {"features": 3}}
    assert array_of(other) is None and array_of(None) is None


@pytest.fixture
def folder(tmp_path):
    """A packed separator."""
    sizes = {"channels": 8, "hidden": 16, "blocks": 1, "layers": 2}
    separator = build_separator("hparams/models/separator_mini.yaml", **sizes)
    return save_separator(separator.eval(), tmp_path / "packed")


def test_a_card_names_the_sample_that_lies_beside_it(folder):
    rng = np.random.default_rng(0)
    mixture = 0.05 * rng.standard_normal((64000, 7))
    mixture[20000:52000] *= 3
    write_sample(folder, mixture, 9 * mixture[:, 0], 72.5, "a talk", "MIT")
    sound, rate = soundfile.read(folder / "sample.flac")
    assert sound.shape == (40000, 7) and rate == 16000
    likeness = np.correlate(mixture[:, 3], sound[:, 3], "valid")
    first = np.argmax(likeness)  # has the loud part
    assert 12000 <= first <= 20000
    assert np.allclose(sound, mixture[first : first + 40000], atol=2**-15)
    alone, _ = soundfile.read(folder / "sample_separated.flac")
    assert alone.shape == (40000,)
    assert np.corrcoef(alone, sound[:, 0])[0, 1] > 0.9999
    assert np.abs(alone).max() <= np.abs(sound).max()  # nothing is clipped
    write_card(folder)
    card = (folder / "README.md").read_text()
    assert 'separate_file("sample.flac", doa=72.5' in card
    assert "Licence of both: MIT." in card
    assert check_folder(folder) == []
    model = QuantizedSeparator.from_pretrained(folder)
    assert len(model.separate_file(folder / "sample.flac", 72.5)) == 40000
    saved = model.save_pretrained(folder.parent / "again")
    assert read_sample(saved) == read_sample(folder)
    assert check_folder(saved) == []


def test_samples_of_more_channels_than_flac_has(folder):
    sound = np.zeros((100, 9))
    assert not write_sample(folder, sound, sound[:, 0], 60, "silence")
    assert read_sample(folder) is None


def test_a_sample_that_is_none_is_found(folder):
    (folder / "sample_separated.flac").write_bytes(b"RIFF")
    (problem,) = check_folder(folder)
    assert "sample_separated.flac: no FLAC file" in problem
