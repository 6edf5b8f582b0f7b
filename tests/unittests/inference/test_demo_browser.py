"""The demo's page in a real browser."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request

import pytest
from helpers import audio_bytes, served, small_demo, small_models


@pytest.fixture
def demo(tmp_path):
    return small_demo(small_models(tmp_path), tmp_path)


@pytest.fixture
def server(demo):
    with served(demo) as server:
        yield server


class Browser:
    """Headless Chromium through its driver's HTTP interface."""

    def __init__(self, width, height):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            ["chromedriver", f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.root = f"http://127.0.0.1:{port}"
        self._wait_for_driver()
        arguments = [
            *("--headless=new", "--no-sandbox", "--disable-gpu"),
            *("--disable-dev-shm-usage", f"--window-size={width},{height}"),
            "--autoplay-policy=no-user-gesture-required",
        ]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        capabilities = {"capabilities": {"alwaysMatch": wanted}}
        made = self.call("POST", "/session", capabilities)
        self.root += f"/session/{made['sessionId']}"

    def _wait_for_driver(self):
        for _ in range(150):
            try:
                return self.call("GET", "/status")
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("chromedriver does not answer")

    def call(self, method, path, content=None):
        """A command of the WebDriver protocol."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self.root + path,
            data,
            {"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script, *arguments):
        """What a script returns in the page."""
        content = {"script": script, "args": arguments}
        return self.call("POST", "/execute/sync", content)

    def until(self, script, *arguments):
        """Wait for a script to return something true."""
        for _ in range(300):
            if value := self.run(script, *arguments):
                return value
            time.sleep(0.1)
        raise TimeoutError(script)

    def close(self):
        """End the session and the driver."""
        try:
            self.call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait()


@pytest.fixture
def browser():
    if not shutil.which("chromedriver"):
        pytest.skip("needs Chromium and its driver")
    browser = Browser(420, 900)  # a phone
    yield browser
    browser.close()


READY = "return Number(document.body.dataset.ready || 0) > arguments[0]"


CARDS = """
return [...document.querySelectorAll(".signal")].map(card => {
  const canvas = card.querySelector("canvas"), pen = canvas.getContext("2d");
  const {data} = pen.getImageData(0, 0, canvas.width, canvas.height);
  return [card.innerText, new Set(data).size];
});"""


DRAG = """
const dial = document.getElementById("dial");
const box = dial.getBoundingClientRect();
const x = box.left + box.width * 0.15, y = box.top + box.height * 0.5;
for (const [kind, dx] of [["pointerdown", 40], ["pointermove", 0],
                          ["pointerup", 0]])
  dial.dispatchEvent(new PointerEvent(kind, {
    clientX: x + dx, clientY: y, pointerId: 1, bubbles: true}));
return Number(dial.getAttribute("aria-valuenow"));"""


def compare_blind(browser):
    """Names are hidden until a choice is made, and orders change."""
    press = "document.getElementById('blind').click()"
    order = "return [...blind].sort((a, b) => a[1] > b[1]).map(p => p[0])"
    orders = set()
    for _ in range(20):  # 2 in a million that chance gives one order only
        browser.run(press)
        orders.add(tuple(browser.run(order)))
        shown = [text for text, _ in browser.run(CARDS)]
        letters = [text.split("\n")[0] for text in shown[-2:]]
        assert letters == ["A", "B"]
        assert not any(" bit" in text or "KiB" in text for text in shown)
        browser.run(press)
    assert orders == {("8 bit", "2 bit"), ("2 bit", "8 bit")}
    browser.run(press)
    (first, second) = browser.run(order)
    browser.run("document.querySelectorAll('.signal.blind .best')[1].click()")
    said = browser.run("return document.getElementById('verdict').innerText")
    assert said == (
        f"You chose B: {second}. A is {first}, B is {second}. Best in 1 blind "
        f"round: {second} 1."
    )
    assert all("KiB" in text for text, _ in browser.run(CARDS)[-2:])


def test_in_a_real_browser(browser, server, demo, tmp_path):
    browser.call("POST", "/url", {"url": server.address})
    browser.until(READY, 0)
    cards = browser.run(CARDS)
    assert [text.split("\n")[0] for text, _ in cards] == [
        *("Mixture", "Talker alone", "8 bit", "2 bit")
    ]
    assert "SI-SNR of the mixture" in cards[1][0]
    for text, _ in cards[2:]:
        assert all(part in text for part in ("real time", "KiB", "dB SI-SNR"))
    assert all("8 kHz" in text and "1.0 s" in text for text, _ in cards)
    # Four values are an empty picture: red, green, blue and opacity
    assert all(colours > 4 for _, colours in cards), "a spectrogram each"
    dial = "return document.getElementById('dial').getAttribute(arguments[0])"
    assert browser.run(dial, "aria-valuenow") == "60"
    wide = "return document.documentElement.scrollWidth - innerWidth"
    assert browser.run(wide) <= 0, "no sideways scrolling on a phone"
    assert browser.run("return document.querySelector('b b') === null")

    angle = browser.run(DRAG)
    assert 120 < angle <= 180, "dragged to the left"
    browser.until(READY, 1)
    _, _, *models = browser.run(CARDS)
    assert all(f"{angle}°" in text for text, _ in models)
    assert not any("SI-SNR" in text for text, _ in models)
    hidden = "return document.querySelectorAll('.signal')[1].hidden"
    assert browser.run(hidden), "nobody is known there"

    browser.run("document.querySelectorAll('.play')[2].click()")
    playing = "return playing && playing.audio.currentTime > 0.05"
    browser.until(playing)
    saved = (
        "return [...document.querySelectorAll('.download')]"
        ".map(a => [a.href, a.download])"
    )
    links = browser.run(saved)
    assert all(link.startswith("blob:") for link, _ in links)
    assert links[2][1] == f"a_b_mixture_b_8_bit_{angle}_degrees.wav"
    compare_blind(browser)

    bad = tmp_path / "stereo.wav"
    bad.write_bytes(audio_bytes(channels=2))
    found = browser.call(
        "POST", "/element", {"using": "css selector", "value": "#file"}
    )
    (element,) = found.values()
    keys = f"/element/{element}/value"
    browser.call("POST", keys, {"text": str(bad)})
    message = "return document.querySelector('.message.on')?.textContent"
    assert "2 channels" in browser.until(message)
    good = tmp_path / "good.wav"
    good.write_bytes(audio_bytes(channels=15))
    browser.call("POST", keys, {"text": str(good)})
    browser.until(READY, 2)
    assert not browser.run(message)
    chosen = "return document.querySelector('[aria-pressed=true]').innerText"
    assert "good.wav" in browser.run(chosen)
    log = browser.call("POST", "/se/log", {"type": "browser"})
    severe = [e["message"] for e in log if e["level"] == "SEVERE"]
    assert [m for m in severe if "422" not in m] == []
