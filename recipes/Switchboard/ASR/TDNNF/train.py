"""TDNN-F speech recognition of Switchboard by LF-MMI.

To run this recipe, do the following:
> python train.py hparams/train.yaml --switchboard_folder=swb1 \\
    --transcripts=swb_ms98_transcriptions --cmudict=cmudict.dict

It cuts the utterances out of the recordings, estimates the n-grams from the
training transcripts, trains from scratch and writes N-best lists of the test.
The stages and the Brain are those of
`speechbrain_mpq.experiments.hybrid_recognition`.
"""

import sys

from speechbrain.utils.distributed import run_on_main
from switchboard_prepare import prepare_switchboard

from speechbrain_mpq.experiments.hybrid_recognition import run
from speechbrain_mpq.simulation.rooms import prepare_rooms


def prepare(hparams):
    """Speech, manifests and lexicon, and rooms where noise is asked for."""
    keys = ("switchboard_folder", "transcripts", "data_folder", "cmudict")
    run_on_main(prepare_switchboard, args=[hparams[key] for key in keys])
    if hparams["noisy"]:
        rooms = [hparams[k] for k in ("data_folder", "rooms", "microphones")]
        run_on_main(prepare_rooms, args=rooms)


def main(arguments):
    """Prepare, train and test."""
    run(arguments, prepare, __file__)


if __name__ == "__main__":
    main(sys.argv[1:])
