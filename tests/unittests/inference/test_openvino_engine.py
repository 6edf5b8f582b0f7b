"""The OpenVINO engine against PyTorch, layer by layer and at the edges."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import FORMS, mask_inputs, packed, small_separator

from speechbrain_mpq import dequantize_, quantize_, save_packed
from speechbrain_mpq.inference.engines import (
    openvino_engine as engine,  # noqa: E402
)
from speechbrain_mpq.inference.engines.activations import write_ranges
from speechbrain_mpq.inference.engines.engine import check_engine, load_network
from speechbrain_mpq.inference.engines.lowered import (
    decibels,
    lower,
    rounding,
    run,
)
from speechbrain_mpq.inference.exporting import engine_ranges

pytest.importorskip("openvino", reason="the extra openvino is not installed")


def exported(folder, form, **options):
    """Pack, calibrate; the network and its ranges."""
    packed(folder, form, **options)
    network = lower(folder)
    ranges = engine_ranges(network, [mask_inputs(frames=100)])
    write_ranges(folder, ranges, 1.0)
    return network, ranges


@pytest.mark.parametrize("scale_inputs", [False, True])
def test_float_model_is_pytorch_also_at_the_edges(scale_inputs, tmp_path):
    model = packed(tmp_path, "midtread_4", scale_inputs)
    network = lower(tmp_path)
    compiled = engine.OpenVINONetwork(engine.build_model(network, {}))
    inputs = mask_inputs(batch=2, frames=17)
    wanted, given = model.mask_net(inputs), compiled(inputs)
    assert decibels(wanted, given) > 90
    for edge in (slice(0, 3), slice(-3, None)):
        assert torch.allclose(wanted[..., edge], given[..., edge], atol=1e-4)


@pytest.mark.parametrize("form", ["midrise_6", "slices", "sixteen"])
def test_engine_rounds_like_the_reference(form, tmp_path):
    network, ranges = exported(tmp_path, form)
    compiled = load_network(tmp_path, "openvino")
    inputs = mask_inputs(seed=2)
    wanted = run(network, inputs, rounding(network, ranges))
    # bf16 runs what is wider than 8 bits, where the processor has it.
    assert decibels(wanted, compiled(inputs)) > 25


@pytest.mark.parametrize("form", [f for f in FORMS if f != "float"])
def test_constants_are_the_stored_integers(form, tmp_path):
    network, ranges = exported(tmp_path, form)
    engine.write_files(network, ranges, tmp_path)
    model = engine.core().read_model(tmp_path / "mask_network.xml")
    found = engine.stored_integers(model)
    int8 = {x.name: x.levels for x in network.convolutions() if x.is_int8}
    assert set(found) == set(int8)
    for name, levels in int8.items():
        assert np.array_equal(found[name].reshape(levels.shape), levels)


def test_runs_in_int8(tmp_path):
    network, ranges = exported(tmp_path, "midtread_4")
    compiled = engine.compiled(network, ranges).compiled
    kinds = [
        str(node.get_rt_info()["primitiveType"].astype(str)).lower()
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].astype(str)
        in ("Convolution", "FullyConnected")
    ]
    assert len(kinds) == len(list(network.convolutions()))
    assert all(kind.endswith("i8") for kind in kinds), kinds


def test_any_number_of_frames(tmp_path):
    exported(tmp_path, "eight")
    compiled = load_network(tmp_path, "openvino")
    long = compiled(mask_inputs(frames=64))
    for frames in (1, 40, 64):
        short = compiled(mask_inputs(frames=64)[..., :frames])
        assert short.shape == (1, 10, frames)
    assert torch.equal(compiled(mask_inputs(frames=64)), long)
    assert compiled.context_frames == lower(tmp_path).context_frames == 6


def test_two_threads_give_the_same(tmp_path):
    exported(tmp_path, "midrise_2")
    inputs = mask_inputs()
    one, two = (load_network(tmp_path, "openvino", t) for t in (1, 2))
    assert decibels(one(inputs), two(inputs)) > 60


DROPPED_ELSEWHERE = """
import faulthandler, os, signal, sys, threading
faulthandler.enable()  # gives this thread a signal stack, as pytest does
signal.signal(signal.SIGUSR1, lambda *_: None)
from speechbrain_mpq.inference.engines.engine import load_network
held = [load_network(sys.argv[1], "openvino")]
dropping = threading.Thread(target=held.clear)
dropping.start()
dropping.join()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_after_another_thread_dropped_the_network(tmp_path):
    exported(tmp_path, "midrise_2")
    command = [sys.executable, "-c", DROPPED_ELSEWHERE, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)


def test_mixed_widths(tmp_path):
    model = small_separator()
    plan = quantize_(model, 4)
    for bits, layer in ((16, "conv_1x1_in"), (12, "d_conv"), (9, "norm_in")):
        name = f"mask_net.tcn_0_1.{layer}"
        cluster = plan.clusters[name]
        plan.clusters[name] = type(cluster)(
            bits, cluster.parameters, cluster.tensors, cluster.scales
        )
    dequantize_(model)
    quantize_(model, plan)
    save_packed(model, tmp_path)
    network = lower(tmp_path)
    ranges = engine_ranges(network, [mask_inputs(frames=100)])
    inputs = mask_inputs(seed=2)
    wanted = run(network, inputs, rounding(network, ranges))
    given = engine.compiled(network, ranges)(inputs)
    assert decibels(wanted, given) > 25


def test_wrong_numbers_are_refused(tmp_path):
    network, ranges = exported(tmp_path, "eight")
    compiled = engine.compiled(network, ranges)
    check_engine("openvino", compiled, network, ranges)
    with pytest.raises(ValueError, match="other numbers.*torch"):
        check_engine("openvino", lambda x: -compiled(x), network, ranges)
