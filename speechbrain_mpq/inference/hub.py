"""Packed folders on the Hugging Face hub, through its own client.

The client keeps what it downloads in a cache that several processes may use;
without a connection it takes what is there.
"""

import re
from pathlib import Path

from ..quantization.packing import CONFIG_FILE, MODEL_FILE
from .engines.activations import RANGES_FILE

HYPERPARAMS_FILE = "hyperparams.yaml"
CARD_FILE = "README.md"
SAMPLE_FILE = "sample.flac"  # a recording of the microphones
SEPARATED_FILE = "sample_separated.flac"  # one talker of it
VOCABULARY_FILE = "vocab.txt"  # of a language model
LEXICON_FILE = "lexicon.txt"  # of a hybrid recognizer
NGRAM_FILE = "lm.arpa"


# All that is ever downloaded or uploaded.
FILES = (
    *(MODEL_FILE, CONFIG_FILE, HYPERPARAMS_FILE),
    *(CARD_FILE, SAMPLE_FILE, SEPARATED_FILE, RANGES_FILE),
    *(VOCABULARY_FILE, LEXICON_FILE, NGRAM_FILE),
)


_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def fetch_folder(
    source,
    revision=None,
    cache_dir=None,
    token=None,
    endpoint=None,
    local_files_only=False,
):
    """Download a packed model, unless it is a local folder."""
    if Path(source).is_dir():
        return Path(source)
    if not _REPOSITORY.fullmatch(str(source)) or ".." in str(source):
        raise FileNotFoundError(
            f"{source} is neither a folder nor a hub name such as user/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            str(source),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            endpoint=endpoint,
            local_files_only=local_files_only,
            allow_patterns=list(FILES),
        )
    except LocalEntryNotFoundError as error:  # most often a mistyped folder
        raise FileNotFoundError(
            f"{source} is no folder here; as a hub name it was not downloaded "
            "before, and now the hub cannot be reached: check the folder's "
            "name, or the connection"
        ) from error
    return Path(folder)


def push_folder(
    folder,
    repository,
    private=None,
    message="Packed model",
    revision=None,
    token=None,
    endpoint=None,
):
    """Upload the files of a packed folder, and no others."""
    from huggingface_hub import HfApi

    refuse_foreign_links(folder)
    api = HfApi(endpoint=endpoint, token=token)
    api.create_repo(repository, private=private, exist_ok=True)
    done = api.upload_folder(
        repo_id=repository,
        folder_path=str(folder),
        allow_patterns=list(FILES),
        commit_message=message,
        revision=revision,
    )
    return done.commit_url


def refuse_foreign_links(folder):
    """Raise ValueError where a file of a folder is really somewhere else.

    A folder from a stranger may link its README.md to a file that is not to
    be copied or uploaded. The client's own cache links into `blobs`.
    """
    own = Path(folder).resolve()
    homes = [own, *(parent / "blobs" for parent in own.parents[1:2])]
    for name in FILES:
        path = own / name
        if path.is_symlink() and path.resolve().parent not in homes:
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside its folder: "
                "replace it by a file"
            )
