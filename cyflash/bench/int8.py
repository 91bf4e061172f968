"""`--int8`: one run that measures what int8 attention gains, as rows of one table.

Peers and every way to ask for int8: one thread, long single heads. Options, builds and threads: cyflash against itself.
"codes": q, k and v come quantised, per token with smooth-K; "float in": as float32, with all defaults. A ratio "vs own
fp32" is between two calls of one process, in the same rounds, with the same inputs.
"""

from dataclasses import replace

from cyflash import cpu
from cyflash.bench.cases import Case, Int8
from cyflash.bench.race import Entry, run_race, team
from cyflash.bench.report import Bar, Row, title
from cyflash.bench.systems import INT8_SYSTEMS, Cyflash

SHAPES = ((1, 1, 2048, 64), (1, 1, 4096, 64), (1, 1, 2048, 128), (1, 1, 4096, 128))
TENSOR = Int8("tensor", smooth_k=False, quantised=True)
TOKEN = Int8("token", smooth_k=True, quantised=True)
WAYS = {
    "cyflash int8, codes per tensor": TENSOR,
    "cyflash int8, codes per token": TOKEN,
    "cyflash int8, float in": Int8(),
    "cyflash int8, codes, bf16 PV": replace(TOKEN, pv="bf16"),
    "cyflash int8, float in, bf16 PV": Int8(pv="bf16"),
}

PLAIN = tuple(Case((1, 4, 2048, D)) for D in (64, 128))
OPTIONS = {
    "causal": {"causal": True},
    "window (256, 0)": {"window": (256, 0)},
    "GQA 4:1": {"kv_heads": 1},
    "float bias": {"options": ("float bias",)},
    "bool mask": {"options": ("bool mask",)},
}
BUILDS = (Case((1, 1, 2048, 64)), Case((1, 1, 2048, 128)))
THREADED = (Case((1, 1, 4096, 64)), Case((8, 12, 128, 64)))
ENDS = {"codes per tensor": TENSOR, "float in": Int8()}


def run(outcome, systems, threads, environments, limit, progress):
    """Adds races, comparisons and rows to the outcome; `threads` are the counts asked for, one is always measured."""
    builds = cpu.runnable()
    races = len(SHAPES) + len(PLAIN) + len(BUILDS) * len(builds) + len(THREADED) * (max(threads) > 1)
    bar = Bar(progress, "int8", races, limit)
    with team(systems, 1, environments) as (workers, failures):
        outcome.add_team(1, workers, failures)
        for shape in SHAPES:
            _against_peers(outcome, Case(shape), workers, limit, bar)
        for case in PLAIN:
            _with_options(outcome, case, workers["cyflash"], limit, bar)
    for name in builds:
        _build(outcome, name, limit, bar)
    if max(threads) > 1:
        _threads(outcome, max(threads), environments, limit, bar)
    else:
        outcome.rows.append(Row("two threads vs one", None, "x", "one thread is available"))


def _against_peers(outcome, case, workers, limit, bar):
    entries = [Entry(name, worker, case) for name, worker in workers.items()]
    entries += [Entry(label, workers["cyflash"], replace(case, int8=int8)) for label, int8 in WAYS.items()]
    result = run_race(entries, limit, workers["cyflash"], bar.next(title(case)), dots=True)
    outcome.int8.append(result)
    tensor = next(iter(WAYS))
    for label in WAYS:
        outcome.add_ratio(result, f"{title(case)} {_short(label)}: vs own fp32", "cyflash", label)
    for peer in INT8_SYSTEMS:
        if peer != "cyflash":
            what = f"{title(case)} {_short(tensor)}: vs {peer}"
            outcome.add_ratio(result, what, peer, tensor, absent=outcome.skipped.get(peer, "it could not be started"))
    if tensor in result.timings:
        share = result.dot_share(tensor)
        outcome.rows.append(Row(f"{title(case)} {_short(tensor)}: share of the int8 peak", share, "of peak"))


def _with_options(outcome, case, worker, limit, bar):
    """Every option, in fp32 and int8."""
    ends = {"codes per token": TOKEN, "float in": Int8()}
    entries = []
    for option, change in OPTIONS.items():
        asked = replace(case, **change)
        entries.append(Entry(option, worker, asked))
        entries += [Entry(f"{option}, {end}", worker, replace(asked, int8=int8)) for end, int8 in ends.items()]
    result = run_race(entries, limit, on_round=bar.next(f"options {title(case)}"))
    outcome.comparisons.append(result)
    for option in OPTIONS:
        for end in ends:
            what = f"{title(case)} {option}, {end}: vs own fp32"
            outcome.add_ratio(result, what, option, f"{option}, {end}")


def _build(outcome, name, limit, bar):
    """A SIMD build, int8 against its own fp32."""
    label = f"cyflash ({name})"
    with team({label: Cyflash}, 1, {label: {"CYFLASH_ISA": name}}) as (workers, failures):
        outcome.add_team(1, workers, failures)
        for case in BUILDS:
            on_round = bar.next(f"{name} {title(case)}")
            if label not in workers:
                continue
            entries = [Entry(f"{name} fp32", workers[label], case)]
            entries += [
                Entry(f"{name} {end}", workers[label], replace(case, int8=int8)) for end, int8 in ENDS.items()
            ]
            result = run_race(entries, limit, on_round=on_round)
            outcome.comparisons.append(result)
            for end in ENDS:
                what = f"{title(case)} {name}, {end}: vs own fp32"
                outcome.add_ratio(result, what, f"{name} fp32", f"{name} {end}")


def _threads(outcome, threads, environments, limit, bar):
    with team({"cyflash": Cyflash}, threads, environments) as (workers, failures):
        outcome.add_team(threads, workers, failures)
        for case in THREADED:
            entries = [
                Entry(f"{end}, {count}", workers["cyflash"], replace(case, int8=int8, num_threads=count))
                for end, int8 in ENDS.items()
                for count in (1, threads)
            ]
            result = run_race(entries, limit, on_round=bar.next(f"threads {title(case)}"))
            outcome.comparisons.append(result)
            for end in ENDS:
                what = f"{title(case)} {end}: {threads} threads vs one"
                outcome.add_ratio(result, what, f"{end}, 1", f"{end}, {threads}")


def _short(label):
    return label.removeprefix("cyflash int8, ")
