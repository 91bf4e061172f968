# Arrays of float32, float16 or bfloat16, read as floats a vector at a time: what reads them is written once, and no
# float32 copy of a whole array is made.

from cyflash.arrays import kind_of


cdef enum Kind:
    # What arrays hold, and what products multiply
    FLOAT32, FLOAT16, BFLOAT16, INT8


KINDS = {"fp32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16, "int8": INT8}


cdef inline Py_ssize_t size_of(const Kind kind) noexcept nogil:
    return 4 if kind == FLOAT32 else 1 if kind == INT8 else 2


cdef struct Floats:
    # An array (B, H, L, D), the last axis contiguous. Strides in bytes.
    const char* data
    Py_ssize_t stride[3]
    Kind kind


cdef Floats floats_of(x) except *:
    """Where x lies, which its caller holds: a NumPy array of four axes and one of the three dtypes, no axis empty."""
    cdef Floats found
    cdef const float[:, :, :, :] whole
    cdef const unsigned short[:, :, :, :] bits
    cdef int i
    found.kind = KINDS[kind_of(x.dtype)]
    if found.kind == FLOAT32:
        whole = x
        found.data = <const char*> &whole[0, 0, 0, 0]
    else:
        bits = x.view(np.uint16)  # bfloat16 has no buffer of its own
        found.data = <const char*> &bits[0, 0, 0, 0]
    for i in range(3):
        found.stride[i] = x.strides[i]
    return found


cdef inline const char* at(const Floats* x, Py_ssize_t b, Py_ssize_t h, Py_ssize_t row) noexcept nogil:
    return x.data + b * x.stride[0] + h * x.stride[1] + row * x.stride[2]


cdef inline const char* beyond(const char* p, Py_ssize_t n, const Kind kind) noexcept nogil:
    """p, n values on."""
    return p + n * size_of(kind)


cdef inline vf load_floats(const char* p, const Kind kind) noexcept nogil:
    if kind == FLOAT16:
        return vf_load_half(<const unsigned short*> p)
    if kind == BFLOAT16:
        return vf_load_bf16(<const unsigned short*> p)
    return vf_load(<const float*> p)


cdef inline vf load_floats_part(const char* p, Py_ssize_t n, const Kind kind) noexcept nogil:
    """The first n lanes; 0 elsewhere; reads nothing beyond."""
    if kind == FLOAT16:
        return vf_load_half_part(<const unsigned short*> p, n)
    if kind == BFLOAT16:
        return vf_load_bf16_part(<const unsigned short*> p, n)
    return vf_load_part(<const float*> p, n)
