"""What calibration sees of an array in one pass: how many values of each size there are, and the sum of each channel.

    count_values()    a histogram of |x| per head, its bins fixed by the bits of float32
    sum_channels()    the sum of each channel per head, in fixed point
    fingerprints()    64 bits per head that tell its data from other data

Everything counted is an integer, so results do not depend on order, threads or how data was cut into calls.

A bin is an octave's 16th part: the exponent and the top 4 bits of the mantissa. Of the rest of the mantissa, 19 bits,
each bin keeps the exact sum. During the pass count and sum of a bin share 64 bits, so that a value costs one addition
to one word: the sum has the low 40, the count the upper 24, and 2^21 values of 19 bits fit both.
"""
from cython.parallel cimport prange
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cdef enum:
    LOW_BITS = 19                        # of the mantissa, below the bins
    ENTRIES = 1 << (31 - LOW_BITS)       # all bins that float32 has
    FIRST_BIN = (127 - 64) << 4          # the bin that begins at 2^-64 ...
    KEPT_BINS = 96 << 4                  # ... and 96 octaves from there: up to 2^32
    NONFINITE = 255 << 4                 # infinities and NaN begin here
    BELOW = 0                            # columns of `counts`: smaller values, zeros among them,
    ABOVE = KEPT_BINS + 1                # larger ones,
    INVALID = KEPT_BINS + 2              # and NaN and inf; the bins are between them
    COLUMNS = KEPT_BINS + 3
    RUN = 1 << 21                        # values until the 40 bits of a sum could be full

# Added to a double below 2^51, it leaves the rounded integer in the low bits of the mantissa.
cdef double ROUNDER = 3.0 * (<int64_t> 1 << 51)

LAYOUT = {"bins": KEPT_BINS, "bins_per_octave": 16, "first_exponent": -64}


cdef inline void count_row(
    const float* x, const float* mean, Py_ssize_t D, uint64_t* even, uint64_t* odd, uint32_t* top
) noexcept nogil:
    """One row into two tables, by turns: increments of one bin wait for each other, those of two tables do not."""
    cdef Py_ssize_t d = 0
    cdef uint32_t a, b, largest = top[0]
    cdef float first, second
    while d + 2 <= D:
        first = x[d] - mean[d] if mean != NULL else x[d]
        second = x[d + 1] - mean[d + 1] if mean != NULL else x[d + 1]
        a = (<uint32_t*> &first)[0] & 0x7fffffff
        b = (<uint32_t*> &second)[0] & 0x7fffffff
        even[a >> LOW_BITS] += (<uint64_t> 1 << 40) + (a & ((1 << LOW_BITS) - 1))
        odd[b >> LOW_BITS] += (<uint64_t> 1 << 40) + (b & ((1 << LOW_BITS) - 1))
        largest = max(largest, a if a < 0x7f800000 else 0)
        largest = max(largest, b if b < 0x7f800000 else 0)
        d += 2
    if d < D:
        first = x[d] - mean[d] if mean != NULL else x[d]
        a = (<uint32_t*> &first)[0] & 0x7fffffff
        even[a >> LOW_BITS] += (<uint64_t> 1 << 40) + (a & ((1 << LOW_BITS) - 1))
        largest = max(largest, a if a < 0x7f800000 else 0)
    top[0] = largest


cdef inline void drain(uint64_t* table, int64_t* counts, int64_t* sums) noexcept nogil:
    """Add a table to counts (COLUMNS) and sums (KEPT_BINS), and empty it."""
    cdef Py_ssize_t i, kept
    for i in range(ENTRIES):
        if table[i] == 0:
            continue
        kept = i - FIRST_BIN
        if i >= NONFINITE:
            counts[INVALID] += table[i] >> 40
        elif kept < 0:
            counts[BELOW] += table[i] >> 40
        elif kept >= KEPT_BINS:
            counts[ABOVE] += table[i] >> 40
        else:
            counts[1 + kept] += table[i] >> 40
            sums[kept] += table[i] & ((<uint64_t> 1 << 40) - 1)
        table[i] = 0


cdef bint count_head(
    const float* x, Py_ssize_t stride, Py_ssize_t L, Py_ssize_t D, const float* mean, const unsigned char* seen,
    int64_t* counts, int64_t* sums, float* top
) noexcept nogil:
    """count_values for one head; returns False where there is no memory."""
    cdef uint64_t* tables = <uint64_t*> calloc(2 * ENTRIES, sizeof(uint64_t))
    cdef Py_ssize_t i, d, n, waiting = 0
    cdef uint32_t largest = (<uint32_t*> top)[0]
    if tables == NULL:
        return False
    for i in range(L):
        if seen != NULL and not seen[i]:
            continue
        d = 0
        while d < D:
            n = min(D - d, <Py_ssize_t> RUN)
            if waiting + n > RUN:
                drain(tables, counts, sums)
                drain(tables + ENTRIES, counts, sums)
                waiting = 0
            count_row(
                x + i * stride + d, mean + d if mean != NULL else NULL, n, tables, tables + ENTRIES, &largest
            )
            waiting += n
            d += n
    drain(tables, counts, sums)
    drain(tables + ENTRIES, counts, sums)
    (<uint32_t*> top)[0] = largest
    free(tables)
    return True


def count_values(
    const float[:, :, :] x not None, const float[:, :] mean, const unsigned char[:, :] seen,
    int64_t[:, ::1] counts not None, int64_t[:, ::1] sums not None, float[::1] top not None, int threads,
):
    """Add the values |x - mean| of each head to its histogram.

    x: (H, L, D), the last axis contiguous. mean: (H, D), C order, or None for 0. seen: (H, L), C order, the rows that
    count; None for all. counts: (H, columns): smaller values, the bins, larger values, NaN and inf. sums: (H, bins), of
    the low bits of the mantissas. top: (H,), the greatest finite |x - mean| so far, not negative.
    """
    cdef Py_ssize_t H = x.shape[0], L = x.shape[1], D = x.shape[2], h, failed = 0
    cdef Py_ssize_t stride = x.strides[1] // <Py_ssize_t> sizeof(float)
    cdef bint centred = mean is not None, some = seen is not None
    if x.size == 0:
        return
    for h in prange(H, nogil=True, schedule="dynamic", chunksize=1, num_threads=threads):
        failed += not count_head(
            &x[h, 0, 0], stride, L, D, &mean[h, 0] if centred else NULL, &seen[h, 0] if some else NULL,
            &counts[h, 0], &sums[h, 0], &top[h],
        )
    if failed:
        raise MemoryError("no memory for the tables of a histogram, 128 KiB for each thread")


cdef void sum_head(
    const float* x, Py_ssize_t stride, Py_ssize_t L, Py_ssize_t D, const unsigned char* seen, double factor,
    int64_t* total
) noexcept nogil:
    cdef Py_ssize_t i, d
    cdef double rounded
    cdef int64_t origin = (<int64_t*> &ROUNDER)[0]
    for i in range(L):
        if seen != NULL and not seen[i]:
            continue
        for d in range(D):
            rounded = <double> x[i * stride + d] * factor + ROUNDER
            total[d] += (<int64_t*> &rounded)[0] - origin


def sum_channels(
    const float[:, :, :] x not None, const unsigned char[:, :] seen, double factor, int64_t[:, ::1] total not None,
    int threads,
):
    """Add the rows of each head to total (H, D), each value times `factor`, rounded to an integer.

    x: (H, L, D), the last axis contiguous, all values of rows that count at most 2^40 / factor; L at most 2^22. seen:
    as above.
    """
    cdef Py_ssize_t H = x.shape[0], L = x.shape[1], D = x.shape[2], h
    cdef Py_ssize_t stride = x.strides[1] // <Py_ssize_t> sizeof(float)
    cdef bint some = seen is not None
    if x.size == 0:
        return
    for h in prange(H, nogil=True, schedule="dynamic", chunksize=1, num_threads=threads):
        sum_head(&x[h, 0, 0], stride, L, D, &seen[h, 0] if some else NULL, factor, &total[h, 0])


cdef uint64_t print_head(
    const float* x, Py_ssize_t stride, Py_ssize_t L, Py_ssize_t D, const unsigned char* seen
) noexcept nogil:
    cdef uint64_t total = 0, row
    cdef uint32_t weight
    cdef const uint32_t* bits
    cdef Py_ssize_t i, d
    for i in range(L):
        if seen != NULL and not seen[i]:
            continue
        row = 0
        weight = <uint32_t> i * <uint32_t> 0x9E3779B1
        bits = <const uint32_t*> (x + i * stride)
        for d in range(D):
            row += <uint64_t> bits[d] * (weight + <uint32_t> d * <uint32_t> 0x85EBCA77 | 1)
        total = (total ^ row) * <uint64_t> 0xD6E8FEB86659FD93 + <uint64_t> i
    return total


def fingerprints(
    const float[:, :, :] x not None, const unsigned char[:, :] seen, uint64_t[::1] out not None, int threads,
):
    """Writes out[h]: 64 bits that the rows of head h which count, their bits and their places, decide.

    x: (H, L, D), the last axis contiguous. seen: as above. For telling data apart, not against malice.
    """
    cdef Py_ssize_t H = x.shape[0], L = x.shape[1], D = x.shape[2], h
    cdef Py_ssize_t stride = x.strides[1] // <Py_ssize_t> sizeof(float)
    cdef bint some = seen is not None
    if x.size == 0:
        return
    for h in prange(H, nogil=True, schedule="dynamic", chunksize=1, num_threads=threads):
        out[h] = print_head(&x[h, 0, 0], stride, L, D, &seen[h, 0] if some else NULL)
