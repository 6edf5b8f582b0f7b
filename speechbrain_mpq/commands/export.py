"""`speechbrain-mpq export`: a packed model for a fast engine.

Of a separator it measures the ranges of the activations on some recordings,
which int8 engines need, and writes them beside the weights (activations.json),
and the mask network as files of the engine, for other programs. A folder of
SpeechBrain's own interfaces becomes one ONNX file, from samples to scores; the
network of a hybrid recognizer one from features to log-probabilities.
"""

from pathlib import Path

from ..utils import check_output, scratch_folder

HELP = "make a packed model ready for OpenVINO or ONNX Runtime"
EXAMPLE = """
  speechbrain-mpq export packed --calibration mixtures.json -o fast
  speechbrain-mpq export packed --engine onnx --calibration mixtures.json
  speechbrain-mpq separate mix.wav --doa 60 --model fast --engine openvino
  speechbrain-mpq export asr_4bit --engine onnx --class EncoderASR -o asr.onnx
  speechbrain-mpq export pretrained/asr_tdnnf_4bit --engine onnx -o asr.onnx
mixtures.json: {"first": {"wav": "mix.flac", "doa": 60}, ...}, ten seconds each
of a dozen recordings are enough"""


def add_arguments(parser):
    """Say what the command line may hold."""
    parser.add_argument("folder", help="packed folder")
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
        "--class",
        dest="class_name",
        metavar="NAME",
        help="EncoderASR or EncoderClassifier, or one that inherits from them: "
        "the folder is one that `quantize` wrote; its hyperparams.yaml is "
        "executed, as from_hparams does",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="PATH",
        help="folder to write (default: the same); of a recognizer the file",
    )


def run(options) -> int:
    """Export, and say what was written."""
    if options.class_name:
        return _interface(options)
    from ..inference.exporting import export
    from ..inference.folder import NGRAM_FILE

    if Path(options.folder, NGRAM_FILE).is_file():
        return _recognizer(options)
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


def _interface(options):
    """Write the ONNX file of a SpeechBrain interface."""
    from ..inference.onnx_interfaces import export_interface
    from ..ptq.pretrained_folder import check_source, find_class

    folder = Path(options.folder)
    _check_onnx(options)
    cls = find_class(options.class_name)
    check_source(folder)
    out = Path(options.out or f"{folder.resolve().name}.onnx")
    _check_file(out, folder)
    with scratch_folder() as fetched:
        interface = cls.from_hparams(source=str(folder), savedir=fetched)
        report = export_interface(interface, out, folder)
    _tell(out, report)
    return 0


def _recognizer(options):
    """Write the ONNX file of a hybrid recognizer's network."""
    from ..inference.loading import load
    from ..inference.onnx_recognizer import export_recognizer

    _check_onnx(options)
    folder = Path(options.folder)
    out = Path(options.out or f"{folder.resolve().name}.onnx")
    _check_file(out, folder)
    _tell(out, export_recognizer(load(folder), out, folder))
    return 0


def _check_file(out, folder):
    """Refuse an output that is a file of the model, but for an earlier one."""
    own = folder.iterdir() if folder.is_dir() else ()
    check_output(out, *(path for path in own if path.suffix != ".onnx"))


def _check_onnx(options):
    """Refuse what a recognizer's file is not made with."""
    if options.engine != "onnx" or options.calibration:
        raise ValueError(
            "for a recognizer or --class choose --engine onnx and leave "
            "--calibration out: what layers read is rounded as it comes"
        )


def _tell(out, report):
    """Say what was written."""
    done = report["weights"]
    print(
        f"{done.get('integer', 0)} weights are multiplied as integers, "
        f"{done.get('looked up', 0)} looked up, {done.get('dequantized', 0)} "
        "stored as integers and computed in float32"
    )
    print(
        f"{out}: {report['bytes']} bytes, {report['decibels']:.1f} dB from "
        "PyTorch on noise"
    )
