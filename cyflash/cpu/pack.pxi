# Keys and values of quantised attention as the products read them, once for all the queries of a call.
#
# A group is 32 bits: GROUP codes, or BF16_GROUP bfloat16. Keys are grouped along the head dimension, values along the
# keys; what a last group lacks is 0.

cdef enum:
    PACK_KEYS = 64  # keys of a task, a multiple of every group: some microseconds of work


cdef void pack_key_rows(
    int* packed, const signed char* k, Py_ssize_t stride, Py_ssize_t n, Py_ssize_t D
) noexcept nogil:
    """n keys of D codes as rows [correction, groups...]; the correction takes ZERO_POINT times their sum back."""
    cdef Py_ssize_t key, d, groups = (D + GROUP - 1) // GROUP
    cdef int total
    cdef code* row
    for key in range(n):
        packed[groups] = 0  # the last group, whose last codes may be missing
        row = <code*> (packed + 1)
        total = 0
        for d in range(D):
            row[d] = <code> k[d]
            total += k[d]
        packed[0] = -ZERO_POINT * total
        packed += 1 + groups
        k += stride


cdef void pack_value_groups(
    int* packed, Py_ssize_t columns, const signed char* v, Py_ssize_t stride, Py_ssize_t n, Py_ssize_t Dv
) noexcept nogil:
    """n values of Dv codes as groups [n / GROUP][columns]."""
    cdef Py_ssize_t g, key, d, i
    cdef code* group
    for g in range((n + GROUP - 1) // GROUP):
        key = g * GROUP
        group = <code*> packed
        if key + GROUP <= n:
            for d in range(Dv):
                for i in range(GROUP):
                    group[d * GROUP + i] = <code> v[i * stride + d]
        else:
            for d in range(Dv):
                for i in range(GROUP):
                    group[d * GROUP + i] = <code> (v[i * stride + d] if key + i < n else 0)
        for d in range(Dv, columns):
            packed[d] = 0
        packed += columns
        v += GROUP * stride


ctypedef fused element:
    const signed char
    const float


cdef void pack_bf16_groups(
    int* packed, Py_ssize_t columns, element* v, Py_ssize_t stride, Py_ssize_t n, Py_ssize_t Dv
) noexcept nogil:
    """n values as bfloat16 groups [n / BF16_GROUP][columns]: the upper halves of their floats. Codes are exact."""
    cdef Py_ssize_t g, key, d, i
    cdef unsigned int word
    for g in range((n + BF16_GROUP - 1) // BF16_GROUP):
        key = g * BF16_GROUP
        for d in range(Dv):
            word = 0
            for i in range(BF16_GROUP):
                if key + i < n:
                    word |= bf16_bits(<float> v[i * stride + d]) << 16 * (i + 2 - BF16_GROUP)
            packed[d] = <int> word
        for d in range(Dv, columns):
            packed[d] = 0
        packed += columns
        v += BF16_GROUP * stride


def pack_keys(const signed char[:, :, :, :] k not None, int[:, :, :, ::1] packed not None, int threads):
    """(B, Hk, Lk, D) codes -> (B, Hk, Lk rounded up to ROWS, 1 + groups of D). The last axis of k is contiguous."""
    cdef Py_ssize_t Hk = k.shape[1], Lk = k.shape[2], D = k.shape[3]
    cdef Py_ssize_t t, head, key, chunks = (Lk + PACK_KEYS - 1) // PACK_KEYS
    if Lk == 0:
        return
    packed[:, :, Lk:] = 0
    for t in prange(k.shape[0] * Hk * chunks, nogil=True, num_threads=threads, schedule="static"):
        head = t // chunks
        key = t % chunks * PACK_KEYS
        pack_key_rows(
            &packed[head // Hk, head % Hk, key, 0], &k[head // Hk, head % Hk, key, 0], k.strides[2],
            min(<Py_ssize_t> PACK_KEYS, Lk - key), D,
        )


def pack_values(const signed char[:, :, :, :] v not None, int[:, :, :, ::1] packed not None, int threads):
    """(B, Hk, Lk, Dv) codes -> (B, Hk, groups of Lk, Dv rounded up to ROWS). The last axis of v is contiguous."""
    cdef Py_ssize_t Hk = v.shape[1], Lk = v.shape[2], Dv = v.shape[3]
    cdef Py_ssize_t t, head, key, chunks = (Lk + PACK_KEYS - 1) // PACK_KEYS
    if Lk == 0:
        return
    for t in prange(v.shape[0] * Hk * chunks, nogil=True, num_threads=threads, schedule="static"):
        head = t // chunks
        key = t % chunks * PACK_KEYS
        pack_value_groups(
            &packed[head // Hk, head % Hk, key // GROUP, 0], packed.shape[3], &v[head // Hk, head % Hk, key, 0],
            v.strides[2], min(<Py_ssize_t> PACK_KEYS, Lk - key), Dv,
        )


def pack_values_bf16(element[:, :, :, :] v not None, int[:, :, :, ::1] packed not None, int threads):
    """pack_values() into bfloat16, in groups of BF16_GROUP keys, from codes or from float32."""
    cdef Py_ssize_t Hk = v.shape[1], Lk = v.shape[2], Dv = v.shape[3]
    cdef Py_ssize_t t, head, key, chunks = (Lk + PACK_KEYS - 1) // PACK_KEYS
    if Lk == 0:
        return
    for t in prange(v.shape[0] * Hk * chunks, nogil=True, num_threads=threads, schedule="static"):
        head = t // chunks
        key = t % chunks * PACK_KEYS
        pack_bf16_groups(
            &packed[head // Hk, head % Hk, key // BF16_GROUP, 0], packed.shape[3], &v[head // Hk, head % Hk, key, 0],
            v.strides[2] // <Py_ssize_t> sizeof(v[0, 0, 0, 0]), min(<Py_ssize_t> PACK_KEYS, Lk - key), Dv,
        )
