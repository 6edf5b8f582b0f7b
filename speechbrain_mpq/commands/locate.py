"""`speechbrain-mpq locate`: where the talkers of a recording are."""

import json

from ..utils import BUNDLED_MODEL
from .arguments import whole_number
from .audio_files import STREAM, STREAM_NAME, open_source

HELP = "find the directions of the talkers in a multichannel recording"
EXAMPLE = """
  speechbrain-mpq locate mix.wav
  speechbrain-mpq locate mix.wav --talkers 2 --model packed
  speechbrain-mpq locate mix.wav --json | jq .talkers"""


BAR = 40  # characters for all that begins
MOST = 12  # talkers that may be asked for


def add_arguments(parser):
    """Say what the command line may hold."""
    parser.add_argument(
        "mixture",
        help="recording of all microphones of the array, or of those that "
        "the model uses; 16 kHz or more; a file, a pipe, or - for standard "
        "input",
    )
    parser.add_argument(
        "--model",
        default=BUNDLED_MODEL,
        metavar="FOLDER",
        help="packed folder, or its name on the Hugging Face hub: it knows "
        "the array (default: the 4-bit separator that comes with the package)",
    )
    parser.add_argument(
        "--talkers",
        type=whole_number(1, MOST),
        metavar="N",
        help="how many there are (default: as many as stand out, up to 4)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON, with the curve over 0, 1, ... degrees",
    )


def run(options) -> int:
    """Print where talkers are.

    Exit status: 0, also where nobody stands out.
    """
    with open_source(options.mixture) as (source, name):
        from ..inference.interfaces import LightSeparator

        model = LightSeparator(options.model)
        audio = model.open_audio(source, name)
        directions = model.locate_file(audio, options.talkers)
    name = STREAM_NAME if options.mixture == STREAM else options.mixture
    if options.json:
        print(json.dumps(_content(name, directions), indent=1))
    else:
        print("\n".join(_lines(name, directions)))
    return 0


def _content(name, directions):
    """What is found, for JSON."""
    return {
        "mixture": name,
        "talkers": [
            {"doa": round(talker.doa, 1), "share": talker.share}
            for talker in directions.talkers
        ],
        "curve": [round(share, 5) for share in directions.curve.tolist()],
    }


def _lines(name, directions):
    """A line for each talker, the strongest first."""
    count = len(directions.talkers)
    if not count:
        return [f"{name}: nobody stands out from the noise"]
    lines = [f"{name}: {count} talker{'s' * (count != 1)}"]
    for talker in directions.talkers:
        bar = "█" * max(1, round(BAR * talker.share))
        percent = f"{100 * talker.share:.0f} % of all onsets"
        lines.append(f"  {talker.doa:5.1f}°  {bar} {percent}")
    return lines
