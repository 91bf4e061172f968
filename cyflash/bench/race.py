"""Systems against each other: each in its own process, checked first, then timed in turns: drift hits all alike.

Worker      a process that serves one system
run_race()  prepare -> check every output against float64 -> rounds of one turn each -> Race
Race        all times, and their ratios with a 95 % bootstrap interval over rounds
"""

import contextlib
import itertools
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np

from cyflash.bench.cases import Case, Error

TURN_SECONDS = 0.03  # calls shorter than this are repeated within a turn
MOST_CALLS = 200
WARM_BELOW = 0.1  # seconds; longer calls need no untimed one before them
PEAK_SECONDS = 0.01  # of fused multiply-adds in each round
FEWEST_ROUNDS, MOST_ROUNDS = 7, 500
RESAMPLES = 2000
THREAD_PROBES = 3


class SystemFailed(RuntimeError):
    """A system that could not be started, gave a wrong output or used other threads than it was told to."""


class Worker:
    """A fresh interpreter that runs one system with `threads` threads; `environment` adds variables to it."""

    def __init__(self, system, threads, label=None, environment=None):
        self.system, self.threads, self.label = system, threads, label or system.name
        self.about = {}  # version, settings and thread counts, once it is started
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        # Replies have their own descriptor: what libraries print goes to the log. The system's modules come first, so
        # that they load their own runtime libraries and not those of the package.
        imports = "".join(f"import {module}; " for module in system.needs)
        boot = (
            f"import os, sys; pipe = os.dup(1); os.dup2(2, 1); sys.path[:] = {sys.path!r}; {imports}"
            f"from {__package__}.worker import serve; "
            f"serve(pipe, {system.__module__!r}, {system.__qualname__!r}, {threads})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", boot],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **_thread_variables(threads), **(environment or {})},
        )

    def ask(self, method, *arguments):
        try:
            pickle.dump((method, arguments), self._process.stdin)
            self._process.stdin.flush()
            kind, value = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise SystemFailed(f"{self.label}: its process ended: {self._last_words()}") from None
        if kind == "error":
            raise SystemFailed(f"{self.label}: {value}")
        return value

    def close(self):
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self):
        self._process.wait(timeout=10)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"exit code {self._process.returncode}; {lines[-1] if lines else 'no message'}"


def _thread_variables(threads):
    """One count for every runtime a system may use; and those that would spin for long after a call sleep soon."""
    names = ("OMP", "MKL", "OPENBLAS", "BLIS", "NUMEXPR", "VECLIB", "CYFLASH")
    counts = {f"{name}_{'MAXIMUM' if name == 'VECLIB' else 'NUM'}_THREADS": str(threads) for name in names}
    return counts | {"OMP_DYNAMIC": "FALSE", "KMP_BLOCKTIME": "1", "OPENBLAS_THREAD_TIMEOUT": "20"}


def checked_threads(worker):
    """The worker's own count of its threads, or SystemFailed where it is not the count that was asked for."""
    for _ in range(THREAD_PROBES):  # a busy machine can starve a thread for one probe
        counts = worker.ask("count_threads")
        faults = _thread_faults(counts)
        if not faults:
            return counts
    raise SystemFailed(f"{worker.label}: asked for {counts['asked']} threads, but it {' and '.join(faults)}")


def _thread_faults(counts):
    asked, faults = counts["asked"], []
    if counts["reported"] not in (None, asked):
        faults.append(f"reports {counts['reported']} threads")
    if counts["busy"] not in (None, asked):
        faults.append(f"worked with {counts['busy']}")
    if counts["cpu_over_wall"] > asked + 0.2:
        faults.append(f"used {counts['cpu_over_wall']:.2f} cores")
    if counts["idle_cpu"] > 0.1:
        faults.append(f"uses {counts['idle_cpu']:.2f} cores while it should sleep")
    return faults


@dataclass
class Limit:
    """How long a race lasts: `rounds`, or as many as fit in `seconds`."""

    seconds: float = 5.0
    rounds: int | None = None

    def fraction(self, done, elapsed):
        """Of the race that is over, 0 to 1."""
        if self.rounds is not None:
            return done / self.rounds
        return min(1.0, done / FEWEST_ROUNDS, elapsed / self.seconds)

    def reached(self, done, elapsed):
        if self.rounds is not None:
            return done >= self.rounds
        return done >= MOST_ROUNDS or (done >= FEWEST_ROUNDS and elapsed >= self.seconds)


@dataclass
class Entry:
    label: str
    worker: Worker
    case: Case


@dataclass
class Timing:
    variant: str
    variants: dict
    note: str
    error: Error
    calls: int = 1
    rounds: list[list[float]] = field(default_factory=list)  # seconds of every call

    @property
    def turns(self):
        """One time per round: the median of its calls."""
        return np.array([statistics.median(times) for times in self.rounds])

    @property
    def median(self):
        return float(np.median(self.turns))


@dataclass
class Spread:
    """A measured value and its 95 % interval; without interval where there are too few rounds for one."""

    value: float
    low: float | None = None
    high: float | None = None

    def scaled(self, factor):
        ends = (None if end is None else end * factor for end in (self.low, self.high))
        return Spread(self.value * factor, *ends)


@dataclass
class Race:
    """`cases`: what each label was asked; `failures`: why a label has no timing."""

    threads: int
    cases: dict[str, Case]
    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    fma_rates: list[float] = field(default_factory=list)  # FLOP/s of one thread, one per round
    dot_rates: list[float] = field(default_factory=list)  # OP/s of its dot products of codes

    def time(self, label):
        """Seconds of one call."""
        return _spread(lambda time: np.median(time, axis=-1), self.timings[label].turns)

    def ratio(self, slower, faster):
        """How many times the time of `faster` the time of `slower` is: medians, resampled by round."""
        return _spread(
            lambda a, b: np.median(a, axis=-1) / np.median(b, axis=-1),
            self.timings[slower].turns,
            self.timings[faster].turns,
        )

    def gflops(self, label):
        return self.cases[label].flops() / self.timings[label].median / 1e9

    def fma_share(self, label):
        """Of the arithmetic peak of all threads, as measured in the same rounds; None where it was not."""
        return self._share(label, self.fma_rates)

    def dot_share(self, label):
        """Of the peak of dot products of codes."""
        return self._share(label, self.dot_rates)

    def _share(self, label, rates):
        if not rates:
            return None
        flops, threads = self.cases[label].flops(), self.threads
        return _spread(
            lambda time, rate: flops / (np.median(time, axis=-1) * np.median(rate, axis=-1) * threads),
            self.timings[label].turns,
            np.array(rates),
        )

    def peers(self):
        """The peers that were timed, fastest first; builds of cyflash are none."""
        peers = [label for label in self.timings if not label.startswith("cyflash")]
        return sorted(peers, key=lambda label: self.timings[label].median)


@contextlib.contextmanager
def team(systems, threads, environments):
    """One checked worker per system, {name: Worker}, and {name: why} for those that failed.

    `environments`: {name: extra variables}. Ends every process.
    """
    workers, failures = {}, {}
    with contextlib.ExitStack() as stack:
        for name, system in systems.items():
            worker = Worker(system, threads, environment=environments.get(name))
            stack.callback(worker.close)
            try:
                worker.about = worker.ask("start") | {"threads": checked_threads(worker)}
                workers[name] = worker
            except SystemFailed as failure:
                failures[name] = str(failure)
        yield workers, failures


def run_race(entries, limit, peak=None, on_round=lambda done, elapsed: None, dots=False):
    """Times all entries, of workers with the same thread count, in turns.

    An entry that fails leaves the race with its reason; the others go on.

    `peak`: a worker of cyflash that also measures the peak of fused multiply-adds, once per round; with `dots`, that of
    dot products of codes too.
    """
    result = Race(entries[0].worker.threads, {entry.label: entry.case for entry in entries})
    expected = {case: case.expected() for case in dict.fromkeys(entry.case.question() for entry in entries)}
    running = []
    for entry in entries:
        try:
            result.timings[entry.label] = _prepared(entry, expected[entry.case.question()])
            running.append(entry)
        except SystemFailed as failure:
            result.failures[entry.label] = str(failure)
    order, start = random.Random(0), time.perf_counter()
    for done in itertools.count():
        elapsed = time.perf_counter() - start
        on_round(done, elapsed)
        if not running or limit.reached(done, elapsed):
            break
        order.shuffle(running)
        for entry in tuple(running):
            timing = result.timings[entry.label]
            warm = timing.variants[timing.variant] < WARM_BELOW
            try:
                timing.rounds.append(entry.worker.ask("turn", entry.case, timing.calls, warm))
            except SystemFailed as failure:
                result.failures[entry.label] = str(failure)
                del result.timings[entry.label]
                running.remove(entry)
        if peak is not None:
            result.fma_rates.append(peak.ask("fma_rate", PEAK_SECONDS))
        if peak is not None and dots:
            result.dot_rates.append(peak.ask("dot_rate", PEAK_SECONDS))
    for worker in {entry.worker for entry in running}:
        worker.ask("forget")
    return result


def _prepared(entry, expected):
    made = entry.worker.ask("prepare", entry.case)
    error, tolerance = expected.error(made["output"]), entry.worker.system.tolerance(entry.case)
    if not tolerance.accepts(error):
        raise SystemFailed(
            f"{entry.label}: its output is not {tolerance.precision} attention: relative L1 error {error.rel_l1:.1e}, "
            f"largest error {error.max_over_max:.1e} of the largest value ({made['variant']})"
        )
    seconds = made["seconds"][made["variant"]]
    calls = min(MOST_CALLS, max(1, round(TURN_SECONDS / seconds)))
    return Timing(made["variant"], made["seconds"], made["note"], error, calls)


def _spread(statistic, *series):
    value = float(statistic(*series))
    if len(series[0]) < 3:
        return Spread(value)
    rounds = np.random.default_rng(0).integers(len(series[0]), size=(RESAMPLES, len(series[0])))  # paired bootstrap
    low, high = np.percentile(statistic(*(x[rounds] for x in series)), [2.5, 97.5])
    return Spread(value, float(low), float(high))
