/* AVX-512 (F, BW, DQ, VL): 16 lanes, 32 registers.
 *
 * Tile: 8 rows x 3 vectors = 24 accumulators + 3 operands + 1 broadcast = 28 of 32 registers;
 * a step of 24 FMAs takes 3 + 8 = 11 loads, within two FMAs and two loads a cycle. Two steps between tests of the end
 * are 4 % faster on a Zen 5 than one; four are not better.
 */
#include <immintrin.h>

enum { LANES = 16, VECTORS = 3, ROWS = 8, UNROLL = 2 };

typedef __m512 vf;

WORD __mmask16 first_lanes(ptrdiff_t n) { return (__mmask16)((1u << n) - 1u); }

WORD vf vf_set(float x) { return _mm512_set1_ps(x); }
WORD vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
WORD vf vf_load_part(const float *p, ptrdiff_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
WORD void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
WORD void vf_store_part(float *p, vf x, ptrdiff_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }

WORD vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
WORD vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
WORD vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
WORD vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
WORD vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
WORD vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
WORD vf vf_abs(vf a) { return _mm512_abs_ps(a); }
WORD float vf_highest(vf a) { return _mm512_reduce_max_ps(a); }
WORD float vf_total(vf a) { return _mm512_reduce_add_ps(a); }
WORD vf vf_copysign(vf size, vf sign) { return _mm512_or_ps(size, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f))); }
WORD vf vf_less(vf a, vf b, vf x, vf y) { return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x); }

/* vreduceps with rounding towards -inf is x - floor(x), and 0 for -inf */
WORD vf vf_fraction(vf x) { return _mm512_reduce_ps(x, 0x09); }
WORD vf vf_scale2(vf a, vf x) { return _mm512_scalef_ps(a, x); }

WORD vf vf_hide(vf x, vf a, vf y) {
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(a, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ), y);
}
WORD vf vf_inside(vf x, vf j, vf low, vf high) {
    __mmask16 keep = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(j, low, _CMP_GE_OQ), j, high, _CMP_LE_OQ);
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), keep, x);
}
WORD vf vf_keep_part(const uint8_t *p, ptrdiff_t n) {
    __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(n), p);
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), _mm_test_epi8_mask(bytes, bytes), _mm512_setzero_ps());
}

WORD void vf_transpose(vf *t) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(t[i], t[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(t[i], t[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i + j]), _mm512_castps_pd(a[i + j + 2])));
            b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i + j]), _mm512_castps_pd(a[i + j + 2])));
        }
    /* b[4g + c] holds, in each 128-bit quarter s, column 4s + c of rows 4g..4g+3 */
    for (int c = 0; c < 4; c++) {
        __m512 low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), high = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        __m512 low2 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88), high2 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        t[c] = _mm512_shuffle_f32x4(low, low2, 0x88);
        t[8 + c] = _mm512_shuffle_f32x4(low, low2, 0xdd);
        t[4 + c] = _mm512_shuffle_f32x4(high, high2, 0x88);
        t[12 + c] = _mm512_shuffle_f32x4(high, high2, 0xdd);
    }
}

/* ---- integers: the same 8 x 3 tile, one dot product of a group of codes where fp32 has one FMA ---- */

typedef __m512i vi;

WORD vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
WORD vi vi_load(const int32_t *p) { return _mm512_loadu_si512(p); }
WORD vi vi_load_part(const int32_t *p, ptrdiff_t n) { return _mm512_maskz_loadu_epi32(first_lanes(n), p); }
WORD vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
WORD vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
WORD vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
WORD vf vf_bits(vi x) { return _mm512_castsi512_ps(x); }
WORD vi vi_bits(vf x) { return _mm512_castps_si512(x); }
WORD vf vf_from_int(vi x) { return _mm512_cvtepi32_ps(x); }
WORD vf vf_byte(vi x, int i) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sllv_epi32(x, _mm512_set1_epi32(24 - 8 * i)), 24));
}

/* Pairs of vectors are added as their lanes are put together: 30 shuffles, where a transposition has 64. */
#define SUMS(name, type, to_ps, of_ps, add)                                                                     \
    WORD type name(const type *x) {                                                                             \
        __m512 a, b;                                                                                            \
        type t[8], u[4], v[2];                                                                                  \
        for (int i = 0; i < 8; i++) {                                                                           \
            a = to_ps(x[2 * i]), b = to_ps(x[2 * i + 1]);                                                       \
            t[i] = add(of_ps(_mm512_unpacklo_ps(a, b)), of_ps(_mm512_unpackhi_ps(a, b)));                       \
        }                                                                                                       \
        for (int i = 0; i < 4; i++) {                                                                           \
            __m512d c = _mm512_castps_pd(to_ps(t[2 * i])), d = _mm512_castps_pd(to_ps(t[2 * i + 1]));           \
            a = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), b = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));     \
            u[i] = add(of_ps(a), of_ps(b));                                                                     \
        }                                                                                                       \
        for (int i = 0; i < 2; i++) {                                                                           \
            a = to_ps(u[2 * i]), b = to_ps(u[2 * i + 1]);                                                       \
            v[i] = add(of_ps(_mm512_shuffle_f32x4(a, b, 0x88)), of_ps(_mm512_shuffle_f32x4(a, b, 0xdd)));       \
        }                                                                                                       \
        a = to_ps(v[0]), b = to_ps(v[1]);                                                                       \
        return add(of_ps(_mm512_shuffle_f32x4(a, b, 0x88)), of_ps(_mm512_shuffle_f32x4(a, b, 0xdd)));           \
    }
SUMS(vf_sums, vf, , , vf_add)
SUMS(vi_sums, vi, vf_bits, vi_bits, vi_add)
#undef SUMS

#ifdef __AVX512VNNI__

enum { GROUP = 4, ZERO_POINT = 128, WEIGHT_OFFSET = 0, RESIDENT = 3 };
typedef int8_t code;

/* As assembly: around the intrinsic GCC 12 spills the accumulators of a tile, which halves the speed. */
WORD vi vi_dot(vi acc, vi a, vi b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}
/* here b is often used once, from memory */
WORD vi vi_dot_bytes(vi acc, vi a, vi b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "vm"(b));
    return acc;
}
WORD vf vf_code(vi x, int i) { return vf_byte(_mm512_xor_si512(x, _mm512_set1_epi32((int)0x80808080)), i); }
WORD void vi_store_codes(int32_t *p, const vf *x) {
    __m512i low = _mm512_or_si512(_mm512_cvtps_epi32(x[0]), _mm512_slli_epi32(_mm512_cvtps_epi32(x[1]), 8));
    __m512i high = _mm512_or_si512(_mm512_cvtps_epi32(x[2]), _mm512_slli_epi32(_mm512_cvtps_epi32(x[3]), 8));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

#else

/* Without VNNI: codes of 16 bits, since vpmaddubsw saturates. */
enum { GROUP = 2, ZERO_POINT = 0, WEIGHT_OFFSET = 0, RESIDENT = 3 };
typedef int16_t code;

/* As assembly: GCC 12 puts the multiplications of a tile first, and then spills their results. */
WORD vi vi_dot(vi acc, vi a, vi b) {
    __m512i product;
    __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+v"(acc), "=&v"(product) : "v"(a), "v"(b));
    return acc;
}
/* Bytes 0, 2 and bytes 1, 3 as pairs of 16 bits. */
WORD vi vi_dot_bytes(vi acc, vi a, vi b) {
    __m512i even = _mm512_and_si512(a, _mm512_set1_epi32(0x00ff00ff));
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(even, _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8)));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8)));
}
WORD vf vf_code(vi x, int i) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sllv_epi32(x, _mm512_set1_epi32(16 - 16 * i)), 16));
}
WORD void vi_store_codes(int32_t *p, const vf *x) {
    _mm512_storeu_si512(p, _mm512_or_si512(_mm512_cvtps_epi32(x[0]), _mm512_slli_epi32(_mm512_cvtps_epi32(x[1]), 16)));
}

#endif

WORD void vf_store_bytes(unsigned char *p, vf x) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
WORD vi vi_dot_at(vi acc, const int32_t *a, vi b) { return vi_dot(acc, vi_load(a), b); }

/* ---- bfloat16: pairs in a lane where the CPU multiplies them, else floats that were rounded to it ---- */

#ifdef __AVX512BF16__

enum { BF16_GROUP = 2 };

WORD vf vf_dot_bf16(vf acc, vi a, vi b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}
WORD void vi_store_bf16(int32_t *p, const vf *x) {
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(pairs, halves));
}

#else

enum { BF16_GROUP = 1 };

WORD vf vf_dot_bf16(vf acc, vi a, vi b) { return vf_fma(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc); }
WORD void vi_store_bf16(int32_t *p, const vf *x) {
    __m512i u = _mm512_castps_si512(x[0]), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    u = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    _mm512_storeu_si512(p, _mm512_and_si512(u, _mm512_set1_epi32((int)0xffff0000)));
}

#endif

/* ---- quantisation ---- */

WORD vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
WORD __m128i codes_of(vf x) {
    x = vf_min(vf_max(x, vf_set(-127.0f)), vf_set(127.0f));
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x));
}
WORD void vf_store_codes(signed char *p, vf x) { _mm_storeu_si128((__m128i *)p, codes_of(x)); }
WORD void vf_store_codes_part(signed char *p, vf x, ptrdiff_t n) { _mm_mask_storeu_epi8(p, first_lanes(n), codes_of(x)); }

/* ---- 16-bit floats in memory. vcvtneps2bf16 is not used: it takes denormals for 0. ---- */

WORD vf from_half(__m256i x) { return _mm512_cvtph_ps(x); }
WORD vf from_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
WORD __m256i to_half(vf x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
WORD __m256i to_bf16(vf x) {
    __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i nan = _mm512_or_si512(_mm512_and_si512(u, _mm512_set1_epi32((int)0x80000000)), _mm512_set1_epi32(0x7fc00000));
    u = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    u = _mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16));
}

WORD __m256i load_16(const uint16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
WORD __m256i load_16_part(const uint16_t *p, ptrdiff_t n) { return _mm256_maskz_loadu_epi16(first_lanes(n), p); }
WORD void store_16(uint16_t *p, __m256i x) { _mm256_storeu_si256((__m256i *)p, x); }
WORD void store_16_part(uint16_t *p, __m256i x, ptrdiff_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), x); }
