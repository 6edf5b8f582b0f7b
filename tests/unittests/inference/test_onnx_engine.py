"""Both ONNX models against PyTorch, in stock ONNX Runtime."""

import numpy as np
import pytest
from helpers import FORMS, mask_inputs, packed

from speechbrain_mpq.inference.engines import onnx_engine  # noqa: E402
from speechbrain_mpq.inference.engines.activations import write_ranges
from speechbrain_mpq.inference.engines.engine import load_network
from speechbrain_mpq.inference.engines.lowered import decibels, lower
from speechbrain_mpq.inference.exporting import engine_ranges

for module in ("onnx", "ml_dtypes", "onnxruntime"):
    pytest.importorskip(module, reason="the extra onnx is not installed")


def exported(folder, form, **options):
    """Pack, calibrate; the quantized module, the network and its ranges."""
    model = packed(folder, form, **options)
    network = lower(folder)
    ranges = engine_ranges(network, [mask_inputs(frames=100)])
    write_ranges(folder, ranges, 1.0)
    return model, network, ranges


@pytest.mark.parametrize("form", FORMS)
def test_weight_only_model_is_pytorch(form, tmp_path):
    model = packed(tmp_path, form, scale_inputs=form != "eight")
    network = lower(tmp_path)
    session = onnx_engine.ONNXNetwork(onnx_engine.weight_only_model(network))
    inputs = mask_inputs(batch=2)
    assert decibels(model.mask_net(inputs), session(inputs)) > 90


@pytest.mark.parametrize("form", ["eight", "midrise_6", "slices", "sixteen"])
def test_int8_model_is_near_pytorch(form, tmp_path):
    model, _, _ = exported(tmp_path, form)
    inputs = mask_inputs(seed=2)
    given = load_network(tmp_path, "onnx")(inputs)
    assert decibels(model.mask_net(inputs), given) > 20


@pytest.mark.parametrize("form", [f for f in FORMS if f != "float"])
def test_initializers_are_the_stored_integers(form, tmp_path):
    _, network, ranges = exported(tmp_path, form)
    small = onnx_engine.stored_integers(onnx_engine.weight_only_model(network))
    int8 = onnx_engine.stored_integers(
        onnx_engine.portable_int8_model(network, ranges)
    )
    for layer in network.convolutions():
        _, step, offset = onnx_engine.narrowed(layer.levels)
        levels = small[layer.name].astype(np.int32) * step + offset
        assert np.array_equal(levels, layer.levels)
        if layer.is_int8:
            assert np.array_equal(int8[layer.name], layer.levels)


def test_bits_on_disk():
    for levels, kind in (
        ([-1, 0, 1], "int2"),
        ([-3, -1, 1, 3], "int2"),  # midrise, 2 bits
        ([-7, 0, 7], "int4"),
        ([-15, 15], "int4"),  # midrise, 4 bits
        ([-31, 31], "int8"),
        ([-32767, 0], "int16"),
    ):
        dtype = np.int16 if kind == "int16" else np.int8
        found, step, offset = onnx_engine.narrowed(np.array(levels, dtype))
        assert found.dtype.name == kind
        assert (found.astype(int) * step + offset == levels).all()


def test_files_are_written_whole(tmp_path):
    _, network, ranges = exported(tmp_path, "midtread_4")
    onnx_engine.write_files(network, ranges, tmp_path)
    inputs = mask_inputs()
    wanted = load_network(tmp_path, "onnx")(inputs)
    path = str(tmp_path / "mask_network_int8.onnx")
    assert decibels(wanted, onnx_engine.ONNXNetwork(path)(inputs)) > 60
