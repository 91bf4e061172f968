"""Few queries on many keys, whose keys are split: the same bits for any threads, batch and paging; the bound.

The split is of each row's own keys, so nothing that belongs to other rows may show.
"""
import bounds
import cases
import cases_int8
import numpy as np
import pytest
from caching import DTYPES, Oracle, attend, judge, numpy_dtype, same_bits

import cyflash
from cyflash import flash_attention, flash_attention_int8, quantize, reference

KEYS = (63, 64, 65, 255, 256, 257, 511, 513, 1023, 1024, 1025, 2047, 2049, 4095, 4097, 8200)
QUERIES = (1, 2, 3, 5, 8, 15, 16, 17, 31, 48, 49)
D, DV = 16, 12


def inputs(Lq, Lk, H=4, Hk=2, B=1, seed=0):
    return cases.arrays(B, H, Hk, Lq, Lk, D, DV, seed=seed)


def run(call, **options):
    return flash_attention(*call, **options, return_lse=True)


def run_int8(call, **options):
    return flash_attention_int8(*call, **options, return_lse=True)


@pytest.fixture(params=["fp32", "int8"])
def attention(request):
    return {"fp32": run, "int8": run_int8}[request.param]


# Right


@pytest.mark.parametrize("Lq", [1, 3, 17])
def test_every_length_is_within_the_bound(build, Lq):
    """At every place where one more chunk begins, near and far from 64, 256, 1024 keys."""
    q, k, v = inputs(Lq, KEYS[-1])
    for Lk in KEYS:
        cases.verify(q, k[:, :, :Lk], v[:, :, :Lk], causal=Lk % 2 == 0)


@pytest.mark.parametrize("Lq", QUERIES)
def test_every_number_of_queries_is_within_the_bound(one_build, Lq):
    for Lk in (300, 3000):
        for causal in (False, True):
            cases.verify(*inputs(Lq, Lk), causal=causal)


LENGTHS = ((1, 255), (1, 1025), (1, 4097), (3, 2000), (17, 1500))


@pytest.mark.parametrize("pv", ["int8", "fp32"])
def test_int8_is_within_its_bound(build, pv):
    for Lq, Lk in LENGTHS:
        cases_int8.verify(*inputs(Lq, Lk), pv=pv, causal=True)
        cases_int8.verify(*inputs(Lq, Lk), pv=pv, fp32_sinks=5)


def test_weights_in_bfloat16(build):
    """They are rounded relative to the greatest of their own chunk: each by at most 2^-9 of itself, as in one chunk."""
    for Lq, Lk in LENGTHS:
        q, k, v = inputs(Lq, Lk)
        for arguments in ({"causal": True}, {"fp32_sinks": 5}):
            out, lse = run_int8((q, k, v), pv="bf16", **arguments)
            exact, exact_lse = reference.attention_int8(q, k, v, pv="fp32", **arguments, return_lse=True)
            size = reference.attention_int8(q, k, np.abs(v), pv="fp32", **arguments)
            assert (np.abs(out - exact) <= (2.0**-8 + 2.0**-16) * size).all()  # of the weight and of the value
            np.testing.assert_allclose(lse, exact_lse, rtol=1e-5)


@pytest.mark.parametrize("name", [*cases.NAMES, "all"])
def test_options(one_build, name):
    """Each option over several chunks, in both precisions; with one query and with a few."""
    for Lq, Lk in ((1, 3000), (5, 2100)):
        options = cases.all_options(2, 4, Lq, Lk) if name == "all" else cases.options(name, 2, 4, Lq, Lk)
        cases.verify(*inputs(Lq, Lk, B=2), **options)
        cases_int8.verify(*inputs(Lq, Lk, B=2), **options)


@pytest.mark.parametrize("ignored", ["window", "softcap", "bias", "mask", "alibi_slopes", "sinks", "scale",
                                     "causal_align"])
def test_no_option_is_ignored(one_build, ignored):
    """Over several chunks, one query: leaving an option out moves the result far beyond the bound."""
    q, k, v = inputs(2, 3000)
    options = cases.all_options(1, 4, 2, 3000) | {"window": (700, 500)}
    if ignored == "causal_align":
        options = {"causal": True, "causal_align": "top-left"}
    rest = {name: value for name, value in options.items() if name != ignored}
    case, other = bounds.Case(q, k, v, **options), bounds.Case(q, k, v, **rest)
    case.check(*run((q, k, v), **options))
    other.check(*run((q, k, v), **rest))
    assert case.distance_to(other) > 100


def test_a_sink_counts_once(one_build, attention):
    """However many chunks a row has: sinks as large as all keys together."""
    for Lk in (64, 1000, 5000, 20000):
        q, k = np.zeros((1, 4, 1, D), np.float32), np.zeros((1, 2, Lk, D), np.float32)
        v = np.ones((1, 2, Lk, DV), np.float32)
        out, lse = attention((q, k, v), sinks=np.full(4, np.log(Lk), np.float32))
        np.testing.assert_allclose(out, 0.5, rtol=1e-2 if attention is run_int8 else 1e-5)
        np.testing.assert_allclose(lse, np.log(2 * Lk), rtol=1e-5)


def test_chunks_without_a_visible_key(one_build, attention):
    """A mask, a window or bias that hides the first chunks, the last, all but one key, or everything."""
    Lk = 6000
    q, k, v = inputs(1, Lk)
    for keep in (np.s_[:10], np.s_[-10:], np.s_[3000:3001], np.s_[2048:4096], np.s_[0:0], np.s_[::1999]):
        mask = np.zeros(Lk, bool)
        mask[keep] = True
        bias = np.where(mask, np.float32(0), np.float32(-np.inf))
        got = attention((q, k, v), mask=mask)
        same_bits(attention((q, k, v), bias=bias), got)
        if attention is run:
            bounds.Case(q, k, v, mask=mask).check(*got)
        if not mask.any():
            assert not got[0].any() and (got[1] == -np.inf).all()
            sunk = attention((q, k, v), mask=mask, sinks=np.full(4, 2.5, np.float32))
            assert not sunk[0].any() and (sunk[1] == 2.5).all()


def test_scores_far_apart(one_build):
    """Chunks whose maxima differ by hundreds: nothing overflows, nothing that counts is lost."""
    q, k, v = inputs(2, 5000)
    for place in (0, 1700, 4999):
        far = k.copy()
        far[:, :, place] *= 300
        cases.verify(q, far, v)
        cases.verify(-q, far, v, alibi_slopes=np.full(4, 0.5, np.float32))


def test_nan_and_infinity(build):
    """A visible NaN reaches the row from any chunk; a hidden one from none."""
    for place in (0, 900, 2100, 4999):
        q, k, v = inputs(2, 5000)
        k[0, 0, place, 3] = np.nan
        out, lse = run((q, k, v))
        assert np.isnan(out[0, :2]).all() and np.isnan(lse[0, :2]).all() and np.isfinite(out[0, 2:]).all()
        mask = np.arange(5000) != place
        v[0, 0, place] = np.inf
        out, lse = run((q, k, v), mask=mask)
        assert np.isfinite(out).all() and np.isfinite(lse).all()
        bounds.Case(q, k, v, mask=mask).check(out, lse)


def test_finfo_min_is_finite(one_build):
    """A row of finfo.min in bias is uniform over all chunks."""
    q, k, v = inputs(1, 3000)
    k[...] = 0
    out = flash_attention(q, k, v, bias=np.full(3000, np.finfo(np.float32).min))
    np.testing.assert_allclose(out[0, :, 0], np.repeat(v[0].mean(axis=1), 2, axis=0), rtol=1e-4, atol=1e-5)


# The same bits


@pytest.mark.parametrize("lengths", [(1, 4000), (3, 2500), (17, 1200)],
                         ids=str)
def test_threads(build, attention, lengths):
    for heads in ((1, 1), (4, 2)):
        q, k, v = cases.arrays(1, *heads, *lengths, D, DV)
        for options in ({}, cases.all_options(1, heads[0], *lengths)):
            one = attention((q, k, v), **options, num_threads=1)
            for threads in (2, 5):
                same_bits(attention((q, k, v), **options, num_threads=threads), one)


@pytest.mark.parametrize("lengths", [(1, 5000), (3, 2500), (17, 1500)], ids=str)
def test_any_batch(one_build, attention, lengths):
    """A sequence alone, and as one of 2 or 9, first or last, with any number of threads."""
    q, k, v = inputs(*lengths, B=9)
    alone = attention((q[4:5], k[4:5], v[4:5]), num_threads=1)
    for start, stop in ((4, 6), (3, 5), (0, 9), (0, 5), (4, 9)):
        for threads in (1, 2, 7):
            among = attention([x[start:stop] for x in (q, k, v)], num_threads=threads)
            same_bits([x[4 - start : 5 - start] for x in among], alone)


def test_any_number_of_heads(one_build, attention):
    """A kv head with its group alone, and among others."""
    q, k, v = inputs(1, 4000, H=12, Hk=3)
    whole = attention((q, k, v), num_threads=2)
    for kv in range(3):
        heads = np.s_[:, 4 * kv : 4 * kv + 4]
        same_bits(attention((q[heads], k[:, kv : kv + 1], v[:, kv : kv + 1])), [x[heads] for x in whole])


def test_one_query_of_several_sees_what_it_sees_alone(one_build):
    """The last of a few causal queries within the bound of itself alone: chunks may differ, keys may not."""
    q, k, v = inputs(6, 3000)
    out, lse = run((q, k, v), causal=True)
    for i in range(6):
        end = 3000 - 5 + i
        bounds.Case(q[:, :, i : i + 1], k[:, :, :end], v[:, :, :end]).check(out[:, :, i : i + 1], lse[:, :, i : i + 1])


def test_repeats(one_build, attention):
    call = inputs(1, 4000)
    first = attention(call, num_threads=2)
    for _ in range(5):
        same_bits(attention(call, num_threads=2), first)


# Through a cache


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_row_of_a_cache(build, dtype):
    """Any threads, any other rows, pages in any order: the bits of whole arrays."""
    H, Hk = {"float32": (8, 2), "float16": (1, 1), "bfloat16": (16, 1), "int8": (6, 2)}[dtype]
    L = 1300
    q, k, v = cases.arrays(1, H, Hk, 4, L, D, DV)
    of = numpy_dtype(dtype)
    alone = cyflash.KVCache(1, Hk, D, L, of, v_head_dim=DV)
    among = cyflash.KVCache(3, Hk, D, 4000, of, v_head_dim=DV)
    paged = cyflash.PagedKVCache(200, 16, Hk, D, of, v_head_dim=DV)
    rows = [paged.add(), paged.add()]
    oracle = Oracle(1, dtype, kv_heads=Hk, head_dim=D, v_head_dim=DV)
    alone.append(k, v), oracle.append(k, v)
    for start in range(0, L, 100):
        now = np.s_[:, :, start : start + 100]
        among.append(np.concatenate([k[now], k[now], k[now]]), np.concatenate([v[now], v[now], v[now]]),
                     lengths=[int(start < 300), 100, 7])
        paged.append(k[now], v[now], rows=rows[:1])
        paged.append(k[now][:, :, :7], v[now][:, :, :7], rows=rows[1:])
    for Lq in (1, 4):
        x = q[:, :, :Lq]
        expected = attend(x, alone, num_threads=1)
        judge(oracle, 0, x[0], expected[0][0], expected[1][0])
        for threads in (2, 5):
            same_bits(attend(x, alone, num_threads=threads), expected)
            same_bits(attend(x, among, rows=[1], num_threads=threads), expected)
            three = attend(np.concatenate([x, x, x]), among, num_threads=threads)
            same_bits([y[1:2] for y in three], expected)
            same_bits(attend(x, paged, rows=rows[:1], num_threads=threads), expected)
        whole = [y.astype(of) for y in (k, v)] if dtype in ("float16", "bfloat16") else [k, v]
        if dtype == "int8":
            same_bits(run_int8((x, *whole), smooth_k=False, causal=True), expected)
        else:
            same_bits(run((x, *whole), causal=True), expected)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_long_row_with_a_window(one_build, dtype):
    """Chunks are of the row's logical keys: a window cache that has given up thousands of keys gives the same bits."""
    q, k, v = cases.arrays(1, 4, 2, 4000, 4000, D, DV)
    left = 1500
    ring = cyflash.KVCache(1, 2, D, 1600, dtype, v_head_dim=DV, window=(left, 0))
    whole = cyflash.KVCache(1, 2, D, 4000, dtype, v_head_dim=DV)
    for start in range(0, 4000, 80):
        now = np.s_[:, :, start : start + 80]
        ring.append(k[now], v[now]), whole.append(k[now], v[now])
        if start % 800 == 0:
            for Lq in (1, 5):
                x = q[:, :, start : start + Lq]
                same_bits(attend(x, ring), attend(x, whole, window=(left, 0)))


def test_quantised_operands(one_build):
    """Codes given by the caller are split as those of the call are."""
    q, k, v = inputs(1, 5000)
    tensors = [quantize(x, "token", smooth=x is k) for x in (q, k, v)]
    same_bits(run_int8(tensors), run_int8((q, k, v)))


@pytest.mark.slow
def test_every_length(build):
    """All numbers of keys up to where several chunks are in use, one query, in both precisions."""
    q, k, v = inputs(1, 2600)
    for Lk in range(1, 2600, 3):
        cases.verify(q, k[:, :, :Lk], v[:, :, :Lk])
        if Lk % 5 == 0:
            cases_int8.verify(q, k[:, :, :Lk], v[:, :, :Lk])
