"""The demo page and its server, for this machine only.

The page is one file without anything from elsewhere. The server listens on
the loopback address. Other pages in the same browser cannot use it: requests
must name this host, and those that change something carry a header that no
foreign page may send.
"""

import json
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

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


class DemoServer(ThreadingHTTPServer):
    """Serves one `Demo`.

    Arguments
    ---------
    demo : Demo
    port : int
        0: any that is free.
    """

    daemon_threads = True

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
    """A server that is closed in the end.

    Arguments
    ---------
    demo : Demo
    port : int
        0: any that is free.
    """
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
            asked = self._asked()
            return _json(self.server.demo.separate(**asked))
        if url.path == "/api/upload":
            name = parse_qs(url.query).get("name", ["recording"])[0][:100]
            return _json(self._upload(name))
        raise _Refusal(HTTPStatus.NOT_FOUND, f"there is no {url.path}")

    def _asked(self):
        """Arguments of `Demo.separate`, of the right types."""
        try:
            asked = json.loads(self.rfile.read(self._length(MAX_REQUEST)))
            return {
                "recording": str(asked["recording"]),
                "model": str(asked["model"]),
                "doa": float(asked["doa"]),
            }
        except (
            *(KeyError, TypeError, ValueError),
            *(OverflowError, RecursionError),
        ) as error:
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
