"""The page of `cyflash bench --html`: page.html, filled with what an Outcome has.

    page(outcome)    the Outcome of a run -> one self-contained page
"""

from html import escape
from pathlib import Path
from string import Template

import cyflash
from cyflash import page as html
from cyflash.bench import page_figures as figures
from cyflash.bench.report import busy_notes
from cyflash.output import as_binary, as_time

__all__ = ["page"]

FEWEST_LENGTHS = 3  # of a line
TRADED = 2  # figures of error against speed, at most


def page(outcome):
    """The page, as text.

    Parameters
    ----------
    outcome : report.Outcome

    Returns
    -------
    str
    """
    races = [*outcome.races, *outcome.int8]
    looks = figures.looks(list(dict.fromkeys(label for race in (*races, *outcome.caches) for label in race.cases)))
    failures = outcome.all_failures()
    environment = outcome.environment
    parts = {
        "style": html.style(),
        "title": "Speed of cyflash",
        "version": escape(cyflash.__version__),
        "date": escape(environment["date"][:10]),
        "asked": escape(_asked(outcome)),
        "verdict": escape(_verdict(races, outcome.caches)),
        "verdict_class": "over" if failures else "",
        "numbers": _numbers(outcome, races),
        "notes": "".join(f"<p>{escape(note)}</p>\n" for note in _notes(outcome, failures)),
        "settings": _settings(outcome),
        "systems": _systems(outcome),
    }  # fmt: skip
    sections = {
        "lines": _lines(races, looks),
        "peers": _peers(races, looks),
        "trade": _trade(races, looks),
        "caches": _caches(outcome.caches, looks),
        "rows": _rows(outcome.rows),
    }
    for section in sections.values():
        parts |= section
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    kept = {name: bool(section) for name, section in sections.items()}
    return Template(html.chosen(template, **kept)).substitute(parts)


# Words


def _asked(outcome):
    lists = (name for name in ("lengths", "suite", "int8", "decode") if outcome.arguments.get(name))
    return next((f"cyflash bench --{name}" for name in lists), "the shapes asked for")


def _verdict(races, caches):
    timed = [race for race in races if "cyflash" in race.timings]
    if not timed:
        if caches and {"cyflash", "cyflash int8"} & caches[0].timings.keys():
            return f"One query of each head to a full cache, {_threads(caches[-1].threads)}."
        return "Nothing was timed."
    race = max(timed, key=lambda one: (one.cases["cyflash"].shape[2], -one.threads))
    where = f"{race.cases['cyflash'].title()}, {_threads(race.threads)}"
    words = [f"{race.gflops('cyflash'):.0f} GFLOP/s in fp32 at {where}"]
    if peers := [label for label in race.peers() if race.cases[label].int8 is None and "bf16" not in label]:
        words.append(f"{_times(race.ratio(peers[0], 'cyflash').value)} as fast as {peers[0]}, the fastest peer in fp32")
    if int8 := [label for label in race.timings if race.cases[label].int8 is not None]:
        best = min(int8, key=lambda label: race.timings[label].median)
        words.append(f"int8 up to {_times(race.ratio('cyflash', best).value)} as fast as fp32")
    return "; ".join(words) + "."


def _notes(outcome, failures):
    yield from busy_notes(outcome)
    yield from (f"Failed: {where}: {why}" for where, why in failures.items())


def _numbers(outcome, races):
    timed = [race for race in races if "cyflash" in race.timings]
    numbers = {"cases": str(len(races) + len(outcome.caches) + len(outcome.comparisons))}
    if timed:
        best = max(timed, key=lambda race: race.gflops("cyflash") / race.threads)
        numbers["fp32, best per thread"] = f"{best.gflops('cyflash') / best.threads:.0f} GFLOP/s"
        if share := best.fma_share("cyflash"):
            numbers["of the FMA peak"] = f"{100 * share.value:.0f}\u00a0%"
        ratios = [race.ratio(label, "cyflash").value for race in timed for label in race.peers()]
        if ratios:
            numbers["peers: least, most"] = f"{min(ratios):.2f}, {max(ratios):.2f} x"
    numbers["threads"] = ", ".join(map(str, outcome.systems)) or "-"
    return "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in numbers.items())


def _times(x):
    return f"{x:.2f} times"


def _threads(count):
    return f"{count} thread{'s' * (count > 1)}"


def _name(label):
    return "cyflash fp32" if label == "cyflash" else label


def _keys(labels, looks):
    return " ".join(html.key(looks[label].colour, _name(label)) for label in labels)


def _details(summary, table):
    return f"<details><summary>{escape(summary)}</summary>{table}</details>"


# Sections: what they add to the page, nothing where there is nothing to show


def _lines(races, looks):
    """A figure for each (B, H, D), options and thread count with enough lengths."""
    groups = {}
    for race in races:
        case = next(iter(race.cases.values()))
        B, H, _, D = case.shape
        groups.setdefault((B, H, D, case.causal, race.threads), []).append(race)
    drawn, labels = [], {}
    for (B, H, D, causal, threads), group in groups.items():
        by_length = {next(iter(race.cases.values())).shape[2]: race for race in group}
        if len(by_length) < FEWEST_LENGTHS:
            continue
        lengths = sorted(by_length)
        found = {
            label: [by_length[L].gflops(label) if label in by_length[L].timings else None for L in lengths]
            for label in dict.fromkeys(label for race in group for label in race.timings)
        }
        labels |= dict.fromkeys(found)
        what = f"({B}, {H}, L, {D}){' causal' if causal else ''}, {_threads(threads)}"
        top = by_length[lengths[-1]]
        said = "; ".join(f"{_name(label)} {top.gflops(label):.0f}" for label in found if label in top.timings)
        text = f"Lines of the rate against the length, for {what}. GFLOP/s at {lengths[-1]}: {said}."
        unit = "GFLOP/s, GOP/s" if any(label.startswith("cyflash int8") for label in found) else "GFLOP/s"
        figure = figures.speeds(lengths, found, _peaks(group), looks, unit, text)
        rows = [
            (_name(label), *("-" if x is None else f"{x:.0f}" for x in rates)) for label, rates in found.items()
        ]  # fmt: skip
        table = html.table({unit: "text", **dict.fromkeys(map(str, lengths), "")}, rows)
        drawn.append(html.figure(figure, f"<b>{escape(what)}</b>") + "\n" + _details(f"{what}, as a table", table))
    if not drawn:
        return {}
    return {"lines": "\n".join(f"<div>{one}</div>" for one in drawn), "line_keys": _keys(labels, looks)}


def _peaks(group):
    """The measured peaks of all threads, in GFLOP/s."""
    peaks = {}
    for name, rates in (("FMA peak", "fma_rates"), ("int8 peak", "dot_rates")):
        values = sorted(x for race in group for x in getattr(race, rates))
        if values:
            peaks[name] = values[len(values) // 2] * group[0].threads / 1e9
    return peaks


def _peers(races, looks):
    rows, cells, labels = {}, [], {}
    for race in races:
        peers = [label for label in looks if label in race.peers()]
        if "cyflash" not in race.timings or not peers:
            continue
        case = f"{race.cases['cyflash'].title()}"
        found = {label: race.ratio(label, "cyflash") for label in peers}
        rows.setdefault(race.threads, {})[case] = found
        labels |= dict.fromkeys(found)
        own = as_time(race.timings["cyflash"].median)
        cells += [
            (case, str(race.threads), label, as_time(race.timings[label].median), own, f"{spread.value:.2f} x",
             _interval(spread))
            for label, spread in found.items()
        ]  # fmt: skip
    if not rows:
        return {}
    drawn = []
    for threads, own in rows.items():
        text = _ratios_in_words(own, "The time of peers over that of cyflash")
        figure = figures.ratios(own, looks, "times the time of cyflash", text)
        drawn.append(html.figure(figure, f"<b>{_threads(threads)}</b>"))
    headers = {"case": "text", "threads": "", "peer": "text", "its time": "", "cyflash": "", "ratio": "", "95 %": ""}
    return {"peers": "\n".join(drawn), "peer_keys": _keys(labels, looks),
            "peer_table": _details("All peers as a table", html.table(headers, cells))}  # fmt: skip


def _interval(spread):
    return "-" if spread.low is None else f"{spread.low:.2f} to {spread.high:.2f}"


def _ratios_in_words(rows, what):
    said = "; ".join(
        f"{case}: " + ", ".join(f"{_name(label)} {spread.value:.2f}" for label, spread in own.items())
        for case, own in rows.items()
    )
    return f"{what}. {said}."


def _trade(races, looks):
    """Of the longest case of each thread count that has anything but fp32."""
    longest = {}
    for race in races:
        if "cyflash" in race.timings and any(error > 1e-5 for error in _errors(race).values()):
            best = longest.get(race.threads)
            if best is None or race.cases["cyflash"].shape[2] > best.cases["cyflash"].shape[2]:
                longest[race.threads] = race
    drawn, cells, labels = [], [], {}
    for threads, race in list(longest.items())[:TRADED]:
        what = f"{race.cases['cyflash'].title()}, {_threads(threads)}"
        points = {label: (race.ratio("cyflash", label).value, error) for label, error in _errors(race).items()}
        labels |= dict.fromkeys(points)
        said = "; ".join(f"{_name(label)} {x:.2f} times, error {error:.1e}" for label, (x, error) in points.items())
        text = f"Error against speed at {what}: {said}."
        figure = figures.trade(points, looks, "times as fast as cyflash fp32", text)
        drawn.append(html.figure(figure, f"<b>{escape(what)}</b>"))
        cells += [(_name(label), what, f"{speed:.2f} x", f"{error:.1e}") for label, (speed, error) in points.items()]
    if not drawn:
        return {}
    headers = {"": "text", "case": "text", "speed": "", "relative L1": ""}
    return {"trade": "\n".join(drawn), "trade_keys": _keys(labels, looks),
            "trade_table": _details("As a table", html.table(headers, cells))}  # fmt: skip


def _errors(race):
    return {label: timing.error.rel_l1 for label, timing in race.timings.items()}


def _caches(races, looks):
    rows, labels = {}, {}
    for race in races:
        if "cyflash" in race.timings:
            found = {label: race.ratio("cyflash", label) for label in race.timings if label != "cyflash"}
            rows[race.cases["cyflash"].title()] = found
            labels |= dict.fromkeys(found)
    if not labels:
        return {}
    text = _ratios_in_words(rows, "Speed over that with the fp32 cache")
    figure = figures.ratios(rows, looks, "times as fast as the fp32 cache", text)
    return {"caches": html.figure(figure, f"<b>{_threads(races[0].threads)}</b>"), "cache_keys": _keys(labels, looks)}


def _rows(rows):
    if not rows:
        return {}
    cells = [
        (row.what, "not measured" if row.spread is None else f"{row.spread.value:.4g} {row.unit}",
         "" if row.spread is None or row.spread.low is None else _interval(row.spread), row.note)
        for row in rows
    ]  # fmt: skip
    return {"rows": html.table({"measured": "text", "": "", "95 %": "", "note": "text"}, cells)}


def _settings(outcome):
    environment = outcome.environment
    cpu = environment["cpu"]
    settings = {
        "Processor": f"{cpu['model']}, {cpu['cores']} cores",
        "Caches": ", ".join(f"{name.upper()} {as_binary(size)}" for name, size in cpu["caches"].items() if size),
        "SIMD build": outcome.arguments.get("isa") or cpu["implementation"],
        "Software": f"Python {environment['python']}, {environment['platform']}",
        "Left out": "; ".join(f"{name}: {why}" for name, why in outcome.skipped.items()) or "nothing",
    }
    return html.terms(settings)


def _systems(outcome):
    rows = [
        (_name(label) if label != "cyflash" else label, str(threads), about["version"],
         ", ".join(f"{name} {value}" for name, value in about["settings"].items()))
        for threads, systems in outcome.systems.items() for label, about in systems.items()
    ]  # fmt: skip
    headers = {"system": "text", "threads": "", "version": "text", "settings": "text"}
    return _details("Systems and their settings", html.table(headers, rows))
