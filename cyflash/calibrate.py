"""`cyflash calibrate`: static int8 scales from captured activations.

    files -> observations, kept beside the output (observing.py) -> Scales, by a method or a plan -> the file, a table
"""

import json
import sys
from pathlib import Path

import cyflash
from cyflash.inputs import CONTENTS, add_input_options, given_options, positive
from cyflash.observing import How, Observations, identify, observe_files, renaming
from cyflash.output import OBSERVED, add_json, check_files, empty_table, few, fitting, progress_bar

METHODS = ("output", "max", "percentile", "mse", "octav", "entropy")
OBJECTIVES = ("rel_l1", "rmse", "worst_row")
SMOOTH = {"auto": "auto", "on": True, "off": False}
LEGEND = (
    "Scales: of the values, which saturate beyond 127 of them; low-high where heads differ; dynamic: found in each "
    "call, token by token. Errors: relative L1 against attention in float64, on the tiles that the scales were chosen "
    "on and on those held out; worst row: of the held-out ones."
)

# Commands, and what they do: shown by --help.
EXAMPLES = {
    "cyflash calibrate captures/*.safetensors -o scales.safetensors": "the scales that make the output's error least",
    "cyflash calibrate captures/*.npz -o s.safetensors --workers 4": "on four processes; run it again to go on",
    "cyflash calibrate *.npz -o s.safetensors --method percentile --granularity head": "no search; scales per head",
    "cyflash calibrate *.npz -o s.safetensors --plan --rel-l1 0.01": "for each head the cheapest that is good enough",
}
STATUS = {1: "a file was left out: it is named on stderr"}


def add_arguments(parser):
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=f".npz or .safetensors with {CONTENTS}")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="SCALES.safetensors",
                        help="where the scales go; what was observed is kept in SCALES.observed.safetensors beside it,"
                        " and a later run goes on from there: it reads only new files")  # fmt: skip
    parser.add_argument("--restart", action="store_true", help="forget what an earlier run observed")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes that read (default: 1)")
    add_json(parser)
    parser.add_argument(
        "--rename", action="append", type=renaming, default=[], metavar="OLD=NEW",
        help="replace the regular expression OLD in the layers' names by NEW, so that several observe the same layer; "
        "parted at the last =; may be repeated. '.*\\.(layer\\d+)=\\1' makes layer3 of story.layer3",
    )  # fmt: skip
    choice = parser.add_argument_group("choosing the scales", "another choice needs no second pass over the files")
    choice.add_argument("--method", choices=METHODS, help="default: output, the error of the attention's output itself")
    choice.add_argument("--objective", choices=OBJECTIVES, help="of output: what is made least (default: rel_l1)")
    choice.add_argument("--percentile", type=float, metavar="P",
                        help="of percentile: the share of values kept, in percent (default: 99.9999)")  # fmt: skip
    choice.add_argument("--plan", action="store_true",
                        help="for each kv head the cheapest of int8, its refinements and fp32 that meets a target")
    choice.add_argument("--rel-l1", type=float, metavar="X", help="of --plan: a head's relative L1 (default: 0.02)")
    choice.add_argument("--worst", type=float, metavar="X", help="of --plan: a head's worst row (default: 0.05)")
    observing = parser.add_argument_group("observing")
    observing.add_argument(
        "--granularity", type=_granularity, default="tensor", metavar="G",
        help="one scale per tensor or head, or token: left to the call; or three for q, k and v, as in head,head,token "
        "(default: tensor)",
    )  # fmt: skip
    observing.add_argument("--fp32-sinks", type=int, default=0, metavar="N", help="first keys in float32 (default: 0)")
    observing.add_argument("--smooth-k", choices=SMOOTH, default="auto", help="subtract the keys' mean (default: auto)")
    observing.add_argument("--nonfinite", choices=("raise", "ignore"), default="raise",
                           help="NaN, inf, tensors of zeros: leave out their file, or only them (default: raise)")
    observing.add_argument("--reservoir-mb", type=float, default=64, metavar="MB",
                           help="tiles of real activations kept for each layer (default: 64)")  # fmt: skip
    observing.add_argument("--seed", type=int, default=0, help="decides which tiles are kept (default: 0)")
    add_input_options(parser, "INPUT")


def run(args):
    choose = _chooser(args)
    paths = list(dict.fromkeys(args.inputs))
    observed_path = _checked_output(args.output, paths)
    for path in (args.output, args.json):
        check_files(path)
    how = How(
        {
            "granularity": args.granularity, "fp32_sinks": args.fp32_sinks, "smooth_k": SMOOTH[args.smooth_k],
            "reservoir_mb": args.reservoir_mb, "nonfinite": args.nonfinite, "seed": args.seed,
        },
        args.layout, given_options(args), tuple(args.rename),
    )  # fmt: skip
    observations = (Observations if args.restart else Observations.resume)(observed_path, how)
    with progress_bar() as progress:
        failed = _observe(paths, observations, args.workers, progress)
        calibrator = observations.calibrator
        if not calibrator.layers:
            raise ValueError(f"none of {_count(len(paths), 'file')} could be observed: there is nothing to calibrate")
        task = progress.add_task("choosing scales", total=len(calibrator.layers))
        scales = choose(calibrator, lambda name: progress.advance(task))
    scales.save(args.output)
    report = describe(scales, observations, failed)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    print(f"Scales: {args.output}\nObservations: {observed_path}")
    if args.json:
        print(f"Numbers: {args.json}")
    return 1 if failed else 0


# Arguments


def _granularity(text):
    parts = text.split(",")
    return parts[0] if len(parts) == 1 else parts


def _chooser(args):
    """(calibrator, progress) -> Scales, after checking that the options go together."""
    if args.plan:
        _refuse(args, "--plan", "method", "objective", "percentile")
        target = {name: value for name in ("rel_l1", "worst") if (value := getattr(args, name)) is not None}
        for name, value in target.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')}: expected a number above 0, got {value:g}")
        return lambda calibrator, progress: calibrator.plan(**target, progress=progress)
    method = args.method or "output"
    _refuse(args, "a run without --plan", "rel_l1", "worst")
    if method != "output":
        _refuse(args, f"--method {method}", "objective")
    if method != "percentile":
        _refuse(args, f"--method {method}", "percentile")
    if args.percentile is not None and not 0 < args.percentile <= 100:
        raise ValueError(f"--percentile: expected a number above 0 and up to 100, got {args.percentile:g}")
    options = {name: value for name in ("objective", "percentile") if (value := getattr(args, name)) is not None}
    return lambda calibrator, progress: calibrator.compute(method, **options, progress=progress)


def _refuse(args, where, *names):
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: has no effect in {where}")


def _checked_output(output, inputs):
    """Where the observations go; ValueError for an output that cannot be."""
    if output.suffix != ".safetensors":
        raise ValueError(f"-o: expected a name that ends in .safetensors, got {output}")
    observed = output.with_name(output.stem + OBSERVED)
    for path in inputs:
        for own in (output, observed):
            if path.resolve() == own.resolve():
                raise ValueError(f"-o: {own} would be written over, and it is an INPUT")
    return observed


# Observing


def _observe(paths, observations, workers, progress):
    """Observe the files that are not yet among the observations; {path: why} of those that could not be."""
    files, failed = {}, {}
    task = progress.add_task("reading files", total=len(paths))

    def leave_out(path, error):
        system = isinstance(error, OSError) and error.strerror
        text = " ".join((error.strerror.lower() if system else str(error)).split()) or type(error).__name__
        failed[str(path)] = text
        print(f"cyflash calibrate: left out: {text if str(path) in text else f'{path}: {text}'}", file=sys.stderr)

    for path in paths:
        try:
            files[path] = identify(path)
        except OSError as error:
            leave_out(path, error)
    if gone := [file["name"] for file in observations.files if file not in files.values()]:
        raise ValueError(
            f"{observations.path}: of the files that an earlier run observed {few(gone)} are not among INPUT, or have "
            "changed since; name all of them, pass --restart to observe anew, or another -o"
        )
    todo = {}
    for path, file in files.items():
        if file not in observations.files and file not in todo.values():
            todo[path] = file
    progress.update(task, advance=len(paths) - len(todo))
    for path, result in observe_files(list(todo), observations.how, workers):
        if isinstance(result, Exception):
            leave_out(path, result)
        else:
            try:
                observations.take(result, todo[path])
            except (ValueError, TypeError) as error:
                leave_out(path, error)
        progress.advance(task)
    return failed


# Showing


def describe(scales, observations, failed):
    """Everything that was chosen and why; what `--json` writes."""
    return {
        "cyflash": cyflash.__version__,
        "settings": scales.settings,
        "files": observations.files,
        "left_out": failed,
        "observed": observations.calibrator.summary(),
        "layers": {
            name: {
                "scales": {f"{operand}_scale": _numbers(layer, f"{operand}_scale") for operand in "qkv"},
                "k_mean": any(one.k_mean is not None for one in _parts(layer)),
                **scales.about[name],
            }
            for name, layer in scales.items()
        },
    }


def _parts(layer):
    return [layer] if layer.parts is None else [one for _, one in layer.parts if one is not None]


def _numbers(layer, field):
    """All static scales of one operand, over parts and heads."""
    arrays = [getattr(one, field) for one in _parts(layer)]
    return [float(x) for array in arrays if array is not None for x in array.ravel()]


def show(report):
    """Print one line per layer, and of a plan one per rung of each layer."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe: as wide as the table
        console = Console(highlight=False, width=1000)
    console.print(fitting(console, [_layer_table(report, "-"), _layer_table(report, "\n")]))
    console.print(f"\n[dim]{LEGEND}[/]", soft_wrap=not console.is_terminal)
    for line in _ignored(report["observed"]):
        console.print(Text(line), soft_wrap=not console.is_terminal)
    if any("parts" in layer for layer in report["layers"].values()):
        console.print()
        console.print(_plan_table(report))


def _ignored(observed):
    """A line for each layer where NaN, infinities or tensors of zeros were left out."""
    kinds = {"nonfinite": "not finite", "all_zero": "tensors of zeros"}
    for row in observed:
        counts = [f"{x}: {n} {what}" for kind, what in kinds.items() for x in "qkv" if (n := row[f"{x}_{kind}"])]
        if counts:
            yield f"Left out of {row['layer']}: {', '.join(counts)}"


def _layer_table(report, to):
    """to: what is between the least and the greatest scale."""
    from rich.text import Text

    table = empty_table()
    table.add_column("layer", overflow="fold")
    for header in ("heads", "seen", "q scale", "k scale", "v scale", "error", "held\nout", "worst\nrow"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, layer in report["layers"].items():
        heads, kv_heads = layer["heads"], layer["kv_heads"]
        error = {part: layer["error"][part] or {} for part in ("training", "held_out")}
        table.add_row(
            Text(name), f"{heads}" if heads == kv_heads else f"{heads}/{kv_heads}", str(layer["observations"]),
            *(_range(layer["scales"][f"{operand}_scale"], to) for operand in "qkv"),
            _error(error["training"].get("rel_l1")), _error(error["held_out"].get("rel_l1")),
            _error(error["held_out"].get("worst_row")),
        )  # fmt: skip
    return table


def _plan_table(report):
    from rich.text import Text

    table = empty_table()
    table.add_column("plan", overflow="fold")
    table.add_column("rung", overflow="fold")
    for header in ("kv heads", "worst\nerror", "worst\nrow", "time\n/fp32"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, layer in report["layers"].items():
        for i, part in enumerate(layer.get("parts", [])):
            table.add_row(
                Text("" if i else name), part["rung"], str(len(part["kv_heads"])), _error(part["rel_l1"]),
                _error(part["worst"]), f"{part['time']:.2f}",
            )  # fmt: skip
    return table


def _range(scales, to):
    if not scales:
        return "dynamic"
    low, high = f"{min(scales):.3g}", f"{max(scales):.3g}"
    return low if low == high else f"{low}{to}{high}"


def _error(error):
    return "-" if error is None else f"{error:.4f}"


def _count(number, noun):
    return f"{number} {noun}{'s' * (number != 1)}"
