"""Cases of sequences of unlike lengths: the varlen functions, and caches that are appended to, cut, forked and read."""
import dataclasses

import caching
import numpy as np
import ragged

import cyflash
from cyflash import LayerScales, flash_attention, flash_attention_int8_varlen, flash_attention_varlen
from cyflash.attention import attend_int8
from fuzz import dense, int8
from fuzz import options as drawn
from fuzz.draw import HALVES, VALUES
from fuzz.memory import Memory, contiguous, same_bits

NAMES = ("float32", *HALVES, "int8")


def batch(draw):
    """(q, k, v, cu_seqlens_q, cu_seqlens_k), the pairs of lengths, options as `ragged` has them."""
    pairs = [draw.lengths() for _ in range(draw.choice((0, 1, 2, 2, 3)))]
    H, Hk = draw.heads()
    D = draw.head_dim()
    Dv = D if draw.chance(0.6) else draw.head_dim()
    cu = [ragged.bounds_of([pair[i] for pair in pairs]) for i in (0, 1)]
    totals = [int(x[-1]) + draw.choice((0, 0, 0, 4)) for x in cu]  # rows after the last sequence
    of_scores, kind = draw.choice(VALUES), draw.kind()
    q, k, v = (draw.values((total, heads, d), kind, how) for total, heads, d, how in
               zip((totals[0], totals[1], totals[1]), (H, Hk, Hk), (D, D, Dv),
                   (of_scores, of_scores, draw.choice(VALUES)), strict=True))
    options = drawn.options(draw, 1, H, 1, 1)
    for name in ("bias", "mask"):
        if name in options:
            options[name] = [None if draw.chance(0.2) else _of_sequence(draw, name, H, *pair) for pair in pairs]
    if np.ndim(options.get("alibi_slopes")) == 2:
        options["alibi_slopes"] = draw.numbers.random((len(pairs), H), np.float32)
    return (q, k, v, *cu), pairs, options


def _of_sequence(draw, name, H, Lq, Lk):
    shape = drawn.part_of(draw, (H, Lq, Lk))
    return drawn.bias(draw, shape) if name == "bias" else np.asarray(draw.numbers.random(shape) < 0.7)


def _call(draw, function, call, options, settings):
    """(out, lse) of a varlen function somewhere in memory."""
    q, k, v, *cu = call
    memory = Memory(draw)
    arrays = [memory.place(x) for x in (q, k, v)]
    given = {name: [None if one is None else memory.place(one) for one in x] if isinstance(x, list) else x
             for name, x in options.items()}
    dtype = np.dtype(np.float32) if q.dtype == np.int8 else q.dtype
    to = memory.place(np.zeros((*q.shape[:2], v.shape[2]), dtype), output=True) if draw.chance(0.5) else None
    out, lse = function(*arrays, *cu, **settings, **given, num_threads=drawn.threads(draw), out=to,
                        return_lse=True)
    out = out.copy()
    memory.check()
    end = int(cu[0][-1])
    assert not out[end:].any() and (lse[end:] == -np.inf).all(), "rows after the last sequence"
    return out, lse


class Varlen:
    """flash_attention_varlen: each sequence against the reference, and with the bits of a call of its own."""

    def __init__(self, draw):
        self.call, self.pairs, self.options = batch(draw)
        self.alone = [_alone(self.call, self.options, i) for i in range(len(self.pairs))]
        self.expected = [dense.Expected(*qkv, own) for _, qkv, own in self.alone]

    def check(self, draw, tally, build):
        out, lse = _call(draw, flash_attention_varlen, self.call, self.options, {})
        for (rows, qkv, own), expected in zip(self.alone, self.expected, strict=True):
            result = out[rows].swapaxes(0, 1), lse[rows].swapaxes(0, 1)
            expected.check(tally, "varlen", build, *result)
            same_bits("a sequence alone", flash_attention(*qkv, **own, return_lse=True), result)
            tally["same bits"] += 1


def _alone(call, options, i):
    """Sequence i of a call: its rows, its arrays (H, L, D), its options."""
    rows = slice(call[3][i], call[3][i + 1])
    return rows, [contiguous(x) for x in ragged.sequence(*call, i)], ragged.of_sequence(options, i)


class VarlenInt8:
    """flash_attention_int8_varlen, in the same way."""

    def __init__(self, draw):
        call, self.pairs, self.options = batch(draw)
        q, k, v, *cu = call
        settings, n = {}, draw.choice((0, 0, 1, 4, 40))
        if draw.chance(0.25):
            q, k, v = (int8.codes(draw, x.shape) for x in (q, k, v))
            settings = {f"{name}_scale": np.float32(draw.uniform(0.005, 0.03)) for name in "qkv"}
        elif draw.chance(0.25):
            scales = {f"{name}_scale": draw.uniform(0.01, 0.05) if draw.chance(0.6) else None for name in "qkv"}
            settings = {"quant": LayerScales(**scales, fp32_sinks=n, pv=draw.choice(("int8", "bf16", "fp32")))}
        else:
            settings = {"fp32_sinks": n, "granularity": int8.granularity(draw),
                        "smooth_k": draw.choice((None, True, False))}
        if "quant" not in settings and draw.chance(0.5):
            settings["pv"] = draw.choice(("int8", "bf16", "fp32"))
        self.settings = {name: x for name, x in settings.items() if x is not None}
        self.call = q, k, v, *cu
        self.alone = []
        for i, (_, Lk) in enumerate(self.pairs):
            of_one = dict(self.settings)  # fp32_sinks are all keys of a sequence with fewer
            if "fp32_sinks" in of_one:
                of_one["fp32_sinks"] = min(n, Lk)
            if "quant" in of_one:
                of_one["quant"] = dataclasses.replace(of_one["quant"], fp32_sinks=min(n, Lk))
            rows, qkv, own = _alone(self.call, self.options, i)
            self.alone.append((rows, qkv, own, of_one, int8.Expected(*qkv, of_one, own)))

    def check(self, draw, tally, build):
        out, lse = _call(draw, flash_attention_int8_varlen, self.call, self.options, self.settings)
        for rows, qkv, own, settings, expected in self.alone:
            result = out[rows].swapaxes(0, 1), lse[rows].swapaxes(0, 1)
            *alone, work = attend_int8(*qkv, **settings, **own, return_lse=True)
            expected.check(tally, "int8 varlen", work.block_size_kv, *result)
            same_bits("a sequence alone", alone, result)
            tally["same bits"] += 1


class Cache:
    """A cache of its own for each case; see `cache`."""

    def __init__(self, draw):
        """Nothing is drawn for all builds."""

    def check(self, draw, tally, build):
        cache(draw, tally)


def cache(draw, tally):
    """A cache after some operations, against an oracle that keeps lists: the bits of dense arrays, and the bounds."""
    dtype, paged = draw.choice(NAMES), draw.chance(0.5)
    H, Hk = draw.heads()
    D = draw.head_dim()
    Dv = D if draw.chance(0.6) else draw.head_dim()
    settings = {}
    if dtype == "int8":
        settings["fp32_sinks"] = draw.choice((0, 0, 1, 5))
        if draw.chance(0.3):
            settings["k_mean"] = draw.numbers.standard_normal((Hk, 1, D), np.float32)
        if draw.chance(0.3):
            settings |= {"granularity": "tensor", "k_scale": 0.03, "v_scale": 0.02}
    if draw.chance(0.2):
        settings["window"] = draw.randint(0, 40), 0
    of_oracle = caching.oracle_settings(settings)
    sizes = {"kv_heads": Hk, "head_dim": D, "v_head_dim": Dv}
    kept = caching.numpy_dtype(dtype)
    if paged:
        store = cyflash.PagedKVCache(64, draw.choice((16, 32, 64)), Hk, D, kept, v_head_dim=Dv, **settings)
        rows = [store.add() for _ in range(draw.choice((1, 1, 2)))]
        oracle = caching.Oracle(0, dtype, **sizes, **of_oracle)
        for row in rows:
            oracle.add(row)
    else:
        n = draw.choice((1, 1, 2))
        store = cyflash.KVCache(n, Hk, D, 256, kept, v_head_dim=Dv, **settings)
        oracle, rows = caching.Oracle(n, dtype, **sizes, **of_oracle), list(range(n))
    for _ in range(draw.randint(2, 5)):
        step(draw, store, oracle, paged)
    read(draw, tally, store, oracle, H, D, Dv)


def step(draw, store, oracle, paged):
    """One change of a cache and of its oracle."""
    rows = list(oracle.rows)
    what = draw.choice((*4 * ("append",), "truncate", "reorder", "fork", "free", "reset"))
    if what == "append":
        k, v = tokens(draw, oracle, len(rows), draw.choice((1, draw.randint(1, 40))))
        lengths = None if draw.chance(0.6) else [draw.randint(0, k.shape[2]) for _ in rows]
        memory = Memory(draw)
        store.append(memory.place(k), memory.place(v), rows=None if draw.chance(0.5) else rows, lengths=lengths)
        memory.check()
        oracle.append(k, v, rows, lengths)
    elif what == "truncate":
        lengths = []
        for row in rows:
            length = oracle.length(row)
            shorter = draw.randint(length // 2, length)
            lengths.append(shorter if oracle.can_truncate(row, shorter) else length)
        store.truncate(lengths, rows=rows)
        oracle.truncate(lengths, rows)
    elif what == "reorder":
        order = [draw.choice(rows) for _ in rows]
        store.reorder(order)
        oracle.reorder(order)
    elif what == "reset" and draw.chance(0.3):
        store.reset(rows=rows[:1])
        oracle.reset(rows[:1])
    elif what == "fork" and paged and len(rows) < 3:
        row = draw.choice(rows)
        oracle.fork(row, store.fork(row))
    elif what == "free" and paged and len(rows) > 1:
        store.free(rows[-1])
        oracle.free(rows[-1])


def tokens(draw, oracle, n, L):
    """Keys and values of n rows."""
    (Hk, _, D), (_, _, Dv) = (x.shape for x in oracle.empty)
    kind, how = draw.kind(), draw.choice(("normal", "normal", "wide", "integers", "outliers", "equal"))
    return draw.values((n, Hk, L, D), kind, how), draw.values((n, Hk, L, Dv), kind, how)


def read(draw, tally, store, oracle, H, D, Dv):
    """Attention to the cache, with new tokens at times."""
    rows = list(oracle.rows)
    if draw.chance(0.3) and len(rows) > 1:
        draw.shuffle(rows)
        rows = rows[: draw.randint(1, len(rows))]
    Lq = draw.choice((1, 1, draw.randint(1, 12)))
    new = draw.chance(0.5) or not all(oracle.length(row) and oracle.can_attend(row, Lq) for row in rows)
    k, v = tokens(draw, oracle, len(rows), Lq) if new else (None, None)
    lengths = None if draw.chance(0.7) else [draw.randint(0, Lq) for _ in rows]
    added = [0] * len(rows) if not new else [Lq] * len(rows) if lengths is None else lengths
    longest = max(oracle.length(row) + n for row, n in zip(rows, added, strict=True))
    q = draw.values((len(rows), H, Lq, D), draw.kind(), draw.choice(("normal", "small", "integers")))
    options = drawn.options(draw, len(rows), H, Lq, longest)
    if store.window is not None:  # no query may see what the cache gave up
        options.pop("window", None)
        options.pop("causal_align", None)
    pv = draw.choice((None, "int8", "bf16", "fp32")) if oracle.dtype == "int8" else None
    if pv == "bf16" and any(oracle.length(row) + n == 1 for row, n in zip(rows, added, strict=True)):
        pv = "fp32"  # the scale of one token may be a head's, which is not rounded to bfloat16
    memory = Memory(draw)
    placed = memory.place(q)
    to = memory.place(np.zeros((len(rows), H, Lq, Dv), q.dtype), output=True) if draw.chance(0.5) else None
    given = options | ({} if pv is None else {"pv": pv})
    out, lse = caching.attend(placed, store, k, v, rows=rows, lengths=lengths, out=to,
                              num_threads=drawn.threads(draw), **given)
    out = out.copy()
    memory.check()
    if new:
        oracle.append(k, v, rows, lengths)
    caching.check(oracle, rows, q, out, lse, lengths, **given)
    tally.add("cache", out, lse)
    tally["same bits"] += 1
