# Attention on one panel of query rows, written once for every SIMD build.
#
# Queries live in lanes: a panel holds up to PANEL = LANES * VECTORS query rows, one per lane, and every tile is stored
# transposed, [key or head dimension][query row] with a pitch of PANEL floats. Row maxima, row sums and rescaling are
# then vertical operations without shuffles; keys and values are read in their own layout, one broadcast at a time.
#
#     product.pxi   S^T = K Q^T     scores()          register-tiled product; scores_of_codes() in int8.pxi
#     change.pxi    S^T             change_scores()   softcap, bias, ALiBi, masks: the same for every precision
#     softmax.pxi   P^T = e^(S-m)   softmax()         online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867)
#     product.pxi   O^T = V^T P^T   accumulate()      the same product; in int8.pxi also of codes and of bfloat16
#
# Scores are floats in natural units from the first product on, whatever it multiplied (in units of log2 the lowest
# float, which many use as a mask, would be -inf).
#
# Rules: every function here is noexcept nogil, allocates nothing, validates nothing. Strides are in elements. Lanes
# beyond the last row of a panel hold zero queries; what they compute is never written.

include "vocabulary.pxi"

cdef enum Product:
    # How the second product of quantised attention is computed
    FLOAT32, BFLOAT16, INT8


cdef struct Codes:
    # The operands of quantised attention: x ~ code * scale (+ mean, of keys). A scale is one for each token or for
    # each head: of q by a stride of 0, of k and v by a length of 1. Packed arrays (pack.pxi) and their scales are
    # contiguous.
    const signed char* q        # (B, H, Lq, D), the last axis contiguous
    const float* q_scale        # (B, H, Lq)
    const int* k                # (B, Hk, Lk, 1 + groups of D), see pack_keys(); Lk rounded up to ROWS
    const float* k_scale        # (B, Hk, Lk rounded up to ROWS) or (B, Hk, 1)
    const float* k_mean         # (B, Hk, D) or NULL
    const int* v                # (B, Hk, groups of Lk, Dv rounded up to ROWS), see pack_values(); NULL for FLOAT32
    const float* v_scale        # (B, Hk, Lk rounded up to ROWS) or (B, Hk, 1)
    unsigned char* trace        # (B, H, Lq, Lk) or NULL: where to write the codes of P, for tests
    Product product             # how P V is computed
    Py_ssize_t k_scale_length   # scales of one head
    Py_ssize_t v_scale_length
    bint k_tokens               # whether it is one scale for each token
    bint v_tokens
    Py_ssize_t q_stride[3]
    Py_ssize_t q_scale_stride[3]


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
    Py_ssize_t precise          # keys before this one are computed in float32, from q, k and v; all are where no codes
    Codes codes                 # where precise < Lk


cdef struct Panel:
    # Up to PANEL consecutive query rows of one head, their packed queries and their running state.
    Py_ssize_t row              # the first row
    Py_ssize_t rows             # how many
    int vectors                 # ceil(rows / LANES)
    Py_ssize_t first_key        # keys that its first row ...
    Py_ssize_t last_key         # ... to its last row may see: [first_key, last_key]
    float* q                    # [D][PANEL] queries times scale, where keys are computed in float32
    int* codes                  # [groups of D][PANEL] codes of the queries, with ZERO_POINT
    float* factor               # [PANEL] makes sums of products of codes scores: scale, q's, that of a head of k
    # what subtracting the mean of the keys took from every score of a row, scale * q . mean, is in one of these two
    float* shift                # [PANEL] added to each score, where softcap needs them whole
    float* lift                 # [PANEL] added to the maximum in the end, so that it takes no precision from scores
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
    const signed char* q_codes  # as in Codes, the rest too
    const float* q_scale
    const int* k_codes
    const float* k_scale
    const float* k_mean
    const int* v_codes
    const float* v_scale
    unsigned char* trace


cdef struct Scratch:
    # What a panel needs while it meets a block of keys.
    float* s                    # [Bc][PANEL] scores, then weights
    float* hidden               # [Bc][PANEL] what is hidden from them; or
    int* p                      # the weights as codes or bfloat16, in groups of keys: the same memory
    float* top                  # [parts(x)][PANEL] the greatest score of each row, of each part where there are codes
    float* alpha                # [PANEL] e^(m - m')
    float* beta                 # [parts(x)][PANEL] makes a part's sum of products of codes an output


include "product.pxi"
include "softmax.pxi"
include "int8.pxi"
include "change.pxi"


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


cdef inline void prefetch_slice(
    const Problem* x, const Head* head, const Panel* panel, Py_ssize_t block, Py_ssize_t begin, Py_ssize_t end,
    Py_ssize_t low, Py_ssize_t high
) noexcept nogil:
    """Asks for what comes after the first product of a block while it goes on, the share [low, high) of [begin, end):
    the values, by the first panel of a head, which finds them in no cache, and with a panel's first block the rows
    of its output and the queries of the next panel. Codes are a quarter as long, and were packed just now."""
    cdef bint floats = x.precise >= x.Lk
    cdef Py_ssize_t first = (low - begin) * panel.rows // (end - begin)
    cdef Py_ssize_t last = (high - begin) * panel.rows // (end - begin)
    if panel.row == 0 and floats:
        prefetch_rows(
            <const char*> (head.v + (block + begin) * x.v_stride[2]), x.v_stride[2] * sizeof(float),
            low - begin, high - begin, x.Dv * sizeof(float),
        )
    if block <= panel.first_key:
        prefetch_rows(
            <const char*> (head.out + panel.row * x.out_stride[2]), x.out_stride[2] * sizeof(float), first, last,
            x.Dv * sizeof(float),
        )
    if block <= panel.first_key and floats:
        prefetch_rows(
            <const char*> (head.q + (panel.row + panel.rows) * x.q_stride[2]), x.q_stride[2] * sizeof(float),
            first, last, x.D * sizeof(float),
        )


cdef void fold_codes(
    const Problem* x, const Head* head, const Panel* panel, Py_ssize_t block, Py_ssize_t begin, Py_ssize_t end,
    const Scratch* scratch
) noexcept nogil:
    """The second half of fold_block() on codes or bfloat16: softmax and the product with the values."""
    cdef Py_ssize_t low = begin // ROWS * ROWS, high = (end + ROWS - 1) // ROWS * ROWS
    cdef Py_ssize_t first, last, columns = (x.Dv + ROWS - 1) // ROWS * ROWS
    cdef const float* v_scale = head.v_scale + block if x.codes.v_tokens else head.v_scale
    if x.codes.product == INT8:
        softmax_codes(
            scratch.s, scratch.p, scratch.top, panel.m, panel.l, scratch.alpha, scratch.beta, v_scale,
            x.codes.v_tokens, low, high, panel.vectors,
        )
        accumulate_codes(
            panel.o, scratch.p, head.v_codes + block // GROUP * columns, columns, scratch.alpha, scratch.beta,
            low // GROUP, (end + GROUP - 1) // GROUP, panel.vectors,
        )
        if head.trace != NULL:
            write_trace(x, head, panel, block, begin, end, scratch.p)
    else:
        softmax(scratch.s, scratch.top, panel.m, panel.l, scratch.alpha, low, high, panel.vectors)
        round_weights(scratch.p, scratch.s, v_scale if x.codes.v_tokens else NULL, low, high, panel.vectors)
        first, last = low // BF16_GROUP, (end + BF16_GROUP - 1) // BF16_GROUP
        accumulate_bf16(
            panel.o, scratch.p + first * PANEL, head.v_codes + (block // BF16_GROUP + first) * columns, columns,
            scratch.alpha, 1.0 if x.codes.v_tokens else v_scale[0], last - first, panel.vectors,
        )


cdef void write_trace(
    const Problem* x, const Head* head, const Panel* panel, Py_ssize_t block, Py_ssize_t begin, Py_ssize_t end,
    const int* p
) noexcept nogil:
    """The codes of P, for tests."""
    cdef Py_ssize_t r, c
    for r in range(panel.rows):
        for c in range(begin, end):
            head.trace[(panel.row + r) * x.Lk + block + c] = (<const code*> (p + c // GROUP * PANEL + r))[c % GROUP]


cdef inline bint edges_inside(const Problem* x, const Panel* panel, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Whether causal or the window hides a part of keys begin <= j < end from some row of a panel: the last row's first
    key or the first row's last key lies between them."""
    cdef Py_ssize_t position = panel.row + x.offset
    return position + panel.rows - 1 - x.left > begin or position + x.right < end - 1


cdef void lower_scores(float* s, float* top, const Panel* panel, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Takes panel.lift from scores in float32, which have q . mean in them, so that they stand beside those of codes,
    which lack it until the end. top: of the whole block."""
    cdef Py_ssize_t c
    cdef int j
    cdef vf lift
    for j in range(panel.vectors):
        lift = vf_load(panel.lift + j * LANES)
        vf_store(top + j * LANES, vf_sub(vf_load(top + j * LANES), lift))
        for c in range(begin, end):
            vf_store(s + c * PANEL + j * LANES, vf_sub(vf_load(s + c * PANEL + j * LANES), lift))


cdef void fold_block(
    const Problem* x, const Head* head, const Panel* panel, Py_ssize_t block, Py_ssize_t begin, Py_ssize_t end,
    const Scratch* scratch, bint careful
) noexcept nogil:
    """Folds keys [block + begin, block + end) into the running state of a panel, on codes or, before key `precise`, in
    float32. Nothing that no row can see is read, but for the rest of a group of packed keys.

    careful: values that are not finite may be hidden here.
    """
    cdef Py_ssize_t c, i, low, high, step = x.Bc, part = x.Bc
    cdef Py_ssize_t groups = (x.D + GROUP - 1) // GROUP
    cdef bint masked = False, changes, changed, edges, prefetched = False, precise = block + begin < x.precise
    cdef int j
    cdef float* s = scratch.s
    cdef float* top
    cdef const float* v
    cdef const int* k_codes = head.k_codes + block * (1 + groups)
    cdef const float* k_scale = head.k_scale + block if x.codes.k_tokens else NULL
    if begin >= end:
        return
    if x.mask != NULL:
        i = mask_tile(x, head, panel, block + begin, block + end)
        if i < 0:
            return
        masked = i == 0
    if not precise and x.codes.product == INT8:
        part = PART_KEYS
    changes = masked or x.softcap != 0.0 or x.bias != NULL or x.slopes != NULL
    changed = changes or edges_inside(x, panel, block + begin, block + end)

    if panel.row == 0 or block <= panel.first_key:
        prefetched = True
        step = max(<Py_ssize_t> ROWS, x.Bc // SLICES // ROWS * ROWS)
    low = begin
    while low < end:
        high = min(end, (low // step + 1) * step, (low // part + 1) * part)
        top = scratch.top + low // part * PANEL
        if low == begin or low % part == 0:
            for j in range(VECTORS):
                vf_store(top + j * LANES, vf_set(-INFINITY))
        if prefetched:
            prefetch_slice(x, head, panel, block, begin, end, low, high)
        if precise:
            scores(s, top, panel.q, head.k + block * x.k_stride[2], x.k_stride[2], x.D, low, high, panel.vectors)
        else:
            scores_of_codes(s, top, panel, k_codes, k_scale, groups, low, high)
        low = high
    if precise and head.k_mean != NULL:
        lower_scores(s, scratch.top, panel, begin, end)
    if changed:
        low = begin
        while low < end:
            high = min(end, (low // part + 1) * part)
            edges = edges_inside(x, panel, block + low, block + high)
            if changes or edges:
                top = scratch.top + low // part * PANEL
                change_scores(s, top, x, head, panel, block, low, high, x.softcap != 0.0, masked, edges)
            low = high
    low, high = begin // ROWS * ROWS, (end + ROWS - 1) // ROWS * ROWS
    for c in range(low * PANEL, begin * PANEL):
        s[c] = -INFINITY
    for c in range(end * PANEL, high * PANEL):
        s[c] = -INFINITY
    if not precise and x.codes.product != FLOAT32:
        fold_codes(x, head, panel, block, begin, end, scratch)
        return
    softmax(s, scratch.top, panel.m, panel.l, scratch.alpha, low, high, panel.vectors)
    s = s + begin * PANEL
    v = head.v + (block + begin) * x.v_stride[2]
    if careful and changed:
        for c in range(begin * PANEL, end * PANEL):
            scratch.hidden[c] = 0.0
        change_scores(scratch.hidden, scratch.top, x, head, panel, block, begin, end, False, masked, True)
        accumulate_visible(
            panel.o, s, scratch.hidden + begin * PANEL, v, x.v_stride[2], x.Dv, scratch.alpha, end - begin,
            panel.vectors,
        )
    else:
        accumulate(panel.o, s, v, x.v_stride[2], x.Dv, scratch.alpha, end - begin, panel.vectors)


# ---------------------------------------------------------------------------------------------------------------------
# Into and out of a panel


cdef void begin_panel(const Problem* x, const Head* head, Panel* panel) noexcept nogil:
    """Packs the queries of a panel and clears its state."""
    cdef Py_ssize_t r
    for r in range(PANEL):
        panel.m[r] = -INFINITY
        panel.l[r] = 0.0
        panel.lift[r] = 0.0
    memset(panel.o, 0, x.Dv * PANEL * sizeof(float))
    if panel.first_key < x.precise:
        pack_floats(x, head, panel)
    if panel.last_key >= x.precise:
        pack_codes(x, head, panel)


cdef void pack_floats(const Problem* x, const Head* head, Panel* panel) noexcept nogil:
    """The queries of a panel, times scale, in lanes.

    Whole tiles of LANES x LANES go without masks or tests, which lets the transposition stay in registers.
    """
    cdef Py_ssize_t d, r, row, n
    cdef int j
    cdef const float* q
    cdef vf t[LANES]
    cdef vf scale = vf_set(x.scale)
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
    cdef double top, lifted, weight, l
    cdef float* out
    cdef vf t[LANES]
    cdef vf factor
    for r in range(panel.vectors * LANES):
        top = lifted = <double> panel.m[r] + panel.lift[r]
        l = panel.l[r]
        weight = 1.0
        if head.sink != NULL and head.sink[0] != -INFINITY:
            top = max(top, <double> head.sink[0])
            weight = exp(lifted - top)
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
