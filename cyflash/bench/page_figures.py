"""The figures of `cyflash bench --html`, as SVG (svg.py).

    speeds      rate against length, a line for each system
    ratios      times as fast as something, a row for each case, a dot for each system, with its interval
    trade       error against speed, a point for each system
"""

import math
from typing import NamedTuple

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from cyflash.svg import INK, axes_at, svg

__all__ = ["Look", "looks", "ratios", "speeds", "trade"]

# Of Okabe and Ito: apart for all kinds of colour vision, and to be seen on light and on dark ground.
OWN = ("#d55e00", "#e69f00", "#cc79a7", "#d4b91e", "#a8582f", "#c23b4b")
PEERS = ("#0072b2", "#56b4e9", "#009e73", "#8a8f98", "#7570b3", "#66a61e")
MARKERS = "osD^vP"
WIDTH = 480
ROW = 26


class Look(NamedTuple):
    colour: str
    marker: str


def looks(labels):
    """{label: Look}: warm colours for cyflash, cool ones for all others."""
    own = [label for label in labels if label.startswith("cyflash")]
    peers = [label for label in labels if label not in own]
    return {
        label: Look(colours[n % len(colours)], MARKERS[n % len(MARKERS)])
        for names, colours in ((own, OWN), (peers, PEERS))
        for n, label in enumerate(names)
    }


def speeds(lengths, lines, peaks, looks, unit, text):
    """lines: {label: [rate or None for each length]}; peaks: {name: rate}."""

    def draw(figure):
        axis = axes_at(figure, 62, 12, WIDTH - 76, 262)
        for label, rates in lines.items():
            points = [(length, rate) for length, rate in zip(lengths, rates, strict=True) if rate is not None]
            own = label.startswith("cyflash")
            axis.plot(
                *zip(*points, strict=True), color=looks[label].colour, marker=looks[label].marker, markersize=4.2,
                linewidth=2 if own else 1.3, zorder=3 if own else 2,
            )  # fmt: skip
        for (name, rate), style in zip(peaks.items(), ("dashed", "dotted"), strict=False):
            axis.axhline(rate, color=INK, linewidth=0.8, linestyle=style, alpha=0.7)
            axis.annotate(name, (0.01, rate), (0, 2), ("axes fraction", "data"), "offset points", fontsize=8.5)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(lengths))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_ylim(0, None)
        _finish(axis, "length: queries, and keys", unit)

    return svg(draw, WIDTH, 324, text)


def ratios(rows, looks, than, text):
    """rows: {case: {label: Spread}}; than: of what a value is the multiple, in words."""
    height = ROW * len(rows) + 12

    def draw(figure):
        left = 18 + 6.6 * max(map(len, rows))
        axis = axes_at(figure, left, 8, WIDTH - left - 14, height)
        values = [x for spreads in rows.values() for spread in spreads.values() for x in _ends(spread)]
        for y, spreads in enumerate(rows.values()):
            for n, (label, spread) in enumerate(spreads.items()):
                place = y + 0.56 * ((n + 0.5) / len(spreads) - 0.5)
                low, *_, high = _ends(spread)
                axis.plot((low, high), (place, place), color=looks[label].colour, linewidth=1.4)
                axis.plot(spread.value, place, looks[label].marker, color=looks[label].colour, markersize=5)
        axis.axvline(1, color=INK, linewidth=0.9)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.set_ylim(len(rows) - 0.5, -0.5)
        for y in range(len(rows) - 1):
            axis.axhline(y + 0.5, color=INK, linewidth=0.4, alpha=0.18)
        axis.set_xscale("log", base=2)
        low, high = min([1, *values]) / 1.08, max([1, *values]) * 1.08
        axis.set_xlim(low, high)
        axis.xaxis.set_major_locator(FixedLocator(_ticks(low, high)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        _finish(axis, than, None)

    return svg(draw, WIDTH, height + 56, text)


def _ends(spread):
    return (spread.value, spread.value, spread.value) if spread.low is None else (spread.low, spread.value, spread.high)


def _ticks(low, high):
    """Powers of two, and halves between them where they are few."""
    ticks = [2.0**n for n in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    if len([x for x in ticks if low <= x <= high]) < 4:
        ticks += [1.5 * x for x in ticks]
    return [x for x in ticks if low <= x <= high]


def trade(points, looks, than, text):
    """points: {label: (times as fast, relative L1 error)}."""

    def draw(figure):
        axis = axes_at(figure, 66, 12, WIDTH - 80, 262)
        axis.set_yscale("log")
        for label, (speed, error) in points.items():
            axis.plot(
                speed, error, looks[label].marker, color=looks[label].colour, markersize=9, markeredgecolor=INK,
                markeredgewidth=0.5,
            )  # fmt: skip
        errors, fastest = [error for _, error in points.values()], max(speed for speed, _ in points.values())
        axis.set_ylim(min(errors) / 2.5, max(errors) * 2.5)
        axis.set_xlim(0, 1.1 * fastest)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}".replace("e-0", "e-")))
        axis.yaxis.set_minor_locator(NullLocator())
        _finish(axis, f"{than}: faster to the right", "relative L1 error: better below")

    return svg(draw, WIDTH, 324, text)


def _finish(axis, across, up):
    axis.set_xlabel(across, fontsize=9.5)
    if up:
        axis.set_ylabel(up, fontsize=9.5)
    axis.grid(alpha=0.18, linewidth=0.6, color=INK, axis="both" if up else "x")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(length=2, pad=2, labelsize=9)
