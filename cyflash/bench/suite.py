"""`--suite`: one run that measures what users of cyflash ask about, as rows of one table.

Peers: one thread, long single heads and encoder batches. Everything else is cyflash against itself, both calls in one
process and in the same rounds.
"""

import math
from dataclasses import replace

import numpy as np

import cyflash
from cyflash import cpu
from cyflash.bench.cases import OPTIONS, Case
from cyflash.bench.race import Entry, Spread, run_race, team
from cyflash.bench.report import Bar, Row, title
from cyflash.bench.systems import SYSTEMS, Cyflash
from cyflash.measure import CallProcess

LONG = ((1, 1, 2048, 64), (1, 1, 4096, 64), (1, 1, 2048, 128), (1, 1, 4096, 128))
ENCODERS = (
    (32, 12, 96, 32),
    (8, 12, 128, 32),
    (32, 12, 128, 64),
    (16, 12, 384, 64),
    (8, 12, 512, 32),
    (8, 12, 512, 64),
)
SECOND_BUILD = "avx2"
LONGEST = 65536

PLAIN = Case((1, 4, 2048, 64))
ALONE = {name: replace(PLAIN, options=(name,)) for name in OPTIONS} | {"GQA, 4 heads on 1": replace(PLAIN, kv_heads=1)}
TOGETHER = replace(PLAIN, options=tuple(OPTIONS), kv_heads=1)
FULL = Case((1, 1, 4096, 64))
LONG_FULL = Case((1, 1, 16384, 64))
SMALL = Case((1, 1, 16, 64), reuse_out=False)
THREADED = (FULL, Case((8, 12, 128, 64)))


def run(outcome, systems, threads, environments, limit, progress):
    """Adds races, comparisons and rows to the outcome; `threads` are the counts asked for, one is always measured."""
    second = _second_build(outcome)
    environments = environments | {name: {"CYFLASH_ISA": SECOND_BUILD} for name in second}
    bar = Bar(progress, "suite", len(LONG) + len(ENCODERS) + 4 + len(THREADED) * (max(threads) > 1) + 2, limit)
    with team(systems | second, 1, environments) as (workers, failures):
        outcome.add_team(1, workers, failures)
        for shape in (*LONG, *ENCODERS):
            _against_peers(outcome, shape, workers, limit, bar)
        _against_itself(outcome, workers["cyflash"], limit, bar)
    if max(threads) > 1:
        _threads(outcome, max(threads), environments, limit, bar)
    else:
        outcome.rows.append(Row("two threads against one", None, "x", "one thread is available"))
    _memory(outcome, max(threads), environments, bar)


def _second_build(outcome):
    if SECOND_BUILD in cpu.runnable():
        return {f"cyflash ({SECOND_BUILD})": Cyflash}
    outcome.rows.append(Row(f"{SECOND_BUILD} build against torch", None, "x", f"{SECOND_BUILD} does not run here"))
    return {}


def _against_peers(outcome, shape, workers, limit, bar):
    case = Case(shape)
    entries = [Entry(x, worker, case) for x, worker in workers.items() if shape in LONG or x in SYSTEMS]
    result = run_race(entries, limit, workers["cyflash"], bar.next(title(case)))
    outcome.races.append(result)
    if "cyflash" not in result.timings:
        return
    where = f"1 thread {title(case)}"
    if peers := result.peers():
        note = f"{peers[0]}: {result.timings[peers[0]].variant}"
        outcome.rows.append(Row(f"{where}: against the best peer", result.ratio(peers[0], "cyflash"), "x", note))
    if shape in LONG:
        for label in (x for x in result.timings if x.startswith("cyflash")):
            if "torch" in result.timings:
                outcome.rows.append(Row(f"{where}: {label} against torch", result.ratio("torch", label), "x"))
        outcome.rows.append(Row(f"{where}: share of the FMA peak", result.fma_share("cyflash"), "of peak"))


def _against_itself(outcome, worker, limit, bar):
    """Comparisons in one process, with one thread."""
    calls = {"plain": PLAIN, **ALONE, "all of them": TOGETHER}
    result = _compare(outcome, worker, calls, limit, bar.next("options"))
    for label in list(calls)[1:]:
        outcome.add_ratio(result, f"{title(PLAIN)} with {label}: speed against the plain call", "plain", label)
    calls = {"full": FULL, "causal": replace(FULL, causal=True)}
    result = _compare(outcome, worker, calls, limit, bar.next("causal"))
    outcome.add_ratio(result, f"{title(FULL)} causal against not causal", "full", "causal")
    calls = {"full": LONG_FULL, "window": replace(LONG_FULL, window=(256, 0))}
    result = _compare(outcome, worker, calls, limit, bar.next("window"))
    outcome.add_ratio(result, f"{title(LONG_FULL)} window (256, 0) against full", "full", "window")
    result = _compare(outcome, worker, {"small": SMALL}, limit, bar.next("small call"))
    if "small" in result.timings:
        outcome.rows.append(Row(f"{title(SMALL)}: one call", result.time("small").scaled(1e6), "us"))


def _threads(outcome, threads, environments, limit, bar):
    with team({"cyflash": Cyflash}, threads, environments) as (workers, failures):
        outcome.add_team(threads, workers, failures)
        for case in THREADED:
            calls = {f"{count} threads": replace(case, num_threads=count) for count in (1, threads)}
            result = _compare(outcome, workers["cyflash"], calls, limit, bar.next(f"threads {title(case)}"))
            outcome.add_ratio(result, f"{title(case)} {threads} threads against one", *calls)


def _memory(outcome, threads, environments, bar):
    """Each in a process that has done nothing else."""
    for bias in (False, True):
        on_round = bar.next("memory")
        what = f"extra memory, L={LONGEST}, {'bias of broadcast rows' if bias else 'no bias'}, {threads} threads"
        isa = environments["cyflash"].get("CYFLASH_ISA")
        try:
            target = f"{__name__}:prepare_long_call"
            with CallProcess(target, L=LONGEST, bias=bias, threads=threads, isa=isa) as process:
                memory = process.memory
            spread = Spread(memory.extra / 1e6)
            note = "peak resident set" if memory.reset else "a lower bound: the peak cannot be reset here"
        except (MemoryError, RuntimeError) as error:
            spread, note = None, str(error)
        on_round(math.inf, math.inf)
        outcome.rows.append(Row(what, spread, "MB", note))


def prepare_long_call(L, bias, threads, isa):
    """A call on (1, 1, L, 64) for `CallProcess`, which makes it, the first of its process: inputs and output are ready.

    `bias` adds one row of L that stands for L x L.
    """
    cyflash.set_implementation(isa)
    rng = np.random.default_rng(0)
    q, k, v, out = (rng.standard_normal((1, 1, L, 64), dtype=np.float32) for _ in range(4))
    keywords = {"bias": np.broadcast_to(rng.standard_normal(L, dtype=np.float32), (L, L))} if bias else {}

    def call():
        cyflash.flash_attention(q, k, v, out=out, num_threads=threads, **keywords)

    return call


def _compare(outcome, worker, calls, limit, on_round):
    result = run_race([Entry(label, worker, case) for label, case in calls.items()], limit, on_round=on_round)
    outcome.comparisons.append(result)
    return result
