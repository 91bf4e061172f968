/* The vocabulary that the kernels are written in, for the build that CYFLASH_SIMD names.
 *
 * vf is a vector of LANES floats, vi one of LANES 32-bit integers or groups of GROUP codes. Every header defines the
 * same words; vocabulary.pxi and quantise.pxi list them.
 * A product tile is ROWS x VECTORS vectors of accumulators; each header shows that it fits the registers.
 */
#ifndef CYFLASH_SIMD_H
#define CYFLASH_SIMD_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define WORD static inline __attribute__((always_inline))

/* Asks for a cache line ahead of its use; never faults. */
WORD void prefetch(const void *p) { __builtin_prefetch(p); }
WORD void prefetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }
enum { CACHE_LINE = 64 };

#include CYFLASH_SIMD

/* Query rows of a full panel: one in each lane of VECTORS vectors. Products are compiled for one vector, for MIDDLE and
 * for VECTORS of them. */
enum { PANEL = LANES * VECTORS, MIDDLE = VECTORS > 4 ? VECTORS / 2 : 2 };

/* LANES values of 16 bits in memory, as floats: every header says how it moves and how it converts them. Stores round
 * half to even, beyond the largest value to infinity, and keep NaN. */
WORD vf vf_load_half(const uint16_t *p) { return from_half(load_16(p)); }
WORD vf vf_load_bf16(const uint16_t *p) { return from_bf16(load_16(p)); }
WORD vf vf_load_half_part(const uint16_t *p, ptrdiff_t n) { return from_half(load_16_part(p, n)); }
WORD vf vf_load_bf16_part(const uint16_t *p, ptrdiff_t n) { return from_bf16(load_16_part(p, n)); }
WORD void vf_store_half(uint16_t *p, vf x) { store_16(p, to_half(x)); }
WORD void vf_store_bf16(uint16_t *p, vf x) { store_16(p, to_bf16(x)); }
WORD void vf_store_half_part(uint16_t *p, vf x, ptrdiff_t n) { store_16_part(p, to_half(x), n); }
WORD void vf_store_bf16_part(uint16_t *p, vf x, ptrdiff_t n) { store_16_part(p, to_bf16(x), n); }

#endif
