"""torchao's PARQ: training with a proximal map that hardens to the grid.

The peer of ADMM. Every row of a filter has its own scale, and 2^b levels
around zero without zero itself.
"""

import torch
from finetune import finetune_, total_steps
from linear_form import convolutions
from stored import System, store_rows
from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
from torchao.prototype.parq.quant import UnifQuantizer

POST_TRAINING = False
PACKAGES = ("torchao",)
LEAVES = "norms, PReLUs, biases; depthwise convolutions get 8 bits"
DEPTHWISE_BITS = 8
SETTINGS = {f"{bits} bit": {"bits": bits} for bits in (2, 3, 4)}


def build(bench, bits):
    """Train from the checkpoint, store the rows."""
    separator = bench.separator()
    network, steps = separator.mask_net, total_steps(bench)
    bits_of = dict.fromkeys(convolutions(network, depthwise=False), bits)
    bits_of |= dict.fromkeys(
        convolutions(network, pointwise=False), DEPTHWISE_BITS
    )
    weights = {name: network.get_submodule(name).weight for name in bits_of}
    own = {id(weight) for weight in weights.values()}
    groups = [{"params": [p for p in network.parameters() if id(p) not in own]}]
    for width in sorted(set(bits_of.values())):
        members = [weights[n] for n, b in bits_of.items() if b == width]
        groups.append({"params": members, "quant_bits": width})
    optimizer = QuantOptimizer(
        torch.optim.Adam(groups, lr=bench.hparams["lr"]),
        UnifQuantizer(),
        # From float to the grid over the middle of the training.
        ProxPARQ(anneal_start=steps // 10, anneal_end=steps * 3 // 4),
        quant_per_channel=True,
    )
    finetune_(bench, separator, optimizer)
    grids = {}
    for name, width in bits_of.items():
        levels = optimizer.state[weights[name]]["quants"]
        scale = levels[:, 1] - levels[:, 0]
        grids[f"{name}.weight"] = width, -(2 ** (width - 1) - 0.5), scale
    sizes = store_rows(network, grids, bench.work / "parq.safetensors")
    return System(separator, *sizes, "safetensors by us")
