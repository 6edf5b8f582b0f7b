"""`speechbrain-mpq separate`: talkers of recordings, by direction."""

import argparse
import logging
import shutil
import sys
import time

from ..utils import BUNDLED_MODEL
from .arguments import add_engine_options, check_device
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

HELP = "separate talkers of multichannel recordings by their directions"
EXAMPLE = """
  speechbrain-mpq separate mix.wav --doa 60 -o anna.wav
  speechbrain-mpq separate mix.flac --doa 60 120 --model packed -o out.wav
      (out_60.wav and out_120.wav)
  speechbrain-mpq separate mix.wav --doa auto --model packed
      (mix_62.wav, ...: a file for every talker that is found)
  speechbrain-mpq separate *.wav meeting/ --doa auto -o separated/
  speechbrain-mpq separate mix.wav --face 410 --width 640 --model packed
  speechbrain-mpq separate mix.wav --track track.json --video talk.mp4 \\
      --model packed     (a talker who moves, and whose lips are seen)
  arecord -c 15 -r 16000 -f S16_LE -d 30 | \\
      speechbrain-mpq separate - --doa 90 --model packed -o - | aplay"""


AUTO = "auto"
LOOK = 60.0  # seconds of a recording that the check of a direction hears
LITTLE = 0.02  # of all onsets: a talker has more
logger = logging.getLogger(__name__)


def add_arguments(parser):
    """Say what the command line may hold."""
    parser.add_argument(
        "mixtures",
        nargs="+",
        metavar="mixture",
        help="recordings of all microphones of the array, or of those that "
        "the model uses; 16 kHz or more: files, folders, patterns, a pipe, or "
        "- for standard input",
    )
    _add_directions(parser)
    parser.add_argument(
        "--model",
        default=BUNDLED_MODEL,
        metavar="FOLDER",
        help="packed folder, or its name on the Hugging Face hub (default: "
        "the 4-bit separator that comes with the package)",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="audio file to write, by its ending .wav or .flac; for several "
        "directions they are added to the name; - writes WAV to standard "
        "output; a folder takes files named by recording and direction, as "
        "the current one does by default",
    )
    _add_options(parser)


def _add_directions(parser):
    """Say where the targets are, in one way of several."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--doa",
        nargs="+",
        type=_direction,
        metavar="DEGREES",
        help="direction of each target from the array's axis: 0 towards its "
        "last microphone, 90 straight ahead, 180 towards the first (planar "
        "arrays: 0 to 360, counterclockwise from the x axis); auto: of every "
        "talker that `speechbrain-mpq locate` finds",
    )
    where.add_argument(
        "--face",
        type=float,
        metavar="X",
        help="horizontal position of the target's face in a picture",
    )
    where.add_argument(
        "--track",
        metavar="FILE",
        help="where the target's face is all along, by `speechbrain-mpq track`",
    )
    parser.add_argument(
        "--video",
        metavar="FILE",
        help="of that track: a model that looks at lips sees them in there",
    )
    parser.add_argument(
        "--width", type=float, help="width of that picture in pixels"
    )


def run(options) -> int:
    """Separate one recording, or many with one model.

    Exit status: 1 where any of several recordings failed.
    """
    if options.width is not None and options.face is None:
        raise ValueError("--width belongs to --face")
    files = recordings(options.mixtures)
    if len(files) > 1 and options.track:
        raise ValueError("--track belongs to one recording: name one")
    track = _read_track(options)
    doas = [round(track.doa, 1)] if track else _directions(options)
    names = OutputNames(options.out, files)
    names.check(None if doas == [AUTO] else doas)
    if len(files) > 1:
        return _separate_all(files, doas, names, options)
    # Opened first: loading takes longer than a typing error should
    with open_source(files[0]) as opened:
        model = _load(options, doas)
        audio = model.open_audio(*opened)
        started = time.perf_counter()
        paths = _separate(model, audio, files[0], doas, names, options, track)
        seconds = time.perf_counter() - started
        if options.out == STREAM:
            return 0
        print_names(paths)
        if audio.seconds > LONG and not options.quiet:
            print(speed(audio.seconds, seconds), file=sys.stderr)
    return 0


def _separate_all(files, doas, names, options):
    """Separate recordings one after the other."""
    model = _load(options, doas)

    def work(file):
        with open_source(file) as opened:
            audio = model.open_audio(*opened)
            paths = _separate(model, audio, file, doas, names, options)
            return audio.seconds, paths

    return each_recording(files, work, options.quiet)


def _load(options, doas):
    """The model of the command line, which can have these directions."""
    import torch

    check_device(options.device)
    from ..inference.interfaces import LightSeparator
    from ..lobes.models.spatial_features import check_doa

    model = LightSeparator(
        options.model, options.engine, options.threads, options.device
    )
    if doas != [AUTO]:
        check_doa(torch.tensor(doas), model.separator.features.planar)
    return model


def _direction(text):
    """Degrees, or "auto"."""
    if text == AUTO:
        return text
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of degrees nor auto (recordings "
            "are named before --doa)"
        ) from error


def _found(model, audio):
    """Whole degrees of every talker that stands out, ascending."""
    talkers = model.locate_file(audio).talkers
    if not talkers:
        raise ValueError(
            f"{audio.name}: nobody stands out from the noise: say where with "
            "--doa DEGREES"
        )
    return sorted(float(round(talker.doa)) for talker in talkers)


def _warn_of_silence(model, audio, doas):
    """Tell of directions that little sound comes from, and where it does."""
    from ..inference.localization import MIN_MICROPHONES

    silent = audio.scan().silent
    if silent or len(model.microphones) < MIN_MICROPHONES:
        return
    directions = model.locate_file(audio, seconds=LOOK)
    talkers = ", ".join(f"{talker.doa:.0f}" for talker in directions.talkers)
    for doa in doas:
        if talkers and directions.share_at(doa) < LITTLE:
            logger.warning(
                f"{audio.name}: hardly any sound comes from {doa:g} degrees; "
                f"talkers are heard at {talkers}: see `speechbrain-mpq locate`"
            )


def _add_options(parser):
    """What has a default."""
    add_engine_options(parser)
    parser.add_argument(
        "--device", default="cpu", help="of PyTorch (default: %(default)s)"
    )
    parser.add_argument(
        "--level",
        type=float,
        metavar="DB",
        help="RMS of the output in dB of full scale, as -25 (default: as "
        "loud as the talker is in the mixture)",
    )
    parser.add_argument(
        "--float", action="store_true", help="write 32-bit float samples"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _separate(model, audio, file, doas, names, options, track=None):
    """Write the talkers of a recording; progress on standard error."""
    # Returns the paths; none where standard output has taken the sound.
    from ..utils import scratch_folder

    lips, outs = None, None
    if doas == [AUTO]:
        doas = _found(model, audio)
        outs = names.of(file, doas, named=True)
    elif options.out != STREAM:
        outs = names.of(file, doas)
    if track:
        doas, lips = _see(model, track, audio, options.video)
    elif AUTO not in (options.doa or ()):
        _warn_of_silence(model, audio, doas)
    alone = len(names.files) == 1
    how = {
        "level": "mixture" if options.level is None else options.level,
        "subtype": "FLOAT" if options.float else None,
        "progress": alone and audio.seconds > LONG and not options.quiet,
        "lips": lips,
    }
    if options.out != STREAM:
        return model.separate_file(audio, doas, out=outs, **how)
    with scratch_folder() as folder:
        path = folder / "out.wav"
        model.separate_file(audio, doas, out=[path], **how)
        with open(path, "rb") as sound:
            shutil.copyfileobj(sound, sys.stdout.buffer)
    return []


def _read_track(options):
    """The track of the command line, or None."""
    if options.track is None:
        if options.video:
            raise ValueError(
                "--video needs --track, which says where the face is: "
                f"speechbrain-mpq track {options.video} -o track.json"
            )
        return None
    from ..vision.face_tracking import FaceTrack

    return FaceTrack.load(options.track)


def _see(model, track, audio, video):
    """A direction for each frame [1, frames], and pictures of the lips."""
    import numpy as np

    from ..vision.face_tracking import frame_doas

    hop = model.separator.features.hop
    frames = audio.scan().samples // hop + 1
    doas = frame_doas(track, frames, model.sample_rate / hop)[None]
    if video is None:
        return doas, None
    size = model.separator.lips_size
    if size is None:
        raise ValueError("this model does not look at lips: leave out --video")
    from ..lobes.models.lips import frame_of_pictures
    from ..vision.video import Video, mouth_pictures

    video = Video(video)
    track.check_video(video)
    lips = mouth_pictures(video, track.boxes, size, track.fps)
    # Half a second may be missing, as of directions: no pictures there
    needed = len(frame_of_pictures(frames, hop))
    missing = max(0, needed - len(lips))
    return doas, np.pad(lips, [(0, missing), (0, 0), (0, 0)])[:needed]


def _directions(options):
    """Degrees of every target."""
    if options.face is None:
        if AUTO in options.doa and len(options.doa) > 1:
            raise ValueError("--doa takes degrees, or auto alone")
        if options.doa == [AUTO] and options.out == STREAM:
            raise ValueError(
                "standard output takes one talker, --doa auto finds several: "
                "name a file with -o"
            )
        return options.doa
    if options.width is None:
        raise ValueError("--face needs the picture's --width")
    from ..inference.interfaces import doa_from_face

    return [doa_from_face(options.face, options.width)]
