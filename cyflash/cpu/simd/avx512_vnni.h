/* AVX-512 with VNNI: dot products of bytes.
 * The words are those of avx512.h, which asks the compiler what it may use.
 */
#include "avx512.h"
