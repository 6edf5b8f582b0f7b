"""NNCF's mixed weight compression of the linear form, run by OpenVINO.

A share `ratio` of the weights gets the low width, the layers that its
sensitivity metric ranks highest get 8 bits. OpenVINO computes in float32 from
the compressed weights; its own default would quantize activations too.
"""

import nncf
import openvino
import torch
from linear_form import to_linear_
from nncf.quantization.advanced_parameters import (
    AdvancedCompressionParameters,
    GroupSizeFallbackMode,
)
from stored import System

POST_TRAINING = True
PACKAGES = ("nncf", "openvino")
LEAVES = "norms, PReLUs, biases; depthwise convolutions get 8 bits"
RUNTIME = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "INFERENCE_NUM_THREADS": 1,
}
SETTINGS = {"int8": {"mode": "INT8_SYM"}}
RATIOS = {4: (1, 0.5), 3: (1,), 2: (1, 0.5)}
SETTINGS |= {
    f"int{bits} ratio {ratio}": {"mode": f"INT{bits}_SYM", "ratio": ratio}
    for bits, ratios in RATIOS.items()
    for ratio in ratios
}
# The first layer's rows of 3598 weights have no groups: 8 bits, by NNCF.
SETTINGS |= {
    f"int{bits} in groups": {"mode": f"INT{bits}_SYM", "ratio": 1, "group": 64}
    for bits in (4, 2)
}


class Compiled(torch.nn.Module):
    """A network that OpenVINO runs.

    Arguments
    ---------
    path : Path
        The .xml file.
    """

    def __init__(self, path):
        super().__init__()
        core = openvino.Core()
        self._run = core.compile_model(core.read_model(path), "CPU", RUNTIME)

    def forward(self, x):
        """Apply to [batch, channels, frames]."""
        return torch.from_numpy(self._run(x.numpy())[0].copy())


def build(bench, mode, ratio=None, group=-1):
    """Convert, compress with calibration data, save, load, compile."""
    separator, inputs = bench.separator(), bench.calibration["inputs"]
    network = separator.mask_net
    to_linear_(network)
    channels = inputs.shape[1]
    model = openvino.convert_model(
        network, example_input=inputs[:1], input=[-1, channels, -1]
    )
    options = {}
    if ratio is not None:
        options = {
            "ratio": ratio,
            "group_size": group,
            "all_layers": True,
            "scale_estimation": True,
            "dataset": nncf.Dataset([x[None].numpy() for x in inputs]),
            "advanced_parameters": AdvancedCompressionParameters(
                group_size_fallback_mode=GroupSizeFallbackMode.ADJUST
            ),
        }
        if ratio < 1:
            metric = nncf.SensitivityMetric.HESSIAN_INPUT_ACTIVATION
            options["sensitivity_metric"] = metric
    compressed = nncf.compress_weights(
        model, mode=getattr(nncf.CompressWeightsMode, mode), **options
    )
    path = bench.work / "nncf.xml"
    openvino.save_model(compressed, path, compress_to_fp16=False)
    stored = path.with_suffix(".bin").stat().st_size
    separator.mask_net = Compiled(path)
    return System(
        separator,
        stored,
        stored + path.stat().st_size,
        "its .bin (container: with its .xml)",
    )
