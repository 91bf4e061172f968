# Floats of new tokens into the pages of a cache, in the precision of the pages: one reading and one writing pass.

from libc.string cimport memcpy

cdef enum:
    STORE_TOKENS = 256  # of one head: a task, some microseconds of work


cdef inline void store_row(
    char* to, Kind to_kind, const char* x, Kind x_kind, Py_ssize_t D
) noexcept nogil:
    """D floats, rounded half to even where they become shorter, to infinity beyond the largest; NaN stays NaN."""
    cdef Py_ssize_t d = 0
    while d + LANES <= D:
        store_part(to, to_kind, d, LANES, load_part(x, x_kind, d, LANES))
        d += LANES
    if d < D:
        store_part(to, to_kind, d, D - d, load_part(x, x_kind, d, D - d))


cdef inline void store_tokens(
    const unsigned char[:, :, :, :] x, Kind x_kind, unsigned char[:, :, :, :] pool, Kind pool_kind,
    const Py_ssize_t[:, :] table, Py_ssize_t begin, Py_ssize_t row, Py_ssize_t h, Py_ssize_t first, Py_ssize_t last
) noexcept nogil:
    """Tokens first <= j < last of x[row, h] to the places from begin + first on."""
    cdef Py_ssize_t page_size = pool.shape[2], bytes = x.shape[3], j, place
    cdef Py_ssize_t D = bytes // size_of(x_kind)
    cdef char* to
    cdef const char* source
    for j in range(first, last):
        place = begin + j
        to = <char*> &pool[table[row, place // page_size], h, place % page_size, 0]
        source = <const char*> &x[row, h, j, 0]
        if x_kind == pool_kind:
            memcpy(to, source, bytes)
        else:
            store_row(to, pool_kind, source, x_kind, D)


def store_floats(
    const unsigned char[:, :, :, :] x not None, str x_kind not None, unsigned char[:, :, :, :] pool not None,
    str pool_kind not None, const Py_ssize_t[:, :] table not None, const Py_ssize_t[:] begin not None,
    const Py_ssize_t[:] count not None, int threads,
):
    """Writes tokens j < count[r] of x[r], (n, Hk, L, D), as keys begin[r] + j of row r of the table.

    Kinds are "fp32", "fp16" or "bf16". x and pool, (pages, Hk, page_size, D), are seen as bytes: their last axes, the
    only ones that have to be contiguous, are longer by the size of a number. Key i of row r is row i % page_size of
    page table[r, i // page_size]. No two of the places written may be one.
    """
    kinds = {"fp32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16}
    cdef Kind from_kind = kinds[x_kind], to_kind = kinds[pool_kind]
    cdef Py_ssize_t heads = x.shape[1], pieces = (x.shape[2] + STORE_TOKENS - 1) // STORE_TOKENS
    cdef Py_ssize_t tasks = x.shape[0] * heads * pieces, t, row, first
    if tasks == 0 or x.shape[3] == 0:
        return
    threads = <int> min(<Py_ssize_t> threads, tasks)
    for t in prange(tasks, nogil=True, schedule="static", num_threads=threads):
        row, first = t // (heads * pieces), t % pieces * STORE_TOKENS
        store_tokens(
            x, from_kind, pool, to_kind, table, begin[row], row, t // pieces % heads, first,
            min(count[row], first + STORE_TOKENS),
        )
