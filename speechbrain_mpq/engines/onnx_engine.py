"""The mask network in ONNX Runtime, on a CPU: an int8 model made at load.

The model is built in memory from the packed weights and the ranges beside
them, so that no second copy of the weights can differ from the first.
"""

import torch

from .equalize_hidden import equalize_hidden, one_range
from .extras import MissingExtra
from .onnx_models import int8_model, onnx, weight_only_model

try:
    import onnxruntime
except ImportError:
    onnxruntime = MissingExtra(
        'the engine "onnx" needs ONNX Runtime: pip install '
        "'speechbrain_mpq[onnx]' (or onnxruntime>=1.31)"
    )

LIBRARIES = (onnxruntime, onnx)


def compiled(network, ranges, threads=1):
    """A mask network in a session of ONNX Runtime.

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
    """Write both ONNX files.

    Arguments
    ---------
    network : lowered.MaskNetwork
    ranges : dict of str -> ActivationRange
    folder : Path
    """
    models = {"mask_network_weights.onnx": weight_only_model(network)}
    if ranges:
        models["mask_network_int8.onnx"] = portable_int8_model(network, ranges)
    for name, model in models.items():
        (folder / name).write_bytes(model.SerializeToString())


def portable_int8_model(network, ranges):
    """The int8 model with one range for each activation.

    Arguments
    ---------
    network : lowered.MaskNetwork
    ranges : dict of str -> ActivationRange
        From `calibration.engine_ranges`.

    Returns
    -------
    model : onnx.ModelProto
    """
    equalized = equalize_hidden(network, ranges)
    ranges = {
        name: one_range(unit) if unit.scale.ndim else unit
        for name, unit in ranges.items()
    }
    return int8_model(equalized, ranges)


class ONNXNetwork:
    """A session that takes and gives PyTorch tensors.

    Arguments
    ---------
    model : onnx.ModelProto, or str
        Model, or the path of its file.
    threads : int
    """

    def __init__(self, model, threads=1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        content = model if isinstance(model, str) else model.SerializeToString()
        self.session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, inputs):
        """Map [batch, inputs, frames] to [batch, outputs, frames]."""
        array = inputs.detach().to(torch.float32).contiguous().numpy()
        (mask,) = self.session.run(["mask"], {"features": array})
        return torch.from_numpy(mask)
