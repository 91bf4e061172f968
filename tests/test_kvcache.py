"""What a KVCache holds: append, truncate, reset, reorder, growth and windows, against lists of keys and values."""
from contextlib import suppress

import cases
import numpy as np
import pytest
from caching import (
    DTYPES,
    DV,
    FLOATS,
    HK,
    D,
    H,
    attend,
    dense,
    judge,
    make,
    make_paged,
    numpy_dtype,
    same_bits,
    tokens,
    verify,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import cyflash
from cyflash import KVCache

MEAN = np.linspace(-1, 1, HK * D, dtype=np.float32).reshape(HK, 1, D)
INT8 = {"k_mean": MEAN, "fp32_sinks": 5}


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


def part(x, start, stop):
    return x[:, :, start:stop]


# Appends that fail


def rules_of_rows(cache):
    """Those at the head of pool.py."""
    rows = cache._rows
    held = rows.table[rows.table >= 0]
    assert np.array_equal(rows.pool.references, np.bincount(held, minlength=rows.pool.pages))
    for table, first, length in zip(rows.table, rows.first, rows.lengths, strict=True):
        pages = np.flatnonzero(table >= 0)
        assert pages.tolist() == list(range(first // rows.page_size, -(-length // rows.page_size)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("settings", [{}, {"window": (20, 0)}, {"grow": True}, {"pages": 12}], ids=str)
def test_an_append_that_ends_within_loses_nothing(monkeypatch, dtype, settings, error):
    """While tokens are written, as Ctrl-C may: no page is lost, and the same append after it is right."""
    _, k, v = tokens(64, 3)
    caches = []
    for _ in range(2):
        if "pages" in settings:
            cache, _ = make_paged(settings["pages"], 16, dtype)
            rows = {"rows": [cache.add(), cache.add(), cache.add()]}
        else:
            cache, rows = make(3, 64, dtype, **settings)[0], {}
        cache.append(part(k, 0, 30), part(v, 0, 30), **rows)
        caches.append(cache)
    cache, other = caches

    def end(*_):
        raise error

    for start, stop in ((30, 31), (30, 64)):  # within the last page, and beyond it
        with monkeypatch.context() as patch:
            patch.setattr(type(cache._format), "write", end)
            for _ in range(3):
                with pytest.raises(error):
                    cache.append(part(k, start, stop), part(v, start, stop), **rows)
        assert cache.lengths.tolist() == [30, 30, 30]
        rules_of_rows(cache)
    for one in caches:
        one.append(part(k, 30, 64), part(v, 30, 64), **rows)
    rules_of_rows(cache)
    same_bits(attend(tokens(1, 3)[0], cache, **rows), attend(tokens(1, 3)[0], other, **rows))


# What it says of itself


def test_attributes(dtype):
    cache, _ = make(3, 100, dtype)
    assert cache.lengths.dtype == np.int64 and cache.lengths.tolist() == [0, 0, 0]
    assert cache.capacity == 100 and cache.dtype == numpy_dtype(dtype)
    assert isinstance(cache.nbytes, int) and cache.nbytes > 0


def test_defaults():
    cache = KVCache(2, 1, 16, 10)
    assert cache.dtype == np.float32 and cache.capacity == 10
    k, v = np.ones((2, 1, 3, 16), np.float32), np.ones((2, 1, 3, 16), np.float32)
    cache.append(k, v)
    assert attend(np.ones((2, 1, 1, 16), np.float32), cache)[0].shape == (2, 1, 1, 16)


@pytest.mark.parametrize(("name", "aliases"), [
    ("float32", ["float32", "fp32", "f4", np.float32, np.dtype(np.float32)]),
    ("float16", ["float16", "fp16", "f2", np.float16, np.dtype(np.float16)]),
    ("bfloat16", ["bfloat16", "bf16"]),
    ("int8", ["int8", "i1", np.int8, np.dtype(np.int8)]),
])
def test_names_of_dtypes(name, aliases):
    torch = pytest.importorskip("torch")
    wanted = numpy_dtype(name)
    for alias in (*aliases, wanted, wanted.type, getattr(torch, name)):
        assert KVCache(1, 1, 8, 16, alias).dtype == wanted, alias


def test_lengths_cannot_be_written(dtype):
    cache, oracle = make(3, 20, dtype)
    q, k, v = tokens(10, 3)
    cache.append(k, v), oracle.append(k, v)
    with pytest.raises(ValueError, match="read-only"):
        cache.lengths[0] = 3
    with pytest.raises(AttributeError):
        cache.lengths = [1, 2, 3]
    with suppress(ValueError):  # a snapshot may be made writable: it is nobody else's
        lengths = cache.lengths
        lengths.flags.writeable = True
        lengths[0] = 3
    assert cache.lengths.tolist() == [10, 10, 10]
    verify(cache, oracle, q)


# append


def test_however_tokens_arrive_the_bits_are_the_same(build, dtype):
    """One by one, in chunks of any size, row after row or all at once."""
    q, k, v = tokens(100, 2)
    results = []
    for chunks in ([100], [1] * 100, [7] * 14 + [2], [16] * 6 + [4], [33, 67]):
        cache, _ = make(2, 120, dtype)
        start = 0
        for n in chunks:
            cache.append(part(k, start, start + n), part(v, start, start + n))
            start += n
        results.append(attend(q, cache) + attend(part(q, 0, 1), cache))
    cache, _ = make(2, 120, dtype)
    for row in (1, 0):
        cache.append(k[row : row + 1], v[row : row + 1], rows=[row])
    results.append(attend(q, cache) + attend(part(q, 0, 1), cache))
    cache, _ = make(2, 120, dtype)
    for start, stop, lengths in ((0, 60, [60, 13]), (60, 100, [40, 0])):
        cache.append(part(k, start, stop), part(v, start, stop), lengths=lengths)
    cache.append(part(k, 13, 100)[1:], part(v, 13, 100)[1:], rows=[1])
    results.append(attend(q, cache) + attend(part(q, 0, 1), cache))
    for other in results[1:]:
        same_bits(other, results[0])


def test_append_takes_any_integers(dtype):
    q, k, v = tokens(8, 2)
    for kind in (list, tuple, np.array, lambda x: np.array(x, np.int32), lambda x: np.array(x, np.uint8)):
        cache, oracle = make(2, 16, dtype)
        cache.append(k, v, rows=kind([1, 0]), lengths=kind([3, 8]))
        oracle.append(k, v, [1, 0], [3, 8])
        verify(cache, oracle, q, bound=False)


def test_append_of_nothing(dtype):
    cache, oracle = make(2, 16, dtype)
    q, k, v = tokens(5, 2)
    cache.append(part(k, 0, 0), part(v, 0, 0))
    cache.append(k[:0], v[:0], rows=[])
    cache.append(k, v, lengths=[0, 0])
    assert cache.lengths.tolist() == [0, 0]
    cache.append(k, v), oracle.append(k, v)
    cache.append(part(k, 0, 0), part(v, 0, 0))
    verify(cache, oracle, q, bound=False)


def test_16_bit_inputs_are_stored_as_they_are(build):
    """float16 numbers in a float16 cache, and in a float32 cache, without loss: subnormals, largest and zeros too."""
    corners = np.array([0.0, -0.0, 6e-8, 6.1e-5, 65504, -65504, 1, 0.3333], np.float16)
    for dtype in ("float16", "float32", "bfloat16"):
        of = numpy_dtype("float16" if dtype == "float32" else dtype)
        v = np.broadcast_to(corners.astype(of)[:, None], (1, 1, 8, 8)).copy()
        cache = KVCache(1, 1, 8, 16, numpy_dtype(dtype))
        cache.append(np.zeros_like(v), v)
        for j in range(8):
            out = attend(np.zeros((1, 1, 1, 8), np.float32), cache, mask=np.arange(8) == j)[0]
            assert (out == v[0, 0, j].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_inputs_are_rounded_half_to_even(build, dtype):
    of = numpy_dtype(dtype)
    one, digits = np.float32(1), {"float16": 10, "bfloat16": 7}[dtype]
    step = np.float32(2.0**-digits)
    x = np.array([one + step / 2, one + 3 * step / 2, one + step / 2 + step / 1024, -(one + step / 2), 3.0e-5, 1e-41,
                  -0.0, 1 / 3], np.float32)
    assert x.astype(of).astype(np.float32)[:3].tolist() == [1, 1 + 2 * step, 1 + step]
    v = np.broadcast_to(x[:, None], (1, 1, 8, 8)).copy()
    cache = KVCache(1, 1, 8, 16, of)
    cache.append(np.zeros_like(v), v)
    for j in range(8):
        out = attend(np.zeros((1, 1, 1, 8), np.float32), cache, mask=np.arange(8) == j)[0]
        assert (out == x[j].astype(of).astype(np.float32)).all()


# capacity


def test_a_row_may_be_filled_to_its_capacity(dtype):
    for capacity in (1, 15, 16, 17, 256, 257, 300):
        cache, oracle = make(2, capacity, dtype)
        q, k, v = tokens(capacity, 2)
        cache.append(k, v), oracle.append(k, v)
        assert cache.lengths.tolist() == [capacity, capacity] and cache.capacity == capacity
        verify(cache, oracle, part(q, 0, 2) if capacity > 1 else q, bound=False)
        for rows in (None, [1]):
            with pytest.raises(ValueError, match="capacity"):
                cache.append(k[: 1 if rows else 2, :, :1], v[: 1 if rows else 2, :, :1], rows=rows)


def test_growth(one_build, dtype):
    cache, oracle = make(2, 20, dtype, grow=True)
    q, k, v = tokens(700, 2)
    start, sizes = 0, []
    for n in (20, 1, 30, 5, 300, 1, 343):
        now = np.s_[:, :, start : start + n]
        cache.append(k[now], v[now]), oracle.append(k[now], v[now])
        start += n
        sizes.append((cache.capacity, cache.nbytes))
        assert cache.capacity >= start
        verify(cache, oracle, part(q, 0, 2), bound=False)
    assert len(set(sizes)) <= 6, "it grows in large steps"
    fresh, _ = make(2, 1000, dtype)
    fresh.append(k, v)
    same_bits(attend(part(q, 0, 5), cache), attend(part(q, 0, 5), fresh))


def test_growth_of_one_row_at_a_time(dtype):
    cache, oracle = make(3, 16, dtype, grow=True)
    q, k, v = tokens(200, 3)
    for row, stop in ((1, 200), (0, 17), (2, 100)):
        cache.append(k[row : row + 1, :, :stop], v[row : row + 1, :, :stop], rows=[row])
        oracle.append(k[row : row + 1, :, :stop], v[row : row + 1, :, :stop], [row])
        verify(cache, oracle, part(q, 0, 2), bound=False)


def test_growth_in_the_call_of_attention(dtype):
    cache, oracle = make(1, 16, dtype, grow=True)
    q, k, v = tokens(60)
    for i in range(60):
        verify(cache, oracle, part(q, i, i + 1), part(k, i, i + 1), part(v, i, i + 1), bound=False)


# truncate, reset


@pytest.mark.parametrize("settings", [{}, INT8], ids=["plain", "int8"])
def test_truncate_then_append_is_never_having_appended(one_build, dtype, settings):
    if settings and dtype != "int8":
        pytest.skip("settings of int8 caches")
    q, k, v = tokens(150, 2)
    _, other_k, other_v = (1e3 * x for x in tokens(150, 2, seed=1))
    for kept in (0, 1, 3, 15, 16, 17, 18, 63, 64, 65, 99, 100):
        fresh, _ = make(2, 300, dtype, **settings)
        fresh.append(k, v)
        cache, oracle = make(2, 300, dtype, **settings)
        cache.append(part(k, 0, kept), part(v, 0, kept))
        cache.append(other_k, other_v)
        cache.truncate([kept, kept])
        assert cache.lengths.tolist() == [kept, kept]
        oracle.append(part(k, 0, kept), part(v, 0, kept))
        verify(cache, oracle, part(q, 0, 3), bound=kept == 17)
        cache.append(part(k, kept, 150), part(v, kept, 150))
        for Lq in (1, 5, 150):
            same_bits(attend(part(q, 0, Lq), cache), attend(part(q, 0, Lq), fresh))


def test_speculative_decoding(one_build, dtype):
    """Five drafted tokens, of which some are accepted, over and over: the rows of a plain decode."""
    cache, oracle = make(2, 100, dtype)
    q, k, v = tokens(80, 2)
    _, wrong_k, wrong_v = tokens(80, 2, seed=9)
    r, lengths = np.random.default_rng(0), [0, 0]
    while min(lengths) < 70:
        accepted = r.integers(0, 6, 2)
        draft = [np.stack([np.where((np.arange(5) < accepted[b])[:, None], good[b, :, n : n + 5], bad[b, :, n : n + 5])
                           for b, n in enumerate(lengths)]) for good, bad in ((k, wrong_k), (v, wrong_v))]
        cache.append(*draft)
        lengths = [min(n + a, 70) for n, a in zip(lengths, accepted, strict=True)]
        cache.truncate(lengths)
    oracle.append(part(k, 0, 70), part(v, 0, 70))
    verify(cache, oracle, part(q, 0, 10))


def test_truncate_some_rows(dtype):
    cache, oracle = make(4, 64, dtype)
    q, k, v = tokens(50, 4)
    cache.append(k, v), oracle.append(k, v)
    for lengths, rows in (([7, 50], [3, 0]), (np.array([20, 11, 0, 6]), None), ([0], np.array([2])), ([], [])):
        cache.truncate(lengths, rows=rows), oracle.truncate(lengths, rows)
        assert cache.lengths.tolist() == oracle.lengths.tolist()
        verify(cache, oracle, part(q, 0, 3), bound=False)


def test_truncate_to_one_length(dtype):
    cache, oracle = make(3, 64, dtype)
    q, k, v = tokens(50, 3)
    cache.append(k, v), oracle.append(k, v)
    cache.truncate(20), oracle.truncate([20] * 3)
    cache.truncate(7, rows=[2, 0]), oracle.truncate([7, 7], [2, 0])
    assert cache.lengths.tolist() == [7, 20, 7]
    verify(cache, oracle, part(q, 0, 3), bound=False)


def test_reset(dtype):
    cache, oracle = make(3, 64, dtype)
    q, k, v = tokens(50, 3)
    for rows in (None, [1], [2, 0], np.array([1, 2]), []):
        cache.append(part(k, 0, 9), part(v, 0, 9)), oracle.append(part(k, 0, 9), part(v, 0, 9))
        cache.reset(rows=rows), oracle.reset(rows)
        assert cache.lengths.tolist() == oracle.lengths.tolist()
        verify(cache, oracle, part(q, 0, 3), bound=False)
    cache.reset()
    cache.append(k, v)
    fresh, _ = make(3, 64, dtype)
    fresh.append(k, v)
    same_bits(attend(q, cache), attend(q, fresh))


# reorder


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1], [2, 0, 2, 0], [0, 0, 1, 3]], ids=str)
def test_reorder(one_build, dtype, order):
    """New row i is old row order[i], and writing to one of two copies leaves the other."""
    cache, oracle = make(4, 64, dtype)
    q, k, v = tokens(64, 4)
    lengths = [33, 0, 17, 32]
    cache.append(k, v, lengths=lengths), oracle.append(k, v, lengths=lengths)
    cache.reorder(order), oracle.reorder(order)
    assert cache.lengths.tolist() == oracle.lengths.tolist()
    verify(cache, oracle, part(q, 0, 3), bound=False)
    for i in range(8):  # copies part
        now = np.s_[:, :, 40 + i : 41 + i]
        verify(cache, oracle, q[now], k[now], v[now], lengths=[1, i % 2, 1, 1], bound=i == 7)
    half = oracle.lengths // 2
    cache.truncate(half), oracle.truncate(half)
    now = np.s_[:, :, 20:40]
    verify(cache, oracle, q[now], k[now], v[now], bound=False)


def test_reorder_takes_no_room(dtype):
    """All rows as copies of one, then each written up to its capacity: there is room for that."""
    cache, oracle = make(5, 40, dtype)
    q, k, v = tokens(40, 5)
    cache.append(part(k, 0, 20), part(v, 0, 20)), oracle.append(part(k, 0, 20), part(v, 0, 20))
    before = cache.nbytes
    for round_ in range(3):
        cache.reorder([round_] * 5), oracle.reorder([round_] * 5)
        now = np.s_[:, :, 20:40]
        cache.append(k[now], v[now]), oracle.append(k[now], v[now])
        verify(cache, oracle, part(q, 0, 2), bound=False)
        cache.truncate([20] * 5), oracle.truncate([20] * 5)
    assert cache.nbytes == before


def test_beam_search(one_build, dtype):
    """Four beams over 40 steps with random survivors: always the rows of histories kept apart."""
    cache, oracle = make(4, 64, dtype)
    q, k, v = tokens(60, 4)
    r = np.random.default_rng(0)
    verify(cache, oracle, part(q, 0, 20), part(k, 0, 20), part(v, 0, 20), bound=False)
    for i in range(20, 60):
        order = r.integers(0, 4, 4)
        cache.reorder(order), oracle.reorder(order.tolist())
        verify(cache, oracle, part(q, i, i + 1), part(k, i, i + 1), part(v, i, i + 1), bound=False)


# window


def run_window(dtype, left, capacity, chunks, **settings):
    """Outputs of chunks through a cache with a window and through one without that has the window as an option."""
    ring, _ = make(1, capacity, dtype, window=(left, 0), **settings)
    whole, _ = make(1, sum(chunks), dtype, **settings)
    q, k, v = tokens(sum(chunks))
    start = 0
    for n in chunks:
        now = np.s_[:, :, start : start + n]
        start += n
        yield attend(q[now], ring, k[now], v[now]), attend(q[now], whole, k[now], v[now], window=(left, 0))
        assert ring.lengths.tolist() == whole.lengths.tolist() == [start]


WINDOWS = {  # left, capacity, chunks
    "decode": (20, 32, [1] * 150),
    "smallest": (20, 21, [1] * 150),
    "chunks": (20, 64, [44, 44, 44, 10, 44, 1, 1, 30]),
    "chunks longer than the window": (10, 200, [190, 150, 190, 1, 100]),
    "pages": (300, 600, [250, 50, 1, 1, 290, 1, 300, 300, 1, 1]),
    "a long prefill, then decode": (16, 320, [300] + [1] * 40),
    "no look back": (0, 16, [1] * 20 + [16] + [1] * 20),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_cache_gives_the_bits_of_an_unwindowed_one(one_build, dtype, name):
    for got, expected in run_window(dtype, *WINDOWS[name]):
        same_bits(got, expected)


@pytest.mark.parametrize("sinks", [3, 40])
def test_a_window_cache_with_first_tokens_in_float32(one_build, sinks):
    """They leave the window as any key does."""
    for got, expected in run_window("int8", 20, 32, [5, 9] + [1] * 80, fp32_sinks=sinks):
        same_bits(got, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_chunk_longer_than_the_window_is_a_whole_prefill(one_build, dtype):
    left = 10
    cache, oracle = make(1, 100, dtype, window=(left, 0))
    q, k, v = tokens(90)
    parts = [verify(cache, oracle, q[now], k[now], v[now]) for now in (np.s_[:, :, :50], np.s_[:, :, 50:])]
    out, lse = (np.concatenate(x, axis=2)[0] for x in zip(*parts, strict=True))
    judge(oracle, 0, q[0], out, lse)


def test_a_window_cache_has_all_the_other_options(one_build, dtype):
    """Ragged rows, some of them wrapped around, with everything on."""
    cache, oracle = make(3, 48, dtype, window=(20, 0))
    q, k, v = tokens(120, 3)
    for i in range(60):
        now = np.s_[:, :, i : i + 1]
        cache.append(k[now], v[now], lengths=[1, int(i < 7), int(i < 25)])
        oracle.append(k[now], v[now], lengths=[1, int(i < 7), int(i < 25)])
    options = cases.all_options(3, H, 9, 69)
    del options["window"]
    now = np.s_[:, :, 60:69]
    verify(cache, oracle, q[now], k[now], v[now], **options)
    verify(cache, oracle, part(q, 0, 1), **{name: x[:, :, :1] if np.ndim(x) == 4 else x for name, x in options.items()})
    verify(cache, oracle, part(q, 0, 3), lengths=[3, 0, 2])


def test_the_calls_window_may_be_narrower(one_build, dtype):
    cache, oracle = make(2, 48, dtype, window=(20, 0))
    q, k, v = tokens(90, 2)
    for start in range(0, 90, 10):
        now = np.s_[:, :, start : start + 10]
        cache.append(k[now], v[now]), oracle.append(k[now], v[now])
    for window in ((20, 0), (5, 0), (0, 0), (7, -1), (20, 3)):
        verify(cache, oracle, part(q, 0, 4), window=window, bound=window[0] == 5)
        verify(cache, oracle, part(q, 0, 1), window=window, causal=False)


def test_queries_that_need_evicted_keys_are_refused(dtype):
    """After single appends the last key alone has its whole window; more queries at the end would miss some."""
    cache, oracle = make(1, 21, dtype, window=(20, 0))
    q, k, v = tokens(100)
    for i in range(100):
        cache.append(part(k, i, i + 1), part(v, i, i + 1))
    oracle.append(k, v)
    verify(cache, oracle, part(q, 0, 1))
    verify(cache, oracle, part(q, 0, 5), window=(16, 0))  # reaches no further back than what is there
    with pytest.raises(ValueError, match="window"):
        attend(part(q, 0, 5), cache)


def test_truncate_within_a_window(one_build, dtype):
    cache, oracle = make(2, 64, dtype, window=(20, 0))
    q, k, v = tokens(120, 2)
    for start, stop in ((0, 40), (40, 70), (70, 100)):
        now = np.s_[:, :, start:stop]
        cache.append(k[now], v[now]), oracle.append(k[now], v[now])
    for length in (95, 71):
        cache.truncate([length, 100]), oracle.truncate([length, 100])
        verify(cache, oracle, part(q, 0, 1), bound=False)
    cache.truncate([70, 100]), oracle.truncate([70, 100])  # the next query sees from 50 on: earlier ones were given up
    with pytest.raises(ValueError, match="window"):
        attend(part(q, 0, 1), cache)  # which would see from 49 on
    with pytest.raises(ValueError, match="window"):
        cache.truncate([69, 100])
    verify(cache, oracle, part(q, 100, 110), part(k, 100, 110), part(v, 100, 110), bound=False)
    cache.reset(), oracle.reset()
    verify(cache, oracle, part(q, 0, 44), part(k, 0, 44), part(v, 0, 44), bound=False)


def test_reorder_with_a_window(one_build, dtype):
    cache, oracle = make(3, 40, dtype, window=(20, 0))
    q, k, v = tokens(140, 3)
    for i in range(0, 140, 4):
        now = np.s_[:, :, i : i + 4]
        lengths = [4, 2, i % 3]
        verify(cache, oracle, q[now], k[now], v[now], lengths=lengths, bound=False)
        if i % 16 == 0:
            cache.reorder([2, 0, 0]), oracle.reorder([2, 0, 0])


def test_an_evicted_nan_is_gone(one_build):
    cache, oracle = make(1, 32, "float32", window=(10, 0))
    q, k, v = tokens(80)
    k[:, :, :12], v[:, :, :12] = np.nan, np.nan
    for i in range(80):
        out, _ = verify(cache, oracle, part(q, i, i + 1), part(k, i, i + 1), part(v, i, i + 1), bound=False)
        assert np.isnan(out).all() == (i < 22), i


# Any sequence of calls


ROWS = 3


class Cache(RuleBasedStateMachine):
    """A KVCache and the oracle through any sequence of calls."""

    @initialize(dtype=st.sampled_from([*DTYPES, "int8 mean"]), window=st.sampled_from([None, None, (9, 0), (33, 0)]),
                capacity=st.sampled_from([40, 64]), grow=st.booleans())
    def start(self, dtype, window, capacity, grow):
        given = INT8 if dtype == "int8 mean" else {}
        self.cache, self.oracle = make(ROWS, capacity, dtype.split()[0], window=window, grow=grow, **given)
        self.grow, self.used = grow, 0

    def new(self, n, L):
        self.used = (self.used + 7) % 300
        return (x[:n, :, self.used : self.used + L] for x in tokens(400, ROWS))

    def rows_of(self, data):
        return data.draw(st.one_of(st.none(), st.lists(st.integers(0, ROWS - 1), unique=True, max_size=ROWS)))

    @rule(data=st.data(), L=st.integers(0, 45), ragged=st.booleans(), attending=st.booleans())
    def append(self, data, L, ragged, attending):
        rows = self.rows_of(data)
        ids = list(range(ROWS)) if rows is None else rows
        lengths = [data.draw(st.integers(0, L)) for _ in ids] if ragged else None
        wanted = [L] * len(ids) if lengths is None else lengths
        q, k, v = self.new(len(ids), L)
        fits = all(n <= self.oracle.room(row, self.cache.capacity) for row, n in zip(ids, wanted, strict=True))
        if not fits and not self.grow:
            with pytest.raises(ValueError, match="capacity"):
                self.cache.append(k, v, rows=rows, lengths=lengths)
        elif attending:
            verify(self.cache, self.oracle, q, k, v, rows=rows, lengths=lengths, bound=False)
        else:
            self.cache.append(k, v, rows=rows, lengths=lengths)
            self.oracle.append(k, v, rows, lengths)

    @rule(data=st.data())
    def truncate(self, data):
        rows = self.rows_of(data)
        ids = list(range(ROWS)) if rows is None else rows
        lengths = [data.draw(st.integers(0, self.oracle.length(row))) for row in ids]
        if all(self.oracle.can_truncate(row, n) for row, n in zip(ids, lengths, strict=True)):
            self.cache.truncate(lengths, rows=rows)
            self.oracle.truncate(lengths, rows)
        else:
            with pytest.raises(ValueError):
                self.cache.truncate(lengths, rows=rows)

    @rule(data=st.data())
    def reset(self, data):
        rows = self.rows_of(data)
        self.cache.reset(rows=rows)
        self.oracle.reset(rows)

    @rule(order=st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
    def reorder(self, order):
        self.cache.reorder(order)
        self.oracle.reorder(order)

    @rule(data=st.data(), name=st.sampled_from(["plain", "softcap", "bias", "mask", "alibi batch", "sinks", "causal"]))
    def attend(self, data, name):
        rows = self.rows_of(data)
        ids = list(range(ROWS)) if rows is None else rows
        if ids:
            q, _, _ = self.new(len(ids), 1)
            longest = max(self.oracle.length(row) for row in ids)
            plain = name == "plain" or longest < 2
            options = {} if plain else cases.options(name, len(ids), H, 1, longest)
            if all(self.oracle.can_attend(row, 1) for row in ids):
                verify(self.cache, self.oracle, q, rows=rows, bound=False, **options)
            else:
                with pytest.raises(ValueError, match="window"):
                    attend(q, self.cache, rows=rows, **options)

    @invariant()
    def lengths(self):
        if hasattr(self, "cache"):
            assert self.cache.lengths.tolist() == self.oracle.lengths.tolist()


class Pool(RuleBasedStateMachine):
    """A PagedKVCache and the oracle: rows that come, share, part and go, on few pages."""

    PAGES, SIZE = 9, 16

    @initialize(dtype=st.sampled_from([*DTYPES, "int8 mean"]))
    def start(self, dtype):
        given = INT8 if dtype == "int8 mean" else {}
        self.cache, self.oracle = make_paged(self.PAGES, self.SIZE, dtype.split()[0], **given)
        self.used = 0

    def row(self, data):
        return data.draw(st.sampled_from(sorted(self.oracle.rows)))

    @precondition(lambda self: len(self.oracle.rows) < 6)
    @rule()
    def add(self):
        self.oracle.add(self.cache.add())

    @precondition(lambda self: self.oracle.rows and len(self.oracle.rows) < 6)
    @rule(data=st.data())
    def fork(self, data):
        row = self.row(data)
        self.oracle.fork(row, self.cache.fork(row))

    @precondition(lambda self: self.oracle.rows)
    @rule(data=st.data())
    def free(self, data):
        row = self.row(data)
        self.cache.free(row)
        self.oracle.free(row)

    @precondition(lambda self: self.oracle.rows)
    @rule(data=st.data(), L=st.integers(0, 40))
    def append(self, data, L):
        rows = data.draw(st.lists(st.sampled_from(sorted(self.oracle.rows)), unique=True, min_size=1))
        self.used = (self.used + 7) % 300
        _, k, v = (x[: len(rows), :, self.used : self.used + L] for x in tokens(400, 6))
        try:
            self.cache.append(k, v, rows=rows)
        except ValueError as error:
            assert "page" in str(error)
            lengths = {row: self.oracle.length(row) + (L if row in rows else 0) for row in self.oracle.rows}
            pages = sum(-(-n // self.SIZE) for n in lengths.values())
            assert pages > self.PAGES, "there was room even without sharing"
        else:
            self.oracle.append(k, v, rows)

    @precondition(lambda self: self.oracle.rows)
    @rule(data=st.data())
    def truncate(self, data):
        row = self.row(data)
        length = data.draw(st.integers(0, self.oracle.length(row)))
        self.cache.truncate([length], rows=[row])
        self.oracle.truncate([length], [row])

    @precondition(lambda self: self.oracle.rows)
    @rule(data=st.data())
    def reset(self, data):
        row = self.row(data)
        self.cache.reset(rows=[row])
        self.oracle.reset([row])

    @invariant()
    def rows(self):
        """Every row's result is that of its own list of keys; its pages are valid, and as many as it needs."""
        if not hasattr(self, "cache") or not self.oracle.rows:
            return
        ids = sorted(self.oracle.rows)
        q = tokens(1, len(ids))[0]
        verify(self.cache, self.oracle, q, rows=ids, bound=False)
        table = self.cache.block_table
        for row in ids:
            used = -(-self.oracle.length(row) // self.SIZE)
            assert ((table[row][:used] >= 0) & (table[row][:used] < self.PAGES)).all()
            assert len(set(table[row][:used].tolist())) == used
            assert (table[row][used:] == -1).all()


@pytest.mark.parametrize("machine", [Cache, Pool])
def test_any_sequence_of_calls(machine):
    how = settings(max_examples=60, stateful_step_count=20, deadline=None, derandomize=True,
                   suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=how)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Cache, Pool])
def test_many_long_sequences_of_calls(build, machine):
    how = settings(max_examples=400, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=how)


def test_a_cache_of_one_dtype_per_build_reads_in_another():
    """What is stored does not depend on the SIMD build: append in one, attend in another."""
    names = cyflash.cpu.runnable()
    q, k, v = tokens(50)
    for dtype in DTYPES:
        for first in (names[0], names[-1]):
            with cyflash.set_implementation(first):
                cache, oracle = make(1, 64, dtype)
                cache.append(part(k, 0, 30), part(v, 0, 30)), oracle.append(part(k, 0, 30), part(v, 0, 30))
            with cyflash.set_implementation(names[-1] if first == names[0] else names[0]):
                cache.append(part(k, 30, 50), part(v, 30, 50)), oracle.append(part(k, 30, 50), part(v, 30, 50))
                verify(cache, oracle, q)
            with cyflash.set_implementation(first):
                same_bits([x[0] for x in attend(q, cache)], dense(oracle, 0, q[0]))


def test_threads_of_callers(dtype):
    """Several threads may read one cache at once."""
    from concurrent.futures import ThreadPoolExecutor

    cache, _ = make(2, 200, dtype)
    q, k, v = tokens(200, 2)
    cache.append(k, v)
    expected = attend(part(q, 0, 3), cache)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: attend(part(q, 0, 3), cache), range(12)):
            same_bits(result, expected)
    assert expected[0].shape == (2, H, 3, DV)
