"""What calibration sees of an array in one pass: how many values of each size there are, and the sum of each channel.

    count_values()    a histogram of |x| per head, its bins fixed by the bits of float32
    sum_channels()    the sum of each channel per head, in fixed point
    fingerprints()    64 bits per head that tell its data from other data

Arrays are float32, float16 or bfloat16; the latter two are converted piece by piece, and give what the same values in
float32 do. Everything counted is an integer, so results do not depend on order, threads or how data was cut into calls.

A bin is an octave's 16th part: the exponent and the top 4 bits of the mantissa. Of the rest of the mantissa, 19 bits,
each bin keeps the exact sum. During the pass count and sum of a bin share 64 bits, so that a value costs one addition
to one word: the sum has the low 40, the count the upper 24, and 2^21 values of 19 bits fit both.
"""
from cython.parallel cimport prange
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

import numpy as np

include "vocabulary.pxi"
include "floats.pxi"

cdef extern from *:
    """
    #include <string.h>
    static inline uint32_t bits_of_float(float x) { uint32_t bits; memcpy(&bits, &x, sizeof bits); return bits; }
    static inline int64_t bits_of_double(double x) { int64_t bits; memcpy(&bits, &x, sizeof bits); return bits; }
    """
    uint32_t bits_of_float(float) noexcept nogil
    int64_t bits_of_double(double) noexcept nogil

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
    PIECE = 512                          # values that are converted together; even

# Added to a double below 2^51, it leaves the rounded integer in the low bits of the mantissa.
cdef double ROUNDER = 3.0 * (<int64_t> 1 << 51)

LAYOUT = {"bins": KEPT_BINS, "bins_per_octave": 16, "first_exponent": -64}


cdef Floats heads_of(x) except *:
    """Where an array (H, L, D) lies."""
    return floats_of(x[None])


cdef inline void convert(const char* p, Py_ssize_t n, float* room, const Kind kind) noexcept nogil:
    cdef Py_ssize_t i = 0
    while i + LANES <= n:
        vf_store(room + i, load_floats(beyond(p, i, kind), kind))
        i += LANES
    if i < n:
        vf_store_part(room + i, load_floats_part(beyond(p, i, kind), n - i, kind), n - i)


cdef inline const float* values(
    const Floats* x, Py_ssize_t h, Py_ssize_t row, Py_ssize_t d, Py_ssize_t n, float* room
) noexcept nogil:
    """n <= PIECE values of a row, from channel d on: where they are, or in `room`, converted."""
    cdef const char* p = beyond(at(x, 0, h, row), d, x.kind)
    if x.kind == FLOAT16:
        convert(p, n, room, FLOAT16)
    elif x.kind == BFLOAT16:
        convert(p, n, room, BFLOAT16)
    else:
        return <const float*> p
    return room


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
        a = bits_of_float(first) & 0x7fffffff
        b = bits_of_float(second) & 0x7fffffff
        even[a >> LOW_BITS] += (<uint64_t> 1 << 40) + (a & ((1 << LOW_BITS) - 1))
        odd[b >> LOW_BITS] += (<uint64_t> 1 << 40) + (b & ((1 << LOW_BITS) - 1))
        largest = max(largest, a if a < 0x7f800000 else 0)
        largest = max(largest, b if b < 0x7f800000 else 0)
        d += 2
    if d < D:
        first = x[d] - mean[d] if mean != NULL else x[d]
        a = bits_of_float(first) & 0x7fffffff
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
    const Floats* x, Py_ssize_t h, Py_ssize_t L, Py_ssize_t D, const float* mean, const unsigned char* seen,
    int64_t* counts, int64_t* sums, float* top
) noexcept nogil:
    """count_values for one head; returns False where there is no memory."""
    cdef uint64_t* tables = <uint64_t*> calloc(2 * ENTRIES, sizeof(uint64_t))
    cdef float room[PIECE]
    cdef Py_ssize_t i, d, n, waiting = 0
    cdef uint32_t largest = (<uint32_t*> top)[0]
    if tables == NULL:
        return False
    for i in range(L):
        if seen != NULL and not seen[i]:
            continue
        d = 0
        while d < D:
            n = min(D - d, <Py_ssize_t> PIECE)
            if waiting + n > RUN:
                drain(tables, counts, sums)
                drain(tables + ENTRIES, counts, sums)
                waiting = 0
            count_row(
                values(x, h, i, d, n, room), mean + d if mean != NULL else NULL, n, tables, tables + ENTRIES, &largest
            )
            waiting += n
            d += n
    drain(tables, counts, sums)
    drain(tables + ENTRIES, counts, sums)
    (<uint32_t*> top)[0] = largest
    free(tables)
    return True


def count_values(
    x not None, const float[:, :] mean, const unsigned char[:, :] seen,
    int64_t[:, ::1] counts not None, int64_t[:, ::1] sums not None, float[::1] top not None, int threads,
):
    """Add the values |x - mean| of each head to its histogram.

    x: (H, L, D), the last axis contiguous. mean: (H, D), C order, or None for 0. seen: (H, L), C order, the rows that
    count; None for all. counts: (H, columns): smaller values, the bins, larger values, NaN and inf. sums: (H, bins), of
    the low bits of the mantissas. top: (H,), the greatest finite |x - mean| so far, not negative.
    """
    cdef Py_ssize_t H = x.shape[0], L = x.shape[1], D = x.shape[2], h, failed = 0
    cdef bint centred = mean is not None, some = seen is not None
    cdef uint64_t environment
    cdef Floats source
    if x.size == 0:
        return
    source = heads_of(x)
    for h in prange(H, nogil=True, schedule="dynamic", chunksize=1, num_threads=threads):
        environment = enter_environment()
        failed += not count_head(
            &source, h, L, D, &mean[h, 0] if centred else NULL, &seen[h, 0] if some else NULL,
            &counts[h, 0], &sums[h, 0], &top[h],
        )
        leave_environment(environment)
    if failed:
        raise MemoryError("no memory for the tables of a histogram, 128 KiB for each thread")


cdef void sum_head(
    const Floats* x, Py_ssize_t h, Py_ssize_t L, Py_ssize_t D, const unsigned char* seen, double factor, int64_t* total
) noexcept nogil:
    cdef float room[PIECE]
    cdef const float* row
    cdef Py_ssize_t i, j, d, n
    cdef int64_t origin = bits_of_double(ROUNDER)
    for i in range(L):
        if seen != NULL and not seen[i]:
            continue
        d = 0
        while d < D:
            n = min(D - d, <Py_ssize_t> PIECE)
            row = values(x, h, i, d, n, room)
            for j in range(n):
                total[d + j] += bits_of_double(<double> row[j] * factor + ROUNDER) - origin
            d += n


def sum_channels(
    x not None, const unsigned char[:, :] seen, double factor, int64_t[:, ::1] total not None,
    int threads,
):
    """Add the rows of each head to total (H, D), each value times `factor`, rounded to an integer.

    x: (H, L, D), the last axis contiguous, all values of rows that count at most 2^40 / factor; L at most 2^22. seen:
    as above.
    """
    cdef Py_ssize_t H = x.shape[0], L = x.shape[1], D = x.shape[2], h
    cdef bint some = seen is not None
    cdef uint64_t environment
    cdef Floats source
    if x.size == 0:
        return
    source = heads_of(x)
    for h in prange(H, nogil=True, schedule="dynamic", chunksize=1, num_threads=threads):
        environment = enter_environment()
        sum_head(&source, h, L, D, &seen[h, 0] if some else NULL, factor, &total[h, 0])
        leave_environment(environment)


cdef uint64_t print_head(
    const Floats* x, Py_ssize_t h, Py_ssize_t L, Py_ssize_t D, const unsigned char* seen
) noexcept nogil:
    cdef float room[PIECE]
    cdef uint64_t total = 0, row
    cdef uint32_t weight
    cdef const uint32_t* bits
    cdef Py_ssize_t i, j, d, n
    for i in range(L):
        if seen != NULL and not seen[i]:
            continue
        row = 0
        weight = <uint32_t> i * <uint32_t> 0x9E3779B1
        d = 0
        while d < D:
            n = min(D - d, <Py_ssize_t> PIECE)
            bits = <const uint32_t*> values(x, h, i, d, n, room)
            for j in range(n):
                row += <uint64_t> bits[j] * (weight + <uint32_t> (d + j) * <uint32_t> 0x85EBCA77 | 1)
            d += n
        total = (total ^ row) * <uint64_t> 0xD6E8FEB86659FD93 + <uint64_t> i
    return total


def fingerprints(
    x not None, const unsigned char[:, :] seen, uint64_t[::1] out not None, int threads,
):
    """Writes out[h]: 64 bits that the rows of head h which count, their bits and their places, decide.

    x: (H, L, D), the last axis contiguous. seen: as above. For telling data apart, not against malice.
    """
    cdef Py_ssize_t H = x.shape[0], L = x.shape[1], D = x.shape[2], h
    cdef bint some = seen is not None
    cdef uint64_t environment
    cdef Floats source
    if x.size == 0:
        return
    source = heads_of(x)
    for h in prange(H, nogil=True, schedule="dynamic", chunksize=1, num_threads=threads):
        environment = enter_environment()
        out[h] = print_head(&source, h, L, D, &seen[h, 0] if some else NULL)
        leave_environment(environment)
