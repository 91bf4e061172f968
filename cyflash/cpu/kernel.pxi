# Attention on one panel of query rows, written once for every SIMD build.
#
# Queries live in lanes: a panel holds up to PANEL = LANES * VECTORS query rows, one per lane, and every tile is stored
# transposed, [key or head dimension][query row] with a pitch of PANEL floats. Row maxima, row sums and rescaling are
# then vertical operations without shuffles; keys and values are read in their own layout, one broadcast at a time.
#
#     block.pxi     K, V            load_keys() ...   where they lie, or a copy in the form that the products read
#     product.pxi   S^T = K Q^T     scores()          register-tiled product; scores_of_codes() in int8.pxi
#     change.pxi    S^T             change_scores()   softcap, bias, ALiBi, masks: the same for every precision
#     softmax.pxi   P^T = e^(S-m)   softmax()         online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867)
#     product.pxi   O^T = V^T P^T   accumulate()      the same product; of codes in int8.pxi, of bfloat16 in bf16.pxi
#     few.pxi       all of it       for panels with few rows, which would leave most lanes of a tile idle
#
# Scores are floats in natural units from the first product on, whatever it multiplied (in units of log2 the lowest
# float, which many use as a mask, would be -inf).
#
# Rules: every function here is noexcept nogil, allocates nothing, validates nothing. Strides are in elements, but in
# bytes where the type of the elements is known only at run time. Lanes beyond the last row of a panel hold zero
# queries; what they compute is never written.

include "vocabulary.pxi"
include "floats.pxi"

cdef struct Pages:
    # Keys or values where they are kept: row j of a sequence is row j % page_size of its page j // page_size.
    const char* data
    Py_ssize_t page             # bytes from one page to the next
    Py_ssize_t head             # ... from one kv head
    Py_ssize_t row              # ... from one key; of the codes of values, bytes for each key
    Kind kind


cdef struct Scales:
    # x ~ code * scale: one for each token, in pages as its codes are, or for each head. Strides in floats.
    const float* data
    Py_ssize_t page             # between pages, of tokens
    Py_ssize_t sequence         # between sequences, of heads
    Py_ssize_t head
    bint tokens


cdef struct Codes:
    # What quantised attention has beside the codes of keys and values; of no use where keys are floats
    Py_ssize_t q_stride[2]      # of codes of queries, between heads, rows
    Py_ssize_t q_scale_stride[2]
    const int* k_correction     # -128 times the sum of each key's codes, in pages as its codes are
    Py_ssize_t k_correction_page
    Py_ssize_t k_correction_head
    Scales k_scale
    Scales v_scale              # of codes of values
    const float* k_mean         # subtracted from the keys, (sequences, Hk, D), or NULL
    Py_ssize_t k_mean_stride[2]
    unsigned char* trace        # (B, H, Lq, Lk) or NULL: where to write the codes of P, for tests
    Kind product                # how P V is computed: INT8, BFLOAT16 or FLOAT32


cdef struct Sequence:
    # One sequence of a call: how long it is, and where its arrays begin. Optional arrays are NULL when absent.
    Py_ssize_t number           # of the sequence in the call
    Py_ssize_t Lq
    Py_ssize_t Lk
    Py_ssize_t offset           # query i stands at position i + offset
    const Py_ssize_t* pages     # of its keys and values
    const char* q               # (H, Lq, D)
    char* out                   # (H, Lq, Dv)
    float* lse                  # (H, Lq)
    const signed char* q_codes
    const float* q_scale
    const float* bias           # (H, Lq, Lk)
    const unsigned char* mask   # (H, Lq, Lk); a set byte keeps
    const float* slopes         # (H,)
    Py_ssize_t bias_stride[3]
    Py_ssize_t mask_stride[3]
    Py_ssize_t tasks            # how it is cut, see plan_sequence() in driver.pxi
    Py_ssize_t first_task
    Py_ssize_t units            # heads, or panels of heads, each of which is cut into ...
    Py_ssize_t pieces           # ... blocks of query rows, or chunks of keys
    Py_ssize_t first_piece      # the first chunk of keys that a row sees
    bint short                  # few enough rows to be one block: several heads may share a panel
    float* partial              # (H, Lq, pieces, partial_floats) where there are several chunks, else NULL


cdef struct Problem:
    # What every task of a call reads. Optional arrays are NULL when absent; a stride is 0 where an array is broadcast.
    Sequence* sequences
    Py_ssize_t n                # sequences
    Py_ssize_t page_size
    Pages k                     # Hk heads of keys of D, contiguous, as values, queries and outputs are
    Pages v                     # ... of Dv
    Pages first_k               # in float32, a page of each sequence: keys before `precise` where others are codes
    Pages first_v
    Kind q_kind                 # of queries that are not codes
    Kind out_kind
    bint native                 # both products in bfloat16, in which q, k and v are
    const float* sinks          # (H,) or NULL
    Py_ssize_t q_stride[2]      # bytes between heads, rows
    Py_ssize_t out_stride[2]
    Py_ssize_t lse_stride[2]    # floats
    Py_ssize_t slopes_stride
    Py_ssize_t sinks_stride
    Py_ssize_t H
    Py_ssize_t group            # query heads that share a key/value head
    Py_ssize_t D
    Py_ssize_t Dv
    Py_ssize_t left             # keys from position - left ...
    Py_ssize_t right            # ... to position + right are visible
    float scale                 # softmax scale
    float softcap               # 0 for none
    Py_ssize_t Br               # query rows of a task: a multiple of PANEL
    Py_ssize_t Bc               # keys of a block: a multiple of ROWS
    Py_ssize_t precise          # keys before this one are computed in float32 where the others are codes
    Codes codes


cdef struct Panel:
    # Up to PANEL query rows that see the same keys: `rows` consecutive ones of each of `heads` query heads. Lane
    # g * rows + i holds row i of head g. Their packed queries and their running state.
    Py_ssize_t row              # the first row
    Py_ssize_t rows             # how many, of each head
    Py_ssize_t heads
    Py_ssize_t lanes            # heads * rows
    int vectors                 # see vectors_of()
    bint few                    # computed by few.pxi
    Py_ssize_t first_key        # keys that its first row ...
    Py_ssize_t last_key         # ... to its last row may see: [first_key, last_key]
    float* q                    # [D][PANEL] queries times scale, where keys are in float32; few: [lanes][width]
    int* codes                  # [groups of D][PANEL] queries as codes with ZERO_POINT or bfloat16; few: [lanes][width]
    float* factor               # [PANEL] makes sums of products of codes scores: scale, q's, that of a head of k
    # what subtracting the mean of the keys took from every score of a row, scale * q . mean, is in one of these two
    float* shift                # [PANEL] added to each score, where softcap needs them whole
    float* lift                 # [PANEL] added to the maximum in the end, so that it takes no precision from scores
    float* step                 # [PANEL] row of each lane, after the first
    float* slope                # [PANEL] ALiBi
    float* o                    # [Dv rounded up to LANES][PANEL] running output; few: [lanes][width]
    float* m                    # [PANEL] running maximum, -inf at first
    float* l                    # [PANEL] running denominator


cdef struct Head:
    # One kv head of one sequence, and the first of the query heads that a panel has. Optional arrays are NULL when
    # absent.
    const Sequence* sequence
    Py_ssize_t kv               # the kv head
    Py_ssize_t h                # the first query head
    const char* q
    char* out
    float* lse
    const float* sinks
    const float* bias
    const unsigned char* mask
    const float* slopes
    const signed char* q_codes
    const float* q_scale
    const float* k_scale        # where it is one for the head
    const float* v_scale
    const float* k_mean
    unsigned char* trace


cdef enum:
    FEW_KEYS = 512    # see keys_of_block(); of fp32 in cache, 128 are at 0.92 of the speed of reading, 256 at 0.97
    MOST_PIECES = 34  # a block has at most 512 keys, a page at least 16, and neither need begin with the other


cdef struct Pieces:
    # Keys or values of a block where they are, for panels of few rows: piece i ends before key end[i] of the block, and
    # its rows lie as if the block began at at[i].
    Kind kind
    Py_ssize_t stride           # bytes between keys; of codes of values, bytes for each key
    Py_ssize_t lines            # cache lines of one; 0 where it was just written
    Py_ssize_t begin            # the first key
    Py_ssize_t n
    Py_ssize_t end[MOST_PIECES]
    const char* at[MOST_PIECES]


cdef struct Block:
    # Some keys of a block and their values, as the products read them. All pointers are those of the block's first key.
    Pieces few_k                # for panels of few rows, instead of k, k_words, v and v_words
    Pieces few_v
    Py_ssize_t end              # after its last key
    const char* next_k          # keys of the next block, which few rows ask for ahead of their use
    const float* k
    Py_ssize_t k_stride
    const float* v
    Py_ssize_t v_stride
    const int* k_words          # codes, or bfloat16 pairs: rows of k_pitch words
    Py_ssize_t k_pitch
    const int* k_correction     # see Codes
    const float* k_scale        # of each key, or NULL
    const int* v_words          # codes or bfloat16, in groups of keys: rows of v_pitch words
    Py_ssize_t v_pitch
    const float* v_scale        # of each key, or one


cdef struct Scratch:
    # What a panel needs while it meets a block of keys.
    # ... or a row after another, where rows are few: see few_weights.pxi
    float* s                    # [Bc][PANEL] scores, then weights
    float* hidden               # [Bc][PANEL] what is hidden from them; or
    int* p                      # the weights as codes or bfloat16, in groups of keys: the same memory
    float* top                  # [parts(x)][PANEL] the greatest score of each row, of each part where there are codes
    float* alpha                # [PANEL] e^(m - m')
    float* beta                 # [parts(x)][PANEL] makes a part's sum of products of codes an output
    char* k                     # a block of keys, and ...
    char* v                     # ... of values, where they cannot be used in place
    int* k_correction           # [Bc]
    float* k_scale              # [Bc]
    float* v_scale              # [Bc]


cdef inline Py_ssize_t lane_at(
    const Panel* panel, Py_ssize_t lane, Py_ssize_t head_stride, Py_ssize_t row_stride
) noexcept nogil:
    """Where the query row of a lane lies in an array of heads and rows, from the panel's first head on."""
    if panel.heads == 1:
        return (panel.row + lane) * row_stride
    return lane // panel.rows * head_stride + (panel.row + lane % panel.rows) * row_stride


cdef inline int vectors_of(Py_ssize_t lanes) noexcept nogil:
    """Vectors of a panel that hold so many lanes: as many as products are compiled for, so the last may be empty."""
    return 1 if lanes <= LANES else MIDDLE if lanes <= MIDDLE * LANES else VECTORS


cdef inline Py_ssize_t keys_of_block(const Problem* x, bint few) noexcept nogil:
    """Keys of a block. Few rows do not come back to it, so it need not stay in a cache; what counts is that keys and
    values are read with few pauses."""
    return max(<Py_ssize_t> 1, FEW_KEYS // x.Bc) * x.Bc if few else x.Bc


cdef inline Py_ssize_t round_up(Py_ssize_t n, Py_ssize_t step) noexcept nogil:
    return (n + step - 1) // step * step


include "block.pxi"
include "product.pxi"
include "softmax.pxi"
include "int8.pxi"
include "bf16.pxi"
include "change.pxi"
include "few.pxi"
include "few_weights.pxi"


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
    const Problem* x, const Head* head, const Panel* panel, const Block* keys, Py_ssize_t block, Py_ssize_t begin,
    Py_ssize_t end, Py_ssize_t low, Py_ssize_t high
) noexcept nogil:
    """Asks for what comes after the first product of a block while it goes on, the share [low, high) of [begin, end):
    the values, by the first panel of a head, which finds them in no cache, and with a panel's first block the rows
    of its output and the queries of the next panel. Not so values that are codes: they are a quarter as long."""
    cdef Py_ssize_t first = (low - begin) * panel.rows // (end - begin)
    cdef Py_ssize_t last = (high - begin) * panel.rows // (end - begin)
    if panel.row == 0 and keys.v != NULL:
        prefetch_rows(
            <const char*> (keys.v + begin * keys.v_stride), keys.v_stride * sizeof(float), low - begin, high - begin,
            x.Dv * sizeof(float),
        )
    if block <= panel.first_key:
        prefetch_rows(
            head.out + panel.row * x.out_stride[1], x.out_stride[1], first, last, x.Dv * size_of(x.out_kind),
        )
        if head.q != NULL:
            prefetch_rows(
                head.q + (panel.row + panel.rows) * x.q_stride[1], x.q_stride[1], first, last, x.D * size_of(x.q_kind),
            )


cdef inline bint edges_inside(
    const Problem* x, const Head* head, const Panel* panel, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """Whether causal or the window hides a part of keys begin <= j < end from some row of a panel: the last row's first
    key or the first row's last key lies between them."""
    cdef Py_ssize_t position = panel.row + head.sequence.offset
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


cdef void write_trace(
    const Head* head, const Panel* panel, Py_ssize_t block, Py_ssize_t begin, Py_ssize_t end, const int* p
) noexcept nogil:
    """The codes of P, for tests."""
    cdef Py_ssize_t r, c, Lk = head.sequence.Lk
    cdef unsigned char* row
    for r in range(panel.lanes):
        row = head.trace + lane_at(panel, r, head.sequence.Lq * Lk, Lk) + block
        for c in range(begin, end):
            row[c] = <unsigned char> ((<const code*> (p + c // GROUP * PANEL + r))[c % GROUP] + WEIGHT_OFFSET)


cdef void multiply_keys(
    const Problem* x, const Panel* panel, const Block* keys, float* s, float* top, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """The first product, by what the block holds: scores of keys begin <= c < end, and their greatest."""
    if keys.k_correction != NULL:
        scores_of_codes(s, top, panel, keys, (x.D + GROUP - 1) // GROUP, begin, end)
    elif keys.k_words != NULL:
        scores_of_bf16(s, top, panel, keys, (x.D + BF16_GROUP - 1) // BF16_GROUP, begin, end)
    else:
        scores(s, top, panel.q, keys.k, keys.k_stride, x.D, begin, end, panel.vectors)


cdef void multiply_values(
    const Problem* x, const Head* head, const Panel* panel, const Block* keys, Py_ssize_t block, Py_ssize_t begin,
    Py_ssize_t end, bint precise, const Scratch* scratch, bint hides
) noexcept nogil:
    """Softmax and the second product, by what the block holds. hides: scratch.hidden tells which keys rows do not see,
    whose values may be NaN or inf."""
    cdef Py_ssize_t low = begin // ROWS * ROWS, high = round_up(end, ROWS)
    cdef bint coded = x.k.kind == INT8 and not precise
    cdef Kind product = x.codes.product if coded else BFLOAT16 if x.native else FLOAT32
    cdef float* s = scratch.s
    if product == INT8:
        softmax_codes(
            s, scratch.p, scratch.top, panel.m, panel.l, scratch.alpha, scratch.beta, keys.v_scale,
            x.codes.v_scale.tokens, low, high, panel.vectors,
        )
        accumulate_codes(
            panel.o, scratch.p, keys.v_words, keys.v_pitch, round_up(x.Dv, ROWS), scratch.alpha, scratch.beta,
            low // GROUP, (end + GROUP - 1) // GROUP, panel.vectors,
        )
        if head.trace != NULL:
            write_trace(head, panel, block, begin, end, scratch.p)
        return
    softmax(s, scratch.top, panel.m, panel.l, scratch.alpha, low, high, panel.vectors)
    if product == BFLOAT16:
        accumulate_weights_bf16(x, panel, keys, low, end, scratch, hides)
    elif hides:
        accumulate_visible(
            panel.o, s + begin * PANEL, scratch.hidden + begin * PANEL, keys.v + begin * keys.v_stride, keys.v_stride,
            x.Dv, scratch.alpha, end - begin, panel.vectors,
        )
    else:
        accumulate(
            panel.o, s + begin * PANEL, keys.v + begin * keys.v_stride, keys.v_stride, x.Dv, scratch.alpha,
            end - begin, panel.vectors,
        )


cdef void fold_block(
    const Problem* x, const Head* head, const Panel* panel, const Block* keys, Py_ssize_t block, Py_ssize_t begin,
    Py_ssize_t end, const Scratch* scratch, bint careful
) noexcept nogil:
    """Folds keys [block + begin, block + end) into the running state of a panel, on codes or, before key `precise`, in
    float32. Nothing that no row can see is read, but for the rest of a group of packed keys.

    careful: values that are not finite may be hidden here.
    """
    cdef Py_ssize_t c, i, low, high, step = x.Bc, part = x.Bc
    cdef bint masked = False, changes, changed, edges, prefetched = False
    cdef bint precise = x.k.kind != INT8 or block + begin < x.precise
    cdef int j
    cdef float* s = scratch.s
    cdef float* top
    if begin >= end:
        return
    if head.mask != NULL:
        i = mask_tile(head, panel, block + begin, block + end)
        if i < 0:
            return
        masked = i == 0
    if not precise and x.codes.product == INT8:
        part = PART_KEYS
    changes = masked or x.softcap != 0.0 or head.bias != NULL or head.slopes != NULL
    changed = changes or edges_inside(x, head, panel, block + begin, block + end)
    if panel.few:
        few_fold_block(x, head, panel, keys, block, begin, end, scratch, masked, changed, precise, careful)
        return

    if panel.heads == 1 and (panel.row == 0 or block <= panel.first_key):
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
            prefetch_slice(x, head, panel, keys, block, begin, end, low, high)
        multiply_keys(x, panel, keys, s, top, low, high)
        low = high
    if precise and head.k_mean != NULL:
        lower_scores(s, scratch.top, panel, begin, end)
    if changed:
        low = begin
        while low < end:
            high = min(end, (low // part + 1) * part)
            edges = edges_inside(x, head, panel, block + low, block + high)
            if changes or edges:
                top = scratch.top + low // part * PANEL
                change_scores(s, top, x, head, panel, block, low, high, x.softcap != 0.0, masked, edges)
            low = high
    low, high = begin // ROWS * ROWS, round_up(end, ROWS)
    for c in range(low * PANEL, begin * PANEL):
        s[c] = -INFINITY
    for c in range(end * PANEL, high * PANEL):
        s[c] = -INFINITY
    if careful and changed:
        for c in range(begin * PANEL, end * PANEL):
            scratch.hidden[c] = 0.0
        # the greatest score that it finds is of no use: the parts of scratch.top stay
        change_scores(scratch.hidden, scratch.beta, x, head, panel, block, begin, end, False, masked, True)
    multiply_values(x, head, panel, keys, block, begin, end, precise, scratch, careful and changed)


# ---------------------------------------------------------------------------------------------------------------------
# Into and out of a panel


cdef void begin_panel(const Problem* x, const Head* head, Panel* panel) noexcept nogil:
    """Packs the queries of a panel and clears its state."""
    cdef Py_ssize_t r
    cdef bint coded = x.k.kind == INT8
    for r in range(PANEL):
        panel.m[r] = -INFINITY
        panel.l[r] = 0.0
        panel.lift[r] = 0.0
        panel.step[r] = panel.slope[r] = 0.0
    for r in range(panel.rows):
        panel.step[r] = <float> r
    for r in range(panel.rows, panel.lanes):
        panel.step[r] = panel.step[r - panel.rows]
    if head.slopes != NULL:
        for r in range(panel.lanes):
            panel.slope[r] = head.slopes[r // panel.rows * x.slopes_stride]
    memset(panel.o, 0, round_up(x.Dv, LANES) * (few_pad(panel.lanes) if panel.few else PANEL) * sizeof(float))
    if not coded or panel.first_key < x.precise:
        if x.native and not panel.few:
            pack_bf16(x, head, panel)
        elif panel.few:
            few_pack(x, head, panel)
        else:
            pack_floats(x, head, panel)
    # A row's lift depends on its sequence, not on what others of its panel see
    if coded and (panel.last_key >= x.precise or (head.k_mean != NULL and head.sequence.Lk > x.precise)):
        if panel.few:
            few_pack_codes(x, head, panel)
        else:
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
            if n == LANES and row + LANES <= panel.lanes and panel.heads == 1 and x.q_kind == FLOAT32:
                q = <const float*> (head.q + (panel.row + row) * x.q_stride[1]) + d
                for r in range(LANES):
                    t[r] = vf_mul(scale, vf_load(<const float*> (<const char*> q + r * x.q_stride[1])))
                vf_transpose(t)
                for r in range(LANES):
                    vf_store(panel.q + (d + r) * PANEL + row, t[r])
            else:
                for r in range(LANES):
                    t[r] = vf_set(0.0)
                    if row + r < panel.lanes:
                        t[r] = vf_mul(scale, load_part(
                            head.q + lane_at(panel, row + r, x.q_stride[0], x.q_stride[1]), x.q_kind, d, n,
                        ))
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
    if panel.few:
        return few_is_finite(panel, x.Dv)
    for j in range(panel.vectors):
        bad = vf_set(0.0)
        for d in range(x.Dv):
            o = vf_load(panel.o + d * PANEL + j * LANES)
            bad = vf_add(bad, vf_sub(o, o))
        vf_store(buffer, bad)
        for r in range(min(<Py_ssize_t> LANES, panel.lanes - j * LANES)):
            if buffer[r] != 0.0:
                return False
    return True


cdef inline float finish_row(double m, double lift, double l, const float* sink, float* lse) noexcept nogil:
    """The factor that makes a row's running output its output, 1 / denominator; writes its LSE unless that is NULL.

    A row that saw nothing has l = 0 and an output of 0: its factor is 0 and its LSE the sink, or -inf. The sink is a
    logit in natural units that adds to the denominator only.
    """
    cdef double top = m + lift, lifted = m + lift, weight = 1.0
    cdef bint empty = l == 0.0
    if sink != NULL and sink[0] != -INFINITY:
        top = max(top, <double> sink[0])
        weight = exp(lifted - top)
        l = l * weight + (exp(sink[0] - top) if sink[0] != top else 1.0)  # also where both are inf
    if lse != NULL:
        lse[0] = <float> (top + log(l)) if l != 0.0 else -INFINITY
    return 0.0 if empty else <float> (weight / l)


cdef void end_panel(const Problem* x, const Head* head, const Panel* panel) noexcept nogil:
    """Divides by the denominator and writes the caller's layout."""
    cdef Py_ssize_t r, g
    cdef float* lse = NULL
    for r in range(panel.lanes):
        g = r // panel.rows
        if head.lse != NULL:
            lse = head.lse + lane_at(panel, r, x.lse_stride[0], x.lse_stride[1])
        panel.l[r] = finish_row(
            panel.m[r], panel.lift[r], panel.l[r], head.sinks + g * x.sinks_stride if head.sinks != NULL else NULL, lse,
        )
    write_rows(panel, x.Dv, head.out, x.out_stride[0], x.out_stride[1], x.out_kind)


cdef void write_rows(
    const Panel* panel, Py_ssize_t Dv, char* out, Py_ssize_t head_stride, Py_ssize_t row_stride, Kind kind
) noexcept nogil:
    """The running output of every row, times panel.l, as rows of Dv. Strides in bytes."""
    cdef Py_ssize_t d, r, row, n, rows
    cdef int j
    cdef char* place
    cdef vf t[LANES]
    cdef vf factor
    if panel.few:
        few_write_rows(panel, Dv, out, head_stride, row_stride, kind)
        return
    for j in range(panel.vectors):
        row = j * LANES
        rows = min(<Py_ssize_t> LANES, panel.lanes - row)
        factor = vf_load(panel.l + row)
        d = 0
        while d < Dv:
            n = min(<Py_ssize_t> LANES, Dv - d)
            for r in range(LANES):
                t[r] = vf_mul(factor, vf_load(panel.o + (d + r) * PANEL + row))
            vf_transpose(t)
            if n == LANES and rows == LANES and panel.heads == 1 and kind == FLOAT32:
                place = out + (panel.row + row) * row_stride + d * <Py_ssize_t> sizeof(float)
                for r in range(LANES):
                    vf_store(<float*> (place + r * row_stride), t[r])
            else:
                for r in range(rows):
                    store_part(out + lane_at(panel, row + r, head_stride, row_stride), kind, d, n, t[r])
            d += LANES
