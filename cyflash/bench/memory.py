"""The memory that a long call needs beyond its inputs and output, as the operating system counts it."""
import contextlib
from pathlib import Path

import numpy as np


def extra_bytes(L, broadcast_bias, threads):
    """Growth of the peak resident set over a call on (1, 1, L, 64); to be run in a fresh process.

    Inputs and output are there and touched before. `broadcast_bias` adds a bias of one row that stands for L x L.
    """
    import cyflash

    rng = np.random.default_rng(0)
    q, k, v, out = (rng.standard_normal((1, 1, L, 64), dtype=np.float32) for _ in range(4))
    options = {"num_threads": threads}
    if broadcast_bias:
        options["bias"] = np.broadcast_to(rng.standard_normal(L, dtype=np.float32), (L, L))
    short = {**options, **({"bias": options["bias"][:256, :256]} if broadcast_bias else {})}
    cyflash.flash_attention(q[:, :, :256], k[:, :, :256], v[:, :, :256], **short)  # starts the threads
    with contextlib.suppress(OSError):  # restarts the peak at the present size; without it the result is an upper bound
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    cyflash.flash_attention(q, k, v, out=out, **options)
    return _status("VmHWM") - before


def _status(name):
    """Bytes. VmHWM, not ru_maxrss: the latter starts at the size of the process that started this one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise NotImplementedError("the memory of a process is only read where Linux's /proc is") from None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
