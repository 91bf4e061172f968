"""Processes that end: by themselves, at their limit, or with the session."""
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
GRACE = 5.0  # seconds between a request to end and the end


class Done(NamedTuple):
    """How a process ended."""

    code: int        # negative: of a signal; None: it was ended at its limit
    seconds: float
    output: str      # of both streams

    def why(self):
        """How, in words."""
        if self.code is None:
            return f"did not end in {self.seconds:.0f} s"
        if self.code < 0:
            return f"ended by signal {-self.code} ({signal.Signals(-self.code).name})"
        return f"exit status {self.code}"

    def tail(self, lines=12):
        return "\n".join(self.output.strip().splitlines()[-lines:])


def python(*arguments):
    """A command line of this Python, which finds the sources of this checkout and of its tests first."""
    return [sys.executable, *map(str, arguments)]


def environment(**more):
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join([str(ROOT), str(TESTS), *(one for one in path if one not in ("", str(ROOT), str(TESTS)))])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **more}


def start(command, output, **more):
    """A process in a group of its own, both of whose streams go to a file."""
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        process_group=0,
    )


def end(process):
    """End a process that we started and what it started. One that the GPU's driver holds back is left to its fate."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            if number == signal.SIGKILL:
                return


def run(command, limit, **more):
    """Run a command, at most so many seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = start(command, output, **more)
        try:
            code = process.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Done(code, time.monotonic() - begin, text)
