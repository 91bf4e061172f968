"""`cyflash compare`: error, time and memory of cyflash beside plain NumPy, layer by layer, on captured activations.

    files -> captures -> one row per layer and scheme (measure) -> table, summary, --json, --plot
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

import cyflash
from cyflash.capture import LAYOUTS, load_capture
from cyflash.measure import blas_threads, interleaved_times, peak_memory
from cyflash.plain import plain_attention


def _numpy_fp32(layer, options, threads):
    return plain_attention(*layer, **options)


def _cyflash_fp32(layer, options, threads):
    return cyflash.flash_attention(*layer, num_threads=threads, **options)


# The rows of every layer: name -> function(layer, options, threads) -> output. The others are set against the first.
SCHEMES = {"numpy fp32": _numpy_fp32, "cyflash fp32": _cyflash_fp32}
BASELINE = next(iter(SCHEMES))
TABLE_WIDTH = 84  # without the names of the layers
COLOURS = {"numpy fp32": "#8c8c8c", "cyflash fp32": "#1f6fb4"}


class Settings(NamedTuple):
    """What the whole run shares."""

    layout: str
    given: dict
    """Options of the command line; they win over those of a file."""
    threads: int
    blas_threads: int | None
    """What NumPy's BLAS reports; None when it cannot be told."""
    repeats: int = 15
    seconds: float = 1.0
    """The most interleaved rounds per layer, and the time after which no further one begins."""


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
    from rich.console import Console

    for path in filter(None, (args.json, args.plot)):
        _check_writable(path)
    if args.plot:
        _figure_class()
    captures = [load_capture(path, args.layout) for path in args.files or [shipped_data()]]
    threads, notes = _threads(args.threads)
    with blas_threads(threads) as blas:
        settings = Settings(args.layout, _given_options(args), threads, blas.count)
        rows = measure(captures, settings)
    report = {
        "cyflash": cyflash.__version__,
        "numpy": np.__version__,
        "machine": machine(),
        "settings": {
            "threads": threads,
            "numpy_blas_threads": blas.count,
            "layout": args.layout,
            "files": {str(c.path): _plain(c.options | settings.given) for c in captures},
        },
        "layers": rows,
        "summary": summarise(rows),
    }
    console = Console()
    if not console.is_terminal:  # a file or a pipe: as wide as the table
        console = Console(width=TABLE_WIDTH + max(len(row["label"]) for row in rows))
    show(console, report, [*notes, *_notes(captures, rows)])
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"Numbers: {args.json}", highlight=False)
    if args.plot:
        plot(report, args.plot)
        console.print(f"Plot: {args.plot}", highlight=False)
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
                progress.update(task, description=f"{label}: {what}")
                return lambda: progress.advance(task)

            rows += measure_layer(capture, name, label, settings, step)
    return rows


def measure_layer(capture, name, label, settings, step):
    layer, options = capture[name], capture.options | settings.given
    calls = {
        scheme: lambda attend=attend: attend(layer, options, settings.threads)
        for scheme, attend in SCHEMES.items()
    }  # fmt: skip
    problems = dict.fromkeys(calls)
    if problem := _too_large(layer, 4):
        problems[BASELINE] = f"not run: its scores alone need {problem}"
        del calls[BASELINE]

    done = step("error")
    errors, found = _errors(layer, options, calls)
    problems |= found
    done()
    done = step("time")
    times = interleaved_times(calls, repeats=settings.repeats, seconds=settings.seconds)
    done()
    memory = {}
    for scheme in SCHEMES:
        done = step(f"memory of {scheme}")
        if scheme in calls:
            memory[scheme] = peak_memory(
                "cyflash.compare:prepare_call", path=str(capture.path.resolve()), layer=name, layout=settings.layout,
                given=settings.given, scheme=scheme, threads=settings.threads,
            )  # fmt: skip
        done()
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
            "seconds": statistics.median(times[scheme]) if scheme in calls else None,
            "seconds_each": times.get(scheme),
            "memory": memory[scheme]._asdict() | {"extra": memory[scheme].extra} if scheme in calls else None,
            **_ratios(scheme, times, memory),
        }
        for scheme in SCHEMES
    ]


def prepare_call(path, layer, layout, given, scheme, threads):
    """One scheme's call on one layer, for `peak_memory`: everything but the call itself is done here."""
    capture = load_capture(path, layout)
    arrays, options = capture[layer], capture.options | given
    blas_threads(threads)
    return lambda: SCHEMES[scheme](arrays, options, threads)


def _errors(layer, options, calls):
    """({scheme: Comparison with the float64 reference}, {scheme: what was wrong})."""
    from cyflash.quant import compare

    if problem := _too_large(layer, 7 * 8, heads=1):
        return {}, dict.fromkeys(calls, f"no error: the float64 reference needs {problem}")
    reference = cyflash.reference.attention(*layer, **options)
    errors, problems = {}, {}
    for scheme, call in calls.items():
        try:
            errors[scheme] = compare(call(), reference)
        except ValueError as error:
            problems[scheme] = str(error)
    return errors, problems


def _too_large(layer, bytes_per_score, heads=None):
    """Why (Lq, Lk) arrays of that many bytes per score do not fit the memory that is free; None if they do."""
    *outer, Lq, _ = layer.q.shape
    heads = int(np.prod(outer)) if heads is None else heads
    need, free = bytes_per_score * heads * Lq * layer.k.shape[-2], _available_memory()
    return f"{_bytes(need)}, and {_bytes(free)} are free" if free is not None and need > 0.9 * free else None


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


def _ratios(scheme, times, memory):
    """How a scheme stands to the baseline; None where there is nothing to divide."""
    if scheme == BASELINE or BASELINE not in memory:
        return {"speedup": None, "memory_ratio": None}
    rounds = zip(times[BASELINE], times[scheme], strict=True)
    base = memory[BASELINE].extra
    return {
        "speedup": statistics.median(baseline / own for baseline, own in rounds),
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


# Reporting


def machine():
    info = cyflash.cpu_info()
    return {"cpu": info["model"], "cores": info["cores"], "implementation": info["implementation"]}


def summarise(rows):
    """{scheme: {layers, mean and worst errors, median and range of the ratios}}."""
    summary = {}
    for scheme in SCHEMES:
        own = [row for row in rows if row["scheme"] == scheme]
        errors = [row["error"] for row in own if row["error"]]
        summary[scheme] = {
            "layers": len(own),
            "rel_l1_mean": statistics.mean(e["rel_l1"] for e in errors) if errors else None,
            "rel_l1_worst": max((e["rel_l1"] for e in errors), default=None),
            "max_abs": max((e["max_abs"] for e in errors), default=None),
            "worst_head": max((e["worst_head"] for e in errors), default=None),
            "worst_row": max((e["worst_row"] for e in errors), default=None),
            "speedup": _spread(own, "speedup"),
            "memory_ratio": _spread(own, "memory_ratio"),
        }
    return summary


def _spread(rows, name):
    values = [row[name] for row in rows if row[name] is not None]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def show(console, report, notes):
    """Print the table, what its columns are, and the summary line."""
    from rich.markup import escape

    console.print(_table(report["layers"], console.width))
    console.print()
    settings, box = report["settings"], report["machine"]
    for path, options in settings["files"].items():
        text = ", ".join(f"{name}={value}" for name, value in options.items()) or "none"
        console.print(f"[dim]File:[/] {escape(_short(path))} [dim]options:[/] {escape(text)}", highlight=False)
    blas = settings["numpy_blas_threads"]
    blas = "unknown number of threads" if blas is None else _count(blas, "thread")
    console.print(
        f"[dim]Run:[/] {escape(box['cpu'])}, {_count(box['cores'], 'core')}; cyflash {report['cyflash']} "
        f"({box['implementation']} build) on {_count(settings['threads'], 'thread')}, NumPy {report['numpy']} with its "
        f"BLAS on {blas}.",
        highlight=False,
    )
    console.print(
        "[dim]Error: against attention in float64 on the same inputs; worst head and row: their relative L1. Time: "
        f"median of {_repeats(report['layers'])} interleaved calls; speed ratio: NumPy's time over this one's. Memory: "
        "what one call, its output included, adds to the peak resident set of a fresh process; memory ratio: this "
        "over NumPy's.[/]",
        highlight=False,
    )
    for note in notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", highlight=False)
    for line in summary_lines(report["summary"]):
        console.print(f"[bold]{escape(line)}[/]", highlight=False)


def _table(rows, width):
    """One line per layer and scheme; the layer has a column where there is room, else a line of its own."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    wide = width >= TABLE_WIDTH + max(len(row["label"]) for row in rows)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1 if wide else 0, 0, 0))
    if wide:
        table.add_column("layer", no_wrap=True)
    table.add_column("scheme" if wide else "layer, scheme", overflow="fold")
    errors = ("rel. L1", "max abs", "worst\nhead", "worst\nrow")
    for header in (*errors, "time", "speed\nratio", "memory", "memory\nratio"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        error, memory = row["error"] or {}, row["memory"] or {}
        cells = [_error(error.get(name)) for name in ("rel_l1", "max_abs", "worst_head", "worst_row")]
        cells += [_time(row["seconds"]), _times(row["speedup"])]
        cells += [_bytes(memory.get("extra")), _times(row["memory_ratio"])]
        first = row["scheme"] == BASELINE
        name = Text(row["label"] if first else "", style="not dim")
        if wide:
            cells = [name, row["scheme"], *cells]
        else:
            cells = [f"  {row['scheme']}", *cells]
            if first:
                table.add_row(name)
        table.add_row(*cells, style="dim" if first else None)
    return table


def summary_lines(summary):
    """One sentence per scheme that is set against the baseline."""
    base = summary[BASELINE]
    for scheme, own in summary.items():
        if scheme == BASELINE:
            continue
        parts = []
        if own["speedup"]:
            parts.append(f"{_range(own['speedup'])} as fast as NumPy")
        if own["memory_ratio"]:
            parts.append(f"{_range(own['memory_ratio'])} its memory")
        if own["rel_l1_mean"] is not None:
            versus = f" (NumPy {base['rel_l1_mean']:.1e})" if base["rel_l1_mean"] is not None else ""
            parts.append(f"mean relative L1 {own['rel_l1_mean']:.1e}{versus}, worst row {own['worst_row']:.1e}")
        yield f"{scheme}, {_count(own['layers'], 'layer')}: {'; '.join(parts) or 'nothing to compare with'}."


def _notes(captures, rows):
    notes = []
    for capture in captures:
        rounded = [name for name, dtype in capture.stored.items() if "float64" in dtype]
        if rounded:
            names = ", ".join(rounded)
            notes.append(f"{capture.path.name}: {names}: float64, rounded to float32 for all, the reference included.")
    notes += [f"{row['label']}, {row['scheme']}: {row['problem']}" for row in rows if row["problem"]]
    if any(row["memory"] and row["memory"]["method"].startswith("ru_maxrss") for row in rows):
        notes.append("memory is a lower bound: this system cannot reset a process's peak, so a part may be hidden.")
    return notes


def plot(report, path):
    """Draw error, time and memory per layer, one bar per scheme, as a PNG (or what the suffix says)."""
    rows = report["layers"]
    labels = [row["label"] for row in rows if row["scheme"] == BASELINE]
    figure = _figure_class()(figsize=(min(max(7.0, 0.62 * len(labels) + 2), 40), 9), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    panels = (
        ("relative L1 error", lambda row: row["error"] and row["error"]["rel_l1"]),
        ("time of a call (ms)", lambda row: row["seconds"] and row["seconds"] * 1e3),
        ("memory of a call (MB)", lambda row: row["memory"] and row["memory"]["extra"] / 1e6),
    )
    width = 0.8 / len(SCHEMES)
    for axis, (title, value) in zip(axes, panels, strict=True):
        for n, scheme in enumerate(SCHEMES):
            heights = [value(row) for row in rows if row["scheme"] == scheme]
            places = np.arange(len(labels)) + (n - (len(SCHEMES) - 1) / 2) * width
            heights = np.array([np.nan if x is None else x for x in heights], float)
            axis.bar(places, heights, width, label=scheme, color=COLOURS.get(scheme))
        axis.set_ylabel(title)
        if axis is axes[0] and _range_of(rows) > 50:
            axis.set_yscale("log")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    settings, box = report["settings"], report["machine"]
    figure.suptitle(
        f"cyflash {report['cyflash']} ({box['implementation']} build) and NumPy {report['numpy']}, "
        f"{_count(settings['threads'], 'thread')}\n{box['cpu']}",
        fontsize="medium",
    )
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=130)


def _range_of(rows):
    """Largest over smallest relative L1 error: beyond a point bars need a logarithmic axis."""
    errors = [row["error"]["rel_l1"] for row in rows if row["error"] and row["error"]["rel_l1"] > 0]
    return max(errors) / min(errors) if errors else 1.0


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot needs matplotlib; install it with: pip install 'cyflash-attn[plot]'") from None
    return Figure


# Text


def _error(x):
    return "-" if x is None else f"{x:.1e}"


def _time(seconds):
    if seconds is None:
        return "-"
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("µs", 1e-6))
    return f"{_three(seconds / size)} {unit}"


def _bytes(count):
    if count is None:
        return "-"
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if count >= s), ("kB", 1e3))
    return f"{_three(count / size)} {unit}"


def _three(x):
    """Three digits, or all of those before the point."""
    return f"{x:#.3g}" if x < 99.95 else f"{x:.0f}"


def _times(ratio):
    return "" if ratio is None else f"{ratio:.2f}x"


def _range(spread):
    low, high = f"{spread['min']:.2f}", f"{spread['max']:.2f}"
    between = "" if low == high else f" ({low} to {high})"
    return f"{spread['median']:.2f} x{between}"


def _short(path):
    """The path as seen from the current folder, where that is shorter."""
    try:
        return min(path, os.path.relpath(path), key=len)
    except ValueError:  # another drive
        return path


def _count(n, noun):
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _repeats(rows):
    counts = [len(row["seconds_each"]) for row in rows if row["seconds_each"]]
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _plain(options):
    """Options as JSON holds them."""
    return {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in options.items()}


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return number


def _check_writable(path):
    """Say before measuring, not after, that a result cannot be written."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path}: cannot be written")
