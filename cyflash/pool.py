"""Pages of tokens that rows share, and the rows' tables of them. What a page holds is not known here.

    Pool    arrays whose first axis is the page; how many table entries refer to each page
    Rows    for each row: how many tokens it has, and in which pages they are

Always true:

- `references[p]` is how often page p stands in the table. A page with 0 references is free.
- Row r holds the tokens first[r] <= j < length[r], with token j in place j % page_size of page
  `table[r, j // page_size]`.
- `table[r, g]` is a page for first[r] // page_size <= g < ceil(length[r] / page_size), and -1 elsewhere.
- A page is written only by a row that alone refers to it.
"""
import math

import numpy as np

CACHE_LINE = 64  # bytes. A load of 64 that begins between two lines reads both


def aligned_zeros(shape, dtype):
    """numpy.zeros that begins with a cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + CACHE_LINE, np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    return memory[begin : begin + size].view(dtype).reshape(shape)


class PagesExhausted(ValueError):
    """More pages are needed than are free. Nothing was changed."""


class Pool:
    """Arrays with one entry for each page.

    arrays: {name: array (pages, ...)}. Pages that nobody wrote are 0.
    """

    def __init__(self, pages, shapes):
        """shapes: {name: (shape of one page, dtype)}."""
        self.arrays = {name: aligned_zeros((pages, *shape), dtype) for name, (shape, dtype) in shapes.items()}
        self.references = np.zeros(pages, np.int32)

    @property
    def pages(self):
        return len(self.references)

    @property
    def free(self):
        """How many pages are free."""
        return self.pages - int(np.count_nonzero(self.references))

    @property
    def nbytes(self):
        return self.references.nbytes + sum(x.nbytes for x in self.arrays.values())

    def take(self, n):
        """n free pages, lowest numbers first, each with one reference."""
        pages = np.flatnonzero(self.references == 0)[:n]
        if len(pages) < n:
            raise PagesExhausted(f"pages: expected {n} free pages, got {len(pages)} of {self.pages}")
        self.references[pages] = 1
        return pages

    def share(self, pages):
        """One more reference to each page; a page may be named more than once."""
        np.add.at(self.references, pages, 1)

    def drop(self, pages):
        """One reference less."""
        np.subtract.at(self.references, pages, 1)

    def copy(self, page, to):
        """Give page `to` the contents of `page`."""
        for x in self.arrays.values():
            x[to] = x[page]

    def grow(self, pages):
        """Have `pages` pages, the first of which are those of now. May raise MemoryError before anything changes."""
        grown = {name: aligned_zeros((pages, *x.shape[1:]), x.dtype) for name, x in self.arrays.items()}
        references = np.zeros(pages, np.int32)
        used = 1 + int(np.flatnonzero(self.references).max(initial=-1))  # what nobody wrote takes no memory, if left so
        for name, x in self.arrays.items():
            grown[name][:used] = x[:used]
        references[: self.pages] = self.references
        self.arrays, self.references = grown, references


class Rows:
    """Tokens of rows in the pages of a pool. All methods take arrays of different row numbers."""

    def __init__(self, pool, rows, page_size, width=1):
        """width: entries of a row's table, of which there will be more when a row needs more."""
        self.pool, self.page_size = pool, page_size
        self.table = np.full((rows, width), -1, np.intp)
        self.lengths = np.zeros(rows, np.intp)
        self.first = np.zeros(rows, np.intp)

    def __len__(self):
        return len(self.lengths)

    @property
    def nbytes(self):
        return self.table.nbytes + self.lengths.nbytes + self.first.nbytes

    @property
    def width(self):
        """Table entries of the longest row."""
        return int(self._pages(self.lengths).max(initial=0))

    def room(self, rows):
        """How many tokens each of `rows` can take without a page more: none where its last page is shared."""
        lengths = self.lengths[rows]
        last = self.table[rows, np.maximum(lengths - 1, 0) // self.page_size]
        return np.where(self.pool.references[last] == 1, -lengths % self.page_size, 0).min(initial=self.page_size)

    def reserve(self, rows, ends, first):
        """Give up tokens before `first` and have pages for those from the row's length to `ends`, not shared.

        The lengths stay: they change when the tokens are written, or `give_back` is called. Returns the rows of the
        table. Raises PagesExhausted and MemoryError before anything changes.
        """
        begins, pool = self.lengths[rows], self.pool
        given_up = _entries(rows, self.first[rows] // self.page_size, first // self.page_size)
        wanted = _entries(rows, self._pages(begins), self._pages(ends))
        written = (begins % self.page_size > 0) & (ends > begins)
        begun = rows[written], begins[written] // self.page_size

        references = pool.references.copy()  # as they will be: the pool's own change when nothing can fail any more
        np.subtract.at(references, self.table[given_up], 1)
        pages, holders = np.unique(self.table[begun], return_counts=True)
        copies = np.minimum(holders, references[pages] - 1).sum()  # the last of several holders keeps the page
        needed, free = len(wanted[0]) + int(copies), np.flatnonzero(references == 0)
        if needed > len(free):
            raise PagesExhausted(
                f"pages: expected {needed} free pages of {self.page_size} tokens, got {len(free)} of {pool.pages}; "
                "free or truncate rows, or make the cache with more pages"
            )
        taken, spare = free[: len(wanted[0])], iter(free[len(wanted[0]) : needed])
        references[free[:needed]] = 1
        copied = []
        for entry in zip(*begun, strict=True):
            page = self.table[entry]
            if references[page] > 1:
                references[page] -= 1
                copied.append((entry, page, next(spare)))
        self._widen(self._pages(ends).max(initial=0))
        table = np.empty((len(rows), self.table.shape[1]), self.table.dtype)

        self.table[given_up] = -1
        self.table[wanted] = taken
        self.first[rows] = first
        for entry, page, copy in copied:
            pool.copy(page, copy)
            self.table[entry] = copy
        pool.references = references
        return self.table.take(rows, axis=0, out=table, mode="clip")  # "raise" would need memory

    def give_back(self, rows, begins, ends):
        """Have no pages that hold tokens from `begins` to `ends` alone."""
        beyond = _entries(rows, self._pages(begins), self._pages(ends))
        self.pool.drop(self.table[beyond])
        self.table[beyond] = -1

    def truncate(self, rows, lengths):
        """Keep the tokens before `lengths`, which are at most the rows' own and none before `first`."""
        self.give_back(rows, lengths, self.lengths[rows])
        self.lengths[rows] = lengths

    def clear(self, rows):
        """Be empty, as at first."""
        held = self.table[rows]
        self.pool.drop(held[held >= 0])
        self.table[rows] = -1
        self.lengths[rows] = self.first[rows] = 0

    def become(self, rows, sources):
        """Hold what `sources` hold now, which may be among `rows` and more than once, in the same pages."""
        table, lengths, first = self.table[sources], self.lengths[sources], self.first[sources]
        self.pool.share(table[table >= 0])
        self.clear(rows)
        self.table[rows], self.lengths[rows], self.first[rows] = table, lengths, first

    def extend(self):
        """Have one row more, which is empty."""
        self.table = np.concatenate([self.table, np.full_like(self.table, -1, shape=(1, self.table.shape[1]))])
        self.lengths, self.first = np.append(self.lengths, 0), np.append(self.first, 0)

    def places(self):
        """bool (pages, page_size): which places of the pool's pages hold a token of some row."""
        held = np.zeros((self.pool.pages, self.page_size), bool)
        offset = np.arange(self.page_size)
        rows, columns = _entries(np.arange(len(self)), self.first // self.page_size, self._pages(self.lengths))
        tokens = columns[:, None] * self.page_size + offset
        inside = (tokens >= self.first[rows, None]) & (tokens < self.lengths[rows, None])
        np.logical_or.at(held, self.table[rows, columns], inside)
        return held

    def restore(self, table, used):
        """Take the table of a file, whose pages are the first `used` of the pool; lengths and first are set already.

        ValueError where it breaks one of the rules above.
        """
        if (self.first < 0).any() or (self.first > self.lengths).any():
            raise ValueError("first: expected 0 to the row's length")
        shape = len(self), self.width
        if table.shape != shape or table.dtype != np.int64:
            raise ValueError(f"table: expected int64 {shape}, got {table.dtype} {table.shape}")
        expected = np.full(shape, False)
        expected[_entries(np.arange(len(self)), self.first // self.page_size, self._pages(self.lengths))] = True
        pages = table[expected]
        if (table[~expected] != -1).any() or (pages < 0).any() or (pages >= used).any():
            raise ValueError(f"table: expected pages 0 to {used - 1} where rows have tokens, and -1 elsewhere")
        self._widen(shape[1])
        self.table[:, : shape[1]] = table
        self.pool.references[:] = np.bincount(pages, minlength=self.pool.pages)

    def _pages(self, lengths):
        """How many pages reach to `lengths` tokens."""
        return -(-lengths // self.page_size)

    def _widen(self, width):
        rows, now = self.table.shape
        if width > now:
            table = np.full((rows, max(width, 2 * now)), -1, np.intp)
            table[:, :now] = self.table
            self.table = table


def _entries(rows, begins, ends):
    """(rows, columns) of the table entries begin <= column < end of each row."""
    counts = np.maximum(ends - begins, 0)
    columns = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - begins, counts)
    return np.repeat(rows, counts), columns
