"""`speechbrain-mpq enhance`: less noise in recordings, at a cost to choose."""

import argparse
import re
import shutil
import sys
import time

from ..utils import BUNDLED_ENHANCER
from .arguments import MAX_THREADS, check_device, whole_number
from .audio_files import (
    LONG,
    STREAM,
    OutputNames,
    each_recording,
    open_source,
    print_names,
    recordings,
    speed,
)

HELP = "suppress the noise of recordings, with early exits"
EXAMPLE = """
  speechbrain-mpq enhance noisy.wav -o clean.wav
  speechbrain-mpq enhance noisy.wav -o clean.wav --exit 1
  speechbrain-mpq enhance *.wav meeting/ -o clean/ --budget-macs 600k
  speechbrain-mpq enhance noisy.wav --exit auto --budget-macs 900k
      (noisy_enhanced.wav; an exit for each frame, 900,000 multiplications
      a frame on average)
  arecord -r 16000 -f S16_LE -d 30 | speechbrain-mpq enhance - -o - | aplay"""


def add_arguments(parser):
    """Say what the command line may hold."""
    parser.add_argument(
        "recordings",
        nargs="+",
        metavar="recording",
        help="speech in noise, any number of channels, each on its own; 8 kHz "
        "or more, 16 kHz come out: files, folders, patterns, a pipe, or - for "
        "standard input",
    )
    _add_exit_options(parser)
    parser.add_argument(
        "--model",
        default=BUNDLED_ENHANCER,
        metavar="FOLDER",
        help="packed folder, or its name on the Hugging Face hub (default: "
        "the 4-bit model that comes with the package)",
    )
    _add_output_options(parser)
    parser.add_argument(
        "--threads",
        type=whole_number(1, MAX_THREADS),
        default=1,
        help="of PyTorch (default: 1)",
    )
    parser.add_argument(
        "--device", default="cpu", help="of PyTorch (default: %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _add_exit_options(parser):
    """How many multiplications a frame may take."""
    parser.add_argument(
        "--exit",
        type=_exit,
        metavar="N",
        help="layer to stop behind, the earlier the fewer multiplications; "
        "auto: for each frame, by how sure the mask is (default: the last "
        "one, or the latest within --budget-macs)",
    )
    parser.add_argument(
        "--budget-macs",
        type=_count,
        metavar="M",
        help="multiplications a frame of 16 ms, as 600k or 1.2M: at most or, "
        "with --exit auto, on average",
    )


def _add_output_options(parser):
    """Where the enhanced speech goes, and in which samples."""
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="audio file to write, by its ending .wav or .flac; - writes WAV "
        "to standard output; a folder takes files named by recording, as the "
        "current one does by default",
    )
    parser.add_argument(
        "--float", action="store_true", help="write 32-bit float samples"
    )


def run(options) -> int:
    """Enhance one recording, or many with one model.

    Exit status: 1 where any of several recordings failed.
    """
    files = recordings(options.recordings)
    names = OutputNames(options.out, files, word="enhanced")
    names.check([0.0])
    if len(files) > 1:
        model = _load(options)

        def work(file):
            with open_source(file) as opened:
                return _enhance(model, file, opened, names, options)

        return each_recording(files, work, options.quiet)
    # Opened first: loading takes longer than a typing error should
    with open_source(files[0]) as opened:
        model = _load(options)
        started = time.perf_counter()
        sound, paths = _enhance(model, files[0], opened, names, options)
    print_names(paths)
    if paths and sound > LONG and not options.quiet:
        print(speed(sound, time.perf_counter() - started), file=sys.stderr)
    return 0


def _load(options):
    """The model of the command line, which has the exit that is asked for."""
    import torch

    check_device(options.device)
    from ..inference.enhancement import SpeechEnhancer

    torch.set_num_threads(options.threads)
    model = SpeechEnhancer.from_pretrained(options.model, options.device)
    model.stream(options.exit, options.budget_macs)  # refuses what is not
    return model


def _enhance(model, file, opened, names, options):
    """Seconds of a recording, and what was written of it."""
    from ..utils import scratch_folder

    audio = model.open_audio(*opened)
    alone = len(names.files) == 1
    how = {
        "exit": options.exit,
        "macs": options.budget_macs,
        "subtype": "FLOAT" if options.float else None,
        "progress": alone and audio.seconds > LONG and not options.quiet,
    }
    if options.out != STREAM:
        (out,) = names.of(file, [0.0])
        return audio.seconds, [model.enhance_file(audio, out, **how)]
    with scratch_folder() as folder:
        path = model.enhance_file(audio, folder / "out.wav", **how)
        with open(path, "rb") as sound:
            shutil.copyfileobj(sound, sys.stdout.buffer)
    return audio.seconds, []


def _exit(text):
    """A number, or "auto"."""
    if text == "auto" or text.isdecimal():
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither the number of a layer, from 0, nor auto"
    )


def _count(text):
    """Multiplications: 600000, 600k or 0.6M."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([kM]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of multiplications, such as 600k or 1.2M"
        )
    return float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]]
