"""The figures of `cyflash report`, as SVG (svg.py).

    error_map, cause_map, plan_map      layer x head
    histograms                          the values of one layer
    front                               error against speed
"""

import itertools

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from cyflash.quant.diagnosis import CAUSES, FP32
from cyflash.svg import INK, PAPER, axes_at, is_light, svg

__all__ = [
    "CAUSE_COLOURS",
    "CAUSE_NAMES",
    "PANELS",
    "cause_map",
    "clipped",
    "error_map",
    "front",
    "histograms",
    "plan_map",
    "rung_colour",
    "share",
]

# Of Okabe and Ito: apart for all kinds of colour vision.
CAUSE_COLOURS = {"qk": "#0072b2", "p": "#e69f00", "v": "#009e73", None: "#8a8f98"}
RUNG_COLOURS = ("#56b4e9", "#f0e442", "#009e73", "#e69f00", "#cc79a7", "#0072b2", "#d55e00", "#ddcc77", "#882255",
                "#44aa99", "#332288", "#8a8f98")  # fmt: skip
CAUSE_NAMES = {"qk": "QK", "p": "P", "v": "V", None: "-"}
CELL, SMALL_CELL = (25, 19), (11, 11)
MOST_NUMBERS = 1200  # in one map
LONGEST_LABEL = 16

# Layer x head


def error_map(layers, key, limit, text):
    """Relative errors in percent, one cell per layer and head; `limit`, unless it is None, is marked in the bar.

    Colours go by the root of the error where few errors are far larger than the others.
    """
    values = _cells(layers, lambda head: head[key])
    finite = values[np.isfinite(values)]
    top = max(limit or 1e-6, finite.max(initial=0.0))
    power = 0.5 if finite.size and top > 4 * np.median(finite) else 1.0
    colours = matplotlib.colormaps["cividis"]

    def place(value):
        return min(value / top, 1.0) ** power if np.isfinite(value) else 1.0

    def bar(figure, left, above, width):
        axis = axes_at(figure, left, above, width, 9)
        axis.pcolormesh(np.linspace(0, 1, 65), (0, 1), np.arange(64)[None], cmap=colours, rasterized=True)
        axis.set(yticks=[], xlim=(0, 1))
        ticks = {0.0: "left", top: "right"} | ({} if power == 1.0 else {top / 4: "center"})
        if limit:
            axis.axvline(place(limit), color=INK, linewidth=1.2, ymax=1.7, clip_on=False)
            ticks = {x: side for x, side in ticks.items() if abs(place(x) - place(limit)) > 0.12}
            ticks[limit] = "right" if place(limit) > 0.95 else "left" if place(limit) < 0.05 else "center"
        axis.set_xticks([place(x) for x in ticks], [f"{100 * x:.2g}" for x in ticks])
        for label, side in zip(axis.get_xticklabels(), ticks.values(), strict=True):
            label.set_horizontalalignment(side)
        axis.tick_params(length=2, pad=1, labelsize=7)
        axis.spines[:].set_visible(False)

    return _map(layers, values, lambda value: colours(place(value)), _percent, text, bar)


def cause_map(layers, text):
    """What causes the error: a letter and a colour."""
    order = [*CAUSES, None]
    values = _cells(layers, lambda head: order.index(head["cause"]))
    return _map(
        layers, values, lambda x: CAUSE_COLOURS[order[int(x)]], lambda x: CAUSE_NAMES[order[int(x)]], text
    )


def plan_map(layers, rungs, text):
    """The rung of each head: its number in `rungs`, and a colour."""
    values = _cells(layers, lambda head: rungs.index(head["setting"]))
    return _map(layers, values, lambda x: rung_colour(rungs, int(x)), lambda x: str(int(x) + 1), text)


def rung_colour(rungs, n):
    return RUNG_COLOURS[-1] if rungs[n] == FP32 else RUNG_COLOURS[n % (len(RUNG_COLOURS) - 1)]


def _cells(layers, value):
    """(layers, heads), NaN where a layer has fewer heads."""
    values = np.full((len(layers), max(len(layer["heads"]) for layer in layers)), np.nan)
    for row, layer in zip(values, layers, strict=True):
        row[: len(layer["heads"])] = [value(head) for head in layer["heads"]]
    return values


def _map(layers, values, colour, word, text, bar=None):
    """A coloured cell for each value, with its word where there are not too many; a bar below for what colours mean."""
    rows, columns = values.shape
    with_words = values.size <= MOST_NUMBERS
    width, height = CELL if with_words else SMALL_CELL
    labels = short_labels([layer["layer"] for layer in layers])
    left = 6 + 5.7 * max(5, *map(len, labels))
    top, below = 32, 30 if bar else 6
    inner = columns * width

    def draw(figure):
        axis = axes_at(figure, left, top, inner, rows * height)
        shown = np.isfinite(values) | np.isinf(values)
        known = ListedColormap([colour(x) for x in values[shown]]) if shown.any() else None
        order = np.full(values.shape, np.nan)
        order[shown] = np.arange(shown.sum())
        if known:
            axis.pcolormesh(
                order, cmap=known, vmin=-0.5, vmax=shown.sum() - 0.5, edgecolors=PAPER, linewidth=0.8,
                rasterized=not with_words,
            )  # fmt: skip
        axis.set(xlim=(0, columns), ylim=(rows, 0))
        if with_words:
            for row, column in np.argwhere(shown):
                value = values[row, column]
                ink = "#000000" if is_light(colour(value)) else "#ffffff"
                axis.text(column + 0.5, row + 0.54, word(value), color=ink, fontsize=6.6, ha="center", va="center")
        step = max(1, int(np.ceil(14 / width)))
        heads = range(0, columns, step)
        axis.set_xticks(np.array(heads) + 0.5, heads, fontsize=7)
        axis.set_yticks(np.arange(0, rows, step) + 0.5, labels[::step], fontsize=7)
        axis.xaxis.tick_top()
        axis.tick_params(length=0, pad=2)
        axis.set_xlabel("head", fontsize=7, labelpad=2)
        axis.xaxis.set_label_position("top")
        axis.annotate("layer", (0, 1), (-2, 2), "axes fraction", "offset points", fontsize=7, ha="right", va="bottom")
        axis.spines[:].set_visible(False)
        if bar:
            bar(figure, left, top + rows * height + 8, inner)

    return svg(draw, max(left + inner + 8, 170), top + rows * height + below, text)


def _percent(value):
    """Three characters at most."""
    x = 100 * value
    if not np.isfinite(x) or x >= 999.5:
        return "big"
    if x < 0.005:
        return "0"
    return f"{x:.2f}".lstrip("0") if x < 0.095 else f"{x:.1f}" if x < 9.95 else f"{x:.0f}"


def short_labels(names):
    """The names without what all begin and end with, where that leaves something, and not too long."""
    if len(names) > 1:
        shortest = min(map(len, names))
        begin = next((n for n in range(shortest) if len({name[n] for name in names}) > 1), shortest)
        while begin and all(name[begin - 1].isdigit() for name in names):
            begin -= 1  # a number stays whole
        rest = [name[begin:] for name in names]
        shortest = min(map(len, rest))
        end = next((n for n in range(shortest) if len({name[-1 - n] for name in rest}) > 1), shortest)
        while end and any(name[len(name) - end].isdigit() for name in rest):
            end -= 1
        cut = [name[: len(name) - end] for name in rest]
        names = cut if all(cut) else names
    half = LONGEST_LABEL // 2
    return [name if len(name) <= LONGEST_LABEL else f"{name[: half - 1]}…{name[-half:]}" for name in names]


# Values of a layer

PANELS = {"q": "|q|", "k": "|k|", "k_centred": "|k - mean|", "v": "|v|"}
FILL, CLIP = "#56a0d3", "#d55e00"
PANEL = (150, 78)


def histograms(layer, text):
    """Four panels: how many values of each size, where codes end, and the share beyond."""
    width, height = PANEL

    def draw(figure):
        for n, (part, title) in enumerate(PANELS.items()):
            axis = axes_at(figure, 14 + (n % 2) * (width + 24), 18 + (n // 2) * (height + 48), width, height)
            _histogram(axis, layer["histograms"][part], title)

    return svg(draw, 2 * width + 46, 2 * height + 88, text)


def _histogram(axis, values, title):
    edges, counts = np.array(values["edges"]), np.array(values["counts"], float)
    axis.set_title(title, fontsize=8, loc="left", pad=3)
    axis.set_title(clipped(values), fontsize=7, loc="right", pad=3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    if not counts.size:
        axis.set(xticks=[], yticks=[])
        axis.text(0.5, 0.5, "only zeros", transform=axis.transAxes, ha="center", va="center")
        return
    axis.stairs(counts / values["count"], edges, fill=True, color=FILL, baseline=0.2 / values["count"])
    clip = None if values["scale"] is None else [127.5 * x for x in values["scale"]]
    end = max(edges[-1], *(clip or [0]))
    axis.set(
        xscale="log", yscale="log", ylim=(0.2 / values["count"], 2), xlim=(max(edges[0], end / 2e4), 1.25 * end)
    )
    if clip:
        if clip[1] > 1.02 * clip[0]:
            axis.axvspan(*clip, color=CLIP, alpha=0.35, linewidth=0)
        else:
            axis.axvline(clip[1], color=CLIP, linewidth=1.4)
    axis.xaxis.set_major_locator(LogLocator(10, numticks=20))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.tick_params(length=2, pad=2, labelsize=7)


def clipped(values):
    """How these values are quantised, in two words."""
    if values["quantised"] != "static":
        return {"dynamic": "scale per token", "no": "not quantised"}[values["quantised"]]
    return "none clipped" if not values["saturated"] else f"{share(values['saturated'])} clipped"


def share(x):
    """A share, also a very small one."""
    if x is None:
        return "-"
    return "0" if x == 0 else f"{100 * x:.2f}\u00a0%" if x >= 1e-4 else f"{1e6 * x:.2g}\u00a0ppm"


# Error against speed


def front(rows, layers, text):
    """A numbered point for each rung, and a small one for each layer; a line through those that nothing beats."""
    colours = [rung_colour([row["rung"] for row in rows], n) for n in range(len(rows))]

    def draw(figure):
        axis = axes_at(figure, 44, 10, 380, 264)
        for n in range(len(rows)):
            own = [layer["rungs"][n] for layer in layers if layer["rungs"]]
            points = np.array([(1 / x["time"], 100 * x["error"]["rel_l1"]) for x in own])
            axis.scatter(*points.T, s=9, color=colours[n], alpha=0.6, linewidths=0)
        best = sorted((1 / row["time"], 100 * row["rel_l1"]) for row in rows if row["best"])
        axis.plot(*zip(*best, strict=True), color=INK, linewidth=0.8, alpha=0.6, zorder=1)
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        left, right = axis.get_xlim()
        axis.set_xlim(left, right)  # stays so below
        points = axis.transData.transform([(1 / row["time"], 100 * row["rel_l1"]) for row in rows])
        for n, (point, place) in enumerate(zip(points, _apart(points), strict=True)):
            (x, y), (own_x, own_y) = axis.transData.inverted().transform((place, point))
            axis.plot((own_x, x), (own_y, y), color=INK, linewidth=0.6, zorder=3, clip_on=False)
            axis.scatter(own_x, own_y, s=16, color=colours[n], edgecolors=INK, linewidths=0.5, zorder=3, clip_on=False)
            axis.scatter(x, y, s=118, color=colours[n], edgecolors=INK, linewidths=0.7, zorder=4, clip_on=False)
            ink = "#000000" if is_light(colours[n]) else "#ffffff"
            axis.text(x, y, str(n + 1), ha="center", va="center_baseline", fontsize=7.5, color=ink, zorder=5)
        axis.set_xlabel("speed, float32 = 1: faster to the right", fontsize=8)
        axis.set_ylabel("relative L1 error, %", fontsize=8)
        axis.grid(alpha=0.18, linewidth=0.6, color=INK)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(length=2, pad=2, labelsize=7.5)

    return svg(draw, 436, 316, text)


def _apart(points, distance=15.0):
    """The points, in pixels, moved until none covers another."""
    places = points + np.linspace(-0.5, 0.5, len(points))[:, None]  # equal ones part as well
    for _ in range(200):
        for a, b in itertools.combinations(range(len(places)), 2):
            gap = places[b] - places[a]
            length = max(np.hypot(*gap), 1e-6)
            if length < distance:
                move = 0.5 * (distance - length) * gap / length
                places[a] -= move
                places[b] += move
    return places
