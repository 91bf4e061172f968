// What a kernel is told: one struct, by value. The launcher builds the same layout from Python.
//
// Strides are in elements. Limits, which the launcher checks: 0 < Lq, 0 <= Lk, both below 2^30; |offset| < 2^30;
// 0 < D <= 256; H a multiple of Hk; left and right at least 0, 2^62 where unbounded; scale and softcap finite.
#pragma once

struct Params {
    const void* q;              // (B, H, Lq, D)
    const void* k;              // (B, Hk, Lk, D)
    const void* v;              // (B, Hk, Lk, D)
    void* out;                  // (B, H, Lq, D)
    float* lse;                 // (B, H, Lq), contiguous, natural logarithm; or 0
    const float* bias;          // (B, H, Lq, Lk) by strides; read with BIAS only
    const unsigned char* mask;  // (B, H, Lq, Lk) by strides, not 0 keeps; read with MASK only
    const float* slopes;        // (B, H) by strides; read with ALIBI only
    const float* sinks;         // (H,), contiguous; or 0
    const float* q_scale;       // (B, H, Lq) by strides; read for int8 q and k only, as k_scale
    const float* k_scale;       // (B, Hk, Lk) by strides
    const float* v_scale;       // (B, Hk, Lk) by strides; read for int8 v only
    const float* shift;         // (B, H, Lq), contiguous: scale * q_i . mean, which smoothing took from K; or 0
    float* workspace;           // few rows: what chunks of keys leave, see decode.cu
    long long q_stride[3];      // batch, head, row
    long long k_stride[3];
    long long v_stride[3];
    long long out_stride[3];
    long long bias_stride[4];   // batch, head, row, key; 0 where broadcast
    long long mask_stride[4];
    long long q_scale_stride[3];  // batch, head, token; 0 where shared
    long long k_scale_stride[3];
    long long v_scale_stride[3];
    long long slopes_stride[2];   // batch, head
    long long offset;           // query i stands at i + offset
    long long left;             // key j is visible to it from i + offset - left
    long long right;            // to i + offset + right; read with EDGES only, as left
    int B, H, Hk, Lq, Lk, D;
    float scale;
    float softcap;              // read with SOFTCAP only
    int chunk, chunks;          // few rows: keys of a chunk, and how many chunks there are
};
