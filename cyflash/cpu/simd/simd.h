/* The vocabulary that the kernels are written in, for the build that CYFLASH_SIMD names.
 *
 * vf is a vector of LANES floats. Every header defines the same words; kernel.pxi lists them.
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
enum { CACHE_LINE = 64 };

#include CYFLASH_SIMD

/* Query rows of a full panel: one in each lane of VECTORS vectors. */
enum { PANEL = LANES * VECTORS };

#endif
