"""The separator that an experiment begins with."""

import copy
from pathlib import Path

from ..quantization.packing import load_packed_
from ..separation.audio_visual import begin_with_audio_
from ..separation.equalization import equalize_inputs_
from ..separation.loading import build_separator
from ..separation.tcn import fold_norms_
from .registry import describe


def weights_file(folder):
    """Where the weights to start from are.

    Arguments
    ---------
    folder : str or Path or None
        Packed folder of a separator in full precision; None: none.

    Returns
    -------
    path : Path
    """
    return Path(folder or "", "model.safetensors")


def new_or_trained(model_file, folder, full_precision=False, equalize=False):
    """A new separator, or a trained one, ready for an experiment.

    A trained one has its norms folded. In full precision a separator with a
    lip stream may start from one without: its lip stream is new then.

    Arguments
    ---------
    model_file : str or Path
        YAML file that describes the separator.
    folder : str or Path or None
        Packed folder of the trained one; None: a new one, in full precision
        only.
    full_precision : bool
        Whether the experiment leaves it so.
    equalize : bool
        Bring the columns of its first layer to one size.

    Returns
    -------
    separator : Separator
    """
    separator = build_separator(model_file)
    if folder is None:
        if not full_precision:
            raise ValueError(
                "quantization starts from a trained separator: name its "
                "packed folder with --pretrained_separator"
            )
        return separator
    if not weights_file(folder).exists():
        raise FileNotFoundError(
            f"no {weights_file(folder)}: make full-precision weights with "
            "`python train.py hparams/pretrain.yaml` (or grow them, see "
            "recipes/Embedded/growth) and copy the packed/ folder there, or "
            "name another with --pretrained_separator"
        )
    if full_precision and separator.lips_size:
        audio = build_separator(Path(folder, "hyperparams.yaml"))
        if audio.lips_size is None:  # lips are yet to be learned
            fold_norms_(audio)
            load_packed_(audio, folder)
            begin_with_audio_(separator.mask_net, audio.mask_net)
            return separator
    fold_norms_(separator)
    load_packed_(separator, folder)
    if equalize:
        equalize_inputs_(separator)
    return separator


def check_describable(separator):
    """Raise ValueError where no packed folder could name the separator.

    Arguments
    ---------
    separator : Separator
        Left as it is.
    """
    packed = copy.deepcopy(separator)
    fold_norms_(packed)
    describe(packed)
