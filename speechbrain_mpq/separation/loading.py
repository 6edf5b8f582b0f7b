"""Building a separator from its YAML file."""

from pathlib import Path

from hyperpyyaml import load_hyperpyyaml

from .separator import Separator


def build_separator(path, **overrides):
    """Make the separator that a YAML file describes, with new weights.

    Arguments
    ---------
    path : str or Path
        YAML file with a key `separator`, such as
        hparams/models/separator_mini.yaml.
    **overrides
        Keys of that file to change.

    Returns
    -------
    separator : Separator

    Example
    -------
    >>> path = "hparams/models/separator_mini.yaml"
    >>> build_separator(path, channels=16, hidden=32).mask_net.conv_in
    Conv1d(3598, 16, kernel_size=(1,), stride=(1,))
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"no model file {path}: name one such as "
            "hparams/models/separator_mini.yaml with --separator_file"
        )
    with open(path, encoding="utf-8") as source:
        hparams = load_hyperpyyaml(source, overrides)
    separator = hparams.get("separator")
    if not isinstance(separator, Separator):
        raise ValueError(f"{path} has no key `separator: !new:...Separator`")
    return separator
