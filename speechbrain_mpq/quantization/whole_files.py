"""Files that are written whole or not at all."""

import os
import uuid


def write_whole(path, chunks):
    """Writes a file whole or leaves what was there.

    Processes that write the same file do not meet: each has a temporary file
    of its own, and the last one to finish wins.

    Arguments
    ---------
    path : Path
        Where to.
    chunks : list of bytes
        The content.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
