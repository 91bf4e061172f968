"""`cyflash compare`: error, time and memory of cyflash beside plain NumPy, layer by layer, on captured activations.

    files -> captures -> one row per layer and scheme (measure) -> report.py: table, summary, --json, --plot
"""

import argparse
import json
import statistics
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

import cyflash
from cyflash.capture import LAYOUTS, load_capture
from cyflash.measure import CallProcess, blas_threads, interleaved_times
from cyflash.output import as_bytes, check_files
from cyflash.plain import plain_attention
from cyflash.report import draw, show, summarise


def _numpy_fp32(layer, options, threads):
    with np.errstate(invalid="ignore", over="ignore"):  # inputs may be what they like: the comparison tells
        return plain_attention(*layer, **options)


def _cyflash_fp32(layer, options, threads):
    return cyflash.flash_attention(*layer, num_threads=threads, **options)


# The rows of every layer: name -> function(layer, options, threads) -> output. The others are set against the first.
SCHEMES = {"numpy fp32": _numpy_fp32, "cyflash fp32": _cyflash_fp32}
BASELINE = next(iter(SCHEMES))


class Settings(NamedTuple):
    """What the whole run shares."""

    layout: str
    given: dict
    """Options of the command line; they win over those of a file."""
    threads: int
    blas_threads: int | None
    """What NumPy's BLAS reports; None when it cannot be told."""


def add_arguments(parser):
    parser.add_argument(
        "files", nargs="*", metavar="FILE",
        help=".npz or .safetensors with q, k, v, or <layer>.q, <layer>.k, <layer>.v; each (L, D), (H, L, D) or "
        "(B, H, L, D) (default: the activations in examples/data)",
    )  # fmt: skip
    parser.add_argument("--layout", choices=LAYOUTS, default="bhld", help="order of the axes in FILE (default: bhld)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads of both (default: see `cyflash info`)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the table (needs matplotlib)")
    options = parser.add_argument_group("attention options", "override what FILE's metadata says")
    options.add_argument("--causal", action=argparse.BooleanOptionalAction, help="hide the keys after each query")
    options.add_argument("--scale", type=float, help="multiplies the scores (default: 1/sqrt(D))")
    options.add_argument(
        "--window", type=int, nargs=2, metavar=("L", "R"),
        help="keys visible to the left and right of each query; -1: all. W tokens, itself included: W-1 0",
    )  # fmt: skip
    options.add_argument("--softcap", type=float, help="scores become softcap * tanh(score / softcap); 0: off")


def run(args):
    check_files(args.json, args.plot)
    captures = [load_capture(path, args.layout) for path in args.files or [shipped_data()]]
    threads, notes = _threads(args.threads)
    with blas_threads(threads) as blas:
        settings = Settings(args.layout, _given_options(args), threads, blas.count)
        rows = measure(captures, settings)
    report = describe(captures, settings, rows)
    report["notes"] = notes + _notes(captures, rows)

    if args.json:  # first, so that nothing is lost
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    if args.json:
        print(f"Numbers: {args.json}")
    if args.plot:
        draw(report, args.plot)
        print(f"Plot: {args.plot}")
    return 1 if any(row["problem"] and row["scheme"] != BASELINE for row in rows) else 0


def shipped_data():
    """The file of real activations, beside the package in a source tree or in the checkout that one stands in."""
    name = Path("examples", "data", "minilm.safetensors")
    for folder in (Path(cyflash.__file__).resolve().parent.parent, Path.cwd()):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"no FILE given, and the shipped {name} is not here: it comes with the source tree, not with the installed "
        "package; pass a .npz or .safetensors file, or run in a checkout"
    )


# Measuring


def measure(captures, settings):
    """One dict per layer and scheme: error against float64, times, memory. Shows a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    layers = [(capture, name) for capture in captures for name in capture]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    rows = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(layers) * (2 + len(SCHEMES)))
        for capture, name in layers:
            label = f"{capture.path.stem}: {name}" if len(captures) > 1 else name

            def step(what, label=label):
                progress.update(task, description=f"{label}: {what}", refresh=True)  # quick steps are named too
                return lambda: progress.advance(task)

            rows += measure_layer(capture, name, label, settings, step)
    return rows


def measure_layer(capture, name, label, settings, step):
    layer, options = capture[name], capture.options | settings.given
    attend = dict(SCHEMES)
    problems = dict.fromkeys(SCHEMES)
    if problem := _too_large(layer, 4):
        problems[BASELINE] = f"not run: its scores alone need {problem}"
        del attend[BASELINE]

    done = step("error")
    outputs = {scheme: attend[scheme](layer, options, settings.threads) for scheme in attend}
    errors, found = _errors(layer, options, outputs)
    problems |= found
    del outputs
    done()
    with ExitStack() as stack:
        processes = {}
        for scheme in attend:
            done = step(f"memory of {scheme}")
            processes[scheme] = stack.enter_context(_process(capture, name, settings, scheme))
            done()
        done = step("time")
        times = interleaved_times(processes)
        done()
        memory = {scheme: process.memory for scheme, process in processes.items()}
    seconds = {scheme: statistics.median(chain(*rounds)) for scheme, rounds in times.items()}
    return [
        {
            "file": str(capture.path),
            "layer": name,
            "label": label,
            "shapes": dict(zip("qkv", (list(x.shape) for x in layer), strict=True)),
            "stored": capture.stored[name],
            "scheme": scheme,
            "problem": problems[scheme],
            "error": errors[scheme]._asdict() if scheme in errors else None,
            "seconds": seconds.get(scheme),
            "seconds_by_round": times.get(scheme),
            "memory": memory[scheme]._asdict() | {"extra": memory[scheme].extra} if scheme in memory else None,
            **_ratios(scheme, seconds, memory),
        }
        for scheme in SCHEMES
    ]


def _process(capture, name, settings, scheme):
    """A fresh process with one scheme's call on one layer."""
    return CallProcess(
        "cyflash.compare:prepare_call", path=str(capture.path.resolve()), layer=name, layout=settings.layout,
        given=settings.given, scheme=scheme, threads=settings.threads,
    )  # fmt: skip


def prepare_call(path, layer, layout, given, scheme, threads):
    """In that process: everything but the call itself."""
    capture = load_capture(path, layout)
    arrays, options = capture[layer], capture.options | given
    if "window" in options:
        options["window"] = tuple(options["window"])
    blas_threads(threads)  # for as long as the process lives
    return lambda: SCHEMES[scheme](arrays, options, threads)


def _errors(layer, options, outputs):
    """({scheme: Comparison with the float64 reference}, {scheme: what was wrong})."""
    from cyflash.quant import compare

    if problem := _too_large(layer, 7 * 8, heads=1):
        return {}, dict.fromkeys(outputs, f"no error: the float64 reference needs {problem}")
    reference = cyflash.reference.attention(*layer, **options)
    errors, problems = {}, {}
    for scheme, output in outputs.items():
        try:
            errors[scheme] = compare(output, reference)
        except ValueError as error:  # NaN or infinities where the reference has none
            problems[scheme] = str(error)
    return errors, problems


def _too_large(layer, bytes_per_score, heads=None):
    """Why (Lq, Lk) arrays of that many bytes per score do not fit the memory that is free; None if they do."""
    *outer, Lq, _ = layer.q.shape
    heads = int(np.prod(outer)) if heads is None else heads
    need, free = bytes_per_score * heads * Lq * layer.k.shape[-2], _available_memory()
    return f"{as_bytes(need)}, and {as_bytes(free)} are free" if free is not None and need > 0.9 * free else None


def _available_memory():
    """Bytes that can still be used, by the system's and the container's account; None where that is not known."""
    limits = []
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
        used, most = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.current", "memory.max"))
        limits.append(int(most) - int(used))
    except (OSError, ValueError, KeyError):
        pass
    return min(limits, default=None)


def _ratios(scheme, seconds, memory):
    """How a scheme stands to the baseline; None where there is nothing to divide."""
    if scheme == BASELINE or BASELINE not in seconds:
        return {"speedup": None, "memory_ratio": None}
    base = memory[BASELINE].extra
    return {
        "speedup": seconds[BASELINE] / seconds[scheme],
        "memory_ratio": memory[scheme].extra / base if base else None,
    }


def _threads(asked):
    """(threads for both, notes)."""
    info = cyflash.cpu_info()
    threads = asked or info["threads"]
    if threads > 1 and info["openmp"] is None:
        return 1, ["cyflash was built without OpenMP: both run on one thread."]
    return threads, []


def _given_options(args):
    given = {name: getattr(args, name) for name in ("causal", "scale", "window", "softcap")}
    return {name: tuple(x) if name == "window" else x for name, x in given.items() if x is not None}


# Describing


def describe(captures, settings, rows):
    """Everything a reader needs to judge the rows; what `--json` writes."""
    info = cyflash.cpu_info()
    return {
        "cyflash": cyflash.__version__,
        "numpy": np.__version__,
        "machine": {"cpu": info["model"], "cores": info["cores"], "implementation": info["implementation"]},
        "settings": {
            "threads": settings.threads,
            "numpy_blas_threads": settings.blas_threads,
            "layout": settings.layout,
            "files": {str(capture.path): _plain(capture.options | settings.given) for capture in captures},
        },
        "baseline": BASELINE,
        "layers": rows,
        "summary": summarise(rows),
    }


def _notes(captures, rows):
    notes = []
    for capture in captures:
        rounded = [name for name, dtype in capture.stored.items() if "float64" in dtype]
        if rounded:
            names = ", ".join(rounded)
            notes.append(f"{capture.path.name}: {names}: float64, rounded to float32 for all, the reference included.")
    notes += [f"{row['label']}, {row['scheme']}: {row['problem']}" for row in rows if row["problem"]]
    if restless := sum(_restless(row) for row in rows):
        notes.append(
            f"the times of {restless} of {len(rows)} rows differ more than twofold between rounds: something else "
            "keeps this machine busy, and their speed ratios are not reliable (fewer --threads suffer less)."
        )
    if any(row["memory"] and not row["memory"]["reset"] for row in rows):
        notes.append("memory is a lower bound: this system cannot reset a process's peak, so a part may be hidden.")
    return notes


def _restless(row):
    rounds = [statistics.median(times) for times in row["seconds_by_round"] or []]
    return bool(rounds) and max(rounds) > 2 * min(rounds)


def _plain(options):
    """Options as JSON holds them."""
    return {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in options.items()}


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return number
