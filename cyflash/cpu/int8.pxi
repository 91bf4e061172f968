# Quantised attention: both products on codes of 8 bits (exact sums of 32 bits), or the second one on bfloat16.
#
#     S = (q8 . k8) s_q s_k scale + shift      the shift is what subtracting the mean of the keys took from the row
#     P = e^(S - top) s_v / omega              with the maximum `top` of the block's own scores, not the running one, and
#                                              its own row scale omega, so that 255 codes serve every row of every block
#     O = alpha O + e^(top - m') omega / 255 (p8 . v8)
#
# The denominator is summed from the weights before they are rounded. Sums of codes stay within 2^24 for D <= 1024 and
# Bc <= 512 (128 x 128 x 1024 and 255 x 128 x 512), so that they are exact as floats too.

# ---------------------------------------------------------------------------------------------------------------------
# The register-tiled product of codes, and its two uses


cdef inline void multiply_codes_step(
    vi* acc, const int* a, const int** b, const Py_ssize_t step, Py_ssize_t t, const int vectors
) noexcept nogil:
    """acc[i][j] += the dot product of the groups b[i][t * step] and a[t][j]"""
    cdef int i, j
    cdef vi x[VECTORS]
    cdef vi y
    for j in range(vectors):
        x[j] = vi_load(a + t * PANEL + j * LANES)
    for i in range(ROWS):
        y = vi_set(b[i][t * step])
        for j in range(vectors):
            if j < RESIDENT:
                acc[i * VECTORS + j] = vi_dot(acc[i * VECTORS + j], x[j], y)
            else:
                acc[i * VECTORS + j] = vi_dot_at(acc[i * VECTORS + j], a + t * PANEL + j * LANES, y)


cdef inline void multiply_codes(
    vi* acc, const int* a, const int** b, const Py_ssize_t step, Py_ssize_t n, const int vectors
) noexcept nogil:
    """acc[i][j] += sum over t < n of the dot products of the groups b[i][t * step] and a[t][j]; as multiply()."""
    cdef Py_ssize_t t
    cdef int u
    for t in range(n // UNROLL):
        for u in range(UNROLL):
            multiply_codes_step(acc, a, b, step, t * UNROLL + u, vectors)
    for t in range(n // UNROLL * UNROLL, n):
        multiply_codes_step(acc, a, b, step, t, vectors)


cdef inline void scores_of_codes_tile(
    float* s, float* top, const Panel* panel, const int* k, const float* k_scale, Py_ssize_t groups,
    Py_ssize_t begin, Py_ssize_t end, const int vectors, const bint scaled
) noexcept nogil:
    cdef Py_ssize_t c, g, key
    cdef int i, j
    cdef vi start
    cdef vf highest
    cdef vi acc[ROWS * VECTORS]
    cdef vf y[ROWS * VECTORS]
    cdef vf factor[VECTORS]
    cdef vf shift[VECTORS]
    cdef float scale[ROWS]
    cdef const int* b[ROWS]
    for g in range(begin // ROWS, (end + ROWS - 1) // ROWS):
        c = g * ROWS
        for i in range(ROWS):
            b[i] = k + (c + i) * (1 + groups)
        if scaled:
            for i in range(ROWS):
                scale[i] = k_scale[c + i]
        if c < begin or c + ROWS > end:
            for i in range(ROWS):
                key = min(max(c + i, begin), end - 1)
                b[i] = k + key * (1 + groups)
                if scaled:
                    scale[i] = k_scale[key]
        for i in range(ROWS):
            start = vi_set(b[i][0])
            b[i] += 1
            for j in range(vectors):
                acc[i * VECTORS + j] = start
        multiply_codes(acc, panel.codes, b, 1, groups, vectors)
        # in short loops, which GCC unrolls: the sums stay in registers
        for i in range(ROWS):
            for j in range(vectors):
                y[i * VECTORS + j] = vf_from_int(acc[i * VECTORS + j])
        if scaled:
            for i in range(ROWS):
                for j in range(vectors):
                    y[i * VECTORS + j] = vf_mul(y[i * VECTORS + j], vf_set(scale[i]))
        for j in range(vectors):
            factor[j] = vf_load(panel.factor + j * LANES)
            shift[j] = vf_load(panel.shift + j * LANES)
        for i in range(ROWS):
            for j in range(vectors):
                y[i * VECTORS + j] = vf_fma(y[i * VECTORS + j], factor[j], shift[j])
        for i in range(ROWS):
            for j in range(vectors):
                vf_store(s + (c + i) * PANEL + j * LANES, y[i * VECTORS + j])
        for j in range(vectors):
            highest = vf_load(top + j * LANES)
            for i in range(ROWS):
                highest = vf_max(highest, y[i * VECTORS + j])
            vf_store(top + j * LANES, highest)


cdef void scores_of_codes(
    float* s, float* top, const Panel* panel, const int* k, const float* k_scale, Py_ssize_t groups,
    Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """scores() from codes: S^T[c][r] = factor[r] k_scale[c] (k8[c] . q8[r]) + shift[r].

    k: packed key 0 of the block. k_scale: of its keys, or NULL where factor has it. groups: of the head dimension.
    """
    if k_scale == NULL:
        if panel.vectors == 1:
            scores_of_codes_tile(s, top, panel, k, k_scale, groups, begin, end, 1, False)
        elif panel.vectors == 2:
            scores_of_codes_tile(s, top, panel, k, k_scale, groups, begin, end, 2, False)
        else:
            scores_of_codes_tile(s, top, panel, k, k_scale, groups, begin, end, VECTORS, False)
    else:
        if panel.vectors == 1:
            scores_of_codes_tile(s, top, panel, k, k_scale, groups, begin, end, 1, True)
        elif panel.vectors == 2:
            scores_of_codes_tile(s, top, panel, k, k_scale, groups, begin, end, 2, True)
        else:
            scores_of_codes_tile(s, top, panel, k, k_scale, groups, begin, end, VECTORS, True)


cdef inline void accumulate_codes_tile(
    float* o, const int* p, const int* v, Py_ssize_t Dv, const float* alpha, const float* beta, Py_ssize_t n,
    const int vectors
) noexcept nogil:
    cdef Py_ssize_t d, g, column
    cdef int i, j
    cdef float* place
    cdef vf sum
    cdef vi acc[ROWS * VECTORS]
    cdef const int* b[ROWS]
    for g in range((Dv + ROWS - 1) // ROWS):
        d = g * ROWS
        for i in range(ROWS):
            column = d + i if d + i < Dv else Dv - 1
            b[i] = v + column
            for j in range(vectors):
                acc[i * VECTORS + j] = vi_set(0)
        multiply_codes(acc, p, b, Dv, n, vectors)
        for i in range(ROWS):
            for j in range(vectors):
                place = o + (d + i) * PANEL + j * LANES
                sum = vf_mul(vf_load(beta + j * LANES), vf_from_int(acc[i * VECTORS + j]))
                vf_store(place, vf_fma(vf_load(place), vf_load(alpha + j * LANES), sum))


cdef void accumulate_codes(
    float* o, const int* p, const int* v, Py_ssize_t Dv, const float* alpha, const float* beta, Py_ssize_t n,
    int vectors
) noexcept nogil:
    """O^T[d][r] = alpha[r] O^T[d][r] + beta[r] (sum of V8[c][d] P8^T[c][r] over n groups of keys)."""
    if vectors == 1:
        accumulate_codes_tile(o, p, v, Dv, alpha, beta, n, 1)
    elif vectors == 2:
        accumulate_codes_tile(o, p, v, Dv, alpha, beta, n, 2)
    else:
        accumulate_codes_tile(o, p, v, Dv, alpha, beta, n, VECTORS)


# ---------------------------------------------------------------------------------------------------------------------
# Weights as codes


cdef void softmax_codes(
    float* s, int* p, const float* top, float* m, float* l, float* alpha, float* beta, const float* v_scale,
    bint tokens, Py_ssize_t begin, Py_ssize_t end, int vectors
) noexcept nogil:
    """softmax() into codes: P^T[c][r] = round(255 w / omega[r]) with w = e^(S - top) v_scale[c], omega = max_c w.

    p: groups [c // GROUP][r] of a block; groups of rows begin <= c < end are written. v_scale: one for each key, where
    `tokens`, else one alone, omega being 1 then. beta[r] = e^(top - m') omega / 255 (v_scale): 0 for a row that sees
    nothing here.
    """
    cdef Py_ssize_t g
    cdef int j, i
    cdef float* rows
    cdef int* place
    cdef vf old, new, highest, base, sum, a, b, omega, code
    cdef vf x[ROWS]
    cdef vf w[ROWS]
    for j in range(vectors):
        old = vf_load(m + j * LANES)
        new = vf_load(top + j * LANES)
        highest = vf_max(old, new)
        base = vf_hide(new, new, vf_set(0.0))
        sum = vf_set(0.0)
        # never 0, and far enough from it that 255 / omega is finite
        omega = vf_set(256 * FLT_MIN)
        for g in range(begin // ROWS, end // ROWS):
            rows = s + g * ROWS * PANEL + j * LANES
            for i in range(ROWS):
                x[i] = vf_sub(vf_load(rows + i * PANEL), base)
            exponentials(x, ROWS)
            if tokens:
                for i in range(ROWS):
                    w[i] = vf_mul(x[i], vf_set(v_scale[g * ROWS + i]))
                    omega = vf_max(omega, w[i])
                    vf_store(rows + i * PANEL, w[i])
            else:
                for i in range(ROWS):
                    w[i] = vf_mul(x[i], vf_set(255.0))
                store_group_codes(p + g * (ROWS // GROUP) * PANEL + j * LANES, w)
            for i in range(ROWS // 2):
                x[i] = vf_add(x[i], x[i + ROWS // 2])
            for i in range(1, ROWS // 2):
                x[0] = vf_add(x[0], x[i])
            sum = vf_add(sum, x[0])
        if tokens:
            code = vf_div(vf_set(255.0), omega)
            for g in range(begin // ROWS, end // ROWS):
                rows = s + g * ROWS * PANEL + j * LANES
                for i in range(ROWS):
                    w[i] = vf_mul(vf_load(rows + i * PANEL), code)
                store_group_codes(p + g * (ROWS // GROUP) * PANEL + j * LANES, w)
        else:
            omega = vf_set(v_scale[0])
        base = vf_hide(highest, highest, vf_set(0.0))
        a = expv(vf_sub(old, base))
        b = expv(vf_sub(new, base))
        vf_store(l + j * LANES, vf_fma(vf_load(l + j * LANES), a, vf_mul(b, sum)))
        vf_store(m + j * LANES, highest)
        vf_store(alpha + j * LANES, a)
        vf_store(beta + j * LANES, vf_mul(b, vf_mul(omega, vf_set(1.0 / 255.0))))


cdef inline void store_group_codes(int* p, vf* w) noexcept nogil:
    """ROWS vectors as groups of GROUP codes each."""
    cdef int i
    for i in range(ROWS // GROUP):
        vi_store_codes(p + i * PANEL, w + i * GROUP)


# ---------------------------------------------------------------------------------------------------------------------
# The second product in bfloat16


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
    float* o, const int* p, const int* v, Py_ssize_t Dv, const float* alpha, float beta, Py_ssize_t n,
    const int vectors
) noexcept nogil:
    cdef Py_ssize_t d, g, t, column
    cdef int i, j
    cdef float* place
    cdef vf old
    cdef vf acc[ROWS * VECTORS]
    cdef vi x[VECTORS]
    cdef vi y
    cdef const int* b[ROWS]
    for g in range((Dv + ROWS - 1) // ROWS):
        d = g * ROWS
        for i in range(ROWS):
            column = d + i if d + i < Dv else Dv - 1
            b[i] = v + column
            for j in range(vectors):
                acc[i * VECTORS + j] = vf_set(0.0)
        for t in range(n):
            for j in range(vectors):
                x[j] = vi_load(p + t * PANEL + j * LANES)
            for i in range(ROWS):
                y = vi_set(b[i][t * Dv])
                for j in range(vectors):
                    acc[i * VECTORS + j] = vf_dot_bf16(acc[i * VECTORS + j], x[j], y)
        for i in range(ROWS):
            for j in range(vectors):
                place = o + (d + i) * PANEL + j * LANES
                old = vf_mul(vf_load(place), vf_load(alpha + j * LANES))
                vf_store(place, vf_fma(acc[i * VECTORS + j], vf_set(beta), old))


cdef void accumulate_bf16(
    float* o, const int* p, const int* v, Py_ssize_t Dv, const float* alpha, float beta, Py_ssize_t n, int vectors
) noexcept nogil:
    """O^T[d][r] = alpha[r] O^T[d][r] + beta (sum of V[c][d] P^T[c][r] over n groups of keys), sums in float32."""
    if vectors == 1:
        accumulate_bf16_tile(o, p, v, Dv, alpha, beta, n, 1)
    elif vectors == 2:
        accumulate_bf16_tile(o, p, v, Dv, alpha, beta, n, 2)
    else:
        accumulate_bf16_tile(o, p, v, Dv, alpha, beta, n, VECTORS)


# ---------------------------------------------------------------------------------------------------------------------
# Queries as codes


cdef void pack_codes(const Problem* x, const Head* head, Panel* panel) noexcept nogil:
    """The codes of a panel's queries in lanes, and what makes sums of their products scores.

    Groups are transposed as the 32-bit words that they are. Lanes without a row hold codes and factors of 0.
    """
    cdef Py_ssize_t D = x.D, groups = (D + GROUP - 1) // GROUP
    cdef Py_ssize_t chunk, w, r, i, n, d, row
    cdef int j
    cdef const signed char* q
    cdef const float* scales = head.q_scale + panel.row * x.codes.q_scale_stride[2]
    cdef double factor
    cdef code words[LANES * LANES * GROUP]
    cdef code* word
    cdef vf t[LANES]
    cdef vf sum
    cdef vi group
    for r in range(PANEL):
        factor = x.scale * scales[r * x.codes.q_scale_stride[2]] if r < panel.rows else 0.0
        panel.shift[r] = <float> factor
        panel.factor[r] = <float> (factor if x.codes.k_tokens else factor * head.k_scale[0])
    for j in range(panel.vectors):
        row = j * LANES
        for chunk in range((groups + LANES - 1) // LANES):
            w = chunk * LANES
            memset(words, 0, sizeof(words))
            n = min(<Py_ssize_t> (LANES * GROUP), D - w * GROUP)
            for r in range(min(<Py_ssize_t> LANES, panel.rows - row)):
                q = head.q_codes + (panel.row + row + r) * x.codes.q_stride[2] + w * GROUP
                word = words + r * LANES * GROUP
                for i in range(n):
                    word[i] = <code> (q[i] + ZERO_POINT)
            for r in range(LANES):
                t[r] = vf_load(<float*> words + r * LANES)
            vf_transpose(t)
            for r in range(min(<Py_ssize_t> LANES, groups - w)):
                vf_store(<float*> panel.codes + (w + r) * PANEL + row, t[r])
        sum = vf_set(0.0)
        if head.k_mean != NULL:
            for d in range(D):
                group = vi_load(panel.codes + d // GROUP * PANEL + row)
                sum = vf_fma(vf_code(group, d % GROUP), vf_set(head.k_mean[d]), sum)
        vf_store(panel.shift + row, vf_mul(sum, vf_load(panel.shift + row)))
