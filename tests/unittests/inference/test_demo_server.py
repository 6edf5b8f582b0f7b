"""The demo's HTTP interface."""

import copy
import http.client
import io
import json
import socket
import urllib.parse
import urllib.request

import numpy as np
import pytest
import soundfile
import torch
from helpers import audio_bytes, served, small_demo, small_models

from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.inference.demo_server import (
    MAX_SECONDS,
    MAX_UPLOAD,
    MOST_RESULTS,
    MOST_UPLOADS,
    OWN_HEADER,
    Demo,
    serve,
)

OWN = {OWN_HEADER: "1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return small_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def demo(models, tmp_path):
    return small_demo(models, tmp_path)


@pytest.fixture
def server(demo):
    with served(demo) as server:
        yield server


def ask(server, method, path, body=None, headers=OWN):
    """Status, headers and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.headers["Content-Type"] == "application/json":
        content = json.loads(content)
    return answer.status, answer.headers, content


def separate(server, **changes):
    """Ask for a separation."""
    asked = {"recording": "1", "model": "2 bit", "doa": 60, **changes}
    return ask(server, "POST", "/api/separate", json.dumps(asked))


def test_page_needs_nothing_from_elsewhere(server):
    status, headers, page = ask(server, "GET", "/")
    assert status == 200 and page.startswith(b"<!doctype html>")
    outside = page.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"http:" not in outside and b"https:" not in outside
    assert b"src=" not in outside and b"@import" not in outside
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert server.server_address[0] == "127.0.0.1"


def test_state(server, models):
    status, _, state = ask(server, "GET", "/api/state")
    assert status == 200 and state["array_size"] == 15
    assert [m["name"] for m in state["models"]] == ["8 bit", "2 bit"]
    assert [m["bits"] for m in state["models"]] == [8, 2]
    assert state["models"][0]["bytes"] > 2 * state["models"][1]["bytes"]
    (recording,) = state["recordings"]
    assert recording["name"] == "a <b>mixture</b>"
    assert recording["doas"] == [60, 120] and recording["seconds"] == 1


def test_talkers_of_uploads_are_located(demo):
    """A click that all microphones hear at once is straight ahead."""
    clicks = np.zeros((16000, 15), np.float32)
    clicks[::1600] = 0.5
    clicks += 1e-4 * np.random.default_rng(0).standard_normal(clicks.shape)
    path = demo.scratch / "clicks.wav"
    soundfile.write(path, clicks, 16000)
    shown = demo.add_recording(path, "clicks")
    assert shown["doas"] == [90] and len(shown["curve"]) == 181
    assert shown["curve"][90] == 1 and shown["curve"][45] < 0.05
    assert demo.add_recording(path, "clicks", [45.0])["doas"] == [45]
    soundfile.write(path, 0 * clicks, 16000)
    shown = demo.add_recording(path, "silence")
    assert shown["doas"] == [] and shown["curve"] == []


def test_separation_is_the_interface_s(server, models, demo):
    status, _, result = separate(server, doa=75.5)
    assert status == 200 and result["seconds"] > 0 and result["speed"] > 0
    status, headers, content = ask(server, "GET", result["audio"])
    assert status == 200 and headers["Content-Type"] == "audio/wav"
    found, rate = soundfile.read(io.BytesIO(content))
    path = demo.scratch / "built_in.wav"
    expected = models["2 bit"].separate_file(path, 75.5)
    assert rate == 16000 and np.allclose(found, expected, atol=2**-15)


def test_simulated_mixtures_have_a_si_snr(server, demo):
    """Where the talker alone is known, and near to what is asked for."""
    _, _, state = ask(server, "GET", "/api/state")
    ((talker,),) = [r["talkers"] for r in state["recordings"]]
    _, _, content = ask(server, "GET", talker["audio"])
    alone, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    mixture, _ = soundfile.read(demo.scratch / "1.wav", dtype="float32")

    def decibels(signal):
        pair = torch.from_numpy(signal), torch.from_numpy(alone)
        return pytest.approx(si_snr(*pair).item(), abs=0.06)

    assert talker["doa"] == 60 and talker["si_snr"] == decibels(mixture)
    _, _, result = separate(server, doa=63)
    _, _, content = ask(server, "GET", result["audio"])
    estimate, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    assert result["si_snr"] == decibels(estimate)
    _, _, result = separate(server, doa=120)
    assert result["si_snr"] is None


def test_reference_channel_is_heard(server, demo):
    _, _, content = ask(server, "GET", "/audio/1.wav")
    heard, _ = soundfile.read(io.BytesIO(content))
    mixture, _ = soundfile.read(demo.scratch / "built_in.wav")
    first = mixture[:, 0] - mixture[:, 0].mean()
    assert np.allclose(heard, first, atol=2**-15)


def test_upload(server):
    name = urllib.parse.quote("my mix äö.wav")
    path, body = f"/api/upload?name={name}", audio_bytes(0.5, 15, 44100)
    status, _, recording = ask(server, "POST", path, body)
    assert status == 200 and recording["name"] == "my mix äö.wav"
    status, _, result = separate(server, recording=recording["id"])
    assert status == 200
    _, _, content = ask(server, "GET", result["audio"])
    assert len(soundfile.read(io.BytesIO(content))[0]) == 8000


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "cannot be read as audio"),
        (b"RIFF no audio", "mix.wav: cannot be read as audio"),
        (audio_bytes(channels=2), "2 channels; the model needs"),
        (audio_bytes(rate=8000), "8000 Hz"),
        (audio_bytes(MAX_SECONDS + 1, 7, 16000), "up to 120 s"),
    ],
)
def test_bad_uploads_are_explained_and_deleted(server, demo, body, message):
    before = set(demo.scratch.iterdir())
    status, _, answer = ask(server, "POST", "/api/upload?name=mix.wav", body)
    assert status == 422 and message in answer["error"]
    assert set(demo.scratch.iterdir()) == before
    assert len(demo.state()["recordings"]) == 1


@pytest.mark.parametrize(
    "changes, status, message",
    [
        ({"doa": 200}, 422, "0 to 180"),
        ({"doa": "left"}, 400, "expected"),
        ({"doa": None}, 400, "expected"),
        ({"recording": "99"}, 422, "no longer there"),
        ({"recording": "../../etc/passwd"}, 422, "no longer there"),
        ({"model": "no"}, 422, "no model 'no'"),
    ],
)
def test_bad_questions(server, changes, status, message):
    found, _, answer = separate(server, **changes)
    assert found == status and message in answer["error"]


@pytest.mark.parametrize(
    "path",
    ["/audio/99.wav", "/audio/../built_in.wav", "/audio/built_in.wav", "/x"],
)
def test_nothing_else_is_served(server, path):
    assert ask(server, "GET", path)[0] == 404


def test_other_sites_are_refused(server):
    """Neither by a name that points here nor by a form of another page."""
    port = server.server_port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1"):
        assert ask(server, "GET", "/", headers={"Host": host})[0] == 403
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert ask(server, "GET", "/", headers={"Host": host})[0] == 200
    asked = json.dumps({"recording": "1", "model": "2 bit", "doa": 60})
    status, _, _ = ask(server, "POST", "/api/separate", asked, headers={})
    assert status == 403


def test_too_much_is_refused_unread(server):
    for path, length in (
        ("/api/upload", MAX_UPLOAD + 1),
        ("/api/separate", 10**6),
    ):
        headers = {**OWN, "Content-Length": str(length)}
        status, _, answer = ask(server, "POST", path, b"", headers)
        assert status == 413 and "too much" in answer["error"]


def test_old_audio_is_forgotten(demo):
    for index in range(MOST_UPLOADS + 2):
        path = demo.scratch / f"upload_{index}"
        path.write_bytes(audio_bytes(0.1))
        demo.add_recording(path, "u", uploaded=True)
    uploads = list(demo.scratch.glob("upload_*"))
    assert len(uploads) == MOST_UPLOADS
    assert len(demo.state()["recordings"]) == 1 + MOST_UPLOADS
    last = str(MOST_UPLOADS + 4)
    for _ in range(MOST_RESULTS + 2):
        demo.separate(last, "2 bit", 60.0)
    kept = list(demo.scratch.glob("*.wav"))
    built_in = 3  # mixture, its talker, what microphone 1 hears
    assert len(kept) == built_in + MOST_UPLOADS + MOST_RESULTS


def test_models_of_other_arrays_are_refused(models, tmp_path):
    class Other:
        microphones = [1, 2]
        model_file = models["2 bit"].model_file

    with pytest.raises(ValueError, match="models of one array"):
        Demo({**models, "other": Other()}, tmp_path)


def test_a_port_that_is_taken(demo):
    with serve(demo) as server:
        with pytest.raises(OSError, match="name another with --port"):
            with serve(demo, server.server_port):
                pass


def test_a_model_that_puts_out_no_numbers(models, tmp_path):
    broken = copy.deepcopy(models["2 bit"])
    broken.separator.mask_net.conv_out.bias.data[:] = torch.nan
    demo = small_demo({"broken": broken}, tmp_path)
    before = set(tmp_path.iterdir())
    with served(demo) as server:
        status, _, answer = separate(server, model="broken")
    assert status == 422 and "puts out NaN or infinity" in answer["error"]
    assert set(tmp_path.iterdir()) == before


def test_a_burst_of_visitors_waits_for_nobody(server):
    """As many connections at once as a page with many tabs may make."""
    visitors = []
    for _ in range(60):
        visitor = socket.create_connection(server.server_address, timeout=5)
        visitors.append(visitor)
    assert ask(server, "GET", "/api/state")[0] == 200
    for visitor in visitors:
        visitor.close()
