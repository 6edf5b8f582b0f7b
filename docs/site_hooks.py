"""Pages of the site that lie outside `docs/`: READMEs, changelog; notebooks.

They stay where GitHub readers look for them. Links from `docs/` to them, and
back, are the repository's; here they become those of the site. Notebooks become
pages with the outputs that they were saved with.
"""

import json
import re
from html import escape
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
NOTEBOOK = ".ipynb"
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#]+)(#[^)]*)?\)")


def outside_pages(nav):
    """Pages of a navigation that are in no `docs/`, relative to the root."""
    if isinstance(nav, str):
        here = (ROOT / "docs" / nav).exists()
        here = here or is_notebook(nav.removesuffix(".md") + NOTEBOOK)
        return [] if here else [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in outside_pages(entry)]


def on_config(config):
    """Let the navigation name pages where it names notebooks."""
    config["nav"] = _pages(config["nav"])
    return config


def _pages(nav):
    """A navigation with the pages that notebooks become."""
    if isinstance(nav, str):
        return nav.removesuffix(NOTEBOOK) + (".md" if is_notebook(nav) else "")
    if isinstance(nav, dict):
        return {title: _pages(entry) for title, entry in nav.items()}
    return [_pages(entry) for entry in nav]


def is_notebook(name):
    """Whether a name is that of a notebook in `docs/`."""
    return name.endswith(NOTEBOOK) and (ROOT / "docs" / name).is_file()


def notebook_page(path):
    """Markdown of a notebook, outputs included."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += filter(None, map(_shown, cell["outputs"]))
    return "\n\n".join(parts) + "\n"


def _shown(output):
    """An output of a cell, as Markdown or HTML."""
    if output["output_type"] == "stream":
        said = "".join(output["text"]) if output["name"] == "stdout" else ""
        return said and f"```text\n{said.rstrip()}\n```"
    data = output.get("data", {})
    if "image/png" in data:
        png = "".join(data["image/png"]).replace("\n", "")
        alt = escape("".join(data.get("text/plain", "a plot")))
        return f'<img alt="{alt}" src="data:image/png;base64,{png}">'
    html = "".join(data.get("text/html", ""))
    if "<audio" in html:  # the player with its sound inside
        return re.search(r"<audio.*?</audio>", html, re.DOTALL)[0]
    text = "".join(data.get("text/plain", ""))
    return text and f"```text\n{text.rstrip()}\n```"


def on_files(files, config):
    """Add the pages, and the pictures that they show."""
    for file in list(files):
        if is_notebook(file.src_uri):
            files.remove(file)
            page = file.src_uri.removesuffix(NOTEBOOK) + ".md"
            text = notebook_page(ROOT / "docs" / file.src_uri)
            files.append(File.generated(config, page, content=text))
    for name in outside_pages(config["nav"]):
        source = ROOT / name
        files.append(File.generated(config, name, abs_src_path=str(source)))
        for target, _ in _LINK.findall(source.read_text(encoding="utf-8")):
            picture = (source.parent / target).resolve()
            if picture.suffix in (".png", ".svg") and picture.is_file():
                where = picture.relative_to(ROOT).as_posix()
                files.append(
                    File.generated(config, where, abs_src_path=str(picture))
                )
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links of the repository into links of the site."""
    here = page.file.src_uri
    notebook = is_notebook(here.removesuffix(".md") + NOTEBOOK)
    inside = notebook or (ROOT / "docs" / here).exists()
    folder = (ROOT / ("docs" if inside else "") / here).parent
    up = "../" * (len(Path(here).parts) - 1)

    def translate(match):
        target, anchor = match[1], match[2] or ""
        path = (folder / target).resolve()
        if path.suffix == NOTEBOOK and path.is_relative_to(ROOT / "docs"):
            path = path.with_suffix(".md")
        for base in (ROOT / "docs", ROOT):
            if path.is_relative_to(base):
                return f"]({up}{path.relative_to(base).as_posix()}{anchor})"
        return match[0]

    return _LINK.sub(translate, markdown)
