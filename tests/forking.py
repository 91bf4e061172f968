"""What scripts that fork begin with, and how tests run them: each in a process of its own, whose end is awaited for a
limited time, since a hang is the failure."""
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SECONDS = 60
HARNESS = Path(__file__).with_name("fork_harness.h")
HEADERS = Path(__file__).parents[1] / "cyflash" / "cpu"

PRELUDE = """
import os, signal, sys, threading, time, warnings
import numpy as np

def tasks():
    return len(os.listdir("/proc/self/task"))

def idle(n):
    "Whether there are n OS threads; those that end need a moment."
    end = time.monotonic() + 10
    while tasks() != n and time.monotonic() < end:
        time.sleep(0.001)
    return tasks() == n

x = np.random.default_rng(0).standard_normal((4, 300, 64), dtype=np.float32)

def call(threads=2):
    import cyflash
    return cyflash.flash_attention(x, x, x, num_threads=threads)

def in_child(work, seconds=20):
    "Fork, work() in the child, and its failure is ours."
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(seconds)
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child hung" if status == -signal.SIGALRM else f"the child ended with {status}"

def right(threads=2):
    assert np.array_equal(call(threads), expected), "other bits"

def whole(threads=2):
    "A call has the right bits, and all its threads."
    before = tasks()
    right(threads)
    assert tasks() == before + threads - 1, (before, tasks())
"""


def run(script, *arguments, seconds=SECONDS, prelude=PRELUDE, **environment):
    """Run a script; fail if it fails or hangs. What it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"} | environment, start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children hold the pipes open
        out, err = process.communicate()
        pytest.fail(f"hung: {out}{err}")
    assert process.returncode == 0, out + err
    return out


def harness(folder):
    """The compiled fork_harness.h: regions of OpenMP that are not ours, and handlers of fork that can be unloaded."""
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = folder / "harness.so"
    includes = [f"-I{HEADERS}", f"-I{HEADERS / 'simd'}"]
    source = ["-x", "c", str(HARNESS), "-x", "none"]
    command = [compiler, "-fopenmp", "-shared", "-fPIC", *includes, *source, "-o", str(path), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the compiler has no OpenMP: {done.stderr[-300:]}")
    return path
