// Tiles of q, k and v in shared memory: rows of 16-byte chunks, placed so that eight rows' chunks of one column lie in
// different banks; and the asynchronous copies that fill them.
#pragma once
#include "primitives.cuh"

// Chunk c of row r lies in place c ^ f(r) of its row, PITCH bytes long. Eight consecutive rows of one column must fall
// into the eight 16-byte groups of the 32 banks. PITCH / 16 = odd * 2^n: for n >= 3 rows begin in the same group, and
// f must take 8 values; for n = 2 they begin in 2 groups, by the last bit of r, and f takes 4 values of the next two
// bits; for n = 1 in 4 groups, and f takes 2 values. f(r) < 2^n, so a chunk stays in its row.
template <int PITCH> struct Swizzle {
    static constexpr int n = PITCH % 128 == 0 ? 3 : PITCH % 64 == 0 ? 2 : PITCH % 32 == 0 ? 1 : 0, mask = (1 << n) - 1;
};
template <int PITCH> DEVICE u32 place(int row, int chunk) {
    typedef Swizzle<PITCH> S;
    return row * PITCH + ((chunk ^ ((row >> (3 - S::n)) & S::mask)) << 4);
}

// place(row, c + chunks) from at = place(row, c), where c and chunks have no bit in common: one operation, or none, and
// a constant. Tiles begin at multiples of 128 bytes.
template <int PITCH> DEVICE u32 moved(u32 at, int chunks) {
    typedef Swizzle<PITCH> S;
    return (at ^ ((chunks & S::mask) << 4)) + ((chunks & ~S::mask) << 4);
}

// The largest power of two that divides n, at most 16.
template <int N> struct PowerIn {
    static constexpr int value = N % 16 == 0 ? 16 : N % 8 == 0 ? 8 : N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
};

// Starts to copy n elements of SIZE bytes to a chunk, whose others become 0. WHOLE: `source` is a multiple of 16.
template <int SIZE, bool WHOLE> DEVICE void copy_chunk(u32 at, const char* source, int n) {
    if (WHOLE) {
        copy16(at, source, n * SIZE);
    } else {
        u32 word[4] = {0, 0, 0, 0};
#pragma unroll
        for (int e = 0; e < 16 / SIZE; e++) {
            if (e < n) word[e * SIZE / 4] |= load_bits<SIZE>(source + e * SIZE) << (e * SIZE % 4 * 8);
        }
        shared_store4(at, word);
    }
}

// Starts to copy rows [row, row + ROWS) of a matrix of `rows` rows and `columns` elements of SIZE bytes to shared
// memory at `to`; what lies outside becomes 0. WHOLE_CHUNKS: rows begin at multiples of 16 bytes. Others are copied at
// once, element by element, row by row, and are as visible to other threads after the next barrier.
//
// A row is copied by LANES threads, which keep their columns: from one row to the next a thread adds a constant to both
// addresses, since STEP is a multiple of 8 and so place() of its rows differs by STEP * PITCH.
template <int ROWS, int PITCH, int SIZE, int THREADS, bool WHOLE_CHUNKS>
DEVICE void copy_tile(u32 to, const void* from, long long stride, int row, int rows, int columns, int thread) {
    constexpr int CHUNKS = PITCH / 16, EACH = 16 / SIZE, MOST = THREADS / 8;
    constexpr int LANES = PowerIn<CHUNKS>::value < MOST ? PowerIn<CHUNKS>::value : MOST, STEP = THREADS / LANES;
    static_assert(STEP % 8 == 0, "copy_tile");
    const int first = thread / LANES, chunk = thread % LANES;
    const char* source = (const char*)from + ((row + first) * stride + chunk * EACH) * SIZE;
#pragma unroll WHOLE_CHUNKS ? ROWS : 1
    for (int i = 0; i < ROWS; i += STEP) {
        if (i + STEP > ROWS && first >= ROWS - i) break;
#pragma unroll
        for (int c = 0; c < CHUNKS; c += LANES) {
            const int n = first + i < rows - row ? min(max(columns - (chunk + c) * EACH, 0), EACH) : 0;
            copy_chunk<SIZE, WHOLE_CHUNKS>(to + place<PITCH>(first + i, chunk + c), source + c * 16, n);
        }
        source += STEP * stride * SIZE;
    }
}

// The same for one number of each row, 4 bytes: `to` holds ROWS of them.
template <int ROWS, int THREADS>
DEVICE void copy_numbers(u32 to, const float* from, long long stride, int row, int rows, int thread) {
#pragma unroll
    for (int i = thread; i < ROWS; i += THREADS) {
        const bool inside = row + i < rows;
        copy4(to + i * 4, inside ? from + (row + i) * stride : from, inside ? 4 : 0);
    }
}
