// What hopper.cu does where rows do not see all keys and a value is NaN or infinite: hidden ones must not reach a sum.
//
// wgmma takes V from shared memory as it is. So a consumer looks through such tiles first, and when it finds one makes
// all products from there on by mma.sync, whose sums lie in the same registers: finite values by weights, others by who
// sees them. (In one loop with mma.sync the compiler would let wgmma run one after another.)
#pragma once
#include "hopper.cuh"
#include "tiles.cuh"
#include "weights.cuh"

constexpr int V_PITCH = 128;

// Products of a warpgroup by data type: of codes where sums are integers.
template <int TYPE, int R, class A> DEVICE void wgmma(float (&d)[R], const A& a, u64 b, bool add) {
    if constexpr (TYPE == BF16) {
        wgmma_bf16(d, a, b, add);
    } else {
        wgmma_f16(d, a, b, add);
    }
}
template <int TYPE, int R> DEVICE void wgmma(int (&d)[R], u64 a, u64 b, bool add) { wgmma_s8(d, a, b, add); }
template <int TYPE, int R> DEVICE void wgmma(int (&d)[R], const u32 (&a)[4], u64 b, bool add) {
    wgmma_u8_s8(d, a, b, add);
}

// From `at`, the place of chunk 0 or 1 of a row, to that of so many chunks more, an even number, in panels of ROWS
// rows.
template <int PITCH, int ROWS> DEVICE u32 in_panels(u32 at, int chunks) {
    constexpr int EACH = PITCH / 16;
    return moved<PITCH>(at, chunks % EACH) + chunks / EACH * ROWS * PITCH;
}

// S = Q K^T of a warp's 16 rows and 16 keys, BYTES of each. q, k: where the first row and key begin.
template <int TYPE, int PITCH, int Br, int Bc, int BYTES> DEVICE void multiply_qk_slowly(Sum (&s)[8], u32 q, u32 k) {
    const int lane = thread_index() % 32;
    const u32 a_at = q + place<PITCH>(lane % 16, lane / 16);
    const u32 b_at = k + place<PITCH>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < 8; i++) s[i] = 0;
#pragma unroll 1
    for (int step = 0; step < BYTES / 32; step++) {
        u32 a[4], b[4];
        load_matrices(a, in_panels<PITCH, Br>(a_at, step * 2));
        load_matrices(b, in_panels<PITCH, Bc>(b_at, step * 2));
        mma_at<TYPE>(s, 0, a, b[0], b[1]);
        mma_at<TYPE>(s, 4, a, b[2], b[3]);
    }
}

// O += P V of 16 keys. seen: 1 for each key that a row sees. v: where the first key's values begin.
template <int TYPE, int D, int Bc>
DEVICE void multiply_pv_slowly(float (&o)[D / 2], const u32 (&w)[4], const u32 (&seen)[4], u32 v) {
    const int lane = thread_index() % 32;
    const u32 at = v + place<V_PITCH>(lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
        u32 b[4], bad[4], any = 0;
        load_matrices_transposed(b, in_panels<V_PITCH, Bc>(at, n * 2));
#pragma unroll
        for (int e = 0; e < 4; e++) any |= bad[e] = not_finite<TYPE>(b[e]);
        const bool infinite = warp_any(any != 0);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 v0 = b[2 * half], v1 = b[2 * half + 1], bad0 = bad[2 * half], bad1 = bad[2 * half + 1];
            if (infinite) add_not_finite(o, (2 * n + half) * 4, seen, v0, v1, bad0, bad1);
            mma_at<TYPE>(o, (2 * n + half) * 4, w, v0 & ~bad0, v1 & ~bad1);
        }
    }
}
