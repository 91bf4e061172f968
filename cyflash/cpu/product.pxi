# The register-tiled product in float32, and its two uses: S^T = K Q^T and O^T = V^T P^T.

cdef enum:
    # At most this many products are added one after another in a score; a longer sum is cut into equal parts, so that
    # its rounding error grows with their number. Head dimensions up to it, the usual ones, pay nothing.
    LONGEST_SUM = 128


cdef inline void multiply_step(
    vf* acc, const float* a, const float** b, const Py_ssize_t step, Py_ssize_t t, const int vectors
) noexcept nogil:
    """acc[i][j] += b[i][t * step] * a[t][j]"""
    cdef int i, j
    cdef vf x[VECTORS]
    cdef vf y
    for j in range(vectors):
        x[j] = vf_load(a + t * PANEL + j * LANES)
    for i in range(ROWS):
        y = vf_set(b[i][t * step])
        for j in range(vectors):
            acc[i * VECTORS + j] = vf_fma(y, x[j], acc[i * VECTORS + j])


cdef inline void multiply(
    vf* acc, const float* a, const float** b, const Py_ssize_t step, Py_ssize_t n, const int vectors
) noexcept nogil:
    """acc[i][j] = sum over t < n of b[i][t * step] * a[t][j], one addition after another.

    a: [n][PANEL] tile. b: ROWS pointers to floats with stride `step`. acc: [ROWS][VECTORS] vectors, `vectors` of each
    row used. `vectors` (and step = 1) are constants at every call, so that acc lives in registers.
    """
    cdef Py_ssize_t t
    cdef int i, j, u
    for i in range(ROWS):
        for j in range(vectors):
            acc[i * VECTORS + j] = vf_set(0.0)
    for t in range(n // UNROLL):
        for u in range(UNROLL):
            multiply_step(acc, a, b, step, t * UNROLL + u, vectors)
    for t in range(n // UNROLL * UNROLL, n):
        multiply_step(acc, a, b, step, t, vectors)


cdef inline void scores_tile(
    float* s, float* top, const float* q, const float* k, Py_ssize_t k_stride, Py_ssize_t D,
    Py_ssize_t begin, Py_ssize_t end, const int vectors
) noexcept nogil:
    cdef Py_ssize_t c, g, key, d, part, longest = (D - 1) // ((D + LONGEST_SUM - 1) // LONGEST_SUM) + 1
    cdef int i, j
    cdef float* row
    cdef vf highest
    cdef vf acc[ROWS * VECTORS]
    cdef const float* b[ROWS]
    for g in range(begin // ROWS, (end + ROWS - 1) // ROWS):
        c = g * ROWS
        for i in range(ROWS):
            key = min(max(c + i, begin), end - 1)
            b[i] = k + key * k_stride
        d = 0
        while d < D:
            part = min(D - d, longest)
            multiply(acc, q + d * PANEL, b, 1, part, vectors)
            for i in range(ROWS):
                row = s + (c + i) * PANEL
                for j in range(vectors):
                    if d > 0:
                        acc[i * VECTORS + j] = vf_add(vf_load(row + j * LANES), acc[i * VECTORS + j])
                    vf_store(row + j * LANES, acc[i * VECTORS + j])
                b[i] += part
            d += part
        for j in range(vectors):
            highest = vf_load(top + j * LANES)
            for i in range(ROWS):
                highest = vf_max(highest, vf_load(s + (c + i) * PANEL + j * LANES))
            vf_store(top + j * LANES, highest)


cdef void scores(
    float* s, float* top, const float* q, const float* k, Py_ssize_t k_stride, Py_ssize_t D,
    Py_ssize_t begin, Py_ssize_t end, int vectors
) noexcept nogil:
    """S^T[c][r] = sum_d K[c][d] Q[r][d] for keys begin <= c < end of a block, and top[r] = max(top[r], max_c S^T).

    k: key 0 of the block. Whole groups of ROWS rows of s are written; the rows outside [begin, end) repeat its first or
    last key, so that no other key is read, and the caller hides them.
    """
    if vectors == 1:
        scores_tile(s, top, q, k, k_stride, D, begin, end, 1)
    elif vectors == MIDDLE:
        scores_tile(s, top, q, k, k_stride, D, begin, end, MIDDLE)
    else:
        scores_tile(s, top, q, k, k_stride, D, begin, end, VECTORS)


cdef inline void accumulate_tile(
    float* o, const float* p, const float* v, Py_ssize_t v_stride, Py_ssize_t Dv, const float* alpha,
    Py_ssize_t n, const int vectors
) noexcept nogil:
    cdef Py_ssize_t d, g, column
    cdef int i, j
    cdef float* row
    cdef vf old
    cdef vf acc[ROWS * VECTORS]
    cdef const float* b[ROWS]
    for g in range((Dv + ROWS - 1) // ROWS):
        d = g * ROWS
        for i in range(ROWS):
            column = d + i if d + i < Dv else Dv - 1
            b[i] = v + column
        multiply(acc, p, b, v_stride, n, vectors)
        for i in range(ROWS):
            row = o + (d + i) * PANEL
            for j in range(vectors):
                old = vf_load(row + j * LANES)
                vf_store(row + j * LANES, vf_fma(old, vf_load(alpha + j * LANES), acc[i * VECTORS + j]))


cdef void accumulate(
    float* o, const float* p, const float* v, Py_ssize_t v_stride, Py_ssize_t Dv, const float* alpha,
    Py_ssize_t n, int vectors
) noexcept nogil:
    """O^T[d][r] = alpha[r] O^T[d][r] + sum over c < n of V[c][d] P^T[c][r].

    A block is summed from zero before it is added: the rounding error then grows with the number of blocks, not of
    keys. Rows of o from Dv up to the next multiple of ROWS are scratch.
    """
    if vectors == 1:
        accumulate_tile(o, p, v, v_stride, Dv, alpha, n, 1)
    elif vectors == MIDDLE:
        accumulate_tile(o, p, v, v_stride, Dv, alpha, n, MIDDLE)
    else:
        accumulate_tile(o, p, v, v_stride, Dv, alpha, n, VECTORS)


cdef void accumulate_visible(
    float* o, const float* p, const float* hidden, const float* v, Py_ssize_t v_stride, Py_ssize_t Dv,
    const float* alpha, Py_ssize_t n, int vectors
) noexcept nogil:
    """accumulate() where a product counts only if hidden[c][r] is not -inf: NaN and inf in values do not leak into rows
    that do not see them. The same additions in the same order, so the same bits wherever values are finite."""
    cdef Py_ssize_t c, d
    cdef int j
    cdef vf acc
    cdef float* place
    for d in range(Dv):
        for j in range(vectors):
            acc = vf_set(0.0)
            for c in range(n):
                acc = vf_hide(
                    vf_fma(vf_set(v[c * v_stride + d]), vf_load(p + c * PANEL + j * LANES), acc),
                    vf_load(hidden + c * PANEL + j * LANES), acc,
                )
            place = o + d * PANEL + j * LANES
            vf_store(place, vf_fma(vf_load(place), vf_load(alpha + j * LANES), acc))
