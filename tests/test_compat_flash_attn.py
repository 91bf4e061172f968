"""FlashAttention-2's functions: signatures, layout, options, caches in place, against what its documentation says in
plain NumPy, and against flash_attention on transposed arrays."""
import importlib.util
import inspect
import itertools

import numpy as np
import pytest

from cyflash import flash_attention
from cyflash.attention import attend
from cyflash.compat import flash_attn
from cyflash.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

F32 = np.float32
TOLERANCES = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 2e-2}  # of numbers near 1


def random(*shape, dtype="float32", seed=0):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    return np.random.default_rng([seed, *shape]).standard_normal(shape, F32).astype(dtype)


def oracle(q, k, v, *, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, slopes=None, leftpad=0):
    """One sequence, (L, H, D), in float64: out (Lq, H, Dv) and lse (H, Lq)."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    (Lq, H, D), (Lk, Hk, _) = q.shape, v.shape
    k, v = (np.repeat(x, H // Hk, axis=1) for x in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) * (D**-0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    distance = np.arange(Lq)[:, None] + Lk - Lq - np.arange(Lk)
    if slopes is not None:
        scores = scores - slopes.astype(np.float64)[:, None, None] * np.abs(distance)
    left, right = window_size
    visible = np.broadcast_to(np.arange(Lk) >= leftpad, (Lq, Lk)).copy()
    visible &= (distance >= 0) | (not causal)
    visible &= (distance <= left) | (left < 0)
    visible &= (-distance <= right) | (right < 0)
    weights = np.where(visible, np.exp(np.where(visible, scores, 0)), 0)
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    return np.einsum("hij,jhd->ihd", weights, v) / np.where(total == 0, 1, total).T[..., None], lse


def assert_near(actual, expected, dtype="float32"):
    for a, b, tolerance in zip(actual, expected, (TOLERANCES[dtype], TOLERANCES["float32"]), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.astype(np.float64), b, rtol=tolerance, atol=tolerance)


def batch_oracle(q, k, v, slopes=None, **options):
    each = [slopes if np.ndim(slopes) < 2 else slopes[b] for b in range(len(q))]
    results = [oracle(q[b], k[b], v[b], slopes=each[b], **options) for b in range(len(q))]
    return tuple(np.stack(x) for x in zip(*results, strict=True))


OPTIONS = {
    "none": {},
    "scale": {"softmax_scale": 0.3},
    "causal": {"causal": True},
    "window": {"window_size": (5, 2)},
    "left window": {"window_size": (5, -1)},
    "right window": {"window_size": (-1, 2)},
    "own key": {"window_size": (0, 0)},
    "causal window": {"causal": True, "window_size": (5, -1)},
    "softcap": {"softcap": 0.7},
    "slopes": {"alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625], F32)},
    "slopes of each": {"alibi_slopes": np.arange(8, dtype=F32).reshape(2, 4) / 16},
    "all": {"softmax_scale": 0.3, "causal": True, "window_size": (9, 3), "softcap": 2.0,
            "alibi_slopes": np.arange(8, dtype=F32).reshape(2, 4) / 16},
}


def as_oracle(options):
    return {"slopes" if name == "alibi_slopes" else name: x for name, x in options.items()}


def as_ours(options):
    names = {"softmax_scale": "scale", "window_size": "window"}
    return {names.get(name, name): x for name, x in options.items()}


# Dense


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", [(7, 7), (5, 20), (20, 5), (1, 30)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dense(options, lengths, dtype):
    Lq, Lk = lengths
    q, k, v = random(2, Lq, 4, 16, dtype=dtype), random(2, Lk, 2, 16, dtype=dtype), random(2, Lk, 2, 12, dtype=dtype)
    out, lse, nothing = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert nothing is None and out.dtype == q.dtype and lse.dtype == F32 and out.flags.c_contiguous
    assert_near((out, lse), batch_oracle(q, k, v, **as_oracle(options)), dtype)
    ours, our_lse = flash_attention(*(x.swapaxes(1, 2) for x in (q, k, v)), **as_ours(options), return_lse=True)
    assert np.array_equal(out, ours.swapaxes(1, 2)) and np.array_equal(lse, our_lse)
    assert np.array_equal(flash_attn_func(q, k, v, **options), out)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed(options):
    """The same bits as unpacked arrays."""
    qkv, q, kv = random(2, 9, 3, 4, 16), random(2, 5, 4, 16), random(2, 9, 2, 2, 16)
    expected = flash_attn_func(*(x.copy() for x in qkv.transpose(2, 0, 1, 3, 4)), **options, return_attn_probs=True)
    assert_same(flash_attn_qkvpacked_func(qkv, **options, return_attn_probs=True), expected)
    assert np.array_equal(flash_attn_qkvpacked_func(qkv, **options), expected[0])
    expected = flash_attn_func(q, kv[:, :, 0].copy(), kv[:, :, 1].copy(), **options, return_attn_probs=True)
    assert_same(flash_attn_kvpacked_func(q, kv, **options, return_attn_probs=True), expected)
    assert np.array_equal(flash_attn_kvpacked_func(q, kv, **options), expected[0])


def assert_same(actual, expected):
    assert len(actual) == len(expected) == 3 and actual[2] is expected[2] is None
    assert np.array_equal(actual[0], expected[0]) and np.array_equal(actual[1], expected[1])


def test_no_copies(monkeypatch):
    """The kernel gets views of the caller's arrays, and writes what is returned."""
    seen = {}

    def spy(q, k, v, *, out, **options):
        seen.update(q=q, k=k, v=v, out=out)
        return attend(q, k, v, out=out, **options)

    monkeypatch.setattr(flash_attn, "attend", spy)
    qkv = random(2, 9, 3, 4, 16)
    out = flash_attn_qkvpacked_func(qkv)
    assert all(np.shares_memory(seen[name], qkv) for name in "qkv")
    assert np.shares_memory(seen["out"], out) and seen["out"].shape == (2, 4, 9, 16)


def test_a_row_that_sees_nothing():
    q, k = random(1, 5, 2, 8), random(1, 2, 2, 8)
    out, lse, _ = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert (out[:, :3] == 0).all() and (lse[..., :3] == -np.inf).all()
    assert (out[:, 3:] != 0).all() and np.isfinite(lse[..., 3:]).all()


def test_causal_is_bottom_right():
    """The two masks that the documentation of FlashAttention-2 draws."""
    for Lq, Lk, mask in ((2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), (5, 2, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]])):
        q, v = np.zeros((1, Lq, 1, 8), F32), np.eye(Lk, 8, dtype=F32)[None, :, None]
        out = flash_attn_func(q, np.zeros((1, Lk, 1, 8), F32), v, causal=True)
        assert np.array_equal(out[0, :, 0, :Lk] > 0, np.array(mask, bool))


def test_deterministic_is_accepted():
    qkv = random(2, 9, 3, 4, 16)
    assert np.array_equal(flash_attn_qkvpacked_func(qkv, deterministic=True), flash_attn_qkvpacked_func(qkv))


SIGNATURES = {  # as in flash_attn 2.8
    "flash_attn_func": "q k v dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn_kvpacked_func": "q kv dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn_qkvpacked_func": "qkv dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 "
    "softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False "
    "return_attn_probs=False block_table=None",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 "
    "softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False "
    "return_attn_probs=False",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen dropout_p=0.0 softmax_scale=None causal=False "
    "window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None "
    "cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1,-1) "
    "softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    assert [str(one).replace(" ", "") for one in parameters] == SIGNATURES[name].split()
    assert all(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters)
    assert name in flash_attn.__all__


# Varlen


def cu(*lengths, dtype=np.int32):
    return np.cumsum([0, *lengths]).astype(dtype)


def varlen_oracle(q, k, v, cu_q, cu_k, slopes=None, **options):
    out, lse = np.zeros((*q.shape[:2], v.shape[2])), np.full((q.shape[1], len(q)), -np.inf)
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        own = slopes if np.ndim(slopes) < 2 else slopes[b % 2]
        out[rows], lse[:, rows] = oracle(q[rows], k[keys], v[keys], slopes=own, **options)
    return out, lse


def of_sequences(options, n):
    slopes = options.get("alibi_slopes")
    return options if np.ndim(slopes) < 2 else options | {"alibi_slopes": slopes[np.arange(n) % 2]}


LENGTHS = {
    "mixed": ([5, 1, 0, 20, 3, 0], [5, 17, 4, 3, 0, 0]),
    "decode": ([1, 1, 1, 1], [4, 30, 1, 9]),
    "alike": ([6, 6], [6, 6]),
    "one": ([7], [9]),
    "none": ([], []),
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen(options, lengths, dtype):
    cu_q, cu_k = (cu(*x) for x in lengths)
    q, kv = random(cu_q[-1], 4, 16, dtype=dtype), random(cu_k[-1], 2, 2, 16, dtype=dtype)
    k, v = kv[:, 0].copy(), kv[:, 1].copy()
    longest = [max(x, default=0) for x in lengths]
    options = of_sequences(options, len(lengths[0]))
    out, lse, nothing = flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, **options, return_attn_probs=True)
    assert nothing is None and out.dtype == q.dtype and lse.dtype == F32
    assert_near((out, lse), varlen_oracle(q, k, v, cu_q, cu_k, **as_oracle(options)), dtype)
    assert np.array_equal(flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, **options), out)
    packed = flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, *longest, **options, return_attn_probs=True)
    assert_same(packed, (out, lse, None))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen_qkvpacked(options):
    cu_seqlens = cu(5, 0, 12, 1)
    qkv, options = random(18, 3, 4, 16), of_sequences(options, 4)
    q, k, v = (x.copy() for x in qkv.swapaxes(0, 1))
    expected = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 12, 12, **options, return_attn_probs=True)
    assert_same(flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 12, **options, return_attn_probs=True), expected)
    assert np.array_equal(flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 99, **options), expected[0])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen_pages(options, lengths, dtype):
    cu_q, cu_k = (cu(*x) for x in lengths)
    q = random(cu_q[-1], 4, 16, dtype=dtype)
    k, v = (random(cu_k[-1], 2, n, dtype=dtype) for n in (16, 12))
    table, (k_pool, v_pool) = paged(lengths[1], 16, k, v)
    longest = [max(x, default=0) for x in lengths]
    options = of_sequences(options, len(lengths[0]))
    arguments = (q, k_pool, v_pool, cu_q, cu_k, *longest)
    out, lse, _ = flash_attn_varlen_func(*arguments, **options, return_attn_probs=True, block_table=table)
    assert_near((out, lse), varlen_oracle(q, k, v, cu_q, cu_k, **as_oracle(options)), dtype)
    assert out.dtype == q.dtype
    assert np.array_equal(flash_attn_varlen_func(*arguments, **options, block_table=table), out)


def paged(lengths, page_size, *arrays):
    """(block_table, pools) of arrays whose rows have these lengths, one row after another: pages in random order, and
    NaN in what is left of them."""
    needed = [-(-n // page_size) for n in lengths]
    pages = np.random.default_rng(len(lengths)).permutation(sum(needed) + 2)
    table = np.full((len(lengths), max(needed, default=0) + 1), -1, np.int32)
    pools = [np.full((len(pages), page_size, *x.shape[1:]), np.nan, x.dtype) for x in arrays]
    for b, (begin, end) in enumerate(itertools.pairwise(cu(*lengths))):
        table[b, : needed[b]], pages = pages[: needed[b]], pages[needed[b] :]
        for pool, x in zip(pools, arrays, strict=True):
            for j in range(end - begin):
                pool[table[b, j // page_size], j % page_size] = x[begin + j]
    return table, pools


# Caches

CASES = {  # what differs from a plain call: new keys, how many queries, where rows lie
    "read only": {"L": 0},
    "decode": {"L": 1, "Lq": 1},
    "chunk": {"L": 5, "Lq": 5},
    "more queries than keys": {"L": 2, "Lq": 5},
    "more keys than queries": {"L": 5, "Lq": 2},
    "prefill": {"L": 6, "Lq": 6, "seqlens": [0, 0]},
    "a full cache": {"L": 5, "Lq": 5, "seqlens": [45, 12]},
    "rows by index": {"L": 5, "index": [3, 1]},
    "rows by index, read only": {"L": 0, "index": [2, 0]},
    "pages": {"L": 5, "page": 16},
    "large pages": {"L": 5, "page": 256},
    "across pages": {"L": 20, "Lq": 20, "page": 16, "seqlens": [15, 16]},
    "left padding": {"L": 5, "leftpad": [3, 9]},
    "left padding of all keys": {"L": 0, "leftpad": [9, 30], "seqlens": [9, 30]},
    "left padding, read only": {"L": 0, "leftpad": [0, 7]},
    "rows and left padding": {"L": 5, "index": [0, 3], "leftpad": [3, 9]},
    "int of keys": {"L": 5, "seqlens": 17},
}
ROTARY = {"interleaved": (16, True), "halves": (16, False), "some channels": (8, True), "some halves": (6, False)}


class Setting:
    """Arguments of flash_attn_with_kvcache, and what should come of them."""

    def __init__(self, L=0, Lq=3, seqlens=None, index=None, page=None, leftpad=None, dtype="float32", rotary=None,
                 interleaved=True, capacity=50, **options):
        B, H, Hk, D, Dv = 2, 4, 2, 16, 12
        self.q = random(B, Lq, H, D, dtype=dtype, seed=1)
        self.k, self.v = (random(B, L, Hk, n, dtype=dtype, seed=2) if L else None for n in (D, Dv))
        seqlens = [30, 11] if seqlens is None else seqlens
        self.begin = np.broadcast_to(seqlens, B)
        self.seqlens = seqlens if isinstance(seqlens, int) else np.array(seqlens, np.int32)
        self.arguments = {"cache_seqlens": self.seqlens} | options
        self.rows = list(range(B)) if index is None else index
        self.leftpad = np.array([0] * B if leftpad is None else leftpad, np.int32)
        caches = [random(4, capacity, Hk, n, dtype=dtype, seed=3) for n in (D, Dv)]
        held = [[cache[row] for cache in caches] for row in self.rows]  # what each row of q has
        if index is not None:
            self.arguments["cache_batch_idx"] = np.array(index, np.int32)
        if leftpad is not None:
            self.arguments["cache_leftpad"] = self.leftpad
        if page is not None:
            self.arguments["block_table"], caches = paged(
                [capacity] * B, page, *(cache[self.rows].reshape(B * capacity, *cache.shape[2:]) for cache in caches)
            )
        self.k_cache, self.v_cache = caches
        self.page = page
        self.options = {name: x for name, x in as_oracle(options).items()}
        if rotary is not None:
            angle = np.random.default_rng(4).uniform(0, 6, (80, rotary // 2))
            cos, sin = (f(angle).astype(F32).astype(self.q.dtype) for f in (np.cos, np.sin))
            self.arguments |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        self._expect([[x.copy() for x in row] for row in held], L, Lq)

    def _expect(self, held, L, Lq):
        q, k = self.q, self.k
        if "rotary_cos" in self.arguments:
            local = self.options.get("causal", False) or self.options.get("window_size", (-1, -1)) != (-1, -1)
            q = self._turn(q, self.begin[:, None] + (np.arange(Lq) if local else np.zeros(Lq, int)))
            k = self._turn(k, self.begin[:, None] + np.arange(L))
        out, lse = [], []
        slopes = self.options.pop("slopes", None)
        for b, (keys, values) in enumerate(held):
            n = self.begin[b]
            if L:
                keys[n : n + L], values[n : n + L] = k[b], self.v[b]
            one = oracle(q[b], keys[: n + L], values[: n + L], leftpad=self.leftpad[b], **self.options,
                         slopes=slopes if np.ndim(slopes) < 2 else slopes[b])
            out.append(one[0])
            lse.append(one[1])
        self.held, self.expected = held, (np.array(out), np.array(lse))

    def _turn(self, x, positions):
        """Rotary embedding, one pair of channels after the other."""
        cos, sin = (self.arguments[name].astype(np.float64) for name in ("rotary_cos", "rotary_sin"))
        r, interleaved = cos.shape[1], self.arguments["rotary_interleaved"]
        y = x.astype(np.float64)
        for pair in range(r):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + r)
            c, s = cos[positions, pair][..., None], sin[positions, pair][..., None]
            y[..., a], y[..., b] = y[..., a] * c - y[..., b] * s, y[..., a] * s + y[..., b] * c
        return y.astype(F32).astype(x.dtype)

    def call(self, **change):
        given = {"q": self.q, "k_cache": self.k_cache, "v_cache": self.v_cache, "k": self.k, "v": self.v}
        return flash_attn_with_kvcache(**(given | self.arguments | change))

    def cached(self):
        """What the caches hold now for each row of q."""
        if self.page is None:
            return [[cache[row] for cache in (self.k_cache, self.v_cache)] for row in self.rows]
        places = [[(row[j // self.page], j % self.page) for j in range(50)] for row in self.arguments["block_table"]]
        return [[np.array([cache[at] for at in row]) for cache in (self.k_cache, self.v_cache)] for row in places]

    def verify(self):
        dtype = self.q.dtype.name
        before = [x.copy() for x in (self.k_cache, self.v_cache)]
        out, lse = self.call(return_softmax_lse=True)
        assert out.dtype == self.q.dtype and lse.dtype == F32
        assert_near((out, lse), self.expected, dtype)
        changed = [int((x != y).any(axis=(-1, -2)).sum() - np.isnan(y.astype(F32)).all(axis=(-1, -2)).sum())
                   for x, y in zip((self.k_cache, self.v_cache), before, strict=True)]
        assert changed == [0 if self.k is None else self.k.shape[0] * self.k.shape[1]] * 2
        for (keys, values), (expected_keys, expected_values) in zip(self.cached(), self.held, strict=True):
            np.testing.assert_allclose(keys.astype(F32), expected_keys.astype(F32), rtol=TOLERANCES[dtype], atol=1e-6)
            assert np.array_equal(values, expected_values)
        return out


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("options", ["none", "causal", "window", "all"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_caches(case, options, dtype):
    setting = Setting(**case, **OPTIONS[options], dtype=dtype)
    out = setting.verify()
    if setting.k is None:
        assert np.array_equal(setting.call(), out)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cache_options(options):
    Setting(L=5, Lq=5, **options).verify()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rotary", ROTARY.values(), ids=ROTARY)
@pytest.mark.parametrize("options", ["none", "causal", "window", "left window"])
@pytest.mark.parametrize("case", ["decode", "chunk", "more queries than keys", "pages", "rows and left padding"])
def test_rotary(case, options, rotary, dtype):
    dim, interleaved = rotary
    Setting(**CASES[case], **OPTIONS[options], rotary=dim, interleaved=interleaved, dtype=dtype).verify()


def test_rotary_moves_queries_only_where_they_are_ordered():
    """Neither causal nor a window: all queries stand at cache_seqlens."""
    setting = Setting(L=3, Lq=3, rotary=16)
    same = np.repeat(setting.q[:, :1], 3, axis=1)
    out = setting.call(q=same)
    assert np.array_equal(out[:, 0], out[:, 1]) and np.array_equal(out[:, 0], out[:, 2])
    out = setting.call(q=same, window_size=(49, 49))
    assert not np.array_equal(out[:, 0], out[:, 1])


def test_rotary_in_float32_beside_16_bit():
    setting = Setting(L=3, Lq=3, rotary=16, dtype="float16")
    wide = {name: setting.arguments[name].astype(F32) for name in ("rotary_cos", "rotary_sin")}
    assert np.array_equal(setting.call(**wide), setting.call())


def test_all_of_the_cache_by_default():
    setting = Setting(L=0, seqlens=[50, 50])
    assert np.array_equal(setting.call(cache_seqlens=None), setting.call())


@pytest.mark.parametrize("num_splits", [0, 1, 7])
def test_num_splits_changes_nothing(num_splits):
    setting = Setting(L=0)
    assert np.array_equal(setting.call(num_splits=num_splits), setting.call())


@pytest.mark.parametrize("page", [None, 16])
def test_strided_caches(page):
    """Caches that are views: both in one array, heads before the length."""
    setting = Setting(L=5, Lq=5, page=page)
    expected = Setting(L=5, Lq=5, page=page).verify()
    k, v = setting.k_cache, setting.v_cache
    heads_first = np.ascontiguousarray(k.swapaxes(1, 2))
    packed = np.zeros((*v.shape[:2], 2, *v.shape[2:]), F32)
    packed[:, :, 1] = v
    setting.k_cache, setting.v_cache = heads_first.swapaxes(1, 2), packed[:, :, 1]
    assert np.array_equal(setting.verify(), expected)
    assert (packed[:, :, 0] == 0).all()


def test_rows_in_sequence():
    """Prefill, a chunk, then token after token through the caches: the rows of one causal call."""
    q, k, v = random(2, 40, 4, 16), random(2, 40, 2, 16), random(2, 40, 2, 16)
    k_cache, v_cache = np.full((2, 64, 2, 16), np.nan, F32), np.full((2, 64, 2, 16), np.nan, F32)
    outs = []
    for begin, end in itertools.pairwise([0, 17, 30, *range(31, 41)]):
        new = slice(begin, end)
        outs.append(flash_attn_with_kvcache(q[:, new], k_cache, v_cache, k[:, new], v[:, new], cache_seqlens=begin,
                                            causal=True))
    whole = flash_attn_func(q, k, v, causal=True)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, rtol=4e-6, atol=4e-6)
    assert np.array_equal(k_cache[:, :40], k) and np.isnan(k_cache[:, 40:]).all()


def test_pages_equal_rows():
    """To the bit, wherever pages lie."""
    for options in (OPTIONS["causal"], OPTIONS["all"]):
        rows, pages = Setting(L=5, Lq=5, **options), Setting(L=5, Lq=5, page=16, **options)
        assert np.array_equal(rows.call(), pages.call())


def test_shared_pages_and_rows():
    """Rows may read the same pages, as those of a common prefix do; of two that write one place the last wins."""
    setting = Setting(L=0, page=16, seqlens=[30, 30])
    table = setting.arguments["block_table"]
    table[1] = table[0]
    setting.q[1] = setting.q[0]
    out = setting.call()
    assert np.array_equal(out[0], out[1])
    setting = Setting(L=2, index=[1, 1], seqlens=[5, 5])
    setting.call()
    assert np.array_equal(setting.k_cache[1, 5:7], setting.k[1])


# Bad input

DENSE = {"q": random(2, 7, 4, 16), "k": random(2, 9, 2, 16), "v": random(2, 9, 2, 16)}
BAD = {
    "a list": (TypeError, {"q": [[0.0]]}, ["q: expected a NumPy array", "list"]),
    "float64": (TypeError, {"k": DENSE["k"].astype("f8")}, ["k: expected float32", "float64", "astype"]),
    "big-endian": (TypeError, {"v": DENSE["v"].astype(">f4")}, ["v: expected float32", ">f4"]),
    "two dtypes": (TypeError, {"v": DENSE["v"].astype("f2")}, ["v: expected float32 as in q", "float16"]),
    "rank": (ValueError, {"q": DENSE["q"][0]}, ["q: expected (B, Lq, H, D)", "(7, 4, 16)"]),
    "batch": (ValueError, {"k": DENSE["k"][:1]}, ["k: expected (B, Lk, Hk, D) with B=2, D=16", "(1, 9, 2, 16)"]),
    "head_dim": (ValueError, {"k": DENSE["k"][..., :8]}, ["k: expected", "D=16", "(2, 9, 2, 8)"]),
    "no head_dim": (ValueError, {"q": DENSE["q"][..., :0]}, ["q: ", "(2, 7, 4, 0)"]),
    "length of v": (ValueError, {"v": DENSE["v"][:, :8]}, ["v: expected", "Lk=9", "(2, 8, 2, 16)"]),
    "heads": (ValueError, {"q": DENSE["q"][:, :, :3]}, ["k: ", "divides q's 3", "got 2"]),
    "heads of v": (ValueError, {"v": DENSE["v"][:, :, :1]}, ["v: expected", "Hk=2", "(2, 9, 1, 16)"]),
    "dropout": (NotImplementedError, {"dropout_p": 0.1}, ["dropout_p: ", "0.1"]),
    "dropout negative": (ValueError, {"dropout_p": -0.1}, ["dropout_p: ", "-0.1"]),
    "scale": (ValueError, {"softmax_scale": float("nan")}, ["softmax_scale: ", "nan"]),
    "causal": (ValueError, {"causal": "yes"}, ["causal: ", "'yes'"]),
    "deterministic": (ValueError, {"deterministic": None}, ["deterministic: ", "None"]),
    "window": (ValueError, {"window_size": (1,)}, ["window_size: ", "(1,)"]),
    "window int": (ValueError, {"window_size": 4}, ["window_size: ", "4"]),
    "window below -1": (ValueError, {"window_size": (-2, 0)}, ["window_size: ", "(-2, 0)"]),
    "softcap": (ValueError, {"softcap": -1.0}, ["softcap: ", "-1.0"]),
    "slopes": (ValueError, {"alibi_slopes": np.zeros(2, F32)}, ["alibi_slopes: ", "(4,)", "(2,)"]),
    "slopes dtype": (TypeError, {"alibi_slopes": np.zeros(4)}, ["alibi_slopes: ", "float64"]),
}


def refused(error, parts, function, /, **arguments):
    with pytest.raises(error) as caught:
        function(**arguments)
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))


@pytest.mark.parametrize("name", BAD)
def test_bad_dense(name):
    error, change, parts = BAD[name]
    refused(error, parts, flash_attn_func, **(DENSE | change))


BAD_PACKED = {
    "qkv rank": (flash_attn_qkvpacked_func, {"qkv": DENSE["q"]}, ValueError, ["qkv: expected (B, L, 3, H, D)"]),
    "qkv of two": (flash_attn_qkvpacked_func, {"qkv": random(2, 7, 2, 4, 16)}, ValueError, ["qkv: ", "(2, 7, 2, "]),
    "qkv dtype": (flash_attn_qkvpacked_func, {"qkv": np.zeros((2, 7, 3, 4, 16))}, TypeError, ["qkv: ", "float64"]),
    "kv of three": (flash_attn_kvpacked_func, {"q": DENSE["q"], "kv": random(2, 7, 3, 4, 16)}, ValueError,
                    ["kv: expected (B, Lk, 2, Hk, D) with B=2, D=16", "(2, 7, 3, 4, 16)"]),
    "kv heads": (flash_attn_kvpacked_func, {"q": DENSE["q"], "kv": random(2, 7, 2, 3, 16)}, ValueError, ["kv: ", "4"]),
    "kv dtype": (flash_attn_kvpacked_func, {"q": DENSE["q"], "kv": random(2, 7, 2, 2, 16).astype("f2")}, TypeError,
                 ["kv: expected float32 as in q"]),
    "dropout": (flash_attn_qkvpacked_func, {"qkv": random(2, 7, 3, 4, 16), "dropout_p": 0.5}, NotImplementedError,
                ["dropout_p"]),
    "dropout kv": (flash_attn_kvpacked_func, {"q": DENSE["q"], "kv": random(2, 7, 2, 2, 16), "dropout_p": 0.5},
                   NotImplementedError, ["dropout_p"]),
    "window": (flash_attn_qkvpacked_func, {"qkv": random(2, 7, 3, 4, 16), "window_size": 3}, ValueError,
               ["window_size: "]),
}


@pytest.mark.parametrize("name", BAD_PACKED)
def test_bad_packed(name):
    function, arguments, error, parts = BAD_PACKED[name]
    refused(error, parts, function, **arguments)


VARLEN = {"q": random(9, 4, 16), "k": random(12, 2, 16), "v": random(12, 2, 16), "cu_seqlens_q": cu(5, 4),
          "cu_seqlens_k": cu(2, 10), "max_seqlen_q": 5, "max_seqlen_k": 10}
PAGES = {"k": random(3, 16, 2, 16), "v": random(3, 16, 2, 16), "block_table": np.array([[0], [2]], np.int32)}
BAD_VARLEN = {
    "rank": (ValueError, {"q": random(1, 9, 4, 16)}, ["q: expected (total_q, H, D)", "(1, 9, 4, 16)"]),
    "dtype": (TypeError, {"k": np.zeros((12, 2, 16))}, ["k: ", "float64"]),
    "two dtypes": (TypeError, {"v": np.zeros((12, 2, 16), "f2")}, ["v: expected float32 as in q", "float16"]),
    "tokens of v": (ValueError, {"v": random(11, 2, 16)}, ["v: expected", "total_k=12", "(11, 2, 16)"]),
    "heads": (ValueError, {"q": random(9, 3, 16)}, ["k: ", "divides q's 3"]),
    "short q": (ValueError, {"max_seqlen_q": 4}, ["max_seqlen_q: expected at least 5", "cu_seqlens_q", "got 4"]),
    "short k": (ValueError, {"max_seqlen_k": 9}, ["max_seqlen_k: expected at least 10", "cu_seqlens_k", "got 9"]),
    "max negative": (ValueError, {"max_seqlen_q": -1}, ["max_seqlen_q: ", "-1"]),
    "max a float": (ValueError, {"max_seqlen_k": 10.0}, ["max_seqlen_k: ", "10.0"]),
    "max None": (ValueError, {"max_seqlen_k": None}, ["max_seqlen_k: ", "None"]),
    "cu a list": (TypeError, {"cu_seqlens_q": [0, 5, 9]}, ["cu_seqlens_q: ", "list", "np.int32"]),
    "cu floats": (TypeError, {"cu_seqlens_k": cu(2, 10, dtype=F32)}, ["cu_seqlens_k: ", "float32"]),
    "cu decreases": (ValueError, {"cu_seqlens_q": np.array([0, 5, 4])}, ["cu_seqlens_q: "]),
    "cu of one": (ValueError, {"cu_seqlens_q": np.array([1, 5, 9])}, ["cu_seqlens_q: "]),
    "cu beyond q": (ValueError, {"cu_seqlens_q": cu(5, 5)}, ["cu_seqlens_q: "]),
    "unlike numbers": (ValueError, {"cu_seqlens_q": cu(5, 2, 2)}, ["cu_seqlens_"]),
    "dropout": (NotImplementedError, {"dropout_p": 0.1}, ["dropout_p: ", "0.1"]),
    "scale": (ValueError, {"softmax_scale": float("inf")}, ["softmax_scale: ", "inf"]),
    "window": (ValueError, {"window_size": (1,)}, ["window_size: ", "(1,)"]),
    "slopes": (ValueError, {"alibi_slopes": np.zeros((3, 4), F32)}, ["alibi_slopes: ", "(3, 4)"]),
}
BAD_PAGES = {
    "not pages": (ValueError, {"k": VARLEN["k"]}, ["k: expected (pages, page_size, Hk, D)", "(12, 2, 16)"]),
    "page size": (ValueError, {"k": PAGES["k"][:, :8], "v": PAGES["v"][:, :8]}, ["k: ", "multiple of 16", "got 8"]),
    "no page size": (ValueError, {"k": PAGES["k"][:, :0], "v": PAGES["v"][:, :0]}, ["k: ", "multiple of 16", "got 0"]),
    "beyond the pool": (ValueError, {"block_table": np.array([[0], [3]])},
                        ["block_table: ", "0 to 2", "got 3 at [1, 0]"]),
    "negative": (ValueError, {"block_table": np.array([[-1], [2]])}, ["block_table: ", "got -1 at [0, 0]"]),
    "floats": (TypeError, {"block_table": np.zeros((2, 1))}, ["block_table: ", "float64", "np.int32"]),
    "a list": (TypeError, {"block_table": [[0], [1]]}, ["block_table: ", "list"]),
    "rows": (ValueError, {"block_table": np.zeros((3, 1), int)}, ["block_table: ", "(2, ", "(3, 1)"]),
    "too few pages": (ValueError, {"cu_seqlens_k": cu(2, 17), "max_seqlen_k": 17}, ["block_table: ", "2 pages", "17"]),
}


@pytest.mark.parametrize("name", BAD_VARLEN)
def test_bad_varlen(name):
    error, change, parts = BAD_VARLEN[name]
    refused(error, parts, flash_attn_varlen_func, **(VARLEN | change))


@pytest.mark.parametrize("name", {**BAD_VARLEN, **BAD_PAGES})
def test_bad_pages(name):
    error, change, parts = (BAD_VARLEN | BAD_PAGES)[name]
    if name in ("dtype", "two dtypes", "tokens of v"):
        change = {what: x[:3, None].repeat(16, 1)[..., :2, :] for what, x in change.items()}
        change = {what: x[:, :15] if name == "tokens of v" else x for what, x in change.items()}
        parts = [parts[0], *([] if name == "tokens of v" else parts[1:])]
    refused(error, parts, flash_attn_varlen_func, **(VARLEN | PAGES | change))


def test_bad_varlen_packed():
    qkv = random(9, 3, 4, 16)
    call = {"qkv": qkv, "cu_seqlens": cu(5, 4), "max_seqlen": 5}
    for change, error, parts in (
        ({"max_seqlen": 4}, ValueError, ["max_seqlen: expected at least 5", "cu_seqlens, got 4"]),
        ({"cu_seqlens": cu(5, 9), "max_seqlen": 9}, ValueError, ["cu_seqlens: "]),
        ({"cu_seqlens": np.array([0, 5, 3])}, ValueError, ["cu_seqlens: "]),
        ({"qkv": qkv[:, :2]}, ValueError, ["qkv: expected (total, 3, H, D)"]),
        ({"dropout_p": 0.1}, NotImplementedError, ["dropout_p"]),
    ):
        refused(error, parts, flash_attn_varlen_qkvpacked_func, **(call | change))
    call = {name: x for name, x in VARLEN.items() if name not in "kv"} | {"kv": random(12, 2, 2, 16)}
    for change, error, parts in (
        ({"max_seqlen_k": 4}, ValueError, ["max_seqlen_k: expected at least 10"]),
        ({"max_seqlen_q": 4}, ValueError, ["max_seqlen_q: expected at least 5"]),
        ({"kv": random(12, 3, 2, 16)}, ValueError, ["kv: expected (total_k, 2, Hk, D) with D=16"]),
        ({"dropout_p": 0.1}, NotImplementedError, ["dropout_p"]),
    ):
        refused(error, parts, flash_attn_varlen_kvpacked_func, **(call | change))


def ints(*values):
    return np.array(values, np.int32)


def overlapping(shape):
    return np.lib.stride_tricks.as_strided(np.zeros(shape[2:], F32), shape, (0, 0, 4 * shape[3], 4))


def read_only(shape):
    x = np.zeros(shape, F32)
    x.flags.writeable = False
    return x


CACHE = (4, 50, 2, 16)
BAD_CACHES = {  # of Setting(L=5, Lq=5) with rotary embedding and one head_dim
    "cache dtype": (TypeError, {"k_cache": np.zeros(CACHE)}, ["k_cache: ", "float64"]),
    "unlike caches": (TypeError, {"v_cache": np.zeros(CACHE, "f2")}, ["v_cache: expected float32 as in q", "float16"]),
    "cache rank": (ValueError, {"k_cache": np.zeros(CACHE[1:], F32)}, ["k_cache: expected (cache_rows, capacity, "]),
    "cache head_dim": (ValueError, {"k_cache": np.zeros((4, 50, 2, 8), F32)}, ["k_cache: ", "D=16", "(4, 50, 2, 8)"]),
    "cache heads": (ValueError, {"k_cache": np.zeros((4, 50, 3, 16), F32), "v_cache": np.zeros((4, 50, 3, 16), F32)},
                    ["k_cache: ", "divides q's 4", "got 3"]),
    "caches of two lengths": (ValueError, {"v_cache": np.zeros((4, 49, 2, 16), F32)}, ["v_cache: ", "capacity=50"]),
    "too few rows": (ValueError, {"k_cache": np.zeros((1, 50, 2, 16), F32), "v_cache": np.zeros((1, 50, 2, 16), F32)},
                     ["k_cache: expected at least 2 rows", "(1, 50, 2, 16)"]),
    "strided cache": (ValueError, {"k_cache": np.zeros((4, 50, 2, 32), F32)[..., ::2]}, ["k_cache: ", "contiguous"]),
    "read-only k": (ValueError, {"k_cache": read_only(CACHE)}, ["k_cache: ", "read-only"]),
    "read-only v": (ValueError, {"v_cache": read_only(CACHE)}, ["v_cache: ", "read-only"]),
    "broadcast cache": (ValueError, {"k_cache": overlapping(CACHE)}, ["k_cache: ", "overlap"]),
    "k alone": (ValueError, {"v": None}, ["v: ", "together", "None"]),
    "v alone": (ValueError, {"k": None}, ["k: ", "together", "None"]),
    "k shape": (ValueError, {"k": random(2, 5, 3, 16)}, ["k: expected (B, L, Hk, D)", "Hk=2", "(2, 5, 3, 16)"]),
    "v shape": (ValueError, {"v": random(2, 4, 2, 16)}, ["v: expected", "L=5", "(2, 4, 2, 16)"]),
    "k dtype": (TypeError, {"k": random(2, 5, 2, 16, dtype="float16")}, ["k: expected float32 as in q", "float16"]),
    "no seqlens": (ValueError, {"cache_seqlens": None}, ["cache_seqlens: ", "None"]),
    "seqlens negative": (ValueError, {"cache_seqlens": -1}, ["cache_seqlens: ", "-1"]),
    "a negative one": (ValueError, {"cache_seqlens": ints(30, -1)}, ["cache_seqlens: ", "0 to 45", "got -1 at [1]"]),
    "beyond capacity": (ValueError, {"cache_seqlens": ints(46, 0)},
                        ["cache_seqlens: ", "0 to 45", "got 46 at [0]", "50"]),
    "int beyond capacity": (ValueError, {"cache_seqlens": 46}, ["cache_seqlens: ", "got 46"]),
    "seqlens floats": (TypeError, {"cache_seqlens": np.zeros(2, F32)}, ["cache_seqlens: ", "float32", "np.int32"]),
    "seqlens float": (ValueError, {"cache_seqlens": 3.0}, ["cache_seqlens: ", "3.0"]),
    "seqlens of three": (ValueError, {"cache_seqlens": ints(1, 2, 3)}, ["cache_seqlens: ", "(2,)", "(3,)"]),
    "index beyond": (ValueError, {"cache_batch_idx": ints(0, 4)}, ["cache_batch_idx: ", "0 to 3", "got 4 at [1]"]),
    "index negative": (ValueError, {"cache_batch_idx": ints(-1, 0)}, ["cache_batch_idx: ", "got -1 at [0]"]),
    "index of three": (ValueError, {"cache_batch_idx": ints(0, 1, 2)}, ["cache_batch_idx: ", "(2,)", "(3,)"]),
    "index of floats": (TypeError, {"cache_batch_idx": np.zeros(2)}, ["cache_batch_idx: ", "float64"]),
    "leftpad beyond": (ValueError, {"cache_leftpad": ints(0, 12)}, ["cache_leftpad: ", "0 to 11", "got 12 at [1]"]),
    "leftpad negative": (ValueError, {"cache_leftpad": ints(-1, 0)}, ["cache_leftpad: ", "got -1"]),
    "leftpad shape": (ValueError, {"cache_leftpad": ints(0)}, ["cache_leftpad: ", "(2,)", "(1,)"]),
    "cos alone": (ValueError, {"rotary_sin": None}, ["rotary_sin: ", "together", "None"]),
    "sin alone": (ValueError, {"rotary_cos": None}, ["rotary_cos: ", "together", "None"]),
    "unlike cos": (ValueError, {"rotary_cos": np.zeros((80, 4), F32)},
                   ["rotary_cos, rotary_sin: ", "(80, 4)", "(80, 8)"]),
    "rotary_dim": (ValueError, {"rotary_cos": np.zeros((80, 9), F32), "rotary_sin": np.zeros((80, 9), F32)},
                   ["rotary_cos, rotary_sin: ", "2 to 16", "(80, 9)"]),
    "no rotary_dim": (ValueError, {"rotary_cos": np.zeros((80, 0), F32), "rotary_sin": np.zeros((80, 0), F32)},
                      ["rotary_cos, rotary_sin: ", "(80, 0)"]),
    "rotary rank": (ValueError, {"rotary_cos": np.zeros(8, F32)}, ["rotary_cos: ", "(8,)"]),
    "rotary dtype": (TypeError, {"rotary_sin": np.zeros((80, 8))}, ["rotary_sin: ", "float64"]),
    "few positions": (ValueError, {"rotary_cos": np.zeros((34, 8), F32), "rotary_sin": np.zeros((34, 8), F32)},
                      ["rotary_cos: ", "at least 35", "(34, 8)"]),
    "rotary without k": (ValueError, {"k": None, "v": None}, ["rotary_cos: ", "without new k"]),
    "interleaved": (ValueError, {"rotary_interleaved": 1}, ["rotary_interleaved: ", "1"]),
    "splits": (ValueError, {"num_splits": -1}, ["num_splits: ", "-1"]),
    "scale": (ValueError, {"softmax_scale": float("nan")}, ["softmax_scale: ", "nan"]),
    "causal": (ValueError, {"causal": "yes"}, ["causal: ", "'yes'"]),
    "window": (ValueError, {"window_size": (1,)}, ["window_size: ", "(1,)"]),
    "softcap": (ValueError, {"softcap": -1.0}, ["softcap: ", "-1.0"]),
    "slopes": (ValueError, {"alibi_slopes": np.zeros((3, 4), F32)}, ["alibi_slopes: ", "(3, 4)"]),
    "index and table": (ValueError, {"cache_batch_idx": ints(0, 1), "block_table": np.zeros((2, 4), int)},
                        ["cache_batch_idx: ", "block_table"]),
    "page size": (ValueError, {"block_table": np.zeros((2, 4), int)}, ["k_cache: ", "multiple of 16", "50"]),
}


def of_one_head_dim(page=None, rotary=16):
    setting = Setting(L=5, Lq=5, rotary=rotary, page=page)
    setting.v = random(2, 5, 2, 16, seed=9)
    setting.v_cache = random(*setting.k_cache.shape, seed=9)
    return setting


@pytest.mark.parametrize("name", BAD_CACHES)
def test_bad_caches(name):
    """Nothing is written."""
    error, change, parts = BAD_CACHES[name]
    setting = of_one_head_dim()
    caches = {which: change.get(which, getattr(setting, which)) for which in ("k_cache", "v_cache")}
    before = {which: x.copy() for which, x in caches.items()}
    refused(error, parts, setting.call, **change)
    assert all(np.array_equal(x, before[which]) for which, x in caches.items())


@pytest.mark.parametrize("change, parts", [
    ({"block_table": np.array([[0, 1, 2], [3, 4, 99]])}, []),
    ({"block_table": np.array([[0, 1, -1], [3, 4, 5]])}, ["block_table: ", "got -1 at [0, 2]"]),
    ({"block_table": np.array([[0, 1, 2], [99, 4, 5]])}, ["block_table: ", "got 99 at [1, 0]"]),
    ({"block_table": np.array([[0, 1], [3, 4]])}, ["cache_seqlens: ", "0 to 27", "got 30 at [0]", "32"]),
    ({"cache_seqlens": ints(80, 0)}, ["cache_seqlens: ", "got 80"]),
    ({"block_table": np.array([0, 1, 2])}, ["block_table: ", "(3,)"]),
], ids=["beyond the keys", "negative", "beyond the pool", "too few pages", "too many keys", "rank"])
def test_bad_tables(change, parts):
    """30 + 5 and 11 + 5 keys in pages of 16: three and one are looked at."""
    setting = of_one_head_dim(page=16)
    before = [x.copy() for x in (setting.k_cache, setting.v_cache)]
    if not parts:
        setting.call(**change)
        return
    refused(ValueError, parts, setting.call, **change)
    for x, y in zip((setting.k_cache, setting.v_cache), before, strict=True):
        assert np.array_equal(x, y, equal_nan=True)


@pytest.mark.parametrize("what", ["q", "k", "v", "v_cache"])
def test_overlapping_caches(what):
    setting = of_one_head_dim(rotary=None)
    k_cache, v_cache = setting.k_cache, setting.v_cache
    queries = k_cache.reshape(4, 25, 4, 16)[:2, :5]
    inside = {"q": queries, "k": k_cache[:2, 3:8], "v": v_cache[:2, :5], "v_cache": k_cache}
    refused(ValueError, ["overlap"], setting.call, **{what: inside[what]})


def test_imports_alone():
    """Neither torch nor the real package is needed or imported."""
    import subprocess
    import sys

    code = "import cyflash.compat.flash_attn, sys; assert not {'torch', 'flash_attn', 'ml_dtypes'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_example_of_the_documentation_matches_the_real_package():
    """Where flash_attn is installed its functions take the same arguments."""
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    import flash_attn as real

    for name in flash_attn.__all__:
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (flash_attn, real))
        assert [(x.name, x.default) for x in ours.values()] == [(x.name, x.default) for x in theirs.values()]
