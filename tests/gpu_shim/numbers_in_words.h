// The numbers in a register or in 4 bytes of memory, EACH of them, as the left and right factor of a product.
#pragma once
#include "machine.h"
#include "numbers.h"

namespace shim {

struct F16 {
    typedef float Sum;
    static const int EACH = 2;
    static float a(u32 word, int e) { return from_half(word >> 16 * e & 0xffff); }
    static float b(u32 word, int e) { return a(word, e); }
};
struct BF16 : F16 {
    static float a(u32 word, int e) { return from_bfloat(word >> 16 * e & 0xffff); }
    static float b(u32 word, int e) { return a(word, e); }
};
struct S8 {
    typedef int Sum;
    static const int EACH = 4;
    static int a(u32 word, int e) { return (signed char)(word >> 8 * e); }
    static int b(u32 word, int e) { return a(word, e); }
};
struct U8S8 : S8 {
    static int a(u32 word, int e) { return (u8)(word >> 8 * e); }
};

}  // namespace shim
