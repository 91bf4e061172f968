# Keys and values of a block in the form that the products read: in place where they lie so, else a copy of the block in
# the thread's scratch, made once for all panels of a task.
#
#                 FLOAT32           FLOAT16, BFLOAT16        INT8 (see pack.pxi)
#     keys        rows of floats    rows of floats;          rows of codes, 4 in a word (2 of 16 bits where the build
#                                   in bfloat16 products     multiplies no bytes), their corrections and scales
#                                   pairs along D
#     values      the same          ... groups of keys       groups of keys; floats where P V is in float32
#
# A block is in place when it has this form and lies in one page. Panels of few rows read floats of every kind and codes
# where they are, page by page.

cdef inline vf load_part(const char* row, Kind kind, Py_ssize_t d, Py_ssize_t n) noexcept nogil:
    """Floats d <= i < d + n of a row, n <= LANES; 0 in the other lanes. Nothing beyond them is read."""
    row = beyond(row, d, kind)
    return load_floats(row, kind) if n == LANES else load_floats_part(row, n, kind)


cdef inline void store_part(char* row, Kind kind, Py_ssize_t d, Py_ssize_t n, vf x) noexcept nogil:
    """Writes elements d <= i < d + n of a row, n <= LANES."""
    if kind == FLOAT32:
        vf_store_part(<float*> row + d, x, n)
    elif kind == FLOAT16:
        vf_store_half_part(<unsigned short*> row + d, x, n)
    else:
        vf_store_bf16_part(<unsigned short*> row + d, x, n)


cdef Py_ssize_t UNPAGED = <Py_ssize_t> 1 << 60  # the page size where each sequence is one page


cdef struct Rows:
    # Where keys or values of one head of one sequence lie
    const Pages* pages
    const Py_ssize_t* table
    Py_ssize_t size             # keys of a page
    Py_ssize_t head             # bytes from a page's first byte


cdef inline Rows rows_of(const Problem* x, const Head* head, const Pages* pages, bint precise) noexcept nogil:
    """Rows of `pages`; precise: these are the keys that are in float32 though others are codes, one page of them."""
    cdef Rows rows
    rows.pages = pages
    rows.table = &head.sequence.number if precise else head.sequence.pages
    rows.size = UNPAGED if precise else x.page_size
    rows.head = head.kv * pages.head
    return rows


cdef inline const char* row_at(const Rows* rows, Py_ssize_t key) noexcept nogil:
    return (
        rows.pages.data + rows.table[key // rows.size] * rows.pages.page + rows.head
        + key % rows.size * rows.pages.row
    )


cdef inline bint in_one_page(const Rows* rows, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    return begin // rows.size == (end - 1) // rows.size


cdef void copy_floats(
    float* to, Py_ssize_t stride, const Rows* rows, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t D
) noexcept nogil:
    """Rows begin <= j < end as floats, `stride` apart, which is D rounded up to LANES; the rest of each is 0."""
    cdef Py_ssize_t j, d
    cdef const char* row
    for j in range(begin, end):
        row = row_at(rows, j)
        d = 0
        while d < D:
            vf_store(to + d, load_part(row, rows.pages.kind, d, min(<Py_ssize_t> LANES, D - d)))
            d += LANES
        to += stride


cdef void copy_words(
    int* to, const Rows* rows, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t step, Py_ssize_t bytes
) noexcept nogil:
    """Every step-th row of begin <= j < end, `bytes` long, one after another."""
    cdef Py_ssize_t i
    for i in range((end - begin + step - 1) // step):
        memcpy(to, row_at(rows, begin + i * step), bytes)
        to += bytes // 4


cdef void widen_codes(
    code* to, Py_ssize_t pitch, const Rows* rows, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t D
) noexcept nogil:
    """Rows of D codes as codes of 16 bits, `pitch` apart; what a last pair lacks is 0."""
    cdef Py_ssize_t j, d
    cdef const signed char* row
    for j in range(begin, end):
        row = <const signed char*> row_at(rows, j)
        to[pitch - 1] = 0
        for d in range(D):
            to[d] = row[d]
        to += pitch


cdef void widen_groups(int* to, Py_ssize_t columns, const Rows* rows, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Groups of four codes of keys begin <= j < end, multiples of 4, as pairs of codes of 16 bits."""
    cdef Py_ssize_t j, d
    cdef const signed char* row
    cdef code* low
    cdef code* high
    for j in range(begin, end, 4):
        row = <const signed char*> row_at(rows, j)
        low, high = <code*> to, <code*> (to + columns)
        for d in range(columns):
            low[2 * d], low[2 * d + 1] = row[4 * d], row[4 * d + 1]
            high[2 * d], high[2 * d + 1] = row[4 * d + 2], row[4 * d + 3]
        to += 2 * columns


cdef inline vf load_value(const Rows* rows, Py_ssize_t key, Py_ssize_t d, Py_ssize_t n) noexcept nogil:
    """Values of one key as floats, codes without their scale."""
    if rows.pages.kind == INT8:
        return vf_byte(vi_load_part(<const int*> row_at(rows, key // 4 * 4) + d, n), <int> (key % 4))
    return load_part(row_at(rows, key), rows.pages.kind, d, n)


cdef inline vf within_bf16(vf x) noexcept nogil:
    """What is finite stays finite when it is rounded to bfloat16."""
    cdef vf largest = vf_set(BF16_MAX)
    return vf_max(vf_min(x, largest), vf_sub(vf_set(0.0), largest))


cdef void group_values(
    int* to, Py_ssize_t pitch, const Rows* rows, Py_ssize_t low, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t Dv
) noexcept nogil:
    """Values as bfloat16, in groups of BF16_GROUP keys from `low` on, a multiple of it; codes without their scale. 0
    outside [begin, end)."""
    cdef Py_ssize_t d, n, j = low
    cdef int i
    cdef bint rounds = rows.pages.kind == FLOAT32
    cdef vf x[BF16_GROUP]
    while j < end:
        d = 0
        while d < Dv:
            n = min(<Py_ssize_t> LANES, Dv - d)
            for i in range(BF16_GROUP):
                x[i] = load_value(rows, j + i, d, n) if begin <= j + i < end else vf_set(0.0)
                if rounds:
                    x[i] = within_bf16(x[i])
            vi_store_bf16(to + d, x)
            d += LANES
        to += pitch
        j += BF16_GROUP


cdef void float_values(
    float* to, Py_ssize_t stride, const Rows* rows, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t Dv,
    const float* scale, bint tokens, bint rounds
) noexcept nogil:
    """Values as rows of floats: codes times the scale of each token or of the head, unless that is NULL; floats rounded
    to bfloat16, where `rounds`. What is finite stays finite."""
    cdef Py_ssize_t j, d
    cdef vf x, factor = vf_set(1.0), largest = vf_set(FLT_MAX)
    cdef unsigned short halves[LANES]
    for j in range(begin, end):
        if scale != NULL:
            factor = vf_set(scale[j - begin] if tokens else scale[0])
        d = 0
        while d < Dv:
            x = load_value(rows, j, d, min(<Py_ssize_t> LANES, Dv - d))
            if rounds:
                vf_store_bf16(halves, within_bf16(x))
                x = vf_load_bf16(halves)
            else:
                x = vf_max(vf_min(vf_mul(x, factor), largest), vf_sub(vf_set(0.0), largest))
            vf_store(to + d, x)
            d += LANES
        to += stride


cdef const void* of_keys(
    const void* data, Py_ssize_t page, Py_ssize_t head, const Rows* rows, Py_ssize_t begin, Py_ssize_t end, int* room
) noexcept nogil:
    """The 32-bit numbers of keys begin <= j < end of a head, one for each key, in pages as their codes are; a copy in
    `room` where these are several. page, head: strides in numbers."""
    cdef Py_ssize_t n, j = begin
    cdef const int* numbers = <const int*> data + head
    if in_one_page(rows, begin, end):
        return numbers + rows.table[begin // rows.size] * page + begin % rows.size
    while j < end:
        n = min(end - j, rows.size - j % rows.size)
        memcpy(room + (j - begin), numbers + rows.table[j // rows.size] * page + j % rows.size, n * sizeof(int))
        j += n
    return room


cdef inline void ask_numbers(
    const void* data, Py_ssize_t page, Py_ssize_t head, const Rows* rows, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """Asks for what of_keys() gives. These are short pieces, one for each page: each would be waited for when it
    begins."""
    cdef Py_ssize_t i, n
    cdef const int* numbers
    while begin < end:
        n = min(end - begin, rows.size - begin % rows.size)
        numbers = <const int*> data + head + rows.table[begin // rows.size] * page + begin % rows.size
        for i in range((n * <Py_ssize_t> sizeof(int) + CACHE_LINE - 1) // CACHE_LINE):
            prefetch(<const char*> numbers + i * CACHE_LINE)
        begin += n


cdef void cut_pieces(
    Pieces* pieces, const Rows* rows, Py_ssize_t first, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t numbers
) noexcept nogil:
    """Where keys [first + begin, first + end) of a block that starts at key `first` lie, rows of so many numbers."""
    cdef Py_ssize_t low = begin, high
    pieces.kind, pieces.stride, pieces.n, pieces.begin = rows.pages.kind, rows.pages.row, 0, begin
    pieces.lines = (numbers * size_of(rows.pages.kind) + CACHE_LINE - 1) // CACHE_LINE
    while low < end:
        high = min(end - low, rows.size - (first + low) % rows.size) + low
        pieces.end[pieces.n] = high
        pieces.at[pieces.n] = row_at(rows, first + low) - low * pieces.stride
        pieces.n += 1
        low = high


cdef void one_piece(
    Pieces* pieces, const float* rows, Py_ssize_t stride, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """The same of a copy in the thread's scratch, whose first row is key `begin`."""
    pieces.kind, pieces.stride, pieces.n, pieces.begin = FLOAT32, stride * <Py_ssize_t> sizeof(float), 1, begin
    pieces.lines = 0
    pieces.end[0], pieces.at[0] = end, <const char*> (rows - begin * stride)


cdef void load_keys(
    const Problem* x, const Head* head, Py_ssize_t first, Py_ssize_t begin, Py_ssize_t end, bint precise, bint few,
    const Scratch* scratch, Block* block
) noexcept nogil:
    """Keys [first + begin, first + end); codes from whole groups of ROWS keys."""
    cdef Rows rows = rows_of(x, head, &x.first_k if precise else &x.k, precise)
    cdef const Codes* codes = &x.codes
    cdef Py_ssize_t low = first + begin, high = first + end, words = round_up(x.D, 4) // 4, Bc = keys_of_block(x, few)
    cdef bint whole
    block.k = NULL
    block.k_words = block.k_correction = NULL
    block.end = end
    if rows.pages.kind == INT8:
        low, high = first + begin // ROWS * ROWS, first + round_up(end, ROWS)
        block.k_correction = <const int*> of_keys(
            codes.k_correction, codes.k_correction_page, head.kv * codes.k_correction_head, &rows, low, high,
            scratch.k_correction,
        ) - (low - first)
        block.k_scale = NULL
        if codes.k_scale.tokens:
            block.k_scale = <const float*> of_keys(
                codes.k_scale.data, codes.k_scale.page, head.kv * codes.k_scale.head, &rows, low, high,
                <int*> scratch.k_scale,
            ) - (low - first)
    if few:
        if rows.pages.kind == INT8:
            high = min(head.sequence.Lk, first + 2 * Bc)
            ask_numbers(
                codes.k_correction, codes.k_correction_page, head.kv * codes.k_correction_head, &rows, first + Bc,
                high,
            )
            if codes.k_scale.tokens:
                ask_numbers(
                    codes.k_scale.data, codes.k_scale.page, head.kv * codes.k_scale.head, &rows, first + Bc, high,
                )
        cut_pieces(&block.few_k, &rows, first, begin, end, x.D)
        high = first + Bc
        block.next_k = row_at(&rows, high if high < head.sequence.Lk and not precise else first)
        return
    whole = in_one_page(&rows, low, high)
    if rows.pages.kind == INT8:
        if GROUP == 2:
            block.k_pitch = (x.D + 1) // 2
            widen_codes(<code*> scratch.k, 2 * block.k_pitch, &rows, low, high, x.D)
            block.k_words = <const int*> scratch.k
        elif whole:
            block.k_pitch = rows.pages.row // 4
            block.k_words = <const int*> row_at(&rows, low)
        else:
            block.k_pitch = words
            copy_words(<int*> scratch.k, &rows, low, high, 1, 4 * words)
            block.k_words = <const int*> scratch.k
        block.k_words -= (low - first) * block.k_pitch
    elif x.native:
        if whole and rows.pages.row % 4 == 0 and x.D % 2 == 0:
            block.k_pitch = rows.pages.row // 4
            block.k_words = <const int*> row_at(&rows, low)
        else:
            block.k_pitch = (x.D + 1) // 2
            copy_halves(<unsigned short*> scratch.k, 2 * block.k_pitch, &rows, low, high, x.D)
            block.k_words = <const int*> scratch.k
        block.k_words -= begin * block.k_pitch
    elif rows.pages.kind == FLOAT32 and whole:
        block.k_stride = rows.pages.row // <Py_ssize_t> sizeof(float)
        block.k = <const float*> row_at(&rows, low) - begin * block.k_stride
    else:
        block.k_stride = round_up(x.D, LANES)
        copy_floats(<float*> scratch.k, block.k_stride, &rows, low, high, x.D)
        block.k = <const float*> scratch.k - begin * block.k_stride


cdef void copy_halves(
    unsigned short* to, Py_ssize_t stride, const Rows* rows, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t D
) noexcept nogil:
    """Rows of D numbers of 16 bits, `stride` apart; what a last pair lacks is 0."""
    cdef Py_ssize_t j
    for j in range(begin, end):
        to[stride - 1] = 0
        memcpy(to, row_at(rows, j), 2 * D)
        to += stride


cdef void load_values(
    const Problem* x, const Head* head, Py_ssize_t first, Py_ssize_t begin, Py_ssize_t end, bint precise, bint few,
    const Scratch* scratch, Block* block
) noexcept nogil:
    """Values of keys [first + begin, first + end), in the form that the second product of a panel wants."""
    cdef Rows rows = rows_of(x, head, &x.first_v if precise else &x.v, precise)
    cdef const Scales* scale = &x.codes.v_scale
    cdef bint coded = x.k.kind == INT8 and not precise
    cdef Kind product = x.codes.product if coded else BFLOAT16 if x.native else FLOAT32
    cdef Py_ssize_t low = first + begin, high = first + end, whole_groups = first + begin // ROWS * ROWS
    cdef Py_ssize_t width = round_up(x.Dv, LANES), Bc = keys_of_block(x, few)
    block.v = NULL
    block.v_words = NULL
    block.v_scale = NULL
    if rows.pages.kind == INT8:
        low, high = whole_groups, first + round_up(end, ROWS)
        block.v_scale = head.v_scale
        if scale.tokens:
            block.v_scale = <const float*> of_keys(
                scale.data, scale.page, head.kv * scale.head, &rows, low, high, <int*> scratch.v_scale,
            )
            if few:
                ask_numbers(
                    scale.data, scale.page, head.kv * scale.head, &rows, first + Bc,
                    min(head.sequence.Lk, first + 2 * Bc),
                )
    if few and (product == INT8 or (rows.pages.kind != INT8 and (product == FLOAT32 or x.native))):
        cut_pieces(&block.few_v, &rows, first, low - first, high - first, x.Dv)
    elif product == INT8:
        block.v_pitch = rows.pages.row
        if GROUP == 2:
            block.v_words = <const int*> scratch.v
            widen_groups(<int*> scratch.v, block.v_pitch, &rows, low, high)
            block.v_words -= (low - first) // 2 * block.v_pitch
        elif in_one_page(&rows, low, high):
            block.v_words = <const int*> row_at(&rows, low) - (low - first) // 4 * block.v_pitch
        else:
            copy_words(<int*> scratch.v, &rows, low, high, 4, 4 * block.v_pitch)
            block.v_words = <const int*> scratch.v - (low - first) // 4 * block.v_pitch
    elif product == BFLOAT16 and not few:
        block.v_pitch = width
        group_values(<int*> scratch.v, width, &rows, whole_groups, first + begin, first + end, x.Dv)
        block.v_words = <const int*> scratch.v - (whole_groups - first) // BF16_GROUP * width
    elif rows.pages.kind == INT8:
        float_values(
            <float*> scratch.v, width, &rows, low, first + end, x.Dv,
            block.v_scale if product == FLOAT32 else NULL, scale.tokens, False,
        )
        block.v_stride, block.v = width, <const float*> scratch.v - (low - first) * width
        one_piece(&block.few_v, <const float*> scratch.v, width, low - first, end)
    elif product == BFLOAT16:
        float_values(<float*> scratch.v, width, &rows, low, high, x.Dv, NULL, False, True)
        one_piece(&block.few_v, <const float*> scratch.v, width, begin, end)
    elif rows.pages.kind == FLOAT32 and in_one_page(&rows, low, high):
        block.v_stride = rows.pages.row // <Py_ssize_t> sizeof(float)
        block.v = <const float*> row_at(&rows, low) - begin * block.v_stride
    else:
        copy_floats(<float*> scratch.v, width, &rows, low, high, x.Dv)
        block.v_stride, block.v = width, <const float*> scratch.v - begin * width
    if block.v_scale != NULL and scale.tokens:
        block.v_scale -= begin // ROWS * ROWS


cdef inline bint blocks_in_pages(const Problem* x) noexcept nogil:
    return x.page_size == UNPAGED or x.page_size % x.Bc == 0


cdef Py_ssize_t keys_room(const Problem* x) noexcept nogil:
    """Floats of scratch that load_keys() may need for a block."""
    if blocks_in_pages(x) and (x.k.kind == FLOAT32 or (x.k.kind == INT8 and GROUP == 4)):
        return 0
    return x.Bc * round_up(x.D, 16)


cdef Py_ssize_t values_room(const Problem* x) noexcept nogil:
    """Floats of scratch that load_values() may need for a block."""
    cdef Kind product = x.codes.product if x.k.kind == INT8 else FLOAT32
    if blocks_in_pages(x) and x.v.kind == FLOAT32 and product == FLOAT32:
        return 0
    if blocks_in_pages(x) and GROUP == 4 and product == INT8:
        return 0
    return keys_of_block(x, x.k.kind == INT8 and product != INT8) * round_up(x.Dv, 16)
