# Everything that changes a score between the two products, for every precision: softcap, ALiBi, bias, masks.

cdef inline vf tanhv(vf x) noexcept nogil:
    """tanh(x) within two units in the last place: 1 - 2 e / (1 + e) with e = e^(-2 |x|) where |x| >= 0.625, and below,
    where that would cancel, x + x^3 Q(x^2) with the minimax Q of degree 4 (relative error 4.4e-9, fitted by reweighted
    least squares)."""
    cdef vf z = vf_mul(x, x), size = vf_abs(x)
    cdef vf e = expv(vf_mul(vf_set(-2.0), size))
    cdef vf far = vf_sub(vf_set(1.0), vf_div(vf_add(e, e), vf_add(vf_set(1.0), e)))
    cdef vf p = vf_fma(vf_set(-0.005704986090153312), z, vf_set(0.02063908646505058))
    p = vf_fma(p, z, vf_set(-0.0537397148559542))
    p = vf_fma(p, z, vf_set(0.1333144219553772))
    p = vf_fma(p, z, vf_set(-0.33333281941919757))
    return vf_less(size, vf_set(0.625), vf_fma(vf_mul(p, z), x, x), vf_copysign(far, x))


cdef inline vf bias_vector(const float* bias, Py_ssize_t stride, Py_ssize_t n) noexcept nogil:
    """n biases."""
    cdef float buffer[LANES]
    cdef Py_ssize_t i
    if stride == 1:
        return vf_load_part(bias, n)
    for i in range(n):
        buffer[i] = bias[i * stride]
    return vf_load_part(buffer, n)


cdef inline vf keep_vector(const unsigned char* mask, Py_ssize_t stride, Py_ssize_t n) noexcept nogil:
    """0 for each of n mask bytes that is set, -inf for each that is not."""
    cdef unsigned char buffer[LANES]
    cdef Py_ssize_t i
    if stride == 1:
        return vf_keep_part(mask, n)
    for i in range(n):
        buffer[i] = mask[i * stride]
    return vf_keep_part(buffer, n)


cdef void load_addend(
    vf* t, const float* bias, const Py_ssize_t* bias_stride, const unsigned char* mask, const Py_ssize_t* mask_stride,
    Py_ssize_t rows, Py_ssize_t keys
) noexcept nogil:
    """t[key][row]: bias and mask (-inf) of up to LANES rows x LANES keys, as one tile to add.

    Strides are those of the last two axes. Rows that share one bias and mask (stride 0) are broadcast, not read again.
    """
    cdef bint shared = (bias == NULL or bias_stride[0] == 0) and (mask == NULL or mask_stride[0] == 0)
    cdef Py_ssize_t r, n = 1 if shared else rows
    cdef float buffer[LANES]
    if mask == NULL and n == LANES and keys == LANES and bias_stride[1] == 1:
        for r in range(LANES):
            t[r] = vf_load(bias + r * bias_stride[0])
    elif mask == NULL:
        for r in range(n):
            t[r] = bias_vector(bias + r * bias_stride[0], bias_stride[1], keys)
    elif bias == NULL:
        for r in range(n):
            t[r] = keep_vector(mask + r * mask_stride[0], mask_stride[1], keys)
    else:
        for r in range(n):
            t[r] = vf_hide(
                bias_vector(bias + r * bias_stride[0], bias_stride[1], keys),
                keep_vector(mask + r * mask_stride[0], mask_stride[1], keys), vf_set(-INFINITY),
            )
    if shared:
        vf_store(buffer, t[0])
        for r in range(LANES):
            t[r] = vf_set(buffer[r])
    else:
        for r in range(rows, LANES):
            t[r] = vf_set(0.0)
        vf_transpose(t)


cdef inline float relative(Py_ssize_t x) noexcept nogil:
    """A key position relative to a block, exact as a float: beyond 2^23 only its sign matters."""
    cdef Py_ssize_t limit = 1 << 23
    return <float> (limit if x > limit else -limit if x < -limit else x)


cdef inline void prefetch_later(
    const Problem* x, const Panel* panel, const char* now, Py_ssize_t row_bytes, Py_ssize_t key_bytes, Py_ssize_t key,
    Py_ssize_t rows
) noexcept nogil:
    """Asks for what comes a block of keys after a tile of bias or mask of key `key`, or where that was the last block,
    for the same rows of the next panel: a short piece of each of many long rows, which no hardware prefetcher foresees.
    Into the second-level cache, since such rows often share the few places that the first one has for their addresses.
    Bit by bit with the work of this block, for asked for at once they would have to queue."""
    cdef Py_ssize_t r
    cdef const char* later = now + x.Bc * key_bytes
    if key + x.Bc > panel.last_key:
        if panel.row + panel.rows + PANEL > x.Lq:
            return
        later = now + panel.rows * row_bytes + (panel.first_key // x.Bc - key // x.Bc) * x.Bc * key_bytes
    for r in range(rows):
        prefetch_far(later + r * row_bytes)


cdef struct Lines:
    # What change_keys() knows of a vector of query rows, relative to a block of keys
    vf cap
    vf per_cap
    vf slope                    # ALiBi, negative
    vf place                    # position of each row
    vf low                      # keys from low ...
    vf high                     # ... to high are visible


cdef inline vf change_keys(
    float* s, Py_ssize_t first, Py_ssize_t n, const vf* addend, const Lines* lines, vf highest,
    const bint soft, const bint sloped, const bint added, const bint edges
) noexcept nogil:
    """change_scores() on n keys from `first` on and one vector of rows, s[key]; returns the greatest score so far."""
    cdef Py_ssize_t i
    cdef vf y, key
    for i in range(n):
        y = vf_load(s + i * PANEL)
        if soft:
            y = vf_mul(lines.cap, tanhv(vf_mul(y, lines.per_cap)))
        if sloped or edges:
            key = vf_set(<float> (first + i))
        if sloped:
            y = vf_fma(lines.slope, vf_abs(vf_sub(lines.place, key)), y)
        if added:
            y = vf_hide(vf_add(y, addend[i]), addend[i], addend[i])
        if edges:
            y = vf_inside(y, key, lines.low, lines.high)
        highest = vf_max(highest, y)
        vf_store(s + i * PANEL, y)
    return highest


cdef void change_scores(
    float* s, float* top, const Problem* x, const Head* head, const Panel* panel, Py_ssize_t block,
    Py_ssize_t begin, Py_ssize_t end, bint soft, bint masked, bint edges
) noexcept nogil:
    """Everything that changes a score, on rows begin <= c < end of the tile s of the keys from `block` on, in the order
    softcap, ALiBi and bias, masks. A hidden score becomes -inf whatever it was, NaN included. top[r] becomes the
    greatest score of row r.

    soft: apply softcap. masked: the mask of this tile is neither all True nor absent. edges: causal or the window hides
    a part of this tile.
    """
    cdef Py_ssize_t c, n, i, rows, position = panel.row + x.offset - block  # of lane 0, relative to the block
    cdef int j
    cdef bint added = x.bias != NULL or masked
    cdef bint far_bias = x.bias != NULL and x.bias_stride[2] != 0 and x.bias_stride[3] == 1
    cdef bint far_mask = masked and x.mask_stride[2] != 0 and x.mask_stride[3] == 1
    cdef float lane[LANES]
    cdef vf addend[LANES]
    cdef vf highest
    cdef Lines lines
    cdef const float* bias = NULL
    cdef const unsigned char* mask = NULL
    cdef float* score
    lines.cap, lines.slope = vf_set(x.softcap), vf_set(-head.slope)
    lines.per_cap = vf_set(1.0 / x.softcap if soft else 0.0)
    for i in range(LANES):
        lane[i] = <float> i
    for j in range(panel.vectors):
        lines.low = vf_add(vf_load(lane), vf_set(relative(position + j * LANES - x.left)))
        lines.high = vf_add(vf_load(lane), vf_set(relative(position + j * LANES + x.right)))
        lines.place = vf_add(vf_load(lane), vf_set(<float> (position + j * LANES)))
        rows = min(<Py_ssize_t> LANES, panel.rows - j * LANES)
        highest = vf_set(-INFINITY)
        c = begin
        while c < end:
            n = min(<Py_ssize_t> LANES, end - c)
            if added:
                if x.bias != NULL:
                    bias = head.bias + (panel.row + j * LANES) * x.bias_stride[2] + (block + c) * x.bias_stride[3]
                if masked:
                    mask = head.mask + (panel.row + j * LANES) * x.mask_stride[2] + (block + c) * x.mask_stride[3]
                load_addend(addend, bias, x.bias_stride + 2, mask, x.mask_stride + 2, rows, n)
                if far_bias:
                    prefetch_later(
                        x, panel, <const char*> bias, x.bias_stride[2] * sizeof(float), sizeof(float), block + c, rows,
                    )
                if far_mask and c % CACHE_LINE == 0:
                    prefetch_later(x, panel, <const char*> mask, x.mask_stride[2], 1, block + c, rows)
            score = s + c * PANEL + j * LANES
            # what masks and causal need alone, without the rest of it in the loop
            if added and not (soft or edges or x.slopes != NULL):
                highest = change_keys(score, c, n, addend, &lines, highest, False, False, True, False)
            elif edges and not (soft or added or x.slopes != NULL):
                highest = change_keys(score, c, n, addend, &lines, highest, False, False, False, True)
            else:
                highest = change_keys(score, c, n, addend, &lines, highest, soft, x.slopes != NULL, added, edges)
            c += n
        vf_store(top + j * LANES, highest)


cdef int mask_tile(
    const Problem* x, const Head* head, const Panel* panel, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """-1 when the mask keeps no key of [begin, end) for any row of the panel, 1 when it keeps all, 0 between."""
    cdef Py_ssize_t i, j, kept, seen = 0, all_kept = 0
    cdef const unsigned char* row
    for i in range(panel.rows if x.mask_stride[2] != 0 else 1):
        row = head.mask + (panel.row + i) * x.mask_stride[2] + begin * x.mask_stride[3]
        kept = 0
        if x.mask_stride[3] == 1:
            for j in range(end - begin):
                kept += row[j] != 0
        else:
            for j in range(end - begin):
                kept += row[j * x.mask_stride[3]] != 0
        seen += end - begin
        all_kept += kept
        if 0 < all_kept < seen:
            return 0
    return -1 if all_kept == 0 else 1
