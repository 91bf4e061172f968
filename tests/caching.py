"""What tests of the caches are made of: an oracle that keeps lists of keys and values, and ways to compare with it.

    Oracle          what a cache is meant to hold, row by row, in plain NumPy
    dense           attention of one row by the functions that take whole arrays: a cache must give the same bits
    judge           the same row against the reference, under the derived bounds
    verify          one call of flash_attention_with_kvcache held to all of them
    unchanged       a block after which a cache is to the bit what it was before
"""
from contextlib import contextmanager

import bounds
import bounds_int8
import cases
import numpy as np
import pytest

import cyflash
from cyflash import LayerScales, flash_attention, flash_attention_int8, quantize, reference

DTYPES = ("float32", "float16", "bfloat16", "int8")
FLOATS = DTYPES[:3]
H, HK, D, DV = 4, 2, 24, 20
ULP = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a step of a result, relative


def numpy_dtype(name):
    """The NumPy dtype of a cache's, or of an array's, name."""
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def tokens(L, n=1, seed=0, heads=(H, HK), sizes=(D, DV)):
    """q (n, H, L, D), k (n, Hk, L, D), v (n, Hk, L, Dv): normal numbers, a prefix of those for a larger L."""
    r = np.random.default_rng([seed, n, *heads, *sizes])
    shapes = ((heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1]))
    drawn = r.standard_normal((L, n, sum(h * d for h, d in shapes)), dtype=np.float32)
    parts = np.split(drawn, np.cumsum([h * d for h, d in shapes])[:-1], axis=-1)
    return tuple(x.reshape(L, n, h, d).transpose(1, 2, 0, 3).copy() for x, (h, d) in zip(parts, shapes, strict=True))


def make(batch, capacity, dtype="float32", **settings):
    """A KVCache of the sizes of `tokens`, and its oracle."""
    v_head_dim = settings.pop("v_head_dim", DV)
    cache = cyflash.KVCache(batch, HK, D, capacity, numpy_dtype(dtype), v_head_dim=v_head_dim, **settings)
    return cache, Oracle(batch, dtype, v_head_dim=v_head_dim, **oracle_settings(settings))


def make_paged(pages, page_size, dtype="float32", **settings):
    """A PagedKVCache without rows, and its oracle."""
    v_head_dim = settings.pop("v_head_dim", DV)
    cache = cyflash.PagedKVCache(pages, page_size, HK, D, numpy_dtype(dtype), v_head_dim=v_head_dim, **settings)
    return cache, Oracle(0, dtype, v_head_dim=v_head_dim, **oracle_settings(settings))


def oracle_settings(settings):
    return {name: value for name, value in settings.items() if name not in ("grow", "granularity")}


# What a cache is meant to hold


class Oracle:
    """For each row the keys (Hk, L, D) and values (Hk, L, Dv) appended to it, as a cache of `dtype` takes them.

    An int8 cache keeps codes; here are the numbers that they are made of.
    """

    def __init__(self, rows, dtype="float32", *, kv_heads=HK, head_dim=D, v_head_dim=DV, window=None, **int8):
        self.dtype, self.window, self.int8 = dtype, window, int8
        self.empty = tuple(np.zeros((kv_heads, 0, d), np.float32) for d in (head_dim, v_head_dim))
        self.rows = {row: self.empty for row in range(rows)}
        self.first = dict.fromkeys(self.rows, 0)  # of a window cache: earlier keys have been given up

    @property
    def lengths(self):
        return np.array([k.shape[1] for k, _ in self.rows.values()], np.int64)

    def length(self, row):
        return self.rows[row][0].shape[1]

    def room(self, row, capacity):
        """How many tokens one append may add to a row."""
        used = self.length(row)
        return capacity - (used if self.window is None else min(used, self.window[0]))

    def append(self, k, v, rows=None, lengths=None):
        rows = list(self.rows) if rows is None else rows
        lengths = [k.shape[2]] * len(rows) if lengths is None else lengths
        for row, n, *new in zip(rows, lengths, k, v, strict=True):
            if self.window is not None and n:
                self.first[row] = max(self.first[row], self.length(row) - self.window[0])
            new = (self.kept(x[:, :n]) for x in new)
            self.rows[row] = tuple(np.concatenate(pair, axis=1) for pair in zip(self.rows[row], new, strict=True))

    def kept(self, x):
        """x as float32 numbers that the cache's dtype can hold."""
        x = x.astype(np.float32)
        return x if self.dtype == "int8" else x.astype(numpy_dtype(self.dtype)).astype(np.float32)

    def truncate(self, lengths, rows=None):
        for row, n in zip(list(self.rows) if rows is None else rows, lengths, strict=True):
            self.rows[row] = tuple(x[:, :n] for x in self.rows[row])

    def can_truncate(self, row, length):
        """Whether the keys that the next query would see are all there."""
        return self.window is None or max(0, length - self.window[0]) >= self.first[row]

    def can_attend(self, row, queries):
        """Whether the keys that the last `queries` positions see are all there."""
        return self.window is None or max(0, self.length(row) - queries - self.window[0]) >= self.first[row]

    def reset(self, rows=None):
        for row in list(self.rows) if rows is None else rows:
            self.rows[row], self.first[row] = self.empty, 0

    def reorder(self, rows):
        new = list(self.rows)
        self.rows, self.first = (
            {row: x[source] for row, source in zip(new, rows, strict=True)} for x in (self.rows, self.first)
        )

    def add(self, row):
        assert row not in self.rows
        self.rows[row], self.first[row] = self.empty, 0

    def fork(self, row, new):
        assert new not in self.rows
        self.rows[new], self.first[new] = self.rows[row], self.first[row]

    def free(self, row):
        del self.rows[row], self.first[row]


# One row, without a cache


def dense(oracle, row, q, *, pv=None, **options):
    """(out, lse) of q (H, Lq, D) over a row's keys, by the functions that take whole arrays."""
    k, v = oracle.rows[row]
    options = {"causal": True, "window": oracle.window} | options
    if oracle.dtype == "int8":
        return flash_attention_int8(q, k, **int8_values(oracle, v, pv), **options, return_lse=True)
    k, v = (x.astype(numpy_dtype(oracle.dtype)) for x in (k, v))
    return flash_attention(q, k, v, **options, return_lse=True)


def int8_values(oracle, v, pv=None):
    """v, and the arguments of int8 attention for what an int8 cache has: it never takes a mean of its own."""
    given = dict(oracle.int8)
    quant = given.pop("quant", None)
    if quant is not None:
        given = {name: getattr(quant, name) for name in ("q_scale", "k_scale", "v_scale", "k_mean", "fp32_sinks")}
        pv = quant.pv if pv is None else pv
    pv = "int8" if pv is None else pv
    sinks = min(given.pop("fp32_sinks", 0), v.shape[1])
    given = {name: value for name, value in given.items() if value is not None}
    if pv != "int8" and "v_scale" not in given:  # a float v would be used itself
        v = quantize(v, "token", fp32_sinks=sinks)
    if "k_mean" in given or "k_scale" in given:
        return {"v": v, "pv": pv, "quant": LayerScales(**given, fp32_sinks=sinks)}
    return {"v": v, "pv": pv, "fp32_sinks": sinks, "smooth_k": False, **given}


def judge(oracle, row, q, out, lse, *, pv=None, **options):
    """Raise unless out and lse of q (H, Lq, D) over a row's keys lie within the bounds of the reference."""
    k, v = oracle.rows[row]
    options = {"causal": True, "window": oracle.window} | options
    assert out.dtype == q.dtype and lse.dtype == np.float32
    q32, out32 = q.astype(np.float32), out.astype(np.float32)
    if oracle.dtype == "int8":
        arguments = int8_values(oracle, v, pv)
        case = bounds_int8.Case(q32, k, **arguments, **options, block_size=int8_block())
        if q.dtype == np.float32:
            case.check(out, lse)
        return
    case = bounds.Case(q32, k, v, **options)
    if q.dtype == np.float32:
        case.check(out, lse)
        return
    slack = ULP[q.dtype.name] * np.abs(case.expected) + np.finfo(np.float16).tiny * (q.dtype == np.float16)
    if q.dtype.name == oracle.dtype == "bfloat16":  # weights may be rounded to bfloat16 for its dot product
        slack = slack + 2 * ULP["bfloat16"] * reference.attention(q32, k, np.abs(v), **options)
    bounds.compare("out", out32, case.expected, case.bounds[0] + 2 * slack)
    if lse is not None:
        bounds.compare("lse", lse, case.expected_lse, case.bounds[1])


def int8_block():
    """Keys of a block of int8 attention in the build in use."""
    return cyflash.cpu.tile_sizes_of(cyflash.cpu.active(), None, None, True)[1]


def same_bits(actual, expected):
    """Equal bit for bit, NaN and the sign of zero included, whatever the dtype."""
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        a, b = (np.ascontiguousarray(x).view(f"u{x.itemsize}") for x in (a, b))
        assert np.array_equal(a, b), f"{np.count_nonzero(a != b)} of {a.size} differ in their bits"


# A call with a cache


def attend(q, cache, k=None, v=None, **arguments):
    """(out, lse) of flash_attention_with_kvcache."""
    return cyflash.flash_attention_with_kvcache(q, cache, k, v, **arguments, return_lse=True)


def of_row(options, i, shape, queries, length):
    """The options of a call on rows (n, H, Lq, longest) as row i alone sees them."""
    own = dict(options)
    for name in ("bias", "mask"):
        if own.get(name) is not None:
            own[name] = np.ascontiguousarray(np.broadcast_to(own[name], shape)[i, :, :queries, :length])
    if np.ndim(own.get("alibi_slopes")) == 2:
        own["alibi_slopes"] = own["alibi_slopes"][i]
    return own


def verify(cache, oracle, q, k=None, v=None, *, rows=None, lengths=None, bits=True, bound=True, how=(), **options):
    """Call flash_attention_with_kvcache, and hold every row to `dense` (bits) and `judge` (bound); return (out, lse).

    how: arguments that change no bit.
    """
    out, lse = attend(q, cache, k, v, rows=rows, lengths=lengths, **options, **dict(how))
    ids = list(oracle.rows) if rows is None else [int(row) for row in rows]
    if k is not None:
        oracle.append(k, v, ids, lengths)
    check(oracle, ids, q, out, lse, lengths, bits=bits, bound=bound, **options)
    for row in ids:
        assert cache.lengths[row] == oracle.length(row)
    return out, lse


def check(oracle, rows, q, out, lse, lengths=None, *, bits=True, bound=True, **options):
    """Hold a result of the rows to `dense` (bits) and `judge` (bound)."""
    n, heads, Lq, _ = q.shape
    assert out.shape == (*q.shape[:3], oracle.empty[1].shape[-1]) and lse.shape == q.shape[:3]
    shape = (n, heads, Lq, max([oracle.length(row) for row in rows], default=0))
    for i, row in enumerate(rows):
        queries = Lq if lengths is None else int(lengths[i])
        assert not out[i, :, queries:].any() and (lse[i, :, queries:] == -np.inf).all(), "rows beyond the queries"
        own = of_row(options, i, shape, queries, oracle.length(row))
        result = out[i, :, :queries], lse[i, :, :queries]
        same_arithmetic = oracle.dtype != "int8" or oracle.length(row) != 1  # one scale may be a token's or a head's
        if bits and same_arithmetic:
            same_bits(result, dense(oracle, row, q[i, :, :queries], **own))
        if bound or not same_arithmetic:
            judge(oracle, row, q[i, :, :queries], *result, **own)


def ragged_options(name, n, Lq, longest, seed=0):
    """Options of `cases` for a call on n rows, the longest of which has so many keys."""
    return cases.all_options(n, H, Lq, longest, seed) if name == "all" else cases.options(name, n, H, Lq, longest, seed)


# That nothing changed


def state(cache, folder, rows=None):
    """All that can be seen of a cache, as something that == compares."""
    folder.mkdir(exist_ok=True)
    path = folder / "state.safetensors"
    cache.save(path)
    ids = range(len(cache.lengths)) if rows is None else rows
    seen = [np.asarray(cache.lengths).tolist(), cache.capacity, cache.nbytes, path.read_bytes()]
    if hasattr(cache, "block_table"):
        seen.append(np.asarray(cache.block_table).tolist())
    for row in ids:
        q = np.random.default_rng(0).standard_normal((1, H, 1, D), dtype=np.float32)
        seen += [x.tobytes() for x in attend(q, cache, rows=[row])]
    return seen


@contextmanager
def unchanged(cache, folder, rows=None):
    """After the block, which catches its errors, the cache is what it was."""
    before = state(cache, folder, rows)
    yield
    after = state(cache, folder, rows)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert a == b, f"the cache changed: part {i} of its state"
