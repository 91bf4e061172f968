/* AVX2 with AVX-VNNI: dot products of bytes, in 256 bits.
 * The words are those of avx2.h, which asks the compiler what it may use.
 */
#include "avx2.h"
