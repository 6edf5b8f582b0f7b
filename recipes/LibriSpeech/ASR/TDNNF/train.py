"""TDNN-F speech recognition of LibriSpeech by LF-MMI.

To run this recipe, do the following:
> python train.py hparams/train.yaml --librispeech_folder=LibriSpeech \\
    --cmudict=librispeech-lexicon.txt

It writes manifests of the subsets, estimates the n-grams from the training
transcripts, trains from scratch and writes N-best lists of the test. The stages
and the Brain are those of `speechbrain_mpq.experiments.hybrid_recognition`.
"""

import sys

from librispeech_prepare import prepare_librispeech
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.experiments.hybrid_recognition import run
from speechbrain_mpq.simulation.rooms import prepare_rooms


def prepare(hparams):
    """Manifests and lexicon, and rooms where noise is asked for."""
    keys = ("librispeech_folder", "data_folder", "cmudict", "subsets")
    arguments = [hparams[key] for key in keys]
    run_on_main(prepare_librispeech, args=arguments)
    if hparams["noisy"]:
        rooms = [hparams[k] for k in ("data_folder", "rooms", "microphones")]
        run_on_main(prepare_rooms, args=rooms)


def main(arguments):
    """Prepare, train and test."""
    run(arguments, prepare, __file__)


if __name__ == "__main__":
    main(sys.argv[1:])
