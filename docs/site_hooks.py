"""Pages of the site that lie outside `docs/`: READMEs, changelog.

They stay where GitHub readers look for them. Links from `docs/` to them, and
back, are the repository's; here they become those of the site.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#]+)(#[^)]*)?\)")


def outside_pages(nav):
    """Pages of a navigation that are in no `docs/`, relative to the root."""
    if isinstance(nav, str):
        here = (ROOT / "docs" / nav).exists()
        return [] if here else [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in outside_pages(entry)]


def on_files(files, config):
    """Add the pages, and the pictures that they show."""
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
    inside = (ROOT / "docs" / here).exists()
    folder = (ROOT / ("docs" if inside else "") / here).parent
    up = "../" * (len(Path(here).parts) - 1)

    def translate(match):
        target, anchor = match[1], match[2] or ""
        path = (folder / target).resolve()
        for base in (ROOT / "docs", ROOT):
            if path.is_relative_to(base):
                return f"]({up}{path.relative_to(base).as_posix()}{anchor})"
        return match[0]

    return _LINK.sub(translate, markdown)
