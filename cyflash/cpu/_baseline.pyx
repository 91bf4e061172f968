# The baseline build of the kernels: the algorithm is in kernel.pxi and driver.pxi, its vocabulary in simd/baseline.h.
include "driver.pxi"
