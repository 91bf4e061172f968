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

HANG = 120  # seconds that no case takes, counted by looking once in each: a machine that sleeps is no hang


# Each entry point, and how often it is drawn.
KINDS = {
    "attention": (dense.attention, 40), "sdpa": (dense.sdpa, 10), "merge": (dense.merge, 5), "int8": (int8.int8, 25),
    "varlen": (sequences.varlen, 7), "int8 varlen": (sequences.varlen_int8, 5), "cache": (sequences.cache, 8),
}


def one(seed, case, build, tally):
    """Run a case; build: a name, or None for the one that it draws."""
    draw, modules = Draw(seed, case), builds()
    name, tally.case = draw.choice(list(modules)) if build is None else build, case
    kind = draw.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
    tally["cases"] += 1
    tally[f"entry {kind}"] += 1
    tally[f"build {name}"] += 1
    try:
        with mock.patch.object(cyflash.cpu, "_active", modules[name]):  # set_implementation asks the CPU: milliseconds
            KINDS[kind][0](draw, tally, name)
    except Exception as error:
        error.add_note(f"{kind} on {name}")
        raise


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
    """Threads are started for the smallest call: else none of these would have more than one."""
    with mock.patch.object(attention, "FLOPS_PER_THREAD", 1.0), mock.patch.object(quantized, "ELEMENTS_PER_THREAD", 1):
        yield


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
    now.value = -1


def many(seed, seconds, most, build, say=print, one=one, hang=HANG):
    """Run cases for so many seconds, or `most` of them; (tally, reproducers of failures)."""
    tally, failures, first = Tally(), [], 0
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    while first < most and time.monotonic() < end and len(failures) < 20:
        now, (ours, theirs) = context.Value("q", first), context.Pipe(duplex=False)
        given = one, seed, first, end - time.monotonic(), most, build, now, theirs
        child = context.Process(target=_cases, args=given)
        child.start()
        theirs.close()
        seen, looks = -2, 0
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
            if looks > hang:
                child.kill()
        child.join()
        case = now.value
        if case < 0:
            break
        why = f"took more than {hang} s" if child.exitcode == -signal.SIGKILL else f"died with {child.exitcode}"
        failures.append(reproducer(seed, case, build, why))
        say(failures[-1])
        first = case + 1
    return tally, failures
