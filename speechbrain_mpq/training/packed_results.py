"""From the output folder of a finished training to a packed model."""

import re
from pathlib import Path

from hyperpyyaml import load_hyperpyyaml

from ..quantization.plan import BitPlan
from .checkpoints import recover_whole
from .choose import METHODS, method_of
from .plan_store import SETTINGS, earlier_settings
from .quantizer import Quantizer

ANCHOR = re.compile(r"(?<=\s)([&*])id(\d+)\b")  # as ruamel.yaml names them


def pack_results(output_folder, packed=None, min_key=None, max_key=None):
    """Writes the best checkpoint of a quantized training as a packed model.

    Builds the modules anew from the folder's own hyperparams.yaml, and needs
    neither `train.py` nor data.

    Arguments
    ---------
    output_folder : str or Path
        That of the training: hyperparams.yaml and, where bits were chosen,
        plan.json are read. The hparams need `modules` and `checkpointer`.
    packed : str or Path or None
        Folder to write; output_folder/packed if not given.
    min_key, max_key : str or None
        Which checkpoint, as in `Brain.evaluate`; the latest if not given.

    Returns
    -------
    path : Path
        The model.safetensors.
    """
    folder = Path(output_folder)
    source = folder / "hyperparams.yaml"
    if not source.exists():
        raise FileNotFoundError(
            f"no {source}: name the output_folder of a finished training"
        )
    # HyperPyYAML writes anchors anew when it loads, and mixes up equal names.
    text = source.read_text(encoding="utf-8")
    hparams = load_hyperpyyaml(ANCHOR.sub(r"\1saved\2", text))
    missing = [key for key in ("modules", "checkpointer") if key not in hparams]
    if missing:
        raise ValueError(
            f"{source} has no key {missing[0]!r}, which this needs"
        )
    quantizer = _quantizer(hparams, folder)
    found = recover_whole(
        hparams["checkpointer"], min_key=min_key, max_key=max_key
    )
    if found is None:
        raise ValueError(
            f"no checkpoint in {hparams['checkpointer'].checkpoints_dir}: "
            "finish the training first"
        )
    if quantizer.method:
        quantizer.method.finish(quantizer.model)
    return quantizer.pack(packed or folder / "packed")


def _quantizer(hparams, folder):
    """The quantizer of the hparams, or one for the plan that was chosen."""
    path = folder / "plan.json"
    quantizer = hparams.get("quantizer")
    if not path.exists():
        if quantizer is None:
            raise ValueError(
                f"{folder} is of no quantized training: its hyperparams.yaml "
                "has no quantizer, and it holds no plan.json"
            )
        return quantizer
    plan = BitPlan.load(path)
    if quantizer is None:
        quantizer = Quantizer(hparams["modules"], None)
    known = (folder / SETTINGS).exists()
    method = earlier_settings(folder).get("method") if known else None
    if method in METHODS:
        quantizer.use_method(method_of(method))
    quantizer.quantize(plan)
    return quantizer
