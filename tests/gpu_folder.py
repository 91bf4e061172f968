"""Where the tests compile GPU kernels to: one folder for all processes of a run, so that each is compiled once."""
import fcntl
import functools
import hashlib
import os
import tempfile
from pathlib import Path


@functools.cache
def folder():
    """The run's folder, which conftest.py names; outside pytest one of this process, removed at its end."""
    if given := os.environ.get("CYFLASH_TEST_FOLDER"):
        path = Path(given) / "kernels"
        path.mkdir(exist_ok=True)
        return path
    folder.keep = tempfile.TemporaryDirectory(prefix="cyflash-kernels-")
    return Path(folder.keep.name)


def once(suffix, make, *key):
    """The file that make(path) writes for this key, whichever process is first; others wait for it.

    suffix: how its name ends. make raises where it fails, and is asked again for the next who wants the file.
    """
    path = folder() / (hashlib.sha256(repr(key).encode()).hexdigest()[:16] + suffix)
    if not path.exists():
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                new = path.with_name(f"new-{path.name}")
                make(new)
                os.replace(new, path)
    return path
