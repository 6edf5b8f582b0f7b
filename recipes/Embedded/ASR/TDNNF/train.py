"""TDNN-F speech recognition of the embedded corpus by LF-MMI.

To run this recipe, do the following:
> python train.py hparams/train.yaml

It speaks the corpus and simulates the rooms if they are not there, estimates
the phone and word n-grams from the training transcripts, trains from scratch
(no alignments), and searches the words exactly. Rooms and noise are put to the
speech while it is needed: others in every epoch of training, the same ones in
validation and test. The stages and the Brain are those of
`speechbrain_mpq.experiments.hybrid_recognition`.
"""

import sys

from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.experiments.hybrid_recognition import run
from speechbrain_mpq.simulation.corpus import prepare_speech
from speechbrain_mpq.simulation.rooms import prepare_rooms


def prepare(hparams):
    """Speech and rooms, where they are not there."""
    folder = hparams["data_folder"]
    run_on_main(prepare_speech, args=[folder], kwargs=hparams["utterances"])
    if hparams["noisy"]:
        rooms = [folder, hparams["rooms"], hparams["microphones"]]
        run_on_main(prepare_rooms, args=rooms)


def main(arguments):
    """Prepare, train and test."""
    run(arguments, prepare, __file__)


if __name__ == "__main__":
    main(sys.argv[1:])
