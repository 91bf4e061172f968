"""Cases one after another, in a process of its own: one that crashes or hangs is a failure like any other."""
import contextlib
import functools
import multiprocessing
import os
import re
import signal
import time
import traceback
from unittest import mock

import cyflash
from cyflash import attention, quantized
from fuzz import dense, int8, sequences
from fuzz.draw import Draw
from fuzz.tally import Tally

STARTING, DONE = -2, -1  # in place of the case that runs
HANG = 120  # seconds that no case takes, counted by looking once in each: a machine that sleeps is no hang


# Each entry point, and how often it is drawn.
KINDS = {
    "attention": (dense.Attention, 40), "sdpa": (dense.Sdpa, 10), "merge": (dense.Merge, 5), "int8": (int8.Int8, 25),
    "varlen": (sequences.Varlen, 7), "int8 varlen": (sequences.VarlenInt8, 5), "cache": (sequences.Cache, 8),
}
TOGETHER = 6  # so many cases in a row are of one problem, each on the next build: most time goes to the reference


def one(seed, case, build, tally):
    """Run a case; build: a name, or None for the one that it draws."""
    kind, problem = _problem(seed, case // TOGETHER, tuple(KINDS.items()))
    modules, tally.case = builds(), case
    name = list(modules)[case % len(modules)] if build is None else build
    tally["cases"] += 1
    tally["problems"] += case % TOGETHER == 0
    tally[f"entry {kind}"] += 1
    tally[f"build {name}"] += 1
    try:
        with mock.patch.object(cyflash.cpu, "_active", modules[name]):  # set_implementation asks the CPU: milliseconds
            problem.check(Draw(seed, case), tally, name)
    except Exception as error:
        error.add_note(f"{kind} on {name}")
        raise


@functools.lru_cache(maxsize=1)
def _problem(seed, number, kinds):
    """(the name of an entry point, arguments for it and what should come of them)"""
    draw = Draw(seed, f"problem {number}")
    name, (kind, _) = draw.choices(kinds, [weight for _, (_, weight) in kinds])[0]
    return name, kind(draw)


@functools.cache
def builds():
    """{name: module} of those that run here."""
    return {name: cyflash.cpu.load(name) for name in cyflash.cpu.runnable()}


def reproducer(seed, case, build, why):
    """The one line that shows a failure again."""
    why = re.sub(r"\s+", " ", why)
    return f"python -m tests.fuzz --seed {seed} --case {case}{f' --build {build}' if build else ''}  # {why[:300]}"


@contextlib.contextmanager
def small_work():
    """Threads are started for the smallest call that asks for them, else none of these would have more than one; and
    for no other, since on a busy machine the threads of a call wait for each other."""
    cyflash.set_num_threads(1)
    try:
        with (
            mock.patch.object(attention, "FLOPS_PER_THREAD", 1.0),
            mock.patch.object(quantized, "ELEMENTS_PER_THREAD", 1),
        ):
            yield
    finally:
        cyflash.set_num_threads(None)


def _cases(one, seed, first, seconds, most, build, now, results):
    """In the child: cases from `first` on; `now` is the one that runs."""
    tally, failures, end = Tally(), [], time.monotonic() + seconds
    case, reported = first, time.monotonic()
    with small_work():
        while time.monotonic() < end and case < most and len(failures) < 20:
            now.value = case
            try:
                one(seed, case, build, tally)
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                notes = ", ".join(getattr(error, "__notes__", ()))
                failures.append(reproducer(
                    seed, case, build, f"{notes}: {type(error).__name__}: {error} [{os.path.basename(last.filename)}:"
                    f"{last.lineno}]"))
            case += 1
            if time.monotonic() > reported + 5:
                results.send((dict(tally), tally.worst, failures))
                tally, failures, reported = Tally(), [], time.monotonic()
    results.send((dict(tally), tally.worst, failures))
    now.value = DONE


def many(seed, seconds, most, build, say=print, one=one, hang=HANG):
    """Run cases for so many seconds, or `most` of them; (tally, reproducers of failures)."""
    tally, failures, first = Tally(), [], 0
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    while first < most and time.monotonic() < end and len(failures) < 20:
        now, (ours, theirs) = context.Value("q", STARTING), context.Pipe(duplex=False)
        given = one, seed, first, end - time.monotonic(), most, build, now, theirs
        child = context.Process(target=_cases, args=given)
        child.start()
        theirs.close()
        seen, looks = STARTING, 0
        while True:
            try:
                if ours.poll(1):
                    counts, worst, new = ours.recv()
                    tally.merge(counts, worst)
                    for line in new:
                        failures.append(line)
                        say(line)
            except EOFError:
                break
            looks = 0 if now.value != seen else looks + 1
            seen = now.value
            if looks > (HANG if seen == STARTING else hang):
                child.kill()
        child.join()
        if now.value == DONE:
            break
        case = first if now.value == STARTING else now.value
        why = f"took more than {hang} s" if child.exitcode == -signal.SIGKILL else f"died with {child.exitcode}"
        failures.append(reproducer(seed, case, build, why))
        say(failures[-1])
        first = case + 1
    return tally, failures
