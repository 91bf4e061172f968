# The algorithm of exact fp32 attention on one panel of query rows, written once for every SIMD build.
#
# Queries live in lanes: a panel holds up to PANEL = LANES * VECTORS query rows, one per lane, and every tile is stored
# transposed, [key or head dimension][query row] with a pitch of PANEL floats. Row maxima, row sums and rescaling are
# then vertical operations without shuffles; keys and values are read in their own layout, one broadcast at a time.
#
#     S^T = K Q^T     scores()       register-tiled product
#     S^T            change_scores() softcap, bias, ALiBi, masks: everything that changes a score, for every precision
#     P^T = e^(S-m)   softmax()      online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867)
#     O^T = V^T P^T   accumulate()   the same register-tiled product
#
# The softmax scale is folded into the packed queries. Scores stay in natural units: in units of log2 the lowest float,
# which many use as a mask, would be -inf.
#
# Rules: every function here is noexcept nogil, allocates nothing, validates nothing. Strides are in elements. Lanes
# beyond the last row of a panel hold zero queries; what they compute is never written.

cdef extern from "simd.h" nogil:
    ctypedef struct vf:
        pass
    enum:
        LANES    # floats in a vector
        VECTORS  # vectors of query rows in a full panel
        ROWS     # keys (or value columns) of a register tile; divides LANES
        UNROLL   # steps of a product between two tests of its end
        PANEL    # LANES * VECTORS
        CACHE_LINE
    void prefetch(const void*) noexcept
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
    vf vf_abs(vf) noexcept
    vf vf_copysign(vf size, vf sign) noexcept                    # size >= 0 with the sign of the other
    vf vf_less(vf a, vf b, vf x, vf y) noexcept                  # x where a < b, else y
    vf vf_fraction(vf x) noexcept       # x - floor(x) for -200 <= x <= 0; in [0, 1) below, -inf too; NaN for NaN
    vf vf_scale2(vf a, vf x) noexcept   # a * 2^floor(x) for x <= 0, also where that is 0 or denormal
    vf vf_hide(vf x, vf a, vf y) noexcept                        # y where a is -inf, else x
    vf vf_inside(vf x, vf j, vf low, vf high) noexcept           # x where low <= j <= high, else -inf
    vf vf_keep_part(const unsigned char*, Py_ssize_t n) noexcept  # 0 where the byte is set, -inf where not; n bytes
    void vf_transpose(vf*) noexcept                              # LANES vectors of LANES

from libc.string cimport memset

cdef extern from "math.h" nogil:
    double exp(double) noexcept
    double log(double) noexcept
    float INFINITY

cdef extern from "float.h" nogil:
    float FLT_MAX, FLT_MIN

cdef enum:
    # At most this many products are added one after another in a score; a longer sum is cut into equal parts, so that
    # its rounding error grows with their number. Head dimensions up to it, the usual ones, pay nothing.
    PART = 128


cdef struct Problem:
    # What every task of a call reads. Optional arrays are NULL when absent; a stride is 0 where an array is broadcast.
    const float* q              # (B, H, Lq, D), the last axis contiguous, as in k, v and out
    const float* k              # (B, Hk, Lk, D)
    const float* v              # (B, Hk, Lk, Dv)
    float* out                  # (B, H, Lq, Dv)
    float* lse                  # (B, H, Lq) or NULL
    const float* bias           # (B, H, Lq, Lk) or NULL
    const unsigned char* mask   # (B, H, Lq, Lk) or NULL; a set byte keeps
    const float* slopes         # (B, H) or NULL
    const float* sinks          # (H,) or NULL
    Py_ssize_t q_stride[3]
    Py_ssize_t k_stride[3]
    Py_ssize_t v_stride[3]
    Py_ssize_t out_stride[3]
    Py_ssize_t lse_stride[3]
    Py_ssize_t bias_stride[4]
    Py_ssize_t mask_stride[4]
    Py_ssize_t slopes_stride[2]
    Py_ssize_t sinks_stride
    Py_ssize_t B
    Py_ssize_t H
    Py_ssize_t group            # query heads that share a key/value head
    Py_ssize_t Lq
    Py_ssize_t Lk
    Py_ssize_t D
    Py_ssize_t Dv
    Py_ssize_t offset           # query i stands at position i + offset
    Py_ssize_t left             # keys from position - left ...
    Py_ssize_t right            # ... to position + right are visible
    float scale                 # softmax scale
    float softcap               # 0 for none
    Py_ssize_t Br               # query rows of a task: a multiple of PANEL
    Py_ssize_t Bc               # keys of a block: a multiple of ROWS


cdef struct Panel:
    # Up to PANEL consecutive query rows of one head, their packed queries and their running state.
    Py_ssize_t row              # the first row
    Py_ssize_t rows             # how many
    int vectors                 # ceil(rows / LANES)
    Py_ssize_t first_key        # keys that its first row ...
    Py_ssize_t last_key         # ... to its last row may see: [first_key, last_key]
    float* q                    # [D][PANEL] queries times scale
    float* o                    # [Dv rounded up to LANES][PANEL] running output
    float* m                    # [PANEL] running maximum, -inf at first
    float* l                    # [PANEL] running denominator


cdef struct Head:
    # One head of one sequence: where its rows and keys begin. Optional arrays are NULL when absent.
    const float* q
    float* out
    float* lse
    const float* sink
    const float* k
    const float* v
    const float* bias
    const unsigned char* mask
    float slope                 # ALiBi


# ---------------------------------------------------------------------------------------------------------------------
# The register-tiled product, and its two uses


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
    cdef Py_ssize_t c, g, key, d, part, longest = (D - 1) // ((D + PART - 1) // PART) + 1
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
    elif vectors == 2:
        scores_tile(s, top, q, k, k_stride, D, begin, end, 2)
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
    elif vectors == 2:
        accumulate_tile(o, p, v, v_stride, Dv, alpha, n, 2)
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


# ---------------------------------------------------------------------------------------------------------------------
# Softmax


cdef inline void exponentials(vf* x, const int n) noexcept nogil:
    """x[i] = e^x[i] for i < n and x[i] <= 0, NaN for NaN, exactly 1 for 0 and 0 for -inf: with y = x log2(e),
    2^floor(y) times a polynomial in the fraction of y.

    The polynomial is the minimax (relative error 8.3e-8) of degree 5 for 2^f on [0, 1) with constant term 1, fitted
    by linear programming, and within 1.3 units in the last place with the rounding of its evaluation. Degree 6
    would make calls at D = 64 one per cent slower and the RMS error of outputs at most two per cent smaller.
    Rounding y adds a relative error of up to |x| 2^-24, which is what rounding the score itself does. Each step is
    taken for all n before the next one: a chain of ten dependent instructions at a time would fill the CPU's
    schedulers with waiting ones.
    """
    cdef int i
    cdef vf y[ROWS]
    cdef vf f[ROWS]
    for i in range(n):
        y[i] = vf_mul(x[i], vf_set(1.4426950408889634))
    for i in range(n):
        f[i] = vf_fraction(y[i])
    for i in range(n):
        x[i] = vf_fma(vf_set(0.001867129866844636), f[i], vf_set(0.009017030878148365))
    for i in range(n):
        x[i] = vf_fma(x[i], f[i], vf_set(0.055799912580456114))
    for i in range(n):
        x[i] = vf_fma(x[i], f[i], vf_set(0.24016445035172532))
    for i in range(n):
        x[i] = vf_fma(x[i], f[i], vf_set(0.6931513117800604))
    for i in range(n):
        x[i] = vf_fma(x[i], f[i], vf_set(1.0))
    for i in range(n):
        x[i] = vf_scale2(x[i], y[i])


cdef inline vf expv(vf x) noexcept nogil:
    """e^x as in exponentials()."""
    cdef vf one[1]
    one[0] = x
    exponentials(one, 1)
    return one[0]


cdef void softmax(
    float* s, const float* top, float* m, float* l, float* alpha, Py_ssize_t begin, Py_ssize_t end, int vectors
) noexcept nogil:
    """One step of the online softmax over rows begin <= c < end of the score tile s, in place: S^T becomes P^T.

        m' = max(m, top),   alpha = e^(m - m'),   P = e^(S - m'),   l' = alpha l + sum_c P

    top: the greatest score of each row. begin, end: multiples of ROWS. A row that has seen nothing yet has
    m' = -inf: 0 stands in for it, so that P = e^-inf = 0. A NaN score gives a NaN weight, and so a NaN denominator,
    whatever the maximum makes of it.
    """
    cdef Py_ssize_t g
    cdef int j, i
    cdef float* rows
    cdef vf old, highest, base, sum, a
    cdef vf x[ROWS]
    for j in range(vectors):
        old = vf_load(m + j * LANES)
        highest = vf_max(old, vf_load(top + j * LANES))
        base = vf_hide(highest, highest, vf_set(0.0))
        sum = vf_set(0.0)
        for g in range(begin // ROWS, end // ROWS):
            rows = s + g * ROWS * PANEL + j * LANES
            for i in range(ROWS):
                x[i] = vf_sub(vf_load(rows + i * PANEL), base)
            exponentials(x, ROWS)
            for i in range(ROWS):
                vf_store(rows + i * PANEL, x[i])
            for i in range(ROWS // 2):
                x[i] = vf_add(x[i], x[i + ROWS // 2])
            for i in range(1, ROWS // 2):
                x[0] = vf_add(x[0], x[i])
            sum = vf_add(sum, x[0])
        a = expv(vf_sub(old, base))
        vf_store(l + j * LANES, vf_fma(vf_load(l + j * LANES), a, sum))
        vf_store(m + j * LANES, highest)
        vf_store(alpha + j * LANES, a)


# ---------------------------------------------------------------------------------------------------------------------
# What changes a score


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
    cdef Py_ssize_t r, shared = (bias == NULL or bias_stride[0] == 0) and (mask == NULL or mask_stride[0] == 0)
    cdef vf a
    cdef float buffer[LANES]
    for r in range(1 if shared else rows):
        a = vf_set(0.0)
        if bias != NULL:
            a = bias_vector(bias + r * bias_stride[0], bias_stride[1], keys)
        if mask != NULL:
            a = vf_hide(a, keep_vector(mask + r * mask_stride[0], mask_stride[1], keys), vf_set(-INFINITY))
        t[r] = a
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
    cdef float lane[LANES]
    cdef vf addend[LANES]
    cdef vf y, key, place, low, high, highest
    cdef vf cap = vf_set(x.softcap), per_cap = vf_set(0.0), slope = vf_set(-head.slope)
    cdef const float* bias = NULL
    cdef const unsigned char* mask = NULL
    cdef float* score
    if soft:
        per_cap = vf_set(1.0 / x.softcap)
    for i in range(LANES):
        lane[i] = <float> i
    for j in range(panel.vectors):
        low = vf_add(vf_load(lane), vf_set(relative(position + j * LANES - x.left)))
        high = vf_add(vf_load(lane), vf_set(relative(position + j * LANES + x.right)))
        place = vf_add(vf_load(lane), vf_set(<float> (position + j * LANES)))
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
            for i in range(n):
                score = s + (c + i) * PANEL + j * LANES
                y = vf_load(score)
                key = vf_set(<float> (c + i))
                if soft:
                    y = vf_mul(cap, tanhv(vf_mul(y, per_cap)))
                if x.slopes != NULL:
                    y = vf_fma(slope, vf_abs(vf_sub(place, key)), y)
                if added:
                    y = vf_hide(vf_add(y, addend[i]), addend[i], addend[i])
                if edges:
                    y = vf_inside(y, key, low, high)
                highest = vf_max(highest, y)
                vf_store(score, y)
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


# ---------------------------------------------------------------------------------------------------------------------
# A panel against a block of keys


cdef enum:
    SLICES = 8  # pieces of a block's first product when there is something to prefetch between them


cdef inline void prefetch_rows(
    const char* first, Py_ssize_t row_bytes, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t width
) noexcept nogil:
    """Asks for the first `width` bytes of rows begin <= r < end, which are row_bytes apart. Inline, since GCC takes a
    function of prefetches alone for one without effect and leaves its calls out."""
    cdef Py_ssize_t r, i
    for r in range(begin, end):
        for i in range((width + CACHE_LINE - 1) // CACHE_LINE):
            prefetch(first + r * row_bytes + i * CACHE_LINE)


cdef bint next_bias_is_far(const Problem* x, const Panel* panel, Py_ssize_t block) noexcept nogil:
    """Whether the next block has a bias of its own for every row, in rows that can be prefetched."""
    return x.bias != NULL and x.bias_stride[2] != 0 and x.bias_stride[3] == 1 and block + x.Bc <= panel.last_key


cdef inline void prefetch_slice(
    const Problem* x, const Head* head, const Panel* panel, Py_ssize_t block, Py_ssize_t begin, Py_ssize_t end, int i
) noexcept nogil:
    """Asks for slice i of what comes after the first product of a block: the values, by the first panel of a head,
    which finds them in no cache; the rows of the output and the queries of the next panel, with a panel's first block;
    the bias of the next block, a short piece of each of many long rows, which no hardware prefetcher foresees. Asked
    for all at once they would have to queue."""
    cdef Py_ssize_t next_block = block + x.Bc
    cdef Py_ssize_t first = i * panel.rows // SLICES, last = (i + 1) * panel.rows // SLICES
    if panel.row == 0:
        prefetch_rows(
            <const char*> (head.v + (block + begin) * x.v_stride[2]), x.v_stride[2] * sizeof(float),
            i * (end - begin) // SLICES, (i + 1) * (end - begin) // SLICES, x.Dv * sizeof(float),
        )
    if block <= panel.first_key:
        prefetch_rows(
            <const char*> (head.out + panel.row * x.out_stride[2]), x.out_stride[2] * sizeof(float), first, last,
            x.Dv * sizeof(float),
        )
        prefetch_rows(
            <const char*> (head.q + (panel.row + panel.rows) * x.q_stride[2]), x.q_stride[2] * sizeof(float),
            first, last, x.D * sizeof(float),
        )
    if next_bias_is_far(x, panel, block):
        prefetch_rows(
            <const char*> (head.bias + panel.row * x.bias_stride[2] + next_block), x.bias_stride[2] * sizeof(float),
            first, last, min(x.Bc, panel.last_key + 1 - next_block) * sizeof(float),
        )


cdef void fold_block(
    const Problem* x, const Head* head, const Panel* panel, Py_ssize_t block, float* s, float* hidden, float* top,
    float* alpha, bint careful
) noexcept nogil:
    """Folds keys [block, block + Bc) into the running state of a panel; nothing that no row can see is read.

    s, hidden: [Bc][PANEL] scratch. top, alpha: [PANEL] scratch. careful: values that are not finite may be hidden here.
    """
    cdef Py_ssize_t c, i, low, high, slices = 1
    cdef Py_ssize_t begin = max(<Py_ssize_t> 0, panel.first_key - block)
    cdef Py_ssize_t end = min(x.Bc, panel.last_key + 1 - block)
    cdef Py_ssize_t position = panel.row + x.offset
    cdef bint masked = False, edges, changed
    cdef const float* k = head.k + block * x.k_stride[2]
    cdef const float* v
    if begin >= end:
        return
    if x.mask != NULL:
        i = mask_tile(x, head, panel, block + begin, block + end)
        if i < 0:
            return
        masked = i == 0
    # the last row's first key and the first row's last key lie inside the tile, or a part of it is hidden
    edges = position + panel.rows - 1 - x.left > block + begin or position + x.right < block + end - 1
    changed = masked or edges or x.softcap != 0.0 or x.bias != NULL or x.slopes != NULL

    if panel.row == 0 or block <= panel.first_key or next_bias_is_far(x, panel, block):
        slices = SLICES
    for i in range(PANEL):
        top[i] = -INFINITY
    for i in range(slices):
        if slices > 1:
            prefetch_slice(x, head, panel, block, begin, end, i)
        low, high = max(begin, i * x.Bc // slices // ROWS * ROWS), min(end, (i + 1) * x.Bc // slices // ROWS * ROWS)
        if low < high:
            scores(s, top, panel.q, k, x.k_stride[2], x.D, low, high, panel.vectors)
    if changed:
        change_scores(s, top, x, head, panel, block, begin, end, x.softcap != 0.0, masked, edges)
    low, high = begin // ROWS * ROWS, (end + ROWS - 1) // ROWS * ROWS
    for c in range(low * PANEL, begin * PANEL):
        s[c] = -INFINITY
    for c in range(end * PANEL, high * PANEL):
        s[c] = -INFINITY
    softmax(s, top, panel.m, panel.l, alpha, low, high, panel.vectors)
    v = head.v + (block + begin) * x.v_stride[2]
    if careful and changed:
        for c in range(begin * PANEL, end * PANEL):
            hidden[c] = 0.0
        change_scores(hidden, top, x, head, panel, block, begin, end, False, masked, edges)
        accumulate_visible(
            panel.o, s + begin * PANEL, hidden + begin * PANEL, v, x.v_stride[2], x.Dv, alpha, end - begin,
            panel.vectors,
        )
    else:
        accumulate(panel.o, s + begin * PANEL, v, x.v_stride[2], x.Dv, alpha, end - begin, panel.vectors)


# ---------------------------------------------------------------------------------------------------------------------
# Into and out of a panel


cdef void begin_panel(const Problem* x, const Head* head, Panel* panel) noexcept nogil:
    """Packs the queries of a panel, times scale, and clears its state.

    Whole tiles of LANES x LANES go without masks or tests, which lets the transposition stay in registers.
    """
    cdef Py_ssize_t d, r, row, n
    cdef int j
    cdef const float* q
    cdef vf t[LANES]
    cdef vf scale = vf_set(x.scale)
    for r in range(PANEL):
        panel.m[r] = -INFINITY
        panel.l[r] = 0.0
    memset(panel.o, 0, x.Dv * PANEL * sizeof(float))
    for j in range(panel.vectors):
        row = j * LANES
        d = 0
        while d < x.D:
            n = min(<Py_ssize_t> LANES, x.D - d)
            q = head.q + (panel.row + row) * x.q_stride[2] + d
            if n == LANES and row + LANES <= panel.rows:
                for r in range(LANES):
                    t[r] = vf_mul(scale, vf_load(q + r * x.q_stride[2]))
                vf_transpose(t)
                for r in range(LANES):
                    vf_store(panel.q + (d + r) * PANEL + row, t[r])
            else:
                for r in range(LANES):
                    t[r] = vf_set(0.0)
                    if row + r < panel.rows:
                        t[r] = vf_mul(scale, vf_load_part(q + r * x.q_stride[2], n))
                vf_transpose(t)
                for r in range(n):
                    vf_store(panel.q + (d + r) * PANEL + row, t[r])
            d += LANES


cdef bint panel_is_finite(const Problem* x, const Panel* panel) noexcept nogil:
    """Whether the running output of every row of a panel is finite."""
    cdef Py_ssize_t d, r
    cdef int j
    cdef vf bad, o
    cdef float buffer[LANES]
    for j in range(panel.vectors):
        bad = vf_set(0.0)
        for d in range(x.Dv):
            o = vf_load(panel.o + d * PANEL + j * LANES)
            bad = vf_add(bad, vf_sub(o, o))
        vf_store(buffer, bad)
        for r in range(min(<Py_ssize_t> LANES, panel.rows - j * LANES)):
            if buffer[r] != 0.0:
                return False
    return True


cdef void end_panel(const Problem* x, const Head* head, const Panel* panel) noexcept nogil:
    """Divides by the denominator and writes the caller's layout.

    A row that saw nothing has l = 0 and o = 0: its output is 0 and its LSE the sink, or -inf. The sink is a logit in
    natural units that adds to the denominator only.
    """
    cdef Py_ssize_t d, r, row, n, rows
    cdef int j
    cdef double top, weight, l
    cdef float* out
    cdef vf t[LANES]
    cdef vf factor
    for r in range(panel.vectors * LANES):
        top = panel.m[r]
        l = panel.l[r]
        weight = 1.0
        if head.sink != NULL and head.sink[0] != -INFINITY:
            top = max(top, <double> head.sink[0])
            weight = exp(panel.m[r] - top)
            l = l * weight + (exp(head.sink[0] - top) if head.sink[0] != top else 1.0)  # also where both are inf
        if head.lse != NULL and r < panel.rows:
            head.lse[(panel.row + r) * x.lse_stride[2]] = <float> (top + log(l)) if l != 0.0 else -INFINITY
        panel.l[r] = <float> (weight / l) if panel.l[r] != 0.0 else 0.0
    for j in range(panel.vectors):
        row = j * LANES
        rows = min(<Py_ssize_t> LANES, panel.rows - row)
        factor = vf_load(panel.l + row)
        d = 0
        while d < x.Dv:
            n = min(<Py_ssize_t> LANES, x.Dv - d)
            for r in range(LANES):
                t[r] = vf_mul(factor, vf_load(panel.o + (d + r) * PANEL + row))
            vf_transpose(t)
            out = head.out + (panel.row + row) * x.out_stride[2] + d
            if n == LANES and rows == LANES:
                for r in range(LANES):
                    vf_store(out + r * x.out_stride[2], t[r])
            else:
                for r in range(rows):
                    vf_store_part(out + r * x.out_stride[2], t[r], n)
            d += LANES
