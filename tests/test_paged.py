"""PagedKVCache: pages in any order and of any size, shared by forks, counted, given back; never another bit."""
import mmap
import sys
from contextlib import suppress

import cases
import numpy as np
import pytest
from caching import DTYPES, DV, HK, D, H, attend, make, make_paged, numpy_dtype, same_bits, tokens, verify

from cyflash import KVCache, PagedKVCache
from cyflash.attention import attend_stored

SIZES = (16, 32, 48, 64, 256, 272)
INT8 = {"k_mean": np.full((HK, 1, D), 0.3, np.float32), "fp32_sinks": 5}


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


def part(x, start, stop):
    return x[:, :, start:stop]


def settings_of(dtype):
    return INT8 if dtype == "int8" else {}


def scattered(dtype, page_size, lengths, seed=0):
    """Rows of the lengths whose pages lie in random order among those of others, and the oracle."""
    r = np.random.default_rng(seed)
    pages = 2 * sum(-(-n // page_size) for n in lengths) + 8
    cache, oracle = make_paged(pages, page_size, dtype, **settings_of(dtype))
    _, k, v = tokens(max(lengths), len(lengths))
    rows = [cache.add() for _ in lengths]
    others = [cache.add() for _ in range(4)]
    for row in rows:
        oracle.add(row)
    while any(oracle.length(row) < n for row, n in zip(rows, lengths, strict=True)):
        i = int(r.integers(len(rows)))
        start = oracle.length(rows[i])
        stop = min(lengths[i], start + int(r.integers(0, 2 * page_size)))
        cache.append(k[i : i + 1, :, start:stop], v[i : i + 1, :, start:stop], rows=[rows[i]])
        oracle.append(k[i : i + 1, :, start:stop], v[i : i + 1, :, start:stop], [rows[i]])
        other = others[int(r.integers(4))]
        if r.random() < 0.5 and cache.lengths[other] < page_size:
            cache.append(k[:1, :, :1], v[:1, :, :1], rows=[other])
        elif r.random() < 0.5:
            cache.reset(rows=[other])
    for other in others:
        cache.free(other)
    return cache, oracle, rows


@pytest.mark.parametrize("page_size", SIZES)
def test_pages_in_any_order_are_contiguous_to_the_bit(one_build, dtype, page_size):
    """Against a KVCache of one page, and (in verify) against the functions that take whole arrays."""
    lengths = [3 * page_size + 5, 2 * page_size, 17]
    cache, oracle, rows = scattered(dtype, page_size, lengths)
    q, k, v = tokens(max(lengths), 3)
    whole, _ = make(3, max(lengths), dtype, **settings_of(dtype))
    whole.append(k, v, lengths=lengths)
    for Lq in (1, 6, 40):
        expected = attend(part(q, 0, Lq), whole)
        same_bits(verify(cache, oracle, part(q, 0, Lq), rows=rows, bound=Lq == 6 and page_size < 64), expected)
        backwards = attend(part(q, 0, Lq)[::-1], cache, rows=rows[::-1])
        same_bits([x[::-1] for x in backwards], expected)


def test_pages_really_lie_in_any_order():
    cache, _, rows = scattered("float32", 16, [100, 80, 33])
    used = [table[table >= 0] for table in np.asarray(cache.block_table)[rows]]
    assert any((np.diff(x) != 1).any() for x in used)
    everything = np.concatenate(used)
    assert len(np.unique(everything)) == len(everything)


def test_options_over_pages(build, dtype):
    lengths = [70, 33, 1]
    cache, oracle, rows = scattered(dtype, 16, lengths)
    for Lq in (1, 9):
        q = tokens(Lq, 3, seed=5)[0]
        for name in ("window", "bias", "mask", "alibi batch", "sinks", "softcap", "scale"):
            verify(cache, oracle, q, rows=rows, bound=name == "bias", **cases.options(name, 3, H, Lq, 70))
        verify(cache, oracle, q, rows=rows, **cases.all_options(3, H, Lq, 70))


def test_threads_and_repeats(one_build, dtype):
    cache, oracle, rows = scattered(dtype, 32, [300, 45, 120])
    for Lq in (1, 30):
        q = tokens(Lq, 3)[0]
        expected = verify(cache, oracle, q, rows=rows, bound=False)
        for threads in (1, 2, 5):
            same_bits(attend(q, cache, rows=rows, num_threads=threads), expected)


# Rows that come and go


def test_a_new_pool_has_no_rows():
    cache, _ = make_paged(4, 16)
    assert len(cache.lengths) == 0 and cache.lengths.dtype == np.int64
    assert np.asarray(cache.block_table).shape[0] == 0
    row = cache.add()
    assert cache.lengths[row] == 0 and (np.asarray(cache.block_table)[row] == -1).all()


def test_defaults_are_those_of_a_kvcache():
    paged, plain = PagedKVCache(2, 16, 1, 8), KVCache(1, 1, 8, 32)
    assert paged.dtype == plain.dtype == np.float32
    row = paged.add()
    x = np.ones((1, 1, 4, 8), np.float32)
    paged.append(x, x, rows=[row]), plain.append(x, x)
    same_bits(attend(x, paged, rows=[row]), attend(x, plain))


def test_the_block_table(dtype):
    """Rows by pages, -1 beyond what is used; integers that the caller cannot write into the cache."""
    cache, oracle = make_paged(6, 16, dtype)
    _, k, v = tokens(40, 2)
    rows = [cache.add(), cache.add()]
    for row in rows:
        oracle.add(row)
    cache.append(k, v, rows=rows, lengths=[40, 16]), oracle.append(k, v, rows, [40, 16])
    table = np.asarray(cache.block_table)
    assert table.dtype.kind == "i" and table.ndim == 2
    assert (table[rows[0]][:3] >= 0).all() and (table[rows[0]][3:] == -1).all()
    assert table[rows[1]][0] >= 0 and (table[rows[1]][1:] == -1).all()
    with suppress(ValueError):
        cache.block_table[...] = 77
    verify(cache, oracle, tokens(2, 2)[0], rows=rows)


def test_all_pages_can_be_used_and_come_back(dtype):
    """Free, reset and truncate give pages back, as many as were taken, again and again."""
    cache, oracle = make_paged(5, 16, dtype)
    q, k, v = tokens(80)
    give_back = (lambda row: cache.reset(rows=[row]), lambda row: cache.truncate([0], rows=[row]))
    for turn in range(6):
        row = cache.add()
        oracle.add(row)
        verify(cache, oracle, q, k, v, rows=[row], bound=False)
        with pytest.raises(ValueError, match="page"):
            cache.append(part(k, 0, 1), part(v, 0, 1), rows=[row])
        if turn % 3:
            give_back[turn % 3 - 1](row)
            oracle.reset([row])
            verify(cache, oracle, q, k, v, rows=[row], bound=False)
        cache.free(row), oracle.free(row)


def test_truncate_gives_back_whole_pages(dtype):
    cache, _ = make_paged(4, 16, dtype)
    _, k, v = tokens(64)
    a, b = cache.add(), cache.add()
    cache.append(k, v, rows=[a])
    cache.truncate([17], rows=[a])
    cache.append(part(k, 0, 32), part(v, 0, 32), rows=[b])
    with pytest.raises(ValueError, match="page"):
        cache.append(part(k, 0, 1), part(v, 0, 1), rows=[b])
    cache.append(part(k, 17, 32), part(v, 17, 32), rows=[a])
    assert [int(cache.lengths[row]) for row in (a, b)] == [32, 32]


def test_a_window_gives_back_pages(one_build, dtype):
    """A row of any length in few pages, with the bits of a cache that keeps them all."""
    left = 20
    cache, _ = make_paged(4, 16, dtype, window=(left, 0))
    whole, _ = make(1, 200, dtype)
    row = cache.add()
    q, k, v = tokens(200)
    for start, stop in [(0, 10), (10, 30), *((i, i + 1) for i in range(30, 200))]:
        now = np.s_[:, :, start:stop]
        got = attend(q[now], cache, k[now], v[now], rows=[row])
        same_bits(got, attend(q[now], whole, k[now], v[now], window=(left, 0)))
    assert cache.lengths[row] == 200


def test_rows_are_those_that_are_there():
    """Numbers are the lowest that are free; "all" rows are those there are, in ascending order."""
    cache, oracle = make_paged(12, 16)
    q, k, v = tokens(30, 4)
    assert [cache.add() for _ in range(4)] == [0, 1, 2, 3]
    cache.append(k, v)
    cache.free(1), cache.free(2)
    assert cache.rows.tolist() == [0, 3] and cache.lengths.tolist() == [30, 0, 0, 30]
    for row, i in ((0, 0), (3, 3)):
        oracle.add(row)
        oracle.append(k[i : i + 1], v[i : i + 1], [row])
    verify(cache, oracle, q[:2, :, :3])
    cache.append(k[:2, :, :2], v[:2, :, :2]), oracle.append(k[:2, :, :2], v[:2, :, :2])
    cache.truncate([31, 32]), oracle.truncate([31, 32])
    verify(cache, oracle, q[:2, :, :3])
    assert cache.add() == 1
    oracle.add(1)
    oracle.rows = dict(sorted(oracle.rows.items()))
    verify(cache, oracle, q[:3, :, :3], k[:3, :, :3], v[:3, :, :3])
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0, 0] and cache.free_pages == cache.pages == 12


def test_pages_are_counted(dtype):
    """free_pages is what the rows do not hold, shared pages counted once."""
    cache, _ = make_paged(10, 16, dtype)
    _, k, v = tokens(40)
    row = cache.add()
    assert cache.free_pages == 10
    cache.append(k, v, rows=[row])
    assert cache.free_pages == 7
    fork = cache.fork(row)
    assert cache.free_pages == 7
    cache.append(part(k, 0, 1), part(v, 0, 1), rows=[fork])
    assert cache.free_pages == 6
    cache.truncate([16], rows=[row])
    assert cache.free_pages == 7  # its last page was its own, the second is the fork's as well
    cache.free(fork)
    assert cache.free_pages == 9
    cache.free(row)
    assert cache.free_pages == 10


@pytest.mark.parametrize("order", [[1, 0, 2], [2, 2, 2], [0, 1, 1]], ids=str)
def test_reorder(dtype, order):
    """As a KVCache's, on few pages."""
    cache, oracle = make_paged(9, 16, dtype, **settings_of(dtype))
    q, k, v = tokens(50, 3)
    for _ in range(3):
        oracle.add(cache.add())
    cache.append(k, v, lengths=[40, 7, 33]), oracle.append(k, v, lengths=[40, 7, 33])
    cache.reorder(order), oracle.reorder(order)
    now = np.s_[:, :, :1]
    verify(cache, oracle, q[now], k[now], v[now])
    verify(cache, oracle, q[:, :, :4])


# fork


def test_a_fork_parts_from_its_row(one_build, dtype):
    """At every place in a page: both go on, each with its own tokens."""
    for length in (0, 1, 15, 16, 17, 31, 32, 40):
        cache, oracle = make_paged(16, 16, dtype, **settings_of(dtype))
        row = cache.add()
        oracle.add(row)
        q, k, v = tokens(80, 2)
        verify(cache, oracle, q[:1, :, :length], k[:1, :, :length], v[:1, :, :length], rows=[row], bound=False)
        fork = cache.fork(row)
        oracle.fork(row, fork)
        assert cache.lengths[fork] == length
        verify(cache, oracle, q[:, :, :3], rows=[fork, row], bound=False)
        for i in range(length, length + 20):
            now = np.s_[:, :, i : i + 1]
            verify(cache, oracle, q[now], k[now], v[now], rows=[fork, row], bound=i == length + 19)


def test_forks_share_whole_pages():
    """Ten forks of a row of ten pages: only what they write takes pages of its own."""
    cache, oracle = make_paged(20, 16)
    row = cache.add()
    oracle.add(row)
    q, k, v = tokens(200, 11)
    cache.append(k[:1, :, :155], v[:1, :, :155], rows=[row]), oracle.append(k[:1, :, :155], v[:1, :, :155], [row])
    forks = [cache.fork(row) for _ in range(10)]
    for fork in forks:
        oracle.fork(row, fork)
    table = np.asarray(cache.block_table)
    for fork in forks:
        assert table[fork][:9].tolist() == table[row][:9].tolist()
    rows = [row, *forks]
    verify(cache, oracle, q[:, :, :1], k[:, :, 155:156], v[:, :, 155:156], rows=rows, bound=False)
    table = np.asarray(cache.block_table)
    assert len({int(table[row][9]) for row in rows}) == 11, "the last page is each row's own"
    for fork in forks:
        assert table[fork][:9].tolist() == table[row][:9].tolist()


def test_what_is_shared_outlives_its_first_row(one_build, dtype):
    """Free, reset or truncate the original: the fork keeps its tokens, and their pages are not given away."""
    for turn in range(3):
        cache, oracle = make_paged(8, 16, dtype, **settings_of(dtype))
        row = cache.add()
        oracle.add(row)
        q, k, v = tokens(64, 2, seed=turn)
        cache.append(k[:1, :, :40], v[:1, :, :40], rows=[row]), oracle.append(k[:1, :, :40], v[:1, :, :40], [row])
        fork = cache.fork(row)
        oracle.fork(row, fork)
        if turn == 0:
            cache.free(row), oracle.free(row)
            row = cache.add()
            oracle.add(row)
        elif turn == 1:
            cache.reset(rows=[row]), oracle.reset([row])
        else:
            cache.truncate([0], rows=[row]), oracle.truncate([0], [row])
        cache.append(k[1:, :, :64], v[1:, :, :64], rows=[row]), oracle.append(k[1:, :, :64], v[1:, :, :64], [row])
        verify(cache, oracle, q[:, :, :5], rows=[row, fork])


def test_truncating_a_fork_leaves_the_row(one_build, dtype):
    cache, oracle = make_paged(8, 16, dtype)
    row = cache.add()
    oracle.add(row)
    q, k, v = tokens(60, 2)
    cache.append(k[:1, :, :40], v[:1, :, :40], rows=[row]), oracle.append(k[:1, :, :40], v[:1, :, :40], [row])
    fork = cache.fork(row)
    oracle.fork(row, fork)
    for length in (37, 33, 20):  # within the shared last page, and into a whole one
        for one in (cache, oracle):
            one.truncate([length], rows=[fork])
            one.append(k[1:, :, 50:52], v[1:, :, 50:52], rows=[fork])
        verify(cache, oracle, q[:, :, :4], rows=[fork, row], bound=False)


def test_pages_of_many_forks_all_come_back(dtype):
    cache, _ = make_paged(6, 16, dtype)
    _, k, v = tokens(96)
    for _ in range(5):
        row = cache.add()
        cache.append(part(k, 0, 40), part(v, 0, 40), rows=[row])
        forks = [cache.fork(row) for _ in range(3)]
        cache.append(part(k, 40, 41), part(v, 40, 41), rows=[forks[0]])
        for gone in (forks[1], row, forks[0], forks[2]):
            cache.free(gone)
        row = cache.add()
        cache.append(k, v, rows=[row])
        cache.free(row)


def test_a_fork_of_a_fork(one_build):
    cache, oracle = make_paged(24, 16)
    rows = [cache.add()]
    oracle.add(rows[0])
    q, k, v = tokens(60, 4)
    cache.append(k[:1, :, :20], v[:1, :, :20], rows=rows), oracle.append(k[:1, :, :20], v[:1, :, :20], rows)
    for i in range(3):
        rows.append(cache.fork(rows[-1]))
        oracle.fork(rows[-2], rows[-1])
        now = np.s_[: len(rows), :, 20 + 4 * i : 24 + 4 * i]
        verify(cache, oracle, q[now], k[now], v[now], rows=rows)
    for gone in (rows[1], rows[0]):
        cache.free(gone), oracle.free(gone)
    verify(cache, oracle, q[:2, :, :3], rows=rows[2:])


def test_what_pages_held_before_does_not_leak(one_build):
    """NaN of a freed row stays in no result of the next."""
    for dtype in DTYPES[:3]:
        cache, oracle = make_paged(3, 16, dtype)
        nan = np.full((1, HK, 48, D), np.nan, np.float32)
        row = cache.add()
        cache.append(nan, nan[..., :DV], rows=[row])
        cache.free(row)
        row = cache.add()
        oracle.add(row)
        q, k, v = tokens(48)
        for n in (1, 4, 20):
            now = np.s_[:, :, :n]
            verify(cache, oracle, q[now], k[now], v[now], rows=[row], causal=False)
    assert numpy_dtype("float32") == np.float32


@pytest.fixture(scope="module")
def sparse_memory():
    """24 GB of addresses, of which only the touched pages exist."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, 24 << 30, flags=flags), np.uint8)


@pytest.mark.skipif(not sys.platform.startswith("linux") or sys.maxsize < 2**32, reason="needs lazy memory")
@pytest.mark.parametrize("which", ["k", "v", "k_scale", "v_scale", "k_correction"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_pages_beyond_32_bits(build, sparse_memory, dtype, which):
    """Pages more than 2^31 elements apart give the bits of neighbours."""
    cache, _, rows = scattered(dtype, 16, [60, 20])
    stored, table, keys = cache._stored(np.array(rows))
    x = getattr(stored, which)
    if x is None:
        pytest.skip("float caches have no scales")
    stride = ((1 << 31) + 4096) * x.itemsize // (len(x) - 1) // 4096 * 4096 + 4096
    far = np.ndarray(x.shape, x.dtype, sparse_memory, strides=(stride, *x.strides[1:]))
    far[...] = x
    for Lq in (1, 20):
        q = tokens(Lq, 2)[0]
        expected = attend_stored(q, stored, table, keys, return_lse=True)
        same_bits(attend_stored(q, stored._replace(**{which: far}), table, keys, return_lse=True), expected)
