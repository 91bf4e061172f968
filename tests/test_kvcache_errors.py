"""Bad input to the caches: a clear error that names the argument, what was expected and what came; nothing changes."""
import numpy as np
import pytest
from caching import DTYPES, DV, FLOATS, HK, D, H, attend, make, make_paged, numpy_dtype, same_bits, tokens, unchanged

import cyflash
from cyflash import FlashAttentionConfig, KVCache, LayerScales, PagedKVCache, quantize

F32 = np.float32
BATCH, CAPACITY = 3, 32


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def raises(error, call, *parts):
    with pytest.raises(error) as caught:
        call()
    said = str(caught.value)
    for words in parts:
        assert words in said, (words, said)
    assert type(caught.value).__module__ == "builtins" or isinstance(caught.value, ValueError)


# Constructors


GOOD = {"batch": 2, "kv_heads": HK, "head_dim": D, "capacity": 32}
PLANNED = LayerScales(parts=[([0], LayerScales(0.1, 0.1, 0.1)), ([1], None)])
CONSTRUCTORS = {
    "batch 0": (ValueError, {"batch": 0}, ["batch: expected", "0"]),
    "batch negative": (ValueError, {"batch": -1}, ["batch: expected", "-1"]),
    "batch fraction": ((TypeError, ValueError), {"batch": 1.5}, ["batch: expected", "1.5"]),
    "heads 0": (ValueError, {"kv_heads": 0}, ["kv_heads: expected", "0"]),
    "head_dim 0": (ValueError, {"head_dim": 0}, ["head_dim: expected", "0"]),
    "v_head_dim 0": (ValueError, {"v_head_dim": 0}, ["v_head_dim: expected", "0"]),
    "head_dim text": ((TypeError, ValueError), {"head_dim": "64"}, ["head_dim: expected", "'64'"]),
    "capacity 0": (ValueError, {"capacity": 0}, ["capacity: expected", "0"]),
    "capacity negative": (ValueError, {"capacity": -5}, ["capacity: expected", "-5"]),
    "float64": (TypeError, {"dtype": np.float64}, ["dtype: expected", "float64"]),
    "int16": (TypeError, {"dtype": "int16"}, ["dtype: expected", "int16"]),
    "uint8": (TypeError, {"dtype": np.uint8}, ["dtype: expected", "uint8"]),
    "big-endian": (TypeError, {"dtype": ">f4"}, ["dtype: expected", ">f4"]),
    "no dtype": (TypeError, {"dtype": "fast"}, ["dtype: expected", "'fast'"]),
    "dtype None": (TypeError, {"dtype": None}, ["dtype: expected", "None"]),
    "window int": (ValueError, {"window": 8}, ["window: expected", "8"]),
    "window right": (ValueError, {"window": (8, 2)}, ["window: expected", "(8, 2)"]),
    "window right unbounded": (ValueError, {"window": (8, -1)}, ["window: expected", "(8, -1)"]),
    "window left": (ValueError, {"window": (-3, 0)}, ["window: expected", "(-3, 0)"]),
    "window as large as capacity": (ValueError, {"window": (32, 0)}, ["capacity", "32", "33"]),
    "granularity": (ValueError, {"dtype": "int8", "granularity": "row"}, ["granularity: expected", "'row'"]),
    "granularity of floats": (ValueError, {"granularity": "head"}, ["granularity", "int8"]),
    "head without scales": (ValueError, {"dtype": "int8", "granularity": "head"}, ["k_scale", "head"]),
    "tensor without scales": (ValueError, {"dtype": "int8", "granularity": "tensor"}, ["k_scale", "tensor"]),
    "head without v_scale": (
        ValueError, {"dtype": "int8", "granularity": "head", "k_scale": np.ones((HK, 1, 1), F32)}, ["v_scale"],
    ),
    "k_scale of other heads": (
        ValueError,
        {"dtype": "int8", "granularity": "head", "k_scale": np.ones((3, 1, 1)), "v_scale": np.ones((HK, 1, 1))},
        ["k_scale: expected", "(3, 1, 1)"],
    ),
    "v_scale of one axis": (
        ValueError,
        {"dtype": "int8", "granularity": "head", "k_scale": np.ones((HK, 1, 1)), "v_scale": np.ones(HK)},
        ["v_scale: expected", "(2,)"],
    ),
    "k_scale zero": (
        ValueError, {"dtype": "int8", "granularity": "tensor", "k_scale": 0.0, "v_scale": 1.0},
        ["k_scale: expected", "0.0"],
    ),
    "v_scale nan": (
        ValueError, {"dtype": "int8", "granularity": "tensor", "k_scale": 1.0, "v_scale": float("nan")},
        ["v_scale: expected", "nan"],
    ),
    "k_scale text": (
        TypeError, {"dtype": "int8", "granularity": "tensor", "k_scale": "1", "v_scale": 1.0}, ["k_scale: expected"],
    ),
    "scales per head for tensor": (
        ValueError,
        {"dtype": "int8", "granularity": "tensor", "k_scale": np.ones((HK, 1, 1)), "v_scale": 1.0}, ["k_scale"],
    ),
    "scales of floats": (ValueError, {"k_scale": 0.1, "v_scale": 0.1}, ["k_scale", "int8"]),
    "k_mean of floats": (ValueError, {"k_mean": zeros(HK, 1, D)}, ["k_mean", "int8"]),
    "fp32_sinks of floats": (ValueError, {"fp32_sinks": 4}, ["fp32_sinks", "int8"]),
    "quant of floats": (ValueError, {"quant": LayerScales(0.1, 0.1, 0.1)}, ["quant", "int8"]),
    "fp32_sinks negative": (ValueError, {"dtype": "int8", "fp32_sinks": -1}, ["fp32_sinks: expected", "-1"]),
    "fp32_sinks fraction": (ValueError, {"dtype": "int8", "fp32_sinks": 1.5}, ["fp32_sinks: expected", "1.5"]),
    "k_mean of other heads": (
        ValueError, {"dtype": "int8", "k_mean": zeros(3, 1, D)}, ["k_mean: expected", "(3, 1, 24)"],
    ),
    "k_mean of other channels": (ValueError, {"dtype": "int8", "k_mean": zeros(HK, 1, D + 1)}, ["k_mean: expected"]),
    "k_mean of tokens": (ValueError, {"dtype": "int8", "k_mean": zeros(HK, 5, D)}, ["k_mean: expected"]),
    "k_mean nan": (ValueError, {"dtype": "int8", "k_mean": np.full((HK, 1, D), np.nan)}, ["k_mean: expected", "nan"]),
    "quant of another type": (TypeError, {"dtype": "int8", "quant": {"k_scale": 1}}, ["quant: expected", "dict"]),
    "quant and k_scale": (
        ValueError, {"dtype": "int8", "quant": LayerScales(None, 0.1, 0.1), "k_scale": 0.1}, ["k_scale", "quant"],
    ),
    "quant and k_mean": (
        ValueError, {"dtype": "int8", "quant": LayerScales(None, 0.1, 0.1), "k_mean": zeros(HK, 1, D)},
        ["k_mean", "quant"],
    ),
    "quant and other fp32_sinks": (
        ValueError, {"dtype": "int8", "quant": LayerScales(None, 0.1, 0.1, fp32_sinks=4), "fp32_sinks": 2},
        ["fp32_sinks", "quant"],
    ),
    "quant of other heads": (
        ValueError, {"dtype": "int8", "quant": LayerScales(None, np.ones((5, 1, 1)), np.ones((5, 1, 1)))},
        ["quant", "k_scale", "(5, 1, 1)"],
    ),
    "quant with parts": (ValueError, {"dtype": "int8", "quant": PLANNED}, ["quant", "parts"]),
    "unknown option": (TypeError, {"page": 3}, ["page"]),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_bad_caches(name):
    error, change, parts = CONSTRUCTORS[name]
    raises(error, lambda: KVCache(**(GOOD | change)), *parts)
    change = dict(change)
    if not {"batch", "capacity", "window"} & change.keys():
        good = {"pages": 4, "page_size": 16, "kv_heads": HK, "head_dim": D}
        raises(error, lambda: PagedKVCache(**(good | change)), *parts)


@pytest.mark.parametrize(("change", "parts"), [
    ({"pages": 0}, ["pages: expected", "0"]),
    ({"pages": -2}, ["pages: expected", "-2"]),
    ({"page_size": 0}, ["page_size: expected", "0"]),
    ({"page_size": 8}, ["page_size: expected", "16", "8"]),
    ({"page_size": 40}, ["page_size: expected", "16", "40"]),
    ({"page_size": -16}, ["page_size: expected", "-16"]),
], ids=str)
def test_bad_pools(change, parts):
    good = {"pages": 4, "page_size": 16, "kv_heads": HK, "head_dim": D}
    raises(ValueError, lambda: PagedKVCache(**(good | change)), *parts)


# append: what is wrong, and what the message says


def arrays(n=BATCH, L=4, dtype=F32):
    _, k, v = tokens(L, n)
    return {"k": k.astype(dtype), "v": v.astype(dtype)}


def nan_at(place, name):
    given = arrays()
    given[name][place] = np.nan
    return given


APPENDS = {
    "k float64": (TypeError, {"k": zeros(BATCH, HK, 4, D, dtype="f8")}, ["k: expected", "float64"]),
    "v float64": (TypeError, {"v": zeros(BATCH, HK, 4, DV, dtype="f8")}, ["v: expected", "float64"]),
    "k integers": (TypeError, {"k": zeros(BATCH, HK, 4, D, dtype="i4")}, ["k: expected", "int32"]),
    "k codes": (TypeError, {"k": zeros(BATCH, HK, 4, D, dtype="i1")}, ["k: expected", "codes"]),
    "v codes": (TypeError, {"v": zeros(BATCH, HK, 4, DV, dtype="i1")}, ["v: expected", "codes"]),
    "k quantised": (TypeError, {"k": quantize(zeros(BATCH, HK, 4, D))}, ["k: expected"]),
    "v quantised": (TypeError, {"v": quantize(zeros(BATCH, HK, 4, DV))}, ["v: expected"]),
    "k big-endian": (TypeError, {"k": zeros(BATCH, HK, 4, D, dtype=">f4")}, ["k: expected", ">f4"]),
    "k bool": (TypeError, {"k": zeros(BATCH, HK, 4, D, dtype="?")}, ["k: expected", "bool"]),
    "k complex": (TypeError, {"k": zeros(BATCH, HK, 4, D, dtype="c8")}, ["k: expected", "complex64"]),
    "k list": (TypeError, {"k": [1.0]}, ["k: expected", "list"]),
    "k None": (TypeError, {"k": None}, ["k: expected", "None"]),
    "v None": (TypeError, {"v": None}, ["v: expected", "None"]),
    "k masked": (TypeError, {"k": np.ma.zeros((BATCH, HK, 4, D), F32)}, ["k: expected", "MaskedArray"]),
    "rank 3": (ValueError, {"k": zeros(HK, 4, D)}, ["k: expected", "(2, 4, 24)"]),
    "rank 5": (ValueError, {"k": zeros(1, BATCH, HK, 4, D)}, ["k: expected", "(1, 3, 2, 4, 24)"]),
    "rank of v": (ValueError, {"v": zeros(HK, 4, DV)}, ["v: expected", "(2, 4, 20)"]),
    "batch": (ValueError, {"k": zeros(2, HK, 4, D), "v": zeros(2, HK, 4, DV)}, ["k: expected", "3", "(2, 2, 4, 24)"]),
    "batch of v": (ValueError, {"v": zeros(2, HK, 4, DV)}, ["v: expected", "(2, 2, 4, 20)"]),
    "heads": (ValueError, {"k": zeros(BATCH, H, 4, D), "v": zeros(BATCH, H, 4, DV)}, ["k: expected", "(3, 4, 4, 24)"]),
    "heads of v": (ValueError, {"v": zeros(BATCH, 1, 4, DV)}, ["v: expected", "(3, 1, 4, 20)"]),
    "head_dim": (ValueError, {"k": zeros(BATCH, HK, 4, D + 1)}, ["k: expected", "24", "(3, 2, 4, 25)"]),
    "head_dim 1": (ValueError, {"k": zeros(BATCH, HK, 4, 1)}, ["k: expected", "(3, 2, 4, 1)"]),
    "head_dim of v": (ValueError, {"v": zeros(BATCH, HK, 4, D)}, ["v: expected", "20", "(3, 2, 4, 24)"]),
    "length of v": (ValueError, {"v": zeros(BATCH, HK, 5, DV)}, ["v: expected", "4", "(3, 2, 5, 20)"]),
    "length 1 of v": (ValueError, {"v": zeros(BATCH, HK, 1, DV)}, ["v: expected", "(3, 2, 1, 20)"]),
    "transposed": (
        ValueError, {"k": zeros(BATCH, 4, HK, D), "v": zeros(BATCH, 4, HK, DV)}, ["k: expected", "(3, 4, 2, 24)"],
    ),
    "rows beyond": (ValueError, {"rows": [0, 1, 3]}, ["rows: expected", "3"]),
    "rows negative": (ValueError, {"rows": [0, 1, -1]}, ["rows: expected", "-1"]),
    "rows twice": (ValueError, {"rows": [0, 1, 1]}, ["rows: expected", "1"]),
    "rows too few": (ValueError, {"rows": [0, 1]}, ["rows", "k"]),
    "rows too many": (ValueError, {"rows": [0, 1, 2, 3]}, ["rows"]),
    "rows floats": (TypeError, {"rows": [0.0, 1.0, 2.0]}, ["rows: expected", "int"]),
    "rows bools": (TypeError, {"rows": [True, False, True]}, ["rows: expected", "int"]),
    "rows a number": ((TypeError, ValueError), {"rows": 1}, ["rows: expected"]),
    "rows of two axes": (ValueError, {"rows": [[0, 1, 2]]}, ["rows: expected", "(1, 3)"]),
    "rows text": (TypeError, {"rows": "012"}, ["rows: expected"]),
    "lengths beyond L": (ValueError, {"lengths": [4, 5, 0]}, ["lengths: expected", "4", "5"]),
    "lengths negative": (ValueError, {"lengths": [4, -1, 0]}, ["lengths: expected", "-1"]),
    "lengths too few": (ValueError, {"lengths": [4, 4]}, ["lengths: expected", "3"]),
    "lengths too many": (ValueError, {"lengths": [4, 4, 4, 4]}, ["lengths: expected", "3"]),
    "lengths floats": (TypeError, {"lengths": [4.0, 1.0, 2.0]}, ["lengths: expected", "int"]),
    "lengths bools": (TypeError, {"lengths": np.ones(3, bool)}, ["lengths: expected", "True"]),
    "lengths a number": ((TypeError, ValueError), {"lengths": 4}, ["lengths: expected"]),
    "lengths of two axes": (ValueError, {"lengths": [[4, 4, 4]]}, ["lengths: expected", "(1, 3)"]),
    "past capacity": (ValueError, arrays(L=33), ["capacity", "32", "33"]),
    "past capacity for one row": (
        ValueError, arrays(L=30) | {"lengths": [1, 30, 2]}, ["capacity", "32", "row 1", "grow=True"],
    ),
    "past capacity for some rows": (ValueError, arrays(2, 29) | {"rows": [2, 1]}, ["capacity", "32", "row 1"]),
}
NOT_FINITE = {
    "k nan": (ValueError, nan_at((1, 1, 2, 3), "k"), ["k", ": expected finite", "nan", "1, 2, 3)"]),
    "v nan": (ValueError, nan_at((2, 0, 3, 19), "v"), ["v", ": expected finite", "nan", "0, 3, 19)"]),
    "v inf": (
        ValueError, arrays() | {"v": np.full((BATCH, HK, 4, DV), -np.inf, F32)}, ["v", ": expected finite", "-inf"],
    ),
    "k float16 inf": (
        ValueError, arrays() | {"k": np.full((BATCH, HK, 4, D), np.inf, np.float16)}, ["k", ": expected finite", "inf"],
    ),
    "k nan in one row": (
        ValueError, nan_at((0, 0, 0, 0), "k") | {"rows": [2, 0, 1], "lengths": [1, 4, 4]}, ["k", ": expected finite"],
    ),
}


def some(dtype, **settings):
    """A cache with rows of 10, 5 and 0 tokens, rows 0 and 1 once longer."""
    cache, _ = make(BATCH, CAPACITY, dtype, **settings)
    _, k, v = tokens(20, BATCH)
    cache.append(k, v, lengths=[20, 9, 0])
    cache.truncate([10, 5, 0])
    return cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*APPENDS, *NOT_FINITE])
def test_bad_appends(dtype, name, tmp_path):
    """By append, and by the call of attention: the cache is to the bit what it was, and takes the next good tokens."""
    error, change, parts = (APPENDS | NOT_FINITE)[name]
    if name in NOT_FINITE and dtype != "int8":
        pytest.skip("a float cache takes NaN")
    cache = some(dtype, **({"fp32_sinks": 4} if dtype == "int8" else {}))
    call = arrays() | change
    k, v = call.pop("k"), call.pop("v")
    q = tokens(4, BATCH)[0]
    L = k.shape[2] if getattr(k, "ndim", 0) == 4 else 4
    n = 2 if name == "past capacity for some rows" else BATCH
    with unchanged(cache, tmp_path / "state"):
        raises(error, lambda: cache.append(k, v, **call), *parts)
        if k is not None and v is not None:
            queries = np.resize(q, (n, H, L, D))
            raises(error, lambda: attend(queries, cache, k, v, **call), *([] if "rows" in call else parts))
    cache.append(**arrays())
    assert cache.lengths.tolist() == [14, 9, 4]


def test_a_failed_append_leaves_no_trace_in_later_ones(tmp_path):
    """Half of the rows fit, and codes of k were fine when v was found to be NaN: nothing of that is kept."""
    q, k, v = tokens(30, BATCH)
    expected, _ = make(BATCH, CAPACITY, "int8")
    cache, _ = make(BATCH, CAPACITY, "int8")
    bad = v.copy()
    bad[2, 1, 29, 7] = np.nan
    with unchanged(cache, tmp_path / "state"):
        raises(ValueError, lambda: cache.append(k, bad), "v", ": expected finite", "1, 29, 7)")
    for one in (cache, expected):
        one.append(k[:, :, :7], v[:, :, :7])
        one.append(k[:, :, 7:], v[:, :, 7:], lengths=[23, 2, 5])
    same_bits(attend(q, cache), attend(q, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_past_what_the_window_allows(dtype, tmp_path):
    """A row holds min(length, left) + new tokens; nothing is written, nothing given up."""
    cache, _ = make(2, 32, dtype, window=(20, 0))
    q, k, v = tokens(40, 2)
    with unchanged(cache, tmp_path / "state"):
        raises(ValueError, lambda: cache.append(k[:, :, :33], v[:, :, :33]), "capacity", "32")
    cache.append(k[:, :, :30], v[:, :, :30])
    with unchanged(cache, tmp_path / "state"):
        for lengths in (None, [13, 0], [1, 13]):
            raises(ValueError, lambda n=lengths: cache.append(k[:, :, :13], v[:, :, :13], lengths=n), "window", "12")
            raises(ValueError, lambda n=lengths: attend(q[:, :, :13], cache, k[:, :, :13], v[:, :, :13], lengths=n))
        cache.truncate([30, 30])  # nothing was given up by the failed appends:
        attend(q[:, :, :10], cache)
    cache.append(k[:, :, :12], v[:, :, :12])


@pytest.mark.parametrize("dtype", DTYPES)
def test_growth_that_fails_changes_nothing(dtype, tmp_path):
    cache, _ = make(2, 16, dtype, grow=True)
    _, k, v = tokens(40, 2)
    cache.append(k[:, :, :10], v[:, :, :10])
    with unchanged(cache, tmp_path / "state"):
        raises(ValueError, lambda: cache.append(k, v[:, :, :39]), "v: expected")
        raises(ValueError, lambda: cache.append(k, v, rows=[0, 7]), "rows")


def test_growth_beyond_memory():
    """MemoryError with the size, and the cache as it was."""
    cache = KVCache(1, 1, 64, 16, grow=True)
    huge = np.broadcast_to(np.ones((1, 1, 1, 64), F32), (1, 1, 1 << 50, 64))
    with pytest.raises((MemoryError, ValueError)):
        cache.append(huge, huge)
    assert cache.lengths.tolist() == [0] and cache.nbytes < 1 << 20


def test_a_cache_beyond_memory():
    with pytest.raises((MemoryError, ValueError)):
        KVCache(1 << 20, 64, 128, 1 << 24)


# truncate, reset, reorder


OTHERS = {
    "truncate longer": (ValueError, lambda c: c.truncate([11, 5, 0]), ["lengths: expected", "10", "11"]),
    "truncate negative": (ValueError, lambda c: c.truncate([-1, 5, 0]), ["lengths: expected", "-1"]),
    "truncate too few": (ValueError, lambda c: c.truncate([1, 1]), ["lengths: expected", "3"]),
    "truncate too many": (ValueError, lambda c: c.truncate([1, 1, 0, 0]), ["lengths: expected", "3"]),
    "truncate floats": (TypeError, lambda c: c.truncate([1.0, 1.0, 0.0]), ["lengths: expected"]),
    "truncate None": (TypeError, lambda c: c.truncate(None), ["lengths: expected"]),
    "truncate for rows": (ValueError, lambda c: c.truncate([1, 2], rows=[0]), ["lengths"]),
    "truncate twice": (ValueError, lambda c: c.truncate([1, 2], rows=[0, 0]), ["rows: expected", "0"]),
    "truncate beyond": (ValueError, lambda c: c.truncate([0], rows=[3]), ["rows: expected", "3"]),
    "truncate row negative": (ValueError, lambda c: c.truncate([0], rows=[-1]), ["rows: expected", "-1"]),
    "truncate second row longer": (ValueError, lambda c: c.truncate([1, 6], rows=[0, 1]), ["lengths: expected", "6"]),
    "reset beyond": (ValueError, lambda c: c.reset(rows=[0, 3]), ["rows: expected", "3"]),
    "reset negative": (ValueError, lambda c: c.reset(rows=[0, -2]), ["rows: expected", "-2"]),
    "reset floats": (TypeError, lambda c: c.reset(rows=[0.0]), ["rows: expected"]),
    "reset number": ((TypeError, ValueError), lambda c: c.reset(rows=0), ["rows: expected"]),
    "reorder beyond": (ValueError, lambda c: c.reorder([0, 1, 3]), ["rows: expected", "3"]),
    "reorder negative": (ValueError, lambda c: c.reorder([0, 1, -1]), ["rows: expected", "-1"]),
    "reorder too few": (ValueError, lambda c: c.reorder([0, 1]), ["rows: expected", "3"]),
    "reorder too many": (ValueError, lambda c: c.reorder([0, 1, 2, 0]), ["rows: expected", "3"]),
    "reorder floats": (TypeError, lambda c: c.reorder([0.0, 1.0, 2.0]), ["rows: expected"]),
    "reorder bools": (TypeError, lambda c: c.reorder([True, False, True]), ["rows: expected"]),
    "reorder None": (TypeError, lambda c: c.reorder(None), ["rows: expected"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_bad_changes_of_rows(name, tmp_path):
    error, call, parts = OTHERS[name]
    for dtype in ("float32", "int8"):
        cache = some(dtype)
        with unchanged(cache, tmp_path / "state"):
            raises(error, lambda: call(cache), *parts)  # noqa: B023 - called at once


# Attention


def with_kv(**change):
    return arrays() | change


ATTENTION = {
    "q rank": (ValueError, {"q": zeros(H, 4, D)}, ["q: expected", "(4, 4, 24)"]),
    "q batch": (ValueError, {"q": zeros(2, H, 4, D)}, ["q: expected", "3", "(2, 4, 4, 24)"]),
    "q head_dim": (ValueError, {"q": zeros(BATCH, H, 4, D + 1)}, ["q: expected", "24", "(3, 4, 4, 25)"]),
    "q heads": (ValueError, {"q": zeros(BATCH, 3, 4, D)}, ["q: expected", "2", "(3, 3, 4, 24)"]),
    "q no heads": (ValueError, {"q": zeros(BATCH, 0, 4, D)}, ["q: expected"]),
    "q float64": (TypeError, {"q": zeros(BATCH, H, 4, D, dtype="f8")}, ["q: expected", "float64"]),
    "q big-endian": (TypeError, {"q": zeros(BATCH, H, 4, D, dtype=">f4")}, ["q: expected", ">f4"]),
    "q None": (TypeError, {"q": None}, ["q: expected"]),
    "k alone": ((TypeError, ValueError), {"v": None}, ["v", "expected"]),
    "v alone": ((TypeError, ValueError), {"k": None}, ["k", "expected"]),
    "rows beyond": (ValueError, {"rows": [0, 1, 5]}, ["rows: expected", "5"]),
    "rows twice": (ValueError, {"rows": [0, 0, 1]}, ["rows: expected"]),
    "rows for fewer": (ValueError, {"rows": [0, 1]}, ["rows"]),
    "window": (ValueError, {"window": 5}, ["window: expected", "5"]),
    "softcap": (ValueError, {"softcap": -1.0}, ["softcap: expected", "-1.0"]),
    "scale": (ValueError, {"scale": float("nan")}, ["scale: expected", "nan"]),
    "causal_align": (ValueError, {"causal_align": "left"}, ["causal_align: ", "'left'"]),
    "mask shape": (ValueError, {"mask": np.ones((4, 99), bool)}, ["mask: expected", "(4, 99)"]),
    "mask of the old lengths": (ValueError, {"mask": np.ones((4, 10), bool)}, ["mask: expected", "(4, 10)"]),
    "mask float": (TypeError, {"mask": zeros(4, 14)}, ["mask: expected bool", "float32"]),
    "bias shape": (ValueError, {"bias": zeros(4, 15)}, ["bias: expected", "(4, 15)"]),
    "bias dtype": (TypeError, {"bias": zeros(4, 14, dtype="f8")}, ["bias: expected", "float64"]),
    "slopes": (ValueError, {"alibi_slopes": zeros(HK)}, ["alibi_slopes: expected", "(2,)"]),
    "slopes per row": (ValueError, {"alibi_slopes": zeros(2, H)}, ["alibi_slopes: expected", "(2, 4)"]),
    "sinks": (ValueError, {"sinks": zeros(HK)}, ["sinks: expected", "(2,)"]),
    "out shape": (ValueError, {"out": zeros(BATCH, H, 4, D)}, ["out: expected", "(3, 4, 4, 24)"]),
    "out dtype": (TypeError, {"out": zeros(BATCH, H, 4, DV, dtype="f8")}, ["out: expected", "float64"]),
    "config head_dim": (ValueError, {"config": FlashAttentionConfig(head_dim=D + 1)}, ["config", "head_dim"]),
    "config type": (TypeError, {"config": {}}, ["config: expected", "dict"]),
    "config dropout": (
        NotImplementedError, {"config": FlashAttentionConfig(head_dim=D, dropout_p=0.1)}, ["dropout_p"],
    ),
    "threads": (ValueError, {"num_threads": 0}, ["num_threads: expected", "0"]),
    "pv": (ValueError, {"pv": "fp16"}, ["pv: expected", "'fp16'"]),
    "dropout": (TypeError, {"dropout_p": 0.1}, ["dropout_p"]),
    "unknown": (TypeError, {"attn_mask": None}, ["attn_mask"]),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ATTENTION)
def test_bad_attention_appends_nothing(dtype, name, tmp_path):
    error, change, parts = ATTENTION[name]
    if name == "pv" and dtype != "int8":
        error = (ValueError, NotImplementedError)
        parts = ["pv"]
    cache = some(dtype)
    call = {"q": tokens(4, BATCH)[0], **arrays()} | change
    out = call.get("out")
    with unchanged(cache, tmp_path / "state"):
        raises(error, lambda: cyflash.flash_attention_with_kvcache(call.pop("q"), cache, **call), *parts)
    assert out is None or not out.any()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_lengths_of_queries(dtype, tmp_path):
    """Without new keys they count queries."""
    cache = some(dtype)
    q = tokens(4, BATCH)[0]
    with unchanged(cache, tmp_path / "state"):
        for lengths in ([5, 1, 1], [-1, 1, 1]):
            raises(ValueError, lambda n=lengths: attend(q, cache, lengths=n), "lengths: expected")
        raises(ValueError, lambda: attend(q, cache, lengths=[1, 1]), "lengths: expected")
        raises(TypeError, lambda: attend(q, cache, lengths=[1.0, 1.0, 1.0]), "lengths: expected")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_wider_window_than_the_caches(dtype, tmp_path):
    cache, _ = make(BATCH, 32, dtype, window=(20, 0))
    q, k, v = tokens(4, BATCH)
    with unchanged(cache, tmp_path / "state"):
        for window in ((21, 0), (-1, 0), (-1, -1), (30, 2)):
            raises(ValueError, lambda w=window: attend(q, cache, k, v, window=w), "window", "20")


@pytest.mark.parametrize("cache", [None, 3, {"k": 1}, np.zeros((2, 2, 4, 8), F32)], ids=str)
def test_what_is_no_cache(cache):
    q = tokens(4, BATCH)[0]
    raises(TypeError, lambda: attend(q, cache), "cache: expected", type(cache).__name__)


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_output_over_the_inputs(dtype, tmp_path):
    cache, _ = make(BATCH, 32, dtype, v_head_dim=D)
    q, k, v = (x.astype(numpy_dtype(dtype)) for x in tokens(4, BATCH, heads=(HK, HK), sizes=(D, D)))
    with unchanged(cache, tmp_path / "state"):
        for out in (q, k, v):
            call = {"out": out}
            raises(ValueError, lambda: cyflash.flash_attention_with_kvcache(q, cache, k, v, **call),  # noqa: B023
                   "out", "overlap")


def test_queries_may_not_be_codes():
    cache = some("int8")
    q = quantize(tokens(4, BATCH)[0])
    with pytest.raises(TypeError, match="q: expected"):
        attend(q.data, cache)


# Paged


def test_no_page_left(tmp_path):
    """Two rows together need one page more than there is: neither gets any."""
    for dtype in DTYPES:
        cache, oracle = make_paged(4, 16, dtype)
        rows = [cache.add() for _ in range(3)]
        _, k, v = tokens(60, 3)
        cache.append(k[:2, :, :20], v[:2, :, :20], rows=rows[:2], lengths=[20, 10])
        folder = tmp_path / dtype
        with unchanged(cache, folder, rows):
            raises(ValueError, lambda: cache.append(k, v, rows=rows), "page")  # noqa: B023 - called at once
            raises(ValueError, lambda: cache.append(k[:2, :, :15], v[:2, :, :15], rows=rows[1:]), "page")  # noqa: B023
            raises(ValueError, lambda: attend(np.zeros((1, H, 33, D), F32), cache, k[:1, :, :33],  # noqa: B023
                                              v[:1, :, :33], rows=rows[2:]), "page")  # noqa: B023
        cache.append(k[:2, :, :6], v[:2, :, :6], rows=rows[1:])
        assert oracle.lengths.size == 0


def test_rows_that_are_not_there(tmp_path):
    cache, _ = make_paged(4, 16)
    _, k, v = tokens(8)
    raises(ValueError, lambda: cache.fork(0), "row")
    row, gone = cache.add(), cache.add()
    cache.append(k, v, rows=[row])
    cache.free(gone)
    with unchanged(cache, tmp_path / "state", [row]):
        for bad in (gone, 17, -1):
            for call in (lambda: cache.fork(bad), lambda: cache.free(bad),  # noqa: B023
                         lambda: cache.append(k, v, rows=[bad]), lambda: cache.truncate([0], rows=[bad]),  # noqa: B023
                         lambda: cache.reset(rows=[bad]),  # noqa: B023
                         lambda: attend(np.zeros((1, H, 1, D), F32), cache, rows=[bad])):  # noqa: B023
                raises(ValueError, call, "row")
        raises(TypeError, lambda: cache.fork("first"), "row")


def test_a_fork_that_cannot_be_written(tmp_path):
    """The shared last page is copied on write: without a page for that nothing is written."""
    cache, _ = make_paged(1, 16)
    _, k, v = tokens(8)
    row = cache.add()
    cache.append(k, v, rows=[row])
    fork = cache.fork(row)
    with unchanged(cache, tmp_path / "state", [row, fork]):
        raises(ValueError, lambda: cache.append(k, v, rows=[fork]), "page")
    cache.free(row)
    cache.append(k, v, rows=[fork])  # now it is alone
    assert cache.lengths[fork] == 16
