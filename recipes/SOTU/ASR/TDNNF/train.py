"""TDNN-F speech recognition of State of the Union sentences by LF-MMI.

To run this recipe, do the following:
> python train.py hparams/train.yaml

It prepares texts, pronunciations, speech and rooms if they are not there,
trains from scratch, and writes N-best lists of the test, clean and in rooms
with noise, for language models to rescore. The stages and the Brain are those
of `speechbrain_mpq.experiments.hybrid_recognition`.
"""

import sys

from sotu_speech_prepare import prepare_sotu_speech
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.experiments.hybrid_recognition import run
from speechbrain_mpq.simulation.rooms import prepare_rooms


def prepare(hparams):
    """Texts, lexicon, n-gram, speech and rooms, where they are not there."""
    folder = hparams["data_folder"]
    kwargs = {
        key: hparams[key]
        for key in (
            *("text_folder", "cmudict", "vocabulary", "utterances", "ngram"),
        )
    }
    run_on_main(prepare_sotu_speech, args=[folder], kwargs=kwargs)
    rooms = [folder, hparams["rooms"], hparams["microphones"]]
    run_on_main(prepare_rooms, args=rooms)


def main(arguments):
    """Prepare, train and test."""
    run(arguments, prepare, __file__)


if __name__ == "__main__":
    main(sys.argv[1:])
