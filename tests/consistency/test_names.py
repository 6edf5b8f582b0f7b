"""Names that users were given: they import, and somebody tells of them."""

import ast
import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

import speechbrain_mpq
from speechbrain_mpq.aliases import MOVED

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "speechbrain_mpq"
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [
    *DOCS,
    *sorted(ROOT.glob("recipes/**/*.md")),
    *sorted(ROOT.glob("pretrained/*/*.md")),
]
INSIDE = "speechbrain_mpq/pretrained"  # links are not followed
YAMLS = sorted(
    path
    for folder in (*("hparams", "pretrained", "recipes", "tests/data"), INSIDE)
    for path in (ROOT / folder).rglob("*.yaml")
)


def found(name):
    """What a dotted name stands for."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            value = import_module(module)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name):
                raise  # it is there, what it needs is not
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise ImportError(f"there is no {name}")


@pytest.mark.parametrize("name", sorted(speechbrain_mpq._HOMES))
def test_public_names_are_documented(name):
    assert inspect.getdoc(getattr(speechbrain_mpq, name))
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS)
    assert re.search(rf"\b{re.escape(name)}\b", text), "in no page of docs"


def relative(path):
    """For the names of tests."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", YAMLS, ids=relative)
def test_names_in_yaml_import(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parents[1])  # a recipe's own modules
    text = path.read_text(encoding="utf-8")
    tags = r"!(?:new|name|apply|applyref|module):([\w.]+)"
    for name in [*re.findall(tags, text), *mentioned(text)]:
        assert found(name) is not None


def mentioned(text):
    """Dotted names of the package."""
    return re.findall(r"(?<![\w/.-])speechbrain_mpq(?:\.[A-Za-z_]\w*)+", text)


def imports(text):
    """Names that the Python examples of a page import from the package."""
    pattern = (
        r"^ *(?:>>> )?(from speechbrain_mpq[\w.]* import (?:\([^)]*\)|.*))"
    )
    for line in re.findall(pattern, text, re.MULTILINE):
        (node,) = ast.parse(textwrap.dedent(line)).body
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_names_in_pages_import(path):
    text = path.read_text(encoding="utf-8")
    for name in [*mentioned(text), *imports(text)]:
        assert found(name) is not None


def test_names_are_looked_up_indeed():
    assert found("speechbrain_mpq.quantize_") is speechbrain_mpq.quantize_
    for name in ("speechbrain_mpq.nothing", "speechbrain_mpq.utils.nothing"):
        with pytest.raises((ImportError, AttributeError)):
            found(name)
    page = (
        "from speechbrain_mpq.a import (\n    b,\n    c,\n)\nspeechbrain_mpq/d"
    )
    assert list(imports(page)) == ["speechbrain_mpq.a.b", "speechbrain_mpq.a.c"]
    assert not mentioned(page.replace("speechbrain_mpq.a", "x"))


@pytest.mark.parametrize("old", sorted(MOVED))
def test_modules_import_under_their_old_names(old):
    assert not (PACKAGE / f"{old.replace('.', '/')}.py").exists()
    module = import_module(f"speechbrain_mpq.{old}")
    new = import_module(f"speechbrain_mpq.{MOVED[old]}")
    for name in public(new):
        assert getattr(module, name) is getattr(new, name)


def public(module):
    """Names of a module's own functions and classes."""
    names = [name for name in vars(module) if not name.startswith("_")]
    return [
        name
        for name in names
        if getattr(getattr(module, name), "__module__", "") == module.__name__
    ]
