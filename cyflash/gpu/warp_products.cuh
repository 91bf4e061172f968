// The two products of a warp with MT x 16 query rows and a tile of KEYS keys in shared memory, by mma.sync. Registers of
// each 16 rows lie as weights.cuh says; the sums of S = Q K^T, packed, are the left operand of P V.
//
// What is read of K and V serves MT products: 512 bytes, four clocks of shared memory, for 2 MT of 4096 operations each.
#pragma once
#include "tiles.cuh"
#include "weights.cuh"

// One step, 32 bytes of head_dim, of the rows at `at`.
template <int MT, int PITCH> DEVICE void load_rows(u32 (&q)[MT][4], u32 at, int step) {
    const int lane = thread_index() % 32;
    at = moved<PITCH>(at + place<PITCH>(lane % 16, lane / 16), step * 2);
#pragma unroll
    for (int i = 0; i < MT; i++) load_matrices(q[i], at + i * 16 * PITCH);
}

// s = Q K^T. KEPT: q holds all of Q; otherwise its rows are at q_at. UNROLL: how many steps the compiler may mix, each of
// which has operands of its own.
template <int MT, int PITCH, int KEYS, bool KEPT, int UNROLL = PITCH / 32> DEVICE void multiply_qk(
    Sum (&s)[MT][KEYS / 2], const u32 (&q)[KEPT ? PITCH / 32 : 1][MT][4], u32 q_at, u32 k
) {
    const int lane = thread_index() % 32;
    const u32 at = k + place<PITCH>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int n = 0; n < KEYS / 2; n++) s[i][n] = CODES ? ZERO : 0;
#pragma unroll UNROLL
    for (int step = 0; step < PITCH / 32; step++) {
        u32 a[MT][4];
        if (KEPT) {
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) a[i][e] = q[KEPT ? step : 0][i][e];
        } else {
            load_rows<MT, PITCH>(a, q_at, step);
        }
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            u32 b[4];
            load_matrices(b, moved<PITCH>(at, step * 2) + n * 16 * PITCH);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                mma_at<QK_TYPE>(s[i], 8 * n, a[i], b[0], b[1]);
                mma_at<QK_TYPE>(s[i], 8 * n + 4, a[i], b[2], b[3]);
            }
        }
    }
}

// O += P V in 16 bits. CAREFUL: weights are marked, and those of 0 are of hidden keys, whose values may not be finite.
template <int MT, int DV, int KEYS, bool CAREFUL> DEVICE void multiply_pv(
    float (&o)[MT][DV / 2], const float (&w)[MT][KEYS / 2], u32 v
) {
    constexpr int PITCH = DV * V_SIZE;
    const int lane = thread_index() % 32;
    const u32 at = v + place<PITCH>(lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
        u32 a[MT][4];
#pragma unroll
        for (int i = 0; i < MT; i++) pack_weights(a[i], w[i] + 8 * step);
#pragma unroll
        for (int n = 0; n < DV / 16; n++) {
            u32 b[4];
            load_matrices_transposed(b, moved<PITCH>(at, n * 2) + step * 16 * PITCH);
            if (CAREFUL) {
                u32 bad[4];
#pragma unroll
                for (int e = 0; e < 4; e++) bad[e] = not_finite<V_TYPE>(b[e]);
                if (warp_any((bad[0] | bad[1] | bad[2] | bad[3]) != 0)) {
#pragma unroll
                    for (int i = 0; i < MT; i++) {
                        u32 seen[4];
                        pack_seen(seen, w[i] + 8 * step);
                        add_not_finite(o[i], 8 * n, seen, b[0], b[1], bad[0], bad[1]);
                        add_not_finite(o[i], 8 * n + 4, seen, b[2], b[3], bad[2], bad[3]);
                    }
#pragma unroll
                    for (int e = 0; e < 4; e++) b[e] &= ~bad[e];
                }
            }
#pragma unroll
            for (int i = 0; i < MT; i++) {
                mma_at<V_TYPE>(o[i], 8 * n, a[i], b[0], b[1]);
                mma_at<V_TYPE>(o[i], 8 * n + 4, a[i], b[2], b[3]);
            }
        }
    }
}
// The same; hiding: some key may be hidden from some row. A tile of finite values takes the way without branches.
template <int MT, int DV, int KEYS> DEVICE void multiply_pv(
    float (&o)[MT][DV / 2], const float (&w)[MT][KEYS / 2], u32 v, bool hiding
) {
    if (HIDING && hiding && warp_any(holds_not_finite<V_TYPE, KEYS * DV * V_SIZE, 32>(v))) {
        multiply_pv<MT, DV, KEYS, true>(o, w, v);
    } else {
        multiply_pv<MT, DV, KEYS, false>(o, w, v);
    }
}

// O += worth P V of codes: exact sums over the tile. Keys come in the order in which lanes have their weights: of 32
// keys lane t has 2 t, 2 t + 1 of each eight, and so do the transposed matrices. Two channels lie beside each other in
// a register: of 16, o[8 n + e] has the even ones and o[8 n + 4 + e] the odd ones, as channel_of() says.
template <int MT, int DV, int KEYS> DEVICE void multiply_codes(
    float (&o)[MT][DV / 2], const float (&w)[MT][KEYS / 2], const Rows (&rows)[MT], u32 v
) {
    const int lane = thread_index() % 32;
    const u32 at = v + place<DV>(lane, 0);
    u32 a[MT][KEYS / 32][4];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int step = 0; step < KEYS / 32; step++) pack_weights(a[i][step], w[i] + 16 * step);
#pragma unroll
    for (int n = 0; n < DV / 16; n++) {
        int even[MT][4], odd[MT][4];
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) even[i][e] = odd[i][e] = ZERO;
#pragma unroll
        for (int step = 0; step < KEYS / 32; step++) {
            u32 b[4];
            load_matrices_transposed(b, moved<DV>(at, n) + step * 32 * DV);
            const u32 even0 = choose_bytes(b[0], b[1], 0x6420), even1 = choose_bytes(b[2], b[3], 0x6420);
            const u32 odd0 = choose_bytes(b[0], b[1], 0x7531), odd1 = choose_bytes(b[2], b[3], 0x7531);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                mma_u8_s8(even[i], a[i][step], even0, even1);
                mma_u8_s8(odd[i], a[i][step], odd0, odd1);
            }
        }
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float worth = rows[i].worth[e / 2];
                o[i][8 * n + e] = fmaf(worth, sum_of<ZERO>(even[i][e]), o[i][8 * n + e]);
                o[i][8 * n + 4 + e] = fmaf(worth, sum_of<ZERO>(odd[i][e]), o[i][8 * n + 4 + e]);
            }
    }
}

// Where a lane's pair of neighbouring channels begins: pair 0 or 1 of each 16; the first one is o[first_of(n, pair)]
// of the row g, and o[second_of(n, pair)] the other.
DEVICE int channel_of(int n, int pair) {
    const int t = thread_index() % 4;
    return n * 16 + (CODED_P ? 4 * t + 2 * pair : 8 * pair + 2 * t);
}
DEVICE int first_of(int n, int pair) { return 8 * n + (CODED_P ? pair : 4 * pair); }
DEVICE int second_of(int n, int pair) { return first_of(n, pair) + (CODED_P ? 4 : 1); }
