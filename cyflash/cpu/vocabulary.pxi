# The words of simd/*.h, which every build defines.

from libc.stdint cimport uint64_t

cdef extern from "environment.h" nogil:
    uint64_t enter_environment() noexcept
    void leave_environment(uint64_t) noexcept

cdef extern from "simd.h" nogil:
    ctypedef struct vf:
        pass
    enum:
        LANES    # floats in a vector
        VECTORS  # vectors of query rows in a full panel
        ROWS     # keys (or value columns) of a register tile; divides LANES
        UNROLL   # steps of a product between two tests of its end
        PANEL    # LANES * VECTORS
        MIDDLE   # half of VECTORS, at least 2
        CACHE_LINE
    void prefetch(const void*) noexcept
    void prefetch_far(const void*) noexcept
    vf vf_set(float) noexcept
    vf vf_load(const float*) noexcept
    vf vf_load_part(const float*, Py_ssize_t n) noexcept         # the first n lanes; 0 elsewhere; reads nothing beyond
    void vf_store(float*, vf) noexcept
    void vf_store_part(float*, vf, Py_ssize_t n) noexcept
    vf vf_add(vf, vf) noexcept
    vf vf_sub(vf, vf) noexcept
    vf vf_mul(vf, vf) noexcept
    vf vf_div(vf, vf) noexcept
    vf vf_fma(vf a, vf b, vf c) noexcept                         # a * b + c
    vf vf_max(vf a, vf b) noexcept                               # b where either is NaN
    vf vf_min(vf a, vf b) noexcept                               # b where either is NaN
    float vf_highest(vf) noexcept                                # the greatest lane; any where one is NaN
    float vf_total(vf) noexcept                                  # the sum of the lanes
    vf vf_abs(vf) noexcept
    vf vf_copysign(vf size, vf sign) noexcept                    # size >= 0 with the sign of the other
    vf vf_less(vf a, vf b, vf x, vf y) noexcept                  # x where a < b, else y
    vf vf_fraction(vf x) noexcept       # x - floor(x) for -200 <= x <= 0; in [0, 1) below, -inf too; NaN for NaN
    vf vf_scale2(vf a, vf x) noexcept   # a * 2^floor(x) for x <= 0, also where that is 0 or denormal
    vf vf_hide(vf x, vf a, vf y) noexcept                        # y where a is -inf, else x
    vf vf_inside(vf x, vf j, vf low, vf high) noexcept           # x where low <= j <= high, else -inf
    vf vf_keep_part(const unsigned char*, Py_ssize_t n) noexcept  # 0 where the byte is set, -inf where not; n bytes
    void vf_transpose(vf*) noexcept                              # LANES vectors of LANES
    ctypedef struct vi:
        pass
    ctypedef signed char code  # or 16 bits
    enum:
        GROUP       # codes that share a 32-bit lane
        ZERO_POINT  # what the dot product wants added to the codes of its first factor
        WEIGHT_OFFSET  # what is taken from the codes of weights: 128 where the dot product is of signed bytes, else 0
        RESIDENT    # operand vectors of a tile that stay in registers in a product of codes
        BF16_GROUP  # bfloat16 values that share a 32-bit lane: 2, or 1 where they are floats that were rounded
    vi vi_set(int) noexcept
    vi vi_load(const int*) noexcept
    vi vi_dot(vi acc, vi a, vi b) noexcept                       # acc + GROUP products; a's codes with ZERO_POINT
    vi vi_dot_at(vi acc, const int* a, vi b) noexcept            # the same, with a in memory
    vi vi_load_part(const int*, Py_ssize_t n) noexcept           # as vf_load_part
    vi vi_add(vi, vi) noexcept
    vi vi_and(vi, vi) noexcept
    vi vi_or(vi, vi) noexcept
    vf vf_bits(vi) noexcept                                      # the same bits
    vi vi_bits(vf) noexcept
    vi vi_dot_bytes(vi acc, vi a, vi b) noexcept                 # acc + 4 products of unsigned bytes of a, signed of b
    vf vf_sums(const vf*) noexcept                               # lane i: the sum of the lanes of vector i of LANES
    vi vi_sums(const vi*) noexcept
    vf vf_byte(vi, int i) noexcept                               # signed byte i of each lane
    vf vf_from_int(vi) noexcept
    vf vf_code(vi, int i) noexcept                               # code i of each group, without ZERO_POINT
    void vi_store_codes(int*, const vf*) noexcept  # GROUP vectors, rounded half to even, less WEIGHT_OFFSET, as groups
    void vf_store_bytes(unsigned char*, vf) noexcept             # 0 to 255, rounded half to even
    vf vf_dot_bf16(vf acc, vi a, vi b) noexcept                  # acc + BF16_GROUP products
    void vi_store_bf16(int*, const vf*) noexcept                 # BF16_GROUP vectors, rounded half to even
    # LANES values of 16 bits; stores round half to even, to infinity beyond the largest value, and keep NaN
    vf vf_load_half(const unsigned short*) noexcept
    vf vf_load_half_part(const unsigned short*, Py_ssize_t n) noexcept  # as vf_load_part
    void vf_store_half(unsigned short*, vf) noexcept
    void vf_store_half_part(unsigned short*, vf, Py_ssize_t n) noexcept
    vf vf_load_bf16(const unsigned short*) noexcept
    vf vf_load_bf16_part(const unsigned short*, Py_ssize_t n) noexcept
    void vf_store_bf16(unsigned short*, vf) noexcept
    void vf_store_bf16_part(unsigned short*, vf, Py_ssize_t n) noexcept

from libc.string cimport memcpy, memset

cdef extern from "math.h" nogil:
    double exp(double) noexcept
    double log(double) noexcept
    float INFINITY

cdef extern from "float.h" nogil:
    float FLT_MAX, FLT_MIN

cdef float BF16_MAX = 3.3895313892515355e38  # the largest bfloat16
