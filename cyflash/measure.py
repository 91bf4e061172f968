"""What a call costs, measured in a fresh process of its own: the memory of its first run, then its time.

    CallProcess(target): prepares, first call -> .memory        interleaved_times(processes): rounds over several

Calls that are compared never share a process: threads of one library that still wait for work would slow the other.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

__all__ = ["CallProcess", "Memory", "blas_threads", "interleaved_times"]


# Threads of a process that waits for its turn must sleep: OpenBLAS's spin for some 15 ms and would slow the next one's
# turn. 2^22 ticks are about 1 ms, longer than the pauses between two products of one call.
SLEEP_SOON = {"OPENBLAS_THREAD_TIMEOUT": "22", "KMP_BLOCKTIME": "1"}


class Memory(NamedTuple):
    """Resident set of a process around one call, in bytes."""

    before: int
    """What it held when the call began: Python, libraries, inputs. Where `reset` is False, its peak until then."""
    peak: int
    """The most it held until the call had returned."""
    reset: bool
    """Whether the peak could be reset before the call; if not, what preparing needed may hide a part of the call's."""

    @property
    def extra(self):
        """What the call added at its peak, its output included."""
        return max(self.peak - self.before, 0)


class CallProcess:
    """A fresh Python process that prepares one call, makes it once, and can repeat it; a context manager.

    Parameters
    ----------
    target : str
        "module:function" of a function that prepares everything (imports, inputs) and returns the call to measure, a
        function without arguments.
    **arguments
        Arguments of `function`: anything that JSON holds.

    Attributes
    ----------
    memory : Memory
        What the first call needed.

    Raises
    ------
    MemoryError
        The system killed the process, as it does when memory runs out.
    RuntimeError
        The process failed; the message ends with its last line.

    Notes
    -----
    On Linux the kernel's high-water mark (VmHWM) is reset just before the call, so the peak is the call's own. Where
    that cannot be done the peak since the process began is read before and after: if preparing needed more than it
    kept, that part of the call's memory does not show, and `memory.reset` is False.
    """

    def __init__(self, target, **arguments):
        code = "from cyflash.measure import _child; _child()"
        # -P and PYTHONPATH: the child finds exactly the modules that this process finds, whatever the current folder.
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, target],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**SLEEP_SOON, **os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            self.memory = Memory(**self._ask(arguments))
        except BaseException:
            self.close()
            raise

    def times(self, seconds):
        """Repeat the call for about `seconds`, at least once; return the seconds of each, without a first one."""
        return self._ask(seconds)

    def close(self):
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _ask(self, question):
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        status = self._process.wait()
        if status == -9:
            raise MemoryError("the process that measures a call was killed: most likely out of memory")
        self._errors.seek(0)
        reason = (self._errors.read().strip() or f"exit status {status}").splitlines()[-1]
        raise RuntimeError(f"the process that measures a call failed: {reason}")


def interleaved_times(processes, *, rounds=5, seconds=0.04, limit=10.0):
    """Time calls in turn, so that a slow moment of the machine hits all of them.

    Parameters
    ----------
    processes : dict of str to CallProcess
    rounds : int, default 5
        How often each has its turn.
    seconds : float, default 0.04
        Length of a turn; a longer call is made once.
    limit : float, default 10.0
        After that many seconds no further round begins, once 3 are done.

    Returns
    -------
    dict of str to list of list of float
        Seconds of every call, by round.
    """
    times = {name: [] for name in processes}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > limit:
            break
        for name, process in processes.items():
            times[name].append(process.times(seconds))
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


# The child: a line of JSON in, a line of JSON out. First the arguments of the target, then turns of so many seconds.


def _child():
    module, function = sys.argv[1].split(":")
    prepare = getattr(importlib.import_module(module), function)
    call = prepare(**json.loads(sys.stdin.readline()))
    print(json.dumps(_memory(call)._asdict()), flush=True)
    for line in sys.stdin:
        print(json.dumps(_turn(call, float(line))), flush=True)


def _turn(call, seconds):
    """Seconds of each repeat. The first only wakes the threads and fills the caches, unless it is a long one."""
    times = [_seconds(call)]
    if times[0] > 10 * seconds:
        return times
    times[0] = _seconds(call)
    while sum(times) < seconds:
        times.append(_seconds(call))
    return times


def _seconds(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _memory(call):
    gc.collect()
    reset = _reset_peak()
    before = _status("VmRSS") if reset else _peak()
    result = call()
    peak = _peak()
    del result
    return Memory(before, peak, reset)


def _reset_peak():
    """Set the peak to the present resident set; False where the system cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return _status("VmHWM") is not None
    except OSError:
        return False


def _peak():
    """The largest resident set of this process since it began, or since the reset, in bytes."""
    if (peak := _status("VmHWM")) is not None:
        return peak
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name):
    """A field of /proc/self/status, in bytes; None where there is none."""
    try:
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(name)), None)
    except OSError:
        return None
