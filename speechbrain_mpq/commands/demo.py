"""`speechbrain-mpq demo`: a page on this machine to separate and listen."""

from pathlib import Path

from ..utils import BUNDLED_MODEL
from .arguments import add_engine_options, whole_number

HELP = "a local page: turn a dial, hear who talks there, compare bit budgets"
EXAMPLE = """
  speechbrain-mpq demo --open
  speechbrain-mpq demo packed
  speechbrain-mpq demo fp32/packed 4bit/packed 2bit/packed
  speechbrain-mpq demo packed --mixtures recordings/*.wav --port 8080"""


MADE = 4  # mixtures, one for each angle bucket


def add_arguments(parser):
    """Say what the command line may hold."""
    parser.add_argument(
        "folders",
        nargs="*",
        default=[BUNDLED_MODEL],
        metavar="folder",
        help="packed folders to compare (default: the 4-bit separator that "
        "comes with the package)",
    )
    parser.add_argument(
        "--mixtures",
        nargs="+",
        default=[],
        metavar="FILE",
        help="multichannel recordings to offer (default: simulated mixtures "
        "of two talkers, where the extra `simulate` is installed)",
    )
    parser.add_argument(
        "--port",
        type=whole_number(0, 65535),
        default=7860,
        help="0: any (default: %(default)s)",
    )
    add_engine_options(parser)
    parser.add_argument(
        "--open", action="store_true", help="open the page in a browser"
    )


def run(options) -> int:
    """Serve the page until it is interrupted."""
    import webbrowser

    from ..inference.demo_server import Demo, serve
    from ..inference.interfaces import LightSeparator
    from ..utils import scratch_folder

    models = {
        name: LightSeparator(folder, options.engine, options.threads)
        for name, folder in model_names(options.folders).items()
    }
    with scratch_folder() as scratch:
        demo = Demo(models, scratch)
        _add_mixtures(demo, options.mixtures, scratch)
        with serve(demo, options.port) as server:
            print(f"{server.address}  (stop it with Ctrl-C)", flush=True)
            if options.open:
                webbrowser.open(server.address)
            server.serve_forever()
    return 0


def model_names(folders):
    """Name every model by what tells its folder from the others.

    Example
    -------
    >>> paths = [f"results/{x}/1234/packed" for x in ("fp32", "kl_4bit")]
    >>> list(model_names(paths))
    ['fp32', 'kl_4bit']
    """
    paths = {Path(folder).absolute(): Path(folder) for folder in folders}
    parts = [path.parts for path in paths]
    if len(paths) > 1:  # what all end with tells nothing
        while all(p[-1] == parts[0][-1] for p in parts):
            parts = [p[:-1] for p in parts]
    elif parts[0][-1] == "packed":
        parts = [parts[0][:-1]]
    length = 1
    while len({p[-length:] for p in parts}) < len(parts):
        length += 1
    names = {}
    for part, path in zip(parts, paths.values()):
        vague = part[-1] == "packed" or part[-1].isdigit()  # a seed
        name = part[-max(length, 2) :] if vague else part[-length:]
        names["/".join(name)] = str(path)
    return names


def _add_mixtures(demo, files, scratch):
    """Give the page something to listen to."""
    for file in files:
        demo.add_recording(file, Path(file).name)
    if files:
        return
    try:
        import espeakng_loader  # noqa: F401
        import pyroomacoustics  # noqa: F401
    except ImportError:
        print(
            "no built-in mixtures: name recordings with --mixtures, or pip "
            "install 'speechbrain_mpq[simulate]'",
            flush=True,
        )
        return
    print("simulating mixtures ...", flush=True)
    array = demo.microphones, scratch, MADE, demo.array_positions
    for name, path, doas in simulate_mixtures(*array):
        talkers = {doa: talker_file(path, doa) for doa in doas}
        demo.add_recording(path, name, doas, talkers=talkers)


def talker_file(mixture, doa):
    """Where a simulated mixture's talker alone is, at the first microphone."""
    return mixture.parent / "talkers" / f"{mixture.stem}_{doa:.1f}.wav"


def simulate_mixtures(microphones, folder, count=MADE, positions=None):
    """Simulate mixtures of two synthetic talkers in rooms.

    Each talker alone is left beside them, see `talker_file`.

    Arguments
    ---------
    microphones : list of int
        Those that the models use.
    folder : Path
        Where voices, rooms and mixtures go.
    count : int
        Number of mixtures.
    positions : torch.Tensor or None
        `features.array_positions` of the models; None: the paper's array.

    Returns
    -------
    mixtures : list of (str, Path, list of float)
        Name, file, directions of target and interferer; those far apart
        first.
    """
    import soundfile

    from ..simulation.corpus import prepare_speech
    from ..simulation.mixtures import MixtureMaker, fixed_mixtures, load_speech
    from ..simulation.rooms import RoomBank, prepare_rooms
    from ..utils import SAMPLE_RATE

    prepare_speech(folder, train=0, valid=0, test=8, workers=1, progress=False)
    rooms = folder, {"test": 12}, microphones, 1234, 1, False
    prepare_rooms(*rooms, positions=positions)
    speech = load_speech(folder / "test_speech.json", folder)
    maker = MixtureMaker(speech, RoomBank(folder, "test", 12))
    made = []
    for key, drawn in fixed_mixtures(maker, count).items():
        path = folder / f"{key}.wav"
        signals = maker.render(drawn)
        soundfile.write(path, signals["mixture"], SAMPLE_RATE, "FLOAT")
        doas = [drawn["doa"], drawn["doa_interferer"]]
        for doa, talker in zip(doas, ("target", "interferer")):
            file = talker_file(path, doa)
            file.parent.mkdir(exist_ok=True)
            soundfile.write(file, signals[talker], SAMPLE_RATE, "PCM_16")
        name = f"two talkers, {drawn['angle']:.0f}° apart"
        made.append((name, path, doas))
    return made[::-1]  # the easiest first
