"""Keys and values of earlier tokens, kept as the kernels read them: caches, and attention that reads them.

    KVCache, PagedKVCache                append, truncate, reorder, fork, save ...: who has which tokens
      | pool.py                          pages, references to them, the rows' tables
      | storing.py                       what pages hold: floats, or codes that are made once, on append
      | cachefile.py                     save and load
      v
    Stored, table, lengths (stored.py)  ->  flash_attention_with_kvcache

Every change is checked and prepared before it begins: an error leaves the cache as it was.
"""
from typing import NamedTuple

import numpy as np

from cyflash import arrays, attention, cachefile
from cyflash.foreign import same_kind
from cyflash.plan import UNBOUNDED, checked_flag, checked_window
from cyflash.pool import Pool, Rows
from cyflash.quantized import QuantizedTensor
from cyflash.stored import KEYS_UNIT
from cyflash.storing import checked_count, format_of

__all__ = ["KVCache", "PagedKVCache", "flash_attention_with_kvcache"]

PAGE_SIZE = 512  # tokens: a block of keys of the kernels for few rows


class _Tokens(NamedTuple):
    """Tokens that were checked and quantised, and where they go."""

    rows: np.ndarray  # row numbers
    whole: bool  # these are all rows, in their order
    begins: np.ndarray  # of each row: its length before ...
    ends: np.ndarray  # ... and after
    counts: np.ndarray
    first: np.ndarray  # of each row: the first token that is not given up
    most: int  # tokens of a row
    fits: bool  # in pages that the rows have
    ready: tuple  # of storing.py
    num_threads: int | None


class KVCache:
    """Keys and values of a batch of sequences, each of its own length.

    Parameters
    ----------
    batch : int
        Rows: sequences, of 0 tokens at first.
    kv_heads, head_dim : int
        Hk and D: of keys (n, Hk, L, D).
    capacity : int
        Tokens that a row can hold.
    dtype : dtype or str, default "float32"
        What is kept: float32, float16, bfloat16 or int8. Keys and values may come in any float type whatever it is.
    v_head_dim : int, optional
        Dv, of values (n, Hk, L, Dv). Default: head_dim.
    granularity : {"token", "head", "tensor"}, default "token"
        int8: with "token", the scale of each token of each head is found when it comes. The others need scales.
    k_scale, v_scale : float or array-like of float, shape (), (Hk, 1, 1), optional
        int8: static scales, as in `quantize`; numbers with granularity "tensor". What lies beyond 127 scales saturates.
    k_mean : array-like of float, shape (Hk, 1, D) or one that broadcasts to it, optional
        int8: subtracted from the keys before they are quantised; exactly compensated. A mean cannot be found as tokens
        come, since earlier codes would change with it: take that of a calibration.
    quant : LayerScales, optional
        int8: k_scale, v_scale, k_mean and fp32_sinks of a calibrated layer, and its q_scale and pv for the calls that
        read the cache. What is None there is found for each token.
    fp32_sinks : int, default 0
        int8: so many first tokens of each row are kept in float32.
    window : (int, int), optional
        (left, 0): every query sees its own token and `left` before it, so earlier ones need not be kept, and a row may
        become longer than the capacity. Tokens are given up at the next append after they were last needed, so that
        appending a chunk and attending to it gives the rows of one whole prefill. The capacity must be at least
        left + 1, and a row takes capacity - min(length, left) tokens at once.
    grow : bool, default False
        Have room for twice as many tokens, or more, instead of an error where the capacity is reached.

    Attributes
    ----------
    lengths : ndarray of int64, read-only
        Tokens of each row so far, those that a window gave up included. A copy.
    batch, kv_heads, head_dim, v_head_dim, capacity, page_size : int
    dtype : dtype
    window : (int, int) or None
    nbytes : int
        Of all arrays that are held, whether tokens fill them or not.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.
    ImportError
        For bfloat16 without ml_dtypes.
    MemoryError
        When it cannot be allocated. Memory that no token was written to may not be taken from the system yet.

    Notes
    -----
    Tokens are kept in pages as vLLM's PagedAttention does (Kwon et al. 2023, arXiv:2309.06180); rows share pages after
    `reorder` until one of them writes. Codes are those of `quantize(x, "token")`, made once: values are packed as the
    kernels read them, and nothing is repacked later. int8 keeps a token of a head in D + Dv + 12 bytes.

    A cache may be read by several threads, but not while one of them changes it.

    Examples
    --------
    >>> import numpy as np, cyflash
    >>> rng = np.random.default_rng(0)
    >>> cache = cyflash.KVCache(2, 4, 64, capacity=128)
    >>> k, v = (rng.standard_normal((2, 4, 10, 64), dtype=np.float32) for _ in range(2))
    >>> cache.append(k, v, lengths=[10, 7])  # of a padded batch
    >>> cache.append(k[:1, :, :3], v[:1, :, :3], rows=[1])
    >>> cache.lengths
    array([10, 10])
    >>> cache.truncate([8, 10])
    >>> q = rng.standard_normal((2, 8, 1, 64), dtype=np.float32)
    >>> cyflash.flash_attention_with_kvcache(q, cache).shape
    (2, 8, 1, 64)
    """

    def __init__(
        self, batch, kv_heads, head_dim, capacity, dtype="float32", *, v_head_dim=None, granularity="token",
        k_scale=None, v_scale=None, k_mean=None, quant=None, fp32_sinks=0, window=None, grow=False,
    ):
        batch, capacity = checked_count("batch", batch), checked_count("capacity", capacity)
        grow = checked_flag("grow", grow)
        kept = format_of(
            kv_heads, head_dim, v_head_dim, dtype, granularity, k_scale, v_scale, k_mean, quant, fp32_sinks
        )
        left = _left(window, capacity)
        page_size = _page_size(capacity, left)
        pages = batch * _pages_of_row(capacity, page_size, left)
        self._begin(kept, batch, pages, page_size, capacity, left, grow)

    def _begin(self, kept, rows, pages, page_size, capacity, left, grows=False):
        self._format, self._capacity, self._left, self._grows = kept, capacity, left, grows
        self._rows = Rows(Pool(pages, kept.page_shapes(page_size)), rows, page_size)
        self._by_row = {name: np.zeros((rows, *shape), dtype) for name, (shape, dtype) in kept.row_shapes().items()}
        self._live = np.ones(rows, bool)
        self._rows_changed()

    def _rows_changed(self):
        """Of which rows there are."""
        self._all = np.flatnonzero(self._live)
        self._room = None  # tokens that each row can surely take in the pages it has; None: not known

    # What it is

    @property
    def lengths(self):
        lengths = self._rows.lengths.astype(np.int64)
        lengths.flags.writeable = False
        return lengths

    @property
    def batch(self):
        return len(self._all)

    @property
    def kv_heads(self):
        return self._format.kv_heads

    @property
    def head_dim(self):
        return self._format.D

    @property
    def v_head_dim(self):
        return self._format.Dv

    @property
    def capacity(self):
        return self._capacity

    @property
    def dtype(self):
        return self._format.dtype

    @property
    def window(self):
        return None if self._left is None else (self._left, 0)

    @property
    def page_size(self):
        return self._rows.page_size

    @property
    def nbytes(self):
        constants = self._format.constants()
        held = [self._rows.pool, self._rows, self._live, *self._by_row.values(), *constants.values()]
        return sum(x.nbytes for x in held)

    def __repr__(self):
        window = "" if self._left is None else f", window={self.window}"
        return (
            f"{type(self).__name__}({self._size()}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"dtype={self.dtype.name!r}{window}, lengths={self._rows.lengths[self._all].tolist()}, "
            f"nbytes={self.nbytes})"
        )

    def _size(self):
        return f"batch={self.batch}, capacity={self._capacity}"

    # What changes it

    @same_kind
    def append(self, k, v, *, rows=None, lengths=None):
        """Add tokens at the end of rows.

        Parameters
        ----------
        k : ndarray of float32, float16 or bfloat16, shape (n, Hk, L, D)
            Any strides. Converted to the cache's dtype, rounded half to even.
        v : ndarray of float32, float16 or bfloat16, shape (n, Hk, L, Dv)
        rows : array-like of int, shape (n,), optional
            Different rows. Default: all, in order.
        lengths : array-like of int, shape (n,), optional
            How many of the L tokens each row gets, the first ones; what is behind them is not looked at. Default: L.

        Raises
        ------
        TypeError
            For a dtype; codes and QuantizedTensors are not taken.
        ValueError
            For shapes, rows and lengths; where a row's capacity would be exceeded (see `window` and `grow`) or pages
            run out; for NaN or inf in an int8 cache. The cache is as it was then.
        MemoryError
            Where it grows and cannot, or what is to be appended cannot be made ready. The cache is as it was then.
        """
        self._write(self._ready(k, v, rows, lengths))

    def truncate(self, lengths, *, rows=None):
        """Forget the last tokens of rows, such as a draft's that were not accepted.

        Appending then gives the same bits as if they had never been there.

        Parameters
        ----------
        lengths : int or array-like of int, shape (n,)
            Tokens that remain, at most as many as there are.
        rows : array-like of int, shape (n,), optional
            Default: all.

        Raises
        ------
        TypeError
            For what are no integers.
        ValueError
            For other lengths and rows, and where a query after what remains would see tokens that the window gave up.
        """
        rows = self._checked_rows(rows)
        now, first = self._rows.lengths[rows], self._rows.first[rows]
        lengths = _integers("lengths", lengths if np.ndim(lengths) else [lengths] * len(rows), len(rows))
        for row, new, old, kept in zip(rows, lengths, now, first, strict=True):
            if not 0 <= new <= old:
                raise ValueError(f"lengths: expected 0 to {old} tokens for row {row}, as it has now, got {new}")
            if max(0, new - (self._left or 0)) < kept:
                raise ValueError(
                    f"lengths: expected at least {kept + self._left} for row {row}, whose tokens before {kept} the "
                    f"window {self.window} gave up, got {new}"
                )
        self._rows.truncate(rows, lengths)
        self._room = None

    def reset(self, *, rows=None):
        """Forget all tokens of rows (default: of all).

        Parameters
        ----------
        rows : array-like of int, optional

        Raises
        ------
        TypeError, ValueError
            For what are no rows of this cache.
        """
        self._rows.clear(self._checked_rows(rows))
        self._room = None

    def reorder(self, rows):
        """Make row i what row rows[i] was, for all rows at once: beams that go on, some twice and some not at all.

        Nothing is copied but what float32 tokens `fp32_sinks` keeps: rows share pages until one of them writes.

        Parameters
        ----------
        rows : array-like of int, shape (batch,)

        Raises
        ------
        TypeError
            For what are no integers.
        ValueError
            For what is no row, and for another number of them.
        """
        sources = self._checked_rows(_integers("rows", rows), different=False)
        if len(sources) != len(self._all):
            raise ValueError(f"rows: expected {len(self._all)} rows, one for each of this cache, got {len(sources)}")
        self._become(self._all, sources)

    def _become(self, rows, sources):
        self._rows.become(rows, sources)
        for x in self._by_row.values():
            x[rows] = x[sources]
        self._room = None

    def _with_rows(self, rows):
        """A cache of its own with the tokens of these rows of a `KVCache`, none, one or several times each."""
        other, own = object.__new__(type(self)), self._rows
        pages = len(rows) * _pages_of_row(self._capacity, self.page_size, self._left)
        other._begin(self._format, len(rows), pages, self.page_size, self._capacity, self._left, self._grows)
        new = other._rows
        new.table = own.table[rows]
        held = new.table >= 0
        sources, new.table[held] = new.table[held], new.pool.take(np.count_nonzero(held))
        for name, x in new.pool.arrays.items():
            x[new.table[held]] = own.pool.arrays[name][sources]
        new.lengths, new.first = own.lengths[rows], own.first[rows]
        for name, x in other._by_row.items():
            x[...] = self._by_row[name][rows]
        return other

    # Appending: _ready() checks and prepares, and changes nothing; _write() changes, and does not fail

    def _ready(self, k, v, rows, lengths, num_threads=None):
        whole = rows is None and len(self._all) == len(self._rows)
        rows = self._all if rows is None else self._checked_rows(rows)
        L = self._check_floats(k, v, len(rows))
        if lengths is None:
            counts, most = np.full(len(rows), L), L
        else:
            counts = _checked_counts(lengths, len(rows), "k", k)
            most = int(counts.max(initial=0))
        begins = self._rows.lengths if whole else self._rows.lengths[rows]
        first = self._rows.first if whole else self._rows.first[rows]
        if self._left is not None:
            first = np.where(counts > 0, np.maximum(first, begins - self._left), first)
        if self._room is None:
            self._room = self._find_room()
        fits = most <= self._room
        if not fits and not self._grows:
            self._check_capacity(rows, begins - first, counts)
        ready = self._format.ready(k, v, begins, counts, lengths is not None, num_threads)
        return _Tokens(rows, whole, begins, begins + counts, counts, first, most, fits, ready, num_threads)

    def _write(self, tokens):
        rows = self._rows
        if tokens.fits:
            table = rows.table if tokens.whole else rows.table[tokens.rows]
        else:
            if self._grows:
                self._grow_for(int((tokens.ends - tokens.first).max(initial=0)))
            table = rows.reserve(tokens.rows, tokens.ends, tokens.first)
        self._room = self._room - tokens.most if tokens.fits else None
        try:
            self._format.write(
                tokens.ready, rows.pool.arrays, self._by_row, tokens.rows, table, tokens.begins, tokens.counts,
                tokens.num_threads,
            )
            if tokens.fits and self._left is not None:
                rows.first[tokens.rows] = tokens.first
            rows.lengths[tokens.rows] = tokens.ends
        except BaseException:  # Ctrl-C as well
            self._room = None
            if not tokens.fits:
                rows.give_back(tokens.rows, rows.lengths[tokens.rows], tokens.ends)
            raise

    def _check_floats(self, k, v, n):
        """L, after checking what is to be appended to n rows."""
        kept = self._format
        for name, x, D in (("k", k, kept.D), ("v", v, kept.Dv)):
            if isinstance(x, QuantizedTensor) or getattr(x, "dtype", None) == arrays.INT8:
                raise TypeError(f"{name}: expected floats, of which a cache makes its own codes, got codes")
            arrays.require_float(name, x, (4,))
            L = k.shape[2]
            if x.shape != (n, kept.kv_heads, L, D):
                hint = ""
                if x.shape[:1] + x.shape[2:] == (n, kept.kv_heads, D):
                    hint = f"; if your arrays are (n, L, Hk, D), pass {name}.transpose(0, 2, 1, 3) (no copy is made)"
                raise ValueError(
                    f"{name}: expected (n, Hk, L, {'D' if name == 'k' else 'Dv'}) = ({n}, {kept.kv_heads}, "
                    f"{'L' if name == 'k' else L}, {D}) for {n} rows of this cache, got {x.shape}{hint}"
                )
        return L

    def _checked_rows(self, rows, name="rows", different=True):
        if rows is None:
            return self._all
        rows = _integers(name, rows)
        for row in rows:
            if not 0 <= row < len(self._rows) or not self._live[row]:
                raise ValueError(f"{name}: expected rows of this cache ({_shown(self._all)}), got {row}")
        if different and len(np.unique(rows)) != len(rows):
            raise ValueError(f"rows: expected each row at most once, got {rows.tolist()}")
        return rows

    def _check_capacity(self, rows, kept, counts):
        over = kept + counts > self._capacity
        if over.any():
            i = int(np.argmax(over))
            held = f"{kept[i]} tokens" if self._left is None else f"{kept[i]} tokens that its window still needs"
            raise ValueError(
                f"k: expected at most {self._capacity - kept[i]} tokens for row {rows[i]}, which holds {held} of the "
                f"capacity {self._capacity}, got {counts[i]}; truncate or reset the row, or make the cache larger or "
                f"with grow=True"
            )

    def _find_room(self):
        """Tokens that every row can take without a page more, and without giving one up."""
        room = self._rows.room(self._all)
        lengths, first = self._rows.lengths[self._all], self._rows.first[self._all]
        limits = self._capacity - (lengths - first)
        if self._left is not None:
            kept = (first // self.page_size + 1) * self.page_size  # as long as `first` is before this
            limits = np.minimum(limits, kept - 1 + self._left - lengths)
        return min(int(room), max(int(limits.min(initial=room)), 0))

    def _grow_for(self, tokens):
        """Have room for `tokens` in each row. May raise MemoryError before anything changes."""
        if tokens > self._capacity:
            capacity = max(2 * self._capacity, tokens)
            pages = len(self._rows) * _pages_of_row(capacity, self.page_size, self._left)
            self._rows.pool.grow(max(pages, self._rows.pool.pages))
            self._capacity = capacity

    # What attention reads

    def _stored(self, rows=None):
        """(Stored, table, lengths) of rows, a numpy array of their numbers, or of all: see stored.py."""
        own = self._rows
        by_row, table, lengths = self._by_row, own.table, own.lengths
        if rows is None and len(self._all) < len(own):
            rows = self._all
        if rows is not None:
            by_row = {name: x[rows] for name, x in by_row.items()}
            table, lengths = table[rows], lengths[rows]
        return self._format.stored(own.pool.arrays, by_row, own.page_size), table, lengths

    # Files

    def save(self, path):
        """Write the cache to a `.safetensors` file, which appears only when it is complete.

        It holds the pages that are in use, as they are: rows that share them do so after `load` as well. It does not
        depend on the machine or the SIMD build.

        Parameters
        ----------
        path : str or path

        Returns
        -------
        Path
            The file written.

        Raises
        ------
        ValueError
            For another suffix.
        OSError
            Where it cannot be written.
        """
        return cachefile.write(self, path)

    @classmethod
    def load(cls, path):
        """Read a file that `save` wrote.

        Parameters
        ----------
        path : str or path

        Returns
        -------
        KVCache
            Or PagedKVCache, of which `load` is called. With the tokens, capacity and options of the saved one.

        Raises
        ------
        FileNotFoundError
            No such file.
        ValueError
            For another suffix, and for a file that is damaged or holds something else.
        """
        return cachefile.read(cls, path)


class PagedKVCache(KVCache):
    """A `KVCache` whose pool of pages is in the open: rows come and go, and fork.

    Parameters
    ----------
    pages : int
        Of the pool. All rows share it.
    page_size : int
        Tokens of a page: a multiple of 16. Small pages waste less at the end of each row, and large ones are read
        faster: with pages of 64 calls take a seventh longer than with long ones, with 16 a half.
    kv_heads, head_dim, dtype, v_head_dim, granularity, k_scale, v_scale, k_mean, quant, fp32_sinks, window
        As in `KVCache`.

    Attributes
    ----------
    block_table : ndarray of int64, shape (row numbers, most pages of a row), read-only
        The pages of each row, -1 where it has none. A copy.
    pages, free_pages : int
        Of the pool.
    rows : ndarray of int64
        The rows there are, in ascending order: what methods take for "all". `lengths` is by row number, and 0 for
        numbers that are no row.

    Notes
    -----
    Everything of `KVCache` is here as well. An append that needs more pages than are free raises ValueError and changes
    nothing. The capacity of each row is that of the pool.

    Examples
    --------
    >>> import numpy as np, cyflash
    >>> cache = cyflash.PagedKVCache(8, 16, kv_heads=2, head_dim=64)
    >>> prompt = np.ones((1, 2, 40, 64), np.float32)
    >>> a = cache.add()
    >>> cache.append(prompt, prompt, rows=[a])
    >>> b = cache.fork(a)  # the same tokens, in the same pages
    >>> cache.append(prompt[:, :, :1], prompt[:, :, :1], rows=[b])  # b gets a last page of its own
    >>> cache.block_table
    array([[0, 1, 2],
           [0, 1, 3]])
    >>> cache.free(a)
    >>> cache.free_pages
    5
    """

    def __init__(
        self, pages, page_size, kv_heads, head_dim, dtype="float32", *, v_head_dim=None, granularity="token",
        k_scale=None, v_scale=None, k_mean=None, quant=None, fp32_sinks=0, window=None,
    ):
        pages, page_size = checked_count("pages", pages), checked_count("page_size", page_size)
        if page_size % KEYS_UNIT:
            raise ValueError(f"page_size: expected a multiple of {KEYS_UNIT}, got {page_size}")
        kept = format_of(
            kv_heads, head_dim, v_head_dim, dtype, granularity, k_scale, v_scale, k_mean, quant, fp32_sinks
        )
        self._begin(kept, 0, pages, page_size, pages * page_size, _left(window, pages * page_size))

    @property
    def rows(self):
        return self._all.copy()

    @property
    def pages(self):
        return self._rows.pool.pages

    @property
    def free_pages(self):
        return self._rows.pool.free

    @property
    def block_table(self):
        table = self._rows.table[:, : self._rows.width].astype(np.int64)
        table.flags.writeable = False
        return table

    def add(self):
        """A row more, without tokens.

        Returns
        -------
        int
            Its number, the lowest that is no row.
        """
        unused = np.flatnonzero(~self._live)
        row = int(unused[0]) if len(unused) else len(self._live)
        if not len(unused):
            self._rows.extend()
            self._live = np.append(self._live, True)
            for name, x in self._by_row.items():
                self._by_row[name] = np.concatenate([x, np.zeros_like(x, shape=(1, *x.shape[1:]))])
        self._live[row] = True
        self._rows_changed()
        return row

    def fork(self, row):
        """A row more, with the tokens that `row` has now, in the same pages until one of the two writes.

        Parameters
        ----------
        row : int

        Returns
        -------
        int
            The new row's number.

        Raises
        ------
        TypeError, ValueError
            For what is no row.
        """
        sources = self._checked_rows([row], "row")
        new = self.add()
        self._become(np.array([new]), sources)
        return new

    def free(self, row):
        """Give a row and its pages back; pages that others share stay with them.

        Parameters
        ----------
        row : int
            Its number may be that of another row later.

        Raises
        ------
        TypeError, ValueError
            For what is no row.
        """
        rows = self._checked_rows([row], "row")
        self._rows.clear(rows)
        self._live[rows] = False
        self._rows_changed()

    def _size(self):
        return f"pages={self.pages}, page_size={self.page_size}, free_pages={self.free_pages}"

    def _check_capacity(self, rows, kept, counts):
        """What there is room for depends on all rows: the pool says."""


# Attention


@same_kind
def flash_attention_with_kvcache(
    q, cache, k=None, v=None, *, rows=None, lengths=None, pv=None, causal=None, causal_align="bottom-right", scale=None,
    window=None, softcap=0.0, bias=None, mask=None, alibi_slopes=None, sinks=None, return_lse=False, out=None,
    config=None, num_threads=None,
):
    """Attention of queries to the tokens of a cache, to which new keys and values are appended first.

    Prefill, chunked prefill and decode give the rows of one call of `flash_attention` on the whole sequence: query i of
    row b stands at position length - queries + i, where `length` counts the tokens that were appended.

    Parameters
    ----------
    q : ndarray of float32, float16 or bfloat16, shape (n, H, Lq, D)
        Queries of n rows of the cache; its kv heads divide H.
    cache : KVCache or PagedKVCache
    k : ndarray of float32, float16 or bfloat16, shape (n, Hk, L, D), optional
        Keys to append, as `cache.append` does. Default: nothing is appended.
    v : ndarray of float32, float16 or bfloat16, shape (n, Hk, L, Dv), optional
        Values to append, with k.
    rows : array-like of int, shape (n,), optional
        Different rows of the cache. Default: all, in order.
    lengths : array-like of int, shape (n,), optional
        With k: how many of the L tokens each row gets; where Lq is L, as many of its queries count. Without k: how many
        of the Lq queries of each row count. They are the first ones; the output of the others is 0, their LSE -inf.
        Default: all.
    pv : {"int8", "bf16", "fp32"}, optional
        Of an int8 cache: arithmetic of the second product. Default: that of its `quant`, else "int8".
    causal : bool, optional
        Default: config's, else True.
    window : (int, int), optional
        As in `flash_attention`, and not beyond the cache's. Default: the cache's.
    bias, mask : ndarray, optional
        As in `flash_attention`, broadcast to (n, H, Lq, greatest length of these rows); columns beyond a row's length
        have no effect.
    causal_align, scale, softcap, alibi_slopes, sinks, return_lse, out, config, num_threads
        As in `flash_attention`.

    Returns
    -------
    out : ndarray of q's dtype, shape (n, H, Lq, Dv)
    lse : ndarray of float32, shape (n, H, Lq)
        Natural logarithm. Only with return_lse.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, MemoryError
        As `flash_attention` and `cache.append`; where queries would see tokens that the cache's window gave up. When
        arguments are wrong nothing is appended. After a MemoryError `cache.lengths` says whether k and v were: all of
        them or nothing.

    Notes
    -----
    With few query rows the keys are cut into chunks of a fixed length, whose results are merged by their log-sum-exp:
    bits depend neither on threads nor on the other rows, nor on where pages lie.

    Examples
    --------
    >>> import numpy as np, cyflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1, 4, 20, 64), dtype=np.float32) for _ in range(3))
    >>> cache = cyflash.KVCache(1, 4, 64, capacity=32)
    >>> steps = [slice(0, 16), *(slice(i, i + 1) for i in range(16, 20))]  # a prompt, then one token after the other
    >>> outs = [cyflash.flash_attention_with_kvcache(q[:, :, i], cache, k[:, :, i], v[:, :, i]) for i in steps]
    >>> whole = cyflash.flash_attention(q, k, v, causal=True)
    >>> np.allclose(np.concatenate(outs, axis=2), whole, atol=1e-6)
    True
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a KVCache or PagedKVCache, got {type(cache).__name__}")
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither, got one of them")
    for name, x in (("k", k), ("v", v)):
        if isinstance(out, np.ndarray) and isinstance(x, np.ndarray) and arrays.overlap(out, x):
            raise ValueError(f"out: expected memory of its own, got an array that overlaps {name}; pass {name}.copy()")
    options = {
        "causal": getattr(config, "causal", True) if causal is None else causal, "causal_align": causal_align,
        "scale": scale, "window": cache.window if window is None else window, "softcap": softcap, "bias": bias,
        "mask": mask, "alibi_slopes": alibi_slopes, "sinks": sinks, "return_lse": return_lse, "out": out,
        "config": config, "num_threads": num_threads, "pv": cache._format.pv if pv is None else pv,
        "q_scale": cache._format.q_scale,
    }  # fmt: skip
    rows = None if rows is None else cache._checked_rows(rows)
    _check_queries(q, cache, cache.batch if rows is None else len(rows))
    if k is None:
        tokens, first = None, cache._rows.first[cache._all if rows is None else rows]
        stored, table, ends = cache._stored(rows)
        queries = None if lengths is None else _checked_counts(lengths, len(q), "q", q)
    else:
        tokens = cache._ready(k, v, rows, lengths, num_threads)
        first, ends = tokens.first, tokens.ends
        stored, table, _ = cache._stored(rows)
        queries = tokens.counts if lengths is not None and q.shape[2] == k.shape[2] else None
    if cache.window is not None:
        _check_window(cache.window, options, q.shape[2] if queries is None else queries, ends, first)
    if queries is not None and cache.dtype == arrays.INT8:
        q = _zero_beyond(queries, q)

    def append():
        cache._write(tokens)
        return cache._stored(rows)[:2]

    out, lse = attention.attend_stored(
        q, stored, table, ends, queries, append=None if tokens is None else append, **options
    )
    return (out, lse) if return_lse else out


def _check_queries(q, cache, n):
    arrays.require_float("q", q, (4,))
    H, D = q.shape[1], q.shape[3]
    if len(q) != n or cache.head_dim != D or H % cache.kv_heads or not H:
        raise ValueError(
            f"q: expected (n, H, Lq, D) = ({n}, H, Lq, {cache.head_dim}) with H a multiple of {cache.kv_heads}, for "
            f"{n} rows of this cache, got {q.shape}"
        )


def _check_window(window, options, queries, ends, first):
    """Raise where queries see tokens that the cache gave up."""
    left, _ = checked_window(options["window"])
    if left > window[0]:
        raise ValueError(f"window: expected one within the cache's {window}, got {options['window']}")
    start = ends - queries if options["causal_align"] == "bottom-right" else np.zeros_like(ends)
    missing = (np.maximum(start - left, 0) < first) & (queries > 0)
    if missing.any():
        i = int(np.argmax(missing))
        raise ValueError(
            f"q: expected queries of row {i} that see no token before {first[i]}, since the cache's window {window} "
            f"gave those up, got one at position {start[i]}"
        )


def _zero_beyond(queries, q):
    """q with 0 in the rows that do not count: they are not to be looked at, not even for NaN."""
    q = q.copy()
    q.swapaxes(1, 2)[np.arange(q.shape[2]) >= queries[:, None]] = 0
    return q


# Checks of arguments


def _left(window, capacity):
    """How many tokens before its own a query sees; None for all."""
    if window is None:
        return None
    left, right = checked_window(window)
    if left >= UNBOUNDED or right:
        raise ValueError(f"window: expected (left, 0) with left of at least 0, got {window!r}")
    if capacity < left + 1:
        raise ValueError(f"capacity: expected at least {left + 1} with window {window!r}, got {capacity}")
    return left


def _page_size(capacity, left):
    """Of a row in a window, a page more than its tokens need is held: an eighth of them at most."""
    tokens = capacity if left is None else -(-capacity // 8)
    return min(PAGE_SIZE, -(-tokens // KEYS_UNIT) * KEYS_UNIT)


def _pages_of_row(capacity, page_size, left):
    """Pages that `capacity` tokens are in at most: in a window they may begin anywhere in a page."""
    return -(-capacity // page_size) if left is None else (capacity + page_size - 2) // page_size + 1


def _integers(name, x, n=None):
    """x as an array of n integers."""
    arrays.require_host(name, x)
    array = np.asarray(x) if np.size(x) else np.zeros(np.shape(x), np.intp)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {x!r}")
    if array.ndim != 1 or (n is not None and len(array) != n):
        raise ValueError(f"{name}: expected shape ({'n' if n is None else n},), got {array.shape}")
    return array.astype(np.intp)


def _checked_counts(lengths, n, name, x):
    """How many of the L tokens of x count, in each of n rows."""
    counts, L = _integers("lengths", lengths, n), x.shape[2]
    if counts.size and not 0 <= counts.min() <= counts.max() <= L:
        raise ValueError(f"lengths: expected 0 to {L}, the tokens of {name} {x.shape}, got {counts.tolist()}")
    return counts


def _shown(rows):
    if not len(rows):
        return "there are none"
    whole = len(rows) == rows[-1] - rows[0] + 1
    return f"{rows[0]} to {rows[-1]}" if whole else ", ".join(map(str, rows))
