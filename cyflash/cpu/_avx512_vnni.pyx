# The avx512_vnni build of the kernels: the algorithm is in kernel.pxi and driver.pxi, its words in simd/avx512_vnni.h.
include "driver.pxi"
