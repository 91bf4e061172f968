"""The systems of `--decode`: what cyflash and torch do for the cases of decode_cases.py."""

import functools
import weakref

import numpy as np

from cyflash.bench.cases import FP32, INT8, TOLERANCES, Case
from cyflash.bench.decode_cases import CHUNK, Append, Decode, Ragged, Read
from cyflash.bench.systems import Candidate, Cyflash, Torch

APPENDS = 1024  # tokens that a cache takes before it is truncated, once in so many calls


class CyflashDecode(Cyflash):
    """Cases that ask for the same cache share it, while any of them is prepared."""

    def __init__(self, threads):
        super().__init__(threads)
        self._caches = weakref.WeakValueDictionary()

    @classmethod
    def tolerance(cls, case):
        if isinstance(case, Decode):
            return TOLERANCES[case.dtype]
        if isinstance(case, Append):
            return TOLERANCES[case.cache.dtype]
        if isinstance(case, Ragged):
            return INT8 if case.int8 else FP32
        return FP32 if isinstance(case, Read) else super().tolerance(case)

    def candidates(self, case):
        if isinstance(case, Case):
            return super().candidates(case)
        builds = {Decode: self._decode, Read: self._read, Append: self._append, Ragged: self._ragged}
        name = {Decode: "flash_attention_with_kvcache", Read: "read_words", Append: "append"}.get(type(case))
        return {name or case.how: functools.partial(builds[type(case)], case)}

    def _decode(self, case):
        from cyflash import flash_attention_with_kvcache

        q, cache = case.queries(), self._cache(case)
        out = np.empty_like(q)
        return Candidate(
            lambda: flash_attention_with_kvcache(q, cache, out=out, num_threads=case.num_threads), np.array
        )

    def _read(self, case):
        """The very pages that the calls on this cache read."""
        from cyflash import cpu

        cache, build = self._cache(case.cache), cpu.active()
        words = [x.reshape(-1).view(np.int32) for x in _arrays(cache)]
        threads = case.cache.num_threads or self.asked

        def read(sums):
            should = [int(x.view(np.uint32).sum(dtype=np.uint32)) for x in words]
            return np.array([sums, should], np.int64).sum(axis=1)

        return Candidate(lambda: [build.read_words(x, threads) for x in words], read, keep=(cache,))

    def _append(self, case):
        from cyflash import KVCache, flash_attention_with_kvcache

        asked, q = case.cache, case.cache.queries()
        (length,) = set(asked.keys)
        cache = KVCache(len(asked.keys), asked.kv_heads, asked.D, length - 1 + APPENDS, asked.dtype)
        _fill(cache, asked, range(len(asked.keys)))
        k, v = (np.ascontiguousarray(x) for x in _last_tokens(asked))
        for _ in range(APPENDS - 1):  # the system gives memory when it is first written: not while the clock runs
            cache.append(k, v)
        cache.truncate(length - 1)
        left = APPENDS

        def call():
            nonlocal left
            if not left:
                cache.truncate(length - 1)
                left = APPENDS
            cache.append(k, v)
            left -= 1

        def read(_):
            nonlocal left
            left = 0
            call()
            return flash_attention_with_kvcache(q, cache)

        return Candidate(call, read)

    def _ragged(self, case):
        import cyflash

        q, k, v = case.inputs()
        out = np.empty_like(q)
        kind = "_int8" * case.int8
        if case.how == "varlen":
            attend, bounds = getattr(cyflash, f"flash_attention{kind}_varlen"), case.bounds()
            return Candidate(lambda: attend(q, k, v, *bounds, causal=True, out=out), np.array)
        attend = getattr(cyflash, f"flash_attention{kind}")
        views = [
            [x[rows].swapaxes(0, 1) for x, rows in ((q, of_q), (k, of_k), (v, of_k), (out, of_q))]
            for of_q, of_k in case.slices()
        ]

        def loop():
            for q, k, v, out in views:
                attend(q, k, v, causal=True, out=out)

        return Candidate(loop, lambda _: out.copy())

    def _cache(self, case):
        """The filled cache that the case names."""
        key = case.keys, case.kv_heads, case.D, case.dtype, case.page_size
        cache = self._caches.get(key)
        if cache is None:
            cache = self._caches[key] = filled_cache(case)
        return cache


def filled_cache(case):
    """The cache of a `Decode`, full: KVCache, or PagedKVCache without a page too many."""
    from cyflash import KVCache, PagedKVCache

    if case.page_size is None:
        cache = KVCache(len(case.keys), case.kv_heads, case.D, max(case.keys), case.dtype)
        rows = range(len(case.keys))
    else:
        pages = sum(-(-keys // case.page_size) for keys in case.keys)
        cache = PagedKVCache(pages, case.page_size, case.kv_heads, case.D, case.dtype)
        rows = [cache.add() for _ in case.keys]
    _fill(cache, case, rows)
    return cache


def _fill(cache, case, rows):
    for row, k, v in case.chunks():
        cache.append(k, v, rows=[rows[row]])


def _last_tokens(case):
    """k, v (rows, Hk, 1, D): the last token of each row."""
    last = [
        [list(case.tokens(row, head))[-1][:, -1] for head in range(case.kv_heads)] for row in range(len(case.keys))
    ]
    return np.moveaxis(np.array(last), 2, 0)[:, :, :, None]


def _arrays(cache):
    """What attention reads of a cache: keys and values, and of codes the scales and sums."""
    stored, _, _ = cache._stored()
    return [x for x in stored if isinstance(x, np.ndarray) and x.size]


class TorchDecode(Torch):
    """Keys and values in two contiguous arrays, in every way to ask for grouped heads that computes the same; and by
    plain products, which `Torch` leaves out, since one query has no scores to save."""

    def candidates(self, case):
        if isinstance(case, Case):
            return super().candidates(case)
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        group = case.heads // case.kv_heads
        attend = torch.nn.functional.scaled_dot_product_attention
        arrays = functools.cache(lambda: [torch.from_numpy(x) for x in _contiguous(case)])

        def enable_gqa():
            q, k, v = arrays()
            return Candidate(lambda: attend(q, k, v, enable_gqa=group > 1), _as_numpy)

        def expanded():
            q, k, v = arrays()
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
            return Candidate(lambda: attend(q, k, v), _as_numpy)

        def as_rows():
            q, k, v = arrays()
            rows = q.view(len(case.keys), case.kv_heads, group, case.D)
            return Candidate(lambda: attend(rows, k, v), lambda out: out.reshape(q.shape).numpy())

        def math():
            made = as_rows()

            def call():
                with sdpa_kernel([SDPBackend.MATH]):
                    return made.call()

            return Candidate(call, made.read)

        grouped = {"enable_gqa": enable_gqa, "expanded heads": expanded, "a group's queries as rows": as_rows}
        return (grouped if group > 1 else {"SDPA flash": enable_gqa}) | {"SDPA math": math}


def _as_numpy(out):
    return out.numpy()


def _contiguous(case):
    """q, k, v of a case whose rows are of one length."""
    (length,) = set(case.keys)
    k, v = np.empty((2, len(case.keys), case.kv_heads, length, case.D), np.float32)
    filled = dict.fromkeys(range(len(case.keys)), 0)
    for row, *made in case.chunks():
        tokens = slice(filled[row], filled[row] + CHUNK)
        for x, part in zip((k, v), made, strict=True):
            x[row, :, tokens] = part[0]
        filled[row] += CHUNK
    return case.queries(), k, v


DECODE_SYSTEMS = {system.name: system for system in (CyflashDecode, TorchDecode)}
