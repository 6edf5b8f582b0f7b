"""The demo page: its models, recordings and results, and its server.

The page is one file without anything from elsewhere. The server listens on
the loopback address. Other pages in the same browser cannot use it: requests
must name this host, and those that change something carry a header that no
foreign page may send.
"""

import json
import math
import threading
import time
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from itertools import count
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import soundfile
import torch
import torch.nn.functional as F

from ..evaluation.signal_quality import si_snr
from ..quantization.packing import read_model
from ..quantization.plan import mean_bits
from ..utils import SAMPLE_RATE, strict_json
from .audio import AudioError
from .folder import FLOAT_BITS
from .localization import MIN_MICROPHONES
from .output import TargetOutput

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
MAX_UPLOAD = 2**28  # bytes, two minutes of 15 float channels at 32 kHz
MAX_REQUEST = 2**14  # bytes of JSON
OWN_HEADER = "X-Speechbrain-MPQ"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src "
        "'unsafe-inline'; connect-src 'self' blob:; media-src blob:; "
        "img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
MAX_SECONDS = 120.0  # of a recording; longer ones are for `separate`
LOCATE_SECONDS = 30.0  # of a recording, to find talkers
SMOOTH = 9  # degrees, odd
NEAR = 10.0  # degrees between what is asked for and a talker that is known
MOST_UPLOADS = 16  # older ones are forgotten
MOST_RESULTS = 64


class Demo:
    """Models, recordings and results of one page.

    Everything is kept in files of a scratch folder, which are named by
    numbers: no name that comes from outside ever becomes a path.

    Arguments
    ---------
    models : dict
        Name -> QuantizedSeparator; all for the same array.
    scratch : str or Path
        Folder for audio, which the caller deletes.
    """

    def __init__(self, models, scratch):
        self.models = models
        self.scratch = Path(scratch)
        self._first = next(iter(models.values()))
        self._recordings, self._results, self._talkers = {}, {}, {}
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._facts = [_facts(name, model) for name, model in models.items()]
        for name, model in models.items():
            if model.microphones != self.microphones:
                raise ValueError(
                    f"{name} uses microphones {model.microphones}, the first "
                    f"model {self.microphones}: compare models of one array"
                )
            places = model.separator.features.array_positions
            if not torch.equal(places, self.array_positions):
                raise ValueError(
                    f"{name} has its microphones at other places than the "
                    "first model: compare models of one array"
                )

    @property
    def microphones(self):
        """Numbers of the microphones that the models use."""
        return self._first.microphones

    @property
    def array_positions(self):
        """Metres of all microphones of the array, [mics] or [mics, 2]."""
        return self._first.separator.features.array_positions

    def state(self):
        """Describe all that the page shows at first."""
        return {
            "models": self._facts,
            # A list first: another thread may add one
            "recordings": [r["shown"] for r in list(self._recordings.values())],
            "microphones": self.microphones,
            "array_size": self._first.separator.features.array_size,
            "positions": _in_the_plane(self.array_positions),
            "planar": self._first.separator.features.planar,
            "max_seconds": MAX_SECONDS,
        }

    def add_recording(self, path, name, doas=(), uploaded=False, talkers=None):
        """Offer a recording on the page.

        Arguments
        ---------
        talkers : dict of float -> Path or None
            Of a simulated recording: direction -> a file of this talker
            alone, as the first microphone hears it.

        Returns
        -------
        shown : dict
            For JSON: id, name, seconds, doas (found where none are given),
            curve (where it is heard from, 0 to 1, one a degree; or empty),
            audio, warnings; talkers, each with doa, audio and the SI-SNR of
            the mixture against it.
        """
        audio = self._first.open_audio(path, name)
        if audio.seconds > MAX_SECONDS:
            raise AudioError(
                name,
                f"{audio.seconds:.0f} s long",
                f"the page takes up to {MAX_SECONDS:.0f} s: cut it, or use "
                "`speechbrain-mpq separate`",
            )
        scan = audio.scan()
        directions = self._located(audio)
        if directions and not doas:
            doas = sorted(talker.doa for talker in directions.talkers)
        number = str(next(self._numbers))
        self._write_reference(audio, number)
        shown = {
            "id": number,
            "name": name,
            "seconds": round(audio.seconds, 3),
            "doas": [round(doa, 1) for doa in doas],
            "curve": _heights(directions),
            "audio": f"/audio/{number}.wav",
            "warnings": list(scan.warnings),
            "talkers": [
                self._add_talker(doa, file, number)
                for doa, file in (talkers or {}).items()
            ],
        }
        entry = {"shown": shown, "path": Path(path), "uploaded": uploaded}
        self._recordings[number] = entry
        self._forget_uploads()
        return shown

    def separate(self, recording, model, doa):
        """Separate the talker at a direction.

        Returns
        -------
        result : dict
            For JSON: audio, seconds that it took, times real time, and the
            SI-SNR in dB where the talker alone is known, else None.
        """
        if recording not in self._recordings:
            raise ValueError("this recording is no longer there: add it again")
        if model not in self.models:
            raise ValueError(f"there is no model {model!r}")
        entry = self._recordings[recording]
        audio = self.models[model].open_audio(entry["path"])
        with self._lock:  # times of two at once would mean nothing
            number = str(next(self._numbers))
            start = time.perf_counter()
            path = self.scratch / f"{number}.wav"
            self.models[model].separate_file(audio, float(doa), out=path)
            seconds = time.perf_counter() - start
            self._results[number] = path
            self._forget_results()
        return {
            "audio": f"/audio/{number}.wav",
            "seconds": round(seconds, 4),
            "speed": round(audio.seconds / seconds, 1),
            "si_snr": self._si_snr(path, entry["shown"]["talkers"], doa),
        }

    def audio_path(self, number):
        """Find the file of a recording's reference channel or a result."""
        if number in self._talkers:
            return self._talkers[number]
        if number in self._recordings or number in self._results:
            return self.scratch / f"{number}.wav"
        return None

    def _add_talker(self, doa, file, recording):
        """What the page says of a talker alone."""
        number = str(next(self._numbers))
        self._talkers[number] = Path(file)
        mixture = self.scratch / f"{recording}.wav"
        return {
            "doa": round(float(doa), 1),
            "audio": f"/audio/{number}.wav",
            "si_snr": _decibels(mixture, file),
        }

    def _si_snr(self, estimate, talkers, doa):
        """Of an estimate, against the talker who is near; None without."""

        def away(talker):
            degrees = abs(talker["doa"] - doa)
            return min(degrees, 360 - degrees)

        nearest = min(talkers, key=away, default=None)
        if nearest is None or away(nearest) >= NEAR:
            return None
        number = Path(nearest["audio"]).stem
        return _decibels(estimate, self._talkers[number])

    def _located(self, audio):
        """Where talkers are; None where nothing can tell."""
        few = len(self.microphones) < MIN_MICROPHONES
        if few or audio.scan().silent:
            return None
        return self._first.locate_file(audio, seconds=LOCATE_SECONDS)

    def _write_reference(self, audio, number):
        """What the first microphone hears, for the page to play."""
        with TargetOutput(self.scratch / f"{number}.wav") as output:
            for block in audio.blocks():
                output.push(block[:, 0].contiguous(), block[:, 0].contiguous())
            output.finish()

    def _forget_uploads(self):
        """Delete what was uploaded first."""
        kept = list(self._recordings.items())  # other threads may add some
        uploads = [number for number, r in kept if r["uploaded"]]
        for number in uploads[:-MOST_UPLOADS]:
            entry = self._recordings.pop(number, None)
            if entry is None:  # forgotten by another upload
                continue
            entry["path"].unlink(missing_ok=True)
            (self.scratch / f"{number}.wav").unlink(missing_ok=True)

    def _forget_results(self):
        """Delete the oldest results."""
        for number in list(self._results)[:-MOST_RESULTS]:
            self._results.pop(number).unlink(missing_ok=True)


def _heights(directions):
    """The curve of a dial: smooth, the highest 1; empty without talkers."""
    if directions is None or not directions.talkers:
        return []
    weights = torch.hann_window(SMOOTH, periodic=False)[None, None]
    ends = "circular" if len(directions.curve) == 360 else "constant"
    half = SMOOTH // 2
    curve = F.pad(directions.curve[None, None], (half, half), mode=ends)
    curve = F.conv1d(curve, weights)
    curve = curve[0, 0] / curve.max()
    return [round(height, 3) for height in curve.tolist()]


def _decibels(estimate, target):
    """SI-SNR of one file against another; None where it is infinite."""
    signals = []
    for path in (estimate, target):
        signal, rate = soundfile.read(path, dtype="float32")
        if signal.ndim != 1 or rate != SAMPLE_RATE:
            raise AudioError(path, "not one channel at 16 kHz", "convert it")
        signals.append(torch.from_numpy(signal))
    value = si_snr(*signals).item()
    return round(value, 1) if math.isfinite(value) else None


def _in_the_plane(positions):
    """[x, y] of microphones around the array's middle; the farthest at 1."""
    if positions.dim() == 1:
        positions = torch.stack([positions, torch.zeros_like(positions)], 1)
    middle = (positions.amin(0) + positions.amax(0)) / 2
    places = positions - middle
    places = places / places.norm(dim=1).max().clamp_min(1e-9)
    return [[round(value, 4) for value in place] for place in places.tolist()]


def _facts(name, model):
    """What the page says of a model."""
    packed = read_model(model.model_file)
    sizes = [(t.bits, t.numel()) for t in packed.quantized.values()]
    sizes += [(FLOAT_BITS, t.numel()) for t in packed.floats.values()]
    return {
        "name": name,
        "bytes": packed.path.stat().st_size,
        "bits": round(mean_bits(sizes), 2),
    }


class DemoServer(ThreadingHTTPServer):
    """Serves one `Demo`.

    Arguments
    ---------
    demo : Demo
    port : int
        0: any that is free.
    """

    daemon_threads = True
    request_queue_size = 128  # a page that is opened often, or by many tabs

    def __init__(self, demo, port=0):
        self.demo = demo
        self.page = files(__package__).joinpath("demo_page.html").read_bytes()
        super().__init__((HOST, port), _Handler)

    @property
    def address(self):
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"


@contextmanager
def serve(demo, port=0):
    """Run a server that is closed in the end."""
    try:
        server = DemoServer(demo, port)
    except OSError as error:
        raise OSError(
            f"port {port} cannot be used ({error.strerror}): name another "
            "with --port"
        ) from error
    try:
        yield server
    finally:
        server.server_close()


class _Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """Answers the page's requests."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte

    def do_GET(self):
        """Page, state, audio."""
        self._answer(self._get)

    def do_POST(self):
        """Uploads and separations."""
        self._answer(self._post)

    def log_message(self, *arguments):
        """Keep the terminal quiet."""

    def _get(self):
        path = urlsplit(self.path).path
        if path == "/":
            return "text/html; charset=utf-8", self.server.page
        if path == "/api/state":
            return _json(self.server.demo.state())
        folder, _, name = path.rpartition("/")
        number, _, ending = name.partition(".")
        if folder == "/audio" and ending == "wav":
            file = self.server.demo.audio_path(number)
            if file is not None:
                return "audio/wav", file.read_bytes()
        raise _Refusal(HTTPStatus.NOT_FOUND, f"there is no {path}")

    def _post(self):
        if self.headers.get(OWN_HEADER) is None:
            raise _Refusal(HTTPStatus.FORBIDDEN, "not asked by the demo page")
        url = urlsplit(self.path)
        if url.path == "/api/separate":
            return _json(self.server.demo.separate(**self._request()))
        if url.path == "/api/upload":
            name = parse_qs(url.query).get("name", ["recording"])[0][:100]
            return _json(self._upload(name))
        raise _Refusal(HTTPStatus.NOT_FOUND, f"there is no {url.path}")

    def _request(self):
        """Arguments of `Demo.separate`, of the right types."""
        try:
            body = self.rfile.read(self._length(MAX_REQUEST))
            request = strict_json(body)
            return {
                "recording": str(request["recording"]),
                "model": str(request["model"]),
                "doa": float(request["doa"]),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise _Refusal(
                HTTPStatus.BAD_REQUEST,
                'expected {"recording": ..., "model": ..., "doa": ...}',
            ) from error

    def _upload(self, name):
        """Keep a file if it is a recording that the models take."""
        left = self._length(MAX_UPLOAD)
        path = self.server.demo.scratch / f"upload_{uuid4().hex}"
        try:
            with open(path, "wb") as file:
                while left:
                    piece = self.rfile.read(min(left, 2**20))
                    if not piece:
                        raise ValueError("the upload was cut short")
                    left -= file.write(piece)
            return self.server.demo.add_recording(path, name, uploaded=True)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _length(self, most):
        """Bytes of the request's body."""
        text = self.headers.get("Content-Length", "")
        if not text.isdecimal():
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "no Content-Length")
        if int(text) > most:
            raise _Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"{int(text) / 2**20:.0f} MiB are too much: up to "
                f"{most / 2**20:.0f} MiB",
            )
        return int(text)

    def _check_host(self):
        """Refuse names that some other site may have pointed here."""
        port = self.server.server_port
        if self.headers.get("Host") not in [f"{n}:{port}" for n in NAMES]:
            raise _Refusal(HTTPStatus.FORBIDDEN, "not this host")

    def _answer(self, method):
        """Send what a method returns, or why it does not."""
        status = HTTPStatus.OK
        try:
            self._check_host()
            kind, body = method()
        except _Refusal as refusal:
            status = refusal.status
            kind, body = _json({"error": str(refusal)})
        except (ValueError, OSError) as error:
            status = HTTPStatus.UNPROCESSABLE_ENTITY
            kind, body = _json({"error": str(error)})
        if status != HTTPStatus.OK:
            self.close_connection = True  # its body may be unread
        try:
            self.send_response(status)
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the reader has gone


def _json(content):
    """Type and bytes of an answer."""
    return "application/json", json.dumps(content).encode()
