"""The command line: the table of a folder, bad input, an impatient reader."""

import json
import subprocess
import sys

import pytest

from speechbrain_mpq import __version__
from speechbrain_mpq.__main__ import main
from speechbrain_mpq.evaluation.runs import summarise
from speechbrain_mpq.utils import write_json

ITEMS = [
    {
        "id": f"{index}",
        "angle": angle,
        "si_snr": 8.0,
        "si_snr_mixture": 0.0,
        "pesq": 2.0,
        "reference": "set red now",
        "hypothesis": "set red",
    }
    for index, angle in enumerate((5, 30, 60, 120))
]


def write_run(folder, system, bits, seed):
    """A finished run."""
    path = folder / f"{system}_{bits}bit" / f"{seed}"
    path.mkdir(parents=True)
    metrics = {"system": system, "bits": bits, "seed": seed}
    write_json(path / "test_items.json", ITEMS)
    write_json(path / "metrics.json", {**metrics, **summarise(ITEMS)})
    return path


@pytest.fixture
def results(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, "fp32", 32, seed)
        write_run(tmp_path, "kl", 4, seed)
    return tmp_path


def test_table_of_a_folder(results, capsys):
    assert main(["table", str(results)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split()[:4] for line in printed.splitlines()]
    for row in (["1", "fp32", "32", "1"], ["2", "kl", "4", "mean"]):
        assert row in rows
    assert main(["table", str(results), "--seeds", "mean"]) == 0
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines()]
    assert ["1", "fp32", "32", "1"] not in rows
    assert ["1", "fp32", "32", "mean"] in rows


def test_baselines_by_name(results, capsys):
    folders = [str(results / name) for name in ("fp32_32bit", "kl_4bit")]
    assert main(["table", *folders, "--against", "kl_4bit"]) == 0
    assert "from sys 2, kl 4 bit" in capsys.readouterr().out
    assert main(["table", *folders, "--against", "nas"]) == 1
    assert "choose from: fp32_32bit, kl_4bit" in capsys.readouterr().err


def test_page(results, tmp_path):
    page = tmp_path / "table.html"
    assert main(["table", str(results), "--html", str(page)]) == 0
    html = page.read_text("utf-8")
    assert html.count("<table") == 2 and "<td>kl</td>" in html
    assert "http" not in html and "<script" not in html


@pytest.mark.parametrize("text", ["{", "[]", '{"a": NaN}', ""])
def test_broken_metrics_are_named(results, capsys, text):
    path = results / "kl_4bit" / "2" / "metrics.json"
    path.write_text(text)
    assert main(["table", str(results)]) == 1
    printed = capsys.readouterr()
    assert str(path) in printed.err and not printed.out


def test_other_test_sets_have_tables_of_their_own(results, capsys):
    folder = results / "kl_4bit" / "2"
    other = [{**item, "reference": "set blue now"} for item in ITEMS]
    metrics = json.loads((folder / "metrics.json").read_text())
    write_json(folder / "metrics.json", {**metrics, **summarise(other)})
    write_json(folder / "test_items.json", other)
    assert main(["table", str(results), "--against", "fp32"]) == 0
    printed = capsys.readouterr().out
    first, second = printed.split("Test set 2 of 2, ")
    assert str(folder) in second and "kl 4 bit" not in second
    assert [first.count(name) for name in ("fp32 ", " kl ")] == [4, 1]
    assert [second.count(name) for name in (" fp32", " kl ")] == [0, 1]


def test_the_table_has_80_columns_or_all_conditions(results, capsys):
    assert main(["table", str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "45-90" not in lines[0]
    assert main(["table", str(results), "--wide"]) == 0
    printed = capsys.readouterr().out
    assert "45-90" in printed and "s/hour" in printed


def test_a_reader_that_stops_early_is_no_error(results):
    """As `... table results/ | head -1`, the reader gone before the first."""
    command = [sys.executable, "-m", "speechbrain_mpq", "table", str(results)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_verify_goes_on_behind_a_file(capsys, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert main(["verify", str(file), str(tmp_path / "none")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "name the folder that it is in" in lines[0]


def test_an_experiments_folder_leads_to_its_packed_one(capsys, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "model.safetensors").write_bytes(b"")
    assert main(["inspect", str(tmp_path)]) == 1
    assert f"save_packed wrote, as {packed}" in capsys.readouterr().err
