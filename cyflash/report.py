"""What `cyflash compare` shows of its rows: the table, the summary and the plot."""

import os
import statistics

import numpy as np

from cyflash.output import as_bytes, as_time, figure_class

__all__ = ["draw", "show", "summarise"]

ERRORS = {"rel_l1": "rel. L1", "max_abs": "max abs", "worst_head": "worst\nhead", "worst_row": "worst\nrow"}
COLOURS = {"numpy fp32": "#8c8c8c", "cyflash fp32": "#1f6fb4"}
TABLE_WIDTH = 88  # without the names of the layers
LEGEND = (
    "Error: against attention in float64 on the same inputs; worst head and row: their relative L1. Time: median of "
    "the calls of {} interleaved rounds; speed ratio: NumPy's time over this one's. Memory: what one call, its output "
    "included, adds to the peak resident set of a fresh process; memory ratio: this over NumPy's."
)


def schemes(rows):
    """The names of the schemes, in the order of the rows."""
    return list(dict.fromkeys(row["scheme"] for row in rows))


def summarise(rows):
    """{scheme: number of layers, mean and worst errors, median and range of the ratios}."""
    summary = {}
    for scheme in schemes(rows):
        own = [row for row in rows if row["scheme"] == scheme]
        errors = [row["error"] for row in own if row["error"]]
        summary[scheme] = {
            "layers": len(own),
            "rel_l1_mean": statistics.mean(error["rel_l1"] for error in errors) if errors else None,
            "largest": {name: max(error[name] for error in errors) for name in ERRORS} if errors else None,
            "speedup": _spread(row["speedup"] for row in own),
            "memory_ratio": _spread(row["memory_ratio"] for row in own),
        }
    return summary


def _spread(values):
    values = [value for value in values if value is not None]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


# The table


def show(report):
    """Print the table, what its columns are, and the summary."""
    from rich.console import Console
    from rich.markup import escape

    rows, settings = report["layers"], report["settings"]
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe: as wide as the table
        console = Console(highlight=False, width=_wide(rows))
    console.print(_table(report, wide=console.width >= _wide(rows)))
    console.print()
    lines = []
    for path, options in settings["files"].items():
        text = ", ".join(f"{name}={value}" for name, value in options.items()) or "none"
        lines.append(f"[dim]File:[/] {escape(_short(path))} [dim]Options:[/] {escape(text)}")
    lines.append(f"[dim]Run:[/] {escape(_run(report))}")
    lines.append(f"[dim]{LEGEND.format(_rounds(rows))}[/]")
    lines += [f"[yellow]Note:[/] {escape(note)}" for note in report["notes"]]
    lines += [f"[bold]{escape(line)}[/]" for line in _summary_lines(report)]
    for line in lines:
        console.print(line, soft_wrap=not console.is_terminal)  # in a file a sentence is one line


def _wide(rows):
    """Columns that the table takes when the layer has one of its own."""
    return TABLE_WIDTH + max(len("layer"), *(len(row["label"]) for row in rows))


def _table(report, wide):
    """One line per layer and scheme; the layer has a column where there is room, else a line of its own."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1 if wide else 0, 0, 0))
    if wide:
        table.add_column("layer", no_wrap=True)
    table.add_column("scheme" if wide else "layer, scheme", overflow="fold")
    for header in (*ERRORS.values(), "time", "speed\nratio", "memory", "memory\nratio"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in report["layers"]:
        first = row["scheme"] == report["baseline"]
        label = Text(row["label"] if first else "", style="not dim")
        if first and not wide:
            table.add_row(label)
        scheme = [label, row["scheme"]] if wide else [f"  {row['scheme']}"]
        table.add_row(*scheme, *_cells(row), style="dim" if first else None)
    return table


def _cells(row):
    error, memory = row["error"] or {}, row["memory"] or {}
    return [
        *(f"{error[name]:.1e}" if name in error else "-" for name in ERRORS),
        as_time(row["seconds"]),
        "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        as_bytes(memory.get("extra")),
        "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}x",
    ]


def _run(report):
    settings, box, blas = report["settings"], report["machine"], report["settings"]["numpy_blas_threads"]
    numpy = "an unknown number of threads" if blas is None else _count(blas, "thread")
    return (
        f"{box['cpu']}, {_count(box['cores'], 'core')}; cyflash {report['cyflash']} ({box['implementation']} build) on "
        f"{_count(settings['threads'], 'thread')}, NumPy {report['numpy']} with its BLAS on {numpy}."
    )


def _summary_lines(report):
    """One sentence per scheme that is set against the baseline."""
    summary = report["summary"]
    base = summary[report["baseline"]]["rel_l1_mean"]
    for scheme, own in summary.items():
        if scheme == report["baseline"]:
            continue
        parts = []
        if own["speedup"]:
            parts.append(f"{_range(own['speedup'])} as fast as NumPy")
        if own["memory_ratio"]:
            parts.append(f"{_range(own['memory_ratio'])} its memory")
        if own["largest"]:
            versus = "" if base is None else f" (NumPy {base:.1e})"
            worst = own["largest"]["worst_row"]
            parts.append(f"mean relative L1 {own['rel_l1_mean']:.1e}{versus}, worst row {worst:.1e}")
        yield f"{scheme}, {_count(own['layers'], 'layer')}: {'; '.join(parts) or 'nothing was measured'}."


# The plot


def draw(report, path):
    """Draw error, time and memory per layer, one bar per scheme, as a PNG (or what the suffix says)."""
    rows = report["layers"]
    labels = [row["label"] for row in rows if row["scheme"] == report["baseline"]]
    panels = {
        "relative L1 error": [row["error"] and row["error"]["rel_l1"] for row in rows],
        "time of a call (ms)": [row["seconds"] and row["seconds"] * 1e3 for row in rows],
        "memory of a call (MB)": [row["memory"] and row["memory"]["extra"] / 1e6 for row in rows],
    }
    size = min(max(7.0, 0.62 * len(labels) + 2), 40), 9
    figure = figure_class()(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        _bars(axis, schemes(rows), np.array([np.nan if value is None else value for value in values], float))
        axis.set_ylabel(title)
    axes[-1].set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    box, threads = report["machine"], _count(report["settings"]["threads"], "thread")
    title = f"cyflash {report['cyflash']} ({box['implementation']} build) and NumPy {report['numpy']}, {threads}"
    figure.suptitle(f"{title}\n{box['cpu']}", fontsize="medium")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=130)


def _bars(axis, names, values):
    """A group of bars per layer, one per scheme; on a logarithmic axis where linear ones would be too small to see."""
    values = values.reshape(-1, len(names))  # layers x schemes
    width = 0.8 / len(names)
    for n, name in enumerate(names):
        places = np.arange(len(values)) + (n - (len(names) - 1) / 2) * width
        axis.bar(places, values[:, n], width, label=name, color=COLOURS.get(name))
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size and positive.max() > 50 * positive.min():
        axis.set_yscale("log")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


# Text


def _range(spread):
    low, high = f"{spread['min']:.2f}", f"{spread['max']:.2f}"
    between = "" if low == high else f" ({low} to {high})"
    return f"{spread['median']:.2f} x{between}"


def _count(n, noun):
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _rounds(rows):
    counts = [len(row["seconds_by_round"]) for row in rows if row["seconds_by_round"]]
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _short(path):
    """The path as seen from the current folder, where that is shorter."""
    try:
        return min(path, os.path.relpath(path), key=len)
    except ValueError:  # another drive
        return path
