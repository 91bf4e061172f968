"""What the commands share about output: files that can be written, plots that can be drawn, numbers with units."""

import os
import sys
from pathlib import Path

__all__ = [
    "OBSERVED", "Stdout", "add_json", "as_binary", "as_bytes", "as_time", "check_files", "empty_table", "few",
    "figure_class", "fitting", "progress_bar",
]  # fmt: skip

OBSERVED = ".observed.safetensors"  # what observations are called: beside scales.safetensors, scales + this


class Stdout:
    """Stands for the path of `--json -`. While a command runs, what a person reads goes to stderr instead (cli.py)."""

    def __init__(self):
        self.stream = sys.stdout

    def write_text(self, text):
        self.stream.write(text)

    def __str__(self):
        return "stdout"


def add_json(parser, **options):
    """Add --json FILE to a parser; options: others of add_argument."""
    settings = {"metavar": "FILE", "help": "also write every number to FILE, or with - to stdout, alone", **options}
    parser.add_argument("--json", type=lambda text: Stdout() if text == "-" else Path(text), **settings)


def check_files(json=None, plot=None):
    """Say before measuring, not after, that a result cannot be written or a plot cannot be drawn.

    Parameters
    ----------
    json, plot : Path, optional
        Where the results are to go. Stdout can always be written.

    Raises
    ------
    OSError
        For a folder that is not there, or a file that cannot be written.
    ValueError
        For a plot of an unknown format.
    ImportError
        For a plot without matplotlib.
    """
    for path in filter(None, (None if isinstance(json, Stdout) else json, plot)):
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: no folder {path.parent}")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(f"{path}: cannot be written")
    if plot:
        formats = figure_class()().canvas.get_supported_filetypes()
        if plot.suffix.lstrip(".").lower() not in formats:
            others = ", ".join(f".{name}" for name in sorted(formats))
            raise ValueError(f"{plot}: expected a name that ends in .png (or another of {others})")


def figure_class(what="--plot"):
    """matplotlib's Figure, imported when a plot is asked for; what: what needs it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(f"{what} needs matplotlib; install it with: pip install 'cyflash-attn[plot]'") from None
    return Figure


def progress_bar():
    """A rich Progress on stderr, which shows nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def empty_table():
    """A rich Table in the style of all commands: a line below the header."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)


def fitting(console, tables):
    """The first table that fits the width, or the last."""
    unlimited = console.options.update(max_width=10_000)
    fits = (table for table in tables if console.measure(table, options=unlimited).maximum <= console.width)
    return next(fits, tables[-1])


def few(names):
    """The first of many names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def as_bytes(count):
    """A measured size: 4.08 MB."""
    return _in_units(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)))


def as_time(seconds):
    """A measured time: 1.33 ms."""
    return _in_units(seconds, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)))


def as_binary(count):
    """The size of a cache: 48 KiB."""
    if count is None:
        return "unknown"
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count / 2**10:g} KiB"


def _in_units(value, units):
    """Three digits in the first unit that `value` reaches, or in the last; "-" for None."""
    if value is None:
        return "-"
    unit, size = next((unit for unit in units if value >= unit[1]), units[-1])
    x = value / size
    return f"{x:#.3g} {unit}" if x < 99.95 else f"{x:.0f} {unit}"
