// Tiles of q, k and v in shared memory: rows of 16-byte chunks, placed so that eight rows' chunks of one column lie in
// different banks; and the asynchronous copies that fill them.
#pragma once
#include "primitives.cuh"

// Chunk c of row r lies in place c ^ f(r) of its row, PITCH bytes long. Eight consecutive rows of one column must fall
// into the eight 16-byte groups of the 32 banks. PITCH / 16 = odd * 2^n: for n >= 3 rows begin in the same group, and
// f must take 8 values; for n = 2 they begin in 2 groups, by the last bit of r, and f takes 4 values of the next two
// bits; for n = 1 in 4 groups, and f takes 2 values. f(r) < 2^n, so a chunk stays in its row.
template <int PITCH> DEVICE u32 place(int row, int chunk) {
    constexpr int n = PITCH % 128 == 0 ? 3 : PITCH % 64 == 0 ? 2 : PITCH % 32 == 0 ? 1 : 0;
    return row * PITCH + ((chunk ^ ((row >> (3 - n)) & ((1 << n) - 1))) << 4);
}

// Starts to copy rows [row, row + ROWS) of a matrix of `rows` rows and `columns` elements of SIZE bytes to shared memory
// at `to`; what lies outside becomes 0. WHOLE_CHUNKS: rows begin at multiples of 16 bytes. Others are copied at once, byte
// by element, and are as visible to other threads after the next barrier.
template <int ROWS, int PITCH, int SIZE, int THREADS, bool WHOLE_CHUNKS>
DEVICE void copy_tile(
    u32 to, const void* from, long long stride, int row, int rows, int columns, int thread
) {
    constexpr int CHUNKS = PITCH / 16, EACH = 16 / SIZE;
    const char* bytes = (const char*)from;
#pragma unroll
    for (int i = thread; i < ROWS * CHUNKS; i += THREADS) {
        const int r = i / CHUNKS, c = i % CHUNKS;
        const int n = row + r < rows ? min(max(columns - c * EACH, 0), EACH) : 0;
        const char* source = bytes + ((row + r) * stride + c * EACH) * SIZE;
        if (WHOLE_CHUNKS) {
            copy16(to + place<PITCH>(r, c), n ? source : bytes, n * SIZE);
        } else {
            u32 word[4] = {0, 0, 0, 0};
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                if (e < n) word[e * SIZE / 4] |= load_bits<SIZE>(source + e * SIZE) << (e * SIZE % 4 * 8);
            }
            shared_store4(to + place<PITCH>(r, c), word);
        }
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
