/* AVX2 with FMA: 8 lanes, 16 registers.
 *
 * Tile: 4 rows x 3 vectors = 12 accumulators + 3 operands + 1 broadcast = 16 of 16 registers;
 * a step of 12 FMAs takes 3 + 4 = 7 loads, within two FMAs and two loads a cycle. Unrolled, it is 15 % slower (GCC 12).
 */
#include <immintrin.h>

enum { LANES = 8, VECTORS = 3, ROWS = 4, UNROLL = 1 };

typedef __m256 vf;

WORD __m256i first_lanes(ptrdiff_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

WORD vf vf_set(float x) { return _mm256_set1_ps(x); }
WORD vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
WORD vf vf_load_part(const float *p, ptrdiff_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
WORD void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
WORD void vf_store_part(float *p, vf x, ptrdiff_t n) { _mm256_maskstore_ps(p, first_lanes(n), x); }

WORD vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
WORD vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
WORD vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
WORD vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
WORD vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
WORD vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
WORD float vf_highest(vf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
WORD float vf_total(vf a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
WORD vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
WORD vf vf_copysign(vf size, vf sign) { return _mm256_or_ps(size, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f))); }
WORD vf vf_less(vf a, vf b, vf x, vf y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }

/* -200 is below every exponent that a float can reach in two steps: the result is 0, as for -inf */
WORD vf floor_clamped(vf x) { return _mm256_floor_ps(_mm256_max_ps(_mm256_set1_ps(-200.0f), x)); }
WORD vf power2(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }

WORD vf vf_fraction(vf x) { return _mm256_sub_ps(_mm256_max_ps(_mm256_set1_ps(-200.0f), x), floor_clamped(x)); }
/* in two factors, so that results below 2^-126 are denormal, not zero */
WORD vf vf_scale2(vf a, vf x) {
    __m256i n = _mm256_cvttps_epi32(floor_clamped(x)), half = _mm256_srai_epi32(n, 1);
    return _mm256_mul_ps(_mm256_mul_ps(a, power2(half)), power2(_mm256_sub_epi32(n, half)));
}

WORD vf vf_hide(vf x, vf a, vf y) {
    return _mm256_blendv_ps(x, y, _mm256_cmp_ps(a, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ));
}
WORD vf vf_inside(vf x, vf j, vf low, vf high) {
    __m256 keep = _mm256_and_ps(_mm256_cmp_ps(j, low, _CMP_GE_OQ), _mm256_cmp_ps(j, high, _CMP_LE_OQ));
    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, keep);
}
WORD vf vf_keep_part(const uint8_t *p, ptrdiff_t n) {
    uint64_t bytes = 0;
    memcpy(&bytes, p, (size_t)n);
    __m256i hidden = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes)), _mm256_setzero_si256());
    return _mm256_and_ps(_mm256_castsi256_ps(hidden), _mm256_set1_ps(-INFINITY));
}

WORD void vf_transpose(vf *t) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(t[i], t[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(t[i], t[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    for (int c = 0; c < 4; c++) {
        t[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
        t[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
}

/* ---- integers: the same tile, one dot product of a group of codes where fp32 has one FMA ---- */

typedef __m256i vi;

WORD vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
WORD vi vi_load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
WORD vi vi_load_part(const int32_t *p, ptrdiff_t n) { return _mm256_maskload_epi32(p, first_lanes(n)); }
WORD vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
WORD vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
WORD vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
WORD vf vf_bits(vi x) { return _mm256_castsi256_ps(x); }
WORD vi vi_bits(vf x) { return _mm256_castps_si256(x); }
WORD vf vf_from_int(vi x) { return _mm256_cvtepi32_ps(x); }
WORD vf vf_byte(vi x, int i) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sllv_epi32(x, _mm256_set1_epi32(24 - 8 * i)), 24));
}

/* Pairs of vectors are added as their lanes are put together. */
#define SUMS(name, type, to_ps, of_ps, add)                                                                     \
    WORD type name(const type *x) {                                                                             \
        __m256 a, b;                                                                                            \
        type t[4], u[2];                                                                                        \
        for (int i = 0; i < 4; i++) {                                                                           \
            a = to_ps(x[2 * i]), b = to_ps(x[2 * i + 1]);                                                       \
            t[i] = add(of_ps(_mm256_unpacklo_ps(a, b)), of_ps(_mm256_unpackhi_ps(a, b)));                       \
        }                                                                                                       \
        for (int i = 0; i < 2; i++) {                                                                           \
            a = to_ps(t[2 * i]), b = to_ps(t[2 * i + 1]);                                                       \
            u[i] = add(of_ps(_mm256_shuffle_ps(a, b, 0x44)), of_ps(_mm256_shuffle_ps(a, b, 0xee)));             \
        }                                                                                                       \
        a = to_ps(u[0]), b = to_ps(u[1]);                                                                       \
        return add(of_ps(_mm256_permute2f128_ps(a, b, 0x20)), of_ps(_mm256_permute2f128_ps(a, b, 0x31)));       \
    }
SUMS(vf_sums, vf, , , vf_add)
SUMS(vi_sums, vi, vf_bits, vi_bits, vi_add)
#undef SUMS

WORD void vf_store_bytes(unsigned char *p, vf x) {
    __m256i n = _mm256_cvtps_epi32(x);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
}

#ifdef __AVXVNNI__

enum { GROUP = 4, ZERO_POINT = 128, WEIGHT_OFFSET = 0, RESIDENT = 3 };
typedef int8_t code;

/* As assembly: around the intrinsic GCC 12 spills. Without the prefix the assembler would take the EVEX form. */
WORD vi vi_dot(vi acc, vi a, vi b) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
    return acc;
}
WORD vi vi_dot_at(vi acc, const int32_t *a, vi b) { return vi_dot(acc, vi_load(a), b); }
/* here b is often used once, from memory */
WORD vi vi_dot_bytes(vi acc, vi a, vi b) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(a), "xm"(b));
    return acc;
}
WORD vf vf_code(vi x, int i) { return vf_byte(_mm256_xor_si256(x, _mm256_set1_epi32((int)0x80808080)), i); }
WORD void vi_store_codes(int32_t *p, const vf *x) {
    __m256i low = _mm256_or_si256(_mm256_cvtps_epi32(x[0]), _mm256_slli_epi32(_mm256_cvtps_epi32(x[1]), 8));
    __m256i high = _mm256_or_si256(_mm256_cvtps_epi32(x[2]), _mm256_slli_epi32(_mm256_cvtps_epi32(x[3]), 8));
    _mm256_storeu_si256((__m256i *)p, _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
}

#else

/* Without VNNI: codes of 16 bits, since vpmaddubsw saturates. */
enum { GROUP = 2, ZERO_POINT = 0, WEIGHT_OFFSET = 0, RESIDENT = 2 };
typedef int16_t code;

/* As assembly: GCC 12 puts the multiplications of a tile first, and then spills their results. 12 accumulators + 1
 * product + 1 broadcast leave 2 registers for 3 operands, so the last is read each time: 10 loads for 12 products. */
WORD vi vi_dot(vi acc, vi a, vi b) {
    __m256i product;
    __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(a), "x"(b));
    return acc;
}
WORD vi vi_dot_at(vi acc, const int32_t *a, vi b) {
    __m256i product;
    __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0"
            : "+x"(acc), "=&x"(product) : "m"(*(const __m256i_u *)a), "x"(b));
    return acc;
}
/* Bytes 0, 2 and bytes 1, 3 as pairs of 16 bits. */
WORD vi vi_dot_bytes(vi acc, vi a, vi b) {
    __m256i even = _mm256_and_si256(a, _mm256_set1_epi32(0x00ff00ff));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8)));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8)));
}
WORD vf vf_code(vi x, int i) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sllv_epi32(x, _mm256_set1_epi32(16 - 16 * i)), 16));
}
WORD void vi_store_codes(int32_t *p, const vf *x) {
    __m256i both = _mm256_or_si256(_mm256_cvtps_epi32(x[0]), _mm256_slli_epi32(_mm256_cvtps_epi32(x[1]), 16));
    _mm256_storeu_si256((__m256i *)p, both);
}

#endif

/* ---- bfloat16: no CPU with this build multiplies it, so floats that were rounded to it ---- */

enum { BF16_GROUP = 1 };

WORD vf vf_dot_bf16(vf acc, vi a, vi b) { return vf_fma(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), acc); }
WORD void vi_store_bf16(int32_t *p, const vf *x) {
    __m256i u = _mm256_castps_si256(x[0]), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    u = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    _mm256_storeu_si256((__m256i *)p, _mm256_and_si256(u, _mm256_set1_epi32((int)0xffff0000)));
}

/* ---- quantisation ---- */

WORD vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
WORD int64_t codes_of(vf x) {
    x = vf_min(vf_max(x, vf_set(-127.0f)), vf_set(127.0f));
    __m256i n = _mm256_cvtps_epi32(x);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    return _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
}
WORD void vf_store_codes(signed char *p, vf x) { int64_t codes = codes_of(x); memcpy(p, &codes, LANES); }
WORD void vf_store_codes_part(signed char *p, vf x, ptrdiff_t n) {
    int64_t codes = codes_of(x);
    memcpy(p, &codes, (size_t)n);
}

/* ---- 16-bit floats in memory ---- */

WORD vf from_half(__m128i x) { return _mm256_cvtph_ps(x); }
WORD vf from_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
WORD __m128i to_half(vf x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
WORD __m128i to_bf16(vf x) {
    __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256 nan = _mm256_or_ps(_mm256_and_ps(x, _mm256_set1_ps(-0.0f)), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)));
    u = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    u = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(u), nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    u = _mm256_srli_epi32(u, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
}

WORD __m128i load_16(const uint16_t *p) { return _mm_loadu_si128((const __m128i *)p); }
WORD __m128i load_16_part(const uint16_t *p, ptrdiff_t n) {
    __m128i x = _mm_setzero_si128();
    memcpy(&x, p, (size_t)n * sizeof *p);
    return x;
}
WORD void store_16(uint16_t *p, __m128i x) { _mm_storeu_si128((__m128i *)p, x); }
WORD void store_16_part(uint16_t *p, __m128i x, ptrdiff_t n) { memcpy(p, &x, (size_t)n * sizeof *p); }
