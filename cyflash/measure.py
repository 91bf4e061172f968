"""What a call costs: its time beside others in one process, and its memory in a fresh process of its own."""

import gc
import importlib
import json
import os
import subprocess
import sys
import time
from typing import NamedTuple

__all__ = ["Memory", "blas_threads", "interleaved_times", "peak_memory"]


class Memory(NamedTuple):
    """Resident set of a process around one call, in bytes."""

    before: int
    """What the process held when the call began: Python, the libraries, the inputs."""
    peak: int
    """The most it held until the call had returned."""
    method: str
    """How the peak was read."""

    @property
    def extra(self):
        """What the call added at its peak, its output included."""
        return max(self.peak - self.before, 0)


def interleaved_times(calls, *, repeats=15, seconds=1.0):
    """Time several functions in turn, so that a slow moment of the machine hits all of them.

    Parameters
    ----------
    calls : dict of str to function without arguments
        Each is called once before anything is timed.
    repeats : int, default 15
        Most rounds; at least 3 are made.
    seconds : float, default 1.0
        No further round begins after this time.

    Returns
    -------
    dict of str to list of float
        Seconds of every repeat, in the order of the rounds.
    """
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times


class blas_threads:
    """Context manager: NumPy's BLAS runs on `count` threads. `.count` is what it then reports, None if unknown."""

    def __init__(self, count):
        import numpy  # noqa: F401
        from threadpoolctl import threadpool_info, threadpool_limits  # sees the BLAS that NumPy has loaded

        self._limits = threadpool_limits(count, user_api="blas")
        found = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
        self.count = max(found) if found else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._limits.restore_original_limits()


def peak_memory(target, **arguments):
    """Measure the memory of one call in a fresh process.

    Parameters
    ----------
    target : str
        "module:function" of a function that prepares everything (imports, inputs) and returns the call to measure, a
        function without arguments.
    **arguments
        Arguments of `function`: anything that JSON holds.

    Returns
    -------
    Memory

    Raises
    ------
    MemoryError
        The system killed the process, as it does when memory runs out.
    RuntimeError
        The process failed; the message ends with its last line.

    Notes
    -----
    On Linux the kernel's high-water mark (VmHWM) is reset just before the call, so the peak is the call's own.
    Elsewhere the peak since the process began (ru_maxrss) is read before and after: if preparing needed more than it
    kept, that part of the call's memory does not show.
    """
    code = "from cyflash.measure import _child; _child()"
    # -P and PYTHONPATH: the child finds exactly the modules that this process finds, whatever the current folder.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}
    process = subprocess.run(
        [sys.executable, "-P", "-c", code, target],
        input=json.dumps(arguments), env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if process.returncode == -9:
        raise MemoryError("the process that measures the memory of a call was killed: most likely out of memory")
    if process.returncode:
        reason = (process.stderr.strip() or f"exit status {process.returncode}").splitlines()[-1]
        raise RuntimeError(f"the process that measures the memory of a call failed: {reason}")
    return Memory(**json.loads(process.stdout.splitlines()[-1]))


def _child():
    module, function = sys.argv[1].split(":")
    call = getattr(importlib.import_module(module), function)(**json.load(sys.stdin))
    gc.collect()
    resettable = _reset_peak()
    before = _status("VmRSS") if resettable else _maximum()
    result = call()
    peak = _status("VmHWM") if resettable else _maximum()
    method = "VmHWM, reset before the call" if resettable else "ru_maxrss, before and after the call"
    del result
    print(json.dumps({"before": before, "peak": peak, "method": method}))


def _reset_peak():
    """Set VmHWM to the present resident set; False where the system cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return _status("VmHWM") > 0
    except (OSError, LookupError):
        return False


def _status(name):
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    raise LookupError(name)


def _maximum():
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
