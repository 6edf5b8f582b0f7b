"""Each process of the tests has one thread, and begins with what takes long.

As train.py begins, the tests' large buffers stay in the process.
"""

import os

# Before torch is loaded; results then do not depend on the machine's cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

from speechbrain_mpq.utils import keep_freed_memory  # noqa: E402

keep_freed_memory()


def pytest_collection_modifyitems(items):
    """Experiments first: what is short fills the gaps at the end."""
    items.sort(key=lambda item: "integration" not in item.path.parts)
