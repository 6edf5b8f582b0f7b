"""The docs: their links lead somewhere, and what they tell to type exists."""

import ast
import io
import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from speechbrain.utils.run_opts import RunOptions

import speechbrain_mpq
from speechbrain_mpq.__main__ import COMMANDS, main
from speechbrain_mpq.training.hparams_source import hparams_text

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
README_LINES = 150


def nav_pages(nav):
    """Files that a navigation names, relative to `docs/` or the root."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in nav_pages(entry)]


NAV = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
PAGES = sorted(
    {
        *(ROOT / name for name in ("README.md", "CHANGELOG.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / name for name in NAV if not (ROOT / "docs" / name).exists()),
    }
)


def every_page(test):
    """Parametrize a test by the pages."""
    return pytest.mark.parametrize(
        "page", PAGES, ids=lambda page: str(page.relative_to(ROOT))
    )(test)


def blocks(page):
    """(language, text) of the fenced blocks of a page."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def prose(page):
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """What headings of a page are called in links to them."""
    titles = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    bare = [re.sub(r"[^\w\s-]", "", title).strip() for title in titles]
    return {re.sub(r"\s", "-", title.lower()) for title in bare}


def commands(page):
    """Commands that a page tells to type, each a list of words."""
    texts = [text for name, text in blocks(page) if name in ("", "shell")]
    lines = []
    for text in texts:
        lines += re.sub(r"\\\n\s*", " ", text).splitlines()
    lines += [" ".join(text.split()) for text in INLINE.findall(prose(page))]
    for line in lines:
        line = re.sub(r"\s#.*", "", line)
        for part in re.split(r"\s(?:&&|\|)\s|;", line):
            with suppress(ValueError):  # prose with an apostrophe, for example
                words = shlex.split(part)
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words = words[1:]
                if len(words) > 1:
                    yield words


def options(words):
    """Names of the options of a command, without what they are set to."""
    return {
        word[2:].split("=")[0]
        for word in words
        if re.match(r"--\w", word) and "..." not in word
    }


@cache
def subcommand_options(name):
    """Options of `speechbrain-mpq name`, by its own help."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        main([name, "--help"])
    return set(re.findall(r"--([\w-]+)", printed.getvalue()))


@cache
def keys(hparams):
    """Keys of an hparams file, and SpeechBrain's run options."""
    node = yaml.compose(hparams_text(hparams))
    own = {key.value for key, _ in node.value}
    return own | {field.name for field in fields(RunOptions)}


@cache
def script_options(script):
    """Options that the text of a script names."""
    text = script.read_text(encoding="utf-8")
    return frozenset(re.findall(r"--([\w-]+)", text))


def check_train(page, words):
    """`python train.py hparams/x.yaml --key value`, here or in a recipe."""
    position = words.index("train.py")
    if len(words) < position + 2:
        return
    folder = next(
        (
            base
            for base in (ROOT, page.parent, *_recipe_of(page))
            if (base / words[position + 1]).is_file()
        ),
        None,
    )
    generic = words[position + 1] == "hparams/train.yaml"  # of any recipe
    assert folder or generic, f"{page}: no {words[position + 1]}"
    if folder:
        known = keys(folder / words[position + 1])
        known = known | script_options(folder / "train.py")
        unknown = options(words[position:]) - known
        assert not unknown, f"{page}: {shlex.join(words)}: {unknown}"


def _recipe_of(page):
    """The folder that a page's commands change to."""
    text = page.read_text(encoding="utf-8")
    return [
        ROOT / name for name in re.findall(r"^cd (recipes/\S+)", text, re.M)
    ]


KL_KEYS = keys(ROOT / "hparams/kl_4bit.yaml")


@every_page
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page}: {target}"


@every_page
def test_python_compiles_and_imports_what_is_there(page):
    for language, text in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.module.split(".")[0] == "speechbrain_mpq":
                module = import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page}: {alias.name}"


@every_page
def test_commands_and_their_options_exist(page):
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands(page):
        program = Path(words[0]).name
        if program == "speechbrain-mpq":
            name = words[1]
            if name.startswith("-"):
                continue
            assert name in COMMANDS, f"{page}: {shlex.join(words)}"
            unknown = options(words) - subcommand_options(name)
            assert not unknown, f"{page}: {shlex.join(words)}: {unknown}"
        elif program == "make" and re.fullmatch(r"[a-z-]+", words[-1]):
            assert f"\n{words[-1]}:" in targets, f"{page}: {words}"
        elif "speechbrain_mpq.run" in words:
            known = script_options(ROOT / "speechbrain_mpq/run.py")
            known = known | KL_KEYS | {"help"}
            if program == "torchrun":
                known = known | {"nproc_per_node"}
            for word in words:  # a recipe's own, which it leaves to train.py
                if word.endswith(".yaml") and (page.parent / word).is_file():
                    known = known | keys(page.parent / word)
            unknown = options(words) - known
            assert not unknown, f"{page}: {shlex.join(words)}: {unknown}"
        elif program in ("python", "torchrun") and "train.py" in words:
            check_train(page, words)
        elif program == "python" and re.fullmatch(r"[^$]+\.py", words[1]):
            script = next(
                (
                    base / words[1]
                    for base in (ROOT, page.parent)
                    if (base / words[1]).is_file()
                ),
                None,
            )
            assert script, f"{page}: no {words[1]}"
            known = script_options(script)
            if "parse_known_args" in script.read_text(encoding="utf-8"):
                known = known | KL_KEYS  # the rest is train.py's
            unknown = options(words) - known
            assert not unknown, f"{page}: {shlex.join(words)}: {unknown}"


def test_navigation_has_every_page():
    for name in NAV:
        assert (ROOT / "docs" / name).is_file() or (ROOT / name).is_file(), name
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages <= set(NAV)


def test_navigation_has_the_pages_that_docs_link_to():
    """Without MkDocs, which is not there where these tests usually run."""
    for page in (ROOT / "docs").glob("*.md"):
        for target in LINK.findall(prose(page)):
            name = target.partition("#")[0]
            if name.startswith("../") and name.endswith(".md"):
                path = (page.parent / name).resolve().relative_to(ROOT)
                assert path.as_posix() in NAV, f"{page}: {target}"


def test_site_builds(tmp_path):
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    html = "".join(path.read_text() for path in tmp_path.glob("*.html"))
    loaded = re.findall(r"<(?:script|img)[^>]+src=\"(https?:[^\"]+)", html)
    loaded += re.findall(r"<link[^>]+stylesheet[^>]+\"(https?:[^\"]+)", html)
    assert not loaded  # readers need no connection either


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if "## Other budgets" in text:
        pytest.skip("the table of options is yet to move to docs/options.md")
    assert len(text.splitlines()) <= README_LINES


def test_picture_shows_what_was_measured():
    import size_quality

    svg = size_quality.PICTURE.read_text(encoding="utf-8")
    (text,) = re.findall(r"<dc:description>(.*?)</dc:description>", svg)
    points = json.loads(text.replace("&quot;", '"'))
    assert points == size_quality.read_points()
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for _, si_snr, bits in points[size_quality.BEST]:
        row = rf"\| {bits:g} \| 1234 \|.*\| \*\*{si_snr:.2f}\*\* \("
        assert re.search(row, results), (bits, si_snr)


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == speechbrain_mpq.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {speechbrain_mpq.__version__}" in changes


def test_commands_are_all_in_the_docs():
    """A command that no page shows would be found by nobody."""
    shown = {
        words[1]
        for page in PAGES
        for words in commands(page)
        if words[0] == "speechbrain-mpq"
    }
    assert set(COMMANDS) <= shown
