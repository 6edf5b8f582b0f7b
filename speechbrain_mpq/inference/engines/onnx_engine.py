"""The mask network in ONNX Runtime, and as ONNX files for others.

The model is built in memory from the packed weights and the ranges beside
them, so that no second copy of the weights can differ from the first. In the
int8 model (QDQ) every stored integer up to 8 bits is an INT8 initializer and
every activation between the convolutions is eight bits. The weight-only model
is small: weights are INT2, INT4 or INT8 initializers behind DequantizeLinear
and all is computed in float32. PReLU with its one slope is a LeakyRelu, which
ONNX Runtime has an int8 kernel for.
"""

import numpy as np
import torch

from .engine import MissingExtra
from .lowered import PREFIX, equalize_hidden, one_range

try:
    import ml_dtypes
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    ml_dtypes = onnx = TensorProto = helper = numpy_helper = MissingExtra(
        "writing ONNX models needs onnx: pip install 'speechbrain_mpq[onnx]' "
        "(or onnx>=1.23 ml_dtypes)"
    )
try:
    import onnxruntime
except ImportError:
    onnxruntime = MissingExtra(
        'the engine "onnx" needs ONNX Runtime: pip install '
        "'speechbrain_mpq[onnx]' (or onnxruntime>=1.31)"
    )


OPSET, OPSET_INT2 = 21, 25  # what INT4 and INT2 need
IR_VERSION, IR_VERSION_INT2 = 10, 13
LIBRARIES = (onnxruntime, onnx)


def compiled(network, ranges, threads=1):
    """Compile a mask network in a session of ONNX Runtime.

    Arguments
    ---------
    network : lowered.MaskNetwork
    ranges : dict of str -> ActivationRange
        Empty where no layer is int8.
    threads : int
        Threads of ONNX Runtime.

    Returns
    -------
    network : ONNXNetwork
    """
    if not ranges:
        return ONNXNetwork(weight_only_model(network), threads)
    return ONNXNetwork(portable_int8_model(network, ranges), threads)


def write_files(network, ranges, folder):
    """Write both ONNX files."""
    models = {"mask_network_weights.onnx": weight_only_model(network)}
    if ranges:
        models["mask_network_int8.onnx"] = portable_int8_model(network, ranges)
    for name, model in models.items():
        (folder / name).write_bytes(model.SerializeToString())


def portable_int8_model(network, ranges):
    """Build the int8 model with one range for each activation."""
    equalized = equalize_hidden(network, ranges)
    ranges = {
        name: one_range(unit) if unit.scale.ndim else unit
        for name, unit in ranges.items()
    }
    return _int8_model(equalized, ranges)


def session(model, threads=1):
    """ONNX Runtime's session of a model, on the CPU.

    Arguments
    ---------
    model : onnx.ModelProto, or str
        Model, or the path of its file.
    threads : int
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    content = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"]
    )


class ONNXNetwork:
    """A session that takes and gives PyTorch tensors.

    Arguments
    ---------
    model : onnx.ModelProto, or str
        Model, or the path of its file.
    threads : int
    """

    def __init__(self, model, threads=1):
        model = onnx.load(model) if isinstance(model, str) else model
        self.session = session(_frames_first(model), threads)

    def __call__(self, inputs):
        """Map [batch, inputs, frames] to [batch, outputs, frames]."""
        frames = inputs.detach().to(torch.float32).transpose(1, 2)
        array = frames.contiguous().numpy()  # features lie so: no copy
        (mask,) = self.session.run(["mask"], {"frames": array})
        return torch.from_numpy(mask)


def _frames_first(model):
    """A model that takes features as they lie, [batch, frames, inputs].

    ONNX Runtime then transposes them when they have become eight bits.
    """
    taken = onnx.ModelProto()
    taken.CopyFrom(model)
    graph = taken.graph
    dims = graph.input[0].type.tensor_type.shape.dim
    names = [dim.dim_param or dim.dim_value for dim in dims]
    given = helper.make_tensor_value_info(
        "frames", TensorProto.FLOAT, [names[0], names[2], names[1]]
    )
    name = graph.input[0].name
    turn = helper.make_node("Transpose", ["frames"], [name], perm=[0, 2, 1])
    graph.input[0].CopyFrom(given)
    graph.node.insert(0, turn)
    return taken


def _int8_model(network, ranges):
    """The int8 model."""
    graph = _Graph()

    def convolve(layer, x, slope=None):
        if layer.is_int8:
            x = graph.round(x, ranges[layer.name])
            weight = graph.dequantized(layer, layer.levels, layer.scale)
        else:
            weight = graph.constant(layer.name, layer.values())
        bias = _rounded_bias(graph, layer, ranges)
        x = graph.convolution(layer, x, weight, bias)
        if layer.is_int8:
            x = graph.round(x, ranges[f"{layer.name}:out"])
        if slope is None:
            return x
        x = graph.add("LeakyRelu", x, alpha=slope)
        if layer.is_int8:
            x = graph.round(x, ranges[f"{layer.name}:prelu"])
        return x

    return _model(graph, network, convolve)


def weight_only_model(network):
    """Build the small model: few bits on disk, computed in float32."""
    graph = _Graph()

    def convolve(layer, x, slope=None):
        if layer.levels.dtype == np.float32:
            weight = graph.constant(layer.name, layer.levels)
        else:
            integers, step, offset = narrowed(layer.levels)
            weight = graph.dequantized(layer, integers, layer.scale * step)
            if offset:
                half = layer.scale[:, None, None] * np.float32(offset)
                weight = graph.add("Add", weight, graph.constant(None, half))
            graph.int2 |= integers.dtype == ml_dtypes.int2
        bias = None if layer.bias is None else graph.constant(None, layer.bias)
        x = graph.convolution(layer, x, weight, bias)
        return x if slope is None else graph.add("LeakyRelu", x, alpha=slope)

    return _model(graph, network, convolve)


def narrowed(levels):
    """Narrow stored levels to the smallest integers that ONNX has.

    Odd levels, those of a table without zero, are counted: q = 2 i + 1.

    Example
    -------
    >>> narrowed(np.array([-1, 0, 1], np.int8))  # doctest: +SKIP
    (array([-1, 0, 1], dtype=int2), 1, 0)
    >>> narrowed(np.array([-15, 1, 15], np.int8))  # doctest: +SKIP
    (array([-8, 0, 7], dtype=int4), 2, 1)
    """
    odd = levels.size and (levels % 2 != 0).all()
    choices = [(levels, 1, 0)]
    if odd:
        choices.append((levels // 2, 2, 1))
    for kind, least, most in (
        (ml_dtypes.int2, -2, 1),
        (ml_dtypes.int4, -8, 7),
    ):
        for integers, step, offset in choices:
            if least <= integers.min() and integers.max() <= most:
                return integers.astype(kind), step, offset
    return levels, 1, 0


def stored_integers(model):
    """Collect the integer weights of a model by layer."""
    integers = {}
    for item in model.graph.initializer:
        is_weight = item.name.startswith(PREFIX)
        if is_weight and item.data_type != TensorProto.FLOAT:
            integers[item.name] = numpy_helper.to_array(item)
    return integers


class _Graph:
    """Nodes and initializers of a graph under construction."""

    def __init__(self):
        self.nodes, self.initializers = [], []
        self.int2 = False

    def add(self, kind, *inputs, **attributes):
        """Append a node; the name of its output."""
        name = f"{kind}_{len(self.nodes)}"
        node = helper.make_node(kind, list(inputs), [name], name, **attributes)
        self.nodes.append(node)
        return name

    def constant(self, name, values):
        """Append an initializer; its name."""
        name = name or f"constant_{len(self.initializers)}"
        tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
        self.initializers.append(tensor)
        return name

    def column(self, values):
        """A constant for every channel."""
        return self.constant(None, values.astype(np.float32)[:, None])

    def dequantized(self, layer, integers, scale):
        """Weights from integers and a scale for each output channel."""
        scale = self.constant(None, scale.astype(np.float32))
        integers = self.constant(layer.name, integers)
        return self.add("DequantizeLinear", integers, scale, axis=0)

    def round(self, x, unit):
        """An activation, rounded to eight bits and back."""
        scale = self.constant(None, np.float32(unit.scale))
        zero_point = self.constant(None, np.uint8(unit.zero_point))
        x = self.add("QuantizeLinear", x, scale, zero_point)
        return self.add("DequantizeLinear", x, scale, zero_point)

    def convolution(self, layer, x, weight, bias=None):
        """A convolution and its bias."""
        return self.add(
            "Conv",
            *([x, weight] if bias is None else [x, weight, bias]),
            dilations=[layer.dilation],
            group=layer.groups,
            kernel_shape=[layer.levels.shape[2]],
            pads=[layer.padding] * 2,
        )


def _rounded_bias(graph, layer, ranges):
    """A bias as the int32 of the accumulator, which int8 kernels want."""
    if layer.bias is None:
        return None
    if not layer.is_int8 or (layer.scale == 0).any():
        return graph.constant(None, layer.bias)
    step = (ranges[layer.name].scale * layer.scale).astype(np.float32)
    integers = np.clip(np.round(layer.bias / step), -(2**30), 2**30)
    names = [
        graph.constant(None, values)
        for values in (integers.astype(np.int32), step)
    ]
    return graph.add("DequantizeLinear", *names, axis=0)


def _model(graph, network, convolve):
    """The chain of the mask network, its convolutions made by `convolve`."""
    x = "features"
    if network.scale_in is not None:
        x = graph.add("Mul", x, graph.column(network.scale_in))
    x = convolve(network.conv_in, x)
    for block in network.blocks:
        y = convolve(block.conv_in, x, block.slope_in)
        if (block.norm_in.scale != 1).any():
            y = graph.add("Mul", y, graph.column(block.norm_in.scale))
        y = graph.add("Add", y, graph.column(block.norm_in.shift))
        y = convolve(block.d_conv, y, block.slope_out)
        if (block.gain_out != 1).any():
            y = graph.add("Mul", y, graph.column(block.gain_out))
        x = graph.add("Add", x, convolve(block.conv_out, y))
    convolve(network.conv_out, x)
    return _finish(graph, network)


def _finish(graph, network):
    """A checked model of a finished graph."""
    graph.nodes[-1].output[0] = "mask"
    shapes = {"features": network.inputs, "mask": network.outputs}
    features, mask = (
        helper.make_tensor_value_info(
            name, TensorProto.FLOAT, ["batch", channels, "frames"]
        )
        for name, channels in shapes.items()
    )
    body = helper.make_graph(
        graph.nodes, "mask_network", [features], [mask], graph.initializers
    )
    opset = helper.make_opsetid("", OPSET_INT2 if graph.int2 else OPSET)
    model = helper.make_model(
        body,
        opset_imports=[opset],
        producer_name="speechbrain_mpq",
        ir_version=IR_VERSION_INT2 if graph.int2 else IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    return model
