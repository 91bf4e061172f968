"""Memory beyond inputs and output does not grow with lengths: the peak resident set of a fresh process, measured."""
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")

LIMIT_MB = 16

SCRIPT = """
import numpy as np
import cyflash

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))

r = np.random.default_rng(0)
def array(*shape):
    return r.standard_normal(shape, dtype=np.float32)

L, D = 65536, 8
q, k, v = array(2, L, D), array(1, L, D), array(1, L, D)
out = np.ones((2, L, D), np.float32)
options = dict()
{setup}
cyflash.set_implementation("{build}")
small = {{name: x for name, x in options.items() if name not in ("bias", "mask")}}
cyflash.flash_attention(q[:, :100], k[:, :100], v[:, :100], **small, num_threads=3)  # starts libraries and threads
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = status("VmRSS")
cyflash.flash_attention(q, k, v, **options, num_threads=3, out=out)
print(status("VmHWM") - before)
"""

SETUPS = {
    "causal window": "options = dict(window=(300, 0))",
    "bias for all rows": "options = dict(window=(300, 0), bias=array(L))",
    "bias for all rows of each head": "options = dict(window=(300, 0), bias=array(2, 1, L))",
    "bias for all keys": "options = dict(window=(300, 0), bias=array(L, 1))",
    "misaligned bias for all rows": "row = np.ndarray(L, np.float32, bytearray(4 * L + 1), 1);"
                                    " options = dict(window=(300, 0), bias=np.broadcast_to(row, (2, L, L)))",
    "misaligned keys for all heads": "row = np.ndarray((L, D), np.float32, bytearray(4 * L * D + 1), 1);"
                                     " q, out = (np.tile(x[:1], (16, 1, 1)) for x in (q, out));"
                                     " k = v = np.broadcast_to(row, (16, L, D)); options = dict(window=(9, 0))",
    "mask for all rows": "options = dict(window=(300, 0), mask=r.random(L) < 0.5)",
    "mask of one block": "options = dict(mask=np.arange(L) < 300)",
    "mask for all keys": "options = dict(window=(300, 0), mask=r.random((L, 1)) < 0.5)",
    "everything": "options = dict(causal=True, window=(300, 0), bias=array(L), mask=r.random(L) < 0.5, softcap=5.0,"
                  " alibi_slopes=array(2), sinks=array(2))",
    "few queries": "q, out = q[:, :64].copy(), out[:, :64].copy(); options = dict(bias=array(L))",
    "one query": "q, out = q[:, :1].copy(), out[:, :1].copy()",
    "few keys": "k, v = k[:, :200].copy(), v[:, :200].copy()",
    "strided": "wide = (np.ones((L, len(x), 3 * D), np.float32) for x in (q, k, v, out));"
               " q, k, v, out = (x[:, :, :D].transpose(1, 0, 2) for x in wide); options = dict(window=(300, 0))",
}


def extra_megabytes(build, setup):
    script = textwrap.dedent(SCRIPT).format(build=build, setup=setup)
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("name", SETUPS)
def test_extra_memory(build, name):
    extra = extra_megabytes(build, SETUPS[name])
    assert extra < LIMIT_MB, f"{extra:.1f} MB"


def test_the_measurement_sees_an_expanded_bias(build):
    """A call that takes a few megabytes more than the limit, as an expanded bias would."""
    setup = """options = dict(window=(300, 0))
attention = cyflash.flash_attention
cyflash.flash_attention = lambda *a, **k: (np.ones(5 << 20, np.float32).sum(), attention(*a, **k))"""
    assert extra_megabytes(build, setup) > LIMIT_MB
