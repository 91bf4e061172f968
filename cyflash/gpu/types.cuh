// The data types of arrays, as macros name them, and what differs between them.
#pragma once
#include "primitives.cuh"

constexpr int F32 = 0, F16 = 1, BF16 = 2, I8 = 3;

DEVICE constexpr int size_of(int type) { return type == F32 ? 4 : type == I8 ? 1 : 2; }

template <int TYPE> DEVICE u32 pack(float low, float high) {
    return TYPE == BF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

// d += a b, of floats with 16 bits.
template <int TYPE> DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (TYPE == BF16) {
        mma_bf16(d, a, b0, b1);
    } else {
        mma_f16(d, a, b0, b1);
    }
}
// d += a b, of codes.
template <int TYPE> DEVICE void mma(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_s8(d, a, b0, b1); }

// The same for four of many sums, from d[at] on.
template <int TYPE, class T, int R> DEVICE void mma_at(T (&d)[R], int at, const u32 (&a)[4], u32 b0, u32 b1) {
    T x[4] = {d[at], d[at + 1], d[at + 2], d[at + 3]};
    mma<TYPE>(x, a, b0, b1);
#pragma unroll
    for (int e = 0; e < 4; e++) d[at + e] = x[e];
}

template <int TYPE> struct SumOf { typedef float type; };
template <> struct SumOf<I8> { typedef int type; };

// Sums of codes begin at 0, or by mma.sync at the bits of 1.5 * 2^23, where a float counts in ones: with the sum in its
// last bits the float is that much larger. Sums are below 2^22: 127 * 127 * 256 of q and k, 255 * 127 * 64 of weights
// and v. As fast as an addition, where a conversion takes four times as long.
constexpr int ZERO = 0x4b400000;
template <int BEGIN> DEVICE float sum_of(int sum) {
    return BEGIN == ZERO ? float_of((u32)sum) - 12582912.f : (float)sum;
}
template <int BEGIN> DEVICE float sum_of(float sum) { return sum; }

// Two numbers beside each other, of which `count` (1 or more) are inside the array.
template <int TYPE> DEVICE void store_pair(void* array, long long at, float x, float y, int count) {
    if constexpr (TYPE == F32) {
        float* to = (float*)array + at;
        to[0] = x;
        if (count > 1) to[1] = y;
    } else {
        u16* to = (u16*)array + at;
        const u32 both = pack<TYPE>(x, y);
        if (count > 1 && (u64)to % 4 == 0) {
            *(u32*)to = both;
        } else {
            to[0] = (u16)both;
            if (count > 1) to[1] = (u16)(both >> 16);
        }
    }
}

// Which halves of a pair of numbers with 16 bits are NaN or infinite: 0xffff for each that is.
template <int TYPE> DEVICE u32 not_finite(u32 pair) {
    constexpr u32 exponent = TYPE == BF16 ? 0x7f807f80u : 0x7c007c00u, one = exponent & ~(exponent << 1);
    // an exponent of ones carries into the bit of the sign
    return (((pair & exponent) + one) >> 15 & 0x00010001u) * 0xffffu;
}

// Whether BYTES of shared memory, or what of them this one of THREADS neighbours has looked at, hold NaN or infinity.
template <int TYPE, int BYTES, int THREADS> DEVICE bool holds_not_finite(u32 at) {
    u32 any = 0;
#pragma unroll 4
    for (int i = thread_index() % THREADS * 16; i < BYTES; i += THREADS * 16) {
        float x[4];
        shared_load(x, at + i);
#pragma unroll
        for (int e = 0; e < 4; e++) any |= not_finite<TYPE>(bits_of(x[e]));
    }
    return any != 0;
}

// 1 for each half of a pair, none finite where `where` is set, that is NaN or the infinity with this sign, else 0.
template <int TYPE> DEVICE u32 is_infinite(u32 pair, u32 where, bool negative) {
    constexpr u32 one = TYPE == BF16 ? 0x3f80u : 0x3c00u, infinity = TYPE == BF16 ? 0x7f80u : 0x7c00u;
    u32 result = 0;
#pragma unroll
    for (int half = 0; half < 32; half += 16) {
        const u32 x = pair >> half & 0xffffu, size = x & 0x7fffu;
        const bool counts = size > infinity || (x >> 15 != 0) == negative;
        if (where >> half & 1 && counts) result |= one << half;
    }
    return result;
}
