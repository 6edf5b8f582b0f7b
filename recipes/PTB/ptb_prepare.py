"""Penn Treebank as Mikolov prepared it, as text for language models.

> python recipes/PTB/ptb_prepare.py simple-examples/data data/ptb

Reads ptb.train.txt, ptb.valid.txt and ptb.test.txt: 930 thousand words of
training, 10 thousand different ones with <unk> and N for numbers. They are
licensed by the LDC.
"""

import argparse
import sys
from pathlib import Path

from speechbrain_mpq.decoders.text_corpus import SPLITS, write_corpus
from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time


def read_ptb(folder):
    """Sentences of each split.

    Arguments
    ---------
    folder : str or Path
        Of ptb.train.txt and the two others.

    Returns
    -------
    dict of str -> list of str
    """
    texts = {}
    for split in SPLITS:
        path = Path(folder) / f"ptb.{split}.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path}: name the folder of ptb.train.txt, ptb.valid.txt "
                "and ptb.test.txt, data/ of Mikolov's simple-examples"
            )
        lines = path.read_text(encoding="utf-8").splitlines()
        texts[split] = [
            " ".join(line.split()) for line in lines if line.split()
        ]
    return texts


@one_at_a_time
def prepare_ptb(folder, data_folder):
    """Write train.txt, valid.txt, test.txt and vocab.txt.

    Arguments
    ---------
    folder : str or Path
        Of the original files.
    data_folder : str or Path
        Where to write.

    Returns
    -------
    dict
        See `write_corpus`. The vocabulary has all words of training.
    """
    documents = read_ptb(folder)
    splits = {split: [split] for split in SPLITS}
    return write_corpus(data_folder, documents, splits, None)


def main(arguments=None):
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("data_folder")
    options = parser.parse_args(arguments)
    prepare_ptb(options.folder, options.data_folder)


if __name__ == "__main__":
    sys.exit(guarded(main))
