// Attention of float32 arrays in float32, on the units that every GPU has: exact products, one fused multiply-add each.
//
//     S = Q K^T     each thread Br/8 rows x Bc/16 keys, in registers, four elements of head_dim at a time
//     P = softmax   a row lies in 16 lanes of one warp; P goes to shared memory, for the same warp
//     O = O + P V   each thread Br/8 rows x D/16 channels
//
// K has two buffers and V one: while a tile is multiplied the next one is on its way.
// Shared memory: (Br + 3 Bc) D + Br (Bc + 16) floats. Registers, at D = 128, Br = 64, Bc = 32: O 64, S 16, operands 40.
#include "options.cuh"
#include "tiles.cuh"

constexpr int D = HEAD_DIM, Br = BLOCK_Q, Bc = BLOCK_K, THREADS = 128;
constexpr int TM = Br / 8, TN = Bc / 16, TD = D / 16;      // rows, keys, channels of a thread
constexpr int PITCH = D * 4;
constexpr int P_PITCH = (Bc + 16) * 4;                     // rows of a warp begin 16 banks apart
constexpr int W = TD % 4 == 0 ? 4 : TD % 2 == 0 ? 2 : 1;   // channels side by side
constexpr u32 K_BYTES = Bc * PITCH, AT_K = Br * PITCH, AT_V = AT_K + 2 * K_BYTES, AT_P = AT_V + K_BYTES;
static_assert(D % 16 == 0 && Br % 8 == 0 && Bc % 16 == 0, "tiles");

template <int ROWS> DEVICE void copy(
    u32 to, const void* x, const long long* stride, int b, int h, int row, int rows, int columns
) {
    const float* from = (const float*)x + b * stride[0] + h * stride[1];
    copy_tile<ROWS, PITCH, 4, THREADS, ALIGNED>(to, from, stride[2], row, rows, columns, thread_index());
}

// s[m][n] = q_m . k_n
DEVICE void multiply_qk(float (&s)[TM][TN], u32 k, int ty, int tx) {
#pragma unroll
    for (int m = 0; m < TM; m++)
#pragma unroll
        for (int n = 0; n < TN; n++) s[m][n] = 0.f;
#pragma unroll 2
    for (int c = 0; c < D / 4; c++) {
        float x[TM][4], y[TN][4];
#pragma unroll
        for (int m = 0; m < TM; m++) shared_load(x[m], place<PITCH>(ty + 8 * m, c));
#pragma unroll
        for (int n = 0; n < TN; n++) shared_load(y[n], k + place<PITCH>(tx + 16 * n, c));
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
            for (int m = 0; m < TM; m++)
#pragma unroll
                for (int n = 0; n < TN; n++) s[m][n] = fmaf(x[m][e], y[n][e], s[m][n]);
    }
}

// o[m] += p_m V. hiding: keys of weight 0 are hidden ones, whose values may be NaN or infinite.
DEVICE void multiply_pv(float (&o)[TM][TD], bool hiding, int ty, int tx) {
#pragma unroll 1
    for (int c = 0; c < Bc / 4; c++) {
        float p[TM][4];
#pragma unroll
        for (int m = 0; m < TM; m++) shared_load(p[m], AT_P + (ty + 8 * m) * P_PITCH + c * 16);
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
            for (int g = 0; g < TD / W; g++) {
                const int channel = (g * 16 + tx) * W;
                float v[W];
                shared_load(v, AT_V + place<PITCH>(c * 4 + e, channel / 4) + channel % 4 * 4);
#pragma unroll
                for (int m = 0; m < TM; m++)
#pragma unroll
                    for (int w = 0; w < W; w++)
                        if (!(HIDING && hiding) || p[m][e] != 0.f)
                            o[m][g * W + w] = fmaf(p[m][e], v[w], o[m][g * W + w]);
            }
    }
}

KERNEL(cyflash_ffma, THREADS, 2) {
    const int ty = thread_index() / 16, tx = thread_index() % 16;
    const Work work = make_work<Br, Bc>(p, block_index());
    const Head head = make_head(p, work.b, work.h);
    const float unit = log2_unit(p.scale);
    float m[TM], l[TM], o[TM][TD];
#pragma unroll
    for (int r = 0; r < TM; r++) {
        m[r] = -INFINITY;
        l[r] = 0.f;
#pragma unroll
        for (int c = 0; c < TD; c++) o[r][c] = 0.f;
    }
    if (work.begin < work.end) {
        copy<Br>(0, p.q, p.q_stride, work.b, work.h, work.row, p.Lq, p.D);
        copy<Bc>(AT_K, p.k, p.k_stride, work.b, work.kv, work.begin * Bc, p.Lk, p.D);
    }
    copy_commit();
    for (int j = work.begin; j < work.end; j++) {
        const u32 at = (j - work.begin) % 2 * K_BYTES;
        copy_wait<0>();
        barrier();  // K is there; all threads have done with the previous V and the other K
        copy<Bc>(AT_V, p.v, p.v_stride, work.b, work.kv, j * Bc, p.Lk, p.D);
        copy_commit();
        if (j + 1 < work.end) copy<Bc>(AT_K + K_BYTES - at, p.k, p.k_stride, work.b, work.kv, (j + 1) * Bc, p.Lk, p.D);
        copy_commit();

        float s[TM][TN];
        multiply_qk(s, AT_K + at, ty, tx);
        const bool partial = is_partial<Bc>(work, j), hiding = BIAS || MASK || partial;
        const int row = work.row + ty, key = j * Bc + tx;  // of s[0][0]
        if (negated(p)) {
#pragma unroll
            for (int r = 0; r < TM; r++)
#pragma unroll
                for (int n = 0; n < TN; n++) s[r][n] = -s[r][n];
        }
#pragma unroll
        for (int r = 0; r < TM; r++)
#pragma unroll
            for (int n = 0; n < TN; n++) {
                s[r][n] = changed(s[r][n], p, head, row + 8 * r, key + 16 * n, p.scale, 0.f);
            }
        if (partial) {
#pragma unroll
            for (int r = 0; r < TM; r++)
#pragma unroll
                for (int n = 0; n < TN; n++) s[r][n] = inside(s[r][n], p, head, row + 8 * r, key + 16 * n);
        }
#pragma unroll
        for (int r = 0; r < TM; r++) {
            float highest = m[r];
#pragma unroll
            for (int n = 0; n < TN; n++) highest = fmaxf(highest, s[r][n]);
#pragma unroll
            for (int lanes = 1; lanes < 16; lanes *= 2) highest = fmaxf(highest, shuffle_xor(highest, lanes));
            const float base = stand_in(highest), alpha = rescale<true>(m[r], base, unit);
            m[r] = highest;
            l[r] *= alpha;
#pragma unroll
            for (int n = 0; n < TN; n++) {
                float w = weight<true>(s[r][n], base, unit);
                l[r] += w;
                if (HIDING && hiding && s[r][n] != -INFINITY) w = max_nan(w, SMALLEST_WEIGHT);
                shared_store(AT_P + (ty + 8 * r) * P_PITCH + (tx + 16 * n) * 4, w);
            }
#pragma unroll
            for (int c = 0; c < TD; c++) o[r][c] *= alpha;
        }
        copy_wait<1>();
        barrier();  // V is there, and P
        multiply_pv(o, hiding, ty, tx);
    }
#pragma unroll
    for (int r = 0; r < TM; r++) {
#pragma unroll
        for (int lanes = 1; lanes < 16; lanes *= 2) l[r] += shuffle_xor(l[r], lanes);
        const int i = work.row + ty + 8 * r;
        if (i >= p.Lq) continue;
        const Finish end = finish(natural(m[r], unit, 0.f), l[r], p.sinks ? p.sinks + work.h : 0);
        float* out = (float*)p.out + (work.b * p.out_stride[0] + work.h * p.out_stride[1] + i * p.out_stride[2]);
#pragma unroll
        for (int g = 0; g < TD / W; g++)
#pragma unroll
            for (int w = 0; w < W; w++) {
                const int channel = (g * 16 + tx) * W + w;
                if (channel < p.D) out[channel] = o[r][g * W + w] * end.factor;
            }
        if (p.lse && tx == 0) p.lse[((long long)work.b * p.H + work.h) * p.Lq + i] = end.lse;
    }
}
