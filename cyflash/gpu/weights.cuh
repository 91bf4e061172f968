// What the kernels on tensor cores do between their two products: from the products of query rows and a tile's keys to
// weights, in registers.
//
// Sums, scores and weights lie as mma and wgmma leave sums: lane 4 g + t of a warp has rows g and g + 8, and of each
// eight keys 2 t and 2 t + 1; x[4 n + e] is of row g + e / 2 * 8 and key 8 n + 2 t + e % 2. A row lies in four lanes.
//
// Of int8 v the weights become codes, of each tile by itself (block-local):
//     t = max_j s_j   e_j = 2^(s_j - t)   w_j = e_j s_v[j]   omega = max_j w_j   p_j = rint(255 w_j / omega)
//     O = alpha O + 2^(t - m') omega / 255 sum_j p_j v_j
#pragma once
#include "options.cuh"
#include "types.cuh"

constexpr bool CODES = QK_TYPE == I8, CODED_P = V_TYPE == I8, EXACT = CODES || !FOLDED;
constexpr int QK_SIZE = size_of(QK_TYPE), V_SIZE = size_of(V_TYPE);
typedef SumOf<QK_TYPE>::type Sum;

// What a lane keeps of its two rows.
struct Rows {
    int i[2];                   // where they are in their heads; beyond the last one where there is no such row
    float factor[2], shift[2];  // of changed()
    float m[2], l[2];
    float alpha[2];             // what the last tile made of earlier weights
    float worth[2];             // CODED_P: of a code of the last tile
};

DEVICE void begin_row(Rows& rows, int which, const Params& p, int b, int h, int i) {
    const long long r = min(i, p.Lq - 1);
    const long long at = b * p.q_scale_stride[0] + h * p.q_scale_stride[1] + r * p.q_scale_stride[2];
    rows.i[which] = i;
    rows.factor[which] = CODES ? p.scale * p.q_scale[at] : p.scale;
    rows.shift[which] = CODES && p.shift ? p.shift[((long long)b * p.H + h) * p.Lq + r] : 0.f;
    rows.m[which] = -INFINITY;
    rows.l[which] = 0.f;
    rows.alpha[which] = rows.worth[which] = 1.f;
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

// s = weights of KEYS keys, from their products; ZERO_SUM: what sums of codes begin with. head0, head1: of the two rows. k_scales: where those of the keys lie.
// mark: a visible key weighs at least SMALLEST_WEIGHT, so that 0 tells a hidden one.
template <int KEYS, int ZERO_SUM> DEVICE void soften(
    float (&s)[KEYS / 2], const Sum (&sums)[KEYS / 2], Rows& rows, const Params& p, const Head& head0,
    const Head& head1, int first_key, u32 k_scales, bool partial, bool mark
) {
    const int key = first_key + thread_index() % 4 * 2;  // of s[0]
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        float k_scale[2] = {1.f, 1.f};
        if (CODES) shared_load(k_scale, k_scales + (key - first_key + n * 8) * 4);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float sum = sum_of<ZERO_SUM>(sums[4 * n + e]);
            s[4 * n + e] = CODES ? sum * k_scale[e % 2] : sum;
        }
    }
    if (negated(p)) {
#pragma unroll
        for (int n = 0; n < KEYS / 2; n++) s[n] = -s[n];
    }
#pragma unroll
    for (int n = 0; n < KEYS / 2; n++) {
        const int h = n % 4 / 2;
        s[n] = changed(s[n], p, h ? head1 : head0, rows.i[h], key + n / 4 * 8 + n % 2, rows.factor[h], rows.shift[h]);
    }
    if (partial) {
#pragma unroll
        for (int n = 0; n < KEYS / 2; n++) {
            const int h = n % 4 / 2;
            s[n] = inside(s[n], p, h ? head1 : head0, rows.i[h], key + n / 4 * 8 + n % 2);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = -INFINITY, sum = 0.f;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) top = fmaxf(top, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
        top = row_max(top);
        const float unit = log2_unit(rows.factor[h]), highest = fmaxf(rows.m[h], top);
        const float base = stand_in(CODED_P ? top : highest);
        rows.alpha[h] = rescale<EXACT>(rows.m[h], stand_in(highest), unit);
        rows.worth[h] = CODED_P ? rescale<EXACT>(top, stand_in(highest), unit) : 1.f;
        rows.m[h] = highest;
        if (mark) {
#pragma unroll
            for (int n = 0; n < KEYS / 4; n++) {
                float& x = s[n / 2 * 4 + 2 * h + n % 2];
                const bool hidden = x == -INFINITY;
                x = weight<EXACT>(x, base, unit);
                sum += x;
                if (!hidden) x = max_nan(x, SMALLEST_WEIGHT);
            }
        } else {
#pragma unroll
            for (int n = 0; n < KEYS / 4; n++) {
                float& x = s[n / 2 * 4 + 2 * h + n % 2];
                x = weight<EXACT>(x, base, unit);
                sum += x;
            }
        }
        rows.l[h] = fmaf(rows.l[h], rows.alpha[h], sum * rows.worth[h]);
    }
}

// Weights become what is rounded to codes, and rows.worth what a code is worth. v_scales: where those of the keys lie.
template <int KEYS> DEVICE void scale_to_codes(float (&s)[KEYS / 2], Rows& rows, u32 v_scales) {
    const int t = thread_index() % 4;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        float v_scale[2];
        shared_load(v_scale, v_scales + (n * 8 + 2 * t) * 4);
#pragma unroll
        for (int e = 0; e < 4; e++) s[4 * n + e] *= v_scale[e % 2];
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float omega = 256.f * 1.17549435e-38f;  // the least of which 255 / omega is finite
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) omega = fmaxf(omega, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
        omega = row_max(omega);
        const float code = 255.f * reciprocal(omega);
        rows.worth[h] *= omega * (1.f / 255.f);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 4 * n + 2 * h; i < 4 * n + 2 * h + 2; i++) s[i] *= code;
    }
}

// The left operand of a step of P V, from the step's weights: of 16 keys, or of 32 as codes, a lane's in their order.
DEVICE void pack_weights(u32 (&a)[4], const float* s) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const float* x = s + (CODED_P ? e / 2 * 8 + e % 2 * 2 : 2 * e);
        a[e] = CODED_P ? pack_u8(x[0], x[1], x[4], x[5]) : pack<V_TYPE>(x[0], x[1]);
    }
}
// The same shape: 1 for each key of 16 that a row sees, by weights that are marked.
DEVICE void pack_seen(u32 (&a)[4], const float* s) {
#pragma unroll
    for (int e = 0; e < 4; e++) a[e] = pack<V_TYPE>(s[2 * e] != 0.f ? 1.f : 0.f, s[2 * e + 1] != 0.f ? 1.f : 0.f);
}

// Adds what values that are NaN or infinite give to the rows that see them; v0, v1: of 16 keys and 8 channels.
template <int R> DEVICE void add_not_finite(
    float (&o)[R], int at, const u32 (&seen)[4], u32 v0, u32 v1, u32 bad0, u32 bad1
) {
    float positive[4] = {0, 0, 0, 0}, negative[4] = {0, 0, 0, 0};
    mma<V_TYPE>(positive, seen, is_infinite<V_TYPE>(v0, bad0, false), is_infinite<V_TYPE>(v1, bad1, false));
    mma<V_TYPE>(negative, seen, is_infinite<V_TYPE>(v0, bad0, true), is_infinite<V_TYPE>(v1, bad1, true));
#pragma unroll
    for (int e = 0; e < 4; e++) {
        if (positive[e] > 0.f) o[at + e] += INFINITY;
        if (negative[e] > 0.f) o[at + e] -= INFINITY;  // NaN counts as both
    }
}
