"""The HTML page of `cyflash report`: report_page.html, filled with tables and figures.

    page(report)    the numbers of report.describe() -> one self-contained page
"""

import statistics
from collections import Counter
from html import escape
from pathlib import Path
from string import Template

from cyflash import report_figures as figures
from cyflash.page import chosen, figure, key, style, table, terms
from cyflash.quant.diagnosis import FP32
from cyflash.report_figures import CAUSE_COLOURS, CAUSE_NAMES, share

__all__ = ["page"]

MOST_HISTOGRAMS = 6  # layers, unless there are hardly more
MOST_HEADS = 2000  # in the table of all
WORDS = ("layer", "runs in", "cause", "fixed by", "q, k, v clipped", "rung", "kv heads", "query heads", "of", "clipped")


def page(report):
    """The page, as text.

    Parameters
    ----------
    report : dict
        Of `report.describe`, with "scales" and "observed", the names of the two files.

    Returns
    -------
    str
    """
    layers = [layer for layer in report["layers"] if layer["heads"]]
    parts = {
        "style": style(),
        "version": escape(report["cyflash"]),
        "title": f"Scales: {escape(Path(report['scales']).name)}",
        "verdict": escape(report["verdict"]),
        "verdict_class": "over" if report["summary"]["heads_over"] else "",
        "found": escape(_found(report["settings"])),
        "numbers": _numbers(report),
        "notes": "".join(f'<p class="faint">{escape(note)}</p>\n' for note in report["notes"]),
        "limit": _limit(report),
        "settings": _settings(report),
        "rungs": terms(report["rungs"]),
        **_values(report),
    }
    if layers:
        parts |= {
            "measured_on": " or ".join(sorted({layer["measured_on"] for layer in layers})),
            "maps": _maps(report, layers),
            "by_layer": _by_layer(layers),
            "all_heads": _all_heads(layers),
            "worst": _worst(report),
            "front": _front(report, layers),
        }
    if report["planned"]:
        parts["plan"] = _plan(layers)
    template = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    return Template(chosen(template, errors=bool(layers), plan=report["planned"])).substitute(parts)


# Pieces of HTML


def _headers(names):
    """Columns of words are set to the left, those of numbers to the right."""
    return {name: "text" if name in WORDS else "" for name in names}


def _percent(x):
    if x is None:
        return "-"
    return f"{100 * x:.2f}\u00a0%" if x == 0 or x >= 5e-5 else "< 0.01\u00a0%"


def _limit(report):
    return f"{100 * report['max_rel_l1']:g}\u00a0%"


def _error(x, limit=None):
    return (_percent(x), "over" if limit is not None and x is not None and x > limit else "")


def _ratio(x):
    return "-" if x is None else f"{x:.2f}"


def _count(n):
    """1.2 million."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if n >= size:
            return f"{n / size:.3g} {word}"
    return f"{n:,}"


def _ranges(numbers):
    """0-2, 5"""
    runs = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# The sections


def _numbers(report):
    summary = report["summary"]
    numbers = {
        "mean relative L1": _percent(summary["rel_l1"]),
        "worst head": _percent(summary["worst_head"]),
        "worst row": _percent(summary["worst_row"]),
        f"heads over {_limit(report)}": f"{summary['heads_over']} of {summary['heads']}",
        "layers": str(summary["layers"]),
        "observations": "-" if summary["observations"] is None else _count(summary["observations"]),
        "values seen": _count(summary["values"]),
        "tiles measured": _count(summary["tiles"]),
    }
    return "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in numbers.items())


def _found(settings):
    if "method" not in settings:
        return "unrecorded means"
    rest = ", ".join(f"{name} {_plain(settings[name])}" for name in ("granularity", "smooth_k") if name in settings)
    return f"method {settings['method']}" + (f" ({rest})" if rest else "")


def _maps(report, layers):
    limit, worst = report["max_rel_l1"], report["settings"].get("target", {}).get("worst")
    mark = f"The mark, {100 * worst:g}\u00a0%, is the plan's target." if worst else "Of the query that fares worst."
    keys = " &nbsp;".join(
        key(CAUSE_COLOURS[cause], f"{CAUSE_NAMES[cause]}: {text}")
        for cause, text in (("qk", "codes of Q and K"), ("p", "codes of P"), ("v", "codes of V"), (None, "in float32"))
        if any(head["cause"] == cause for layer in layers for head in layer["heads"])
    )
    return "\n".join(
        (
            figure(
                figures.error_map(layers, "rel_l1", limit, _in_words(layers, "rel_l1", "relative L1 error")),
                f"<b>Relative L1 error, %.</b> The mark in the bar is {_limit(report)}.",
            ),
            figure(
                figures.error_map(layers, "worst_row", worst, _in_words(layers, "worst_row", "error of the worst row")),
                f"<b>Worst row, %.</b> {mark}",
            ),
            figure(figures.cause_map(layers, _causes_in_words(report)), f"<b>What causes it.</b> {keys}"),
        )
    )


def _in_words(layers, key, what):
    cells = [(head[key], layer["layer"], head["head"]) for layer in layers for head in layer["heads"]]
    value, layer, head = max(cells, key=lambda cell: cell[0])
    median = statistics.median(cell[0] for cell in cells)
    return (
        f"Heat map of the {what} by layer and head: median {_percent(median)}, largest {_percent(value)} in {layer}, "
        f"head {head}. The same numbers are in the table of all heads."
    )


def _causes_in_words(report):
    counts = report["summary"]["causes"]
    said = ", ".join(f"{CAUSE_NAMES[cause]} in {count}" for cause, count in counts.items())
    return f"Map of the largest cause of the error by layer and head: {said} heads."


def _by_layer(layers):
    """Beside the error of now that on the training tiles when the scales were found: much less is a poor sign."""
    names = ("layer", "relative L1", "in training", "worst head", "worst row", "heads by QK", "by P", "by V", "in fp32")
    rows = []
    for layer in layers:
        training = ((layer["about"].get("error") or {}).get("training") or {}).get("rel_l1")
        causes = Counter(head["cause"] for head in layer["heads"])
        errors = (layer["error"][name] for name in ("worst_head", "worst_row"))
        rows.append(
            (
                layer["layer"], _percent(layer["error"]["rel_l1"]), _percent(training), *map(_percent, errors),
                *(str(causes[cause]) for cause in ("qk", "p", "v", None)),
            )
        )  # fmt: skip
    return f"<details><summary>By layer, as a table</summary>{table(_headers(names), rows)}</details>"


def _all_heads(layers):
    heads = [(layer, head) for layer in layers for head in layer["heads"]]
    if len(heads) > MOST_HEADS:
        return '<p class="faint">The table of all heads is long: write it to a file with <code>--csv</code>.</p>'
    names = ("layer", "head", "runs in", "relative L1", "worst row", "1 - cosine", "RMSE", "QK", "P", "V", "cause",
             "q clipped", "k clipped", "v clipped", "fixed by")  # fmt: skip
    rows = [
        (
            layer["layer"], str(head["head"]), head["setting"], _percent(head["rel_l1"]), _percent(head["worst_row"]),
            f"{1 - head['cosine']:.1e}", f"{head['rmse']:.1e}", *(_percent(head[cause]) for cause in ("qk", "p", "v")),
            CAUSE_NAMES[head["cause"]], *(share(head["saturated"][name]) for name in "qkv"),
            head["fix"]["rung"] if head["fix"] else "nothing measured",
        )
        for layer, head in heads
    ]  # fmt: skip
    return f"<details><summary>By head, as a table</summary>{table(_headers(names), rows)}</details>"


def _worst(report):
    limit = report["max_rel_l1"]
    names = ("layer", "head", "relative L1", "worst row", "QK", "P", "V", "cause", "runs in", "q, k, v clipped",
             "fixed by", "then", "time")  # fmt: skip
    rows = []
    for head in report["worst"]:
        fix = head["fix"]
        needs = fix is not None and head["rel_l1"] > limit
        rows.append(
            (
                head["layer"], str(head["head"]), _error(head["rel_l1"], limit), _percent(head["worst_row"]),
                *(_percent(head[cause]) for cause in ("qk", "p", "v")), CAUSE_NAMES[head["cause"]], head["setting"],
                ", ".join(share(head["saturated"][name]) for name in "qkv"),
                fix["rung"] if needs else "needs nothing" if fix else "nothing measured",
                _percent(fix["rel_l1"]) if needs else "", _ratio(fix["time"]) if needs else "",
            )
        )  # fmt: skip
    return table(_headers(names), rows)


def _plan(layers):
    counts = Counter(head["setting"] for layer in layers for head in layer["heads"])
    rungs = sorted(counts, key=lambda rung: (rung == FP32, -counts[rung], rung))
    said = "; ".join(f"{rung}: {_heads(counts[rung])}" for rung in rungs)
    keys = "<br>".join(
        key(figures.rung_colour(rungs, n), f"{n + 1}: {rung} ({_heads(counts[rung])})")
        for n, rung in enumerate(rungs)
    )
    svg = figures.plan_map(layers, rungs, f"Map of the rung of each head by layer. {said}.")
    named = [(layer, part) for layer in layers for part in layer["parts"] or []]
    grouped = any(part["kv_heads"] != part["heads"] for _, part in named)
    query_heads = ("query heads",) if grouped else ()
    headers = _headers(("layer", "rung", "kv heads", *query_heads, "relative L1", "worst row", "time", "planned"))
    rows = [
        (
            layer["layer"], part["rung"], _ranges(part["kv_heads"]), *([_ranges(part["heads"])] if grouped else []),
            _percent(part["rel_l1"]), _percent(part["worst_row"]), _ratio(part["time"]),
            _ratio(layer["about"].get("time")) if part is layer["parts"][0] else "",
        )
        for layer, part in named
    ]  # fmt: skip
    return f'<div class="side">\n{figure(svg, keys)}\n{table(headers, rows)}\n</div>'


def _heads(count):
    return "1 head" if count == 1 else f"{count} heads"


def _front(report, layers):
    rows = report["front"]
    said = "; ".join(f"{row['rung']}: error {_percent(row['rel_l1'])}, speed {1 / row['time']:.2f}" for row in rows)
    svg = figures.front(rows, layers, f"Relative L1 error against speed of {len(rows)} rungs. {said}.")
    headers = _headers(("", "rung", "relative L1", "worst head", "worst row", "time", "speed"))
    cells = [
        (
            str(n), row["rung"], *(_percent(row[name]) for name in ("rel_l1", "worst_head", "worst_row")),
            _ratio(row["time"]), _ratio(1 / row["time"]),
        )
        for n, row in enumerate(rows, 1)
    ]  # fmt: skip
    return f"<figure>{svg}</figure>\n{table(headers, cells)}"


def _values(report):
    layers = report["layers"]
    shown = layers
    if len(layers) > MOST_HISTOGRAMS + 2:
        by_error = sorted(layers, key=lambda layer: -(layer["error"] or {"rel_l1": 0.0})["rel_l1"])
        worst = {layer["layer"] for layer in by_error[:MOST_HISTOGRAMS]}
        shown = [layer for layer in layers if layer["layer"] in worst]
    cards = [
        f"<figure><h3>{escape(layer['layer'])}</h3>{figures.histograms(layer, _values_in_words(layer))}</figure>"
        for layer in shown
    ]
    headers = _headers(("layer", "of", "values", "largest", "scale", "clip", "clipped"))
    rows = [
        (
            layer["layer"], figures.PANELS[part], _count(values["count"]), f"{values['max']:.4g}",
            _scales(values["scale"], 1), _scales(values["scale"], 127.5), figures.clipped(values),
        )
        for layer in layers for part, values in layer["histograms"].items()
    ]  # fmt: skip
    few = len(shown) < len(layers)
    all_values = table(headers, rows)
    return {
        "histograms": "\n".join(cards),
        "histograms_shown": f"Shown: the {len(shown)} layers with the largest errors." if few else "",
        "all_values": f"<details><summary>All layers as a table</summary>{all_values}</details>",
    }


def _values_in_words(layer):
    said = [
        f"{figures.PANELS[part]} up to {values['max']:.4g}, {figures.clipped(values)}"
        for part, values in layer["histograms"].items()
    ]
    return f"Histograms of {layer['layer']}: {'; '.join(said)}."


def _scales(scale, factor):
    if scale is None:
        return "-"
    low, high = (factor * x for x in scale)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _settings(report):
    machine = report["machine"]
    settings = {
        "Scales": report["scales"],
        "Observations": report["observed"],
        "Calibrated with": ", ".join(f"{name} {_plain(x)}" for name, x in report["settings"].items()) or "not recorded",
        "Limit": f"{_limit(report)} relative L1 of a head",
        "Measured by": f"cyflash {report['cyflash']} ({machine['implementation']} build), NumPy {report['numpy']}, "
        f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}",
    }
    if options := _options(report["layers"]):
        settings["Attention options"] = options
    return terms(settings)


def _options(layers):
    """Those of the layers; by layer where they differ."""
    by_layer = {layer["layer"]: layer["about"].get("options") or {} for layer in layers}
    texts = {
        name: ", ".join(f"{option} {_plain(x)}" for option, x in options.items() if x is not None)
        for name, options in by_layer.items()
    }
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{name}: {text or 'none'}" for name, text in texts.items())


def _plain(x):
    if isinstance(x, dict):
        return " and ".join(f"{name} {_plain(value)}" for name, value in x.items())
    if isinstance(x, list):
        words = [_plain(value) for value in x]
        return words[0] if len(set(words)) == 1 else f"({', '.join(words)})"
    return "none" if x is None else f"{x:g}" if isinstance(x, float) else str(x)
