"""ModelOpt's search for bits: simulated by it, stored by us.

Its gradient score is taken on the separation loss, over the calibration
items. Widths and scales are its own, for every row of a filter.
"""

import modelopt.torch.quantization as mtq
from linear_form import convolutions
from stored import System, fill_, store_rows

POST_TRAINING = True
PACKAGES = ("nvidia-modelopt",)
LEAVES = "norms, PReLUs, biases"
CANDIDATES = (2, 3, 4, 6, 8)
SETTINGS = {
    f"{bits} bit, {algorithm} scales": {"bits": bits, "algorithm": algorithm}
    for algorithm in ("mse", "max")
    for bits in (2.25, 3.0, 4.0, 6.0)
    if algorithm == "mse" or bits in (3.0, 4.0)
}


def format_of(bits, algorithm):
    """ModelOpt's description of weights of some bits, a scale a row.

    Arguments
    ---------
    bits : int
    algorithm : str
        How scales are found.

    Returns
    -------
    dict
    """
    weights = {"num_bits": bits, "axis": 0}
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*weight_quantizer",
                "cfg": weights,
                "enable": True,
            },
        ],
        "algorithm": algorithm,
    }


def build(bench, bits, algorithm):
    """Search, read the chosen widths and scales, store."""
    network, calibration = bench.separator().mask_net, bench.calibration
    inputs, loss = calibration["inputs"], calibration["loss"]
    batches = [slice(i, i + 1) for i in range(len(inputs))]
    formats = [format_of(width, algorithm) for width in CANDIDATES]
    network, _ = mtq.auto_quantize(
        network,
        constraints={"effective_bits": bits},
        quantization_formats=formats,
        module_search_spaces=[
            {
                "module_name_patterns": ["*"],
                "quantization_formats": formats,
                "allow_no_quant": False,
            }
        ],
        data_loader=batches,
        forward_step=lambda model, items: model(inputs[items]),
        loss_func=loss,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    separator = bench.separator()
    grids, weights, chosen = {}, {}, {}
    for name in convolutions(separator.mask_net):
        layer = network.get_submodule(name)
        quantizer = layer.weight_quantizer
        width = quantizer.num_bits
        scale = quantizer.amax.reshape(-1) / (2 ** (width - 1) - 1)
        grids[f"{name}.weight"] = width, -(2 ** (width - 1)), scale.detach()
        weights[f"{name}.weight"] = quantizer(layer.weight).detach()
        chosen[name] = width
    fill_(separator.mask_net, weights)
    sizes = store_rows(
        separator.mask_net, grids, bench.work / "modelopt.safetensors"
    )
    return System(
        separator, *sizes, "safetensors by us", {"bits_of_layers": chosen}
    )
