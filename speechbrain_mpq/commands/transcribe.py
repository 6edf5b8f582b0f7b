"""`speechbrain-mpq transcribe`: words of recordings by a hybrid recognizer.

The words of each file are printed, `id word word ...`, where the id is the
file's name without its ending. With --nbest the most probable hypotheses are
written as N-best lists, lines of JSON that `speechbrain-mpq rescore` reads;
that takes the extra `decode`.
"""

import os
from pathlib import Path

from ..utils import SAMPLE_RATE, check_output, plain_name
from .arguments import add_engine_options
from .audio_files import (
    STREAM,
    STREAM_NAME,
    each_recording,
    open_source,
    recordings,
)

HELP = "words of recordings, or N-best lists, by a packed TDNN-F"
EXAMPLE = """
  speechbrain-mpq transcribe a.wav b.flac --model pretrained/asr_tdnnf
  speechbrain-mpq transcribe *.wav --model FOLDER --nbest 20 --out nbest.json
  speechbrain-mpq rescore nbest.json --lm FOLDER"""


def add_arguments(parser):
    """Say what the command line may hold."""
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        metavar="file",
        help="recordings: files, folders, patterns, a pipe, or - for standard "
        "input",
    )
    add(
        "--model",
        required=True,
        metavar="FOLDER",
        help="packed recognizer, or its name on the Hugging Face hub",
    )
    add("--lexicon", metavar="FILE", help="in place of the folder's own")
    add("--ngram", metavar="ARPA", help="in place of the folder's own")
    add(
        "--acoustic_scale",
        type=float,
        default=1.0,
        help="of the network's outputs (default: %(default)s)",
    )
    add(
        "--lm_scale",
        type=float,
        default=1.0,
        help="of the n-gram's log-probabilities (default: %(default)s)",
    )
    add("--nbest", type=int, metavar="N", help="most hypotheses of a list")
    add("--out", metavar="FILE", help="where the N-best lists go")
    add(
        "--beam",
        type=float,
        default=16.0,
        help="of the search for N-best lists, nats (default: %(default)s)",
    )
    add(
        "--lattice_beam",
        type=float,
        default=10.0,
        help="how much worse than the best a hypothesis may be, nats "
        "(default: %(default)s)",
    )
    add_engine_options(parser, ("torch", "onnx"))


def run(options) -> int:
    """Transcribe files.

    Exit status: 1 where any file could not be read.
    """
    keys = _checked(options)
    from ..decoders.nbest import write_nbest
    from ..inference.speech_recognition import HybridASR

    model = HybridASR.from_pretrained(
        options.model,
        options.lexicon,
        options.ngram,
        acoustic_scale=options.acoustic_scale,
        lm_scale=options.lm_scale,
        engine=options.engine,
        threads=options.threads,
    )
    beams = {"beam": options.beam, "lattice_beam": options.lattice_beam}
    lists = []

    def work(file):
        with open_source(file) as opened:
            key, wavs = keys[file], model.read(*opened)[None]
        if options.nbest:
            lists.extend(
                model.nbest(wavs, count=options.nbest, ids=[key], **beams)
            )
            words = lists[-1].hypotheses[0]
        else:
            words = model.transcribe_batch(wavs)[0][0]
        return wavs.shape[1] / SAMPLE_RATE, [f"{key} {words}".rstrip()]

    status = each_recording(list(keys), work, quiet=True)
    if lists:
        write_nbest(options.out, lists)
    return status


def _checked(options):
    """File -> id; what cannot be meant is refused before any work."""
    if bool(options.nbest) != bool(options.out):
        raise ValueError("--nbest and --out belong together: give both")
    if options.nbest is not None and options.nbest < 1:
        raise ValueError(f"--nbest {options.nbest}: ask for at least one")
    if options.out and not Path(options.out).resolve().parent.is_dir():
        raise FileNotFoundError(f"{options.out}: no such folder: make it first")
    files = {}
    for file in recordings(options.files):
        if file != STREAM:
            with open_source(file):  # a typing error needs no model
                pass
        key = STREAM_NAME if file == STREAM else Path(file).stem
        key = "_".join(plain_name(key).split()) or "_"
        if key in files:
            raise ValueError(
                f"{file} and {files[key]} have the same id, {key!r}: rename one"
            )
        files[key] = file
    if options.out:
        inputs = [file for file in files.values() if os.path.isfile(file)]
        inputs += [options.model, options.lexicon, options.ngram]
        check_output(options.out, *inputs)
    return {file: key for key, file in files.items()}
