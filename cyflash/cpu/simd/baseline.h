/* Any CPU, through the vector extensions of GCC and Clang: 4 lanes (SSE2 on x86-64), 16 registers.
 *
 * Tile: 4 rows x 2 vectors = 8 accumulators + 2 operands + 1 broadcast + 1 product (no FMA) = 12 of 16 registers.
 */
enum { LANES = 4, VECTORS = 2, ROWS = 4, UNROLL = 1 };

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

WORD vf choose(vi take, vf a, vf b) { return (vf)(((vi)a & take) | ((vi)b & ~take)); }

WORD vf vf_set(float x) { return (vf){x, x, x, x}; }
WORD vf vf_load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
WORD void vf_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
WORD vf vf_load_part(const float *p, ptrdiff_t n) {
    vf x = vf_set(0.0f);
    for (int i = 0; i < LANES; i++) if (i < n) x[i] = p[i];
    return x;
}
WORD void vf_store_part(float *p, vf x, ptrdiff_t n) { for (int i = 0; i < LANES; i++) if (i < n) p[i] = x[i]; }

WORD vf vf_add(vf a, vf b) { return a + b; }
WORD vf vf_sub(vf a, vf b) { return a - b; }
WORD vf vf_mul(vf a, vf b) { return a * b; }
WORD vf vf_div(vf a, vf b) { return a / b; }
WORD vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
WORD vf vf_max(vf a, vf b) { return choose(a > b, a, b); }
WORD float vf_highest(vf a) {
    float high = a[0] > a[1] ? a[0] : a[1], low = a[2] > a[3] ? a[2] : a[3];
    return high > low ? high : low;
}
WORD float vf_total(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
WORD vf vf_abs(vf a) { return (vf)((vi)a & 0x7fffffff); }
WORD vf vf_copysign(vf size, vf sign) { return (vf)((vi)size | ((vi)sign & (vi)vf_set(-0.0f))); }
WORD vf vf_less(vf a, vf b, vf x, vf y) { return choose(a < b, x, y); }

/* -200 is below every exponent that a float can reach in two steps: the result is 0, as for -inf */
WORD vi floor_clamped(vf x) {
    vf y = vf_max(vf_set(-200.0f), x);
    vi n = __builtin_convertvector(y, vi);
    return n + (__builtin_convertvector(n, vf) > y); /* true is -1 */
}
WORD vf power2(vi n) { return (vf)((n + 127) << 23); }

WORD vf vf_fraction(vf x) { return vf_max(vf_set(-200.0f), x) - __builtin_convertvector(floor_clamped(x), vf); }
/* in two factors, so that results below 2^-126 are denormal, not zero */
WORD vf vf_scale2(vf a, vf x) {
    vi n = floor_clamped(x), half = n >> 1;
    return a * power2(half) * power2(n - half);
}

WORD vf vf_hide(vf x, vf a, vf y) { return choose(a == vf_set(-INFINITY), y, x); }
WORD vf vf_inside(vf x, vf j, vf low, vf high) { return choose((j >= low) & (j <= high), x, vf_set(-INFINITY)); }
WORD vf vf_keep_part(const uint8_t *p, ptrdiff_t n) {
    vf x = vf_set(-INFINITY);
    for (int i = 0; i < LANES; i++) if (i < n && p[i]) x[i] = 0.0f;
    return x;
}

WORD void vf_transpose(vf *t) {
    vf a[LANES];
    memcpy(a, t, sizeof a);
    for (int i = 0; i < LANES; i++) for (int j = 0; j < LANES; j++) t[i][j] = a[j][i];
}

/* ---- integers: the same tile, one dot product of two codes of 16 bits where fp32 has one multiply-add ---- */

enum { GROUP = 2, ZERO_POINT = 0, WEIGHT_OFFSET = 0, RESIDENT = 2 };
typedef int16_t code;

WORD vi vi_set(int32_t x) { return (vi){x, x, x, x}; }
WORD vi vi_load(const int32_t *p) { vi x; memcpy(&x, p, sizeof x); return x; }
WORD vi vi_load_part(const int32_t *p, ptrdiff_t n) {
    vi x = vi_set(0);
    for (int i = 0; i < LANES; i++) if (i < n) x[i] = p[i];
    return x;
}
WORD vi vi_add(vi a, vi b) { return a + b; }
WORD vi vi_and(vi a, vi b) { return a & b; }
WORD vi vi_or(vi a, vi b) { return a | b; }
WORD vf vf_bits(vi x) { return (vf)x; }
WORD vi vi_bits(vf x) { return (vi)x; }
WORD vf vf_from_int(vi x) { return __builtin_convertvector(x, vf); }
WORD vf vf_sums(const vf *x) {
    vf sums;
    for (int i = 0; i < LANES; i++) sums[i] = (x[i][0] + x[i][2]) + (x[i][1] + x[i][3]);
    return sums;
}
WORD vi vi_sums(const vi *x) {
    vi sums;
    for (int i = 0; i < LANES; i++) sums[i] = x[i][0] + x[i][1] + x[i][2] + x[i][3];
    return sums;
}
WORD vf vf_byte(vi x, int i) { return vf_from_int(x << (24 - 8 * i) >> 24); }

#ifdef __SSE2__
#include <emmintrin.h>
WORD vi vi_dot(vi acc, vi a, vi b) { return acc + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
WORD vi vi_dot(vi acc, vi a, vi b) { return acc + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16); }
#endif
WORD vi vi_dot_at(vi acc, const int32_t *a, vi b) { return vi_dot(acc, vi_load(a), b); }
/* Bytes 0, 2 and bytes 1, 3 as pairs of 16 bits. */
WORD vi vi_dot_bytes(vi acc, vi a, vi b) {
    typedef int16_t words __attribute__((vector_size(16)));
    words odd = (words)b >> 8, even = (words)((words)b << 8) >> 8;
    acc = vi_dot(acc, a & 0x00ff00ff, (vi)even);
    return vi_dot(acc, (vi)((vi)((uint32_t __attribute__((vector_size(16))))a >> 8) & 0x00ff00ff), (vi)odd);
}

WORD vf vf_code(vi x, int i) { return vf_from_int(i ? x >> 16 : x << 16 >> 16); }

/* adding 1.5 x 2^23 leaves no bit for a fraction: the sum's last bits are x, rounded half to even */
WORD vi round_code(vf x) { return (vi)(x + 12582912.0f) - (vi)vf_set(12582912.0f); }
WORD void vi_store_codes(int32_t *p, const vf *x) {
    vi both = round_code(x[0]) | round_code(x[1]) << 16;
    memcpy(p, &both, sizeof both);
}

WORD void vf_store_bytes(unsigned char *p, vf x) {
    vi codes = round_code(x);
    for (int i = 0; i < LANES; i++) p[i] = (unsigned char)codes[i];
}

/* ---- bfloat16: floats that were rounded to it ---- */

typedef uint32_t vu __attribute__((vector_size(4 * LANES))); /* where bits of NaN may overflow before they are left out */

enum { BF16_GROUP = 1 };

WORD vf vf_dot_bf16(vf acc, vi a, vi b) { return vf_fma((vf)a, (vf)b, acc); }
WORD void vi_store_bf16(int32_t *p, const vf *x) {
    vu u = (vu)x[0];
    u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000;
    memcpy(p, &u, sizeof u);
}

/* ---- quantisation ---- */

typedef int8_t vcodes __attribute__((vector_size(LANES)));

WORD vf vf_min(vf a, vf b) { return choose(a < b, a, b); }
WORD vcodes codes_of(vf x) {
    x = vf_min(vf_max(x, vf_set(-127.0f)), vf_set(127.0f));
    return __builtin_convertvector(round_code(x), vcodes);
}
WORD void vf_store_codes(signed char *p, vf x) { vcodes codes = codes_of(x); memcpy(p, &codes, LANES); }
WORD void vf_store_codes_part(signed char *p, vf x, ptrdiff_t n) {
    vcodes codes = codes_of(x);
    for (int i = 0; i < LANES; i++) if (i < n) p[i] = codes[i];
}

/* ---- 16-bit floats in memory, converted with integers, and with additions that neither meet nor give a denormal ---- */

typedef uint16_t v16 __attribute__((vector_size(2 * LANES)));

WORD vi choose_int(vi take, vi a, vi b) { return (a & take) | (b & ~take); }

WORD vf from_half(v16 x) {
    vi h = __builtin_convertvector(x, vi), size = h & 0x7fff, u = (size << 13) + (112 << 23);
    vf denormal = (vf)(u + (1 << 23)) - (vf)vi_set(113 << 23); /* 2^-14 (1 + size / 2^10) - 2^-14 */
    u = choose_int(size < 0x400, (vi)denormal, choose_int(size < 0x7c00, u, u + (112 << 23)));
    return (vf)((vu)u | (vu)(h & 0x8000) << 16);
}
WORD v16 to_half(vf x) {
    vi size = (vi)x & 0x7fffffff;
    vi normal = (vi)(((vu)size - (112 << 23) + 0xfff + ((vu)size >> 13 & 1)) >> 13);
    vi denormal = (vi)((vf)size + 0.5f) - (vi)vf_set(0.5f); /* the last bit of 0.5 is 2^-24, as a denormal half's */
    vi special = choose_int(size > 0x7f800000, 0x7e00 | (size >> 13 & 0x3ff), vi_set(0x7c00));
    vi h = choose_int(size < 113 << 23, denormal, choose_int(size < 143 << 23, normal, special));
    return __builtin_convertvector(h | ((vi)x >> 16 & 0x8000), v16);
}
WORD vf from_bf16(v16 x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
WORD v16 to_bf16(vf x) {
    vu u = (vu)x, nan = (u >> 16 & 0x8000) | 0x7fc0, rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return __builtin_convertvector(choose_int(x != x, (vi)nan, (vi)rounded), v16);
}

WORD v16 load_16(const uint16_t *p) { v16 x; memcpy(&x, p, sizeof x); return x; }
WORD void store_16(uint16_t *p, v16 x) { memcpy(p, &x, sizeof x); }
WORD v16 load_16_part(const uint16_t *p, ptrdiff_t n) {
    v16 x = {0};
    for (int i = 0; i < LANES; i++) if (i < n) x[i] = p[i];
    return x;
}
WORD void store_16_part(uint16_t *p, v16 x, ptrdiff_t n) { for (int i = 0; i < LANES; i++) if (i < n) p[i] = x[i]; }
