// Attention on tensor cores, after FlashAttention-2: float16 and bfloat16; int8 q and k with v in 16 bits or int8.
//
//     S = Q K^T     a warp has MT x 16 query rows; sums lie in registers as weights.cuh says
//     P = softmax   P stays in the registers that S was in
//     O = O + P V   the accumulators of S are, packed, the left operand of this product
//
// K has two buffers and V one: while a tile is multiplied the next one is on its way.
// Registers of a lane: O MT DV / 2, S MT Bc / 2, Q MT D / 4 (half as much of int8) where it stays in registers.
#include "warp_products.cuh"

constexpr int D = HEAD_DIM, DV = CHANNELS, PARTS = D / DV;  // a block computes DV channels of D
constexpr int Br = BLOCK_Q, Bc = BLOCK_K, WARPS = 4, THREADS = WARPS * 32, MT = Br / (WARPS * 16);
constexpr int QK_PITCH = D * QK_SIZE, V_PITCH = DV * V_SIZE;
constexpr u32 K_BYTES = Bc * QK_PITCH, AT_K = Br * QK_PITCH, AT_V = AT_K + 2 * K_BYTES;
constexpr u32 AT_K_SCALE = AT_V + Bc * V_PITCH, AT_V_SCALE = AT_K_SCALE + 2 * Bc * 4;
constexpr int STEPS = QK_PITCH / 32;                        // of 32 bytes of head_dim
// At most 32 registers; where sums of codes stand beside a large O, 4 more reads among 96 products are cheaper.
constexpr bool Q_STAYS = MT * STEPS <= 8 && D <= (CODED_P ? 96 : 128);
static_assert(DV % 16 == 0 && D % DV == 0 && QK_PITCH % 32 == 0 && Br % 64 == 0 && Bc % 32 == 0, "tiles");

template <int ROWS, int SIZE, int COLUMNS> DEVICE void copy(
    u32 to, const void* x, const long long* stride, int b, int h, int row, int rows, int column, const Params& p
) {
    const char* from = (const char*)x + (b * stride[0] + h * stride[1] + column) * SIZE;
    copy_tile<ROWS, COLUMNS * SIZE, SIZE, THREADS, ALIGNED>(
        to, from, stride[2], row, rows, p.D - column, thread_index());
}
DEVICE void copy_scales(u32 to, const float* x, const long long* stride, const Work& work, int tile, const Params& p) {
    const float* from = x + work.b * stride[0] + work.kv * stride[1];
    copy_numbers<Bc, THREADS>(to, from, stride[2], tile * Bc, p.Lk, thread_index());
}
DEVICE void copy_k(const Params& p, const Work& work, int tile, int buffer) {
    copy<Bc, QK_SIZE, D>(AT_K + buffer * K_BYTES, p.k, p.k_stride, work.b, work.kv, tile * Bc, p.Lk, 0, p);
    if (CODES) copy_scales(AT_K_SCALE + buffer * Bc * 4, p.k_scale, p.k_scale_stride, work, tile, p);
}
DEVICE void copy_v(const Params& p, const Work& work, int tile, int channel) {
    copy<Bc, V_SIZE, DV>(AT_V, p.v, p.v_stride, work.b, work.kv, tile * Bc, p.Lk, channel, p);
    if (CODED_P) copy_scales(AT_V_SCALE, p.v_scale, p.v_scale_stride, work, tile, p);
}

KERNEL(cyflash_mma, THREADS, BLOCKS) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const Work work = make_work<Br, Bc>(p, block_index() / PARTS);
    const int first = block_index() % PARTS * DV;  // channel
    if (work.begin < work.end) {
        copy<Br, QK_SIZE, D>(0, p.q, p.q_stride, work.b, work.h, work.row, p.Lq, 0, p);
        copy_k(p, work, work.begin, 0);
    }
    copy_commit();

    const Head head = make_head(p, work.b, work.h);
    const int row = warp * MT * 16;  // of the block, the warp's first
    Rows rows[MT];
    float o[MT][DV / 2];
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            begin_row(rows[i], h, p, work.b, work.h, work.row + row + i * 16 + lane / 4 + 8 * h);
        }
#pragma unroll
        for (int n = 0; n < DV / 2; n++) o[i][n] = 0.f;
    }

    u32 q[Q_STAYS ? STEPS : 1][MT][4];
    for (int j = work.begin; j < work.end; j++) {
        const int buffer = (j - work.begin) % 2;
        copy_wait<0>();
        barrier();  // K is there; all threads have done with the previous V and the other K
        copy_v(p, work, j, first);
        copy_commit();
        if (j + 1 < work.end) copy_k(p, work, j + 1, 1 - buffer);
        copy_commit();
        if (Q_STAYS && j == work.begin) {
#pragma unroll
            for (int step = 0; step < (Q_STAYS ? STEPS : 0); step++) {
                load_rows<MT, QK_PITCH>(q[step], row * QK_PITCH, step);
            }
        }

        Sum sums[MT][Bc / 2];
        float s[MT][Bc / 2];
        multiply_qk<MT, QK_PITCH, Bc, Q_STAYS>(sums, q, row * QK_PITCH, AT_K + buffer * K_BYTES);
        const bool partial = is_partial<Bc>(work, j), hiding = HIDING && (BIAS || MASK || partial);
#pragma unroll
        for (int i = 0; i < MT; i++) {
            soften<Bc, ZERO>(s[i], sums[i], rows[i], p, head, head, j * Bc, AT_K_SCALE + buffer * Bc * 4, partial,
                             hiding && !CODED_P);
            if (warp_any(rows[i].alpha[0] != 1.f || rows[i].alpha[1] != 1.f)) {  // seldom after the first tiles
#pragma unroll
                for (int n = 0; n < DV / 2; n++) o[i][n] *= rows[i].alpha[n / 2 % 2];
            }
        }

        copy_wait<1>();
        barrier();  // V is there
        if constexpr (CODED_P) {
#pragma unroll
            for (int i = 0; i < MT; i++) scale_to_codes<Bc>(s[i], rows[i], AT_V_SCALE);
            multiply_codes<MT, DV, Bc>(o, s, rows, AT_V);
        } else {
            multiply_pv<MT, DV, Bc>(o, s, AT_V, hiding);
        }
    }

    const float* sink = p.sinks ? p.sinks + work.h : 0;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float sum = row_sum(rows[i].l[h]);
            const int r = rows[i].i[h];
            if (r >= p.Lq) continue;
            const float top = natural(rows[i].m[h], log2_unit(rows[i].factor[h]), rows[i].shift[h]);
            const Finish end = finish(top, sum, sink);
            const long long at = work.b * p.out_stride[0] + work.h * p.out_stride[1] + r * p.out_stride[2];
#pragma unroll
            for (int n = 0; n < DV / 16; n++)
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    const int channel = first + channel_of(n, pair);
                    const float x = o[i][first_of(n, pair) + 2 * h], y = o[i][second_of(n, pair) + 2 * h];
                    if (channel >= p.D) continue;
                    store_pair<OUT_TYPE>(p.out, at + channel, x * end.factor, y * end.factor, p.D - channel);
                }
            if (p.lse && lane % 4 == 0 && first == 0) p.lse[((long long)work.b * p.H + work.h) * p.Lq + r] = end.lse;
        }
}
