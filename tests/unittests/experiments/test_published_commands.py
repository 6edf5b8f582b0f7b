"""Every command of README and docs/results.md, typed in one folder, in order.

Nothing is trained: an experiment leaves at once what its settings would have
let it leave. So no command may refuse another's folder, or be refused.
"""

import hashlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import make_items, make_metrics

from speechbrain_mpq.__main__ import main as speechbrain_mpq
from speechbrain_mpq.evaluation.runs import gather
from speechbrain_mpq.experiments.command_line import Cost, guarded
from speechbrain_mpq.training import experiment
from speechbrain_mpq.utils import write_json

ROOT = Path(__file__).parents[3]
DOCUMENTS = ("README.md", "docs/options.md", "docs/results.md")
# What decides on the test mixtures.
TESTED = ("doa_error", "corpus", "corpus_seed", "mixtures", "test_speech")


def script(path):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(path).stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train():
    module = script("train.py")
    yield module
    del sys.modules["train"]


@pytest.fixture(scope="module")
def table1():
    module = script("benchmarks/table1.py")
    yield module
    del sys.modules["table1"]


def fake_run(step, *_):
    """What is left by an experiment that was run to its end."""
    begun = step.begin(lambda hparams, prototypes: ())
    if begun.finished:
        return
    begun.start()
    hparams, settings = step.hparams, begun.request["settings"]
    packed = begun.folder / "packed"
    packed.mkdir()
    (packed / "model.safetensors").write_bytes(b"")
    tested = json.dumps({key: settings[key] for key in TESTED})
    seed = int(hashlib.sha256(tested.encode()).hexdigest()[:8], 16)
    items = make_items(seed)
    write_json(begun.folder / "test_items.json", items)
    full = hparams["bits"] == 32
    more = {"variant": begun.variant} if begun.variant else {}
    metrics = make_metrics(
        hparams["system"],
        hparams["bits"],
        items,
        estimator=None if full else hparams["estimator"].__name__,
        seed=hparams["seed"],
        model_bytes=1000 * hparams["bits"],
        corpus=hparams["corpus"],
        **more,
    )
    write_json(begun.folder / "metrics.json", metrics)


def looked_at_once(patch):
    """Load what several commands ask for once: objects are looked at only."""
    look, known = experiment._look, {}

    def look_once(source):
        if source.resolved not in known:
            known[source.resolved] = look(source)
        own = {"output_folder": str(source.output_folder)}
        return {**known[source.resolved], **own}

    patch.setattr(experiment, "_look", look_once)


def commands(document):
    """The commands of a document, in order; `...` and comments written out."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found, variables = [], {}
    blocks = re.finditer(
        r"^```(?P<language>\w*)\n(?P<block>.*?)^```$"
        r"|(?<!`)`(?P<inline>(?:python|\.\.\.)\s[^`]*)`",
        text,
        re.DOTALL | re.MULTILINE,
    )
    for match in blocks:
        if match["language"]:
            continue
        block = match["block"] or " ".join(match["inline"].split())
        for line in block.replace("\\\n", " ").splitlines():
            assigned = re.fullmatch(r'(\w+)="(.*)"', line.strip())
            if assigned:
                variables[assigned[1]] = " ".join(assigned[2].split())
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            line = re.sub(
                r"^\.\.\.", "python train.py hparams/kl_4bit.yaml", line
            )
            line, _, comment = line.partition(" #")
            line = " ".join(line.split())
            found.append(line)
            option = re.search(r"--(bits|seed) \S+$", line)
            others = re.match(r" and ([\d., ]*\d)", comment)
            for value in others[1].split(", ") if option and others else []:
                found.append(line[: option.start(1)] + f"{option[1]} {value}")
    return [line for line in found if _ours(line)]


def _ours(line):
    """Whether a command runs experiments or shows them."""
    return re.match(
        r"(python train.py|torchrun .*train.py|python benchmarks/table1.py|"
        r"(python -m speechbrain_mpq|speechbrain-mpq) table|"
        r"python recipes/Embedded/growth/grow.py|make demo$)",
        line,
    )


def typed(line, train, table1):
    """Exit status of a command."""
    words = shlex.split(line)
    if line == "make demo":
        words = ["python", "train.py", "hparams/kl_4bit.yaml"]
    if "train.py" in words:
        return guarded(train.main, words[words.index("train.py") + 1 :])
    if "grow.py" in line:
        Path(words[words.index("-o") + 1]).mkdir(parents=True, exist_ok=True)
        return 0
    if "table1.py" in line:  # one at a time: no process of its own here
        return table1.main([*words[2:], "--jobs", "1"])
    return speechbrain_mpq(words[words.index("table") :])


def test_documents_have_commands():
    found = {document: commands(document) for document in DOCUMENTS}
    assert len(found["docs/options.md"]) > 15
    assert len(found["docs/results.md"]) > 15
    assert (
        "python train.py hparams/kl_4bit.yaml --rows 32"
        in found["docs/options.md"]
    )


def test_no_command_refuses_another(
    train, table1, tmp_path, monkeypatch, capsys
):
    """Typed in the order of the documents, in one folder of results."""
    monkeypatch.chdir(tmp_path)
    looked_at_once(monkeypatch)
    monkeypatch.setattr(train, "run", fake_run)
    monkeypatch.setattr(
        train.stages, "check", lambda *_: Cost(["test only"], 1.0, True)
    )
    monkeypatch.setattr(table1, "ROOT", tmp_path)

    def run_in_process(command, log):
        code = guarded(train.main, command[2:])
        log.write(capsys.readouterr().out)
        return code

    monkeypatch.setattr(table1, "_exit_status", run_in_process)
    told = []
    typed_in_order = [line for name in DOCUMENTS for line in commands(name)]
    for line in ("make demo", *typed_in_order):
        code = typed(line, train, table1)
        printed = capsys.readouterr()
        if code:
            told.append(f"{line}\n    {printed.err}{printed.out}")
    assert not told, "\n".join(told)
    # A table for each test set, no two runs of one name.
    assert len(gather("results")) > 40
