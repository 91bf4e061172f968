// Attention on the tensor cores of compute capability 9.0, after FlashAttention-3: float16 and bfloat16; int8 q and k
// with v in 16 bits or int8.
//
//     warpgroup 0       its first warp brings Q and K to shared memory, with what scales them, its second one V, in
//                       rings of STAGES tiles
//     the other ones    64 query rows each: S = Q K^T and O = O + P V by wgmma, P = softmax between them in registers
//
// While P V of one tile is made, so is Q K^T of the next one, and then its softmax; two consumers take turns to start
// products, so that one's softmax runs beside the other's products.
// Copies and products meet at mbarriers: FULL (a tile has landed), EMPTY (all warps of consumers have done with it).
// Tiles lie in panels of 128 bytes of each row (64 where D has no more), swizzled as tensor maps and wgmma agree.
//
// int8 v comes transposed (turned.cu), since wgmma takes codes only along their rows: a tile is D rows of Bc keys. The
// weights are codes as well, of each tile by itself, as in mma.cu.
// Registers of a lane: O D / 2, S Bc / 2, P Bc / 4 (codes: Bc / 8, and 32 sums).
#include "hopper_values.cuh"

constexpr int D = HEAD_DIM, Br = BLOCK_Q, Bc = BLOCK_K;
constexpr int GROUPS = Br / 64, THREADS = (GROUPS + 1) * 128;  // consumers; and the producer
constexpr bool CAREFUL = HIDING && !CODED_P;

// Panels: bytes of a row, how many, elements of a row.
constexpr int PITCH = D * QK_SIZE < 128 ? 64 : 128, PANELS = D * QK_SIZE / PITCH, COLUMNS = PITCH / QK_SIZE;
constexpr int V_PANELS = CODED_P ? 1 : D * V_SIZE / V_PITCH, TURNED_PITCH = CODED_P ? Bc : V_PITCH;
constexpr u32 Q_BYTES = Br * D * QK_SIZE, K_BYTES = Bc * D * QK_SIZE, V_BYTES = Bc * D * V_SIZE;
constexpr u32 SCALE_BYTES = CODES ? (CODED_P ? 2 : 1) * Bc * 4 : 0;  // of K, then of V, of a tile
constexpr u32 AT_K = Q_BYTES, AT_V = AT_K + STAGES * K_BYTES, AT_SCALES = AT_V + STAGES * V_BYTES;
constexpr u32 Q_FULL = AT_SCALES + STAGES * SCALE_BYTES, K_FULL = Q_FULL + 8, K_EMPTY = K_FULL + 8 * STAGES;
constexpr u32 V_FULL = K_EMPTY + 8 * STAGES, V_EMPTY = V_FULL + 8 * STAGES;
constexpr int STEPS = CODED_P ? Bc / 32 : Bc / 16;  // of P, four registers each
constexpr int TURNS = 1, LOOKS = TURNS + GROUPS;  // first named barriers: whose turn it is; of one group
// What warpgroups ask for is what the block has, or a consumer waits for ever: 384 threads start with 168 registers each.
constexpr int REGISTERS = 65536 / THREADS / 8 * 8 * (GROUPS + 1);
static_assert(PRODUCER_REGISTERS + GROUPS * CONSUMER_REGISTERS <= REGISTERS, "registers");
static_assert(D % 64 == 0 && Br % 64 == 0 && (Bc == 64 || Bc == 128), "tiles");

// Where tile n of a block lies in a ring, and the parity of its phase.
DEVICE int stage(int n) { return n % STAGES; }
DEVICE u32 parity(int n) { return n / STAGES & 1; }

// ---- the producer

template <int COUNT, int WIDTH, u32 PANEL_BYTES>
DEVICE void copy_panels(u32 to, const TensorMap& map, u32 full, int row, int head, int batch) {
    mbarrier_arrive_expect(full, COUNT * PANEL_BYTES);
#pragma unroll
    for (int i = 0; i < COUNT; i++) tensor_copy(to + i * PANEL_BYTES, map, full, i * WIDTH, row, head, batch);
}

// What scales the keys of a tile; every lane of a warp does its part, and arrives.
DEVICE void copy_scales(u32 to, const float* scale, const long long* stride, const Work& work, int first, int keys) {
    const float* from = scale + work.b * stride[0] + work.kv * stride[1];
    float x[Bc / 32];
#pragma unroll
    for (int i = 0; i < Bc / 32; i++) {
        const int key = first + i * 32 + thread_index() % 32;
        x[i] = key < keys ? float_of(load_bits<4>((const char*)(from + key * stride[2]))) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < Bc / 32; i++) shared_store(to + (i * 32 + thread_index() % 32) * 4, x[i]);
}

DEVICE void bring_k(const Params& p, const Work& work, const TensorMap& map, int tile) {
    const int n = tile - work.begin, i = stage(n);
    const u32 full = K_FULL + 8 * i, scales = AT_SCALES + i * SCALE_BYTES;
    mbarrier_wait(K_EMPTY + 8 * i, parity(n) ^ 1);
    if (thread_index() % 32 == 0) {
        copy_panels<PANELS, COLUMNS, Bc * PITCH>(AT_K + i * K_BYTES, map, full, tile * Bc, work.kv, work.b);
    }
    if (CODES) {
        copy_scales(scales, p.k_scale, p.k_scale_stride, work, tile * Bc, p.Lk);
        if (CODED_P) copy_scales(scales + Bc * 4, p.v_scale, p.v_scale_stride, work, tile * Bc, p.Lk);
        mbarrier_arrive(full);
    }
}

DEVICE void bring_v(const Work& work, const TensorMap& map, int tile) {
    const int n = tile - work.begin, i = stage(n);
    const u32 full = V_FULL + 8 * i, to = AT_V + i * V_BYTES;
    mbarrier_wait(V_EMPTY + 8 * i, parity(n) ^ 1);
    if constexpr (CODED_P) {
        mbarrier_arrive_expect(full, V_BYTES);
        tensor_copy(to, map, full, tile * Bc, 0, work.kv, work.b);
    } else {
        copy_panels<V_PANELS, V_PITCH / V_SIZE, Bc * V_PITCH>(to, map, full, tile * Bc, work.kv, work.b);
    }
}

DEVICE void produce(const Params& p, const Work& work, const Maps& maps) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    if (work.begin >= work.end) return;
    if (warp == 0) {
        if (lane == 0) copy_panels<PANELS, COLUMNS, Br * PITCH>(0, maps.q, Q_FULL, work.row, work.h, work.b);
        for (int j = work.begin; j < work.end; j++) {
            if (CODES || lane == 0) bring_k(p, work, maps.k, j);
        }
    } else if (warp == 1 && lane == 0) {
        for (int j = work.begin; j < work.end; j++) bring_v(work, maps.v, j);
    }
}

// ---- a consumer

// This warp has done with a tile.
DEVICE void release(u32 empty) {
    if (thread_index() % 32 == 0) mbarrier_arrive(empty);
}

// Starts S = Q K^T of tile n, when it is there.
DEVICE void start_qk(Sum (&s)[Bc / 2], int group, int n) {
    mbarrier_wait(K_FULL + 8 * stage(n), parity(n));
    const u64 q = operand<PITCH>(group * 64 * PITCH), k = operand<PITCH>(AT_K + stage(n) * K_BYTES);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D * QK_SIZE / 32; step++) {
        const int panel = step / (PITCH / 32), inside = step % (PITCH / 32) * 32;
        wgmma<QK_TYPE>(s, onward(q, panel * Br * PITCH + inside), onward(k, panel * Bc * PITCH + inside), step > 0);
    }
    wgmma_commit();
}

// Starts O += P V of tile n, when it is there.
template <int TYPE> DEVICE void start_pv(float (&o)[D / 2], const u32 (&w)[STEPS][4], int n) {
    const u32 at = AT_V + stage(n) * V_BYTES;
    mbarrier_wait(V_FULL + 8 * stage(n), parity(n));
    const u64 v = operand<V_PITCH>(at, Bc * V_PITCH);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Bc / 16; step++) wgmma<TYPE>(o, w[step], onward(v, step * 16 * V_PITCH), true);
    wgmma_commit();
}

// Starts P V of codes of tile n, when it is there: exact sums over the tile, 64 channels each.
DEVICE void start_codes(int (&sums)[D / 64][32], const u32 (&w)[STEPS][4], int n) {
    mbarrier_wait(V_FULL + 8 * stage(n), parity(n));
    const u64 v = operand<TURNED_PITCH>(AT_V + stage(n) * V_BYTES);
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < D / 64; part++)
#pragma unroll
        for (int step = 0; step < Bc / 32; step++) {
            wgmma<I8>(sums[part], w[step], onward(v, part * 64 * TURNED_PITCH + step * 32), step > 0);
        }
    wgmma_commit();
}

// O = alpha O; alpha is seldom not 1 after the first tiles.
DEVICE void rescale_o(float (&o)[D / 2], const float (&alpha)[2]) {
    if (!warp_any(alpha[0] != 1.f || alpha[1] != 1.f)) return;
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] *= alpha[i / 2 % 2];
}

// What a tile's weights make of O when its sums are there, by what they were at its softmax.
struct Step {
    float alpha[2], worth[2];
};
DEVICE Step step_of(const Rows& rows) { return {{rows.alpha[0], rows.alpha[1]}, {rows.worth[0], rows.worth[1]}}; }
DEVICE void add_codes(float (&o)[D / 2], const int (&sums)[D / 64][32], const Step& step) {
    rescale_o(o, step.alpha);
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] = fmaf(step.worth[i / 2 % 2], (float)sums[i / 32][i % 32], o[i]);
}

// Whether rows may not see all keys of a tile.
DEVICE bool hides(const Work& work, int tile) { return BIAS || MASK || is_partial<Bc>(work, tile); }

// The weights of tile n.
DEVICE void soften_tile(float (&s)[Bc / 2], const Sum (&sums)[Bc / 2], Rows& rows, const Params& p,
                        const Work& work, const Head& head, int n) {
    const int tile = work.begin + n;
    const u32 scales = AT_SCALES + stage(n) * SCALE_BYTES;
    soften<Bc, 0>(s, sums, rows, p, head, head, tile * Bc, scales, is_partial<Bc>(work, tile), false);
    if (CODED_P) scale_to_codes<Bc>(s, rows, scales + Bc * 4);
    if (CODES) release(K_EMPTY + 8 * stage(n));
}
DEVICE void pack_tile(u32 (&w)[STEPS][4], const float (&s)[Bc / 2]) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) pack_weights(w[step], s + step * (Bc / 2 / STEPS));
}

// Two consumers start their products in turns.
DEVICE void wait_for_turn(int group) {
    if (GROUPS == 2) named_barrier(TURNS + group, 256);
}
DEVICE void give_turn(int to) {
    if (GROUPS == 2) named_barrier_arrive(TURNS + to, 256);
}

DEVICE void write(const Params& p, const Work& work, const Rows& rows, const float (&o)[D / 2]) {
    const int t = thread_index() % 4;
    const float* sink = p.sinks ? p.sinks + work.h : 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float sum = row_sum(rows.l[h]);
        const int r = rows.i[h];
        if (r >= p.Lq) continue;
        const Finish end = finish(natural(rows.m[h], log2_unit(rows.factor[h]), rows.shift[h]), sum, sink);
        const long long at = work.b * p.out_stride[0] + work.h * p.out_stride[1] + r * p.out_stride[2];
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const int channel = n * 8 + 2 * t;
            if (channel >= p.D) continue;
            const float x = o[4 * n + 2 * h] * end.factor, y = o[4 * n + 2 * h + 1] * end.factor;
            store_pair<OUT_TYPE>(p.out, at + channel, x, y, p.D - channel);
        }
        if (p.lse && t == 0) p.lse[((long long)work.b * p.H + work.h) * p.Lq + r] = end.lse;
    }
}

// Whether values of tile n may reach rows that must not see them.
template <int TYPE> DEVICE bool leaks(const Work& work, int group, int n) {
    if (!CAREFUL || !hides(work, work.begin + n)) return false;
    mbarrier_wait(V_FULL + 8 * stage(n), parity(n));
    return warpgroup_any(holds_not_finite<TYPE, V_BYTES, 128>(AT_V + stage(n) * V_BYTES), LOOKS + group);
}

// Tiles from n on by mma.sync, 16 keys at a time.
template <int TYPE> DEVICE void go_on_slowly(float (&o)[D / 2], Rows& rows, const Params& p, const Work& work,
                                             const Head& head, int group, int n) {
    const u32 q = (group * 64 + thread_index() / 32 % 4 * 16) * PITCH;
    for (; n < work.end - work.begin; n++) {
        const int i = stage(n), tile = work.begin + n;
        mbarrier_wait(K_FULL + 8 * i, parity(n));
        mbarrier_wait(V_FULL + 8 * i, parity(n));
#pragma unroll 1
        for (int key = 0; key < Bc; key += 16) {
            Sum sums[8];
            float s[8];
            u32 w[4], seen[4];
            multiply_qk_slowly<QK_TYPE, PITCH, Br, Bc, D * QK_SIZE>(sums, q, AT_K + i * K_BYTES + key * PITCH);
            soften<16, 0>(s, sums, rows, p, head, head, tile * Bc + key, AT_SCALES + i * SCALE_BYTES + key * 4,
                          is_partial<Bc>(work, tile), true);
            pack_seen(seen, s);
            pack_weights(w, s);
#pragma unroll
            for (int e = 0; e < D / 2; e++) o[e] *= rows.alpha[e / 2 % 2];
            multiply_pv_slowly<TYPE, D, Bc>(o, w, seen, AT_V + i * V_BYTES + key * V_PITCH);
        }
        release(K_EMPTY + 8 * i);
        release(V_EMPTY + 8 * i);
    }
}

template <int TYPE> DEVICE void consume(const Params& p, const Work& work) {
    const int group = thread_index() / 128 - 1, tiles = work.end - work.begin;
    const Head head = make_head(p, work.b, work.h);
    Rows rows;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int i = group * 64 + thread_index() / 32 % 4 * 16 + thread_index() % 32 / 4 + 8 * h;
        begin_row(rows, h, p, work.b, work.h, work.row + i);
    }
    float o[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] = 0.f;
    int n = 0;  // tiles that are done, but for the last one's values
    if (tiles > 0) mbarrier_wait(Q_FULL, 0);
    if (tiles > 0 && !leaks<TYPE>(work, group, 0)) {
        Sum sums[Bc / 2];
        float s[Bc / 2];
        u32 w[STEPS][4];
        if (group == 1) give_turn(0);
        wait_for_turn(group);
        start_qk(sums, group, 0);
        give_turn(1 - group);
        wgmma_wait<0>(sums);
        if (!CODES) release(K_EMPTY);
        soften_tile(s, sums, rows, p, work, head, 0);
        pack_tile(w, s);
        int codes[D / 64][32];  // P V of a tile, if of codes
        for (n = 1; n < tiles && !leaks<TYPE>(work, group, n); n++) {
            const Step step = step_of(rows);  // of tile n - 1
            wait_for_turn(group);
            start_qk(sums, group, n);
            if constexpr (TYPE == I8) {
                start_codes(codes, w, n - 1);
            } else {
                start_pv<TYPE>(o, w, n - 1);
            }
            give_turn(1 - group);
            wgmma_wait<1>(sums);
            if (!CODES) release(K_EMPTY + 8 * stage(n));
            soften_tile(s, sums, rows, p, work, head, n);
            worked_out(rows.l[0] + rows.l[1]);
            if constexpr (TYPE == I8) {
                wgmma_wait<0>(codes);
            } else {
                wgmma_wait<0>(o);
            }
            release(V_EMPTY + 8 * stage(n - 1));
            if constexpr (TYPE == I8) {
                add_codes(o, codes, step);
            } else {
                rescale_o(o, rows.alpha);
            }
            pack_tile(w, s);
        }
        if (group == 0) wait_for_turn(0);  // the other one's last turn
        if constexpr (TYPE == I8) {
            start_codes(codes, w, n - 1);
            wgmma_wait<0>(codes);
            add_codes(o, codes, step_of(rows));
        } else {
            start_pv<TYPE>(o, w, n - 1);
            wgmma_wait<0>(o);
        }
        release(V_EMPTY + 8 * stage(n - 1));
    }
    if constexpr (CAREFUL) go_on_slowly<TYPE>(o, rows, p, work, head, group, n);
    write(p, work, rows, o);
}

HOPPER_KERNEL(cyflash_hopper, THREADS) {
    if (thread_index() == 0) {
        mbarrier_init(Q_FULL, 1);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(K_FULL + 8 * i, CODES ? 33 : 1);  // the copies; the lanes that bring scales
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
        produce(p, work, maps);
    } else {
        registers_up<CONSUMER_REGISTERS>();
        consume<V_TYPE>(p, work);
    }
}
