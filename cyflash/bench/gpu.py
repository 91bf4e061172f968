"""`--gpu`: kernels of the GPU beside torch's flash and cuDNN backends and Triton, in one run, as one table.

Each case has a process of its own (gpu_worker.py). There each system's output is compared with the specification before
it is timed; rounds go through all systems in turn; a time is that between two events around a number of calls, over
that number; what is shown is the median. A system that ends the process, or does not end, is left out of the next try.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import cyflash
from cyflash.bench.gpu_systems import SYSTEMS, GPUCase
from cyflash.bench.gpu_worker import MARK, OURS
from cyflash.output import as_time, check_files, empty_table

LONG = 16384
CASES = (  # those that are aimed at first: time may end
    *(GPUCase(kind, 1, 16, 16, LONG, LONG, 128) for kind in ("fp16", "int8 qk", "int8")),
    *(GPUCase(kind, 64, 32, 8, 1, 8192, 128) for kind in ("fp16", "int8")),
    GPUCase("fp32", 1, 16, 16, 4096, 4096, 128),
    *(GPUCase(kind, 1, 16, 16, LONG, LONG, 128, causal=True) for kind in ("fp16", "int8 qk", "int8")),
    GPUCase("fp16", 1, 32, 32, LONG, LONG, 64),
    GPUCase("int8", 1, 16, 16, LONG, LONG, 128, quantise=True),
    *(GPUCase("bf16", 1, 16, 16, LONG, LONG, 128, causal) for causal in (False, True)),
    GPUCase("fp32", 1, 16, 16, 4096, 4096, 64),
)
RATIO_TO = "torch cuDNN"
LIMIT = 180.0  # seconds of a process: torch and Triton compile in it
WORKER = ("-m", "cyflash.bench.gpu_worker")


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
    names = [name for name in SYSTEMS if name in OURS or not args.systems or name in args.systems]
    found, results = ceilings(), []
    for case in CASES:
        results.append(measure(case, names, args.seconds, args.rounds))
        if args.json:  # at once: a kernel could take the machine down
            args.json.write_text(json.dumps(as_json(status, found, results), indent=1))
    show(status, found, results)
    return 1 if any(fails(result) for result in results) else 0


def fails(result):
    """Whether one of our kernels is wrong, or does not run."""
    return any(name in OURS and name not in result["absent"] for name in result["failures"])


def measure(case, names, seconds, rounds, limit=LIMIT):
    """What was found of one case.

    Returns
    -------
    dict
        "case"; "seconds": {system: median}; "rounds": {system: times}; "failures": {system: why}; "absent": systems
        that take no part; "errors": {system: greatest}; "kernels": {system of ours: what ran}.
    """
    result = {"case": case, "seconds": {}, "rounds": {}, "failures": {}, "absent": [], "errors": {}, "kernels": {}}
    left = list(names)
    while left:
        lines, why = ask({"case": vars(case), "names": left, "seconds": seconds, "rounds": rounds}, limit)
        now = None
        for line in lines:
            now = line.get("now", now)
            if "failed" in line:
                result["failures"][line["failed"]] = line["why"]
                result["absent"] += [line["failed"]] * line.get("absent", False)
            elif "ready" in line:
                result["errors"][line["ready"]] = line["error"]
                if line["kernel"]:
                    result["kernels"][line["ready"]] = line["kernel"]
            elif "seconds" in line:
                result["rounds"] = line["seconds"]
        if why is None:
            break
        for name in [now] if now in left else left:
            result["failures"].setdefault(name, why)
            result["errors"].pop(name, None)
        left = [name for name in left if name not in result["failures"]]
    result["seconds"] = {name: statistics.median(times) for name, times in result["rounds"].items()}
    return result


def ceilings():
    """{"copy": bytes per second, "fp32": operations per second}, or {} where the GPU cannot be asked."""
    lines, _ = ask({}, LIMIT)
    return next((line["ceilings"] for line in lines if "ceilings" in line), {})


def ask(request, limit):
    """(what a process of gpu_worker.py said, why it ended too early or None)."""
    root = str(Path(cyflash.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    why = None
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, "-P", *WORKER, json.dumps(request)]
        with subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT,
        ) as process:
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.kill()
                code, why = 0, f"did not end in {limit:.0f} s"
            except BaseException:
                process.kill()
                raise
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    if code:
        last = next((line for line in reversed(lines) if line.strip() and not line.startswith(MARK)), "")
        why = f"ended its process with status {code}: {last.strip()[:300]}"
    return [json.loads(line[len(MARK):]) for line in lines if line.startswith(MARK + "{")], why


def rate(case, name, seconds):
    """Of operations; where rows are few, of the bytes that this system reads."""
    if case.few:
        codes = 1 if name in OURS else 2  # others have no int8
        return case.elements() * {"fp32": 4, "int8": codes}.get(case.kind, 2) / seconds / 1e9
    return case.flops() / seconds / 1e12


def _unit(case):
    return "GB/s" if case.few else "TOP/s" if case.kind.startswith("int8") else "TFLOP/s"


def table(results):
    """Rates, the time of cyflash, its ratio to cuDNN, and the kernel that ran."""
    names = [name for name in SYSTEMS if any(name in result["seconds"] for result in results)]
    made = empty_table()
    made.add_column("case")
    for name in names:
        made.add_column(name, justify="right")
    for header in ("unit", "time", "vs cuDNN", "kernel"):
        made.add_column(header, justify="left" if header == "kernel" else "right")
    for result in results:
        case, times = result["case"], result["seconds"]
        ours = times.get("cyflash")
        ratio = f"{times[RATIO_TO] / ours:.2f}x" if ours and RATIO_TO in times else "-"
        rates = [f"{rate(case, name, times[name]):.0f}" if name in times else "-" for name in names]
        kernel = result["kernels"].get("cyflash", "-")
        made.add_row(case.title(), *rates, _unit(case), as_time(ours), ratio, kernel)
    return made


def show(status, found, results, console=None):
    """The table, and why systems are missing in it."""
    from rich.console import Console

    console = console or Console(highlight=False)
    peaks = ""
    if found:
        peaks = f"; a copy moves {found['copy'] / 1e9:.0f} GB/s, float32 has {found['fp32'] / 1e12:.0f} TFLOP/s"
    console.print(f"{status.device}, compute capability {status.compute_capability}, CuPy {status.cupy}, NVRTC "
                  f"{status.nvrtc}{peaks}")
    console.print(table(results))
    console.print("[dim]Rates by 4 B H pairs D; of few query rows the bytes of keys and values. torch and Triton: 16 "
                  "bits beside int8.[/]")
    reasons = {}
    for result in results:
        for name, why in result["failures"].items():
            reasons.setdefault((name, why), []).append(result["case"].title())
    for (name, why), titles in reasons.items():
        cases = f"{len(titles)} cases" if len(titles) > 3 else "; ".join(titles)
        console.print(f"{name}, {cases}: {why}", markup=False, soft_wrap=True)


def as_json(status, found, results):
    return {
        "version": cyflash.__version__, "gpu": status._asdict(), "ceilings": found,
        "results": [result | {"case": vars(result["case"])} for result in results],
    }
