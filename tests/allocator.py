"""A preloaded allocator (allocator.c) that fails when it is told to, or fences what it allocates: how to use it.

`environment()` is for a process that has it; in that process `Allocator()` steers it.
"""
import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


def why_not():
    """Why it cannot be used here; an empty string when it can."""
    if platform.libc_ver()[0] != "glibc":
        return "needs the GNU C library"
    return "" if shutil.which("gcc") else "needs gcc"


def environment(folder, **more):
    """The environment of a process with the allocator, which is compiled into `folder`."""
    library = Path(folder) / "allocator.so"
    command = ["gcc", "-O1", "-Wall", "-Werror", "-fno-builtin", "-shared", "-fPIC", SOURCE, "-o", library]
    subprocess.run(command, check=True)
    path = os.pathsep.join(path for path in sys.path if path)
    return os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": path} | more


class Allocator:
    """Steers the allocator of this process."""

    def __init__(self):
        self._library = library = ctypes.CDLL(None)
        self.fail, self._left = library.allocator_fail, library.allocator_left
        self.live, self.fence = library.allocator_live, library.allocator_fence
        self.fail.argtypes, self.fail.restype = [ctypes.c_long], None
        self._left.restype = self.live.restype = ctypes.c_long

    def watch(self, watched):
        """{a part of a module's path: bytes from which on its requests count}, instead of those watched before."""
        self._library.allocator_forget()
        before = 0
        for part, least in watched.items():
            found = self._library.allocator_watch(part.encode(), ctypes.c_size_t(least))
            if found == before:
                raise RuntimeError(f"no module of this process has {part!r} in its path")
            before = found

    def has_failed(self):
        """Whether the allocation that should fail did; from now on none does. Allocates too, so it may be the one."""
        failed = not self._left()
        self.fail(0)
        return failed
