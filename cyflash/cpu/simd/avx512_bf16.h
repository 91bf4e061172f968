/* AVX-512 with VNNI and BF16: dot products of bytes and of bfloat16.
 * The words are those of avx512.h, which asks the compiler what it may use.
 */
#include "avx512.h"
