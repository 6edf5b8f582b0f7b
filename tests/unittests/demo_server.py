"""A demo of small models and its server, for the tests of page and browser."""

import io
import threading
from contextlib import contextmanager

import numpy as np
import soundfile

from speechbrain_mpq.inference.demo_page import serve
from speechbrain_mpq.inference.demo_state import Demo
from speechbrain_mpq.inference.folder import save_separator
from speechbrain_mpq.inference.pretrained import QuantizedSeparator
from speechbrain_mpq.quantization.quantizer import quantize_
from speechbrain_mpq.separation.loading import build_separator
from speechbrain_mpq.separation.tcn import fold_norms_

SIZES = {"channels": 8, "hidden": 16, "blocks": 1, "layers": 2}


def small_models(folder):
    """The same small model at two budgets."""
    loaded = {}
    for bits in (8, 2):
        separator = build_separator(
            "hparams/models/separator_mini.yaml", **SIZES
        )
        fold_norms_(separator.eval())
        quantize_(separator, bits)
        packed = folder / f"bits{bits}"
        save_separator(separator, packed)
        loaded[f"{bits} bit"] = QuantizedSeparator.from_pretrained(packed)
    return loaded


def audio_bytes(seconds=1.0, channels=7, rate=16000):
    """A WAV file of noise."""
    rng = np.random.default_rng(0)
    signal = 0.1 * rng.standard_normal((int(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, signal, rate, format="WAV")
    return file.getvalue()


def small_demo(models, folder):
    """A demo with one recording, whose name is no HTML."""
    demo = Demo(models, folder)
    path = folder / "built_in.wav"
    path.write_bytes(audio_bytes())
    demo.add_recording(path, "a <b>mixture</b>", [60.0, 120.0])
    return demo


@contextmanager
def served(demo):
    """The demo's server, in a thread."""
    with serve(demo) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
