// The primitives of the kernels, under the same names, on the machine of machine.h. What each does is said in the other
// primitives.cuh; fragment layouts are those of the PTX manual.
#pragma once
#include "machine.h"
#include "numbers.h"
#include "params.h"
#include "tensor_cores.h"


#define __device__
#define __global__
#define __forceinline__ inline
#define DEVICE static inline
#define KERNEL(name, threads, blocks) static void kernel_entry(const Params p)
#define CALL_KERNEL(p, maps) kernel_entry(p)

// Of <math.h>, which with what it includes takes longer to compile than a kernel.
#define INFINITY __builtin_inff()
extern "C" {
float exp2f(float);
float expf(float);
float fmaf(float, float, float);
float fmaxf(float, float);
float fminf(float, float);
float logf(float);
float rintf(float);
float fabsf(float);
float copysignf(float, float);
}

template <class T> DEVICE T min(T a, T b) { return b < a ? b : a; }
template <class T> DEVICE T max(T a, T b) { return a < b ? b : a; }

DEVICE int thread_index() { return shim::state.thread; }
DEVICE int block_index() { return shim::state.block; }
DEVICE void barrier(int line = __builtin_LINE()) { shim::barrier(line); }
DEVICE void warp_barrier() { shim::collective("warp_barrier", nullptr, [](void**) {}); }

struct Shuffle {
    float x, got;
    int lanes;
};
DEVICE float shuffle_xor(float x, int lanes) {
    Shuffle slot = {x, 0, lanes};
    shim::collective("shuffle_xor", &slot, [](void** slots) {
        for (int i = 0; i < 32; i++) {
            Shuffle* to = (Shuffle*)slots[i];
            to->got = ((Shuffle*)slots[i ^ to->lanes])->x;
        }
    });
    return slot.got;
}
DEVICE bool warp_any(bool x) {
    int slot = x;
    shim::collective("warp_any", &slot, [](void** slots) {
        int any = 0;
        for (int i = 0; i < 32; i++) any |= *(int*)slots[i];
        for (int i = 0; i < 32; i++) *(int*)slots[i] = any;
    });
    return slot;
}

// ex2.approx.ftz: results below the least normal number are 0
DEVICE float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.f : y;
}
// rcp.approx.ftz: numbers below the least normal one are 0, given and returned
DEVICE float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }
DEVICE float reciprocal(float x) { return flushed(1.f / flushed(x)); }
DEVICE float max_nan(float x, float y) { return x != x ? x : y != y ? y : fmaxf(x, y); }
DEVICE u32 bits_of(float x) { return shim::bits(x); }
DEVICE float float_of(u32 x) { return shim::number(x); }
DEVICE u32 pack_f16(float low, float high) { return shim::to_half(low) | shim::to_half(high) << 16; }
DEVICE u32 pack_bf16(float low, float high) { return shim::to_bfloat(low) | shim::to_bfloat(high) << 16; }
DEVICE float from_f16(u32 x) { return shim::from_half(x & 0xffff); }
DEVICE u32 pack_u8(float a, float b, float c, float d) {
    const float x[4] = {a, b, c, d};
    u32 all = 0;
    for (int i = 0; i < 4; i++) all |= (u32)(x[i] > 0 ? fminf(rintf(x[i]), 255.f) : 0.f) << 8 * i;
    return all;
}
DEVICE u32 choose_bytes(u32 low, u32 high, u32 which) {
    const u64 all = (u64)high << 32 | low;
    u32 r = 0;
    for (int i = 0; i < 4; i++) r |= (u32)(all >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return r;
}

template <int SIZE> DEVICE u32 load_bits(const char* from) {
    shim::check_global(from, SIZE, "load_bits");
    u32 x = 0;
    memcpy(&x, from, SIZE);
    return x;
}
DEVICE void store2(void* to, u32 x) {
    if ((size_t)to % 4) shim::fail("store2: misaligned");
    memcpy(to, &x, 4);
}
DEVICE void load4(float (&x)[4], const float* from) {
    if ((size_t)from % 16) shim::fail("load4: misaligned");
    shim::check_global(from, 16, "load4");
    memcpy(x, from, 16);
}
DEVICE void store4(float* to, const float (&x)[4]) {
    if ((size_t)to % 16) shim::fail("store4: misaligned");
    memcpy(to, x, 16);
}

template <int N> DEVICE void shared_load(float (&x)[N], u32 at) {
    shim::check_shared(at, 4 * N, 4 * N, "shared_load");
    memcpy(x, shim::state.shared + at, 4 * N);
}
DEVICE void shared_store(u32 at, float x) {
    shim::check_shared(at, 4, 4, "shared_store");
    memcpy(shim::state.shared + at, &x, 4);
}
DEVICE void shared_store4(u32 at, const u32 (&x)[4]) {
    shim::check_shared(at, 16, 16, "shared_store4");
    memcpy(shim::state.shared + at, x, 16);
}
DEVICE void copy16(u32 to, const void* from, int n) { shim::copy(to, from, n, 16); }
DEVICE void copy4(u32 to, const void* from, int n) { shim::copy(to, from, n, 4); }
DEVICE void copy_commit() { shim::commit(); }
template <int N> DEVICE void copy_wait() { shim::wait(N); }

DEVICE void load_matrices(u32 (&r)[4], u32 at) { shim::load_four(r, at, false); }
DEVICE void load_matrices_transposed(u32 (&r)[4], u32 at) { shim::load_four(r, at, true); }
DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    shim::multiply(shim::Numbers::F16, d, a, b0, b1);
}
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    shim::multiply(shim::Numbers::BF16, d, a, b0, b1);
}
DEVICE void mma_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    shim::multiply(shim::Numbers::S8, d, a, b0, b1);
}
DEVICE void mma_u8_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    shim::multiply(shim::Numbers::U8S8, d, a, b0, b1);
}
