"""Loading a packed separator as a plain module."""

from pathlib import Path

from ..quantization.packing import load_packed_
from ..separation.loading import build_separator
from ..separation.tcn import fold_norms_


def load_separator(folder):
    """The separator of a packed folder, in eval mode.

    Its weights are plain parameters with the values that the file's integers
    stand for: it can be run, trained on or quantized again. What
    hyperparams.yaml says is executed: do this with folders that you trust.
    `QuantizedSeparator.from_pretrained` executes nothing.

    Arguments
    ---------
    folder : str or Path
        With model.safetensors and the hyperparams.yaml that builds it.

    Returns
    -------
    separator : Separator

    Example
    -------
    >>> separator = load_separator("pretrained/separator_mini")
    >>> sum(p.numel() for p in separator.parameters())
    930302
    """
    path = Path(folder) / "hyperparams.yaml"
    if not path.exists():
        raise FileNotFoundError(
            f"no {path}: name a packed folder, such as packed/ of a finished "
            "run of train.py"
        )
    separator = build_separator(path).eval()
    fold_norms_(separator)  # packed separators have none left
    return load_packed_(separator, folder)
