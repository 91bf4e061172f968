# Products of bfloat16 with sums in float32: of queries, keys and values that are in it, on builds that multiply it; and
# of weights and the values of quantised attention, on every build.
#
# A word is a group of BF16_GROUP numbers: keys are grouped along the head dimension, values and weights along the keys.

cdef inline void multiply_bf16(
    vf* acc, const int* a, const int* b, Py_ssize_t step, const int vectors
) noexcept nogil:
    """acc[i][j] += the dot product of the groups b[i * step] and a[j]"""
    cdef int i, j
    cdef vi x[VECTORS]
    cdef vi y
    for j in range(vectors):
        x[j] = vi_load(a + j * LANES)
    for i in range(ROWS):
        y = vi_set(b[i * step])
        for j in range(vectors):
            acc[i * VECTORS + j] = vf_dot_bf16(acc[i * VECTORS + j], x[j], y)


cdef inline void scores_of_bf16_tile(
    float* s, float* top, const Panel* panel, const Block* keys, Py_ssize_t groups, Py_ssize_t begin, Py_ssize_t end,
    const int vectors
) noexcept nogil:
    cdef Py_ssize_t c, t, key
    cdef int i, j
    cdef const int* b[ROWS]
    cdef vi a[VECTORS]
    cdef vi y
    cdef vf factor, highest
    cdef vf acc[ROWS * VECTORS]
    c = begin // ROWS * ROWS
    while c < end:
        for i in range(ROWS):
            key = min(max(c + i, begin), end - 1)
            b[i] = keys.k_words + key * keys.k_pitch
            for j in range(vectors):
                acc[i * VECTORS + j] = vf_set(0.0)
        for t in range(groups):
            for j in range(vectors):
                a[j] = vi_load(panel.codes + t * PANEL + j * LANES)
            for i in range(ROWS):
                y = vi_set(b[i][t])
                for j in range(vectors):
                    acc[i * VECTORS + j] = vf_dot_bf16(acc[i * VECTORS + j], a[j], y)
        for j in range(vectors):
            factor = vf_load(panel.factor + j * LANES)
            highest = vf_load(top + j * LANES)
            for i in range(ROWS):
                acc[i * VECTORS + j] = vf_mul(acc[i * VECTORS + j], factor)
                vf_store(s + (c + i) * PANEL + j * LANES, acc[i * VECTORS + j])
            for i in range(ROWS):
                highest = vf_max(highest, acc[i * VECTORS + j])
            vf_store(top + j * LANES, highest)
        c += ROWS


cdef void scores_of_bf16(
    float* s, float* top, const Panel* panel, const Block* keys, Py_ssize_t groups, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """scores() from bfloat16: S^T[c][r] = factor[r] (k[c] . q[r]). Rows of s outside [begin, end) as in scores()."""
    if panel.vectors == 1:
        scores_of_bf16_tile(s, top, panel, keys, groups, begin, end, 1)
    elif panel.vectors == MIDDLE:
        scores_of_bf16_tile(s, top, panel, keys, groups, begin, end, MIDDLE)
    else:
        scores_of_bf16_tile(s, top, panel, keys, groups, begin, end, VECTORS)


cdef void pack_bf16(const Problem* x, const Head* head, Panel* panel) noexcept nogil:
    """The queries of a panel, which are bfloat16, in lanes as pairs along the head dimension; scale is their factor."""
    cdef Py_ssize_t chunk, w, r, n, row, groups = (x.D + BF16_GROUP - 1) // BF16_GROUP
    cdef int j
    cdef unsigned short halves[LANES * LANES * BF16_GROUP]
    cdef vf t[LANES]
    for r in range(PANEL):
        panel.factor[r] = x.scale
    for j in range(panel.vectors):
        row = j * LANES
        for chunk in range((groups + LANES - 1) // LANES):
            w = chunk * LANES
            n = min(<Py_ssize_t> (LANES * BF16_GROUP), x.D - w * BF16_GROUP)
            memset(halves, 0, sizeof(halves))
            for r in range(min(<Py_ssize_t> LANES, panel.lanes - row)):
                memcpy(
                    halves + r * LANES * BF16_GROUP,
                    head.q + lane_at(panel, row + r, x.q_stride[0], x.q_stride[1]) + 2 * w * BF16_GROUP, 2 * n,
                )
            for r in range(LANES):
                t[r] = vf_load(<const float*> halves + r * LANES)
            vf_transpose(t)
            for r in range(min(<Py_ssize_t> LANES, groups - w)):
                vf_store(<float*> panel.codes + (w + r) * PANEL + row, t[r])


cdef void round_weights(
    int* p, const float* s, const float* v_scale, Py_ssize_t begin, Py_ssize_t end, int vectors
) noexcept nogil:
    """P^T as bfloat16, in groups of BF16_GROUP keys; times v_scale[c], unless that is NULL."""
    cdef Py_ssize_t g, c
    cdef int j, i
    cdef vf x[BF16_GROUP]
    for g in range(begin // BF16_GROUP, end // BF16_GROUP):
        for j in range(vectors):
            for i in range(BF16_GROUP):
                c = g * BF16_GROUP + i
                x[i] = vf_load(s + c * PANEL + j * LANES)
                if v_scale != NULL:
                    x[i] = vf_mul(x[i], vf_set(v_scale[c]))
            vi_store_bf16(p + g * PANEL + j * LANES, x)


cdef inline void accumulate_bf16_tile(
    float* o, const int* p, const int* v, Py_ssize_t pitch, Py_ssize_t Dv, const float* alpha, float beta, Py_ssize_t n,
    const int vectors
) noexcept nogil:
    cdef Py_ssize_t d, t
    cdef int i, j
    cdef float* place
    cdef vf old
    cdef vf acc[ROWS * VECTORS]
    for d in range((Dv + ROWS - 1) // ROWS):
        for i in range(ROWS):
            for j in range(vectors):
                acc[i * VECTORS + j] = vf_set(0.0)
        for t in range(n):
            multiply_bf16(acc, p + t * PANEL, v + t * pitch + d * ROWS, 1, vectors)
        for i in range(ROWS):
            for j in range(vectors):
                place = o + (d * ROWS + i) * PANEL + j * LANES
                old = vf_mul(vf_load(place), vf_load(alpha + j * LANES))
                vf_store(place, vf_fma(acc[i * VECTORS + j], vf_set(beta), old))


cdef void accumulate_bf16(
    float* o, const int* p, const int* v, Py_ssize_t pitch, Py_ssize_t Dv, const float* alpha, float beta, Py_ssize_t n,
    int vectors
) noexcept nogil:
    """O^T[d][r] = alpha[r] O^T[d][r] + beta (sum of V[c][d] P^T[c][r] over n groups of keys), sums in float32."""
    if vectors == 1:
        accumulate_bf16_tile(o, p, v, pitch, Dv, alpha, beta, n, 1)
    elif vectors == MIDDLE:
        accumulate_bf16_tile(o, p, v, pitch, Dv, alpha, beta, n, MIDDLE)
    else:
        accumulate_bf16_tile(o, p, v, pitch, Dv, alpha, beta, n, VECTORS)


cdef void accumulate_visible_bf16(
    const Panel* panel, const int* p, const float* hidden, const int* v, Py_ssize_t pitch, Py_ssize_t Dv,
    const float* alpha, Py_ssize_t n
) noexcept nogil:
    """accumulate_bf16() with beta 1 where a product counts only if hidden[c][r] is not -inf; the same additions, so the
    same bits wherever values are finite."""
    cdef Py_ssize_t t, d
    cdef int j, i
    cdef vf acc
    cdef vi seen
    cdef float* place
    cdef int part[BF16_GROUP]
    for i in range(BF16_GROUP):
        part[i] = -1 if BF16_GROUP == 1 else <int> (<unsigned int> 0xffff << 16 * i)  # the bits of number i of a word
    for d in range(Dv):
        for j in range(panel.vectors):
            acc = vf_set(0.0)
            for t in range(n):
                seen = vi_set(0)
                for i in range(BF16_GROUP):
                    seen = vi_or(seen, vi_bits(vf_hide(
                        vf_bits(vi_set(part[i])),
                        vf_load(hidden + (t * BF16_GROUP + i) * PANEL + j * LANES), vf_set(0.0),
                    )))
                acc = vf_dot_bf16(
                    acc, vi_load(p + t * PANEL + j * LANES), vi_and(vi_set(v[t * pitch + d]), seen),
                )
            place = panel.o + d * PANEL + j * LANES
            vf_store(place, vf_fma(acc, vf_set(1.0), vf_mul(vf_load(place), vf_load(alpha + j * LANES))))


cdef void accumulate_weights_bf16(
    const Problem* x, const Panel* panel, const Block* keys, Py_ssize_t low, Py_ssize_t end, const Scratch* scratch,
    bint hides
) noexcept nogil:
    """The second product of a block whose values are bfloat16 groups, from its weights. low: a multiple of ROWS."""
    cdef bint tokens = keys.v_scale != NULL and x.codes.v_scale.tokens
    cdef Py_ssize_t first = low // BF16_GROUP, last = (end + BF16_GROUP - 1) // BF16_GROUP
    cdef int* p = scratch.p
    cdef const int* v = keys.v_words + first * keys.v_pitch
    if hides:  # scratch.p is where scratch.hidden is: the weights take the place of their floats instead
        p = <int*> scratch.s
    round_weights(
        p, scratch.s, keys.v_scale if tokens else NULL, low, round_up(end, ROWS), panel.vectors,
    )
    if hides:
        accumulate_visible_bf16(
            panel, p + first * PANEL, scratch.hidden + low * PANEL, v, keys.v_pitch, x.Dv, scratch.alpha, last - first,
        )
    else:
        accumulate_bf16(
            panel.o, p + first * PANEL, v, keys.v_pitch, x.Dv, scratch.alpha,
            1.0 if tokens or keys.v_scale == NULL else keys.v_scale[0], last - first, panel.vectors,
        )
