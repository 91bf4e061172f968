"""`cyflash report`: what scales do to each head, where the error comes from and what would help, as one HTML page.

    scales, observations -> describe(): every number (--json, --csv) -> report_page.py: HTML, with report_figures.py
"""

import csv
import json
import statistics
from pathlib import Path

import numpy as np

import cyflash
from cyflash.files import replacing
from cyflash.inputs import above_zero, positive
from cyflash.measure import blas_threads
from cyflash.output import OBSERVED, add_json, check_files, figure_class
from cyflash.quant.diagnosis import (
    CAUSES,
    FP32,
    RUNGS,
    alternatives,
    cheapest_under,
    diagnose,
    exact_outputs,
    measure,
    parts_of,
)

__all__ = ["HISTOGRAMS", "add_arguments", "describe", "run"]

# What is shown of the values, and of which operand's scale.
HISTOGRAMS = {"q": "q", "k": "k", "k_centred": "k", "v": "v"}
DRAWN_PER_OCTAVE = 4
WORST = 10

# Commands, and what they do: shown by --help.
EXAMPLES = {
    "cyflash report scales.safetensors -o report.html": "beside the observations of `cyflash calibrate`",
    "cyflash report s.safetensors -o r.html --csv heads.csv --max-rel-l1 0.01": "a line for each head; a limit",
}
STATUS: dict[int, str] = {}


def add_arguments(parser):
    parser.add_argument("scales", type=Path, metavar="SCALES", help="the scales, a file of `cyflash calibrate`")
    parser.add_argument(
        "--observed", type=Path, metavar="FILE",
        help=f"what they were found from (default: the name of SCALES with {OBSERVED}, beside it)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE.html", help="the page to write (needs matplotlib)"
    )
    add_json(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write a line for each layer and head to FILE")
    parser.add_argument(
        "--max-rel-l1", type=above_zero, default=0.02, metavar="X",
        help="heads with a larger relative L1 error are named, with what brings them under it (default: 0.02)",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of every call (default: 1)")


def run(args):
    if args.output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{args.output}: expected a name that ends in .html")
    for path in (args.output, args.json, args.csv):
        check_files(path)
    figure_class("cyflash report")
    scales, calibrator, observed = _load(args.scales, args.observed)
    with blas_threads(args.threads):  # of the reference
        report = describe(scales, calibrator, max_rel_l1=args.max_rel_l1, num_threads=args.threads, progress=_progress)
    report |= {"scales": str(args.scales), "observed": str(observed)}

    from cyflash.report_page import page  # matplotlib, late

    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"Numbers: {args.json}")
    if args.csv:
        write_csv(report, args.csv)
        print(f"Table: {args.csv}")
    _write(args.output, page(report))
    print(report["verdict"])
    print(f"Page: {args.output}")
    return 0


def _load(path, observed):
    """(Scales, Calibrator, the latter's file)"""
    from cyflash.quant.calibrator import Calibrator
    from cyflash.quant.scales import Scales

    scales = Scales.load(path)
    observed = path.with_name(path.stem + OBSERVED) if observed is None else observed
    if not observed.is_file():
        raise FileNotFoundError(
            f"{observed}: no such file; name the observations that the scales were found from with --observed FILE "
            "(`cyflash calibrate` keeps them beside the scales, Calibrator.save writes them)"
        )
    return scales, Calibrator.load(observed), observed


def _write(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _progress(names):
    """The names, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(names, "measuring layers", console=console, disable=not console.is_terminal, transient=True)


# All numbers


def describe(scales, calibrator, *, max_rel_l1=0.02, num_threads=1, progress=lambda names: names):
    """Everything that the page shows; what `--json` writes.

    Parameters
    ----------
    scales : Scales
    calibrator : Calibrator
        With observations of the same layers.
    max_rel_l1 : float, default 0.02
        What a head's relative L1 error should not exceed.
    num_threads : int, default 1
        Of every call. On one thread times disturb each other least, and tiles are small.
    progress : function
        Given the layers' names, returns them to iterate over.

    Returns
    -------
    dict
        Of what JSON holds; report_page.py says what each number is.

    Raises
    ------
    ValueError
        When no layer of the scales was observed, or scales do not fit what was.
    """
    names = [name for name in scales if name in calibrator.layers]
    if not names:
        raise ValueError(
            f"no layer of the scales ({_some(scales)}) is among the observations ({_some(calibrator.layers)}): "
            "are they of the same calibration?"
        )
    layers = []
    for name in progress(names):
        try:
            layers.append(_layer(name, scales, calibrator, max_rel_l1, num_threads))
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    info = cyflash.cpu_info()
    heads = [(layer["layer"], head) for layer in layers for head in layer["heads"]]
    return {
        "cyflash": cyflash.__version__,
        "numpy": np.__version__,
        "machine": {
            "cpu": info["model"],
            "cores": info["cores"],
            "implementation": info["implementation"],
            "threads": num_threads,
        },
        "settings": scales.settings,
        "max_rel_l1": max_rel_l1,
        "rungs": RUNGS,
        "planned": any(layer["parts"] for layer in layers),
        "summary": _summary(layers, heads, max_rel_l1),
        "verdict": _verdict(heads, max_rel_l1),
        "front": _front(layers),
        "worst": [{"layer": name, **head} for name, head in _worst(heads)],
        "notes": _notes(scales, calibrator, layers),
        "layers": layers,
    }


def _layer(name, scales, calibrator, max_rel_l1, num_threads):
    """One layer: its heads, the rungs, the histograms."""
    layer, about = scales[name], scales.about.get(name) or {}
    training, held_out = calibrator.tiles(name)
    tiles = held_out or training
    heads, rungs, parts, error = [], [], None, None
    if tiles:
        exact = exact_outputs(tiles)
        diagnosis = diagnose(tiles, layer, exact=exact, num_threads=num_threads)
        error, heads = diagnosis["error"], diagnosis["heads"]
        rungs = measure(tiles, alternatives(layer, training or tiles), exact=exact, num_threads=num_threads)
        parts = _plan(layer, about, heads)
        for head in heads:
            head["fix"] = _fix(rungs, head, max_rel_l1)
    return {
        "layer": name,
        "measured_on": "held-out" if held_out else "training" if tiles else None,
        "tiles": {"training": len(training), "held_out": len(held_out)},
        "about": about,
        "error": error,
        "heads": heads,
        "rungs": rungs,
        "parts": parts,
        "histograms": _histograms(name, layer, calibrator, about, tiles),
    }


def _fix(rungs, head, max_rel_l1):
    """What a head needs: {"rung", "rel_l1", "time"}, rung "as it is" for nothing; None where nothing measured helps."""
    good = head["rel_l1"] <= max_rel_l1
    row = rungs[0] if good else cheapest_under(rungs, head["head"], max_rel_l1)
    return row and {"rung": row["rung"], "rel_l1": row["heads"][head["head"]]["rel_l1"], "time": row["time"]}


# The plan


def setting(layer):
    """How a LayerScales runs, in words."""
    if layer is None:
        return FP32
    scales = {name: getattr(layer, f"{name}_scale") for name in "qkv"}
    dynamic = [name.upper() for name, x in scales.items() if x is None and (name != "v" or layer.pv == "int8")]
    words = ["int8" if layer.pv == "int8" else f"int8 QK, {layer.pv} PV"]
    words += ["smooth-K"] if layer.k_mean is not None or layer.k_scale is None else []
    words += [f"{layer.fp32_sinks} fp32 sinks"] if layer.fp32_sinks else []
    words += [f"{', '.join(dynamic)} per token"] if dynamic else []
    return ", ".join(words)


def _rungs_of_parts(layer, about, Hk):
    """[(kv heads, what their rung is called, its time or None), ...]: as the plan says, else by what it does."""
    parts, said = parts_of(layer, Hk), about.get("parts") or []
    if len(said) != len(parts):
        said = [{}] * len(parts)
    return [
        (kv_heads, promised.get("rung") or setting(own), promised.get("time"))
        for (kv_heads, own), promised in zip(parts, said, strict=True)
    ]


def _plan(layer, about, heads):
    """Write the setting of each head, and return the plan of the layer: a dict for each part with the errors of its
    heads as measured; None without a plan."""
    parts = []
    for kv_heads, rung, cost in _rungs_of_parts(layer, about, heads[-1]["kv_head"] + 1):
        own = [head for head in heads if head["kv_head"] in kv_heads]
        for head in own:
            head["setting"] = rung
        parts.append(
            {
                "rung": rung,
                "kv_heads": list(kv_heads),
                "heads": [head["head"] for head in own],
                "rel_l1": max(head["rel_l1"] for head in own),
                "worst_row": max(head["worst_row"] for head in own),
                "time": cost,
            }
        )
    return parts if layer.parts is not None or about.get("parts") else None


# The histograms


def _histograms(name, layer, calibrator, about, tiles):
    """{part: count, max, bins to draw, the static scales that apply to it and the share that they saturate}."""
    Hk = about.get("kv_heads") or (tiles[0].k.shape[0] if tiles else None)
    H = about.get("heads") or (tiles[0].q.shape[0] if tiles else None)
    found = {}
    for part, operand in HISTOGRAMS.items():
        whole = calibrator.histogram(name, part)
        scales = {} if H is None else static_scales(layer, part, H, Hk)
        own = {head: calibrator.histogram(name, part, head) for head in scales}
        count = sum(x.count for x in own.values())
        saturated = sum(x.count * x.saturated(scales[head]) for head, x in own.items())
        edges, counts = drawn_bins(whole)
        found[part] = {
            "operand": operand,
            "count": whole.count,
            "max": whole.max,
            "quantised": "static" if scales else "dynamic" if Hk and _is_dynamic(layer, operand, Hk) else "no",
            "scale": [min(scales.values()), max(scales.values())] if scales else None,
            "saturated": saturated / count if count else None,
            "edges": edges.tolist(),
            "counts": counts.tolist(),
        }
    return found


def static_scales(layer, part, H, Hk):
    """{head: its static scale} of the heads whose values are quantised as the histogram `part` has them."""
    operand, scales = HISTOGRAMS[part], {}
    for kv_heads, own in parts_of(layer, Hk):
        scale = None if own is None else getattr(own, f"{operand}_scale")
        if scale is None:
            continue
        group = H // Hk if operand == "q" else 1
        heads = [head * group + n for head in kv_heads for n in range(group)]
        own_scales = _by_head(scale, len(heads), np.max)
        if operand == "k":
            centred = _by_head(0 if own.k_mean is None else own.k_mean, len(heads), np.any)  # 0: not smoothed
            kept = centred == (part == "k_centred")
        else:
            kept = np.ones(len(heads), bool)
        scales |= {head: float(x) for head, x, keep in zip(heads, own_scales, kept, strict=True) if keep}
    return scales


def _is_dynamic(layer, operand, Hk):
    """Whether any head finds the scale of this operand in the call."""
    layers = [own for _, own in parts_of(layer, Hk) if own is not None]
    return any(getattr(own, f"{operand}_scale") is None and (operand != "v" or own.pv == "int8") for own in layers)


def _by_head(x, heads, of):
    """One value for each head: of(its part of x), which is common to all or (heads, ...)."""
    x = np.asarray(x)
    values = of(x.reshape(x.shape[0], -1), axis=1) if x.ndim == 3 else of(x)
    return np.broadcast_to(values, heads)


def drawn_bins(histogram):
    """(edges, counts) in quarters of an octave, from the first that holds anything to the last."""
    filled = np.flatnonzero(histogram.counts)
    if not filled.size:
        return np.zeros(0), np.zeros(0, np.int64)
    first, last = filled[0], filled[-1]
    place = np.floor(np.log2(histogram.edges[first : last + 1]) * DRAWN_PER_OCTAVE + 1e-9).astype(np.int64)
    counts = np.bincount(place - place[0], weights=histogram.counts[first : last + 1]).astype(np.int64)
    return 2.0 ** (np.arange(place[0], place[0] + len(counts) + 1) / DRAWN_PER_OCTAVE), counts


# Over all layers


def _summary(layers, heads, max_rel_l1):
    measured = [layer for layer in layers if layer["error"]]
    return {
        "layers": len(layers),
        "heads": len(heads),
        "heads_over": sum(head["rel_l1"] > max_rel_l1 for _, head in heads),
        "observations": sum((layer["about"].get("observations") or 0) for layer in layers) or None,
        "values": sum(layer["histograms"][part]["count"] for layer in layers for part in "qkv"),
        "tiles": sum(layer["tiles"]["held_out"] or layer["tiles"]["training"] for layer in layers),
        "rel_l1": statistics.mean(layer["error"]["rel_l1"] for layer in measured) if measured else None,
        "worst_layer": max((layer["error"]["rel_l1"] for layer in measured), default=None),
        "worst_head": max((head["rel_l1"] for _, head in heads), default=None),
        "worst_row": max((head["worst_row"] for _, head in heads), default=None),
        "causes": {cause: sum(head["cause"] == cause for _, head in heads) for cause in CAUSES},
    }


CAUSE_IN_WORDS = {"qk": "the codes of Q and K", "p": "the codes of P", "v": "the codes of V", None: "float32 itself"}


def _verdict(heads, max_rel_l1):
    if not heads:
        return "Nothing could be measured: the observations keep no tiles of these layers."
    over = sum(head["rel_l1"] > max_rel_l1 for _, head in heads)
    (name, worst), *_ = _worst(heads)
    place = f"{name}, head {worst['head']}, has {100 * worst['rel_l1']:.2f} %, mainly from {_cause(worst)}"
    limit = f"{100 * max_rel_l1:g} % relative L1 error"
    if not over:
        those = "The only head is" if len(heads) == 1 else f"All {len(heads)} heads are"
        return f"{those} within {limit}: the worst, {place}."
    those = "1 head is" if over == 1 else f"{over} of {len(heads)} heads are"
    return f"{those} over {limit}: the worst, {place}."


def _cause(head):
    return CAUSE_IN_WORDS[head["cause"]]


def _worst(heads):
    return sorted(heads, key=lambda item: -item[1]["rel_l1"])[:WORST]


def _front(layers):
    """[{rung, mean relative L1 and worst row over the layers, median time}, ...]"""
    measured = [layer["rungs"] for layer in layers if layer["rungs"]]
    rows = []
    for own in zip(*measured, strict=True):
        rows.append(
            {
                "rung": own[0]["rung"],
                "rel_l1": statistics.mean(row["error"]["rel_l1"] for row in own),
                "worst_head": max(row["error"]["worst_head"] for row in own),
                "worst_row": max(row["error"]["worst_row"] for row in own),
                "time": statistics.median(row["time"] for row in own),
            }
        )
    return [row | {"best": not any(_beats(other, row) for other in rows)} for row in rows]


def _beats(row, other):
    return row["rel_l1"] < other["rel_l1"] and row["time"] < other["time"]


def _notes(scales, calibrator, layers):
    notes = []
    if missing := [name for name in scales if name not in calibrator.layers]:
        notes.append(f"Not observed, so not here: {_some(missing)}.")
    if other := [name for name in calibrator.layers if name not in scales]:
        notes.append(f"Observed, but without scales: {_some(other)}.")
    for where, text in (
        ("training", "have no tiles held out, so their errors are those on the training tiles, which flatter"),
        (None, "have no tiles, so no errors"),
    ):
        if names := [layer["layer"] for layer in layers if layer["measured_on"] == where]:
            notes.append(f"These layers {text}: {_some(names)}.")
    return notes


def _some(names, most=6):
    names = list(names)
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


# A line for each head

COLUMNS = (
    "layer", "head", "kv_head", "setting", "rel_l1", "worst_row", "cosine", "rmse", "max_abs", "qk", "p", "v", "cause",
    "saturated_q", "saturated_k", "saturated_v", "fix", "fix_rel_l1", "fix_time",
)  # fmt: skip


def write_csv(report, path):
    """Write a line for each layer and head; what does not apply is empty."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for layer in report["layers"]:
            for head in layer["heads"]:
                saturated = {f"saturated_{name}": x for name, x in head["saturated"].items()}
                fix = head["fix"] or {}
                fixes = {"fix": fix.get("rung"), "fix_rel_l1": fix.get("rel_l1"), "fix_time": fix.get("time")}
                writer.writerow({"layer": layer["layer"], **head, **saturated, **fixes})


