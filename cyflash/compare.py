"""`cyflash compare`: what attention in int8 and fp32 loses and gains, layer by layer, on captured activations.

    files -> captures -> one row per layer and scheme (cyflash.quant.evaluation) -> comparison.py: tables, plot
"""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

import cyflash
from cyflash import schemes
from cyflash.capture import load_capture
from cyflash.comparison import draw, show, summarise
from cyflash.inputs import CONTENTS, add_input_options, given_options, positive
from cyflash.measure import blas_threads
from cyflash.output import add_json, check_files, progress_bar
from cyflash.quant.evaluation import call_threads, measure_layer

# Commands, and what they do: shown by --help.
EXAMPLES = {
    "cyflash compare": "on the activations of a real model in examples/data",
    "cyflash compare mine.safetensors --causal": "on your own q, k, v, or <layer>.q, <layer>.k, <layer>.v",
    "cyflash compare mine.npz --layout blhd --window 127 0 --plot out.png": "arrays (B, L, H, D); 128 tokens seen",
    "cyflash compare --schemes 'int8*' --json - | jq .summary": "some schemes, and their numbers for another program",
}
STATUS = {1: "a scheme could not be run"}


class Settings(NamedTuple):
    """What the whole run shares."""

    layout: str
    given: dict
    """Options of the command line; they win over those of a file."""
    schemes: dict
    threads: int
    blas_threads: int | None
    """What NumPy's BLAS reports; None when it cannot be told."""


def add_arguments(parser):
    parser.add_argument(
        "files", nargs="*", metavar="FILE",
        help=f".npz or .safetensors with {CONTENTS} (default: the activations in examples/data)",
    )  # fmt: skip
    parser.add_argument(
        "--schemes", nargs="+", default=["*"], metavar="NAME",
        help=f"which to show, by name or pattern such as 'int8*' (default: all: {'; '.join(schemes.SCHEMES)})",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of all (default: see `cyflash info`)")
    add_json(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the table (needs matplotlib)")
    add_input_options(parser)


def run(args):
    check_files(args.json, args.plot)
    chosen = _chosen_schemes(args.schemes)
    captures = [load_capture(path, args.layout) for path in args.files or [shipped_data()]]
    threads, notes = call_threads(args.threads)
    with blas_threads(threads) as blas:
        settings = Settings(args.layout, given_options(args), chosen, threads, blas.count)
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
    return 1 if any(row["problem"] and row["scheme"] != schemes.NUMPY for row in rows) else 0


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
    layers = [(capture, name) for capture in captures for name in capture]
    rows = []
    with progress_bar() as progress:
        steps = 2 + len({schemes.NUMPY, schemes.FP32} | settings.schemes.keys())
        task = progress.add_task("", total=len(layers) * steps)
        for capture, name in layers:
            label = f"{capture.path.stem}: {name}" if len(captures) > 1 else name

            def step(what, label=label):
                progress.update(task, description=f"{label}: {what}", refresh=True)  # quick steps are named too
                return lambda: progress.advance(task)

            layer, options = capture[name], capture.options | settings.given
            about = {
                "file": str(capture.path),
                "layer": name,
                "label": label,
                "shapes": dict(zip("qkv", (list(x.shape) for x in layer), strict=True)),
                "stored": capture.stored[name],
            }
            for row in measure_layer(layer, options, settings.schemes, settings.threads, step):
                rows.append(about | row | {"problem": row["problem"] and str(row["problem"])})
    return rows


def _chosen_schemes(patterns):
    for pattern in patterns:
        if pattern.endswith((".npz", ".safetensors")):
            raise ValueError(f"--schemes takes all names that follow it, {pattern} too: put each FILE before --schemes")
    return schemes.select(patterns)


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
            "schemes": {name: scheme.options for name, scheme in settings.schemes.items()},
            "files": {str(capture.path): _plain(capture.options | settings.given) for capture in captures},
        },
        "baseline": schemes.NUMPY,
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
