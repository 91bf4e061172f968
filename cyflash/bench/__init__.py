"""`cyflash bench`: cyflash against NumPy and the installed peers, checked before they are timed.

    cases.py     what is asked: shape, options, inputs from a seed, work, float64 reference
    systems.py   who is asked: one class per system
    worker.py    the process of one system: prepare, count threads, timed turns
    race.py      starts the workers, checks them, times them in turns; ratios of medians with their spread
    suite.py     `--suite`: the fixed list of comparisons in fp32
    int8.py      `--int8`: the same of int8 with fp32, bfloat16 and itself
    decode.py    `--decode`: caches, ragged batches and 16 bits; its own decode_cases.py and decode_systems.py
    gpu.py       `--gpu`: kernels of the GPU beside torch's and Triton's; its own gpu_systems.py and gpu_worker.py;
                 gpu_triton.py: a peer in Triton
    lengths.py   `--lengths`: all of these at many lengths
    models.py    `--transformers`: models beside torch's attention; models_cases.py, models_systems.py, sentences.py
    report.py    progress, tables, JSON, plot
    page.py      `--html`: a page of plots, by page_figures.py and page.html

Times are wall-clock seconds of one call with inputs, compiled models and threads ready. A ratio is the median time of a
peer over that of cyflash in the same rounds; its interval is a 95 % bootstrap over rounds. GFLOP/s count
2 (D + Dv) x visible pairs (`cyflash.flops`), so skipped work and padding raise no rate.
"""

import argparse
import sys
from pathlib import Path

from cyflash import cpu_info, set_implementation
from cyflash.bench import decode, gpu, int8, lengths, models, report, suite
from cyflash.bench.cases import Case
from cyflash.bench.decode_systems import DECODE_SYSTEMS
from cyflash.bench.models_systems import MODELS_SYSTEMS
from cyflash.bench.race import Entry, Limit, SystemFailed, run_race, team
from cyflash.bench.systems import INT8_SYSTEMS, SYSTEMS
from cyflash.files import replacing
from cyflash.output import add_json, check_files, figure_class

SHAPES = (
    (1, 1, 2048, 64),
    (1, 1, 4096, 64),
    (1, 1, 4096, 128),
    (8, 12, 128, 32),
    (32, 12, 128, 64),
    (16, 12, 384, 64),
    (8, 12, 512, 64),
)


LISTS = {
    "suite": (suite, SYSTEMS), "int8": (int8, INT8_SYSTEMS), "decode": (decode, DECODE_SYSTEMS),
    "lengths": (lengths, lengths.ALL_SYSTEMS), "transformers": (models, MODELS_SYSTEMS),
}  # fmt: skip

# Commands, and what they do: shown by --help.
EXAMPLES = {
    "cyflash bench": "speed beside the peers that are installed, on common shapes",
    "cyflash bench --shapes 1,8,4096,64 --threads 1 2 --causal --plot out.png": "a shape of your own",
    "cyflash bench --html speed.html": "plots: speed against length, peers, accuracy",
    "cyflash bench --suite --json fp32.json": "all that the documents say in fp32; --int8, --decode: the same of these",
    "cyflash bench --transformers": "models of transformers beside torch's own attention",
    "cyflash bench --systems torch --isa avx2 --rounds 20": "only torch, against the build for AVX2",
}
STATUS = {1: "a system failed its checks: it is named, the others are measured"}


def add_arguments(parser):
    """Adds the options of `cyflash bench` to an argparse parser."""
    peers = ", ".join(name for name in SYSTEMS if name != "cyflash")
    int8_peers = "with --int8 of " + ", ".join(name for name in INT8_SYSTEMS if name != "cyflash")
    int8_peers += "; --decode, --transformers: torch"
    add = parser.add_argument
    add("--shapes", nargs="+", type=_shape, metavar="B,H,L,D", help="L queries on L keys (default: 7 common shapes)")
    add("--causal", action="store_true", help="causal attention; only visible pairs count as work")
    add("--threads", nargs="+", type=int, metavar="N", help="thread counts (default: 1, and all there are)")
    add("--systems", nargs="+", metavar="NAME", help=f"peers, of {peers} (default: those installed); {int8_peers}")
    add("--isa", metavar="NAME", help="the SIMD build of cyflash, such as avx2 (default: the best that runs)")
    add("--seconds", type=float, default=5.0, help="for each shape, but at least 7 rounds (default: %(default)s)")
    add("--rounds", type=int, metavar="N", help="exactly N rounds for each shape, instead of --seconds")
    lists = parser.add_mutually_exclusive_group()
    lists.add_argument(
        "--suite", action="store_true", help="a fixed list: peers, options, threads, builds, memory, small call"
    )
    lists.add_argument(
        "--int8", action="store_true", help="a fixed list: int8 against own fp32 and peers, options, builds, threads"
    )
    lists.add_argument(
        "--decode", action="store_true", help="a fixed list: KV caches, torch, speed of memory, ragged batches, bf16"
    )
    lists.add_argument(
        "--lengths", action="store_true", help="a fixed list: fp32, int8 and peers at lengths from 128 to 8192"
    )
    lists.add_argument(
        "--transformers", action="store_true", help="a fixed list: models of transformers beside torch's attention"
    )
    lists.add_argument(
        "--gpu", action="store_true", help="a fixed list on the GPU: cyflash beside torch's flash, cuDNN and Triton"
    )
    add_json(parser)
    add("--plot", type=Path, metavar="FILE", help="draw the rates of all systems into FILE (needs matplotlib)")
    add("--html", type=Path, metavar="FILE.html", help="draw a page: speed against length, peers and accuracy, of all "
        "that is measured; without a list or --shapes that of --lengths (needs matplotlib)")  # fmt: skip


def run(args):
    """Runs the command.

    Parameters
    ----------
    args : argparse.Namespace
        As a parser with `add_arguments` makes it.

    Returns
    -------
    int
        0; 1 if a system failed its checks: it is named, the others are measured.

    Raises
    ------
    ValueError
        For an argument that cannot be met; nothing has been measured then.

    Examples
    --------
    >>> import argparse
    >>> from cyflash import bench
    >>> parser = argparse.ArgumentParser()
    >>> bench.add_arguments(parser)
    >>> args = parser.parse_args("--shapes 1,2,64,16 --threads 1 --systems numpy --rounds 3".split())
    >>> bench.run(args)  # doctest: +SKIP
    0
    """
    if args.gpu:
        if args.html:
            raise ValueError("--html: is not for --gpu; leave out one of them")
        return gpu.run(args)
    if args.html:
        _check_page(args.html)
        args.lengths = args.lengths or not (args.shapes or args.causal or any(getattr(args, name) for name in LISTS))
    chosen = next((name for name in LISTS if getattr(args, name)), None)
    fixed_list, known = LISTS.get(chosen, (None, SYSTEMS))
    systems, skipped = _systems(args.systems, known)
    threads = _thread_counts(args.threads)
    environments = {"cyflash": _build(args.isa)}
    limit = _limit(args)
    check_files(args.json, args.plot)
    if chosen and (args.shapes or args.causal):
        raise ValueError(f"--{chosen} measures a fixed list of shapes; leave out --shapes and --causal")
    outcome = report.Outcome(_options(args), skipped)
    try:
        with report.progress() as progress:
            if fixed_list:
                fixed_list.run(outcome, systems, threads, environments, limit, progress)
            else:
                for count in threads:
                    _peers(outcome, args, systems, count, environments, limit, progress)
    except SystemFailed as error:  # cyflash itself: nothing is left to compare
        print(f"cyflash bench: {error}", file=sys.stderr)
        return 1
    if args.json:  # first, so that nothing is lost
        report.write_json(outcome, args.json)
    report.show(outcome)
    if args.plot:
        report.plot(outcome, args.plot)
    if args.html:
        from cyflash.bench.page import page  # matplotlib, late

        with replacing(args.html) as temporary:
            temporary.write_text(page(outcome), encoding="utf-8")
        print(f"Page: {args.html}")
    return 1 if outcome.all_failures() else 0


def _check_page(path):
    """Say before measuring that a page cannot be written."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{path}: expected a name that ends in .html")
    check_files(path)
    figure_class("--html")


def _peers(outcome, args, systems, threads, environments, limit, progress):
    """All systems on all shapes with one thread count."""
    shapes = args.shapes or SHAPES
    bar = report.Bar(progress, f"{threads} thread{'s' * (threads > 1)}", len(shapes), limit)
    with team(systems, threads, environments) as (workers, failures):
        outcome.add_team(threads, workers, failures)
        for shape in shapes:
            case = Case(shape, causal=args.causal)
            entries = [Entry(name, worker, case) for name, worker in workers.items()]
            outcome.races.append(run_race(entries, limit, workers["cyflash"], bar.next(report.title(case))))


def _shape(text):
    try:
        shape = tuple(int(x) for x in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected B,H,L,D: four positive integers such as 1,8,512,64; got {text!r}")
    return shape


def _systems(names, known):
    """{name: class} of cyflash and the peers that can run, and {name: why} of those that are left out."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"--systems: expected names of {', '.join(known)}; got {name!r}")
    skipped = {}
    for name, system in known.items():
        if name != "cyflash" and names is not None and name not in names:
            skipped[name] = "not among --systems"
        elif reason := system.missing():
            skipped[name] = reason
    return {name: system for name, system in known.items() if name not in skipped}, skipped


def _thread_counts(asked):
    available = cpu_info()["threads"]
    for count in asked or ():
        if not 1 <= count <= available:
            raise ValueError(f"--threads: expected 1 to {available}, what is available here; got {count}")
    return sorted(set(asked or (1, available)))


def _build(isa):
    """The environment that makes the worker of cyflash use this build."""
    if isa is None:
        return {}
    with set_implementation(isa):  # raises for a build that is unknown or does not run here
        return {"CYFLASH_ISA": isa}


def _limit(args):
    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"--rounds: expected 1 or more; got {args.rounds}")
    if not args.seconds > 0:
        raise ValueError(f"--seconds: expected a time above 0; got {args.seconds}")
    return Limit(args.seconds, args.rounds)


def _options(args):
    """The arguments as the report keeps them."""
    names = ("shapes", "causal", "threads", "systems", "isa", "seconds", "rounds", *LISTS)
    return {name: getattr(args, name) for name in names}
