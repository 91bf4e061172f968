"""What a cache takes: nbytes is what is held, int8 is small, a window does not grow, calls need little."""
import tracemalloc

import numpy as np
import pytest
from caching import DTYPES, DV, FLOATS, HK, D, H, attend, make_paged, numpy_dtype, tokens

import cyflash

KINDS = {
    **{dtype: {"dtype": dtype} for dtype in DTYPES},
    "int8 mean and sinks": {"dtype": "int8", "k_mean": np.ones((8, 1, 128), np.float32), "fp32_sinks": 7},
    "int8 tensor": {"dtype": "int8", "granularity": "tensor", "k_scale": 0.1, "v_scale": 0.1},
    "window": {"dtype": "float32", "window": (100, 0)},
}


def build_cache(batch, capacity, *, dtype, **settings):
    return cyflash.KVCache(batch, 8, 128, capacity, numpy_dtype(dtype), **settings)


def traced(function):
    """What function returns, the bytes allocated since that are still there, and the most there were."""
    tracemalloc.start()
    try:
        kept = function()
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return kept, now, peak


@pytest.mark.parametrize("name", KINDS)
def test_nbytes_is_what_is_held(name):
    """Of a new cache, within what Python objects take."""
    for batch, capacity in ((1, 2000), (4, 300)):
        build_cache(batch, capacity, **KINDS[name])  # whatever is imported late is imported now
        cache, held, peak = traced(lambda: build_cache(batch, capacity, **KINDS[name]))  # noqa: B023 - called at once
        assert abs(held - cache.nbytes) < 0.005 * cache.nbytes + 16384
        assert peak < 1.05 * cache.nbytes + 65536


@pytest.mark.parametrize("name", KINDS)
def test_nbytes_after_a_life(name):
    """Appends, truncates, reorders and attention neither add memory nor hide it."""
    settings = KINDS[name]
    k = v = np.ones((2, 8, 100, 128), np.float32)
    q = k[:, :, :1]

    def life():
        cache = build_cache(2, 300, **settings)
        for _ in range(3):
            cache.append(k, v)
            attend(q, cache)
            cache.reorder([1, 0])
            cache.truncate(np.maximum(cache.lengths - 50, 0) if name != "window" else cache.lengths)
        return cache

    life()
    cache, held, _ = traced(life)
    assert abs(held - cache.nbytes) < 0.005 * cache.nbytes + 32768


@pytest.mark.parametrize("dtype", DTYPES)
def test_nbytes_grows_with_the_cache(dtype):
    _, k, v = tokens(300, 2)

    def life():
        cache = cyflash.KVCache(2, HK, D, 16, numpy_dtype(dtype), v_head_dim=DV, grow=True)
        sizes = [cache.nbytes]
        for _ in range(10):
            cache.append(k, v)
            sizes.append(cache.nbytes)
        return cache, sizes

    life()
    (cache, sizes), held, _ = traced(life)
    assert abs(held - cache.nbytes) < 0.01 * cache.nbytes + 32768
    assert sizes == sorted(sizes) and sizes[-1] > 10 * sizes[0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_float_cache_takes_what_its_numbers_take(dtype):
    """Whole pages and little more."""
    cache = build_cache(2, 1024, dtype=dtype)
    numbers = 2 * 8 * 1024 * (128 + 128) * numpy_dtype(dtype).itemsize
    assert numbers <= cache.nbytes < 1.01 * numbers + 4096


def test_16_bit_takes_half():
    sizes = {dtype: build_cache(4, 1024, dtype=dtype).nbytes for dtype in FLOATS}
    for dtype in ("float16", "bfloat16"):
        assert sizes["float32"] > 1.99 * sizes[dtype]


@pytest.mark.parametrize("settings", [
    {}, {"k_mean": np.ones((8, 1, 128), np.float32)}, {"granularity": "tensor", "k_scale": 0.1, "v_scale": 0.1},
    {"granularity": "head", "k_scale": np.ones((8, 1, 1)), "v_scale": np.ones((8, 1, 1))},
], ids=["token", "k_mean", "tensor", "head"])
def test_int8_takes_a_quarter_and_its_scales(settings):
    """Per token, head_dim 128: at least 3.6 times fewer bytes than float32."""
    for batch, capacity in ((1, 4096), (8, 1000)):
        float32 = build_cache(batch, capacity, dtype="float32").nbytes
        assert float32 >= 3.6 * build_cache(batch, capacity, dtype="int8", **settings).nbytes


def test_int8_per_token():
    """The same from the growth of nbytes with capacity: no fixed part to hide behind."""
    def per_token(dtype):
        return (build_cache(1, 8192, dtype=dtype).nbytes - build_cache(1, 4096, dtype=dtype).nbytes) / 4096

    assert per_token("float32") == pytest.approx(8 * (128 + 128) * 4, rel=1e-3)
    assert per_token("float32") / per_token("int8") >= 3.6


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_caches_memory_does_not_grow(dtype):
    """Ten thousand tokens through a window of 100."""
    cache = cyflash.KVCache(1, HK, D, 160, numpy_dtype(dtype), v_head_dim=DV, window=(100, 0))
    q, k, v = tokens(50)
    for _ in range(20):
        cache.append(k, v)
    before = cache.nbytes

    def go_on():
        for _ in range(180):
            cache.append(k, v)
        return attend(q[:, :, :1], cache)

    _, held, peak = traced(go_on)
    assert cache.lengths.tolist() == [10000]
    passed = 9000 * HK * (D + DV) * numpy_dtype(dtype).itemsize
    assert cache.nbytes - before < passed / 100, "a table of pages may grow, keys and values may not"
    assert held < 65536 and peak < 1 << 20
    assert before < 2.1 * cyflash.KVCache(1, HK, D, 160, numpy_dtype(dtype), v_head_dim=DV).nbytes


def test_a_window_needs_no_more_than_its_capacity():
    """Memory is that of the capacity, not of the length."""
    small = cyflash.KVCache(2, 8, 128, 512, window=(400, 0)).nbytes
    large = cyflash.KVCache(2, 8, 128, 4096, window=(400, 0)).nbytes
    assert small < large / 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_copy_the_cache(dtype):
    """A call of one query on 4,000 keys in float32, 16 bits or codes allocates a small part of what they take."""
    cache = build_cache(1, 4096, dtype=dtype)
    x, q = np.ones((1, 8, 1000, 128), np.float32), np.ones((1, 32, 1, 128), np.float32)
    for _ in range(4):
        cache.append(x, x)
    attend(q, cache, num_threads=2)
    _, _, peak = traced(lambda: attend(q, cache, num_threads=2))
    assert peak < cache.nbytes / 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_growing_history_is_not_repacked(dtype):
    """Appending one token allocates as little on 4,000 tokens as on none."""
    cache = build_cache(1, 4096, dtype=dtype)
    one, x = np.ones((1, 8, 1, 128), np.float32), np.ones((1, 8, 1000, 128), np.float32)
    cache.append(one, one)
    _, _, first = traced(lambda: cache.append(one, one))
    for _ in range(4):
        cache.append(x, x)
    _, _, last = traced(lambda: cache.append(one, one))
    assert last < first + 16384


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pool_is_as_large_as_its_pages(dtype):
    """Rows and forks take none of it but their tables."""
    cache, held, _ = traced(lambda: make_paged(64, 16, dtype)[0])
    assert abs(held - cache.nbytes) < 0.01 * cache.nbytes + 16384
    _, k, v = tokens(100)
    before = cache.nbytes
    row = cache.add()
    cache.append(k, v, rows=[row])
    for _ in range(5):
        cache.fork(row)
    assert cache.nbytes < before + 4096
    assert make_paged(128, 16, dtype)[0].nbytes > 1.9 * before


def test_reorder_copies_no_tokens():
    """Beams of 1,000 tokens: what is allocated is tables."""
    cache = cyflash.KVCache(4, 8, 128, 1024)
    x = np.ones((4, 8, 1000, 128), np.float32)
    cache.append(x, x)
    cache.reorder([1, 0, 3, 2])
    _, held, peak = traced(lambda: cache.reorder([2, 2, 1, 0]))
    assert peak < 65536 and held < 65536
    assert H == 4
