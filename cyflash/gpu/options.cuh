// Everything that changes a score between the two products, for every kernel, in one order: scale, softcap, ALiBi and
// bias, masks. A hidden score becomes -inf whatever it was, NaN included.
//
// An option that is not in a variant costs nothing: its macro EDGES (causal or window), SOFTCAP, ALIBI, BIAS or MASK is
// 0.
#pragma once
#include "softmax.cuh"

// Without an option that needs scores in natural units the scale waits for the exponential: FOLDED.
constexpr bool FOLDED = !(SOFTCAP || ALIBI || BIAS);
// Whether a tile may hold keys that some rows see and others do not, besides those after the last key.
constexpr bool HIDING = EDGES || BIAS || MASK;

// What all rows of a query head share.
struct Head {
    int low, high;              // row i sees keys low <= j - i <= high, but for BIAS and MASK
    float slope;                // ALIBI
    const float* bias;          // BIAS: of row 0, key 0
    const unsigned char* mask;  // MASK: of row 0, key 0
};

constexpr long long FAR = 1 << 30;  // no j - i is larger

DEVICE Head make_head(const Params& p, int b, int h) {
    Head head;
    head.low = EDGES ? (int)max(p.offset - p.left, -FAR) : -(int)FAR;
    head.high = EDGES ? (int)min(p.offset + p.right, FAR) : (int)FAR;
    head.slope = ALIBI ? p.slopes[b * p.slopes_stride[0] + h * p.slopes_stride[1]] : 0.f;
    head.bias = BIAS ? p.bias + (b * p.bias_stride[0] + h * p.bias_stride[1]) : 0;
    head.mask = MASK ? p.mask + (b * p.mask_stride[0] + h * p.mask_stride[1]) : 0;
    return head;
}

// factor: product * factor is the score in natural units. The unit has no sign, and it is not 0, since -inf * 0 would be
// NaN.
DEVICE float log2_unit(float factor) { return FOLDED ? fmaxf(fabsf(factor) * LOG2E, 1.2e-38f) : LOG2E; }

// A score of this kernel in natural units; shift is what it lacks.
DEVICE float natural(float m, float unit, float shift) {
    return FOLDED ? stand_in(m) * unit * LN2 + shift : stand_in(m) + (SOFTCAP ? 0.f : shift);
}

// tanh(x): 1 - 2 e / (1 + e) with e = e^(-2 |x|) where |x| >= 0.625, and below, where that would cancel, x + x^3 Q(x^2)
// with the minimax Q of degree 4 (relative error 4.4e-9).
DEVICE float tanh_accurate(float x) {
    const float size = fabsf(x), z = x * x, e = exp2_fast(-2.f * LOG2E * size);
    const float far = copysignf(1.f - 2.f * e * reciprocal(1.f + e), x);
    float near = fmaf(-0.005704986090153312f, z, 0.02063908646505058f);
    near = fmaf(near, z, -0.0537397148559542f);
    near = fmaf(near, z, 0.1333144219553772f);
    near = fmaf(near, z, -0.33333281941919757f);
    return size < 0.625f ? fmaf(near * z, x, x) : x != x ? x : far;
}

// Three steps from the product of row i and a key to the score that the softmax takes. Each is a loop of its own over a
// thread's scores, so that where its condition is false it costs one branch and not an instruction a score.

// First, where negated(): the sign of the scale, which the unit has not.
DEVICE bool negated(const Params& p) { return FOLDED && p.scale < 0.f; }

// Then options. Rows and keys may lie after the last ones. factor: what makes a product a score, in natural units. shift:
// what the score then lacks.
DEVICE float changed(float s, const Params& p, const Head& head, int i, int key, float factor, float shift) {
    if (!FOLDED) {
        s *= factor;
        if (SOFTCAP) s = p.softcap * tanh_accurate((s + shift) * (1.f / p.softcap));
        if (ALIBI) s = fmaf(-head.slope, fabsf((float)(key - i - (int)p.offset)), s);
        if (BIAS) {
            const float bias = head.bias[min(i, p.Lq - 1) * p.bias_stride[2] + min(key, p.Lk - 1) * p.bias_stride[3]];
            s = bias == -INFINITY ? bias : s + bias;
        }
    }
    if (MASK && !head.mask[min(i, p.Lq - 1) * p.mask_stride[2] + min(key, p.Lk - 1) * p.mask_stride[3]]) s = -INFINITY;
    return s;
}

// Last, in tiles that are partial: keys that causal, the window or the last key hides.
DEVICE float inside(float s, const Params& p, const Head& head, int i, int key) {
    const bool hidden = EDGES && (key - i < head.low || key - i > head.high);
    return hidden || key >= p.Lk ? -INFINITY : s;
}

// The keys that row i sees, by causal and window; both ends never decrease with i.
DEVICE int first_key(const Params& p, int i) {
    return EDGES ? (int)min(max(i + p.offset - p.left, 0ll), (long long)p.Lk) : 0;
}
DEVICE int last_key(const Params& p, int i) {
    return EDGES ? (int)max(min(i + p.offset + p.right, p.Lk - 1ll), -1ll) : p.Lk - 1;
}

// Where a block of query rows stands, and the tiles of Bc keys that its rows see.
struct Work {
    int b, h, kv;     // sequence, query head, key and value head
    int row;          // first query row
    int begin, end;   // tiles begin <= j < end
    int whole_from;   // first key that every row sees, by causal and window,
    int whole_to;     // and the last one
};

// Blocks of a head lie beside each other and read the same keys; with EDGES those that see most come first.
template <int Br, int Bc> DEVICE Work make_work(const Params& p, int block) {
    Work work;
    const int blocks = (p.Lq + Br - 1) / Br, head = block / blocks, place = block % blocks;
    work.b = head / p.H;
    work.h = head % p.H;
    work.kv = work.h / (p.H / p.Hk);
    work.row = (EDGES ? blocks - 1 - place : place) * Br;
    const int last_row = min(work.row + Br, p.Lq) - 1;
    const int low = first_key(p, work.row), high = last_key(p, last_row);
    work.begin = low / Bc;
    work.end = low <= high ? high / Bc + 1 : work.begin;
    work.whole_from = first_key(p, last_row);
    work.whole_to = last_key(p, work.row);
    return work;
}
template <int Bc> DEVICE bool is_partial(const Work& work, int tile) {
    return tile * Bc < work.whole_from || tile * Bc + Bc - 1 > work.whole_to;
}
