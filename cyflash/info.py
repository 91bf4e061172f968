"""`cyflash info`: what was built, what runs on this machine, what is used, on how many threads, and on which GPU."""

import json

import cyflash
from cyflash.output import Stdout, add_json, as_binary, check_files

# Where a thread count can come from: key of cpu_info()["thread_limits"] -> how a person sets it.
LIMITS = {
    "affinity": "processors this process may run on",
    "cgroup": "the container's quota",
    "omp_num_threads": "OMP_NUM_THREADS",
    "cyflash_num_threads": "CYFLASH_NUM_THREADS",
    "set_num_threads": "cyflash.set_num_threads",
}

# Commands, and what they do: shown by --help.
EXAMPLES = {
    "cyflash info": "what a person wants to know",
    "cyflash info --json | jq .implementation": "the SIMD build that calls use",
    "CYFLASH_ISA=avx2 CYFLASH_NUM_THREADS=4 cyflash info": "what these variables change",
}
STATUS: dict[int, str] = {}


def add_arguments(parser):
    text = "also write cyflash.cpu_info() and cyflash.gpu_status() to FILE; without FILE, or with -, to stdout, alone"
    add_json(parser, nargs="?", const="-", help=text)


def run(args):
    check_files(args.json)
    info = found()
    if args.json:
        args.json.write_text(json.dumps(info, indent=1) + "\n")
    if not isinstance(args.json, Stdout):
        show(info)
    return 0


def found():
    """cpu_info() with the version, and gpu_status() as "gpu"."""
    return {"version": cyflash.__version__, **cyflash.cpu_info(), "gpu": cyflash.gpu_status()._asdict()}


def show(info):
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    caches = ", ".join(f"{name.upper()} {as_binary(size)}" for name, size in info["caches"].items())
    for name, value in {
        "cyflash": info["version"],
        "processor": escape(info["model"]),
        "cores": str(info["cores"]),
        "caches": caches,
        "features": " ".join(info["features"]) or "none that a build needs",
        "threads": f"[bold]{info['threads']}[/], from {origin(info['threads'], info['thread_limits'], info['openmp'])}",
        "OpenMP": escape(info["openmp"] or "") or "none: cyflash was built without it, and calls run on one thread",
        "GPU": escape(_gpu(**info["gpu"])),
    }.items():
        table.add_row(name, value)
    console.print(table)
    console.print()
    console.print(_builds(info))
    console.print("[dim]Force a build with CYFLASH_ISA=name or cyflash.set_implementation(name).[/]")


def _gpu(available, reason, cupy, nvrtc, **_):
    versions = ", ".join(f"{name} {version}" for name, version in (("CuPy", cupy), ("NVRTC", nvrtc)) if version)
    return ("" if available else "not used: ") + reason + (f" ({versions})" if versions else "")


def _builds(info):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in ("SIMD build", "built", "runs here", "", "reason"):
        table.add_column(header, no_wrap=header != "reason")
    for name, build in info["builds"].items():
        used = name == info["implementation"]
        style = "bold green" if used else "" if build["runs"] else "dim"
        cells = (name, _yes(build["built"]), _yes(build["runs"]), "used" if used else "", build["reason"])
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


def origin(threads, limits, openmp):
    """Which of the limits decided the number of threads: a setting if there is one, else the least of the others."""
    if openmp is None:
        return "the build: it has no OpenMP"
    for name in ("set_num_threads", "cyflash_num_threads"):
        if limits.get(name) is not None:
            return LIMITS[name]
    least = [text for name, text in LIMITS.items() if limits.get(name) == threads]
    return " and ".join(least) or "this machine's default"


def _yes(value):
    return "yes" if value else "no"
