"""`cyflash check`: whether static scales keep the error of the attention within limits, on captured activations.

    scales, files -> one row per layer of each file: int8 with these scales against attention in float64 -> exit status
"""

import json
from pathlib import Path

import cyflash
from cyflash import flash_attention_int8, reference
from cyflash.capture import load_capture
from cyflash.inputs import CONTENTS, above_zero, add_input_options, given_options
from cyflash.observing import renamed, renaming
from cyflash.output import add_json, check_files, empty_table, few, progress_bar
from cyflash.quant import Scales, compare

LEGEND = (
    "Errors: relative L1 of the output against attention in float64, of all, of the worst head and of the worst row, a "
    "row's over at least the mean row of its head."
)

# Commands, and what they do: shown by --help.
EXAMPLES = {
    "cyflash check scales.safetensors --data other.safetensors": "errors of each layer; status 1 above 0.02",
    "cyflash check s.safetensors --data *.npz --max-rel-l1 0.01 --max-worst-row 0.1": "stricter",
    "cyflash check s.safetensors --data x.npz --json - | jq .ok": "for another program",
}
STATUS = {1: "a layer is above a limit"}


def add_arguments(parser):
    parser.add_argument("scales", type=Path, metavar="SCALES", help="a file of `cyflash calibrate` or Scales.save")
    parser.add_argument("--data", nargs="+", type=Path, required=True, metavar="FILE",
                        help=f".npz or .safetensors with {CONTENTS}; other ones than the scales were chosen on")
    parser.add_argument("--max-rel-l1", type=above_zero, default=0.02, metavar="X",
                        help="largest relative L1 error of a layer (default: 0.02)")  # fmt: skip
    parser.add_argument("--max-worst-row", type=above_zero, metavar="X", help="largest error of a row (default: none)")
    parser.add_argument(
        "--rename", action="append", type=renaming, default=[], metavar="OLD=NEW",
        help="as in `cyflash calibrate`: from the names of FILE's layers to those of SCALES",
    )  # fmt: skip
    add_json(parser)
    add_input_options(parser)


def run(args):
    check_files(args.json)
    scales = Scales.load(args.scales)
    captures = [load_capture(path, args.layout) for path in dict.fromkeys(args.data)]
    chosen = [(capture, name, _scales_of(scales, args, capture, name)) for capture in captures for name in capture]
    limits = {"rel_l1": args.max_rel_l1, "worst_row": args.max_worst_row}
    rows = measure(chosen, given_options(args), limits, several=len(captures) > 1)
    used = {row["scales"] for row in rows}
    report = {
        "cyflash": cyflash.__version__,
        "scales": str(args.scales),
        "limits": limits,
        "layers": rows,
        "unchecked": [name for name in scales if name not in used],
        "ok": all(row["ok"] for row in rows),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    if args.json:
        print(f"Numbers: {args.json}")
    return 0 if report["ok"] else 1


def _scales_of(scales, args, capture, name):
    """(name of the scales, LayerScales, what is said about them) of a layer; one that is not there is an error, never a
    scale of 1."""
    wanted = renamed(name, args.rename)
    try:
        return wanted, scales[wanted], scales.about.get(wanted, {})
    except KeyError as error:
        asked = "" if wanted == name else f", renamed {wanted!r},"
        raise ValueError(
            f"{capture.path}: layer {name!r}{asked} has no scales in {args.scales}: {error.args[0]}; --rename OLD=NEW "
            "maps names"
        ) from None


# Measuring


def measure(chosen, given, limits, several):
    """One dict per layer: its errors and whether they are within the limits."""
    rows = []
    with progress_bar() as progress:
        task = progress.add_task("", total=len(chosen))
        for capture, name, (wanted, scales, about) in chosen:
            label = f"{capture.path.stem}: {name}" if several else name
            progress.update(task, description=label, refresh=True)
            layer, options = capture[name], capture.options | given
            try:
                _require_sizes(layer, about)
                output = flash_attention_int8(*layer, quant=scales, **options)
                error = compare(output, reference.attention(*layer, **options))._asdict()
            except (ValueError, TypeError) as problem:
                raise type(problem)(f"{capture.path}: layer {name!r}: {problem}") from None
            ok = all(limit is None or error[measure] <= limit for measure, limit in limits.items())
            rows.append({"file": str(capture.path), "layer": name, "label": label, "scales": wanted, **error, "ok": ok})
            progress.advance(task)
    return rows


def _require_sizes(layer, about):
    """Raise unless heads and channels are those that the scales were found for."""
    q, k, v = (x if x.ndim > 2 else x[None] for x in layer)
    sizes = {"heads": q.shape[-3], "kv_heads": k.shape[-3], "head_dim": q.shape[-1], "v_head_dim": v.shape[-1]}
    for size, got in sizes.items():
        if about.get(size, got) != got:
            raise ValueError(f"{size}: expected {about[size]}, as of the scales, got {got}")


# Showing


def show(report):
    """Print one line per layer, and what was not checked."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe: as wide as the table
        console = Console(highlight=False, width=1000)
    limits = report["limits"]
    table = empty_table()
    table.add_column("layer", overflow="fold")
    for header in ("relative L1", "worst head", "worst row", "limit", "ok"):
        table.add_column(header, justify="right", no_wrap=True)
    limit = f"{limits['rel_l1']:.4g}"
    if limits["worst_row"] is not None:
        limit += f", row {limits['worst_row']:.4g}"
    for row in report["layers"]:
        cells = (_shown(row[name], limits.get(name)) for name in ("rel_l1", "worst_head", "worst_row"))
        table.add_row(Text(row["label"]), *cells, limit, "yes" if row["ok"] else Text("NO", style="bold red"))
    console.print(table)
    failed, rows = sum(not row["ok"] for row in report["layers"]), len(report["layers"])
    lines = [f"{failed} of {rows} above the limit" if failed else f"all {rows} within the limit"]
    if report["unchecked"]:
        lines.append(f"not checked, without data: {few(report['unchecked'])}")
    console.print()
    for line in (*lines, LEGEND):
        console.print(Text(line, style="dim" if line is LEGEND else ""), soft_wrap=not console.is_terminal)


def _shown(error, limit):
    from rich.text import Text

    return Text(f"{error:.4f}", style="" if limit is None or error <= limit else "bold red")
