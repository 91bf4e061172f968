"""Files that appear only when they are complete."""
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path):
    """A path beside `path` to write to; it becomes `path` at the end of the block, or is removed on an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
