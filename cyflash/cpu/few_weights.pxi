# From scores to weights for panels of few rows: what change.pxi, softmax.pxi and int8.pxi do for full ones, with keys
# in lanes.
#
#     scratch.s       [row][pitch]         scores, then weights
#     scratch.hidden  [row][pitch]         what is hidden from them; or
#     scratch.p       [row][pitch] bytes   weights as codes, in the same memory
#     scratch.top, beta                    [part][PANEL], a row in each lane, as everywhere
#
# Vectors of keys begin at multiples of LANES from the block's first key, whichever keys are visible, and are added in
# their order: a row's bits depend on no other row.

cdef enum:
    STEP = 4  # vectors whose exponentials are taken at once, which fills the time that each takes


cdef inline Py_ssize_t few_pitch(const Problem* x) noexcept nogil:
    return round_up(keys_of_block(x, True), LANES)


cdef inline void surround(float* s, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """-inf for the keys of the vectors of [begin, end) that are not in it."""
    cdef Py_ssize_t c
    for c in range(begin // LANES * LANES, begin):
        s[c] = -INFINITY
    for c in range(end, round_up(end, LANES)):
        s[c] = -INFINITY


cdef void few_change(
    float* s, const Problem* x, const Head* head, const Panel* panel, Py_ssize_t block, Py_ssize_t begin,
    Py_ssize_t end, bint soft, bint masked, bint edges
) noexcept nogil:
    """change_scores() of few rows: on keys begin <= c < end of every row."""
    cdef Py_ssize_t r, c, i, n, position, pitch = few_pitch(x)
    cdef const Py_ssize_t* bias_stride = head.sequence.bias_stride
    cdef const Py_ssize_t* mask_stride = head.sequence.mask_stride
    cdef bint added = head.bias != NULL or masked, sloped = head.slopes != NULL
    cdef const float* bias = NULL
    cdef const unsigned char* mask = NULL
    cdef float keys[LANES]
    cdef float* score
    cdef vf y, addend = vf_set(0.0)
    cdef Lines lines
    for i in range(LANES):
        keys[i] = <float> i
    lines.cap = vf_set(x.softcap)
    lines.per_cap = vf_set(1.0 / x.softcap if soft else 0.0)
    for r in range(panel.lanes):
        position = panel.row + r % panel.rows + head.sequence.offset - block
        lines.low = vf_set(relative(position - x.left))
        lines.high = vf_set(relative(position + x.right))
        lines.place = vf_set(<float> position)
        lines.slope = vf_set(-panel.slope[r])
        if head.bias != NULL:
            bias = head.bias + lane_at(panel, r, bias_stride[0], bias_stride[1]) + block * bias_stride[2]
        if masked:
            mask = head.mask + lane_at(panel, r, mask_stride[0], mask_stride[1]) + block * mask_stride[2]
        c = begin
        while c < end:
            n = min(<Py_ssize_t> LANES, end - c)
            if added:
                addend = addend_vector(
                    bias + c * bias_stride[2] if bias != NULL else NULL, bias_stride[2],
                    mask + c * mask_stride[2] if mask != NULL else NULL, mask_stride[2], n,
                )
            score = s + r * pitch + c
            y = changed(
                vf_load_part(score, n), vf_add(vf_load(keys), vf_set(<float> c)), addend, &lines, soft, sloped, added,
                edges,
            )
            vf_store_part(score, y, n)
            c += n


cdef inline float first_top(const float* s, Py_ssize_t low, Py_ssize_t high) noexcept nogil:
    """The greatest of scores low <= c < high, multiples of LANES."""
    cdef Py_ssize_t c = low
    cdef vf highest = vf_set(-INFINITY)
    while c < high:
        highest = vf_max(highest, vf_load(s + c))
        c += LANES
    return vf_highest(highest)


cdef inline vf few_exponentials(float* s, vf base, const int n) noexcept nogil:
    """n vectors of weights from their scores, in place; returns their sum."""
    cdef int i
    cdef vf x[STEP]
    for i in range(n):
        x[i] = vf_sub(vf_load(s + i * LANES), base)
    exponentials(x, n)
    for i in range(n):
        vf_store(s + i * LANES, x[i])
    for i in range(1, n):
        x[0] = vf_add(x[0], x[i])
    return x[0]


cdef void few_softmax(
    const Problem* x, const Panel* panel, const Scratch* scratch, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """softmax() of few rows, from scores begin <= c < end and -inf around them."""
    cdef Py_ssize_t r, c, low = begin // LANES * LANES, high = round_up(end, LANES)
    cdef float sums[LANES]
    cdef float tops[LANES]
    cdef float* s
    cdef vf sum, base, highest, weight, old = vf_load(panel.m)
    for r in range(LANES):
        tops[r], sums[r] = -INFINITY, 0.0
    for r in range(few_pad(panel.lanes)):
        tops[r] = first_top(scratch.s + r * few_pitch(x), low, high)
    highest = vf_max(old, vf_load(tops))
    vf_store(panel.m, highest)
    base = vf_hide(highest, highest, vf_set(0.0))
    vf_store(tops, base)
    for r in range(few_pad(panel.lanes)):
        s = scratch.s + r * few_pitch(x)
        sum = vf_set(0.0)
        c = low
        while c + STEP * LANES <= high:
            sum = vf_add(sum, few_exponentials(s + c, vf_set(tops[r]), STEP))
            c += STEP * LANES
        while c < high:
            sum = vf_add(sum, few_exponentials(s + c, vf_set(tops[r]), 1))
            c += LANES
        sums[r] = vf_total(sum)
    weight = expv(vf_sub(old, base))
    vf_store(scratch.alpha, weight)
    vf_store(panel.l, vf_fma(vf_load(panel.l), weight, vf_load(sums)))


cdef inline vf few_code_weights(
    float* s, unsigned char* p, const float* v_scale, Py_ssize_t valid, vf base, vf* highest, const int n,
    const bint tokens
) noexcept nogil:
    """n vectors of 255 e^(S - base), as codes; or, where each key has its scale, times that in place of the scores,
    with their greatest. Returns their sum without scales, of which `valid` may be read."""
    cdef int i
    cdef Py_ssize_t left
    cdef vf scale
    cdef vf w[STEP]
    cdef vf x[STEP]
    for i in range(n):
        x[i] = w[i] = vf_load(s + i * LANES)
    code_exponentials(x, base, n)
    for i in range(n):
        if tokens:
            if valid >= n * LANES:
                scale = vf_load(v_scale + i * LANES)
            else:
                left = max(<Py_ssize_t> 0, valid - i * LANES)
                scale = vf_load_part(v_scale + i * LANES, min(<Py_ssize_t> LANES, left))
            w[i] = vf_hide(vf_mul(x[i], scale), w[i], vf_set(0.0))  # whatever the scale beside what is visible
            vf_store(s + i * LANES, w[i])
            highest[0] = vf_max(highest[0], w[i])
        else:
            vf_store_bytes(p + i * LANES, x[i])
    for i in range(1, n):
        x[0] = vf_add(x[0], x[i])
    return x[0]


cdef inline float few_part_codes(
    float* s, unsigned char* p, const float* v_scale, float top, float* omega, Py_ssize_t low, Py_ssize_t high,
    Py_ssize_t end, const bint tokens
) noexcept nogil:
    """part_codes() of one row, keys low <= c < high, multiples of LANES."""
    cdef Py_ssize_t c = low
    cdef vf sum = vf_set(0.0), base = vf_set(top if top != -INFINITY else 0.0), factor
    cdef vf highest = vf_set(256 * FLT_MIN)
    while c + STEP * LANES <= high:
        sum = vf_add(
            sum, few_code_weights(s + c, p + c, v_scale + c, end - c, base, &highest, STEP, tokens),
        )
        c += STEP * LANES
    while c < high:
        sum = vf_add(sum, few_code_weights(s + c, p + c, v_scale + c, end - c, base, &highest, 1, tokens))
        c += LANES
    if tokens:
        omega[0] = vf_highest(highest)
        factor = vf_set(<float> 255.0 / omega[0])
        c = low
        while c < high:
            vf_store_bytes(p + c, vf_mul(vf_load(s + c), factor))
            c += LANES
        omega[0] *= <float> (1.0 / 255.0)
    else:
        omega[0] = v_scale[0]
    return vf_total(sum)


cdef void few_softmax_codes(
    const Problem* x, const Panel* panel, const Scratch* scratch, const float* v_scale, Py_ssize_t begin,
    Py_ssize_t end
) noexcept nogil:
    """softmax_codes() of few rows, from scores begin <= c < end and -inf around them: the codes of row r are bytes
    scratch.p + r * pitch, and 0 beside these keys."""
    cdef Py_ssize_t r, part, low, high, first = begin // PART_KEYS, last = (end - 1) // PART_KEYS, pitch = few_pitch(x)
    cdef Py_ssize_t rows = few_pad(panel.lanes)
    cdef bint tokens = x.codes.v_scale.tokens
    cdef float sums[LANES]
    cdef float omega[LANES]
    cdef float* s
    cdef unsigned char* p
    cdef vf base, weight, top, old = vf_load(panel.m), highest = vf_load(panel.m)
    for r in range(LANES):
        sums[r] = omega[r] = 0.0
    for part in range(first, last + 1):
        low, high = max(begin // LANES * LANES, part * PART_KEYS), min(round_up(end, LANES), (part + 1) * PART_KEYS)
        vf_store(scratch.top + part * PANEL, vf_set(-INFINITY))
        for r in range(rows):
            scratch.top[part * PANEL + r] = first_top(scratch.s + r * pitch, low, high)
        highest = vf_max(highest, vf_load(scratch.top + part * PANEL))
    base = vf_hide(highest, highest, vf_set(0.0))
    weight = expv(vf_sub(old, base))
    vf_store(scratch.alpha, weight)
    vf_store(panel.m, highest)
    vf_store(panel.l, vf_mul(vf_load(panel.l), weight))
    for part in range(first, last + 1):
        low, high = max(begin // LANES * LANES, part * PART_KEYS), min(round_up(end, LANES), (part + 1) * PART_KEYS)
        top = vf_load(scratch.top + part * PANEL)
        for r in range(rows):
            s, p = scratch.s + r * pitch, <unsigned char*> scratch.p + r * pitch
            if tokens:
                sums[r] = few_part_codes(
                    s, p, v_scale, scratch.top[part * PANEL + r], &omega[r], low, high, end, True,
                )
            else:
                sums[r] = few_part_codes(
                    s, p, v_scale, scratch.top[part * PANEL + r], &omega[r], low, high, end, False,
                )
        weight = vf_mul(expv(vf_sub(top, base)), vf_set(1.0 / 255.0))
        vf_store(panel.l, vf_fma(weight, vf_load(sums), vf_load(panel.l)))
        vf_store(scratch.beta + part * PANEL, vf_mul(weight, vf_load(omega)))


cdef void few_round_weights(
    const Problem* x, const Panel* panel, float* s, const float* v_scale, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """round_weights() that leaves floats."""
    cdef Py_ssize_t r, c, n
    cdef unsigned short halves[LANES]
    cdef vf weight
    cdef float* weights
    for r in range(few_pad(panel.lanes)):
        c = begin
        while c < end:
            n = min(<Py_ssize_t> LANES, end - c)
            weights = s + r * few_pitch(x) + c
            weight = vf_load_part(weights, n)
            if v_scale != NULL and x.codes.v_scale.tokens:
                weight = vf_mul(weight, vf_load_part(v_scale + c, n))
            vf_store_bf16(halves, weight)
            vf_store_part(weights, vf_load_bf16(halves), n)
            c += n
