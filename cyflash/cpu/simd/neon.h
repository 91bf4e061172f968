/* Armv8.2 with the dot product of bytes (NEON, "asimddp"): 4 lanes, 32 registers.
 *
 * Tile: 4 rows x 6 vectors = 24 accumulators + 6 operands + 1 broadcast = 31 of 32 registers;
 * a step of 24 FMAs takes 6 + 4 = 10 loads, within two FMAs and two loads a cycle.
 */
#include <arm_neon.h>

enum { LANES = 4, VECTORS = 6, ROWS = 4, UNROLL = 1 };

typedef float32x4_t vf;

WORD vf vf_set(float x) { return vdupq_n_f32(x); }
WORD vf vf_load(const float *p) { return vld1q_f32(p); }
WORD void vf_store(float *p, vf x) { vst1q_f32(p, x); }
WORD vf vf_load_part(const float *p, ptrdiff_t n) {
    vf x = vf_set(0.0f);
    if (n > 0) x = vld1q_lane_f32(p, x, 0);
    if (n > 1) x = vld1q_lane_f32(p + 1, x, 1);
    if (n > 2) x = vld1q_lane_f32(p + 2, x, 2);
    if (n > 3) x = vld1q_lane_f32(p + 3, x, 3);
    return x;
}
WORD void vf_store_part(float *p, vf x, ptrdiff_t n) {
    if (n > 0) vst1q_lane_f32(p, x, 0);
    if (n > 1) vst1q_lane_f32(p + 1, x, 1);
    if (n > 2) vst1q_lane_f32(p + 2, x, 2);
    if (n > 3) vst1q_lane_f32(p + 3, x, 3);
}

WORD vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
WORD vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
WORD vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
WORD vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
WORD vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
/* not vmaxq_f32 and vminq_f32, which give NaN where either is */
WORD vf vf_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
WORD vf vf_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
WORD float vf_highest(vf a) { return vmaxnmvq_f32(a); }
WORD float vf_total(vf a) { return vaddvq_f32(a); }
WORD vf vf_abs(vf a) { return vabsq_f32(a); }
WORD vf vf_copysign(vf size, vf sign) { return vbslq_f32(vdupq_n_u32(0x80000000), sign, size); }
WORD vf vf_less(vf a, vf b, vf x, vf y) { return vbslq_f32(vcltq_f32(a, b), x, y); }

/* -200 is below every exponent that a float can reach in two steps: the result is 0, as for -inf */
WORD vf clamped(vf x) { return vf_max(vf_set(-200.0f), x); }
WORD vf power2(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }

WORD vf vf_fraction(vf x) { return vsubq_f32(clamped(x), vrndmq_f32(clamped(x))); }
/* in two factors, so that results below 2^-126 are denormal, not zero */
WORD vf vf_scale2(vf a, vf x) {
    int32x4_t n = vcvtmq_s32_f32(clamped(x)), half = vshrq_n_s32(n, 1);
    return vmulq_f32(vmulq_f32(a, power2(half)), power2(vsubq_s32(n, half)));
}

WORD vf vf_hide(vf x, vf a, vf y) { return vbslq_f32(vceqq_f32(a, vf_set(-INFINITY)), y, x); }
WORD vf vf_inside(vf x, vf j, vf low, vf high) {
    return vbslq_f32(vandq_u32(vcgeq_f32(j, low), vcleq_f32(j, high)), x, vf_set(-INFINITY));
}
WORD vf vf_keep_part(const uint8_t *p, ptrdiff_t n) {
    uint32_t bytes = 0;
    memcpy(&bytes, p, (size_t)n);
    uint32x4_t kept = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
    return vbslq_f32(vceqq_u32(kept, vdupq_n_u32(0)), vf_set(-INFINITY), vf_set(0.0f));
}

WORD void vf_transpose(vf *t) {
    float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(t[0], t[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(t[0], t[1]));
    float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(t[2], t[3])), d = vreinterpretq_f64_f32(vtrn2q_f32(t[2], t[3]));
    t[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    t[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    t[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    t[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

/* ---- integers: the same 4 x 6 tile, one dot product of four signed bytes where fp32 has one FMA ---- */

typedef int32x4_t vi;

/* Codes of queries are signed, as they come. Those of weights, 0 to 255, are stored less 128: see int8.pxi. */
enum { GROUP = 4, ZERO_POINT = 0, WEIGHT_OFFSET = 128, RESIDENT = VECTORS };
typedef int8_t code;

WORD vi vi_set(int32_t x) { return vdupq_n_s32(x); }
WORD vi vi_load(const int32_t *p) { return vld1q_s32(p); }
WORD vi vi_load_part(const int32_t *p, ptrdiff_t n) {
    return vreinterpretq_s32_f32(vf_load_part((const float *)p, n));
}
WORD vi vi_add(vi a, vi b) { return vaddq_s32(a, b); }
WORD vi vi_and(vi a, vi b) { return vandq_s32(a, b); }
WORD vi vi_or(vi a, vi b) { return vorrq_s32(a, b); }
WORD vf vf_bits(vi x) { return vreinterpretq_f32_s32(x); }
WORD vi vi_bits(vf x) { return vreinterpretq_s32_f32(x); }
WORD vf vf_from_int(vi x) { return vcvtq_f32_s32(x); }
WORD vf vf_sums(const vf *x) { return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])); }
WORD vi vi_sums(const vi *x) { return vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3])); }
WORD vf vf_byte(vi x, int i) { return vcvtq_f32_s32(vshrq_n_s32(vshlq_s32(x, vdupq_n_s32(24 - 8 * i)), 24)); }
WORD vf vf_code(vi x, int i) { return vf_byte(x, i); }

WORD vi vi_dot(vi acc, vi a, vi b) { return vdotq_s32(acc, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }
WORD vi vi_dot_at(vi acc, const int32_t *a, vi b) { return vi_dot(acc, vi_load(a), b); }
/* a b = 2 (a >> 1) b + (a & 1) b: an unsigned byte is too large for the signed dot product, its halves are not. Three
 * of them where other builds have one, but the few rows that come here wait for memory, and a is often a constant. */
WORD vi vi_dot_bytes(vi acc, vi a, vi b) {
    vi half = vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(a), 1));
    acc = vi_dot(acc, vandq_s32(a, vi_set(0x01010101)), b);
    return vi_dot(vi_dot(acc, half, b), half, b);
}

WORD void vi_store_codes(int32_t *p, const vf *x) {
    int16x8_t low = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(x[0])), vmovn_s32(vcvtnq_s32_f32(x[1])));
    int16x8_t high = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(x[2])), vmovn_s32(vcvtnq_s32_f32(x[3])));
    uint8x16_t planes = vcombine_u8(vreinterpret_u8_s8(vmovn_s16(low)), vreinterpret_u8_s8(vmovn_s16(high)));
    static const uint8_t groups[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    uint8x16_t codes = veorq_u8(vqtbl1q_u8(planes, vld1q_u8(groups)), vdupq_n_u8(0x80)); /* less 128 */
    vst1q_s32(p, vreinterpretq_s32_u8(codes));
}
WORD void vf_store_bytes(unsigned char *p, vf x) {
    uint16x4_t words = vqmovun_s32(vcvtnq_s32_f32(x));
    uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vqmovn_u16(vcombine_u16(words, words))), 0);
    memcpy(p, &bytes, sizeof bytes);
}

/* ---- bfloat16: floats that were rounded to it ---- */

enum { BF16_GROUP = 1 };

/* half to even; not for NaN */
WORD uint32x4_t rounded_bf16(vf x) {
    uint32x4_t u = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    return vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
}

WORD vf vf_dot_bf16(vf acc, vi a, vi b) { return vf_fma(vf_bits(a), vf_bits(b), acc); }
WORD void vi_store_bf16(int32_t *p, const vf *x) {
    vst1q_s32(p, vreinterpretq_s32_u32(vandq_u32(rounded_bf16(x[0]), vdupq_n_u32(0xffff0000))));
}

/* ---- quantisation ---- */

WORD uint32_t codes_of(vf x) {
    int16x4_t words = vmovn_s32(vcvtnq_s32_f32(vf_min(vf_max(x, vf_set(-127.0f)), vf_set(127.0f))));
    return vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
}
WORD void vf_store_codes(signed char *p, vf x) { uint32_t codes = codes_of(x); memcpy(p, &codes, sizeof codes); }
WORD void vf_store_codes_part(signed char *p, vf x, ptrdiff_t n) {
    uint32_t codes = codes_of(x);
    memcpy(p, &codes, (size_t)n);
}

/* ---- 16-bit floats in memory ---- */

WORD vf from_half(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
WORD vf from_bf16(uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
WORD uint16x4_t to_half(vf x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
WORD uint16x4_t to_bf16(vf x) {
    uint32x4_t sign = vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x80000000));
    uint32x4_t nan = vorrq_u32(sign, vdupq_n_u32(0x7fc00000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded_bf16(x), nan), 16);
}

WORD uint16x4_t load_16(const uint16_t *p) { return vld1_u16(p); }
WORD void store_16(uint16_t *p, uint16x4_t x) { vst1_u16(p, x); }
WORD uint16x4_t load_16_part(const uint16_t *p, ptrdiff_t n) {
    uint64_t bits = 0;
    memcpy(&bits, p, (size_t)n * sizeof *p);
    return vcreate_u16(bits);
}
WORD void store_16_part(uint16_t *p, uint16x4_t x, ptrdiff_t n) {
    uint64_t bits = vget_lane_u64(vreinterpret_u64_u16(x), 0);
    memcpy(p, &bits, (size_t)n * sizeof *p);
}
