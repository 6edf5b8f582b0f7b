"""Ranges of activations: the search, the file, what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import mask_inputs, packed

from speechbrain_mpq.inference.engines.activations import (
    content_digest,
    points,
    read_ranges,
    search_ranges,
    write_ranges,
)
from speechbrain_mpq.inference.engines.engine import check_engine
from speechbrain_mpq.inference.engines.lowered import (
    decibels,
    equalize_hidden,
    lower,
    rounding,
    run,
)
from speechbrain_mpq.inference.exporting import engine_ranges, read_manifest
from speechbrain_mpq.quantization.container import PackedModelError
from speechbrain_mpq.quantization.packing import save_packed


def error_of(values, scale, zero_point):
    """Squared error of rounding, written out."""
    index = np.clip(np.round(values / scale) + zero_point, 0, 255)
    return (((index - zero_point) * scale - values) ** 2).sum()


@pytest.mark.parametrize("signed", [False, True])
def test_search_is_near_the_best_of_a_fine_grid(signed):
    values = np.random.default_rng(0).normal(0.3, 1.0, 100000)
    values[0] = 12.0  # worth cutting off
    scale, zero_point = search_ranges(
        values[None], np.ones((1, 100000)), signed
    )
    found = error_of(values, scale[0], zero_point[0])
    zero_points = [128] if signed else range(60, 141, 20)
    errors = [
        error_of(values, step, zero)
        for step in np.geomspace(0.02, 0.1, 15)
        for zero in zero_points
    ]
    assert found < 1.05 * min(errors)
    widest = 12.0 / 127 if signed else (12 - values.min()) / 255
    shift = 128 if signed else round(-values.min() / widest)
    assert found < 0.9 * error_of(values, widest, shift)


def test_nothing_below_zero_needs_no_zero_point():
    values = np.random.default_rng(0).random((1, 100))
    scale, zero_point = search_ranges(values, np.ones((1, 100)))
    assert zero_point[0] == 0
    assert scale[0] == pytest.approx(values.max() / 255, rel=0.05)


def test_silence_gets_a_range():
    scale, zero_point = search_ranges(np.zeros((1, 4)), np.ones((1, 4)))
    assert scale[0] == 1 and error_of(0.0, scale[0], zero_point[0]) == 0


def test_rounded_network_is_near(tmp_path):
    packed(tmp_path, "eight")
    network = lower(tmp_path)
    ranges = engine_ranges(network, [mask_inputs(frames=200)])
    inputs = mask_inputs(seed=2)
    wanted = run(network, inputs)
    assert 25 < decibels(
        wanted, run(network, inputs, rounding(network, ranges))
    )


def test_equalizing_hidden_channels_changes_no_output(tmp_path):
    packed(tmp_path, "midtread_4", scale_inputs=True)
    network = lower(tmp_path)
    ranges = engine_ranges(network, [mask_inputs()])
    equalized = equalize_hidden(network, ranges)
    inputs = mask_inputs(seed=2)
    assert decibels(run(network, inputs), run(equalized, inputs)) > 100
    for one, other in zip(network.convolutions(), equalized.convolutions()):
        assert one.levels is other.levels


def test_negative_norm_scales_are_equalized_too(tmp_path):
    model = packed(tmp_path, "float")
    model.mask_net.tcn_0_0.norm_in.weight[3] = -0.7
    model.mask_net.tcn_0_0.norm_out.weight[2] = 0.0
    packed(tmp_path, "eight", model=model)
    network = lower(tmp_path)
    ranges = engine_ranges(network, [mask_inputs()])
    equalized = equalize_hidden(network, ranges)
    inputs = mask_inputs(seed=2)
    assert decibels(run(network, inputs), run(equalized, inputs)) > 100


def test_file_gives_the_same_ranges(tmp_path):
    packed(tmp_path, "channels")
    network = lower(tmp_path)
    ranges = engine_ranges(network, [mask_inputs()])
    write_ranges(tmp_path, ranges, 1.0)
    again = read_ranges(tmp_path, network)
    assert set(again) == set(ranges) == set(points(network))
    for name, unit in ranges.items():
        assert np.array_equal(unit.scale, again[name].scale)
        assert np.array_equal(unit.zero_point, again[name].zero_point)


def spoil(content, what):
    """Change one thing of a range file."""
    name = "mask_net.conv_in"
    if what == "scale":
        content["layers"][name]["scale"] = -1.0
    elif what == "zero point":
        content["layers"][name]["zero_point"] = 256
    elif what == "shape":
        content["layers"][name]["scale"] = [1.0, 1.0]
    elif what == "layer":
        del content["layers"][name]
    elif what == "weights":
        content["weights_sha256"] = "0" * 64
    elif what == "kind":
        content["layers"][name]["zero_point"] = 127.5
    elif what == "version":
        content["version"] = 3
    elif what == "true":
        content["layers"][name]["scale"] = True
    elif what == "text":
        content["layers"][name]["scale"] = "0.5"


@pytest.mark.parametrize(
    "what",
    [
        *("scale", "zero point", "shape", "layer", "weights", "kind"),
        *("version", "true", "text"),
    ],
)
def test_spoilt_file_is_refused(what, tmp_path):
    packed(tmp_path, "eight")
    network = lower(tmp_path)
    path = write_ranges(tmp_path, engine_ranges(network, [mask_inputs()]), 1.0)
    content = json.loads(path.read_text())
    spoil(content, what)
    path.write_text(json.dumps(content))
    with pytest.raises(PackedModelError, match="unusable.*export"):
        read_ranges(tmp_path, network)
    del content["sha256"]  # as if the one who spoilt it had sealed it
    content["sha256"] = content_digest(content)
    path.write_text(json.dumps(content))
    with pytest.raises(PackedModelError, match="unusable.*export") as caught:
        read_ranges(tmp_path, network)
    assert "SHA-256" not in str(caught.value)


def test_binary_file_is_told_in_a_line(tmp_path):
    """Not with all of its bytes."""
    packed(tmp_path, "eight")
    (tmp_path / "activations.json").write_bytes(b"\xff" * 10**5)
    with pytest.raises(PackedModelError, match="not UTF-8") as caught:
        read_ranges(tmp_path, lower(tmp_path))
    assert len(str(caught.value)) < 500


def test_any_changed_digit_is_found(tmp_path):
    packed(tmp_path, "eight")
    network = lower(tmp_path)
    path = write_ranges(tmp_path, engine_ranges(network, [mask_inputs()]), 1.0)
    text = path.read_text()
    draw = np.random.default_rng(0)
    digits = [i for i, letter in enumerate(text) if letter.isdigit()]
    for place in draw.choice(digits, 60, replace=False):
        other = str((int(text[place]) + draw.integers(1, 10)) % 10)
        path.write_text(text[:place] + other + text[place + 1 :])
        try:
            read_ranges(tmp_path, network)
        except PackedModelError:
            continue
        # Digits beyond a float's mean the same number
        assert json.loads(path.read_text()) == json.loads(text)
    # Blanks mean nothing
    path.write_text(json.dumps(json.loads(text), indent=3))
    read_ranges(tmp_path, network)


def test_a_file_without_a_seal_of_its_own_is_still_read(tmp_path):
    packed(tmp_path, "eight")
    network = lower(tmp_path)
    path = write_ranges(tmp_path, engine_ranges(network, [mask_inputs()]), 1.0)
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps({**content, "version": 1}))
    assert set(read_ranges(tmp_path, network)) == set(points(network))


@pytest.mark.parametrize("factor", [1000, 0.01])
def test_ranges_that_fit_no_input_are_refused(tmp_path, factor):
    """Whoever can seal a file cannot make an engine that says nothing."""
    packed(tmp_path, "eight")
    network = lower(tmp_path)
    ranges = engine_ranges(network, [mask_inputs(frames=200)])

    def engine(ranges):
        return lambda x: run(network, x, rounding(network, ranges))

    check_engine("toy", engine(ranges), network, ranges)
    wrong = {
        name: replace(unit, scale=np.float32(unit.scale * factor))
        for name, unit in ranges.items()
    }
    with pytest.raises(ValueError, match="dB from the network without"):
        check_engine("toy", engine(wrong), network, wrong)


def test_weights_that_give_no_number_are_told_apart(tmp_path):
    model = packed(tmp_path, "float")
    model.mask_net.conv_out.weight.fill_(3e38)  # what sums up is too large
    save_packed(model, tmp_path)
    network = lower(tmp_path)
    with pytest.raises(ValueError, match="the model puts out NaN"):
        check_engine("toy", lambda x: run(network, x), network, {})


def test_missing_file_names_the_command(tmp_path):
    packed(tmp_path, "eight")
    with pytest.raises(PackedModelError, match="speechbrain-mpq export"):
        read_ranges(tmp_path, lower(tmp_path))


def test_nan_in_calibration_is_refused(tmp_path):
    packed(tmp_path, "eight")
    bad = mask_inputs()
    bad[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        engine_ranges(lower(tmp_path), [bad])


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{}", '{"a": {"wav": "x.wav"}}'),
        '{"a": {"wav": "x", "doa": 200}}',
        '{"a": {"wav": "x", "doa": true}}',
        '{"a": {"wav": "x", "doa": "60"}}',
        *("[" * 100000, '{"a": {"wav": "x", "doa": ' + "9" * 400 + "}}"),
        '{"a": 1, "a": 2}',
        '{"a": {"wav": "x", "doa": 60, "start": 0, "stop": 800}}',
        '{"a": {"wav": {"file": "x", "start": 9}, "doa": 60}}',
    ],
)
def test_bad_manifest_is_refused(text, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="manifest.json"):
        read_manifest(path)


def test_relative_names_begin_at_the_manifest(tmp_path, monkeypatch):
    """Also where the manifest itself is named by a relative path."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    names = "x.wav", "{data_root}/x.wav", str(folder / "x.wav")
    entries = {name: {"wav": name, "doa": 60} for name in names}
    (folder / "m.json").write_text(json.dumps(entries))
    found = read_manifest("data/m.json")
    assert found == 3 * [(folder / "x.wav", 60.0)]
