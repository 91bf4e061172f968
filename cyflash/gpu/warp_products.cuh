// The two products of a warp with 16 query rows and a tile of KEYS keys in shared memory, on tensor cores.
//
// Of 16 x 8 sums lane 4 g + t has rows g, g + 8 and columns 2 t, 2 t + 1. The accumulators of S = Q K^T are, packed,
// the left operand of P V.
#pragma once
#include "options.cuh"
#include "tiles.cuh"
#include "types.cuh"

template <int TYPE> struct SumOf { typedef float type; };
template <> struct SumOf<I8> { typedef int type; };

// One step, 32 bytes of head_dim, of the 16 rows at `at`.
template <int PITCH> DEVICE void load_rows(u32 (&q)[4], u32 at, int step) {
    const int lane = thread_index() % 32;
    load_matrices(q, moved<PITCH>(at + place<PITCH>(lane % 16, lane / 16), step * 2));
}

// s = Q K^T. KEPT: q holds all of Q; otherwise its rows are at q_at.
template <int TYPE, int PITCH, int KEYS, bool KEPT> DEVICE void multiply_qk(
    typename SumOf<TYPE>::type (&s)[KEYS / 8][4], const u32 (&q)[KEPT ? PITCH / 32 : 1][4], u32 q_at, u32 k
) {
    const int lane = thread_index() % 32;
    const u32 at = k + place<PITCH>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = TYPE == I8 ? ZERO : 0;
#pragma unroll
    for (int step = 0; step < PITCH / 32; step++) {
        u32 a[4];
        if (KEPT) {
#pragma unroll
            for (int e = 0; e < 4; e++) a[e] = q[KEPT ? step : 0][e];
        } else {
            load_rows<PITCH>(a, q_at, step);
        }
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            u32 b[4];
            load_matrices(b, moved<PITCH>(at, step * 2) + n * 16 * PITCH);
            mma<TYPE>(s[2 * n], a, b[0], b[1]);
            mma<TYPE>(s[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// Adds what values that are NaN or infinite give to the rows that see them. seen: 1 for each key that a row sees.
template <int TYPE> DEVICE void add_not_finite(
    float (&o)[4], const u32 (&seen)[4], u32 v0, u32 v1, u32 bad0, u32 bad1
) {
    float positive[4] = {0, 0, 0, 0}, negative[4] = {0, 0, 0, 0};
    mma<TYPE>(positive, seen, is_infinite<TYPE>(v0, bad0, false), is_infinite<TYPE>(v1, bad1, false));
    mma<TYPE>(negative, seen, is_infinite<TYPE>(v0, bad0, true), is_infinite<TYPE>(v1, bad1, true));
#pragma unroll
    for (int e = 0; e < 4; e++) {
        if (positive[e] > 0.f) o[e] += INFINITY;
        if (negative[e] > 0.f) o[e] -= INFINITY;  // NaN counts as both
    }
}

// O += P V in 16 bits. hiding: weights of 0 are of hidden keys, whose values may be NaN or infinite.
template <int TYPE, int D, int KEYS> DEVICE void multiply_pv(
    float (&o)[D / 8][4], const float (&w)[KEYS / 8][4], u32 v, bool hiding
) {
    const int lane = thread_index() % 32;
    const u32 at = v + place<D * 2>(lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
        u32 a[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float(&x)[4] = w[2 * step + e / 2];
            a[e] = pack<TYPE>(x[e % 2 * 2], x[e % 2 * 2 + 1]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            u32 b[4];
            load_matrices_transposed(b, moved<D * 2>(at, n * 2) + step * 16 * D * 2);
            if (HIDING && hiding) {
                u32 bad[4], any = 0;
#pragma unroll
                for (int e = 0; e < 4; e++) any |= bad[e] = not_finite<TYPE>(b[e]);
                if (warp_any(any != 0)) {
                    u32 seen[4];
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float(&x)[4] = w[2 * step + e / 2];
                        seen[e] = pack<TYPE>(x[e % 2 * 2] != 0.f ? 1.f : 0.f, x[e % 2 * 2 + 1] != 0.f ? 1.f : 0.f);
                    }
                    add_not_finite<TYPE>(o[2 * n], seen, b[0], b[1], bad[0], bad[1]);
                    add_not_finite<TYPE>(o[2 * n + 1], seen, b[2], b[3], bad[2], bad[3]);
#pragma unroll
                    for (int e = 0; e < 4; e++) b[e] &= ~bad[e];
                }
            }
            mma<TYPE>(o[2 * n], a, b[0], b[1]);
            mma<TYPE>(o[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// O += worth P V of codes, 32 keys: exact sums. Keys come in the order in which lanes have their weights: lane t has
// 2 t, 2 t + 1 of each eight, and so do the transposed matrices. Two channels lie beside each other in a register: even
// ones go to o[2 n], odd ones to o[2 n + 1].
template <int D> DEVICE void multiply_codes(
    float (&o)[D / 8][4], const float (&w)[4][4], const float (&worth)[2], u32 v
) {
    const int lane = thread_index() % 32;
    const u32 at = v + place<D>(lane, 0);
    u32 a[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const float(&x)[4] = w[e / 2 * 2], (&y)[4] = w[e / 2 * 2 + 1];
        a[e] = pack_u8(x[e % 2 * 2], x[e % 2 * 2 + 1], y[e % 2 * 2], y[e % 2 * 2 + 1]);
    }
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
        int even[4] = {ZERO, ZERO, ZERO, ZERO}, odd[4] = {ZERO, ZERO, ZERO, ZERO};
        u32 b[4];
        load_matrices_transposed(b, moved<D>(at, n));
        mma_u8_s8(even, a, choose_bytes(b[0], b[1], 0x6420), choose_bytes(b[2], b[3], 0x6420));
        mma_u8_s8(odd, a, choose_bytes(b[0], b[1], 0x7531), choose_bytes(b[2], b[3], 0x7531));
#pragma unroll
        for (int e = 0; e < 4; e++) {
            o[2 * n][e] = fmaf(worth[e / 2], sum_of(even[e]), o[2 * n][e]);
            o[2 * n + 1][e] = fmaf(worth[e / 2], sum_of(odd[e]), o[2 * n + 1][e]);
        }
    }
}

// The greatest, or the sum, of the four lanes that share rows.
DEVICE float row_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
DEVICE float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
