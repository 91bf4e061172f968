// Puts together what chunks of keys left: out = sum_c e^(lse_c - lse) out_c, with e^lse = sum_c e^lse_c + e^sink, the
// sink being in no chunk.
//
// Params of this kernel: q is the chunks' outputs, (chunks, B, H, Lq, D) of float32, q_scale their log-sum-exp, both
// contiguous; Lk is that of the call, which says how many chunks there are; out, lse, sinks, B, H, Lq, D as in every
// kernel. A warp takes a row.
#include "options.cuh"
#include "types.cuh"

constexpr int THREADS = 128;

KERNEL(cyflash_merge, THREADS, 4) {
    const int chunks = chunks_of(p.Lk), lane = thread_index() % 32;
    const long long rows = (long long)p.B * p.H * p.Lq, row = block_index() * (THREADS / 32ll) + thread_index() / 32;
    if (row >= rows) return;
    const int i = row % p.Lq, h = row / p.Lq % p.H, b = row / p.Lq / p.H;
    float top = -INFINITY, sum = 0.f;
    for (int c = 0; c < chunks; c++) top = fmaxf(top, p.q_scale[c * rows + row]);
    const float base = stand_in(top);
    for (int c = 0; c < chunks; c++) sum += expf(p.q_scale[c * rows + row] - base);
    const Finish end = finish(base, sum, p.sinks ? p.sinks + h : 0);
    const long long to = b * p.out_stride[0] + h * p.out_stride[1] + i * p.out_stride[2];
    for (int channel = lane * 2; channel < p.D; channel += 64) {
        float x = 0.f, y = 0.f;
        for (int c = 0; c < chunks; c++) {
            const float weight = expf(p.q_scale[c * rows + row] - base);
            const float* from = (const float*)p.q + (c * rows + row) * p.D + channel;
            x = fmaf(weight, from[0], x);
            if (channel + 1 < p.D) y = fmaf(weight, from[1], y);
        }
        store_pair<OUT_TYPE>(p.out, to + channel, x * end.factor, y * end.factor, p.D - channel);
    }
    if (p.lse && lane == 0) p.lse[row] = end.lse;
}
