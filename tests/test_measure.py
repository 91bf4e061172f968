"""What a call costs: memory that is known is found, times come by rounds, and a process that fails says why."""

import sys

import numpy as np
import pytest

from cyflash.measure import CallProcess, Memory, blas_threads, interleaved_times

TARGETS = '''
import os, signal, time
import numpy as np

def fill(megabytes, waste=0):
    np.ones(waste * 1_000_000, np.uint8)  # gone before the call
    return lambda: np.ones(megabytes * 1_000_000, np.uint8)

def sleep(seconds):
    return lambda: time.sleep(seconds)

def fail(message):
    raise ValueError(message)

def die(**arguments):
    return lambda: os.kill(os.getpid(), signal.SIGKILL)

def fail_later():
    calls = []
    def call():
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("the second call")
    return call

def fall_back(megabytes):
    from cyflash import measure
    measure._reset_peak = lambda: False
    return fill(megabytes)
'''


@pytest.fixture(autouse=True)
def targets(tmp_path, monkeypatch):
    (tmp_path / "targets.py").write_text(TARGETS)
    monkeypatch.syspath_prepend(tmp_path)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
@pytest.mark.parametrize("megabytes", [0, 20, 80])
def test_the_memory_of_a_call_is_found(megabytes):
    with CallProcess("targets:fill", megabytes=megabytes) as process:
        assert process.memory.extra == pytest.approx(megabytes * 1e6, abs=2e6)
        assert process.memory.reset


@linux
def test_what_was_freed_before_the_call_does_not_count():
    with CallProcess("targets:fill", megabytes=20, waste=200) as process:
        assert process.memory.extra == pytest.approx(20e6, abs=2e6)


@linux
def test_without_a_resettable_peak_the_peak_before_is_subtracted_and_that_is_said():
    with CallProcess("targets:fall_back", megabytes=50) as process:
        assert process.memory.extra == pytest.approx(50e6, abs=4e6)
        assert not process.memory.reset


def test_extra_is_never_negative():
    assert Memory(before=10, peak=4, reset=True).extra == 0


def test_times_come_by_rounds_and_in_turn():
    with CallProcess("targets:sleep", seconds=0.002) as short, CallProcess("targets:sleep", seconds=0.02) as long:
        times = interleaved_times({"short": short, "long": long}, rounds=4, seconds=0.01)
    assert [len(x) for x in times.values()] == [4, 4]
    assert min(len(turn) for turn in times["short"]) >= 1
    assert min(map(min, times["short"])) >= 0.002
    assert min(map(min, times["long"])) >= 0.02


def test_a_long_call_is_made_once_a_turn_and_rounds_stop_at_the_limit():
    with CallProcess("targets:sleep", seconds=0.05) as process:
        times = interleaved_times({"x": process}, rounds=50, seconds=0.001, limit=0.0)
    assert [len(turn) for turn in times["x"]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("target", "arguments", "error", "message"),
    [
        ("targets:fail", {"message": "no such layer"}, RuntimeError, "failed: ValueError: no such layer"),
        ("targets:die", {}, MemoryError, "killed"),
        ("targets:absent", {}, RuntimeError, "absent"),
    ],
)
def test_a_process_that_fails_says_why(target, arguments, error, message):
    with pytest.raises(error, match=message):
        CallProcess(target, **arguments)


def test_a_later_failure_is_told_too():
    with CallProcess("targets:fail_later") as process, pytest.raises(RuntimeError, match="the second call"):
        process.times(0.01)


def test_blas_threads_are_limited_and_restored():
    from threadpoolctl import threadpool_info

    def counts():
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    np.ones((2, 2)) @ np.ones((2, 2))
    before = counts()
    if not before:
        pytest.skip("the threads of NumPy's BLAS cannot be told here")
    with blas_threads(1) as blas:
        assert blas.count == 1
        assert set(counts()) == {1}
    assert counts() == before


def test_blas_threads_unknown_is_none(monkeypatch):
    monkeypatch.setattr("threadpoolctl.threadpool_info", list)
    with blas_threads(1) as blas:
        assert blas.count is None
