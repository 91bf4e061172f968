"""The process of one system: prepares cases, makes timed calls when it is asked to, and sleeps on its pipe in between.

A message is (name of a method of Worker, its arguments); the reply is ("ok", value) or ("error", message).
"""

import contextlib
import gc
import importlib
import math
import os
import pickle
import sys
import time
import traceback
from pathlib import Path

from cyflash.bench.cases import Case

PICK_SECONDS = 0.3  # spent on finding the fastest way to ask
PROBE_SECONDS = 0.3  # of calls in which threads are counted
BUSY_SHARE = 0.05  # of the CPU time: a thread with less took no part


def serve(pipe, module, name, threads):
    """Answers messages on stdin, on the file descriptor `pipe`, until stdin ends."""
    worker = Worker(getattr(importlib.import_module(module), name), threads)
    with os.fdopen(pipe, "wb") as replies:
        while True:
            try:
                method, arguments = pickle.load(sys.stdin.buffer)
            except (EOFError, KeyboardInterrupt):
                return
            try:
                reply = "ok", getattr(worker, method)(*arguments)
            except KeyboardInterrupt:
                return
            except BaseException as error:  # some libraries' errors are not Exceptions
                traceback.print_exc()
                reply = "error", f"{type(error).__name__}: {error}"
            pickle.dump(reply, replies)
            replies.flush()


class Worker:
    def __init__(self, system, threads):
        self._system_class, self._threads = system, threads
        self._system = None
        self._ready = {}  # Case -> Candidate

    def start(self):
        """Configures the system; its version and settings."""
        self._system = self._system_class(self._threads)
        return {"version": self._system.version(), "settings": self._system.settings()}

    def prepare(self, case):
        """Builds and warms up every way to ask for the case, keeps the fastest: its output, and the seconds of each."""
        failed, ready = {}, {}
        for name, build in self._system.candidates(case).items():
            try:
                ready[name] = build()
                ready[name].call()
            except Exception as error:  # an older version may lack one way
                ready.pop(name, None)
                failed[name] = f"{type(error).__name__}: {error}"
        if not ready:
            raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
        seconds = _seconds_per_call({name: candidate.call for name, candidate in ready.items()})
        fastest = min(seconds, key=seconds.get)
        candidate = self._ready[case] = ready[fastest]
        return {
            "variant": fastest,
            "note": candidate.note,
            "seconds": seconds,
            "failed": failed,
            "output": candidate.read(candidate.call()),
        }

    def forget(self):
        self._ready.clear()

    def turn(self, case, calls, warm):
        """Seconds of each of `calls` calls, after an untimed one if `warm`: others have used the caches since."""
        candidate, clock, times = self._ready[case], time.perf_counter, []
        call = candidate.call
        with _no_garbage_collection():
            if warm:
                call()
            for _ in range(calls):
                start = clock()
                call()
                whole = clock() - start
                times.append(whole if candidate.seconds is None else candidate.seconds())
        return times

    def fma_rate(self, seconds):
        return self._system.fma_rate(seconds)

    def dot_rate(self, seconds):
        return self._system.dot_rate(seconds)

    def count_threads(self):
        """What the system says, and what the clock and the operating system say while it works on several heads."""
        case = Case((1, 4 * self._threads, 512, 64))
        self.prepare(case)
        candidate = self._ready.pop(case)
        before, start, cpu = _thread_times(), time.perf_counter(), time.process_time()
        while time.perf_counter() < start + PROBE_SECONDS:
            candidate.call()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        used = [(time_now - before.get(thread, 0)) / 1e9 for thread, time_now in _thread_times().items()]
        if used:
            used.append(cpu - sum(used))  # of threads that have ended meanwhile: one at least
        time.sleep(0.05)  # a short spin after a call is allowed
        idle, start = time.process_time(), time.perf_counter()
        time.sleep(0.2)
        return {
            "asked": self._threads,
            "reported": self._system.threads(),
            "busy": sum(x > BUSY_SHARE * cpu for x in used) or None,  # None: this platform does not tell
            "cpu_over_wall": cpu / wall,
            "idle_cpu": (time.process_time() - idle) / (time.perf_counter() - start),
        }


@contextlib.contextmanager
def _no_garbage_collection():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _seconds_per_call(calls):
    """{name: seconds}: the least over passes in turn, which no other load on the machine can lower."""
    least = dict.fromkeys(calls, math.inf)
    begin, passes = time.perf_counter(), 0
    while passes < 3 or (time.perf_counter() < begin + PICK_SECONDS and passes < 100):
        passes += 1
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def _thread_times():
    """{thread: nanoseconds on a CPU} of this process; empty where Linux's /proc is not."""
    times = {}
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            times[task.parent.name] = int(task.read_text().split()[0])
    return times
