"""Who may import whom, as the architecture has it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "speechbrain_mpq"
FOR_ALL = {"utils", "locks", "signals"}
ALLOWED = {
    "quantization": set(),
    "allocation": {"quantization"},
    "training": {"quantization", "allocation"},
    # inference: how audio files are read
    "ptq": {"quantization", "allocation", "training", "inference"},
    "decoders": set(),
    "nnet": {"decoders"},
    "lobes": {"nnet"},
    "evaluation": set(),
    "vision": set(),  # faces, directions, lips: knows no model
    "simulation": {"lobes"},  # what a separator's features are
    # evaluation: the task, which a model card tells of
    # decoders: the vocabulary of a language model
    # nnet: the file of an integer GRU
    "inference": {"quantization", "nnet", "lobes", "evaluation", "decoders"},
}
# What a user types, and whole experiments, may use whatever they serve.
ALLOWED |= {name: set(ALLOWED) for name in ("commands", "experiments")}


def modules():
    """Path and dotted name of every module of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield path, ".".join(p for p in parts if p != "__init__")


def imported_modules(path):
    """Dotted names that a file imports from the package, however written."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parent = package[: len(package) + 1 - node.level]
            base = parent if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (n for n in names if n.startswith("speechbrain_mpq."))


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_package_imports_only_what_it_may(package):
    allowed = ALLOWED[package] | {package} | FOR_ALL
    for path in (PACKAGE / package).rglob("*.py"):
        for module in imported_modules(path):
            assert module.split(".")[1] in allowed, f"{path}: {module}"


def test_every_package_has_a_rule():
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert packages == set(ALLOWED)


def test_no_two_modules_have_the_same_name():
    names = [p.name for p, _ in modules() if p.name != "__init__.py"]
    assert sorted(set(names)) == sorted(names)


def test_no_modules_import_each_other_in_a_circle():
    known = {name: path for path, name in modules()}
    graph = {
        name: {
            target
            for imported in imported_modules(path)
            for target in (imported, imported.rpartition(".")[0])
            if target in known and target != name
        }
        for name, path in known.items()
    }
    # The package itself imports its modules when their names are used.
    graph.pop("speechbrain_mpq")
    tuple(TopologicalSorter(graph).static_order())  # CycleError names them


def test_import_is_light():
    """Importing the package loads neither torch nor SpeechBrain."""
    import subprocess
    import sys

    code = (
        "import sys, speechbrain_mpq; "
        "print({'torch', 'speechbrain', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_temporary_files_end_with_their_process(path):
    """`scratch_folder` removes what killed processes left, others do not."""
    if path == PACKAGE / "utils.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    made = {"TemporaryDirectory", "NamedTemporaryFile", "mkdtemp", "mkstemp"}
    assert not named & made, "take speechbrain_mpq.utils.scratch_folder"
