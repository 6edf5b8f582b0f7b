"""Who may import whom, as the architecture has it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "speechbrain_mpq"
FOR_ALL = {"whole_files"}  # a module, not a package
ALLOWED = {
    "quantization": set(),
    "separation": set(),
    "allocation": {"quantization"},
    "evaluation": set(),
    "simulation": {"separation"},  # the array's geometry
    "brains": {"quantization", "allocation"},
    "engines": {"quantization", "separation"},
    "inference": {"quantization", "separation", "engines"},
    "vision": set(),  # faces, directions, lips: knows no model
    "plugin": {"quantization", "allocation", "brains"},
    # What a user types: each command may use whatever it serves.
    "commands": {
        "quantization",
        "separation",
        "allocation",
        "evaluation",
        "engines",
        "inference",
        "plugin",
        "vision",
        "simulation",
    },
}


def imported_packages(path):
    """Sibling packages that a file imports, by absolute or relative name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 2:
                yield module.split(".")[0]
            elif module.startswith("speechbrain_mpq."):
                yield module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("speechbrain_mpq."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_package_imports_only_what_it_may(package):
    for path in (PACKAGE / package).glob("*.py"):
        for other in imported_packages(path):
            allowed = ALLOWED[package] | {package} | FOR_ALL
            assert other in allowed, f"{path}: {other}"


def test_every_package_has_a_rule():
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert packages == set(ALLOWED)


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
