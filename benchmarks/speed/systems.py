"""What is timed: one mask network, run in every way that a CPU has for it.

All systems run the same values, those of a packed 4-bit model.
"""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from speechbrain_mpq.inference.engines import onnx_engine, openvino_engine
from speechbrain_mpq.inference.engines.engine import torch_network
from speechbrain_mpq.inference.engines.onnx_engine import weight_only_model

CALIBRATION = 8  # batches for NNCF


def systems(folder, network, ranges, batches):
    """Makers of every system, by name; each takes the number of threads.

    Around those of ours features are fused where Numba is there, around all
    others they are PyTorch's.

    Arguments
    ---------
    folder : Path
        Packed folder.
    network : lowered.MaskNetwork
        Of it.
    ranges : dict of str -> ActivationRange
    batches : list of torch.Tensor
        Calibration features.

    Returns
    -------
    makers : dict of str -> callable
        Make functions from features to mask.
    """
    floats = as_float(network)
    gpu = {"torch fp32 (gpu)": partial(on_device, folder, "cuda")}
    return {
        **(gpu if torch.cuda.is_available() else {}),
        "torch fp32": lambda threads: torch_network(folder),
        "torch fp32 compiled": lambda threads: compiled(folder),
        "onnxruntime fp32": partial(
            onnx_engine.ONNXNetwork, weight_only_model(floats)
        ),
        "onnxruntime int8 (ours)": partial(
            onnx_engine.compiled, network, ranges
        ),
        "openvino fp32": partial(openvino, network, {}, "f32"),
        "openvino bf16": partial(openvino, network, {}, "bf16"),
        "openvino int8 (nncf)": partial(nncf_int8, network, batches),
        "openvino int8, torch features": partial(
            openvino_engine.compiled, network, ranges
        ),
        "openvino int8 (ours)": partial(
            openvino_engine.compiled, network, ranges
        ),
    }


def on_device(folder, device, threads):
    """PyTorch on another device; features go there, the mask comes back."""
    network = torch_network(folder).to(device)
    return lambda inputs: network(inputs.to(device)).cpu()


def as_float(network):
    """The network with its weights as plain float values."""

    def plain(layer):
        return replace(
            layer,
            bits=32,
            levels=layer.values(),
            scale=np.ones(len(layer.scale), np.float32),
        )

    blocks = [
        replace(
            block,
            conv_in=plain(block.conv_in),
            d_conv=plain(block.d_conv),
            conv_out=plain(block.conv_out),
        )
        for block in network.blocks
    ]
    return replace(
        network,
        conv_in=plain(network.conv_in),
        blocks=tuple(blocks),
        conv_out=plain(network.conv_out),
    )


def compiled(folder):
    """PyTorch's compiler; the first call compiles."""
    network = torch_network(folder)
    return torch.compile(network, dynamic=False)


def openvino(network, ranges, precision, threads):
    """Our model in floating point."""
    model = openvino_engine.build_model(network, ranges)
    return openvino_engine.OpenVINONetwork(model, threads, precision)


def nncf_int8(network, batches, threads):
    """NNCF's own post-training int8 of the same model."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    chosen = [x.transpose(1, 2).numpy() for x in batches[:CALIBRATION]]
    model = nncf.quantize(
        openvino_engine.build_model(network, {}),
        nncf.Dataset(chosen),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(chosen),
    )
    return openvino_engine.OpenVINONetwork(model, threads)
