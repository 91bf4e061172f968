// Attention on the tensor cores of compute capability 9.0, after FlashAttention-3: float16 and bfloat16.
//
//     warpgroup 0       its first warp copies Q and K to shared memory, its second one V, in a ring of STAGES tiles each
//     the other ones    64 query rows each: S = Q K^T and O = O + P V by wgmma, P = softmax between them in registers
//
// While the product of P and V of one tile runs, so does Q K^T of the next one, and then its softmax.
// A warpgroup's copies and products meet at mbarriers: FULL (a tile has landed), EMPTY (all consumers have done with it).
// Tiles lie in panels of 128 bytes of each row, swizzled as tensor maps and wgmma agree.
// Shared memory: Br D + 2 STAGES Bc D numbers, barriers. Registers of a lane: O D / 2, S Bc / 2, P Bc / 4.
#include "hopper.cuh"
#include "options.cuh"
#include "types.cuh"

constexpr int D = HEAD_DIM, Br = BLOCK_Q, Bc = BLOCK_K;
constexpr int GROUPS = Br / 64, THREADS = (GROUPS + 1) * 128;  // consumers; and the producer
constexpr int SIZE = size_of(QK_TYPE), PITCH = 128, PANELS = D * SIZE / PITCH;
constexpr int COLUMNS = PITCH / SIZE;                          // of a panel
constexpr u32 Q_BYTES = PANELS * Br * PITCH, K_BYTES = PANELS * Bc * PITCH, V_BYTES = K_BYTES;
constexpr u32 AT_K = Q_BYTES, AT_V = AT_K + STAGES * K_BYTES, AT_BARRIERS = AT_V + STAGES * V_BYTES;
constexpr u32 Q_FULL = AT_BARRIERS, K_FULL = Q_FULL + 8, K_EMPTY = K_FULL + 8 * STAGES;
constexpr u32 V_FULL = K_EMPTY + 8 * STAGES, V_EMPTY = V_FULL + 8 * STAGES;
static_assert(D % COLUMNS == 0 && Br % 64 == 0, "tiles");

template <int TYPE, int R, class A> DEVICE void wgmma(float (&d)[R], const A& a, u64 b, bool add) {
    if constexpr (TYPE == BF16) {
        wgmma_bf16(d, a, b, add);
    } else {
        wgmma_f16(d, a, b, add);
    }
}

// Where tile n of a block lies in a ring, and the parity of its phase.
DEVICE int stage(int n) { return n % STAGES; }
DEVICE u32 parity(int n) { return n / STAGES & 1; }

template <u32 PANEL_BYTES>
DEVICE void copy_panels(u32 to, const TensorMap& map, u32 full, int row, int head, int batch) {
    mbarrier_arrive_expect(full, PANELS * PANEL_BYTES);
#pragma unroll
    for (int i = 0; i < PANELS; i++) tensor_copy(to + i * PANEL_BYTES, map, full, i * COLUMNS, row, head, batch);
}

DEVICE void produce(const Work& work, const Maps& maps) {
    const int warp = thread_index() / 32;
    if (thread_index() % 32 != 0 || warp > 1 || work.begin >= work.end) return;
    if (warp == 0) copy_panels<Br * PITCH>(0, maps.q, Q_FULL, work.row, work.h, work.b);
    for (int j = work.begin; j < work.end; j++) {
        const int n = j - work.begin, i = stage(n);
        if (warp == 0) {
            mbarrier_wait(K_EMPTY + 8 * i, parity(n) ^ 1);
            copy_panels<Bc * PITCH>(AT_K + i * K_BYTES, maps.k, K_FULL + 8 * i, j * Bc, work.kv, work.b);
        } else {
            mbarrier_wait(V_EMPTY + 8 * i, parity(n) ^ 1);
            copy_panels<Bc * PITCH>(AT_V + i * V_BYTES, maps.v, V_FULL + 8 * i, j * Bc, work.kv, work.b);
        }
    }
}

// This warp has done with a tile.
DEVICE void release(u32 empty) {
    if (thread_index() % 32 == 0) mbarrier_arrive(empty);
}

// Starts S = Q K^T of tile n, when it is there.
DEVICE void start_qk(float (&s)[Bc / 2], int group, int n) {
    mbarrier_wait(K_FULL + 8 * stage(n), parity(n));
    const u64 q = operand<PITCH>(group * 64 * PITCH), k = operand<PITCH>(AT_K + stage(n) * K_BYTES);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D * SIZE / 32; step++) {
        const int panel = step / 4, inside = step % 4 * 32;
        wgmma<QK_TYPE>(s, onward(q, panel * Br * PITCH + inside), onward(k, panel * Bc * PITCH + inside), step > 0);
    }
    wgmma_commit();
}

// Starts O += P V of tile n, when it is there.
DEVICE void start_pv(float (&o)[D / 2], const u32 (&w)[Bc / 16][4], int n) {
    mbarrier_wait(V_FULL + 8 * stage(n), parity(n));
    const u64 v = operand<PITCH>(AT_V + stage(n) * V_BYTES, Bc * PITCH);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Bc / 16; step++) wgmma<V_TYPE>(o, w[step], onward(v, step * 16 * PITCH), true);
    wgmma_commit();
}

// The greatest, or the sum, of four lanes that share rows.
DEVICE float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// What a lane keeps of its two rows: row and row + 8.
struct Rows {
    int row;
    float m[2], l[2], alpha[2];  // alpha: what the last tile made of earlier weights
};

// The weights of a tile in place of its products.
DEVICE void soften(float (&s)[Bc / 2], Rows& rows, const Params& p, const Head& head, int j, bool partial) {
    const int t = thread_index() % 4;
    const float unit = log2_unit(p.scale);
#pragma unroll
    for (int n = 0; n < Bc / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float& x = s[4 * n + e];
            x = changed(x, p, head, rows.row + e / 2 * 8, j * Bc + n * 8 + 2 * t + e % 2, p.scale, 0.f, partial);
        }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = -INFINITY, sum = 0.f;
#pragma unroll
        for (int n = 0; n < Bc / 8; n++) top = fmaxf(top, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
        const float highest = fmaxf(rows.m[h], quad_max(top)), base = stand_in(highest);
        rows.alpha[h] = rescale<false>(rows.m[h], base, unit);
        rows.m[h] = highest;
#pragma unroll
        for (int n = 0; n < Bc / 8; n++)
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; e++) {
                s[4 * n + e] = weight<false>(s[4 * n + e], base, unit);
                sum += s[4 * n + e];
            }
        rows.l[h] = fmaf(rows.l[h], rows.alpha[h], sum);
    }
}

DEVICE void pack_weights(u32 (&w)[Bc / 16][4], const float (&s)[Bc / 2]) {
#pragma unroll
    for (int step = 0; step < Bc / 16; step++)
#pragma unroll
        for (int e = 0; e < 4; e++) w[step][e] = pack<V_TYPE>(s[8 * step + 2 * e], s[8 * step + 2 * e + 1]);
}

DEVICE void consume(const Params& p, const Work& work) {
    const int group = thread_index() / 128 - 1, t = thread_index() % 4;
    const Head head = make_head(p, work.b, work.h);
    Rows rows = {work.row + group * 64 + thread_index() / 32 % 4 * 16 + thread_index() % 32 / 4,
                 {-INFINITY, -INFINITY}, {0.f, 0.f}, {1.f, 1.f}};
    float s[Bc / 2], o[D / 2];
    u32 w[Bc / 16][4];
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] = 0.f;
    const int tiles = work.end - work.begin;
    if (tiles > 0) {
        mbarrier_wait(Q_FULL, 0);
        start_qk(s, group, 0);
        wgmma_wait<0>(s);
        release(K_EMPTY);
        soften(s, rows, p, head, work.begin, is_partial<Bc>(work, work.begin));
        pack_weights(w, s);
        for (int n = 1; n < tiles; n++) {
            start_qk(s, group, n);
            start_pv(o, w, n - 1);
            wgmma_wait<1>(s);
            release(K_EMPTY + 8 * stage(n));
            soften(s, rows, p, head, work.begin + n, is_partial<Bc>(work, work.begin + n));
            wgmma_wait<0>(o);
            release(V_EMPTY + 8 * stage(n - 1));
            pack_weights(w, s);
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[i] *= rows.alpha[i / 2 % 2];
        }
        start_pv(o, w, tiles - 1);
        wgmma_wait<0>(o);
    }

    const float* sink = p.sinks ? p.sinks + work.h : 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float sum = quad_sum(rows.l[h]);
        const int r = rows.row + 8 * h;
        if (r >= p.Lq) continue;
        const Finish end = finish(rows.m[h], sum, log2_unit(p.scale), 0.f, sink);
        const long long at = work.b * p.out_stride[0] + work.h * p.out_stride[1] + r * p.out_stride[2];
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const int channel = n * 8 + 2 * t;
            if (channel >= p.D) continue;
            store_pair<OUT_TYPE>(p.out, at + channel, o[4 * n + 2 * h] * end.factor, o[4 * n + 2 * h + 1] * end.factor, p.D - channel);
        }
        if (p.lse && t == 0) p.lse[((long long)work.b * p.H + work.h) * p.Lq + r] = end.lse;
    }
}

HOPPER_KERNEL(cyflash_hopper, THREADS) {
    if (thread_index() == 0) {
        mbarrier_init(Q_FULL, 1);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(K_FULL + 8 * i, 1);
            mbarrier_init(V_FULL + 8 * i, 1);
            mbarrier_init(K_EMPTY + 8 * i, GROUPS * 4);
            mbarrier_init(V_EMPTY + 8 * i, GROUPS * 4);
        }
        mbarrier_init_fence();
    }
    barrier();
    const Work work = make_work<Br, Bc>(p, block_index());
    if (thread_index() < 128) {
        registers_down<PRODUCER_REGISTERS>();
        produce(work, maps);
    } else {
        registers_up<CONSUMER_REGISTERS>();
        consume(p, work);
    }
}
