"""As train.py begins: the tests' large buffers stay in the process."""

from speechbrain_mpq.utils import keep_freed_memory

keep_freed_memory()
