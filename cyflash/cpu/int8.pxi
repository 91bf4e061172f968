# Quantised attention: products of codes of 8 bits (exact sums of 32 bits); the second one may be of bfloat16 (bf16.pxi)
# or of floats.
#
#     S = (q8 . k8) s_q s_k scale              less what subtracting the mean of the keys took from the row, see Panel
#     P = e^(S - top) s_v / omega              and p8 = round(255 P), with the maximum `top` of a part's own scores, not
#                                              the running one, and its own row scale omega, so that 255 codes serve
#                                              every row of every part
#     O = alpha O + e^(top - m') omega / 255 (p8 . v8)
#
# Where V has one scale per head, s_v and omega are 1 in P, and s_v stands for omega in O. The denominator is summed
# from the weights before they are rounded. Sums of codes stay within 2^24 for D <= 1024 (128 x 128 x 1024), those of a
# part always do (255 x 128 x 64): they are exact as floats too.

cdef enum:
    # Keys that share a row scale of P. Fewer are more accurate (relative L1 of the default call on real activations:
    # 0.0074 at 64, 0.0084 at 128, 0.0103 at 256); a part costs a conversion and a multiply-add for each output.
    PART_KEYS = 64
    PART_GROUPS = PART_KEYS // GROUP
    HALF = ROWS // 2


# ---------------------------------------------------------------------------------------------------------------------
# The register-tiled product of codes, and its two uses


cdef inline void multiply_codes(
    vi* acc, const int* a, const int* b, Py_ssize_t step, const int rows, const int vectors
) noexcept nogil:
    """acc[i][j] += the dot product of the groups b[i * step] and a[j], for `rows` x `vectors` of them"""
    cdef int i, j
    cdef vi x[VECTORS]
    cdef vi y
    for j in range(vectors):
        x[j] = vi_load(a + j * LANES)
    for i in range(rows):
        y = vi_set(b[i * step])
        for j in range(vectors):
            if j < RESIDENT:
                acc[i * VECTORS + j] = vi_dot(acc[i * VECTORS + j], x[j], y)
            else:
                acc[i * VECTORS + j] = vi_dot_at(acc[i * VECTORS + j], a + j * LANES, y)


cdef inline void scores_of_codes_tile(
    float* s, float* top, const Panel* panel, const Block* keys, Py_ssize_t groups, Py_ssize_t begin, Py_ssize_t end,
    const int vectors, const bint scaled
) noexcept nogil:
    cdef Py_ssize_t c, g, t, pitch = keys.k_pitch
    cdef int i, j, u
    cdef const int* b
    cdef const int* a
    cdef vi start
    cdef vf x, highest
    cdef vi acc[ROWS * VECTORS]
    cdef vf y[ROWS * VECTORS]
    cdef vf factor[VECTORS]
    cdef vf shift[VECTORS]
    for g in range(begin // ROWS, (end + ROWS - 1) // ROWS):
        c = g * ROWS
        b = keys.k_words + c * pitch
        for i in range(ROWS):
            start = vi_set(keys.k_correction[c + i] if ZERO_POINT == 128 else 0)
            for j in range(vectors):
                acc[i * VECTORS + j] = start
        a = panel.codes
        for t in range(groups // UNROLL):
            for u in range(UNROLL):
                multiply_codes(acc, a + u * PANEL, b + u, pitch, ROWS, vectors)
            a += UNROLL * PANEL
            b += UNROLL
        for t in range(groups % UNROLL):
            multiply_codes(acc, a + t * PANEL, b + t, pitch, ROWS, vectors)
        # in short loops, which GCC unrolls: the sums stay in registers
        for i in range(ROWS):
            for j in range(vectors):
                y[i * VECTORS + j] = vf_from_int(acc[i * VECTORS + j])
        for j in range(vectors):
            factor[j] = vf_load(panel.factor + j * LANES)
            shift[j] = vf_load(panel.shift + j * LANES)
        for i in range(ROWS):
            for j in range(vectors):
                x = vf_mul(factor[j], vf_set(keys.k_scale[c + i])) if scaled else factor[j]
                y[i * VECTORS + j] = vf_fma(y[i * VECTORS + j], x, shift[j])
        if c < begin or c + ROWS > end:
            for i in range(ROWS):
                for j in range(vectors):
                    if c + i < begin or c + i >= end:
                        y[i * VECTORS + j] = vf_set(-INFINITY)
        for i in range(ROWS):
            for j in range(vectors):
                vf_store(s + (c + i) * PANEL + j * LANES, y[i * VECTORS + j])
        for j in range(vectors):
            highest = vf_load(top + j * LANES)
            for i in range(ROWS):
                highest = vf_max(highest, y[i * VECTORS + j])
            vf_store(top + j * LANES, highest)


cdef void scores_of_codes(
    float* s, float* top, const Panel* panel, const Block* keys, Py_ssize_t groups, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """scores() from codes: S^T[c][r] = factor[r] k_scale[c] (k8[c] . q8[r]) + shift[r], and top[r] becomes
    max(top[r], max_c S^T).

    groups: of the head dimension. Whole groups of ROWS keys are read, and as many rows of s written: -inf outside
    [begin, end).
    """
    if keys.k_scale == NULL:
        if panel.vectors == 1:
            scores_of_codes_tile(s, top, panel, keys, groups, begin, end, 1, False)
        elif panel.vectors == MIDDLE:
            scores_of_codes_tile(s, top, panel, keys, groups, begin, end, MIDDLE, False)
        else:
            scores_of_codes_tile(s, top, panel, keys, groups, begin, end, VECTORS, False)
    else:
        if panel.vectors == 1:
            scores_of_codes_tile(s, top, panel, keys, groups, begin, end, 1, True)
        elif panel.vectors == MIDDLE:
            scores_of_codes_tile(s, top, panel, keys, groups, begin, end, MIDDLE, True)
        else:
            scores_of_codes_tile(s, top, panel, keys, groups, begin, end, VECTORS, True)


cdef inline void taken_from_sums(int* taken, const int* v, Py_ssize_t pitch, Py_ssize_t n) noexcept nogil:
    """taken[i] = WEIGHT_OFFSET times the sum of the codes of column i < HALF over n groups, what sums of products lack
    where that is taken from the codes of weights; of signed bytes, 64 at a time."""
    cdef Py_ssize_t t
    cdef int lanes[LANES]
    cdef vi acc = vi_set(0)
    for t in range(n):
        acc = vi_dot(acc, vi_load_part(v + t * pitch, HALF), vi_set(0x40404040))
    vf_store(<float*> lanes, vf_bits(vi_add(acc, acc)))
    memcpy(taken, lanes, HALF * sizeof(int))


cdef inline void accumulate_codes_tile(
    float* o, const int* p, const int* v, Py_ssize_t pitch, Py_ssize_t columns, const float* alpha, const float* beta,
    Py_ssize_t begin, Py_ssize_t end, const int vectors
) noexcept nogil:
    cdef Py_ssize_t d, low, high, t
    cdef int i, j
    cdef const float* factor
    cdef vf x
    cdef vi y
    cdef int taken[HALF]
    cdef vi acc[HALF * VECTORS]
    cdef vf sum[HALF * VECTORS]
    for d in range(columns // HALF):
        for i in range(HALF):
            for j in range(vectors):
                x = vf_load(o + (d * HALF + i) * PANEL + j * LANES)
                sum[i * VECTORS + j] = vf_mul(x, vf_load(alpha + j * LANES))
        low = begin
        while low < end:
            high = min(end, (low // PART_GROUPS + 1) * PART_GROUPS)
            factor = beta + low // PART_GROUPS * PANEL
            if WEIGHT_OFFSET != 0:
                taken_from_sums(taken, v + low * pitch + d * HALF, pitch, high - low)
            for i in range(HALF):
                for j in range(vectors):
                    acc[i * VECTORS + j] = vi_set(taken[i] if WEIGHT_OFFSET != 0 else 0)
            for t in range(low, high):
                multiply_codes(acc, p + t * PANEL, v + t * pitch + d * HALF, 1, HALF, vectors)
            for j in range(vectors):
                x = vf_load(factor + j * LANES)
                for i in range(HALF):
                    sum[i * VECTORS + j] = vf_fma(x, vf_from_int(acc[i * VECTORS + j]), sum[i * VECTORS + j])
            low = high
        for i in range(HALF):
            for j in range(vectors):
                vf_store(o + (d * HALF + i) * PANEL + j * LANES, sum[i * VECTORS + j])


cdef void accumulate_codes(
    float* o, const int* p, const int* v, Py_ssize_t pitch, Py_ssize_t columns, const float* alpha, const float* beta,
    Py_ssize_t begin, Py_ssize_t end, int vectors
) noexcept nogil:
    """O^T[d][r] = alpha[r] O^T[d][r] + sum over parts of beta[part][r] (sum of V8[c][d] P8^T[c][r] over its keys).

    p, v: groups of the block, of which begin <= t < end count; p less WEIGHT_OFFSET. columns: Dv rounded up to ROWS. A
    tile has half as many rows as elsewhere: beside its sums of codes it holds as many of floats, into which each part
    goes.
    """
    if vectors == 1:
        accumulate_codes_tile(o, p, v, pitch, columns, alpha, beta, begin, end, 1)
    elif vectors == MIDDLE:
        accumulate_codes_tile(o, p, v, pitch, columns, alpha, beta, begin, end, MIDDLE)
    else:
        accumulate_codes_tile(o, p, v, pitch, columns, alpha, beta, begin, end, VECTORS)


# ---------------------------------------------------------------------------------------------------------------------
# Weights as codes


cdef inline void code_exponentials(vf* x, vf base, const int n) noexcept nogil:
    """x[i] = 255 e^(x[i] - base) for i < n: exponentials() by a minimax polynomial of degree 4 (relative error 2.9e-6,
    few codes in ten thousand are rounded the other way), which also brings the 255."""
    cdef int i
    cdef vf f[ROWS]
    cdef vf y[ROWS]
    for i in range(n):
        x[i] = vf_mul(vf_sub(x[i], base), vf_set(1.4426950408889634))
    for i in range(n):
        f[i] = vf_fraction(x[i])
    for i in range(n):
        y[i] = vf_fma(vf_set(255 * 0.01342681139356784), f[i], vf_set(255 * 0.05224204855315723))
    for i in range(n):
        y[i] = vf_fma(y[i], f[i], vf_set(255 * 0.24128064378164496))
    for i in range(n):
        y[i] = vf_fma(y[i], f[i], vf_set(255 * 0.693044722507326))
    for i in range(n):
        y[i] = vf_fma(y[i], f[i], vf_set(255))
    for i in range(n):
        x[i] = vf_scale2(y[i], x[i])


cdef inline vf part_codes(
    float* s, int* p, vf top, vf* omega, const float* v_scale, Py_ssize_t begin, Py_ssize_t end, const bint tokens
) noexcept nogil:
    """One vector of rows of one part: softmax_codes() on rows begin <= c < end. Returns 255 sum_c e^(S - top); omega[0]
    becomes what that is worth to the output, omega or the one v_scale."""
    cdef Py_ssize_t g
    cdef int i
    cdef float* rows
    cdef vf factor, sum = vf_set(0.0)
    cdef vf base = vf_hide(top, top, vf_set(0.0))
    cdef vf highest = vf_set(256 * FLT_MIN)  # 255 omega: never 0, and far enough from it that 255 / highest is finite
    cdef vf x[ROWS]
    cdef vf w[ROWS]
    for g in range(begin // ROWS, end // ROWS):
        rows = s + g * ROWS * PANEL
        for i in range(ROWS):
            x[i] = vf_load(rows + i * PANEL)
        code_exponentials(x, base, ROWS)
        if tokens:
            for i in range(ROWS):
                w[i] = vf_mul(x[i], vf_set(v_scale[g * ROWS + i]))
            for i in range(ROWS):
                vf_store(rows + i * PANEL, w[i])
            for i in range(ROWS):
                highest = vf_max(highest, w[i])
        else:
            for i in range(ROWS // GROUP):
                vi_store_codes(p + (g * (ROWS // GROUP) + i) * PANEL, x + i * GROUP)
        for i in range(ROWS // 2):
            x[i] = vf_add(x[i], x[i + ROWS // 2])
        for i in range(1, ROWS // 2):
            x[0] = vf_add(x[0], x[i])
        sum = vf_add(sum, x[0])
    if tokens:
        factor = vf_div(vf_set(255.0), highest)
        for g in range(begin // ROWS, end // ROWS):
            rows = s + g * ROWS * PANEL
            for i in range(ROWS):
                w[i] = vf_mul(vf_load(rows + i * PANEL), factor)
            for i in range(ROWS // GROUP):
                vi_store_codes(p + (g * (ROWS // GROUP) + i) * PANEL, w + i * GROUP)
        omega[0] = vf_mul(highest, vf_set(1.0 / 255.0))
    else:
        omega[0] = vf_set(v_scale[0])
    return sum


cdef void softmax_codes(
    float* s, int* p, const float* top, float* m, float* l, float* alpha, float* beta, const float* v_scale,
    bint tokens, Py_ssize_t begin, Py_ssize_t end, int vectors
) noexcept nogil:
    """softmax() into codes: P^T[c][r] = round(255 w / omega[r]) with w = e^(S - top[r]) v_scale[c] and omega = max_c w,
    where top and omega are those of each part of PART_KEYS keys.

    p: groups [c // GROUP][r] of a block, codes less WEIGHT_OFFSET; those of rows begin <= c < end (multiples of ROWS)
    are written. top: [part][PANEL]. v_scale: one for each key, where `tokens`, else one alone, which is left out of w:
    omega is 1 then.
    beta[part][r] = e^(top - m') / 255 times omega, or times that one scale; 0 for a row that sees nothing there.
    """
    cdef Py_ssize_t part, low, high, first = begin // PART_KEYS, last = (end - 1) // PART_KEYS
    cdef int j
    cdef vf old, highest, base, sum, omega, weight
    for j in range(vectors):
        old = vf_load(m + j * LANES)
        highest = old
        for part in range(first, last + 1):
            highest = vf_max(highest, vf_load(top + part * PANEL + j * LANES))
        base = vf_hide(highest, highest, vf_set(0.0))
        weight = expv(vf_sub(old, base))
        vf_store(alpha + j * LANES, weight)
        vf_store(m + j * LANES, highest)
        vf_store(l + j * LANES, vf_mul(vf_load(l + j * LANES), weight))
        for part in range(first, last + 1):
            low, high = max(begin, part * PART_KEYS), min(end, (part + 1) * PART_KEYS)
            old = vf_load(top + part * PANEL + j * LANES)
            if tokens:
                sum = part_codes(s + j * LANES, p + j * LANES, old, &omega, v_scale, low, high, True)
            else:
                sum = part_codes(s + j * LANES, p + j * LANES, old, &omega, v_scale, low, high, False)
            weight = vf_mul(expv(vf_sub(old, base)), vf_set(1.0 / 255.0))
            vf_store(l + j * LANES, vf_fma(weight, sum, vf_load(l + j * LANES)))
            vf_store(beta + part * PANEL + j * LANES, vf_mul(weight, omega))


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
    cdef double factor
    cdef code words[LANES * LANES * GROUP]
    cdef code* word
    cdef vf t[LANES]
    cdef vf sum
    cdef vi group
    for r in range(PANEL):
        factor = 0.0
        if r < panel.lanes:
            factor = x.scale * head.q_scale[lane_at(panel, r, x.codes.q_scale_stride[0], x.codes.q_scale_stride[1])]
        panel.lift[r] = <float> factor  # below, times the product of the codes and the mean
        panel.factor[r] = <float> (factor if x.codes.k_scale.tokens else factor * head.k_scale[0])
    for j in range(panel.vectors):
        row = j * LANES
        for chunk in range((groups + LANES - 1) // LANES):
            w = chunk * LANES
            memset(words, 0, sizeof(words))
            n = min(<Py_ssize_t> (LANES * GROUP), D - w * GROUP)
            for r in range(min(<Py_ssize_t> LANES, panel.lanes - row)):
                q = head.q_codes + lane_at(panel, row + r, x.codes.q_stride[0], x.codes.q_stride[1]) + w * GROUP
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
            sum = vf_mul(sum, vf_load(panel.lift + row))
        vf_store(panel.lift + row, vf_set(0.0) if x.softcap != 0.0 else sum)
        vf_store(panel.shift + row, sum if x.softcap != 0.0 else vf_set(0.0))
