"""The cases of `cyflash bench --gpu`, and what the project aims at beside what was measured."""
import io
import json
import time

from gpu_session import machine

SECONDS, ROUNDS = 1.5, None
NEEDED = 15.0  # seconds without which no case is begun

# What it is, the case's kind and D (not causal), the system, what the kernel's name has to hold; at least this; aim.
TARGETS = (
    ("fp16, D=128, mma.sync", "fp16", 128, "cyflash mma", "cyflash_mma", 350, None),
    ("fp16, D=128, TMA + wgmma", "fp16", 128, "cyflash", "cyflash_hopper", 600, 680),
    ("int8 QK + fp16 P.V, D=128, Hopper", "int8 qk", 128, "cyflash", "cyflash_hopper", 600, 790),
    ("int8 both, D=128, Hopper", "int8", 128, "cyflash", "cyflash_hopper", 800, 1000),
)
SHARES = (  # of what the device could do
    ("fp32, of the fp32 peak", "fp32", "fp32", 0.6),
    ("decode, fp16 cache, of the copy bandwidth", "fp16", "copy", 0.8),
    ("decode, int8 cache, of the copy bandwidth", "int8", "copy", 0.8),
)


class Status:
    """What gpu.show says of the GPU, from the report of the machine."""

    def __init__(self, found):
        self.device, self.compute_capability = found.get("device"), found.get("compute_capability")
        self.cupy, self.nvrtc = found.get("cupy"), found.get("nvrtc")

    def _asdict(self):
        return vars(self)


def run(report, deadline, *, dry=False):
    """Measure every case that there is time for; whether our kernels were right."""
    from cyflash.bench import gpu
    from cyflash.bench.gpu_systems import SYSTEMS, GPUCase

    cases, seconds, rounds = gpu.CASES, SECONDS, ROUNDS
    if dry:
        gpu.WORKER = ("-c", "import gpu_pretend; gpu_pretend.install()\nimport runpy\n"
                            "runpy.run_module('cyflash.bench.gpu_worker', run_name='__main__')")
        cases = GPUCase("fp16", 1, 2, 1, 70, 70, 64), GPUCase("int8", 2, 4, 2, 1, 300, 64)
        seconds, rounds = 0.1, 1
    known = {}
    for result in report.found.get("bench", {}).get("results", []):
        known[json.dumps(result["case"])] = result | {"case": GPUCase(**result["case"])}
    status = Status(_answer(report, dry))
    found = report.found.get("bench", {}).get("ceilings") or gpu.ceilings()
    report.say(f"ceilings: {json.dumps(found) if found else 'could not be measured'}")
    results = []
    for case in cases:
        left = deadline - time.monotonic()
        before = known.get(json.dumps(vars(case)))
        if before and before["seconds"]:
            results.append(before)
            continue
        if left < NEEDED:
            report.say(f"not measured, no time left: {case.title()}")
            continue
        result = gpu.measure(case, list(SYSTEMS), seconds, rounds, limit=min(gpu.LIMIT, left))
        results.append(result)
        report.say(_line(gpu, result))
        report.keep("bench", gpu.as_json(status, found, results))
    _show(report, gpu, status, found, results)
    report.keep("targets", targets(report, gpu, found, results))
    return len(results) == len(cases) and not any(gpu.fails(result) for result in results)


def _answer(report, dry):
    known = report.found.get("machine", {}).get("cyflash")
    if known and "error" not in known:
        return known
    return machine.ask(machine.QUESTIONS["cyflash"], dry)[0] or {}


def _line(gpu, result):
    case = result["case"]
    rates = [f"{name} {gpu.rate(case, name, seconds):.0f}" for name, seconds in result["seconds"].items()]
    failures = [f"{name}: {why}" for name, why in result["failures"].items() if name not in result["absent"]]
    return f"{case.title()}: {', '.join(rates) or 'nothing ran'}" + "".join(f"\n    {text}" for text in failures)


def _show(report, gpu, status, found, results):
    from rich.console import Console

    out = io.StringIO()
    gpu.show(status, found, results, Console(file=out, width=200, highlight=False))
    report.say(out.getvalue())


def targets(report, gpu, found, results):
    """What was aimed at, and what was measured: as lines, and as they are kept."""
    rows = []
    for what, kind, D, system, kernel, least, aim in TARGETS:
        result = next((one for one in results if (one["case"].kind, one["case"].D) == (kind, D) and not one["case"].few
                       and not one["case"].causal and not one["case"].quantise), None)
        measured = why = ratio = None
        if result is None:
            why = "not measured"
        elif system not in result["seconds"]:
            why = result["failures"].get(system, "not measured")
        elif kernel not in result["kernels"].get(system, ""):
            why = f"another kernel ran: {result['kernels'].get(system)}"
        else:
            measured = gpu.rate(result["case"], system, result["seconds"][system])
            if gpu.RATIO_TO in result["seconds"]:
                ratio = result["seconds"][gpu.RATIO_TO] / result["seconds"][system]
        rows.append({"what": what, "least": least, "aim": aim, "measured": measured, "vs cuDNN": ratio, "why": why})
    for what, kind, ceiling, least in SHARES:
        shares = [gpu.rate(one["case"], "cyflash", one["seconds"]["cyflash"]) / found[ceiling]
                  * (1e9 if one["case"].few else 1e12)
                  for one in results if one["case"].kind == kind and one["case"].few == (ceiling == "copy")
                  and "cyflash" in one["seconds"] and found]
        rows.append({"what": what, "least": least, "aim": None, "measured": max(shares, default=None), "vs cuDNN": None,
                     "why": None if shares else "not measured"})
    report.say("", f"{'target':<45} {'at least':>8} {'aim':>6} {'measured':>9} {'vs cuDNN':>8}")
    for row in rows:
        report.say(" ".join([
            f"{row['what']:<45} {row['least']:>8} {row['aim'] or '-':>6}", _number(row["measured"], ">9"),
            _number(row["vs cuDNN"], ">8"), _verdict(row),
        ]))
    return rows


def _number(x, form):
    return f"{'-' if x is None else f'{x:.3g}' if x >= 100 else f'{x:.2f}':{form}}"


def _verdict(row):
    if row["measured"] is None:
        return row["why"]
    return "met" if row["measured"] >= row["least"] else "MISSED"
