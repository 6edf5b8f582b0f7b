"""What an experiment was asked, and whether two were asked the same.

Settings are the top-level keys of a hyper-parameter file with all references
resolved and all overrides applied. How they are written does not matter, nor
do comments and where the results lie.
"""

import hashlib
from pathlib import Path

import yaml
from hyperpyyaml import resolve_references

# Keys that say where or how fast, not what comes out.
PLACES = (
    *("output_folder", "results_folder", "data_folder", "workers"),
    "mix_on_device",  # the same but for rounding
)
# Keys of what is told about a result beside it: they change its report only.
REPORTED = ("against", "examples")

_YAML = "tag:yaml.org,2002:"
_TYPED = {_YAML + kind for kind in ("null", "bool", "int", "float")}


def resolved_text(path, overrides=""):
    """A hyper-parameter file with its references and overrides resolved.

    Arguments
    ---------
    path : str
        HyperPyYAML file.
    overrides : str
        YAML text of what to change.

    Returns
    -------
    text : str
        YAML, tags and comments as they were.
    """
    if overrides:  # in one form, however they are written
        overrides = yaml.serialize(yaml.compose(overrides))
    with open(path, encoding="utf-8") as source:
        return resolve_references(source, overrides).getvalue()


def settings_of(text):
    """What a resolved file asks for, JSON-ready.

    Arguments
    ---------
    text : str
        From `resolved_text`.

    Returns
    -------
    settings : dict
        Top-level key -> value; a tag becomes a dict of one entry. The output
        folder's name is taken out of all values.

    Example
    -------
    >>> settings_of("output_folder: a/b\\nlog: !new:Log {file: a/b/log.txt}")
    {'log': {'!new:Log': {'file': '<output_folder>/log.txt'}}}
    """
    settings = {
        key.value: _plain(value) for key, value in yaml.compose(text).value
    }
    folder = str(settings.get("output_folder") or "")
    settings = {k: v for k, v in settings.items() if k not in PLACES}
    return _without(folder, settings) if folder else settings


def differing(settings, others):
    """Keys whose values differ, or that one of both lacks.

    Arguments
    ---------
    settings, others : dict
        From `settings_of`.

    Returns
    -------
    keys : list of str
        In alphabetical order.

    Example
    -------
    >>> differing({"lr": 0.1, "seed": 1}, {"lr": 0.2, "seed": 1, "rows": 8})
    ['lr', 'rows']
    """
    missing = object()
    return sorted(
        key
        for key in {*settings, *others}
        if settings.get(key, missing) != others.get(key, missing)
    )


def digest(paths, begin=""):
    """One hash of the contents of some files.

    Arguments
    ---------
    paths : sequence of str or Path
        What is missing is left out.
    begin : str
        Text in front of them.

    Returns
    -------
    sha256 : str
    """
    found = hashlib.sha256(begin.encode())
    for path in map(Path, paths):
        if path.exists():
            found.update(path.read_bytes())
    return found.hexdigest()


def text_digest(text, paths):
    """The hash that runs left before they left their settings.

    Arguments
    ---------
    text : str
        From `resolved_text`.
    paths : sequence of str or Path
        What is missing is left out.

    Returns
    -------
    sha256 : str
    """
    lines = [
        line
        for line in text.splitlines()
        if line.split(":")[0] not in PLACES and line[:1] != "#"
    ]
    return digest(paths, begin="\n".join(lines))


def _plain(node):
    """A YAML node as JSON has it, tags kept."""
    if isinstance(node, yaml.MappingNode):
        content = {key.value: _plain(value) for key, value in node.value}
    elif isinstance(node, yaml.SequenceNode):
        content = [_plain(value) for value in node.value]
    elif node.tag in _TYPED:
        return yaml.safe_load(node.value)
    else:
        content = node.value
    return content if node.tag.startswith(_YAML) else {node.tag: content}


def _without(folder, value):
    """A value without the folder's name in it."""
    if isinstance(value, dict):
        return {key: _without(folder, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(folder, item) for item in value]
    if isinstance(value, str) and f"{value}/".startswith(f"{folder}/"):
        return "<output_folder>" + value[len(folder) :]
    return value
