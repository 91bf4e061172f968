"""The process of one case on the GPU: checks every system, then times them in turns. It may crash; gpu.py goes on.

Its arguments are one JSON object; each line that it writes after MARK is one as well, and says what it does *before* it
does it:

    {"now": "torch flash"}                         from here on this system
    {"ready": name, "error": .., "kernel": ..}     right, and takes part; or {"failed": name, "why": ..}
    {"seconds": {name: [..]}}                      a time of each round
    {"ceilings": {..}}                             where that was asked for instead of a case
"""
import json
import os
import sys
import time

import numpy as np

import cyflash
from cyflash.bench.gpu_systems import SYSTEMS, Absent, GPUCase, tensors

MARK = "@ "
CHECKED_ROWS = 4  # the last ones, of the first and the last head
ROUND_SECONDS = 0.05
# Of outputs that are means of normal numbers: what rounding to 16 bits and to codes may cost.
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
CODES = 0.05
OURS = ("cyflash", "cyflash mma")
PATIENCE = 20.0  # seconds until what has not ended is taken for what never will
NOT_READY = 600  # of cudaError_t
BROKEN = 70      # exit status


def measure(case, names, seconds, rounds, tell):
    """Check and time systems on a case; tell(line) as the head of this file says."""
    tell({"now": "inputs"})
    inputs = tensors(case)
    expected = _expected(case, inputs)
    ready = {}
    for name in names:
        tell({"now": name})
        try:
            call = SYSTEMS[name](case, *inputs)
            out = call()
            _wait(_recorded())
            error = float(np.abs(_checked_rows(out, case) - expected).max())
        except Absent as why:
            tell({"failed": name, "why": str(why), "absent": True})
        except Exception as why:  # a system that cannot do the case says so in its own way
            tell({"failed": name, "why": f"{type(why).__name__}: {why}".partition("\n")[0]})
            _leave_if_broken()
        else:
            bound = CODES if name in OURS and case.kind.startswith("int8") else TOLERANCES.get(case.kind, 5e-3)
            if error <= bound:
                ready[name] = call
                kernel = call.kernel() if name in OURS else None
                tell({"ready": name, "error": error, "kernel": kernel})
            else:  # NaN too
                tell({"failed": name, "why": f"wrong: off by {error:.3g}, allowed {bound:.3g}"})
    tell({"seconds": _race(ready, seconds, rounds, tell)})


def _race(calls, seconds, rounds, tell):
    """{name: seconds of a call in each round}, all systems in turn in every round."""
    repeats, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        tell({"now": name})
        repeats[name] = max(1, int(ROUND_SECONDS / max(_timed(call, 3), 1e-7)))
    end = time.monotonic() + seconds
    while calls and (len(next(iter(times.values()))) < (rounds or 7) or (rounds is None and time.monotonic() < end)):
        for name, call in calls.items():
            tell({"now": name})
            times[name].append(_timed(call, repeats[name]))
    return times


def _timed(call, repeats):
    """Seconds of a call, by the GPU's clock."""
    begin = _recorded()
    for _ in range(repeats):
        call()
    end = _recorded()
    _wait(end)
    return _cuda().get_elapsed_time(begin, end) / 1e3 / repeats


def _cuda():
    from cyflash.gpu import status

    return status.cupy().cuda


def _recorded():
    event = _cuda().Event()
    event.record()
    return event


def _wait(event):
    """Until what was queued before the event has ended; TimeoutError where it does not."""
    query = getattr(_cuda().runtime, "eventQuery", None)
    end = time.monotonic() + PATIENCE
    while query and query(event.ptr) == NOT_READY:
        if time.monotonic() > end:
            raise TimeoutError(f"has not ended after {PATIENCE:.0f} s")
        time.sleep(1e-4)
    event.synchronize()


def _leave_if_broken():
    """End this process where its GPU does nothing more: after an error in a kernel, or while one does not end."""
    try:
        _wait(_recorded())
    except Exception as why:
        print(f"the GPU is left broken: {why}", flush=True)
        os._exit(BROKEN)


def ceilings():
    """What the device could do: bytes per second that a copy reads and writes, and float32 operations per second."""
    from cyflash.gpu import status

    cupy = status.cupy()
    source = cupy.full(1 << 28, 1, np.float32)
    target = cupy.empty(source.shape, np.float32)

    def copy():
        target[...] = source

    _timed(copy, 1)
    device = cupy.cuda.Device()
    each = 64 if device.compute_capability == "80" else 128  # units of float32 on a multiprocessor
    return {
        "copy": 2 * source.nbytes / float(np.median([_timed(copy, 4) for _ in range(5)])),
        "fp32": 2e3 * each * device.attributes["MultiProcessorCount"] * device.attributes["ClockRate"],  # in kHz
    }


def _on_host(x):
    """A GPU array in float32."""
    if hasattr(x, "cpu"):
        return x.float().cpu().numpy()
    from cyflash.gpu.arrays import to_host

    return to_host(x).astype(np.float32)


def _expected(case, inputs):
    """The last rows of the first and the last head of the last sequence, by the specification."""
    q, k, v = (_on_host(x[-1:]) for x in inputs)
    rows = min(CHECKED_ROWS, case.Lq)
    q = q[:, [0, -1], -rows:]
    k, v = (x[:, [0, -1]] for x in (k, v))
    return cyflash.reference.attention(q, k, v, causal=case.causal)


def _checked_rows(out, case):
    rows = min(CHECKED_ROWS, case.Lq)
    return _on_host(out[-1:])[:, [0, -1], -rows:]


def serve(request, tell):
    if "case" in request:
        measure(GPUCase(**request["case"]), request["names"], request["seconds"], request["rounds"], tell)
    else:
        tell({"ceilings": ceilings()})


def _print(line):
    print(MARK + json.dumps(line), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), _print)
