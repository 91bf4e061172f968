"""Offsets beyond 2^31 elements, and beyond 2^32 bytes of codes: arrays that reach so far but are mostly untouched."""
import math
import mmap
import sys

import cases
import numpy as np
import pytest

import cyflash
from cyflash import flash_attention, flash_attention_int8

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or sys.maxsize < 2**32, reason="needs memory that is given when it is touched"
)

FAR = 2**31 + 2**20  # elements


def sparse(shape, dtype):
    """Zeros of which only the pages that are touched take memory."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, size, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def spread(x, axis):
    """x, whose last entry along `axis` lies FAR elements or more after the first."""
    n = x.shape[axis]
    inner = math.prod(x.shape[axis + 1 :])
    step = max(inner, -(-FAR // max(n - 1, 1)))
    outer = math.prod(x.shape[:axis])
    assert outer == 1 and n > 1
    view = np.lib.stride_tricks.as_strided(
        sparse((n * step,), x.dtype), x.shape,
        (*(0 for _ in x.shape[:axis]), step * x.itemsize, *(s for s in np.empty(x.shape[axis + 1 :], x.dtype).strides)),
    )
    view[...] = x
    return view


def test_the_arrays_reach_so_far():
    x = cases.arrays(1, 3, Lq=5, D=4)[0]
    far = spread(x, 1)
    assert np.array_equal(far, x) and far.strides[1] * 2 >= 2**31 * 4
    assert spread(x[0, 0], 0).strides[0] * 4 >= 2**31 * 4


ARGUMENTS = ("q", "k", "v", "bias", "mask", "out")


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("axis", ["heads", "rows"])
def test_far_heads_and_rows(build, name, axis):
    """An argument's last head, or last row, is that far from its first."""
    heads = 4 if axis == "heads" else 1
    for Lq, Lk in ((70, 130), (3, 130)):
        q, k, v = cases.arrays(1, heads, max(1, heads // 2), Lq, Lk, 24)
        options = cases.options("bias", 1, heads, Lq, Lk) | cases.options("mask", 1, heads, Lq, Lk)
        given = {"q": q, "k": k, "v": v, **options, "out": np.zeros_like(q)}
        for attention in (flash_attention, flash_attention_int8):
            expected = attention(**given, return_lse=True)
            far = spread(given[name], 1) if axis == "heads" else spread(given[name][0, 0], 0)[None, None]
            result = attention(**given | {name: far}, return_lse=True)
            cases.assert_same_bits(result, expected)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_far_codes(build, part):
    """Codes given as arrays, more than 2^32 bytes from the first to the last row."""
    made = (cyflash.quantize(x[0, 0], "token") for x in cases.arrays(Lq=50, Lk=90, D=24))
    tensors = dict(zip("qkv", made, strict=True))
    scales = {f"{name}_scale": x.scale for name, x in tensors.items()}
    codes = {name: x.data for name, x in tensors.items()}
    expected = flash_attention_int8(**codes, **scales, return_lse=True)
    result = flash_attention_int8(**codes | {part: spread(codes[part], 0)}, **scales, return_lse=True)
    cases.assert_same_bits(result, expected)


def test_far_tokens_without_padding(one_build):
    q, k, v = (np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in cases.arrays(1, 2, 1, 90, D=24))
    ends = np.array([0, 7, 60, 90], np.int32)
    for attention in (cyflash.flash_attention_varlen, cyflash.flash_attention_int8_varlen):
        expected = attention(q, k, v, ends, ends, causal=True)
        result = attention(*(spread(x, 0) for x in (q, k, v)), ends, ends, causal=True)
        assert np.array_equal(result, expected)


def test_far_values_are_quantised(one_build):
    x = cases.arrays(1, 2, Lq=600, D=24)[0]
    for how in ("tensor", "head", "token"):
        expected, far = (cyflash.quantize(y, how, smooth=True) for y in (x, spread(x, 1)))
        assert np.array_equal(far.data, expected.data) and np.array_equal(far.scale, expected.scale)


@pytest.mark.parametrize("Lq", [3, 100])
def test_more_keys_than_32_bits_count(one_build, Lq):
    """A window at the end of 2^31 keys and some."""
    Lk, D, near = 2**31 + 5000, 1, 4096
    q = cases.arrays(1, 1, Lq=Lq, D=D)[0][0, 0]
    k, v = (sparse((Lk, D), np.float32) for _ in "kv")
    k[-near:], v[-near:] = (x[0, 0] for x in cases.arrays(1, 1, Lq=near, D=D, seed=1)[:2])
    slopes = [0.01]
    options = {"window": (300, 0), "alibi_slopes": slopes, "return_lse": True}
    out, lse = flash_attention(q, k, v, **options)
    expected, expected_lse = cyflash.reference.attention(q, k[-near:], v[-near:], **options)
    assert np.abs(out - expected).max() < 1e-5 and np.abs(lse - expected_lse).max() < 1e-5


def _bias_beyond(Lk, Lq, window):
    bias = sparse((Lq, Lk), np.float32)
    for i in range(Lq - 40, Lq):
        bias[i, max(0, i - window) : i + 1] = np.sin(np.arange(min(i, window) + 1) + i)
    return bias


def test_bias_of_more_numbers_than_32_bits_count(one_build):
    L, D = 46400, 4  # squared, above 2^31
    q, k, v = (x[0, 0] for x in cases.arrays(Lq=L, D=D))
    bias = _bias_beyond(L, L, 30)
    assert bias.size > 2**31
    out = flash_attention(q, k, v, bias=bias, causal=True, window=(30, 0))
    near = slice(L - 200, L)
    expected = cyflash.reference.attention(
        q[near], k[near], v[near], bias=bias[near, near], causal=True, window=(30, 0)
    )
    assert np.abs(out[-100:] - expected[-100:]).max() < 1e-5


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_pages_beyond(one_build, dtype):
    """Of a pool of more than 2^31 numbers only the last pages are free."""
    D, page_size, Hk = 256, 256, 2
    pages = -(-FAR // (D * page_size * Hk)) + 8
    near, far = (cyflash.PagedKVCache(n, page_size, Hk, D, dtype) for n in (8, pages))
    far._rows.pool.references[: pages - 8] = 1
    results = []
    for cache in (near, far):
        rows = [cache.add(), cache.add()]
        _, k, v = cases.arrays(2, Hk, Lq=600, D=D)
        cache.append(k, v, rows=rows)
        q = cases.arrays(2, 4, Lq=3, D=D)[0]
        results.append(cyflash.flash_attention_with_kvcache(q, cache, rows=rows, return_lse=True))
    assert far._rows.table[:, 0].min() >= pages - 8
    cases.assert_same_bits(results[1], results[0])
