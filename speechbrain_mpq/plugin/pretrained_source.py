"""Whether there is anything under the name of a pretrained model.

`from_hparams` takes whatever is no folder for a name on the Hugging Face hub,
whose client repeats its attempts for minutes where it has no connection. One
question first, so that a mistyped folder is told at once.
"""

import re
from pathlib import Path

from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from ..quantization.tensors import near_misses

HPARAMS_FILE = "hyperparams.yaml"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class SourceNotFoundError(FileNotFoundError):
    """There is no pretrained model where one was named."""


def check_source(source):
    """Refuses what is neither a model's folder nor one on the hub.

    Arguments
    ---------
    source : str or Path
        Folder, or name on the hub, "user/name".

    Example
    -------
    >>> check_source("nowhere")
    Traceback (most recent call last):
    ...
    speechbrain_mpq...SourceNotFoundError: nowhere: no such folder, and no ...
    """
    folder = Path(source)
    if folder.is_file():
        raise SourceNotFoundError(
            f"{source} is a file: name the folder that it is in"
        )
    if folder.is_dir():
        if not (folder / HPARAMS_FILE).is_file():
            raise SourceNotFoundError(
                f"{source} has no {HPARAMS_FILE}: name a folder that "
                f"from_hparams loads{_near_folders(folder)}"
            )
    elif HUB_NAME.fullmatch(str(source)):
        _ask_hub(str(source), _near_folders(folder))
    else:
        raise SourceNotFoundError(
            f"{source}: no such folder, and no name on the Hugging Face hub, "
            "which would be user/name: check the folder's name"
            f"{_near_folders(folder)}"
        )


def _near_folders(folder):
    """The end of a message: models beside a folder that is none."""
    models = folder.parent.glob(f"*/{HPARAMS_FILE}")
    return near_misses(str(folder), [str(path.parent) for path in models])


def _ask_hub(name, near):
    """Refuse a name that the hub does not know; it may be in the cache."""
    if isinstance(try_to_load_from_cache(name, HPARAMS_FILE), str):
        return
    try:
        # SpeechBrain uses no token either, and downloads public models only.
        get_hf_file_metadata(hf_hub_url(name, HPARAMS_FILE), token=False)
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise SourceNotFoundError(
            f"{name}: no such folder here, and no public model of this name "
            f"with a {HPARAMS_FILE} on the Hugging Face hub: check the name"
            f"{near}"
        ) from error
    except Exception as error:  # of whichever HTTP library the client has
        raise SourceNotFoundError(
            f"{name}: no such folder here, and the Hugging Face hub, which "
            f"may have it, cannot be reached ({_first_line(error)}): check "
            f"the folder's name or the connection{near}"
        ) from error


def _first_line(error):
    """What went wrong, in few words."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
