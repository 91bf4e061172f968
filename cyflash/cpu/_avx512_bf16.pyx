# The avx512_bf16 build of the kernels: the algorithm is in kernel.pxi and driver.pxi, its words in simd/avx512_bf16.h.
include "driver.pxi"
