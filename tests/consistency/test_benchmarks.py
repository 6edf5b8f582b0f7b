"""The benchmarks, which no test runs: what they import, and their index."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FILES = sorted(BENCHMARKS.rglob("*.py"))


def names(path):
    """Modules and names that a script takes from the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] == "speechbrain_mpq":
                yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_benchmark_imports_is_there(path):
    for module, name in names(path):
        if not hasattr(import_module(module), name):
            import_module(f"{module}.{name}")  # a module itself


def test_benchmarks_import_the_package_as_users_do():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "sys.path" not in text and "E402" not in text, path


def test_the_index_names_every_benchmark():
    index = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    scripts = [
        path
        for path in FILES
        if "quality" not in path.relative_to(BENCHMARKS).parts
        and "\ndef main(" in path.read_text(encoding="utf-8")
        and path.name != "one_engine.py"  # a part of speed/run.py
    ]
    assert len(scripts) > 15
    for path in scripts:
        assert f"`{path.relative_to(BENCHMARKS)}`" in index, path
    for line in index.splitlines():
        if "| `python " in line:
            script = line.split("| `python ")[1].split()[0].rstrip("`")
            assert (BENCHMARKS.parent / script).is_file(), script
