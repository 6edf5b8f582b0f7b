"""Any packed network as an ONNX model that runs its stored integers.

PyTorch's exporter writes the graph; then every weight that the packed file
holds as integers gets them back. Linear layers and LSTMs of 8 bits or fewer
compute with integers: what they read is rounded to eight bits as it comes
(ONNX Runtime's dynamic quantization, no calibration). An embedding looks its
integers up. All other weights, such as those of convolutions, stand behind
DequantizeLinear and are computed in float32.

A weight is known by its values: the exporter renames, transposes and reorders.
"""

import io
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from ...quantization.codebook import dequantize
from ...quantization.groups import first_row, split_name
from .lowered import LARGEST_INT8
from .onnx_engine import TensorProto, helper, ml_dtypes, numpy_helper, onnx

OPSET, IR_VERSION = 21, 10  # DequantizeLinear of int4 and int16
CONTRIBUTED = "com.microsoft"  # operators that ONNX Runtime adds
# Gates in ONNX's order, as places in PyTorch's: i, f, g, o and r, z, n.
GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


@dataclass(frozen=True)
class StoredWeight:
    """A parameter as it is stored: levels times the scale of their row."""

    levels: np.ndarray  # int8 or int16, as the parameter's shape
    scale: np.ndarray  # [rows], float32

    @property
    def values(self):
        """Float32, what PyTorch computes with."""
        shape = (-1,) + (1,) * (self.levels.ndim - 1)
        levels = torch.from_numpy(self.levels)
        return dequantize(
            levels, torch.from_numpy(self.scale.reshape(shape))
        ).numpy()

    def rows(self, order):
        """Its rows in another order."""
        return StoredWeight(self.levels[order], self.scale[order])


def stored_weights(packed):
    """The parameters of a packed file that are integers, whole ones only.

    Arguments
    ---------
    packed : unpacking.PackedModel

    Returns
    -------
    dict of str -> StoredWeight
        Parameters with rows in floating point are left out.
    """
    pieces = {}
    for name, tensor in packed.quantized.items():
        parameter, rows = split_name(name)
        pieces.setdefault(parameter, []).append((first_row(rows), tensor))
    stored = {}
    for name, slices in pieces.items():
        tensors = [tensor for _, tensor in sorted(slices, key=lambda x: x[0])]
        if name in packed.floats or not tensors[0].integers.ndim:
            continue
        levels = np.concatenate([t.integers.numpy() for t in tensors])
        scale = np.concatenate(
            [
                np.broadcast_to(t.alpha.numpy().reshape(-1), len(t.integers))
                for t in tensors
            ]
        )
        most = np.abs(levels).max(initial=0)
        kind = np.int8 if most <= LARGEST_INT8 else np.int16
        stored[name] = StoredWeight(levels.astype(kind), scale)
    return stored


def integer_model(module, inputs, stored, names, axes):
    """Export a module, with stored integers in the place of its weights.

    Arguments
    ---------
    module : torch.nn.Module
        In eval mode; its weights have the stored values.
    inputs : tuple of torch.Tensor
        Something that it takes.
    stored : iterable of StoredWeight
    names : tuple of (list of str, list of str)
        Of inputs and outputs.
    axes : dict of str -> dict of int -> str
        Of these, the dimensions that may change.

    Returns
    -------
    model : onnx.ModelProto
    used : collections.Counter
        "integer", "looked up" and "dequantized": weights by what is done with
        them.
    """
    if any(part.training for part in module.modules()):
        raise ValueError("a module in training mode: call eval() on it first")
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(
            module,
            inputs,
            buffer,
            input_names=names[0],
            output_names=names[1],
            dynamic_axes=axes,
            opset_version=17,
            # EVAL would multiply norms into the weights, which are integers.
            training=torch.onnx.TrainingMode.PRESERVE,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    model = onnx.version_converter.convert_version(model, OPSET)
    graph = _Rewriter(model.graph, stored)
    graph.rewrite()
    if graph.contributed:
        model.opset_import.append(helper.make_opsetid(CONTRIBUTED, 1))
    model.producer_name, model.ir_version = "speechbrain_mpq", IR_VERSION
    onnx.checker.check_model(model)
    return model, graph.used


class _Rewriter:
    """Puts stored integers in the place of a graph's float weights."""

    def __init__(self, graph, stored):
        self.graph = graph
        self.floats = {
            item.name: numpy_helper.to_array(item) for item in graph.initializer
        }
        self.stored = {}  # values, as bytes -> StoredWeight
        for weight in stored:
            self.stored[_key(weight.values)] = weight
        self.made = {}
        self.nodes = []
        self.used = Counter()
        self.contributed = False

    def rewrite(self):
        """Rewrite all nodes, and drop the weights that none reads any more."""
        ways = {
            "MatMul": self._matmul,
            "Gemm": self._gemm,
            "LSTM": self._lstm,
            "Gather": self._gather,
        }
        for node in self.graph.node:
            done = node.op_type in ways and ways[node.op_type](node)
            if not done:
                self._dequantize(node)
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input}
        read |= {output.name for output in self.graph.output}
        kept = [item for item in self.graph.initializer if item.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend([*kept, *self.made.values()])

    def _find(self, name):
        """The stored weight of an initializer, also if it is transposed."""
        values = self.floats.get(name)
        if values is None or values.dtype != np.float32:
            return None, False
        weight = self.stored.get(_key(values))
        if weight is not None:
            return weight, False
        if values.ndim == 2:
            return self.stored.get(_key(values.T)), True
        return None, False

    def _constant(self, name, values):
        """An initializer, made once; its name."""
        if name not in self.made:
            values = np.ascontiguousarray(values)
            self.made[name] = numpy_helper.from_array(values, name)
        return name

    def _add(self, kind, inputs, output=None, **attributes):
        """Append a node; the name of its output."""
        output = output or f"{kind}_integer_{len(self.nodes)}"
        node = helper.make_node(kind, inputs, [output], output, **attributes)
        self.nodes.append(node)
        return output

    def _product(self, x, name, weight, output):
        """Rows of x times a stored weight, in integers."""
        levels = self._constant(f"{name}.levels", weight.levels.T)
        scale = self._constant(f"{name}.scale", weight.scale)
        zero = self._constant("int8_zero", np.zeros((), np.int8))
        parts = [f"{output}.{part}" for part in ("integers", "scale", "zero")]
        node = helper.make_node("DynamicQuantizeLinear", [x], parts)
        self.nodes.append(node)
        total = self._add("MatMulInteger", [parts[0], levels, parts[2], zero])
        total = self._add("Cast", [total], to=TensorProto.FLOAT)
        scale = self._add("Mul", [parts[1], scale])
        self.used["integer"] += 1
        return self._add("Mul", [total, scale], output)

    def _matmul(self, node):
        """A linear layer without bias, or before it."""
        weight, transposed = self._find(node.input[1])
        if weight is None or not transposed or weight.levels.dtype != np.int8:
            return False
        self._product(node.input[0], node.input[1], weight, node.output[0])
        return True

    def _gemm(self, node):
        """A linear layer with its bias."""
        attributes = {
            a.name: helper.get_attribute_value(a) for a in node.attribute
        }
        weight, transposed = self._find(node.input[1])
        plain = attributes.get("alpha", 1) == attributes.get("beta", 1) == 1
        rows = transposed != bool(attributes.get("transB", 0))
        if weight is None or weight.levels.dtype != np.int8 or not plain:
            return False
        if not rows or attributes.get("transA", 0):
            return False
        bias = node.input[2:] if len(node.input) > 2 else None
        output = f"{node.output[0]}.product" if bias else node.output[0]
        x = self._product(node.input[0], node.input[1], weight, output)
        if bias:
            self._add("Add", [x, *bias], node.output[0])
        return True

    def _lstm(self, node):
        """An LSTM; both its matrices must be of 8 bits or fewer."""
        matrices = [self._recurrent("LSTM", name) for name in node.input[1:3]]
        attributes = {
            a.name: helper.get_attribute_value(a) for a in node.attribute
        }
        if None in matrices or set(attributes) - {"hidden_size", "direction"}:
            return False
        inputs = [*node.input, *[""] * (8 - len(node.input))]
        for place, (levels, scale) in enumerate(matrices, 1):
            name = node.input[place]
            inputs[place] = self._constant(
                f"{name}.levels", levels.transpose(0, 2, 1)
            )
            zero = np.zeros_like(scale, np.int8)
            inputs.append(self._constant(f"{name}.scale", scale))
            inputs.append(self._constant(f"{name}.zero", zero))
        made = helper.make_node(
            "DynamicQuantizeLSTM",
            inputs,
            node.output,
            node.name,
            domain=CONTRIBUTED,
            **attributes,
        )
        self.nodes.append(made)
        self.contributed = True
        self.used["integer"] += 2
        return True

    def _recurrent(self, kind, name):
        """Levels [directions, gates x size, inputs] and scales, or None."""
        values, weights = self.floats.get(name), []
        if values is None:
            return None
        gates = GATES[kind]
        for matrix in values:
            size = len(matrix) // len(gates)
            # PyTorch's order: the inverse of ONNX's.
            blocks = matrix.reshape(len(gates), size, -1)
            order = np.argsort(gates)
            weight = self.stored.get(_key(np.concatenate(blocks[order])))
            if weight is None or weight.levels.dtype != np.int8:
                return None
            rows = np.arange(len(matrix)).reshape(len(gates), size)
            weights.append(weight.rows(rows[list(gates)].reshape(-1)))
        return tuple(
            np.stack([getattr(weight, part) for weight in weights])
            for part in ("levels", "scale")
        )

    def _gather(self, node):
        """An embedding: rows of integers, times their scale."""
        weight, transposed = self._find(node.input[0])
        attributes = {
            a.name: helper.get_attribute_value(a) for a in node.attribute
        }
        if weight is None or transposed or attributes.get("axis", 0):
            return False
        name, index = node.input[0], node.input[1]
        if (weight.scale == weight.scale[0]).all():
            scale = self._constant(f"{name}.step", weight.scale[:1])
        else:
            column = weight.scale.reshape(
                (-1,) + (1,) * (weight.levels.ndim - 1)
            )
            scale = self._constant(f"{name}.steps", column)
            scale = self._add("Gather", [scale, index])
        rows = self._constant(f"{name}.rows", weight.levels)
        rows = self._add("Gather", [rows, index])
        rows = self._add("Cast", [rows], to=TensorProto.FLOAT)
        self._add("Mul", [rows, scale], node.output[0])
        self.used["looked up"] += 1
        return True

    def _dequantize(self, node):
        """Float weights of any other node come from their integers."""
        for place, name in enumerate(node.input):
            weight, transposed = self._find(name)
            if weight is None:
                continue
            output = f"{name}.values"
            if output not in {o for n in self.nodes for o in n.output}:
                levels = weight.levels.T if transposed else weight.levels
                if -8 <= levels.min() and levels.max() <= 7:
                    levels = levels.astype(ml_dtypes.int4)
                self._add(
                    "DequantizeLinear",
                    [
                        self._constant(f"{name}.stored", levels),
                        self._constant(f"{name}.scale", weight.scale),
                    ],
                    output,
                    axis=int(transposed),
                )
                self.used["dequantized"] += 1
            node.input[place] = output


def _key(values):
    """What finds a weight by its values."""
    return values.shape, np.ascontiguousarray(values).tobytes()
