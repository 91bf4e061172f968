# Keys and values of quantised attention as they are kept, in pages, and the same for every build.
#
#     keys      int8 (pages, Hk, page_size, D rounded up to 4): rows of codes, and for each its correction, -128 times
#               the sum of its codes, which takes back the 128 that dot products want added to the codes of queries
#     values    int32 (pages, Hk, page_size / 4, Dv rounded up to 16): byte i of a word is the code of key 4 g + i
#
# What a row or a last group lacks is 0. Queries are packed by the tasks that use them.

cdef enum:
    PACK_KEYS = 64  # keys of a task: some microseconds of work


cdef void pack_key_rows(
    signed char* packed, Py_ssize_t width, int* correction, const signed char* k, Py_ssize_t stride, Py_ssize_t n,
    Py_ssize_t D
) noexcept nogil:
    """n keys, one after another."""
    cdef Py_ssize_t key
    for key in range(n):
        memcpy(packed + key * width, k + key * stride, D)
    end_key_rows(packed, width, correction, n, D)


cdef void end_key_rows(
    signed char* packed, Py_ssize_t width, int* correction, Py_ssize_t n, Py_ssize_t D
) noexcept nogil:
    """What goes with the codes of n keys, which are there. Sums are dot products with bytes that are 1."""
    cdef Py_ssize_t first = 0, words = width // 4, i, j
    cdef vi ones = vi_set(0x01010101)
    cdef vi sums[LANES]
    cdef int totals[LANES]
    cdef signed char* row
    cdef const int* x
    while first < n:
        for i in range(LANES):
            sums[i] = vi_set(0)
            if first + i >= n:
                continue
            row = packed + (first + i) * width
            x = <const int*> row
            if width > D:
                memset(row + D, 0, width - D)
            for j in range(words // LANES):
                sums[i] = vi_dot_bytes(sums[i], ones, vi_load(x + j * LANES))
            if words % LANES:
                sums[i] = vi_dot_bytes(
                    sums[i], ones, vi_load_part(x + words // LANES * LANES, words % LANES),
                )
        vf_store(<float*> totals, vf_bits(vi_sums(sums)))
        for i in range(min(<Py_ssize_t> LANES, n - first)):
            correction[first + i] = -128 * totals[i]
        first += LANES


cdef void pack_value_rows(
    signed char* packed, Py_ssize_t columns, Py_ssize_t first, const signed char* v, Py_ssize_t stride, Py_ssize_t n,
    Py_ssize_t Dv
) noexcept nogil:
    """n values from key `first` of a page on, of which packed is the first group. Whole groups go at once; in a group
    that is begun here, the keys that come later are 0."""
    cdef Py_ssize_t d, key = first, end = first + n
    cdef signed char* group
    while key < end:
        group = packed + key // 4 * 4 * columns
        if key % 4 == 0:
            memset(group + 4 * Dv, 0, 4 * (columns - Dv))
        if key % 4 == 0 and key + 4 <= end:
            for d in range(Dv):
                group[4 * d], group[4 * d + 1] = v[d], v[stride + d]
                group[4 * d + 2], group[4 * d + 3] = v[2 * stride + d], v[3 * stride + d]
            v += 4 * stride
            key += 4
        else:
            if key % 4 == 0:
                memset(group, 0, 4 * Dv)
            for d in range(Dv):
                group[4 * d + key % 4] = v[d]
            v += stride
            key += 1


def pack_keys(
    const signed char[:, :, :, :] codes not None, signed char[:, :, :, ::1] k not None,
    int[:, :, ::1] correction not None, const Py_ssize_t[:, ::1] table not None, const Py_ssize_t[::1] begin not None,
    const Py_ssize_t[::1] count not None, int threads
):
    """Writes count[i] keys of codes[i] (Hk, L, D) as keys begin[i], begin[i] + 1, ... of the sequence whose pages are
    table[i]. The last axis of codes is contiguous."""
    cdef Py_ssize_t Hk = codes.shape[1], L = codes.shape[2], D = codes.shape[3], size = k.shape[2]
    cdef Py_ssize_t t, i, h, key, end, place, n, chunks = (L + PACK_KEYS - 1) // PACK_KEYS
    for t in prange(codes.shape[0] * Hk * chunks, nogil=True, num_threads=threads, schedule="static"):
        i, h, key = t // chunks // Hk, t // chunks % Hk, t % chunks * PACK_KEYS
        end = min(key + PACK_KEYS, count[i])
        while key < end:
            place = begin[i] + key
            n = min(end - key, size - place % size)
            pack_key_rows(
                &k[table[i, place // size], h, place % size, 0], k.shape[3],
                &correction[table[i, place // size], h, place % size], &codes[i, h, key, 0], codes.strides[2], n, D,
            )
            key = key + n


def pack_values(
    const signed char[:, :, :, :] codes not None, int[:, :, :, ::1] v not None, const Py_ssize_t[:, ::1] table not None,
    const Py_ssize_t[::1] begin not None, const Py_ssize_t[::1] count not None, int threads
):
    """pack_keys() for values."""
    cdef Py_ssize_t Hk = codes.shape[1], L = codes.shape[2], Dv = codes.shape[3], size = v.shape[2] * 4
    cdef Py_ssize_t t, i, h, key, end, place, n, chunks = (L + PACK_KEYS - 1) // PACK_KEYS
    for t in prange(codes.shape[0] * Hk * chunks, nogil=True, num_threads=threads, schedule="static"):
        i, h, key = t // chunks // Hk, t // chunks % Hk, t % chunks * PACK_KEYS
        # chunks of groups, so that no two threads write one
        end = min(count[i], key + PACK_KEYS - begin[i] % 4)
        key = max(<Py_ssize_t> 0, key - begin[i] % 4)
        if t % chunks == chunks - 1:
            end = count[i]
        while key < end:
            place = begin[i] + key
            n = min(end - key, size - place % size)
            pack_value_rows(
                <signed char*> &v[table[i, place // size], h, 0, 0], v.shape[3], place % size, &codes[i, h, key, 0],
                codes.strides[2], n, Dv,
            )
            key = key + n
