"""Every row of tests/recipes, at tiny size, in SpeechBrain's own format."""

import difflib
import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT, read_rows, run_row
from speechbrain.inference.ASR import EncoderASR

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


TABLE = read_rows()
# Their rows are run by tests of their own, which look closer
CLOSER = (
    "recipes/Embedded/Enhancement/",
    "recipes/Embedded/SpeechQuality/",
    "recipes/Embedded/ASR/TDNNF/",
)
ROWS = [row for row in TABLE if not row["Script_file"].startswith(CLOSER)]
NAMES = [row["Hparam_file"].removeprefix("recipes/Embedded/") for row in ROWS]


@pytest.fixture(scope="module")
def shared(speech, tmp_path_factory):
    """The folder in the place of tests/tmp, with the corpus in it."""
    folder = tmp_path_factory.mktemp("recipes")
    speech(folder / "embedded")
    return folder


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_row(row, shared):
    output = run_row(row, shared)
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
    assert list(TABLE[0]) == COLUMNS.split(",")
    folder = ROOT / "recipes/Embedded"
    found = {p.relative_to(ROOT).as_posix() for p in folder.rglob("*.yaml")}
    found = {p for p in found if not any(part in p for part in ELSEWHERE)}
    assert found == {row["Hparam_file"] for row in TABLE}
    assert len(ROWS) == len(TABLE) - len(CLOSER)
    for row in TABLE:
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
