"""`speechbrain-mpq export`: a packed separator for a fast engine.

Measures the ranges of the activations on some recordings, which int8 engines
need, and writes them beside the weights (activations.json). Writes the mask
network as files of the engine too, for other programs.
"""

HELP = "make a packed separator ready for OpenVINO or ONNX Runtime"
EXAMPLE = """
  speechbrain-mpq export packed --calibration mixtures.json -o fast
  speechbrain-mpq export packed --engine onnx --calibration mixtures.json
  speechbrain-mpq separate mix.wav --doa 60 --model fast --engine openvino
mixtures.json: {"first": {"wav": "mix.flac", "doa": 60}, ...}, ten seconds each
of a dozen recordings are enough"""


def add_arguments(parser):
    """Say what the command line may hold."""
    parser.add_argument("folder", help="packed folder of a separator")
    parser.add_argument(
        "--engine", choices=("openvino", "onnx"), default="openvino"
    )
    parser.add_argument(
        "--calibration",
        metavar="MANIFEST",
        help="JSON manifest of multichannel recordings with the direction of "
        "a talker (default: the ranges that the folder has)",
    )
    parser.add_argument(
        "-o", "--out", metavar="FOLDER", help="to write (default: the same)"
    )


def run(options) -> int:
    """Export, and say what was written."""
    from ..inference.exporting import export

    report = export(
        options.folder, options.out, options.engine, options.calibration
    )
    if report["decibels"] is not None:
        print(
            f"calibrated on {report['seconds']:.1f} s: the mask of "
            f"{options.engine} is {report['decibels']:.1f} dB from PyTorch's"
        )
    for path in report["files"]:
        print(f"{path}: {path.stat().st_size} bytes")
    folder = options.out or options.folder
    print(
        f'QuantizedSeparator.from_pretrained("{folder}", '
        f'engine="{options.engine}")'
    )
    return 0
