"""What editors see of the package is what it has."""

import ast
from pathlib import Path

import speechbrain_mpq

PACKAGE = Path(speechbrain_mpq.__file__).parent


def stub_names():
    """Name -> module, as the stub has them."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    return {
        alias.asname: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == alias.asname  # given on, not only used
    }


def test_stub_names_what_the_package_has():
    assert stub_names() == speechbrain_mpq._HOMES


def test_package_says_that_it_has_types():
    assert (PACKAGE / "py.typed").is_file()


def test_models_inside_are_those_of_pretrained():
    from speechbrain_mpq.utils import (
        BUNDLED_ENHANCER,
        BUNDLED_MODEL,
        BUNDLED_QUALITY_MODEL,
    )

    for model in (BUNDLED_MODEL, BUNDLED_QUALITY_MODEL, BUNDLED_ENHANCER):
        link = PACKAGE.parent / "pretrained" / model.name
        assert link.resolve() == model.resolve()
        inside = f"pretrained/{model.name}/*"
        assert inside in (PACKAGE.parent / "setup.cfg").read_text()
