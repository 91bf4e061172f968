"""What a person sees of a run: progress while it lasts; then tables, a JSON file with every time, a plot."""

import datetime
import json
import math
import platform
import statistics
from dataclasses import asdict, dataclass, field

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cyflash import cpu_info
from cyflash.bench.race import Spread, SystemFailed
from cyflash.output import as_binary, as_time, figure_class

BUSY_BELOW = 0.9


@dataclass
class Row:
    """`unit`: "x" for a ratio, "of peak", "us", "MB" or "cosine"; no spread where it could not be measured: `note` says
    why."""

    what: str
    spread: Spread | None
    unit: str
    note: str = ""


@dataclass
class Outcome:
    """Everything a run found. `systems`: {thread count: {label: version, settings, counted threads}}."""

    arguments: dict
    skipped: dict[str, str]
    systems: dict = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    races: list = field(default_factory=list)  # systems against each other
    comparisons: list = field(default_factory=list)  # cyflash against itself
    int8: list = field(default_factory=list)  # fp32, every way to int8 and its peers against each other
    caches: list = field(default_factory=list)  # caches of every dtype, the speed of reading them, and torch
    rows: list[Row] = field(default_factory=list)  # of --suite, --int8 and --decode
    environment: dict = field(default_factory=lambda: _environment())

    def add_team(self, threads, workers, failures):
        """Raises the failure of cyflash: without it there is nothing to compare."""
        if "cyflash" in failures:
            raise SystemFailed(failures["cyflash"])
        self.systems.setdefault(threads, {}).update({label: worker.about for label, worker in workers.items()})
        self.failures |= {f"{label}, {threads} threads": reason for label, reason in failures.items()}

    def add_ratio(self, result, what, slower, faster, absent=""):
        """A row of how many times the time of `faster` the time of `slower` is; `absent`: why one did not take part."""
        missing = [result.failures.get(label, absent) for label in (slower, faster) if label not in result.timings]
        self.rows.append(Row(what, None if missing else result.ratio(slower, faster), "x", "; ".join(missing)))

    def all_failures(self):
        """{where: why}: of starting and of every race."""
        found = dict(self.failures)
        for result in (*self.races, *self.int8, *self.caches, *self.comparisons):
            for label, reason in result.failures.items():
                found[f"{label} {title(result.cases[label])}, {result.threads} threads"] = reason
        return found


def title(case):
    return case.title()


def _environment():
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_info(),
    }


# ---- progress


def progress():
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True, refresh_per_second=2)


class Bar:
    """One progress bar over `total` races."""

    def __init__(self, display, name, total, limit):
        self._display, self._name, self._limit = display, name, limit
        self._task, self._begun = display.add_task(f"{name}: starting the systems", total=total), 0

    def next(self, what):
        """Begins a race; returns what the race calls after every round."""
        before = self._begun
        self._begun += 1
        self._display.update(self._task, description=f"{self._name}: {what}", completed=before, refresh=True)
        return lambda done, elapsed: self._display.update(
            self._task, completed=before + self._limit.fraction(done, elapsed)
        )


# ---- tables

# All peers fit into 80 columns.
_NARROW = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": 0}


def show(outcome):
    """Prints the outcome to stdout."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file or a pipe has no width of its own
    console.print(_machine(outcome.environment))
    console.print(_systems_table(outcome))
    for note in busy_notes(outcome):
        console.print(f"[yellow]{note}")
    for threads in dict.fromkeys(result.threads for result in outcome.races):
        console.print(_race_table([result for result in outcome.races if result.threads == threads], threads))
    if outcome.races:
        console.print(
            "Each peer: its median time over that of cyflash (above 1, cyflash is faster); 95 % bootstrap interval "
            "over rounds; its own median time. Peak: share of that of fused multiply-adds, all threads, same rounds.\n"
        )
    if outcome.int8:
        for threads in dict.fromkeys(result.threads for result in outcome.int8):
            console.print(_int8_table([result for result in outcome.int8 if result.threads == threads]))
        console.print(
            "Rates count 2 (D + Dv) operations for each visible pair; below each: speed against cyflash fp32 in the "
            "same rounds. Error: relative L1 against float64 on standard normal inputs, the largest of the shapes. "
            "Codes: q, k, v come quantised; float in: all defaults, quantisation included.\n",
            highlight=False,
        )
    if outcome.caches:
        console.print(_caches_table(outcome.caches))
        console.print(
            "One query of each head to a full cache: its time, and speed against the fp32 cache in the same rounds. "
            "Torch: contiguous keys and values. Reading: all bytes of that very cache, by vector loads and nothing "
            "else. Error: relative L1 against float64 on standard normal inputs, the largest of the shapes.\n",
            highlight=False,
        )
    if outcome.rows:
        console.print(_rows_table(outcome.rows))
    for where, reason in outcome.all_failures().items():
        console.print(f"[bold red]FAILED[/] {where}: {escape(reason)}", highlight=False)


def _machine(environment):
    cpu = environment["cpu"]
    caches = ", ".join(f"{name} {as_binary(size)}" for name, size in cpu["caches"].items() if size)
    limits = ", ".join(f"{name} {value}" for name, value in cpu["thread_limits"].items() if value is not None)
    lines = {
        "CPU": f"{cpu['model']}, {cpu['cores']} cores; {caches}",
        "features": " ".join(cpu["features"]),
        "threads": f"{cpu['threads']} available ({limits})",
        "software": f"Python {environment['python']}, {environment['platform']}",
    }
    table = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        table.add_row(f"[bold]{name}", escape(text))
    return table


def _systems_table(outcome):
    table = Table(title="Systems, each in its own process", **_NARROW)
    for name in ("system", "version", "threads:\nasked", "counted", "CPU/wall", "settings"):
        table.add_column(name, no_wrap=name != "settings", overflow="fold")
    for threads, systems in outcome.systems.items():
        for label, about in systems.items():
            counts = about["threads"]
            settings = ", ".join(f"{name} {value}" for name, value in about["settings"].items())
            counted = "?" if counts["busy"] is None else str(counts["busy"])
            cells = about["version"], str(threads), counted, f"{counts['cpu_over_wall']:.2f}", settings
            table.add_row(label, *map(escape, cells))
    for label, reason in outcome.skipped.items():
        table.add_row(label, "[dim]skipped", "", "", "", f"[dim]{escape(reason)}")
    return table


def busy_notes(outcome):
    """Where cyflash did not get the cores that it was given: the figures then say little."""
    for threads, systems in outcome.systems.items():
        got = systems["cyflash"]["threads"]["cpu_over_wall"]
        if got < BUSY_BELOW * threads:
            yield f"The machine was busy: cyflash got {got:.2f} of {threads} cores. Repeat on a quiet machine."


def _race_table(races, threads):
    """One row per case; a peer's cell has its ratio, the interval, and its own time."""
    table = Table(title=f"{_threads(threads)}, fp32", show_lines=True, caption=_variants(races), **_NARROW)
    table.add_column("(B, H, L, D)", no_wrap=True)
    table.add_column("cyflash", justify="right", no_wrap=True)
    others = list(dict.fromkeys(label for result in races for label in result.cases if label != "cyflash"))
    for name in (*others, "best\npeer"):
        table.add_column(name, justify="right", overflow="fold")
    for result in races:
        case = result.cases["cyflash"]
        if "cyflash" not in result.timings:
            table.add_row(_two_lines(case), "[bold red]FAILED")
            continue
        own, share = result.timings["cyflash"], result.fma_share("cyflash")
        rate = f"{result.gflops('cyflash'):.0f} GFLOP/s"
        cells = [_two_lines(case), f"[bold]{as_time(own.median)}[/]\n{rate}\n{share.value:.2f} peak"]
        cells += [_peer_cell(result, label) for label in others]
        peers = result.peers()
        cells.append(f"[bold]{result.ratio(peers[0], 'cyflash').value:.2f} x[/]" if peers else "none")
        table.add_row(*cells)
    return table


def _two_lines(case):
    return title(case).replace(") ", ")\n")


def _variants(races):
    """Of systems that can be asked in several ways: which was the fastest, how often."""
    chosen = {}
    for result in races:
        for label, timing in result.timings.items():
            if len(timing.variants) > 1:
                chosen.setdefault(label, []).append(timing.variant)
    return "; ".join(
        f"{label}: " + ", ".join(f"{name} ({names.count(name)})" for name in dict.fromkeys(names))
        for label, names in chosen.items()
    )


def _peer_cell(result, label):
    if label not in result.timings:
        return "[bold red]FAILED" if label in result.cases else ""
    timing = result.timings[label]
    return f"{_ratio(result.ratio(label, 'cyflash'))}\n{as_time(timing.median)}"


def _int8_table(races):
    """One row per label, one column per case; what `_race_table` has in cells, with cyflash fp32 as the measure."""
    table = Table(title=f"int8 beside fp32 and peers, {_threads(races[0].threads)}", show_lines=True, **_NARROW)
    table.add_column("", overflow="fold")
    table.add_column("error", justify="right", no_wrap=True)
    for result in races:
        B, H, L, D = result.cases["cyflash"].shape
        table.add_column(f"({B}, {H},\n{L}, {D})", justify="right", no_wrap=True)
    for label in races[0].cases:
        errors = [result.timings[label].error.rel_l1 for result in races if label in result.timings]
        name = "cyflash fp32" if label == "cyflash" else label
        cells = (_speed_cell(result, label) for result in races)
        table.add_row(name, f"{max(errors):.1e}" if errors else "", *cells, style="dim" if label == "cyflash" else None)
    return table


def _speed_cell(result, label):
    if label not in result.timings:
        return "[bold red]FAILED"
    unit = "GFLOP/s" if result.cases[label].int8 is None else "GOP/s"
    speed = f"\n[bold]{result.ratio('cyflash', label).value:.2f} x" if "cyflash" in result.timings else ""
    return f"{result.gflops(label):.0f} {unit}{speed}"


_CACHES = {"cyflash": "cyflash fp32", "reading fp32": "reading fp32 cache", "reading int8": "reading int8 cache"}


def _caches_table(races):
    """One row per label, one column per case."""
    heading = f"Decode, {_threads(races[0].threads)}"
    table = Table(title=heading, caption=_variants(races), show_lines=True, **_NARROW)
    table.add_column("", overflow="fold", vertical="middle")
    table.add_column("error", justify="right", no_wrap=True)
    for result in races:
        table.add_column(result.cases["cyflash"].title().replace(", ", "\n"), justify="right", no_wrap=True)
    for label in races[0].cases:
        errors = [result.timings[label].error.rel_l1 for result in races if label in result.timings]
        name = _CACHES.get(label, label)
        judged = errors and not label.startswith("reading")
        cells = (_cache_cell(result, label) for result in races)
        table.add_row(name, f"{max(errors):.1e}" if judged else "", *cells)
    return table


def _cache_cell(result, label):
    if label not in result.timings:
        return "[bold red]FAILED" if label in result.cases else ""
    speed = f"\n[bold]{result.ratio('cyflash', label).value:.2f} x" if "cyflash" in result.timings else ""
    return f"{as_time(result.timings[label].median)}{speed}"


def _rows_table(rows):
    """One line per row, its note below."""
    table = Table(**_NARROW)
    table.add_column("measured", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("95 %", justify="right", no_wrap=True)
    for row in rows:
        what = row.what + (f"\n[dim]{escape(row.note)}[/]" if row.note else "")
        if row.spread is None:
            table.add_row(what, "[yellow]not measured", "")
            continue
        value, *ends = (_in_unit(x, row.unit) for x in (row.spread.value, row.spread.low, row.spread.high))
        table.add_row(what, f"[bold]{value} {row.unit}[/]", f"[dim]{'-'.join(ends)}[/]" if all(ends) else "")
    return table


def _in_unit(value, unit):
    if value is None:
        return ""
    return f"{value:.{5 if unit == 'cosine' else 1 if unit in ('us', 'MB') else 2 if value < 10 else 1}f}"


def _ratio(spread):
    value, *ends = (_in_unit(x, "x") for x in (spread.value, spread.low, spread.high))
    return f"[bold]{value} x[/]" + (f"\n[dim]{'-'.join(ends)}[/]" if all(ends) else "")


# ---- files


def write_json(outcome, path):
    """Everything, raw: seconds of every call of every round of every system."""
    document = {
        "format": "cyflash bench 1",
        "environment": outcome.environment,
        "arguments": outcome.arguments,
        "systems": outcome.systems,
        "skipped": outcome.skipped,
        "failures": outcome.all_failures(),
        "races": [_race_record(result) for result in outcome.races],
        "int8": [_race_record(result) for result in outcome.int8],
        "caches": [_race_record(result) for result in outcome.caches],
        "comparisons": [_race_record(result) for result in outcome.comparisons],
        "suite": [asdict(row) for row in outcome.rows],  # of --suite, --int8 or --decode
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _race_record(result):
    entries = {}
    for label, timing in result.timings.items():
        record = asdict(timing)
        record |= {"case": asdict(result.cases[label]), "flops": result.cases[label].flops()}
        record |= {"median_seconds": timing.median, "gflops": result.gflops(label)}
        if label != "cyflash" and "cyflash" in result.timings:
            record["ratio_to_cyflash"] = asdict(result.ratio(label, "cyflash"))
        entries[label] = record
    peers = result.peers()
    share = result.fma_share("cyflash") if "cyflash" in result.timings else None
    return {
        "threads": result.threads,
        "entries": entries,
        "failures": result.failures,
        "best_peer": peers[0] if peers else None,
        "fma_rates": result.fma_rates,
        "fma_share": asdict(share) if share else None,
        "dot_rates": result.dot_rates,
    }


def plot(outcome, path):
    """GFLOP/s of every system on every case, a panel per thread count, with the measured peak; of `--decode`, speed
    against the fp32 cache."""
    if outcome.caches:
        figure = figure_class()(figsize=(9, 4.4), layout="constrained")
        _plot_caches(figure.subplots(), outcome.caches)
        figure.savefig(path, dpi=130)
        return
    panels = {}
    for result in outcome.races:
        panels.setdefault(f"fp32 attention (B, H, L, D), {_threads(result.threads)}", []).append(result)
    for result in outcome.int8:
        panels.setdefault(f"fp32 and int8 attention (B, H, L, D), {_threads(result.threads)}", []).append(result)
    widest = max(map(len, panels.values()), default=1) * (2 if outcome.int8 else 1)
    figure = figure_class()(figsize=(max(7, 1.6 * widest + 1.5), 3.6 * len(panels) + 0.6), layout="constrained")
    for (name, races), axes in zip(panels.items(), figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        _plot_panel(axes, name, races)
    figure.savefig(path, dpi=130)


def _threads(count):
    return f"{count} thread{'s' * (count > 1)}"


def _plot_caches(axes, races):
    labels = list(dict.fromkeys(label for result in races for label in result.cases))
    width = 0.8 / len(labels)
    for index, label in enumerate(labels):
        style = {"color": "0.8" if "fp32" in label else "0.6"} if label.startswith("reading") else {}
        speeds = [
            result.ratio("cyflash", label).value if {"cyflash", label} <= result.timings.keys() else math.nan
            for result in races
        ]
        places = [x + index * width for x in range(len(races))]
        bars = axes.bar(places, speeds, width, label=_CACHES.get(label, label), zorder=2, **style)
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
    centres = [x + 0.4 - width / 2 for x in range(len(races))]
    axes.set_xticks(centres, [result.cases["cyflash"].title() for result in races], fontsize=8)
    axes.set(ylabel="times as fast as the fp32 cache", title=f"One query to a full cache, {_threads(races[0].threads)}")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)


def _plot_panel(axes, name, races):
    labels = list(dict.fromkeys(label for result in races for label in result.cases))
    width = 0.8 / len(labels)
    for index, label in enumerate(labels):
        rates = [result.gflops(label) if label in result.timings else math.nan for result in races]
        bars = axes.bar([x + index * width for x in range(len(races))], rates, width, label=label, zorder=2)
        if label.startswith("cyflash"):
            axes.bar_label(bars, fmt="%.0f", fontsize=8 if len(labels) < 6 else 6)
    _plot_peak(axes, "measured FMA peak", "dashed", [result.fma_rates for result in races], races, width)
    _plot_peak(axes, "measured int8 dot product peak", "dotted", [result.dot_rates for result in races], races, width)
    centres = [x + 0.4 - width / 2 for x in range(len(races))]
    axes.set_xticks(centres, [title(result.cases["cyflash"]) for result in races], fontsize=8)
    axes.set(ylabel="GFLOP/s, GOP/s" if any(result.dot_rates for result in races) else "GFLOP/s", title=name)
    axes.grid(axis="y", alpha=0.3)
    columns = min(len(labels) + 1, 6) if len(labels) < 6 else 3
    axes.legend(fontsize=8, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)


def _plot_peak(axes, name, style, rates, races, width):
    for x, (own, result) in enumerate(zip(rates, races, strict=True)):
        if own:
            peak = statistics.median(own) * result.threads / 1e9
            axes.hlines(peak, x - width / 2, x + 0.8 - width / 2, "black", style, linewidth=1, label=name)
            name = None
