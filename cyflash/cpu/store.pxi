# Floats of new tokens into the pages of a cache, in the precision of the pages: one reading and one writing pass.

from libc.string cimport memcpy

cdef enum:
    STORE_TOKENS = 64  # of all heads: a task, some microseconds of work


cdef inline void store_row(char* to, Kind to_kind, const char* x, Kind x_kind, Py_ssize_t D) noexcept nogil:
    """D floats, rounded half to even where they become shorter, to infinity beyond the largest; NaN stays NaN."""
    cdef Py_ssize_t d = 0
    while d + LANES <= D:
        store_part(to, to_kind, d, LANES, load_part(x, x_kind, d, LANES))
        d += LANES
    if d < D:
        store_part(to, to_kind, d, D - d, load_part(x, x_kind, d, D - d))


cdef inline void store_rows(
    char* to, Py_ssize_t to_stride, Kind to_kind, const char* x, Py_ssize_t x_stride, Kind x_kind, Py_ssize_t n,
    Py_ssize_t bytes
) noexcept nogil:
    """n rows of `bytes` bytes of x."""
    cdef Py_ssize_t j
    if x_kind == to_kind and x_stride == bytes and to_stride == bytes:
        memcpy(to, x, n * bytes)
        return
    for j in range(n):
        if x_kind == to_kind:
            memcpy(to + j * to_stride, x + j * x_stride, bytes)
        else:
            store_row(to + j * to_stride, to_kind, x + j * x_stride, x_kind, bytes // size_of(x_kind))


def store_floats(
    const unsigned char[:, :, :, :] x not None, str x_kind not None, unsigned char[:, :, :, :] pool not None,
    str pool_kind not None, const Py_ssize_t[:, :] table not None, const Py_ssize_t[:] begin not None,
    const Py_ssize_t[:] count not None, int threads,
):
    """Writes tokens j < count[i] of x[i], (n, Hk, L, D), as keys begin[i] + j of the sequence whose pages are table[i].

    Kinds are "fp32", "fp16" or "bf16". x and pool, (pages, Hk, page_size, D), are seen as bytes: their last axes, the
    only ones that have to be contiguous, are longer by the size of a number. No two places that are written may be one.
    """
    cdef Kind from_kind = KINDS[x_kind], to_kind = KINDS[pool_kind]
    cdef Py_ssize_t heads = x.shape[1], bytes = x.shape[3], size = pool.shape[2]
    cdef uint64_t environment
    cdef Py_ssize_t chunks = (x.shape[2] + STORE_TOKENS - 1) // STORE_TOKENS, t, i, h, j, end, n, page, place
    if heads == 0 or bytes == 0:
        return
    threads = <int> max(<Py_ssize_t> 1, min(<Py_ssize_t> threads, x.shape[0] * chunks))
    for t in prange(x.shape[0] * chunks, nogil=True, schedule="static", num_threads=threads):
        i, j = t // chunks, t % chunks * STORE_TOKENS
        end = min(count[i], j + STORE_TOKENS)
        environment = enter_environment()
        while j < end:
            page, place = table[i, (begin[i] + j) // size], (begin[i] + j) % size
            n = min(end - j, size - place)
            for h in range(heads):
                store_rows(
                    <char*> &pool[page, h, place, 0], pool.strides[2], to_kind, <const char*> &x[i, h, j, 0],
                    x.strides[2], from_kind, n, bytes,
                )
            j = j + n
        leave_environment(environment)
