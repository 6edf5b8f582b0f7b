"""The tutorial runs, from its first cell to its last."""

import re

import pytest
from helpers import ROOT

NOTEBOOK = ROOT / "docs/tutorial.ipynb"


def printed(notebook):
    """All that the cells print."""
    return "".join(
        "".join(output["text"])
        for cell in notebook.cells
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
        if output["output_type"] == "stream" and output["name"] == "stdout"
    )


def test_the_tutorial_runs():
    for needed in ("espeakng_loader", "pyroomacoustics", "ipykernel"):
        pytest.importorskip(needed)
    nbclient = pytest.importorskip("nbclient", reason="the extra `test`")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    saved = printed(notebook)
    for cell in notebook.cells:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    nbclient.NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT / "docs")}},
    ).execute()
    said = printed(notebook)
    assert "the same: True" in said
    points = dict(re.findall(r"(.*): \d+ KiB, (-?[\d.]+) dB", said))
    full, four, less = map(
        float, (points[n] for n in ("full precision", "4 bits", "2.5 bits"))
    )
    assert full > 5 and four > full - 1 and full > less > 2
    # What readers of the site see is what comes out, up to rounding
    assert len(saved.splitlines()) == len(said.splitlines())
    bytes_of = re.compile(r"(?<=bits: )\d+ bytes")
    assert bytes_of.findall(said) == bytes_of.findall(saved)
    shown = [
        kind
        for cell in notebook.cells
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
        for kind in output.get("data", {})
    ]
    assert shown.count("image/png") == 3 and shown.count("text/html") >= 3
