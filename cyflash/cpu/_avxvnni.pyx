# The avxvnni build of the kernels: the algorithm is in kernel.pxi and driver.pxi, its words in simd/avxvnni.h.
include "driver.pxi"
