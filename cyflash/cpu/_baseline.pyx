# The baseline build of the kernels: the algorithm is in kernel.pxi and driver.pxi, its words in simd/baseline.h.
include "driver.pxi"
