# The avx2 build of the kernels: the algorithm is in kernel.pxi and driver.pxi, its words in simd/avx2.h.
include "driver.pxi"
