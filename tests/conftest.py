"""Each process of the tests has one thread, and begins with what takes long.

As train.py begins, the tests' large buffers stay in the process.
"""

import os

import pytest

# Before torch is loaded; results then do not depend on the machine's cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from speechbrain_mpq.utils import keep_freed_memory  # noqa: E402

keep_freed_memory()

# Nothing here outlives the machine: disks need not be waited for
os.fsync = lambda descriptor: None

# torch.manual_seed keeps a stack trace for each accelerator that there might
# be later on, 1 ms each.
for accelerator in (torch.cuda, torch.xpu, torch.mtia):
    if not accelerator.is_available():
        accelerator.manual_seed_all = lambda seed: None


def pytest_collection_modifyitems(items):
    """Experiments first: what is short fills the gaps at the end."""
    items.sort(key=lambda item: "integration" not in item.path.parts)


@pytest.fixture
def pictures():
    """Asked for by tests whose pages hold images; they take long to draw."""


@pytest.fixture
def planned_pictures(request, monkeypatch):
    """Pages have their figures made but not drawn, unless they are asked for.

    Of modules: `pytestmark = pytest.mark.usefixtures("planned_pictures")`.
    """
    from helpers import plan_pictures

    if "pictures" not in request.fixturenames:
        plan_pictures(monkeypatch)
