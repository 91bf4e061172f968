"""Cases of `--decode`: queries that read a cache, tokens that are appended to one, batches of unlike lengths.

Keys and values of every head come from seeds of their own, some tokens at a time: a process makes no more of them than
it needs, and nothing has to hold them whole. References are of some heads or rows where all would take too long, as
`Error.checked` tells.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from cyflash.bench.cases import Error, Parts
from cyflash.flops import attention_flops
from cyflash.reference import attention as reference_attention

CHUNK = 1024  # tokens that are made and appended at once
CHECK_ALL_BELOW = 2**25  # numbers in keys and values; of more, three kv heads of each row are checked
CHECKED_ROWS = 32  # at the begin, in the middle and at the end of each sequence of a ragged batch


@dataclass(frozen=True)
class Decode:
    """One new query of each row to the `keys` of this row in a cache of `dtype`. `page_size` None: a KVCache, else a
    PagedKVCache. `num_threads` None: the process's default."""

    keys: tuple[int, ...]
    heads: int
    kv_heads: int
    D: int
    dtype: str = "float32"
    page_size: int | None = None
    num_threads: int | None = None

    def title(self):
        rows = f"{len(self.keys)} rows, " * (len(self.keys) > 1)
        heads = f"{self.heads}{f'/{self.kv_heads}' * (self.kv_heads < self.heads)} head{'s' * (self.heads > 1)}"
        keys = str(self.keys[0]) if len(set(self.keys)) == 1 else f"{min(self.keys)} to {max(self.keys)}"
        return f"{rows}{heads}, {keys} keys, D={self.D}"

    def question(self):
        return Decode(self.keys, self.heads, self.kv_heads, self.D)

    def flops(self):
        return sum(attention_flops(1, self.heads, 1, L, self.D, self.D) for L in self.keys)

    def queries(self):
        """(rows, H, 1, D)"""
        shape = len(self.keys), self.heads, 1, self.D
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def tokens(self, row, head):
        """Keys and values of a kv head, float32, as [k, v] of shape (2, CHUNK or fewer, D)."""
        L = self.keys[row]
        for begin in range(0, L, CHUNK):
            shape = 2, min(CHUNK, L - begin), self.D
            yield np.random.default_rng((row, head, begin)).standard_normal(shape, dtype=np.float32)

    def chunks(self):
        """(row, k, v) of all heads, k and v as (1, Hk, CHUNK or fewer, D); rows take turns, as they do in a server."""
        streams = {row: [self.tokens(row, head) for head in range(self.kv_heads)] for row in range(len(self.keys))}
        while streams:
            for row, heads in tuple(streams.items()):
                made = [next(head, None) for head in heads]
                if made[0] is None:
                    del streams[row]
                else:
                    yield row, *np.stack(made, axis=1)[:, None]

    def expected(self):
        """Of all kv heads, or of the first, one in the middle and the last."""
        group, heads = self.heads // self.kv_heads, range(self.kv_heads)
        if 2 * sum(self.keys) * self.kv_heads * self.D > CHECK_ALL_BELOW:
            heads = sorted({0, self.kv_heads // 2, self.kv_heads - 1})
        q, parts = self.queries(), []
        for row in range(len(self.keys)):
            for head in heads:
                k, v = np.concatenate(list(self.tokens(row, head)), axis=1)
                index = row, slice(head * group, (head + 1) * group), 0
                parts.append((index, reference_attention(q[index], k, v)))
        return Parts(q.shape, parts)


@dataclass(frozen=True)
class Read:
    """All bytes of the keys and values of a cache, read as fast as memory gives them."""

    cache: Decode

    def title(self):
        return f"reading {self.cache.title()}"

    def question(self):
        return self

    def flops(self):
        return 0

    def expected(self):
        return SameSums()


class SameSums:
    """An output is (the sum of what was read, what it should be): all was read, or it was not."""

    def error(self, output):
        got, should = output.tolist()
        return Error(float(got != should), float(got != should), 1, 1)


@dataclass(frozen=True)
class Append:
    """The last token of each row of `cache` is appended, by one call; what the cache then holds is judged."""

    cache: Decode

    def title(self):
        return f"append of a token, {self.cache.title()}"

    def question(self):
        return self.cache.question()

    def flops(self):
        return 0


@dataclass(frozen=True)
class Ragged:
    """Causal self-attention of sequences of unlike `lengths` that lie one after another. `queries`: "all", or only the
    "last" one of each sequence. `how`: one "varlen" call, or a "loop" over sequences. `int8`: float arrays in, all
    defaults."""

    lengths: tuple[int, ...]
    heads: int
    D: int
    queries: str = "all"
    int8: bool = False
    how: str = "varlen"

    def title(self):
        what = "" if self.queries == "all" else "last queries of "
        shape = f"{min(self.lengths)} to {max(self.lengths)}, {self.heads} heads, D={self.D}"
        return f"{what}{len(self.lengths)} sequences of {shape}"

    def question(self):
        return replace(self, int8=False, how="varlen")

    def flops(self):
        return sum(
            attention_flops(1, self.heads, n, L, self.D, self.D, causal=True)
            for n, L in zip(self.query_lengths(), self.lengths, strict=True)
        )

    def query_lengths(self):
        return self.lengths if self.queries == "all" else (1,) * len(self.lengths)

    def bounds(self):
        """cu_seqlens of queries and of keys."""
        return tuple(np.concatenate([[0], np.cumsum(x)]) for x in (self.query_lengths(), self.lengths))

    def slices(self):
        """(of queries, of keys) of each sequence."""
        return list(zip(*([slice(*ends) for ends in pairwise(x.tolist())] for x in self.bounds()), strict=True))

    def inputs(self):
        """q (total of queries, H, D); k and v (total, H, D)."""
        totals = sum(self.query_lengths()), sum(self.lengths), sum(self.lengths)
        rng = np.random.default_rng(0)
        return tuple(rng.standard_normal((total, self.heads, self.D), dtype=np.float32) for total in totals)

    def expected(self):
        """Of the first, middle and last rows of each sequence."""
        q, k, v = self.inputs()
        parts = []
        for of_queries, of_keys in self.slices():
            begin, end = of_queries.start, of_queries.stop
            middle = (begin + end - CHECKED_ROWS) // 2
            for start in sorted({begin, max(begin, middle), max(begin, end - CHECKED_ROWS)}):
                rows = slice(start, min(start + CHECKED_ROWS, end))
                seen = slice(of_keys.start, of_keys.stop - (end - rows.stop))
                arrays = (x.swapaxes(0, 1) for x in (q[rows], k[seen], v[seen]))
                parts.append((rows, reference_attention(*arrays, causal=True).swapaxes(0, 1)))
        return Parts(q.shape, parts)
