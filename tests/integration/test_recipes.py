"""Every row of tests/recipes, at tiny size, in SpeechBrain's own format."""

import csv
import difflib
import importlib.util
import json
import re
import shlex
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from speechbrain.inference.ASR import EncoderASR

pytest.importorskip("espeakng_loader")
pytest.importorskip("pyroomacoustics")

ROOT = Path(__file__).parents[2]
CSV = ROOT / "tests/recipes/Embedded.csv"
COLUMNS = (
    "Task,Dataset,Script_file,Hparam_file,Data_prep_file,Readme_file,"
    "Result_url,HF_repo,test_debug_flags,test_debug_checks,performance"
)
# Links to the files at the root, which have tests of their own, and files
# that others include.
ELSEWHERE = (
    "recipes/Embedded/separation/",
    "recipes/Embedded/ASR/front_end/",
    "inference",
)


def read_rows():
    """The rows of the table."""
    with open(CSV, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


ROWS = read_rows()
NAMES = [row["Hparam_file"].removeprefix("recipes/Embedded/") for row in ROWS]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder in the place of tests/tmp; the first row makes the corpus."""
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture
def one_thread():
    """Torch with one thread, as OMP_NUM_THREADS=1 gives a process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load_script(path):
    """A recipe's script as a module."""
    name = re.sub(r"\W", "_", str(path))
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # whose file the experiment's folder copies
    spec.loader.exec_module(module)
    return module


def last_value(log, variable, epoch):
    """A value that the train log has for an epoch."""
    pattern = rf"epoch: {epoch}\b.*?{variable}: ([-+.\de]+)"
    return float(re.search(pattern, log)[1])


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_row(row, shared, one_thread, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = ROOT / row["Script_file"]
    monkeypatch.syspath_prepend(script.parent)  # as `python train.py` has it
    output = shared / row["Hparam_file"].removesuffix(".yaml")
    flags = row["test_debug_flags"].replace("tests/tmp", str(shared))
    flags = [*shlex.split(flags), "--device=cpu", f"--output_folder={output}"]
    load_script(row["Script_file"]).main([row["Hparam_file"], *flags])

    checks = row["test_debug_checks"]
    for name in re.search(r"file_exists=\[(.*?)\]", checks)[1].split(","):
        assert (output / name).exists(), name
    wanted = re.search(r"performance_check=\[(.*?)\]", checks)[1]
    file, variable, limit, epoch = (part.strip() for part in wanted.split(","))
    epoch = int(epoch.removeprefix("epoch: "))
    log = (output / file).read_text()
    last = last_value(log, variable, epoch)
    assert last <= float(limit.removeprefix("<="))
    assert last < last_value(log, variable, 1)
    check_bits(output / "save", "_4bit" in row["Hparam_file"])
    if (output / "published").exists():
        check_published(output, shared / "embedded")


def check_bits(save, quantized):
    """The checkpoint has quantizers, or none."""
    names = []
    for path in filter(zipfile.is_zipfile, save.rglob("*.ckpt")):
        state = torch.load(path, weights_only=True)
        names += [name for name in state if isinstance(name, str)]
    assert names
    assert any("parametrizations" in name for name in names) == quantized


def check_published(output, data):
    """Stock SpeechBrain loads the folder, with the trained weights."""
    folder = output / "published"
    interface = EncoderASR.from_hparams(source=str(folder))
    stored = torch.load(folder / "asr.ckpt", weights_only=True)
    state = interface.hparams.asr.state_dict()
    assert set(state) == set(stored)
    assert all(torch.equal(state[name], stored[name]) for name in state)
    test = json.loads((data / "test_speech.json").read_text())
    path = next(iter(test.values()))["wav"].replace("{data_root}", str(data))
    assert isinstance(interface.transcribe_file(path), str)


def test_table_lists_every_recipe():
    assert CSV.read_text().splitlines()[0] == COLUMNS
    folder = ROOT / "recipes/Embedded"
    found = {p.relative_to(ROOT).as_posix() for p in folder.rglob("*.yaml")}
    found = {p for p in found if not any(part in p for part in ELSEWHERE)}
    assert found == {row["Hparam_file"] for row in ROWS}
    for row in ROWS:
        for column in ("Script_file", "Data_prep_file", "Readme_file"):
            assert (ROOT / row[column]).is_file()
        readme = (ROOT / row["Readme_file"]).read_text()
        assert f"hparams/{Path(row['Hparam_file']).name}" in readme
        file = Path(row["Hparam_file"])
        header = (ROOT / file).read_text().partition("\n\n")[0]
        command = rf"train\.py [\s\\#]*\S*hparams/{file.name}\b"
        assert re.search(command, header), file


@pytest.mark.parametrize(
    "quantized", [n for n in NAMES if n.endswith("_4bit.yaml")]
)
def test_quantization_is_a_block_of_yaml(quantized):
    folder = ROOT / "recipes/Embedded"
    plain = (folder / quantized.replace("_4bit", "")).read_text().splitlines()
    lines = (folder / quantized).read_text().splitlines()
    changes = [
        change
        for change in difflib.ndiff(plain, lines)
        if change[0] in "+-" and change[2:].strip()
    ]
    # The header tells the file's own command, and results are of one file.
    changes = [change for change in changes if change[2] != "#"]
    keys = ("output_folder", "inference_file")  # other places
    moved = [c for c in changes if c[2:].startswith(keys)]
    block = [c for c in changes if c not in moved]
    assert len(moved) in (2, 4)  # one line out, one in
    assert len(block) <= 6 and all(change[0] == "+" for change in block)
    assert "quantizer: !new:speechbrain_mpq.Quantizer" in block[0]
    script = (folder / quantized).parents[1] / "train.py"
    assert "quantiz" not in script.read_text()
