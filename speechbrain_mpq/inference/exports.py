"""exports.json: which weights an engine's own files were made of.

Models of OpenVINO and ONNX beside the weights are run by other programs,
which know nothing of where they come from. Their SHA-256 is kept here, with
that of the weights and of the activation ranges that they were made with.
"""

from pathlib import Path

from ..quantization.packing import MODEL_FILE
from ..utils import read_json, write_json
from .engines.activations import RANGES_FILE, file_digest

EXPORTS_FILE = "exports.json"
EXPORTED = (".onnx", ".xml", ".bin")  # endings of engines' files
EXPORTED_STEM = "mask_network"  # beginning of their names
VERSION = 1
_FIX = "run `speechbrain-mpq export` again"


def write_exports(folder, files):
    """Write the SHA-256s of what an export has made."""
    folder = Path(folder)
    try:
        before = _read(folder)
    except (OSError, ValueError):
        before = {}
    sources = _sources(folder)
    if before.get("sources") != sources:  # those are of other weights
        before = {}
    made = {path.name: file_digest(path) for path in files}
    content = {
        "version": VERSION,
        "sources": sources,
        "files": {**before.get("files", {}), **made},
    }
    write_json(folder / EXPORTS_FILE, content)
    return folder / EXPORTS_FILE


def exported_names(folder):
    """List the files that exports.json names."""
    try:
        return set(filter(_is_export, _read(Path(folder))["files"]))
    except (OSError, KeyError, TypeError, ValueError):
        return set()


def export_problems(folder):
    """List the exports that are not of the weights beside them."""
    folder = Path(folder)
    path = folder / EXPORTS_FILE
    if not path.exists():
        return []
    try:
        content = _read(folder)
        sources, files = content["sources"], content["files"].items()
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"{path}: not readable ({error}): {_FIX}"]
    problems = []
    if sources != _sources(folder):
        problems.append(
            f"{path}: its files were made of other weights or activation "
            f"ranges: {_FIX}"
        )
    for name, digest in files:
        file = folder / name
        if not _is_export(name):
            problems.append(f"{path}: {name!r} is no engine's file")
        elif not file.is_file():
            problems.append(f"{file}: gone, though {EXPORTS_FILE} has it")
        elif file_digest(file) != digest:
            problems.append(f"{file}: was changed since the export: {_FIX}")
    return problems


def _is_export(name):
    """Whether a name is one that engines' files have."""
    path = Path(name)
    own = path.name == name and name.startswith(EXPORTED_STEM)
    return own and path.suffix in EXPORTED


def _read(folder):
    """The content of exports.json."""
    content = read_json(folder / EXPORTS_FILE, _FIX, _FIX)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError("of another version")
    return content


def _sources(folder):
    """SHA-256 of what exports are made of."""
    return {
        name: file_digest(folder / name)
        for name in (MODEL_FILE, RANGES_FILE)
        if (folder / name).is_file()
    }
