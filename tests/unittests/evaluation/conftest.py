"""What the tests of evaluation share."""

import pytest
from helpers import plan_pictures


@pytest.fixture
def pictures():
    """Asked for by tests whose pages hold images; they take long to draw."""


@pytest.fixture(autouse=True)
def planned_pictures(request, monkeypatch):
    """Pages of all other tests have their figures made, but not drawn."""
    if "pictures" not in request.fixturenames:
        plan_pictures(monkeypatch)
