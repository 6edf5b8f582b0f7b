"""DiffQ: bits learned with the weights, for every eight of them.

Only called, never part of this project: its licence is CC BY-NC 4.0.
"""

import diffq
import torch
from finetune import finetune_
from stored import System, tensor_bytes

POST_TRAINING = False
PACKAGES = ("diffq",)
LEAVES = "nothing; norms, PReLUs and biases are float16, by its own choice"
# dB of SI-SNR that a MiB is worth.
SETTINGS = {f"penalty {p}": {"penalty": p} for p in (3, 10, 30, 100)}
# Its advice of 1e-3 moves no group by two bits in our number of steps.
BITS_LR = 0.02


def build(bench, penalty):
    """Train weights and bits, save DiffQ's own state, load it anew."""
    separator = bench.separator()
    network, rate = separator.mask_net, bench.hparams["lr"]
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    quantizer = diffq.DiffQuantizer(
        network,
        group_size=8,
        min_size=0.001,
        float16=True,
        exclude=["conv_*.bias"],  # 514 values are no groups of 8
    )
    quantizer.setup_optimizer(optimizer, lr_factor=BITS_LR / rate)
    finetune_(
        bench,
        separator,
        optimizer,
        penalty=lambda: penalty * quantizer.model_size(),
    )
    path = bench.work / "diffq.pt"
    torch.save(quantizer.get_quantized_state(), path)
    state = torch.load(path, weights_only=False)
    fresh = bench.separator()
    diffq.restore_quantized_state(fresh.mask_net, state)
    claimed = round(quantizer.true_model_size() * 2**20)
    return System(
        fresh,
        tensor_bytes(_tensors(state)),
        path.stat().st_size,
        "its quantized state (container: the pickle)",
        {"bytes_by_its_own_count": claimed},
    )


def _tensors(state):
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)
