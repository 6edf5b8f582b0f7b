"""The mask network in OpenVINO, on a CPU: int8 where the stored bits allow it.

The model is built layer by layer. A weight of 8 bits or fewer is an int8
constant that holds the stored integers; OpenVINO runs such a convolution in
int8 if what it reads passes a FakeQuantize.

Features come as [batch, frames, inputs], which is how they lie in memory, and
the first layer is a matrix product. Behind it tensors are [batch, channels,
1, frames]: with four dimensions OpenVINO keeps channels last throughout, with
three it goes back and forth.
"""

from functools import cache

import numpy as np
import torch

from .engine import MissingExtra

try:
    import openvino as ov
    from openvino import opset13 as ops
except ImportError:
    ov = ops = MissingExtra(
        'the engine "openvino" needs OpenVINO: pip install '
        "'speechbrain_mpq[openvino]' (or openvino>=2026.4)"
    )


LIBRARIES = (ov,)
LEVELS = 256  # of an activation


def compiled(network, ranges, threads=1):
    """Compile a mask network for this processor.

    Arguments
    ---------
    network : lowered.MaskNetwork
    ranges : dict of str -> ActivationRange
        Empty where no layer is int8.
    threads : int
        Threads of OpenVINO.

    Returns
    -------
    network : OpenVINONetwork
    """
    model = build_model(network, ranges)
    return OpenVINONetwork(model, threads, _float_precision(network, ranges))


def write_files(network, ranges, folder):
    """Write the model as OpenVINO's own files, for other programs."""
    path = folder / "mask_network.xml"
    model = build_model(network, ranges)
    try:
        ov.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise OSError(
            f"{path} cannot be written ({error}): is the disk full?"
        ) from error


@cache
def core():
    """Get OpenVINO's runtime, one for the life of the process.

    Its CPU plugin gives the thread that loads it a signal stack and, where
    another thread drops the last reference, frees that stack without taking
    it back: the next signal, as of Ctrl-C or a child's end, then kills the
    process (2026.4, on processors with AMX). So none is ever dropped.

    Returns
    -------
    core : openvino.Core
    """
    return ov.Core()


class OpenVINONetwork:
    """A compiled model that takes and gives PyTorch tensors.

    Arguments
    ---------
    model : openvino.Model
        From `build_model`.
    threads : int
    precision : str
        "f32" or "bf16": of all that is not int8.
    """

    def __init__(self, model, threads=1, precision="f32"):
        self.compiled = core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": False,  # leave placing to the system
            },
        )
        self.request = self.compiled.create_infer_request()

    def __call__(self, inputs):
        """Map [batch, inputs, frames] to [batch, outputs, frames]."""
        frames = inputs.detach().to(torch.float32).transpose(1, 2)
        array = frames.contiguous().numpy()  # features lie so: no copy
        results = self.request.infer([array], share_inputs=True)
        return torch.from_numpy(results[0].copy())


def _float_precision(network, ranges):
    """The type of what is not int8: "bf16" where that is sound and fast."""
    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "f32"
    if not ranges:
        return "bf16"
    if all(layer.is_int8 for layer in network.convolutions()):
        return "f32"
    wrong = any(
        b.conv_out.is_int8 and not b.d_conv.is_int8 for b in network.blocks
    )
    return "f32" if wrong else "bf16"


def build_model(network, ranges):
    """Build the OpenVINO model of a lowered mask network.

    Returns
    -------
    model : openvino.Model
        Maps [batch, frames, inputs] to [batch, outputs, frames].
    """

    def convolve(layer, x, kind=_convolution):
        int8 = layer.name in ranges and layer.is_int8
        if int8:
            x = _fake_quantize(x, ranges[layer.name])
        return kind(layer, x, int8)

    some = ov.Dimension(1, -1)  # with 0 allowed, layouts are not kept
    shape = ov.PartialShape([some, some, ov.Dimension(network.inputs)])
    x = inputs = ops.parameter(shape, np.float32, "features")
    if network.scale_in is not None:
        x = ops.multiply(x, ops.constant(network.scale_in))
    x = convolve(network.conv_in, x, _product)
    for block in network.blocks:
        x = ops.add(x, _block(block, x, convolve))
    x = ops.squeeze(convolve(network.conv_out, x), _axis())
    x.set_friendly_name("mask")
    return ov.Model([x], [inputs], "mask_network")


def stored_integers(model):
    """Collect the int8 constants of a model by layer."""
    integers = {}
    for node in model.get_ops():
        int8 = node.get_type_name() == "Constant" and (
            node.get_element_type() == ov.Type.i8
        )
        if int8:
            integers[node.get_friendly_name()] = node.get_data()
    return integers


def _block(block, x, convolve):
    """A ConvBlock without its skip connection."""
    y = ops.prelu(convolve(block.conv_in, x), _slope(block.slope_in))
    # OpenVINO merges these with the convolution before them, so that no
    # folding into the next one, with its zero padding, would be faster.
    y = ops.multiply(y, _column(block.norm_in.scale))
    y = ops.add(y, _column(block.norm_in.shift))
    y = ops.prelu(convolve(block.d_conv, y), _slope(block.slope_out))
    y = ops.multiply(y, _column(block.gain_out))
    return convolve(block.conv_out, y)


def _product(layer, x, int8):
    """A 1x1 convolution of [batch, frames, inputs], and its bias."""
    weight = _weight(layer, layer.levels.shape[:2], int8)
    y = ops.matmul(x, weight, False, True)
    if layer.bias is not None:
        y = ops.add(y, ops.constant(layer.bias))
    y = ops.unsqueeze(y, ops.constant(np.array([1])))
    return ops.transpose(y, ops.constant(np.array([0, 3, 1, 2])))


def _weight(layer, shape, int8):
    """Weights of a shape: stored integers and scales, or values."""
    if not int8:
        return ops.constant(layer.values().reshape(shape))
    integers = ops.constant(layer.levels.reshape(shape))
    integers.set_friendly_name(layer.name)
    scale = layer.scale.reshape((-1, *[1] * (len(shape) - 1)))
    return ops.multiply(ops.convert(integers, "f32"), ops.constant(scale))


def _convolution(layer, x, int8):
    """A convolution and its bias."""
    shape = (layer.groups, -1) if layer.groups > 1 else (-1,)
    shape = (*shape, layer.levels.shape[1], 1, layer.levels.shape[2])
    weight = _weight(layer, shape, int8)
    kind = ops.group_convolution if layer.groups > 1 else ops.convolution
    padding = [0, layer.padding]
    y = kind(x, weight, [1, 1], padding, padding, [1, layer.dilation])
    return y if layer.bias is None else ops.add(y, _column(layer.bias))


def _fake_quantize(x, unit):
    """Round activations to 256 values."""
    low, high = _column(unit.low), _column(unit.high)
    return ops.fake_quantize(x, low, high, low, high, LEVELS)


def _column(values):
    """[] or [channels] for [batch, channels, 1, frames]."""
    shape = (1, -1, 1, 1) if np.ndim(values) else ()
    return ops.constant(np.asarray(values, np.float32).reshape(shape))


def _slope(value):
    """The one slope of a PReLU."""
    return ops.constant(np.array([value], np.float32))


def _axis():
    """The dimension of length 1."""
    return ops.constant(np.array([2]))
