"""`--gpu`: kernels of the GPU beside torch's flash and cuDNN backends and Triton, in one run, as one table.

Each system's output is compared with the specification before it is timed. Rounds go through all systems of a case in
turn; a time is that between two events around a number of calls, over that number; what is shown is the median.
"""
import json
import statistics
import time

import numpy as np

import cyflash
from cyflash.bench.gpu_systems import SYSTEMS, Absent, GPUCase, tensors
from cyflash.output import as_time, check_files, empty_table

LONG = 16384
CASES = (
    *(GPUCase(kind, 1, 16, 16, LONG, LONG, 128, causal) for kind in ("fp16", "bf16") for causal in (False, True)),
    GPUCase("fp16", 1, 32, 32, LONG, LONG, 64),
    *(GPUCase(kind, 1, 16, 16, LONG, LONG, 128, causal) for kind in ("int8 qk", "int8") for causal in (False, True)),
    GPUCase("int8", 1, 16, 16, LONG, LONG, 128, quantise=True),
    GPUCase("fp32", 1, 16, 16, 4096, 4096, 64),
    GPUCase("fp32", 1, 16, 16, 4096, 4096, 128),
    *(GPUCase(kind, 64, 32, 8, 1, 8192, 128) for kind in ("fp16", "int8")),
)
FEW_ROWS = 16  # a case with fewer is measured by the bytes it reads
CHECKED_ROWS = 4  # the last ones, of the first and the last head
ROUND_SECONDS = 0.05
# Of outputs that are means of normal numbers: what rounding to 16 bits and to codes may cost.
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
CODES = 0.05
RATIO_TO = "torch cuDNN"


def run(args):
    """Runs the command; the exit status. GPUUnavailableError where there is no GPU."""
    status = cyflash.gpu_status()
    if not status.available:
        raise cyflash.GPUUnavailableError(f"--gpu: there is no GPU to measure on: {status.reason}")
    if args.shapes or args.causal or args.threads or args.isa or args.plot:
        raise ValueError("--gpu measures a fixed list; leave out --shapes, --causal, --threads, --isa and --plot")
    for name in args.systems or ():
        if name not in SYSTEMS:
            raise ValueError(f"--systems: expected names of {', '.join(SYSTEMS)}; got {name!r}")
    check_files(args.json)
    names = [name for name in SYSTEMS if name == "cyflash" or not args.systems or name in args.systems]
    copied = copy_rate()
    results = [measure(case, names, args.seconds, args.rounds) for case in CASES]
    if args.json:
        args.json.write_text(json.dumps(_as_json(status, copied, results), indent=1))
    show(status, copied, results)
    return 1 if any("cyflash" in result["failures"] for result in results) else 0


def measure(case, names, seconds, rounds):
    """{"case", "seconds": {system: median}, "failures": {system: why}, "error": {system: greatest}}."""
    inputs = tensors(case)
    expected = _expected(case, inputs)
    ready, failures, errors = {}, {}, {}
    for name in names:
        try:
            call = SYSTEMS[name](case, *inputs)
            errors[name] = error = float(np.abs(_checked_rows(call(), case) - expected).max())
        except Absent as why:
            failures[name] = str(why)
        except Exception as why:  # a system that cannot do the case says so in its own way
            failures[name] = f"{type(why).__name__}: {why}".partition("\n")[0]
        else:
            bound = CODES if name == "cyflash" and case.kind.startswith("int8") else TOLERANCES.get(case.kind, 5e-3)
            if error <= bound:
                ready[name] = call
            else:  # NaN too
                failures[name] = f"wrong: off by {error:.3g}, allowed {bound:.3g}"
    times = _race(ready, seconds, rounds)
    return {"case": case, "seconds": times, "failures": failures, "errors": errors}


def _race(calls, seconds, rounds):
    """{name: median seconds of a call}, all systems in turn in every round."""
    repeats = {name: max(1, int(ROUND_SECONDS / max(_timed(call, 3), 1e-7))) for name, call in calls.items()}
    times = {name: [] for name in calls}
    end = time.monotonic() + seconds
    while calls and (len(next(iter(times.values()))) < (rounds or 7) or (rounds is None and time.monotonic() < end)):
        for name, call in calls.items():
            times[name].append(_timed(call, repeats[name]))
    return {name: statistics.median(found) for name, found in times.items()}


def _timed(call, repeats):
    """Seconds of a call, by the GPU's clock."""
    from cyflash.gpu import status

    cuda = status.cupy().cuda
    begin, end = cuda.Event(), cuda.Event()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return cuda.get_elapsed_time(begin, end) / 1e3 / repeats


def copy_rate():
    """Bytes per second that a copy reads, and writes as many: what keys and values could be read at."""
    from cyflash.gpu import status

    cupy = status.cupy()
    source = cupy.full(1 << 28, 1, np.float32)
    target = cupy.empty(source.shape, np.float32)

    def copy():
        target[...] = source

    _timed(copy, 1)
    return 2 * source.nbytes / statistics.median(_timed(copy, 4) for _ in range(5))


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


def _rate(case, name, seconds):
    """Of operations; where rows are few, of the bytes that this system reads."""
    if case.Lq < FEW_ROWS:
        codes = 1 if name == "cyflash" else 2  # others have no int8
        return case.elements() * {"fp32": 4, "int8": codes}.get(case.kind, 2) / seconds / 1e9
    return case.flops() / seconds / 1e12


def _unit(case):
    return "GB/s" if case.Lq < FEW_ROWS else "TOP/s" if case.kind.startswith("int8") else "TFLOP/s"


def show(status, copied, results):
    """The table: rates, the time of cyflash, and its ratio to cuDNN."""
    from rich.console import Console

    console = Console(highlight=False)
    names = [name for name in SYSTEMS if any(name in result["seconds"] for result in results)]
    table = empty_table()
    table.add_column("case")
    for name in names:
        table.add_column(name, justify="right")
    for header in ("unit", "time", "vs cuDNN"):
        table.add_column(header, justify="right")
    for result in results:
        case, times = result["case"], result["seconds"]
        ours = times.get("cyflash")
        ratio = f"{times[RATIO_TO] / ours:.2f}x" if ours and RATIO_TO in times else "-"
        rates = [f"{_rate(case, name, times[name]):.0f}" if name in times else "-" for name in names]
        table.add_row(case.title(), *rates, _unit(case), as_time(ours), ratio)
    console.print(f"{status.device}, compute capability {status.compute_capability}, CuPy {status.cupy}, NVRTC "
                  f"{status.nvrtc}; a copy moves {copied / 1e9:.0f} GB/s")
    console.print(table)
    console.print("[dim]Rates by 4 B H pairs D; of few query rows the bytes of keys and values. torch and Triton: 16 "
                  "bits beside int8.[/]")
    for result in results:
        for name, why in result["failures"].items():
            console.print(f"{name}, {result['case'].title()}: {why}", markup=False, soft_wrap=True)


def _as_json(status, copied, results):
    return {
        "version": cyflash.__version__, "gpu": status._asdict(), "copy_bytes_per_second": copied,
        "results": [result | {"case": vars(result["case"])} for result in results],
    }
