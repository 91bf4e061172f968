// Joins what decode.cu leaves of each chunk of keys, for one query row a block:
//
//     m = max_c m_c     f_c = 2^((m_c - m) unit)     O = sum_c f_c O_c / (sum_c f_c l_c + the sink's weight)
//
// A thread has four channels and one of PARTS runs of neighbouring chunks; the runs' sums are added in their order. So
// the order of every sum depends on the number of chunks and D only.
#include "options.cuh"
#include "types.cuh"

constexpr int D = HEAD_DIM, THREADS = 128, GROUPS = D / 4, PARTS = THREADS / GROUPS;
constexpr bool CODES = QK_TYPE == I8, EXACT = CODES || !FOLDED;
constexpr u32 AT_TOP = THREADS * 16, AT_TOTAL = AT_TOP + THREADS / 32 * 4;  // behind the runs' sums

KERNEL(cyflash_merge, THREADS, 4) {
    const int thread = thread_index(), part = thread / GROUPS, channel = thread % GROUPS * 4;
    const long long row = block_index(), rows = (long long)p.B * p.H * p.Lq;
    const int i = (int)(row % p.Lq), h = (int)(row / p.Lq % p.H), b = (int)(row / p.Lq / p.H);
    const float* o = p.workspace + row * p.chunks * D + channel;
    const float* state = p.workspace + rows * p.chunks * D + row * p.chunks * 2;
    const long long scale_at = b * p.q_scale_stride[0] + h * p.q_scale_stride[1] + i * p.q_scale_stride[2];
    const float unit = log2_unit(CODES ? p.scale * p.q_scale[scale_at] : p.scale);

    float m = -INFINITY;
    for (int c = thread; c < p.chunks; c += THREADS) m = fmaxf(m, state[2 * c]);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) m = fmaxf(m, shuffle_xor(m, lanes));
    if (thread % 32 == 0) shared_store(AT_TOP + thread / 32 * 4, m);
    barrier();  // the warps' maxima are there
    float tops[4];
    shared_load(tops, AT_TOP);
    m = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));

    if (part < PARTS) {
        float sums[4] = {0, 0, 0, 0}, total = 0.f;
        const int end = (int)((part + 1ll) * p.chunks / PARTS);
#pragma unroll 4
        for (int c = (int)((long long)part * p.chunks / PARTS); c < end; c++) {
            const float l = state[2 * c + 1];
            float x[4];
            load4(x, o + (long long)c * D);  // whatever it is: loads of several chunks are on their way together
            const bool seen = l != 0.f;      // without a visible key O was not written
            const float share = seen ? rescale<EXACT>(state[2 * c], stand_in(m), unit) : 0.f;
            total = fmaf(l, share, total);
#pragma unroll
            for (int e = 0; e < 4; e++) sums[e] = fmaf(seen ? x[e] : 0.f, share, sums[e]);
        }
        const u32 bits[4] = {bits_of(sums[0]), bits_of(sums[1]), bits_of(sums[2]), bits_of(sums[3])};
        shared_store4(thread * 16, bits);
        if (channel == 0) shared_store(AT_TOTAL + part * 4, total);
    }
    barrier();  // the runs' sums are there
    if (part) return;
    float sums[4] = {0, 0, 0, 0}, total = 0.f;
#pragma unroll
    for (int run = 0; run < PARTS; run++) {
        float x[4], l[1];
        shared_load(x, (run * GROUPS + thread) * 16);
        shared_load(l, AT_TOTAL + run * 4);
        total += l[0];
#pragma unroll
        for (int e = 0; e < 4; e++) sums[e] += x[e];
    }
    const float top = natural(m, unit, CODES && p.shift ? p.shift[row] : 0.f);
    const Finish end = finish(top, total, p.sinks ? p.sinks + h : 0);
    const long long at = b * p.out_stride[0] + h * p.out_stride[1] + i * p.out_stride[2] + channel;
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
        if (channel + e >= p.D) break;
        store_pair<OUT_TYPE>(p.out, at + e, sums[e] * end.factor, sums[e + 1] * end.factor, p.D - channel - e);
    }
    if (p.lse && thread == 0) p.lse[row] = end.lse;
}
