# The avx512 build of the kernels: the algorithm is in kernel.pxi and driver.pxi, its words in simd/avx512.h.
include "driver.pxi"
