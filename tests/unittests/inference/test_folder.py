"""Packed folders on the Hugging Face hub."""

import base64
import hashlib
import json
import multiprocessing
import re
import runpy
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import published

from speechbrain_mpq.inference.folder import FILES, fetch_folder, push_folder
from speechbrain_mpq.inference.separation import QuantizedSeparator
from speechbrain_mpq.quantization.container import PackedModelError
from speechbrain_mpq.quantization.packing import read_model, save_packed

pytest.importorskip("huggingface_hub")


DATA = Path(__file__).parents[2] / "data"


GOLDEN = DATA / "packed/3"
NAME = "somebody/separator"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as the client needs for models."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *message):
        """Be silent."""

    def answer(self, content, status=200, **headers):
        """Send bytes or JSON."""
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content_Type", "application/json")
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        """Information, trees and files."""
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append(path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        model = re.match(r"/api/models/([^/]+/[^/]+)", path)
        found = file or model
        if found is None or found[1] not in hub.models:
            return self.answer({"error": "none"}, 404)
        files = hub.models[found[1]]
        if file:
            if file[2] not in files:
                code = "EntryNotFound"
                return self.answer({}, 404, X_Error_Code=code)
            content = files[file[2]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            commit = hub.commit(file[1])
            return self.answer(content, ETag=etag, X_Repo_Commit=commit)
        if "/tree/" in path:
            return self.answer(
                [
                    {"type": "file", "path": n, "size": len(c), "oid": "0"}
                    for n, c in files.items()
                ]
            )
        names = [{"rfilename": name} for name in files]
        sha = hub.commit(model[1])
        return self.answer({"id": model[1], "sha": sha, "siblings": names})

    do_HEAD = do_GET

    def do_POST(self):
        """New repositories and commits."""
        hub = self.server
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunks()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.models.setdefault(name, {})
            return self.answer({"url": f"{hub.url}/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name = re.match(r"/api/models/([^/]+/[^/]+)/(\w+)", self.path)
        if name[2] == "preupload":
            files = [
                {**f, "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                hub.models[name[1]][line["value"]["path"]] = content
        commit = hub.commit(name[1])
        url = f"{hub.url}/{name[1]}/commit/{commit}"
        return self.answer({"commitOid": commit, "commitUrl": url})

    def chunks(self):
        """A body of unknown length."""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


class Server(ThreadingHTTPServer):
    """The stand-in; it holds models in memory."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.models, self.asked = {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, name):
        """A hash of a model's files."""
        files = self.models[name]
        content = repr(sorted(files.items())).encode()
        return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(monkeypatch):
    """A running stand-in."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    server = Server()
    thread = threading.Thread(
        target=server.serve_forever, args=[0.02], daemon=True
    )
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def shared(hub):
    """A stand-in with the golden folder, and files that are none of ours."""
    files = {p.name: p.read_bytes() for p in GOLDEN.iterdir()}
    foreign = ("custom.py", "../README.md", "../../hyperparams.yaml")
    hub.models[NAME] = {**files, **dict.fromkeys(foreign, b"foreign")}
    return hub


def test_a_folder_is_taken_as_it_is():
    assert fetch_folder(GOLDEN) == GOLDEN
    assert fetch_folder(str(GOLDEN)) == GOLDEN


@pytest.mark.parametrize(
    "source",
    ["nowhere", "../up", "a/b/c", "/no/folder", "user/..", "a b/c", "..\\x/y"],
)
def test_what_is_neither_folder_nor_name(source):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub"):
        fetch_folder(source)


def test_a_mistyped_folder_is_told_from_the_hub(tmp_path):
    there = {"cache_dir": tmp_path, "local_files_only": True}
    with pytest.raises(FileNotFoundError, match="fast/pakced is no folder"):
        fetch_folder("fast/pakced", **there)


def test_only_our_files_are_downloaded(shared, tmp_path):
    folder = fetch_folder(NAME, cache_dir=tmp_path, endpoint=shared.url)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in GOLDEN.iterdir()}
    assert names <= set(FILES)
    assert not any("custom" in p or ".." in p for p in shared.asked)
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(path.read_bytes() == b"foreign" for path in found)


def test_a_name_loads_and_loads_again_without_a_connection(shared, tmp_path):
    there = {"cache_dir": tmp_path, "endpoint": shared.url}
    first = QuantizedSeparator.from_pretrained(NAME, **there)
    asked = len(shared.asked)
    again = QuantizedSeparator.from_pretrained(
        NAME, local_files_only=True, **there
    )
    assert len(shared.asked) == asked
    local = QuantizedSeparator.from_pretrained(GOLDEN)
    mixture = torch.randn(1, 400, 2)
    expected = local.separate_batch(mixture, [60.0])
    for model in (first, again):
        assert torch.equal(model.separate_batch(mixture, [60.0]), expected)


def test_a_damaged_download_is_refused(shared, tmp_path):
    content = bytearray(shared.models[NAME]["model.safetensors"])
    content[-1] ^= 1
    shared.models[NAME]["model.safetensors"] = bytes(content)
    with pytest.raises(PackedModelError, match="SHA-256"):
        QuantizedSeparator.from_pretrained(
            NAME, cache_dir=tmp_path, endpoint=shared.url
        )


def test_pushed_folders_come_back(hub, tmp_path):
    model = QuantizedSeparator.from_pretrained(GOLDEN)
    there = {"endpoint": hub.url, "token": "hf_none"}
    url = model.push_to_hub("me/mine", message="First", **there)
    assert url.startswith(f"{hub.url}/me/mine/commit/")
    for name, content in hub.models["me/mine"].items():
        assert published(GOLDEN / name) == content, name
    assert set(hub.models["me/mine"]) == {p.name for p in GOLDEN.iterdir()}
    folder = fetch_folder("me/mine", cache_dir=tmp_path, endpoint=hub.url)
    assert read_model(folder).architecture == read_model(GOLDEN).architecture


def test_nothing_else_is_uploaded(hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/README.md").write_text("not at the top")
    push_folder(tmp_path, "me/mine", endpoint=hub.url, token="hf_none")
    assert hub.models["me/mine"] == {"model.safetensors": b"weights"}


def test_links_to_other_places_are_not_uploaded_or_copied(hub, tmp_path):
    secret, folder = tmp_path / "secret", tmp_path / "packed"
    secret.write_text("not for others")
    shutil.copytree(GOLDEN, folder)
    packed = QuantizedSeparator.from_pretrained(folder)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(secret)
    with pytest.raises(ValueError, match="README.md is a link"):
        push_folder(folder, NAME, endpoint=hub.url, token="hf_none")
    assert NAME not in hub.models
    with pytest.raises(ValueError, match="README.md is a link"):
        packed.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def _share(url, cache, folder, version, results, begin=None):
    """Download, then write a model again and again."""
    if begin:
        begin.set()
    loaded = read_model(fetch_folder(NAME, cache_dir=cache, endpoint=url))
    model = runpy.run_path(str(DATA / "make_golden.py"))["golden"](version)
    seen = set()
    for _ in range(25):
        save_packed(model, folder)
        seen.add(read_model(folder).content)
    results.put((loaded.content, seen))


def test_processes_share_a_cache_and_a_folder(shared, tmp_path):
    """Readers always find a whole model, whoever is writing."""
    cache, folder = tmp_path / "cache", tmp_path / "folder"
    context = multiprocessing.get_context("spawn")
    results, begin = context.Queue(), context.Event()
    arguments = shared.url, cache, folder
    process = context.Process(
        target=_share, args=(*arguments, 1, results, begin)
    )
    process.start()
    assert begin.wait(240)
    _share(*arguments, 2, results)
    found = [results.get(timeout=240) for _ in range(2)]
    process.join()
    assert process.exitcode == 0
    contents = [
        (DATA / f"packed/{version}/model.safetensors").read_bytes()
        for version in (1, 2, 3)
    ]
    for loaded, seen in found:
        assert loaded == contents[2]
        assert seen <= set(contents[:2])
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "quantization_config.json",
    ]
