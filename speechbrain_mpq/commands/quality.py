"""`speechbrain-mpq quality`: how good speech sounds, without a reference."""

import json

from ..utils import BUNDLED_QUALITY_MODEL
from .arguments import MAX_CHANNELS, whole_number
from .audio_files import (
    STREAM,
    STREAM_NAME,
    each_recording,
    open_source,
    recordings,
)

HELP = "predict the quality of speech recordings, without a reference"
EXAMPLE = """
  speechbrain-mpq quality speech.wav
  speechbrain-mpq quality *.wav calls/ | sort -n
  speechbrain-mpq quality speech.wav --json | jq .windows"""


def add_arguments(parser):
    """Say what the command line may hold."""
    parser.add_argument(
        "recordings",
        nargs="+",
        metavar="recording",
        help="speech, 16 kHz or more: files, folders, patterns, a pipe, or - "
        "for standard input",
    )
    parser.add_argument(
        "--model",
        default=BUNDLED_QUALITY_MODEL,
        metavar="FOLDER",
        help="packed folder, or its name on the Hugging Face hub (default: "
        "the 4-bit predictor of PESQ that comes with the package)",
    )
    parser.add_argument(
        "--channel",
        type=whole_number(1, MAX_CHANNELS),
        default=1,
        metavar="N",
        help="of recordings with several (default: 1)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a line of JSON for each, with the scores of its windows",
    )


def run(options) -> int:
    """Print a score for each recording; a bad one stops no other.

    Exit status: 1 where any of them failed.
    """
    files = recordings(options.recordings)
    if len(files) == 1 and files != [STREAM]:
        with open_source(files[0]):  # a typing error needs no model
            pass
    from ..inference.quality_estimation import QualityEstimator

    estimator = QualityEstimator.from_pretrained(options.model)

    def work(file):
        with open_source(file) as opened:
            estimate = estimator.estimate_file(*opened, options.channel)
        name = STREAM_NAME if file == STREAM else file
        line = _json(name, estimate) if options.json else _line(name, estimate)
        return estimate.seconds, [line]

    return each_recording(files, work, quiet=True)


def _line(name, estimate):
    """The score, then the file, so that lines can be sorted."""
    return f"{estimate.score:.2f}  {name}"


def _json(name, estimate):
    """What is found, on one line."""
    content = {
        "recording": name,
        "measure": estimate.measure,
        "score": round(estimate.score, 4),
        "seconds": round(estimate.seconds, 3),
        "windows": [
            {"start": round(start, 3), "score": round(score, 4)}
            for start, score in estimate.windows
        ],
    }
    return json.dumps(content)
