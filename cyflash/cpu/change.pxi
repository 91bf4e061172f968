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


cdef inline vf addend_vector(
    const float* bias, Py_ssize_t bias_stride, const unsigned char* mask, Py_ssize_t mask_stride, Py_ssize_t n
) noexcept nogil:
    """What n keys add to the scores of one row: bias and mask (-inf), of which one may be NULL."""
    if mask == NULL:
        return bias_vector(bias, bias_stride, n)
    if bias == NULL:
        return keep_vector(mask, mask_stride, n)
    return vf_hide(bias_vector(bias, bias_stride, n), keep_vector(mask, mask_stride, n), vf_set(-INFINITY))


cdef inline bint same_for_all(const Panel* panel, const Py_ssize_t* stride) noexcept nogil:
    """Whether the rows of a panel share one row of a bias or a mask."""
    return stride[1] == 0 and (panel.heads == 1 or stride[0] == 0)


cdef void load_addend(
    vf* t, const Head* head, const Panel* panel, bint masked, Py_ssize_t lane, Py_ssize_t rows, Py_ssize_t key,
    Py_ssize_t keys
) noexcept nogil:
    """t[key][row]: bias and, if `masked`, mask (-inf) of up to LANES rows from `lane` on x LANES keys from `key` on, as
    one tile to add. Rows that share one bias and mask are broadcast, not read again."""
    cdef const Py_ssize_t* bias_stride = head.sequence.bias_stride
    cdef const Py_ssize_t* mask_stride = head.sequence.mask_stride
    cdef const float* bias = head.bias + key * bias_stride[2] if head.bias != NULL else NULL
    cdef const unsigned char* mask = head.mask + key * mask_stride[2] if masked else NULL
    cdef bint shared = (bias == NULL or same_for_all(panel, bias_stride))
    cdef Py_ssize_t r, n
    cdef float buffer[LANES]
    shared = shared and (mask == NULL or same_for_all(panel, mask_stride))
    n = 1 if shared else rows
    if mask == NULL and n == LANES and keys == LANES and bias_stride[2] == 1 and panel.heads == 1:
        bias += (panel.row + lane) * bias_stride[1]
        for r in range(LANES):
            t[r] = vf_load(bias + r * bias_stride[1])
    else:
        for r in range(n):
            t[r] = addend_vector(
                bias + lane_at(panel, lane + r, bias_stride[0], bias_stride[1]) if bias != NULL else NULL,
                bias_stride[2],
                mask + lane_at(panel, lane + r, mask_stride[0], mask_stride[1]) if mask != NULL else NULL,
                mask_stride[2], keys,
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
    const Problem* x, const Head* head, const Panel* panel, const char* now, Py_ssize_t row_bytes, Py_ssize_t key_bytes,
    Py_ssize_t key, Py_ssize_t rows
) noexcept nogil:
    """Asks for what comes a block of keys after a tile of bias or mask of key `key`, or where that was the last block,
    for the same rows of the next panel: a short piece of each of many long rows, which no hardware prefetcher foresees.
    Into the second-level cache, since such rows often share the few places that the first one has for their addresses.
    Bit by bit with the work of this block, for asked for at once they would have to queue."""
    cdef Py_ssize_t r
    cdef const char* later = now + x.Bc * key_bytes
    if key + x.Bc > panel.last_key:
        if panel.row + panel.rows + PANEL > head.sequence.Lq:
            return
        later = now + panel.rows * row_bytes + (panel.first_key // x.Bc - key // x.Bc) * x.Bc * key_bytes
    for r in range(rows):
        prefetch_far(later + r * row_bytes)


cdef struct Lines:
    # What changed() knows of the query rows of a vector, relative to a block of keys
    vf cap
    vf per_cap
    vf slope                    # ALiBi, negative
    vf place                    # position of each row
    vf low                      # keys from low ...
    vf high                     # ... to high are visible


cdef inline vf changed(
    vf y, vf key, vf addend, const Lines* lines, const bint soft, const bint sloped, const bint added, const bint edges
) noexcept nogil:
    """Scores of rows and keys, in any order of lanes, with everything that changes them."""
    if soft:
        y = vf_mul(lines.cap, tanhv(vf_mul(y, lines.per_cap)))
    if sloped:
        y = vf_fma(lines.slope, vf_abs(vf_sub(lines.place, key)), y)
    if added:
        y = vf_hide(vf_add(y, addend), addend, addend)
    if edges:
        y = vf_inside(y, key, lines.low, lines.high)
    return y


cdef inline vf change_keys(
    float* s, Py_ssize_t first, Py_ssize_t n, const vf* addend, const Lines* lines, vf highest,
    const bint soft, const bint sloped, const bint added, const bint edges
) noexcept nogil:
    """change_scores() on n keys from `first` on and one vector of rows, s[key]; returns the greatest score so far."""
    cdef Py_ssize_t i
    cdef vf y
    for i in range(n):
        y = changed(
            vf_load(s + i * PANEL), vf_set(<float> (first + i)), addend[i], lines, soft, sloped, added, edges,
        )
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
    cdef Py_ssize_t c, n, i, rows
    cdef Py_ssize_t position = panel.row + head.sequence.offset - block  # of lane 0, relative to the block
    cdef int j
    cdef bint added = head.bias != NULL or masked, sloped = head.slopes != NULL
    cdef const Py_ssize_t* bias_stride = head.sequence.bias_stride
    cdef const Py_ssize_t* mask_stride = head.sequence.mask_stride
    cdef bint far_bias = head.bias != NULL and bias_stride[1] != 0 and bias_stride[2] == 1 and panel.heads == 1
    cdef bint far_mask = masked and mask_stride[1] != 0 and mask_stride[2] == 1 and panel.heads == 1
    cdef vf step
    cdef vf addend[LANES]
    cdef vf highest
    cdef Lines lines
    cdef float* score
    lines.cap = vf_set(x.softcap)
    lines.per_cap = vf_set(1.0 / x.softcap if soft else 0.0)
    for j in range(panel.vectors):
        step = vf_load(panel.step + j * LANES)
        lines.low = vf_add(step, vf_set(relative(position - x.left)))
        lines.high = vf_add(step, vf_set(relative(position + x.right)))
        lines.place = vf_add(step, vf_set(<float> position))
        lines.slope = vf_sub(vf_set(0.0), vf_load(panel.slope + j * LANES))
        rows = max(<Py_ssize_t> 0, min(<Py_ssize_t> LANES, panel.lanes - j * LANES))  # none in vectors that fill up
        highest = vf_set(-INFINITY)
        c = begin
        while c < end:
            n = min(<Py_ssize_t> LANES, end - c)
            if added:
                load_addend(addend, head, panel, masked, j * LANES, rows, block + c, n)
                if far_bias:
                    prefetch_later(
                        x, head, panel,
                        <const char*> (head.bias + (panel.row + j * LANES) * bias_stride[1] + block + c),
                        bias_stride[1] * sizeof(float), sizeof(float), block + c, rows,
                    )
                if far_mask and c % CACHE_LINE == 0:
                    prefetch_later(
                        x, head, panel,
                        <const char*> (head.mask + (panel.row + j * LANES) * mask_stride[1] + block + c),
                        mask_stride[1], 1, block + c, rows,
                    )
            score = s + c * PANEL + j * LANES
            # what masks and causal need alone, without the rest of it in the loop
            if added and not (soft or edges or sloped):
                highest = change_keys(score, c, n, addend, &lines, highest, False, False, True, False)
            elif edges and not (soft or added or sloped):
                highest = change_keys(score, c, n, addend, &lines, highest, False, False, False, True)
            else:
                highest = change_keys(score, c, n, addend, &lines, highest, soft, sloped, added, edges)
            c += n
        vf_store(top + j * LANES, highest)


cdef int mask_tile(const Head* head, const Panel* panel, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """-1 when the mask keeps no key of [begin, end) for any row of the panel, 1 when it keeps all, 0 between."""
    cdef const Py_ssize_t* stride = head.sequence.mask_stride
    cdef Py_ssize_t i, j, kept, seen = 0, all_kept = 0
    cdef const unsigned char* row
    for i in range(1 if same_for_all(panel, stride) else panel.lanes):
        row = head.mask + lane_at(panel, i, stride[0], stride[1]) + begin * stride[2]
        kept = 0
        if stride[2] == 1:
            for j in range(end - begin):
                kept += row[j] != 0
        else:
            for j in range(end - begin):
                kept += row[j * stride[2]] != 0
        seen += end - begin
        all_kept += kept
        if 0 < all_kept < seen:
            return 0
    return -1 if all_kept == 0 else 1
