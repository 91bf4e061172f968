"""The fuzzer for ten seconds; and that it notices what it is for. Longer: `python -m tests.fuzz --seconds 3600`."""
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from fuzz import faults, run
from fuzz.draw import Draw
from fuzz.tally import Tally

from cyflash import attention

ROOT = Path(__file__).parents[1]


def test_ten_seconds():
    """All entry points, enough cases that show something, no failure."""
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", "10", "--seed", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\n0 failures" in result.stdout


def first_failure(cases=400):
    """What the first of some cases that fails raises, and its number."""
    with run.small_work():
        for case in range(cases):
            try:
                run.one(0, case, None, Tally())
            except Exception as error:
                return f"{type(error).__name__}: {error}", case
    return None, None


def outer(change):
    """What replaces attention.run, of which all entry points are made: its result, and then some change."""
    real = attention.run

    def changed(call, q, stored, *args, **how):
        found = real(call, q, stored, *args, **how)
        change(call, q, stored)
        return found

    return mock.patch.object(attention, "run", changed)


def some(x):
    """One element of an array."""
    return (x.shape[0] // 2, *(0 for _ in x.shape[1:]))


def wrong_by(factor):
    def change(call, q, stored):
        if call.out.size:
            call.out[some(call.out)] *= call.out.dtype.type(factor)
    return change


def wrong_lse(call, q, stored):
    if call.lse is not None and call.lse.size:
        call.lse[some(call.lse)] += np.float32(1e-3)


def wrong_with_threads(call, q, stored):
    if call.threads > 1 and call.out.size:
        bits = call.out.view(f"u{call.out.itemsize}")
        bits[some(bits)] ^= 1


def wrong_beside_the_output(call, q, stored):
    x = root = call.out
    while isinstance(root.base, np.ndarray):
        root = root.base
    if x.size and root.dtype == np.uint8 and x.strides[-1] == x.itemsize:  # in a Memory, which has room behind it
        last = x[(*(-1 for _ in x.shape[:-1]), slice(None))]
        np.lib.stride_tricks.as_strided(last, (x.shape[-1] + 1,))[-1] = 0


def wrong_input(call, q, stored):
    if q is not None and q.size and q.flags.writeable:
        q[some(q)] = 0


@pytest.mark.parametrize("change, words", [
    (wrong_by(1.01), "outside the bound"), (wrong_lse, "lse"), (wrong_with_threads, "differ in their bits"),
    (wrong_beside_the_output, "memory around an output was written"), (wrong_input, "memory of an input was written"),
], ids=["output", "lse", "threads", "beside", "input"])
def test_wrong_results_are_noticed(change, words):
    with outer(change), mock.patch.object(run, "KINDS", {"attention": run.KINDS["attention"]}):
        why, case = first_failure()
    assert why is not None and words in why, (why, case)


@pytest.mark.parametrize("name", ["causal", "scale", "window", "softcap", "bias", "mask", "alibi_slopes", "sinks",
                                  "causal_align"])
@pytest.mark.parametrize("kind", ["attention", "int8", "varlen", "int8 varlen", "cache"])
def test_an_option_that_is_ignored_is_noticed(kind, name):
    real = attention.make_plan

    def ignoring(*args, **options):
        options.pop(name, None)
        return real(*args, **options)

    with mock.patch.object(attention, "make_plan", ignoring), mock.patch.object(run, "KINDS", {kind: run.KINDS[kind]}):
        assert first_failure()[0] is not None


def test_a_failure_is_one_line_that_repeats_it():
    line = run.reproducer(7, 12, "avx2", "AssertionError: out\nof bounds")
    assert line == "python -m tests.fuzz --seed 7 --case 12 --build avx2  # AssertionError: out of bounds"


def test_a_case_is_the_same_again():
    """Its decisions and its numbers."""
    a, b, c = Draw(3, 5), Draw(3, 5), Draw(3, 6)
    numbers = [x.values((3, 4), np.dtype(np.float32), "normal").tobytes() for x in (a, b, c)]
    assert numbers[0] == numbers[1] != numbers[2] and a.random() == b.random() != c.random()


@pytest.mark.parametrize("fault, why", [(faults.crash, "died with -11"), (faults.hang, "took more than 1 s")])
def test_a_crash_and_a_hang_are_failures(fault, why):
    """They cost their own case: those after it are run."""
    said = []
    tally, failures = run.many(0, 60, 8, None, said.append, one=fault, hang=1)
    assert failures == said == [f"python -m tests.fuzz --seed 0 --case 3  # {why}"]
    assert tally["cases"] >= 4


def test_cases_that_show_nothing_are_counted():
    tally = Tally()
    tally.update({"cases": 1000, "rows": 100, "blind rows": 60, "outputs": 100, "zero outputs": 10, "compared": 9,
                  "loose cases": 5} | {f"entry {name}": 1 for name in ("attention", "sdpa", "merge", "int8")})
    found = "; ".join(tally.problems())
    assert "blind rows: 60.0%" in found and "loose cases" in found and "zero outputs" not in found
    assert "no case of varlen" in found and "no case of cache" in found

