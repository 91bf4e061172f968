"""`--decode`: one run that measures what serving asks of cyflash, as a table of caches and rows of another.

Caches: one query of each head to a full cache, beside torch and the speed at which the same bytes can be read. The rest
is cyflash against itself: grouped heads, a long row, appends, ragged batches, pages, bfloat16. Calls that are compared
take turns in the same rounds.
"""

import importlib.util
from dataclasses import replace

import numpy as np

from cyflash.bench.cases import Case
from cyflash.bench.decode_cases import Append, Decode, Ragged, Read
from cyflash.bench.decode_systems import filled_cache
from cyflash.bench.race import Entry, Spread, run_race, team
from cyflash.bench.report import Bar, Row, title
from cyflash.bench.systems import Cyflash

CACHES = tuple(Decode((keys,), 32, 32, 128) for keys in (8192, 16384, 32768))
GROUPED = Decode((16384,), 32, 8, 128)
DTYPES = {"cyflash": "float32", "cyflash bf16": "bfloat16", "cyflash fp16": "float16", "cyflash int8": "int8"}
READ = {"reading fp32": "cyflash", "reading int8": "cyflash int8"}
LONG_ROW = Decode((262144,), 1, 1, 128)
APPENDED = Decode((1025,) * 8, 8, 8, 128)
UNLIKE = Decode((8192, 6144, 4097, 3000, 2048, 1024, 500, 77), 32, 8, 128)
PAGE_SIZES = (16, 64, 256)
HALF = (Case((1, 8, 4096, 64)), Case((1, 8, 4096, 128)))
FORMATS = {"fp32": "float32", "int8": "int8"}
BOTH = {"fp32": "float32", "bf16": "bfloat16"}


def mixed_lengths(n, least, most):
    """n lengths, log-uniform."""
    logs = np.random.default_rng(0).uniform(np.log(least), np.log(most), n)
    lengths = np.exp(logs).round().astype(int).tolist()
    lengths[:2] = least, most
    return tuple(lengths)


LENGTHS = mixed_lengths(64, 16, 4096)
RAGGED = (Ragged(LENGTHS, 8, 64), Ragged(LENGTHS, 8, 64, queries="last"))


def run(outcome, systems, threads, environments, limit, progress):
    """Adds races, comparisons and rows to the outcome. `threads`: the most of them is what all calls but those that
    are said to be on one use."""
    most, bfloat16 = max(threads), importlib.util.find_spec("ml_dtypes") is not None
    races = len(CACHES) + 1 + (most > 1) + 1 + 2 * len(RAGGED) + len(FORMATS) + bfloat16
    bar = Bar(progress, "decode", races, limit)
    dtypes = {label: dtype for label, dtype in DTYPES.items() if bfloat16 or dtype != "bfloat16"}
    with team(systems, most, environments) as (workers, failures):
        outcome.add_team(most, workers, failures)
        for case in (*CACHES, GROUPED):
            _caches(outcome, case, workers, dtypes, limit, bar)
        worker = workers["cyflash"]
        _long_row(outcome, worker, most, limit, bar)
        _append(outcome, worker, limit, bar)
        for case in RAGGED:
            _ragged(outcome, case, worker, limit, bar)
        for name, dtype in FORMATS.items():
            _paged(outcome, replace(UNLIKE, dtype=dtype), name, worker, limit, bar)
    _bytes(outcome, dtypes)
    if bfloat16:
        _bfloat16(outcome, environments, limit, bar)
    else:
        outcome.rows.append(Row("bfloat16 against fp32", None, "x", "ml_dtypes not installed"))


def _caches(outcome, case, workers, dtypes, limit, bar):
    """Every dtype of cache, reading, and torch."""
    own = workers["cyflash"]
    entries = [Entry(label, own, replace(case, dtype=dtype)) for label, dtype in dtypes.items()]
    entries += [Entry(label, own, Read(replace(case, dtype=dtypes[of]))) for label, of in READ.items()]
    entries += [Entry(name, worker, case) for name, worker in workers.items() if name != "cyflash"]
    result = run_race(entries, limit, on_round=bar.next(title(case)))
    outcome.caches.append(result)
    for label, of in READ.items():
        outcome.add_ratio(result, f"{title(case)}, {_name(of)} cache: vs reading it", label, of)
    absent = outcome.skipped.get("torch", "it could not be started")
    outcome.add_ratio(result, f"{title(case)}, fp32 cache: vs torch", "torch", "cyflash", absent=absent)
    for label in list(dtypes)[1:]:
        what = f"{title(case)}, {_name(label)} cache: vs fp32 cache"
        outcome.add_ratio(result, what, "cyflash", label)


def _long_row(outcome, worker, threads, limit, bar):
    """Both counts of threads, beside what reading gains by them."""
    if threads == 1:
        outcome.rows.append(Row(f"{title(LONG_ROW)}: two threads vs one", None, "x", "one thread is available"))
        return
    cases = {f"{name} cache": replace(LONG_ROW, dtype=dtype) for name, dtype in FORMATS.items()}
    ways = cases | {f"reading the {name}": Read(case) for name, case in cases.items()}
    calls = {f"{name}, {count}": _on(case, count) for name, case in ways.items() for count in (1, threads)}
    result = _compare(outcome, worker, calls, limit, bar.next(title(LONG_ROW)))
    for name in ways:
        what = f"{title(LONG_ROW)}, {name}: {threads} threads vs one"
        outcome.add_ratio(result, what, f"{name}, 1", f"{name}, {threads}")


def _on(case, threads):
    """The case with a thread count of its own."""
    if isinstance(case, Read):
        return replace(case, cache=_on(case.cache, threads))
    return replace(case, num_threads=threads)


def _append(outcome, worker, limit, bar):
    calls = {name: Append(replace(APPENDED, dtype=dtype)) for name, dtype in FORMATS.items()}
    result = _compare(outcome, worker, calls, limit, bar.next(title(calls["fp32"])))
    for name, case in calls.items():
        spread = result.time(name).scaled(1e6) if name in result.timings else None
        outcome.rows.append(Row(f"{title(case)}, {name} cache", spread, "us", result.failures.get(name, "")))


def _ragged(outcome, case, worker, limit, bar):
    for name in FORMATS:
        asked = replace(case, int8=name == "int8")
        calls = {f"{name}, loop": replace(asked, how="loop"), f"{name}, varlen": asked}
        result = _compare(outcome, worker, calls, limit, bar.next(title(case)))
        outcome.add_ratio(result, f"{title(case)}, {name}: varlen vs loop", *calls)


def _paged(outcome, case, name, worker, limit, bar):
    whole = f"{name}, KVCache"
    paged = {f"{name}, pages of {size}": replace(case, page_size=size) for size in PAGE_SIZES}
    result = _compare(outcome, worker, {whole: case} | paged, limit, bar.next(f"paged {title(case)}"))
    for label in paged:
        outcome.add_ratio(result, f"{title(case)}, {label}: vs KVCache", whole, label)


def _bytes(outcome, dtypes):
    """Of full caches."""
    held = {label: filled_cache(replace(CACHES[0], dtype=dtype)).nbytes for label, dtype in dtypes.items()}
    for label in list(held)[1:]:
        ratio = Spread(held["cyflash"] / held[label])
        note = f"{_per_token(held[label]):.0f} bytes for a token of a head, of fp32 {_per_token(held['cyflash']):.0f}"
        outcome.rows.append(Row(f"{title(CACHES[0])}, {_name(label)} cache: times fewer bytes", ratio, "x", note))


def _per_token(nbytes):
    case = CACHES[0]
    return nbytes / (sum(case.keys) * case.kv_heads)


def _bfloat16(outcome, environments, limit, bar):
    """Of flash_attention, on one thread."""
    with team({"cyflash": Cyflash}, 1, environments) as (workers, failures):
        outcome.add_team(1, workers, failures)
        calls = {f"{name} {title(case)}": replace(case, dtype=dtype) for case in HALF for name, dtype in BOTH.items()}
        result = _compare(outcome, workers["cyflash"], calls, limit, bar.next("bfloat16"))
        for case in HALF:
            fp32, bf16 = (f"{name} {title(case)}" for name in BOTH)
            outcome.add_ratio(result, f"flash_attention {title(case)}, bf16, 1 thread: vs own fp32", fp32, bf16)


def _compare(outcome, worker, calls, limit, on_round):
    result = run_race([Entry(label, worker, case) for label, case in calls.items()], limit, on_round=on_round)
    outcome.comparisons.append(result)
    return result


def _name(label):
    return label.removeprefix("cyflash ") if label != "cyflash" else "fp32"
