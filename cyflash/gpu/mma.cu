// Attention on tensor cores, after FlashAttention-2: float16 and bfloat16; int8 q and k with v in 16 bits or int8.
//
//     S = Q K^T     a warp has MT x 16 query rows; of 16 x 8 scores a lane has rows g, g + 8 and keys 2 t, 2 t + 1
//     P = softmax   a row lies in four lanes; P stays in the registers that S was in
//     O = O + P V   the accumulators of S are, packed, the left operand of this product
//
// K has two buffers and V one: while a tile is multiplied the next one is on its way. g = lane / 4, t = lane % 4.
// Of int8 v the weights are codes as well, of each tile of Bc = 64 keys by itself (block-local):
//     t = max_j s_j   e_j = 2^(s_j - t)   w_j = 255 e_j s_v[j]   omega = max_j w_j   p_j = rint(255 w_j / omega)
//     O = alpha O + 2^(t - m') omega / 255^2 sum_j p_j v_j
// Registers of a lane: O MT DV / 2, S MT Bc / 2, Q MT D / 2 (a quarter as much of int8) where it stays in registers.
#include "options.cuh"
#include "tiles.cuh"
#include "types.cuh"

constexpr int D = HEAD_DIM, DV = CHANNELS, PARTS = D / DV;        // a block computes DV channels of D
constexpr int Br = BLOCK_Q, Bc = BLOCK_K, WARPS = 4, THREADS = WARPS * 32;
constexpr int MT = Br / (WARPS * 16);                            // tiles of 16 rows of a warp
constexpr bool CODES = QK_TYPE == I8, CODED_P = V_TYPE == I8;
constexpr bool EXACT = CODES || !FOLDED;
constexpr int QK_SIZE = size_of(QK_TYPE), V_SIZE = size_of(V_TYPE);
constexpr int QK_PITCH = D * QK_SIZE, V_PITCH = DV * V_SIZE;
constexpr u32 K_BYTES = Bc * QK_PITCH, AT_K = Br * QK_PITCH, AT_V = AT_K + 2 * K_BYTES;
constexpr u32 AT_K_SCALE = AT_V + Bc * V_PITCH, AT_V_SCALE = AT_K_SCALE + 2 * Bc * 4;
constexpr int STEPS = QK_PITCH / 32;                             // of 32 bytes of head_dim
constexpr bool Q_STAYS = MT * STEPS <= 8 && D <= 128;            // at most 32 registers
static_assert(DV % 16 == 0 && D % DV == 0 && QK_PITCH % 32 == 0 && Br % 64 == 0 && Bc % 32 == 0, "tiles");

template <bool B, class X, class Y> struct Choose { typedef X type; };
template <class X, class Y> struct Choose<false, X, Y> { typedef Y type; };
typedef Choose<CODES, int, float>::type Sum;

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

// One step of head_dim of this warp's query rows.
DEVICE void load_q(u32 (&q)[MT][4], int step) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const u32 at = place<QK_PITCH>(warp * MT * 16 + lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < MT; i++) load_matrices(q[i], moved<QK_PITCH>(at, step * 2) + i * 16 * QK_PITCH);
}

DEVICE void multiply_qk(Sum (&s)[MT][Bc / 8][4], const u32 (&kept)[Q_STAYS ? STEPS : 1][MT][4], u32 k) {
    const int lane = thread_index() % 32;
    const u32 at = k + place<QK_PITCH>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int n = 0; n < Bc / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[i][n][e] = CODES ? ZERO : 0;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 q[MT][4];
        if (Q_STAYS) {
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) q[i][e] = kept[Q_STAYS ? step : 0][i][e];
        } else {
            load_q(q, step);
        }
#pragma unroll
        for (int n = 0; n < Bc / 16; n++) {
            u32 b[4];
            load_matrices(b, moved<QK_PITCH>(at, step * 2) + n * 16 * QK_PITCH);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                mma<QK_TYPE>(s[i][2 * n], q[i], b[0], b[1]);
                mma<QK_TYPE>(s[i][2 * n + 1], q[i], b[2], b[3]);
            }
        }
    }
}

// Adds what values that are NaN or infinite give to the rows that see them. seen: 1 for each key that a row sees.
DEVICE void add_infinite(float (&o)[4], const u32 (&seen)[4], u32 v0, u32 v1, u32 bad0, u32 bad1) {
    float positive[4] = {0, 0, 0, 0}, negative[4] = {0, 0, 0, 0};
    mma<V_TYPE>(positive, seen, is_infinite<V_TYPE>(v0, bad0, false), is_infinite<V_TYPE>(v1, bad1, false));
    mma<V_TYPE>(negative, seen, is_infinite<V_TYPE>(v0, bad0, true), is_infinite<V_TYPE>(v1, bad1, true));
#pragma unroll
    for (int e = 0; e < 4; e++) {
        if (positive[e] > 0.f) o[e] += INFINITY;
        if (negative[e] > 0.f) o[e] -= INFINITY;  // NaN counts as both
    }
}

// O += P V in 16 bits. hiding: weights of 0 are of hidden keys, whose values may be NaN or infinite.
DEVICE void multiply_pv(float (&o)[MT][DV / 8][4], const float (&w)[MT][Bc / 8][4], bool hiding) {
    const int lane = thread_index() % 32;
    const u32 at = AT_V + place<V_PITCH>(lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < Bc / 16; step++) {
        u32 a[MT][4];
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float(&x)[4] = w[i][2 * step + e / 2];
                a[i][e] = pack<V_TYPE>(x[e % 2 * 2], x[e % 2 * 2 + 1]);
            }
#pragma unroll
        for (int n = 0; n < DV / 16; n++) {
            u32 b[4];
            load_matrices_transposed(b, moved<V_PITCH>(at, n * 2) + step * 16 * V_PITCH);
            if (HIDING && hiding) {
                u32 bad[4], any = 0;
#pragma unroll
                for (int e = 0; e < 4; e++) any |= bad[e] = not_finite<V_TYPE>(b[e]);
                if (warp_any(any != 0)) {
#pragma unroll
                    for (int i = 0; i < MT; i++) {
                        u32 seen[4];
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            const float(&x)[4] = w[i][2 * step + e / 2];
                            const float low = x[e % 2 * 2] != 0.f, high = x[e % 2 * 2 + 1] != 0.f;
                            seen[e] = pack<V_TYPE>(low, high);
                        }
                        add_infinite(o[i][2 * n], seen, b[0], b[1], bad[0], bad[1]);
                        add_infinite(o[i][2 * n + 1], seen, b[2], b[3], bad[2], bad[3]);
                    }
#pragma unroll
                    for (int e = 0; e < 4; e++) b[e] &= ~bad[e];
                }
            }
#pragma unroll
            for (int i = 0; i < MT; i++) {
                mma<V_TYPE>(o[i][2 * n], a[i], b[0], b[1]);
                mma<V_TYPE>(o[i][2 * n + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// O += worth P V of codes: exact sums over the tile. Keys come in the order in which lanes have their weights: of 32
// keys lane t has 2 t, 2 t + 1 of each eight, and so do the transposed matrices. Two channels lie beside each other in
// a register: even ones go to o[2 n], odd ones to o[2 n + 1].
DEVICE void multiply_codes(float (&o)[MT][DV / 8][4], const float (&w)[MT][Bc / 8][4], const float (&worth)[MT][2]) {
    const int lane = thread_index() % 32;
    const u32 at = AT_V + place<V_PITCH>(lane, 0);
    u32 a[MT][Bc / 32][4];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int step = 0; step < Bc / 32; step++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float(&x)[4] = w[i][4 * step + e / 2 * 2], (&y)[4] = w[i][4 * step + e / 2 * 2 + 1];
                a[i][step][e] = pack_u8(x[e % 2 * 2], x[e % 2 * 2 + 1], y[e % 2 * 2], y[e % 2 * 2 + 1]);
            }
#pragma unroll
    for (int n = 0; n < DV / 16; n++) {
        int even[MT][4], odd[MT][4];
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) even[i][e] = odd[i][e] = ZERO;
#pragma unroll
        for (int step = 0; step < Bc / 32; step++) {
            u32 v[4];
            load_matrices_transposed(v, moved<V_PITCH>(at, n) + step * 32 * V_PITCH);
            const u32 even0 = choose_bytes(v[0], v[1], 0x6420), even1 = choose_bytes(v[2], v[3], 0x6420);
            const u32 odd0 = choose_bytes(v[0], v[1], 0x7531), odd1 = choose_bytes(v[2], v[3], 0x7531);
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
                o[i][2 * n][e] = fmaf(worth[i][e / 2], sum_of(even[i][e]), o[i][2 * n][e]);
                o[i][2 * n + 1][e] = fmaf(worth[i][e / 2], sum_of(odd[i][e]), o[i][2 * n + 1][e]);
            }
    }
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

KERNEL(cyflash_mma, THREADS, BLOCKS) {
    const int warp = thread_index() / 32, lane = thread_index() % 32, g = lane / 4, t = lane % 4;
    const Work work = make_work<Br, Bc>(p, block_index() / PARTS);
    const int first = block_index() % PARTS * DV;   // channel
    const Head head = make_head(p, work.b, work.h);
    const int row = work.row + warp * MT * 16 + g;  // of this lane: row + 16 i + 8 h
    if (work.begin < work.end) {
        copy<Br, QK_SIZE, D>(0, p.q, p.q_stride, work.b, work.h, work.row, p.Lq, 0, p);
        copy_k(p, work, work.begin, 0);
    }
    copy_commit();

    float factor[MT][2], shift[MT][2], m[MT][2], l[MT][2], o[MT][DV / 8][4];
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const long long r = min(row + 16 * i + 8 * h, p.Lq - 1);
            const long long at = work.b * p.q_scale_stride[0] + work.h * p.q_scale_stride[1] + r * p.q_scale_stride[2];
            factor[i][h] = CODES ? p.scale * p.q_scale[at] : p.scale;
            shift[i][h] = CODES && p.shift ? p.shift[((long long)work.b * p.H + work.h) * p.Lq + r] : 0.f;
            m[i][h] = -INFINITY;
            l[i][h] = 0.f;
        }
#pragma unroll
        for (int n = 0; n < DV / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[i][n][e] = 0.f;
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
            for (int step = 0; step < (Q_STAYS ? STEPS : 0); step++) load_q(q[step], step);
        }

        Sum sums[MT][Bc / 8][4];
        multiply_qk(sums, q, AT_K + buffer * K_BYTES);

        float s[MT][Bc / 8][4], alpha[MT][2], worth[MT][2];
        const bool partial = is_partial<Bc>(work, j), hiding = BIAS || MASK || partial;
#pragma unroll
        for (int n = 0; n < Bc / 8; n++) {
            float k_scale[2] = {1.f, 1.f};
            if (CODES) shared_load(k_scale, AT_K_SCALE + (buffer * Bc + n * 8 + 2 * t) * 4);
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float x = CODES ? sum_of(sums[i][n][e]) * k_scale[e % 2] : sums[i][n][e];
                    s[i][n][e] = changed(x, p, head, row + 16 * i + e / 2 * 8, j * Bc + n * 8 + 2 * t + e % 2,
                                         factor[i][e / 2], shift[i][e / 2], partial);
                }
        }
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float top = -INFINITY, sum = 0.f;
#pragma unroll
                for (int n = 0; n < Bc / 8; n++) top = fmaxf(top, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
                top = quad_max(top);
                const float unit = log2_unit(factor[i][h]), highest = fmaxf(m[i][h], top);
                const float base = stand_in(CODED_P ? top : highest);
                alpha[i][h] = rescale<EXACT>(m[i][h], stand_in(highest), unit);
                worth[i][h] = CODED_P ? rescale<EXACT>(top, stand_in(highest), unit) : 1.f;
                m[i][h] = highest;
#pragma unroll
                for (int n = 0; n < Bc / 8; n++)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++) {
                        const bool hidden = s[i][n][e] == -INFINITY;
                        s[i][n][e] = weight<EXACT>(s[i][n][e], base, unit);
                        sum += s[i][n][e];
                        if (HIDING && !CODED_P && hiding && !hidden) s[i][n][e] = max_nan(s[i][n][e], SMALLEST_WEIGHT);
                    }
                l[i][h] = fmaf(l[i][h], alpha[i][h], sum * worth[i][h]);
            }
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int n = 0; n < DV / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) o[i][n][e] *= alpha[i][e / 2];

        copy_wait<1>();
        barrier();  // V is there
        if constexpr (CODED_P) {
#pragma unroll
            for (int n = 0; n < Bc / 8; n++) {
                float v_scale[2];
                shared_load(v_scale, AT_V_SCALE + (n * 8 + 2 * t) * 4);
#pragma unroll
                for (int i = 0; i < MT; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) s[i][n][e] *= 255.f * v_scale[e % 2];
            }
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float omega = 256.f * 1.17549435e-38f;  // the least of which 255 / omega is finite
#pragma unroll
                    for (int n = 0; n < Bc / 8; n++) omega = fmaxf(omega, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
                    omega = quad_max(omega);
                    const float code = 255.f * reciprocal(omega);
                    worth[i][h] *= omega * (1.f / (255.f * 255.f));
#pragma unroll
                    for (int n = 0; n < Bc / 8; n++)
#pragma unroll
                        for (int e = 2 * h; e < 2 * h + 2; e++) s[i][n][e] *= code;
                }
            multiply_codes(o, s, worth);
        } else {
            multiply_pv(o, s, hiding);
        }
    }

    const float* sink = p.sinks ? p.sinks + work.h : 0;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float sum = quad_sum(l[i][h]);
            const int r = row + 16 * i + 8 * h;
            if (r >= p.Lq) continue;
            const Finish end = finish(natural(m[i][h], log2_unit(factor[i][h]), shift[i][h]), sum, sink);
            const long long at = work.b * p.out_stride[0] + work.h * p.out_stride[1] + r * p.out_stride[2];
#pragma unroll
            for (int n = 0; n < DV / 16; n++)
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    const int channel = first + n * 16 + (CODED_P ? 4 * t + 2 * pair : 8 * pair + 2 * t);
                    const float x = CODED_P ? o[i][2 * n][2 * h + pair] : o[i][2 * n + pair][2 * h];
                    const float y = CODED_P ? o[i][2 * n + 1][2 * h + pair] : o[i][2 * n + pair][2 * h + 1];
                    if (channel >= p.D) continue;
                    store_pair<OUT_TYPE>(p.out, at + channel, x * end.factor, y * end.factor, p.D - channel);
                }
            if (p.lse && t == 0 && first == 0) p.lse[((long long)work.b * p.H + work.h) * p.Lq + r] = end.lse;
        }
}
