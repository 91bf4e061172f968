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
threads, L = int(sys.argv[2]), 60_000
r = np.random.default_rng(0)

def call(L, say=None):
    q, k, v = (r.standard_normal((1, L, 64), dtype=np.float32) for _ in "qkv")
    try:
        if say:
            print(say, flush=True)
        start = time.perf_counter()
        cyflash.flash_attention(q, k, v, num_threads=threads)
    except KeyboardInterrupt:
        return time.perf_counter() - start, True
    return time.perf_counter() - start, False

q = k = v = r.standard_normal((2, 300, 40), dtype=np.float32)
expected = cyflash.flash_attention(q, k, v)
call(512)
full = (L / 4096) ** 2 * call(4096)[0]
took, interrupted = call(L, "ready")
assert interrupted, "the call ended first"
print(took / full)
for _ in range(3):
    assert np.array_equal(cyflash.flash_attention(q, k, v, num_threads=threads), expected)
print("works")
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_interrupt(build, threads):
    """In a call of many seconds that is interrupted early: it has to end in the first half of its time."""
    command = [sys.executable, "-c", SCRIPT, build, str(threads)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
