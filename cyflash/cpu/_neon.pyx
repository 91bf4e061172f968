# The neon build of the kernels: the algorithm is in kernel.pxi and driver.pxi, its words in simd/neon.h.
include "driver.pxi"
