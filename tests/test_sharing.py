"""Calls that run at the same time share the threads of the process."""
import os
import threading

import forking
import numpy as np
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st

import cyflash
from cyflash.cpu import detect, threads
from cyflash.cpu.team import Team

needs_openmp = pytest.mark.skipif(not detect.openmp()[0], reason="built without OpenMP: every call has one thread")


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 12), st.booleans()), max_size=30), st.integers(1, 16))
@settings(deadline=None)
def test_calls_never_take_more_than_the_budget(events, budget):
    """Whatever order they come and go in: at most budget - 1 threads beside those of the calls themselves."""
    running = []
    try:
        for most, which, ends in events:
            if ends and running:
                running.pop(which % len(running))[0].__exit__(None, None, None)
                continue
            team = Team(most, budget)
            n = team.__enter__()
            running.append((team, n))
            assert 1 <= n <= min(most, budget)
            assert sum(n - 1 for _, n in running) <= budget - 1
            if len(running) == 1:
                assert n == min(most, budget), "a call that is alone has all it can use"
    finally:
        for team, _ in running:
            team.__exit__(None, None, None)
    with Team(16, 16) as n:
        assert n == 16, "something was not given back"


def test_parts_even_out():
    """Of calls that follow each other: after a round each has its part."""
    teams = [Team(8, 8) for _ in range(4)]
    assert [team.__enter__() for team in teams] == [8, 1, 1, 1]
    for _ in range(3):
        shares = []
        for team in teams:
            team.__exit__(None, None, None)
            shares.append(team.__enter__())
    assert shares == [2, 2, 2, 2]
    for team in teams:
        team.__exit__(None, None, None)


def test_a_call_that_says_how_many_has_them():
    """And the others make room for it."""
    with Team(3, 4) as first, threads.for_call(5, 3) as second, Team(4, 4) as third:
        assert (first, second, third) == (3, 3, 1)
    with threads.for_call(5, 3) as first, Team(4, 4) as second:
        assert (first, second) == (3, 1)


def test_threads_are_given_back_after_an_error():
    with pytest.raises(MemoryError), Team(4, 4):
        raise MemoryError
    with Team(4, 4) as n:
        assert n == 4


@needs_openmp
def test_many_python_threads_share_the_budget():
    """Counted from outside, as threads of the process: eight calls at once have three others to help them."""
    forking.run("""
import cyflash
cyflash.set_num_threads(4)
y = np.random.default_rng(0).standard_normal((4, 3000, 64), dtype=np.float32)
expected = cyflash.flash_attention(y, y, y, num_threads=1)
def one_round():
    "What was counted, if all eight calls did run at the same time; nothing else is a test."
    together, begins, ends, counts, done = threading.Barrier(8), [], [], [], threading.Event()
    def work():
        together.wait()
        begins.append(time.monotonic())
        assert np.array_equal(cyflash.flash_attention(y, y, y), expected)
        ends.append(time.monotonic())
    def watch():
        while not done.is_set():
            counts.append(tasks()); time.sleep(0.0005)
    assert idle(1)
    watcher = threading.Thread(target=watch); watcher.start()
    callers = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in callers]; [t.join() for t in callers]
    done.set(); watcher.join()
    assert len(ends) == 8, "other bits"
    return max(counts) if max(begins) < min(ends) else None
for _ in range(20):
    most = one_round()
    if most:
        break
assert most and 2 + 8 <= most <= 2 + 8 + 3, most
assert idle(1)
cyflash.flash_attention(y, y, y)
assert tasks() == 4, "threads were not given back"
""")


ENTRIES = """
import cyflash
from cyflash.cpu.team import Team
from cyflash.quant import Calibrator, quantize
cyflash.set_num_threads(4)
y = np.random.default_rng(1).standard_normal((1, 4, 2000, 64), dtype=np.float32)
ragged, edges = y[0].transpose(1, 0, 2), np.array([0, 700, 2000])
def append(dtype):
    cyflash.KVCache(1, 4, 64, 2000, dtype).append(y, y)
def decode(dtype):
    cache = cyflash.KVCache(1, 4, 64, 2000, dtype)
    cache.append(y, y)
    return lambda: cyflash.flash_attention_with_kvcache(y[:, :, :1], cache)
entries = {
    "flash_attention": lambda: cyflash.flash_attention(y, y, y),
    "flash_attention_int8": lambda: cyflash.flash_attention_int8(y, y, y),
    "flash_attention_varlen": lambda: cyflash.flash_attention_varlen(ragged, ragged, ragged, edges, edges),
    "flash_attention_int8_varlen": lambda: cyflash.flash_attention_int8_varlen(ragged, ragged, ragged, edges, edges),
    "sdpa": lambda: cyflash.scaled_dot_product_attention(y, y, y),
    "forward": lambda: cyflash.FlashAttention(cyflash.FlashAttentionConfig(64, 4)).forward_multi_head(y, y, y),
    "append fp16": lambda: append("fp16"), "append int8": lambda: append("int8"),
    "decode fp32": decode("fp32"), "decode int8": decode("int8"),
    "quantize": lambda: quantize(y, "head", smooth=True),
    "observe": lambda: Calibrator().observe("a", y[0], y[0], y[0]),
}
def alone(entry):
    with Team(4, 4):
        entry()
    assert tasks() == 1, "more than the budget"
    entry()
    assert 1 < tasks() <= 4, "no threads at all"
wrong = []
for name, entry in entries.items():
    try:
        in_child(lambda: alone(entry))  # a process of its own, with one thread to begin with
    except AssertionError:
        wrong.append(name)
assert len(entries) == 12 and not wrong, wrong
"""


@needs_openmp
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_every_entry_shares():
    """While another call has the whole budget, none starts a thread."""
    forking.run(ENTRIES)


@needs_openmp
def test_a_child_has_the_whole_budget():
    """Calls of other threads that were running at the fork do not run in the child."""
    forking.run("""
import cyflash
cyflash.set_num_threads(4)
y = np.random.default_rng(0).standard_normal((4, 20000, 64), dtype=np.float32)
z = np.ascontiguousarray(y[:, :1000])
other = threading.Thread(target=lambda: cyflash.flash_attention(y, y, y)); other.start()
while tasks() < 5:
    time.sleep(0.001)
def child():
    cyflash.flash_attention(z, z, z)
    assert tasks() == 4, tasks()
in_child(child)
assert other.is_alive(), "the other call ended before the fork"
os._exit(0)
""")


@needs_openmp
def test_threadpoolctl_sees_and_limits_it():
    """The runtime of our modules is among those that it finds, and its limit is the default of calls."""
    with threadpoolctl.threadpool_limits(1, "openmp"):
        files = [lib["filepath"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "openmp"]
        assert files and any(file in cyflash.cpu_info()["openmp"] for file in files)
    forking.run("""
import cyflash, threadpoolctl
from cyflash.cpu import detect
y = np.random.default_rng(0).standard_normal((4, 1000, 64), dtype=np.float32)
cyflash.flash_attention(y[:, :1], y[:, :1], y[:, :1])
assert any(lib["user_api"] == "openmp" for lib in threadpoolctl.threadpool_info())
with threadpoolctl.threadpool_limits(3, "openmp"):
    assert detect.openmp()[2] == 3
with threadpoolctl.threadpool_limits(1, "openmp"):
    expected = cyflash.flash_attention(y, y, y)
    assert tasks() == 1
if len(os.sched_getaffinity(0)) > 1:
    assert np.array_equal(cyflash.flash_attention(y, y, y), expected)
    assert tasks() > 1
""", OPENBLAS_NUM_THREADS="1")


def test_concurrent_calls_have_the_same_bits(build):
    """Of eight threads of Python, each with calls of its own."""
    data = [np.random.default_rng(i).standard_normal((3, 70 + 9 * i, 40), dtype=np.float32) for i in range(8)]
    calls = [cyflash.flash_attention, cyflash.flash_attention_int8]
    expected = [[call(x, x, x, num_threads=1) for call in calls] for x in data]
    wrong = []

    def work(i):
        for repeat in range(4):
            for call, out in zip(calls, expected[i], strict=True):
                if not np.array_equal(call(data[i], data[i], data[i], num_threads=(None, 2)[repeat % 2]), out):
                    wrong.append((i, call.__name__))

    callers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
    assert not wrong and not any(caller.is_alive() for caller in callers)
