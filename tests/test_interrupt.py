"""Ctrl-C ends a long call early, and the library works afterwards."""
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

SCRIPT = """
import signal, sys, time
import numpy as np
import cyflash

signal.signal(signal.SIGINT, signal.default_int_handler)
cyflash.set_implementation(sys.argv[1])
threads = int(sys.argv[2])
r = np.random.default_rng(0)

def call(Lq, Lk, out=None):
    q, k, v = (r.standard_normal((1, L, 64), dtype=np.float32) for L in (Lq, Lk, Lk))
    start = time.perf_counter()
    try:
        cyflash.flash_attention(q, k, v, num_threads=threads, out=out)
    except KeyboardInterrupt:
        return time.perf_counter() - start, True
    return time.perf_counter() - start, False

q = k = v = r.standard_normal((2, 300, 40), dtype=np.float32)
expected = cyflash.flash_attention(q, k, v)
call(512, 512)
full = {queries} * {keys} / 4096**2 * call(4096, 4096)[0]
print("ready", flush=True)
took, interrupted = call({queries}, {keys})
assert interrupted, "the call ended first"
print(took / full)
for _ in range(3):
    assert np.array_equal(cyflash.flash_attention(q, k, v, num_threads=threads), expected)
print("works")
"""

SHAPES = {"long": (60_000, 60_000), "few queries": (48, 50_000_000 // 4)}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", ["long"])
def test_interrupt(build, threads, shape):
    """After a fifth of a second, in a call of many seconds: it has to end in the first half of its time."""
    queries, keys = SHAPES[shape]
    script = SCRIPT.format(queries=queries, keys=keys)
    child = subprocess.Popen([sys.executable, "-c", script, build, str(threads)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True)
    try:
        assert child.stdout.readline() == "ready\n", child.stderr.read()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.4)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 0, err
    share, works = out.split()
    assert float(share) < 0.5 and works == "works"
