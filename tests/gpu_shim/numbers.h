// Numbers of 16 bits as floats, and back, rounded half to even. Portable: compilers differ in what they know of them.
#pragma once
#include <string.h>

namespace shim {

inline u32 bits(float x) {
    u32 r;
    memcpy(&r, &x, 4);
    return r;
}
inline float number(u32 x) {
    float r;
    memcpy(&r, &x, 4);
    return r;
}

inline float from_half(u32 x) {
    const u32 sign = (x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 0x3ff;
    if (exponent == 31) return number(sign | 0x7f800000 | fraction << 13);
    if (exponent) return number(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = (float)fraction * 0x1p-24f;
    return sign ? -small : small;
}
inline u32 to_half(float x) {
    const u32 sign = bits(x) >> 16 & 0x8000, size = bits(x) & 0x7fffffff;
    if (size > 0x7f800000) return 0x7fff;                  // NaN
    if (size >= 0x477ff000) return sign | 0x7c00;          // rounds to infinity
    if (size < 0x38800000) {                               // subnormal: adding 0.5 rounds at 2^-24
        return sign | (bits(number(size) + 0.5f) - 0x3f000000);
    }
    return sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}
inline float from_bfloat(u32 x) { return number(x << 16); }
inline u32 to_bfloat(float x) {
    const u32 b = bits(x);
    return (b & 0x7fffffff) > 0x7f800000 ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}

}  // namespace shim
