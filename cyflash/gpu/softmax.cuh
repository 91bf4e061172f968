// The online softmax of one query row, in log2 units: with scores s, s * unit is what 2 is raised to.
//
//     m' = max(m, s_j)   alpha = 2^((m - m') unit)   w_j = 2^((s_j - m') unit)   l' = alpha l + sum_j w_j
//
// m = -inf until a row has seen a key; 0 stands in for it, so that its weights are 2^-inf = 0. A NaN score leaves m as
// it is and makes w, and so l and the output, NaN. unit > 0: -inf * unit must stay -inf.
#pragma once
#include "primitives.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float SMALLEST_WEIGHT = 1e-37f;  // what a visible key weighs at least where hidden ones have to be told apart

DEVICE float stand_in(float m) { return m == -INFINITY ? 0.f : m; }

// EXACT: the greatest score weighs exactly 1, and scores near the largest float do not overflow, for one more
// instruction. Otherwise all weights of a row are off by the rounding of m * unit, and so alpha must be taken from the
// rounded products.
template <bool EXACT> DEVICE float weight(float s, float m, float unit) {
    return exp2_fast(EXACT ? (s - m) * unit : fmaf(s, unit, -(m * unit)));
}
template <bool EXACT> DEVICE float rescale(float old, float m, float unit) {
    return EXACT ? weight<true>(old, m, unit) : exp2_fast(old == -INFINITY ? old : old * unit - m * unit);
}

// What a row's sum is divided by, as a factor, and its log-sum-exp in natural units, with the sink if there is one.
struct Finish {
    float factor, lse;
};

// top: m in natural units, any number where l = 0.
DEVICE Finish finish(float top, float l, const float* sink) {
    if (l == 0.f) return {0.f, sink ? *sink : -INFINITY};
    if (!sink) return {1.f / l, top + logf(l)};
    if (*sink == INFINITY && l == l) return {0.f, INFINITY};
    const float highest = fmaxf(top, *sink);
    const float a = expf(top - highest), total = l * a + expf(*sink - highest);
    return {a / total, highest + logf(total)};
}
