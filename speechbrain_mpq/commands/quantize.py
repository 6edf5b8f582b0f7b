"""`speechbrain-mpq quantize`: a pretrained SpeechBrain model in fewer bits.

Scores the layers of any folder or hub name that SpeechBrain's `from_hparams`
loads, on some audio; finds the best bits for a budget; rounds; and writes a
folder that the same class loads with stock `from_hparams`. No training.
"""

import sys

from .arguments import bits_number, check_device

HELP = "a pretrained SpeechBrain model at mixed precision, without training"
EXAMPLE = (
    "speechbrain-mpq quantize --source pretrained/asr_mini --class EncoderASR "
    "--calibration data/embedded/train_speech.json "
    "--test data/embedded/test_speech.json --budget 4bit -o asr_4bit"
)


def add_arguments(parser):
    """Say what the command line may hold."""
    needed = parser.add_argument_group("needed")
    needed.add_argument("--source", required=True, help="folder or hub name")
    needed.add_argument(
        "--class",
        dest="class_name",
        required=True,
        help="a class of speechbrain.inference, such as EncoderASR, or your "
        "own with its module",
    )
    needed.add_argument(
        "--calibration",
        required=True,
        help="manifest of some audio (JSON, CSV)",
    )
    needed.add_argument(
        "--budget",
        required=True,
        help="average bits, as 4bit, or bytes of the packed files, as 2.5MB",
    )
    needed.add_argument(
        "-o", "--output", required=True, help="folder to write; new or empty"
    )
    _add_data_options(parser.add_argument_group("data"))
    _add_method_options(parser.add_argument_group("method"))


def run(options) -> int:
    """Quantize, and print the table of before and after.

    Exit status: 0, or 2 where there is no such source.
    """
    from ..ptq.pretrained import quantize_pretrained
    from ..ptq.pretrained_folder import SourceNotFoundError, outcome_table

    check_device(options.device)
    arguments = vars(options).copy()
    for other in ("run", "command"):
        arguments.pop(other, None)
    if arguments["candidate_bits"] is None:
        del arguments["candidate_bits"]
    try:
        outcome = quantize_pretrained(**arguments, progress=True)
    except SourceNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print(outcome_table(outcome))
    note = _significance(outcome.quality)
    if note:
        print(note)
    cls, folder = outcome.cls.__name__, options.output
    print(f'Load it with {cls}.from_hparams(source="{folder}")')
    return 0


def _add_data_options(group):
    """Options about manifests."""
    group.add_argument(
        "--test", help="manifest to measure with (default: the calibration's)"
    )
    group.add_argument(
        "--data-root",
        help="what {data_root} stands for in manifests (default: the folder "
        "of each)",
    )
    group.add_argument(
        "--items", type=int, default=32, help="to calibrate with"
    )
    group.add_argument(
        "--test-items", type=int, help="to measure with (default: all)"
    )
    group.add_argument(
        "--audio-key", default="wav", help="names the audio file of an entry"
    )
    group.add_argument(
        "--text-key",
        help="holds the text of an entry, for classes that read (default: "
        "txt, text, words, label or char)",
    )
    group.add_argument(
        "--reference",
        help="key that holds the truth (default: words, label, or s1_wav, "
        "s2_wav, ..., as suits the class)",
    )


def _add_method_options(group):
    """Options about bits and rounding."""
    group.add_argument(
        "--include", nargs="+", default=["*"], help="patterns on parameters"
    )
    group.add_argument(
        "--exclude",
        nargs="*",
        default=[],
        help="patterns to leave in float",
    )
    group.add_argument(
        "--vectors",
        action="store_true",
        help="quantize biases and norms as well",
    )
    group.add_argument(
        "--candidate-bits", nargs="+", type=bits_number, help="to choose from"
    )
    group.add_argument(
        "--codebook",
        choices=("midrise", "midtread", "entropy"),
        default="midrise",
    )
    group.add_argument(
        "--gates",
        action="store_true",
        help="bits of its own for each gate of each layer of LSTMs and GRUs",
    )
    group.add_argument(
        "--rounding", choices=("calibrated", "nearest"), default="calibrated"
    )
    group.add_argument(
        "--scores",
        default="kl",
        help="what bits are chosen by: kl, the change of the outputs (the "
        "default), output_error, hessian, loss, nas, weight_error, size, "
        "random, uniform",
    )
    group.add_argument(
        "--method",
        default="post_training",
        help="post_training; methods that train are the runner's, `python -m "
        "speechbrain_mpq.run`",
    )
    group.add_argument("--device", default="cpu")


def _significance(quality):
    """Whether word errors differ significantly; empty for other measures."""
    from ..evaluation.significance import mapsswe
    from ..ptq.task_metrics import WordErrorRate

    if not quality or quality["source"].name != WordErrorRate.name:
        return ""
    source, packed = quality["source"].pairs, quality["packed"].pairs
    if not any(reference.split() for reference, _ in source.values()):
        return ""
    if quality["source"].unmet:
        return ""  # told beside the table
    result = mapsswe((*source[key], packed[key][1]) for key in source)
    differ = "differ" if result.significant else "do not differ"
    return (
        f"The word errors {differ} significantly (MAPSSWE, p = {result.p:.2g}, "
        f"{result.segments} segments)"
    )
