"""What `cyflash compare` shows of its rows: the table by layer, the summary by scheme, the plot."""

import math
import os
import statistics

import numpy as np

from cyflash.output import as_bytes, as_time, empty_table, figure_class, fitting
from cyflash.schemes import SCHEMES

__all__ = ["draw", "show", "summarise"]

ERRORS = ("rel_l1", "cosine", "rmse", "max_abs", "worst_head", "worst_row")
LEGEND = (
    "Error: against attention in float64 on the same inputs; 1-cos: 1 minus the cosine similarity; worst head and row: "
    "their relative L1. Time: median of the calls of {} interleaved rounds, quantisation included; speed: the time of "
    "NumPy, or of cyflash fp32, over this one's. Memory: what one call, its output included, adds to the peak resident "
    "set of a fresh process. Summary: mean of relative L1, 1-cos and RMSE over layers, the worst of the worst, medians "
    "of ratios."
)


def scheme_names(rows):
    """The names of the schemes, in the order of the rows."""
    return list(dict.fromkeys(row["scheme"] for row in rows))


def summarise(rows):
    """{scheme: number of layers, mean and worst errors, median and range of the ratios}."""
    summary = {}
    for scheme in scheme_names(rows):
        own = [row for row in rows if row["scheme"] == scheme]
        errors = [row["error"] for row in own if row["error"]]
        summary[scheme] = {
            "layers": len(own),
            "mean": {name: statistics.mean(error[name] for error in errors) for name in ERRORS} if errors else None,
            "worst": {name: _worst(name)(error[name] for error in errors) for name in ERRORS} if errors else None,
            **{name: _spread(row[name] for row in own) for name in ("speedup", "speedup_over_fp32", "memory_ratio")},
        }
    return summary


def _worst(name):
    return min if name == "cosine" else max


def _spread(values):
    values = [value for value in values if value is not None]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


# The tables


def show(report):
    """Print the table by layer, what its columns are, and the summary."""
    from rich.console import Console
    from rich.markup import escape

    rows, settings = report["layers"], report["settings"]
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe: as wide as the table
        console = Console(highlight=False, width=1000)
    console.print(fitting(console, _layouts(report)))
    console.print()
    lines = []
    for path, options in settings["files"].items():
        text = ", ".join(f"{name}={value}" for name, value in options.items()) or "none"
        lines.append(f"[dim]File:[/] {escape(_short(path))} [dim]Options:[/] {escape(text)}")
    lines.append(f"[dim]Run:[/] {escape(_run(report))}")
    lines.append(f"[dim]{LEGEND.format(_rounds(rows))}[/]")
    lines += [f"[yellow]Note:[/] {escape(note)}" for note in report["notes"]]
    for line in lines:
        console.print(line, soft_wrap=not console.is_terminal)  # in a file a sentence is one line
    console.print()
    console.print(fitting(console, [_summary_table(report, ranges=True), _summary_table(report, ranges=False)]))


# Of both tables: header -> what a cell shows of (errors, row of the table or of the summary).
def _error(name):
    return lambda error, row: f"{error[name]:.1e}" if error else "-"


def _times(name):
    return lambda error, row: "" if row[name] is None else f"{_digits(row[name])}x"


COLUMNS = {
    "rel. L1": _error("rel_l1"),
    "1-cos": lambda error, row: f"{1 - error['cosine']:.1e}" if error else "-",
    "RMSE": _error("rmse"),
    "worst\nhead": _error("worst_head"),
    "worst\nrow": _error("worst_row"),
    "time": lambda error, row: as_time(row["seconds"]),
    "speed\n/NumPy": _times("speedup"),
    "speed\n/fp32": _times("speedup_over_fp32"),
    "memory": lambda error, row: as_bytes(row["memory"] and row["memory"]["extra"]),
    "memory\n/NumPy": _times("memory_ratio"),
}
NOT_WHEN_NARROW = ("RMSE", "memory\n/NumPy")  # both are in the summary


def _layouts(report):
    """Tables, the widest first: the layer in a column of its own, or on a line of its own; fewer columns."""
    few = {header: cell for header, cell in COLUMNS.items() if header not in NOT_WHEN_NARROW}
    return [_layer_table(report, COLUMNS, True), _layer_table(report, COLUMNS, False), _layer_table(report, few, False)]


def _layer_table(report, columns, own_column):
    """One line per layer and scheme."""
    from rich.text import Text

    first = report["layers"][0]["scheme"]
    table = empty_table()
    if own_column:
        table.add_column("layer", no_wrap=True)
        table.add_column("scheme", no_wrap=True)
    else:
        longest = max(map(len, SCHEMES))
        table.add_column("layer, scheme", overflow="fold", width=longest)  # a longer name of a layer takes two lines
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for row in report["layers"]:
        label = Text(row["label"] if row["scheme"] == first else "", style="not dim bold")
        if label and not own_column:
            table.add_row(label)
        scheme = [label, row["scheme"]] if own_column else [row["scheme"]]
        cells = (cell(row["error"], row) for cell in columns.values())
        table.add_row(*scheme, *cells, style="dim" if row["scheme"] == report["baseline"] else None)
    return table


def _summary_table(report, ranges):
    """One line per scheme: mean and worst error beside the speed; with the range of the speeds over layers, or not."""
    table = empty_table()
    for header in ("", "rel. L1", "1-cos", "RMSE", "worst\nhead", "worst\nrow"):
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    for header in ("speed\n/NumPy", "speed\n/fp32", "memory\n/NumPy"):
        table.add_column(header, justify="right", no_wrap=True)
    table.columns[0].header = _count(len({row["label"] for row in report["layers"]}), "layer")
    for scheme, own in report["summary"].items():
        mean, worst = own["mean"], own["worst"]
        errors = [COLUMNS[header](mean, None) for header in ("rel. L1", "1-cos", "RMSE")]
        errors += [COLUMNS[header](worst, None) for header in ("worst\nhead", "worst\nrow")]
        ratios = (_median(own[name], ranges) for name in ("speedup", "speedup_over_fp32", "memory_ratio"))
        table.add_row(scheme, *errors, *ratios, style="dim" if scheme == report["baseline"] else "bold")
    return table


def _median(spread, with_range):
    if spread is None:
        return ""
    median, low, high = (_digits(spread[name]) for name in ("median", "min", "max"))
    return f"{median}x" + (f" ({low}-{high})" if with_range and low != high else "")


def _digits(ratio):
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def _run(report):
    settings, box, blas = report["settings"], report["machine"], report["settings"]["numpy_blas_threads"]
    numpy = "an unknown number of threads" if blas is None else _count(blas, "thread")
    return (
        f"{box['cpu']}, {_count(box['cores'], 'core')}; cyflash {report['cyflash']} ({box['implementation']} build) on "
        f"{_count(settings['threads'], 'thread')}, NumPy {report['numpy']} with its BLAS on {numpy}."
    )


# The plot


ERROR_PANELS = {
    "relative L1": lambda error: error["rel_l1"],
    "worst head": lambda error: error["worst_head"],
    "worst row": lambda error: error["worst_row"],
    "1 - cosine": lambda error: 1 - error["cosine"],
    "RMSE": lambda error: error["rmse"],
}
MOSAIC = [["relative L1", "speed"], ["worst head", "speed"], ["worst row", "speed"],
          ["1 - cosine", "time (ms)"], ["RMSE", "memory (MB)"]]  # fmt: skip


def draw(report, path):
    """Draw every error, time and memory by layer, and accuracy against speed, as a PNG (or what the suffix says)."""
    rows = report["layers"]
    names, labels = scheme_names(rows), list(dict.fromkeys(row["label"] for row in rows))

    def by_layer(values):
        return np.array([np.nan if x is None else x for x in values], float).reshape(len(labels), len(names))

    width = min(max(5.5, 0.3 * len(labels) + 2), 20)
    figure = figure_class()(figsize=(2 * width, 12), layout="constrained")
    axes = figure.subplot_mosaic(MOSAIC)
    for title, value in ERROR_PANELS.items():
        _lines(axes[title], title, names, by_layer(row["error"] and value(row["error"]) for row in rows))
    times = by_layer(row["seconds"] and row["seconds"] * 1e3 for row in rows)
    memory = by_layer(row["memory"] and row["memory"]["extra"] / 1e6 for row in rows)
    _lines(axes["time (ms)"], "time of a call (ms)", names, times, may_be_log=True)
    _lines(axes["memory (MB)"], "memory of a call (MB)", names, memory, may_be_log=True)
    _accuracy_against_speed(axes["speed"], names, rows)
    for bottom in MOSAIC[-1]:
        axes[bottom].set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    box, threads = report["machine"], _count(report["settings"]["threads"], "thread")
    title = f"cyflash {report['cyflash']} ({box['implementation']} build) and NumPy {report['numpy']}, {threads}"
    figure.suptitle(f"{title}\n{box['cpu']}", fontsize="medium")
    handles, names = axes["relative L1"].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), frameon=False)
    figure.savefig(path, dpi=130)


def _colour(scheme):
    """Grey and black in fp32, a palette for int8; the same whichever are chosen."""
    return dict(zip(SCHEMES, ("#8c8c8c", "black", *(f"C{n}" for n in range(10))), strict=False))[scheme]


def _lines(axis, title, names, values, may_be_log=False):
    """A line over the layers per scheme. Errors stay linear: on a logarithmic axis fp32 would squeeze int8 together."""
    for n, name in enumerate(names):
        axis.plot(values[:, n], marker="o", markersize=3.5, linewidth=0.8, color=_colour(name), label=name)
    positive = values[np.isfinite(values) & (values > 0)]
    if may_be_log and positive.size and positive.max() > 50 * positive.min():
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1.08 * positive.max(initial=1e-300))
    axis.set_ylabel(title)
    axis.set_xticks(range(len(values)), [""] * len(values))
    _tidy(axis)


def _accuracy_against_speed(axis, names, rows):
    """One point per layer and scheme, and a large one at their median: to the right is faster, below is closer."""
    speeds, largest = [1.0], 0.0
    for name in names:
        own = [row for row in rows if row["scheme"] == name and row["error"] and row["speedup_over_fp32"]]
        points = [(row["speedup_over_fp32"], row["error"]["rel_l1"]) for row in own]
        points = np.array([point for point in points if np.isfinite(point).all()])  # inf: of a reference that is all 0
        if not points.size:
            continue
        speeds, largest = [*speeds, *points[:, 0]], max(largest, points[:, 1].max())
        colour = _colour(name)
        axis.scatter(*points.T, s=14, color=colour, alpha=0.45, linewidths=0, clip_on=False)
        axis.scatter(*np.median(points, axis=0), s=110, color=colour, edgecolors="white", zorder=3, clip_on=False)
    axis.set(xlabel="speed against cyflash fp32 (x)", ylabel="relative L1", title="accuracy and speed")
    if largest:
        axis.set_ylim(0, 1.05 * largest)
    low, high = math.floor(math.log2(min(speeds)) - 0.1), math.ceil(math.log2(max(speeds)) + 0.1)
    ticks = [2.0**n for n in range(low, high + 1)]
    axis.set(xscale="log", xlim=(ticks[0], ticks[-1]))
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    _tidy(axis)


def _tidy(axis):
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


# Text


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
