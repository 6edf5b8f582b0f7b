"""What is said of a quantized interface: table, notes and model card."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.ptq import pretrained_folder
from speechbrain_mpq.ptq.pretrained_folder import (
    KEPT,
    PTQReport,
    SourceNotFoundError,
    check_source,
    model_card,
    outcome_table,
    read_front_matter,
)
from speechbrain_mpq.quantization.quant_api import quantize_


@pytest.fixture
def outcome():
    """Of a layer whose bias stays in float."""
    return PTQReport(
        folder=Path("asr_4bit"),
        source="someone/asr",
        cls=torch.nn.Linear,
        budget="4bit",
        plan=quantize_(torch.nn.Linear(8, 4), 4, exclude="bias"),
        bytes={"source": 144, "packed": 36},
        divergence=0.01,
        unit="KL",
        quality={},
        left_alone=[{"reason": "biases", "parameters": 4}],
        reasons={"tokenizer": "loads itself"},
        card={"license": "mit", "language": "fr", "tags": ["asr"]},
    )


def test_table_says_what_became_of_it(outcome):
    rows = [row.split() for row in outcome_table(outcome).splitlines()]
    assert rows[0] == ["source", "packed"]
    assert [*"files with weights, bytes 144 36".split()] in rows
    assert "average bits of a quantized weight 32 4.00".split() in rows
    assert ["KL", "0", "0.01"] in rows
    assert "4 parameters stay in float: biases.".split() in rows
    assert "Not quantized: tokenizer (loads itself).".split() in rows
    assert rows[-3][:2] == ["No", "quality"]


def test_card_is_one_that_the_hub_reads(outcome):
    start, matter, text = model_card(outcome).split("---\n", 2)
    matter = yaml.safe_load(matter)
    assert start == ""
    assert matter["license"] == "mit" and matter["language"] == "fr"
    assert matter["base_model"] == "someone/asr"
    assert matter["base_model_relation"] == "quantized"
    assert {"speechbrain_mpq", "quantized", "4-bit", "asr"} <= {*matter["tags"]}
    assert "| times smaller | 4.0 |" in text
    assert "| KL | 0 | 0.01 |" in text
    assert "* 4 parameters stay in float: biases." in text
    assert 'Linear.from_hparams(source="asr_4bit")' in text
    assert "| 4 | 1 | 32 | 88.9 % |" in text


@pytest.mark.parametrize(
    "matter, kept",
    [
        ("language: no", {"language": "no"}),  # not false
        ("license: mit\nversion: 2020-99-99", {"license": "mit"}),
        ("tags: asr", {"tags": ["asr"]}),
        ("tags: 5", {"tags": ["5"]}),
        ("license: {a: b}\nlanguage: [fr, no]", {"language": ["fr", "no"]}),
        ("license:", {}),
    ],
)
def test_front_matter_is_taken_over_as_text(outcome, tmp_path, matter, kept):
    text = f"---\nlibrary: x\n{matter}\n---\n# M\n"
    (tmp_path / "README.md").write_text(text, "utf-8-sig")
    outcome.card = read_front_matter(tmp_path)
    _, written, _ = model_card(outcome).split("---\n", 2)
    written = yaml.load(written, yaml.BaseLoader)
    tags = kept.pop("tags", [])
    assert [tag for tag in written["tags"] if tag in ("asr", "5")] == tags
    assert {key: written[key] for key in KEPT if key in written} == kept


@pytest.mark.parametrize(
    "content",
    [
        "---\nauthor: Müller\n---\n".encode("latin-1"),
        "---\nlicense: mit\n---\n".encode("utf-16"),
        b"---\na: " + b"[" * 5000 + b"\n---\n",
        b"---\n- mit\n---\n",
        b"---\n'\n---\n",
    ],
)
def test_damaged_front_matter_is_told_and_loses_no_work(
    tmp_path, caplog, content
):
    (tmp_path / "README.md").write_bytes(content)
    assert read_front_matter(tmp_path) == {}
    (record,) = caplog.records
    assert str(tmp_path / "README.md") in record.getMessage()


class NoModels(BaseHTTPRequestHandler):
    """A hub that has nothing."""

    def do_HEAD(self):
        """As the hub answers for a name that it does not know."""
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *message):
        """Be silent."""


@pytest.fixture
def empty_hub(monkeypatch):
    """The client asks a server on this machine."""
    with HTTPServer(("127.0.0.1", 0), NoModels) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        use_hub(monkeypatch, address)
        yield address
        server.shutdown()
        thread.join()


def use_hub(monkeypatch, address):
    """Ask the hub at this address."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def no_connection(monkeypatch):
    """Whoever asks the hub fails."""

    def asked(*arguments, **options):
        raise AssertionError("must not be asked")

    monkeypatch.setattr(pretrained_folder, "get_hf_file_metadata", asked)


@pytest.mark.parametrize(
    "source", ["nosuch", "/no/folder", "a/b/c", "../up", "https://a.b/model"]
)
def test_what_cannot_be_a_name_is_not_asked_for(source, no_connection):
    with pytest.raises(SourceNotFoundError, match="no name on the Hugging"):
        check_source(source)


def test_folders_without_a_model(tmp_path, no_connection):
    model, empty = tmp_path / "asr_mini", tmp_path / "asr"
    for folder in (model, empty):
        folder.mkdir()
    (model / "hyperparams.yaml").touch()
    check_source(model)
    near = f"near misses: {model}"
    with pytest.raises(SourceNotFoundError, match=f"has no hyper.*{near}"):
        check_source(empty)
    with pytest.raises(SourceNotFoundError, match=f"no such folder.*{near}"):
        check_source(tmp_path / "asr_minni")
    with pytest.raises(SourceNotFoundError, match="is a file: name the folder"):
        check_source(model / "hyperparams.yaml")


def test_name_that_the_hub_does_not_know(empty_hub):
    with pytest.raises(SourceNotFoundError, match="no public model of this"):
        check_source("nobody/nothing")


def test_hub_that_does_not_answer(monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:9")  # discard: nobody listens
    with pytest.raises(SourceNotFoundError, match="cannot be reached"):
        check_source("nobody/nothing")


def test_downloaded_models_need_no_connection(
    tmp_path, monkeypatch, no_connection
):
    snapshot = tmp_path / "models--nobody--something/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "hyperparams.yaml").touch()
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    check_source("nobody/something")


def test_command_tells_it_in_one_line(tmp_path, capsys, no_connection):
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"a": {"wav": "a.wav"}}))
    line = ["quantize", "--source", "nosuch", "--class", "EncoderASR"]
    line += ["--calibration", str(manifest), "--budget", "4bit"]
    assert main([*line, "-o", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("nosuch: no such folder, and no name on")
    assert printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out").exists()
