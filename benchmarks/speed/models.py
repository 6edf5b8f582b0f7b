"""The two models that are timed, as packed folders of 4 bits."""

from pathlib import Path

import torch

from speechbrain_mpq import load_packed_, quantize_
from speechbrain_mpq.inference.folder import save_separator
from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import ChannelAffine, fold_norms_

MODELS = ("mini", "paper")
BITS = 4


def packed_model(name, folder):
    """Write a packed folder.

    Arguments
    ---------
    name : str
        "mini": the shipped separator. "paper": the paper's size, with random
        weights, which is enough to measure time.
    folder : str or Path

    Returns
    -------
    folder : Path
    """
    torch.manual_seed(0)
    separator = build_separator(f"hparams/models/separator_{name}.yaml").eval()
    fold_norms_(separator)
    if name == "mini":
        load_packed_(separator, "pretrained/separator_mini")
    else:
        for module in separator.modules():
            if isinstance(module, ChannelAffine):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0.0, 0.3)
    quantize_(separator, BITS, exclude=["mask_net.conv_*.bias"])
    return save_separator(separator, Path(folder))
