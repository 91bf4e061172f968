# Panels with few rows, where a tile with rows in lanes would be mostly idle: products read keys and values LANES
# numbers of a row at a time, and what comes between them has keys in lanes (few_weights.pxi).
#
#     S     [row][pitch]  LANES partial sums for each of LANES pairs (row, key), put together: few_scores()
#     O     [row][Dv]     a weight broadcast for each key: few_accumulate()
#
# A decode step is bound by memory: at 20 GB/s a thread a key of 128 floats and its value take 200 cycles, their codes
# 50. How much of that speed is reached is decided by how many lines are under way, and so by how far the CPU sees
# ahead: in the some 400 instructions that it holds, so that each one less for a key counts, and in its prefetchers,
# which go so many strides of a load ahead, so that loops are unrolled to strides of 1 to 2 KB. One row of floats or
# codes needs no more. Several rows compute more for each key, and 16-bit floats need a conversion: they ask for keys
# ahead. Up to FEW rows share a read. What a row's bits depend on is the same whatever the number of rows.

cdef enum:
    FEW = LANES // 2    # rows of a panel at most: from there on lanes full of rows are faster
    FEW_COLUMNS = 8     # vectors of a key or a value that one row keeps in registers
    FEW_WORDS = 32 // LANES  # vectors of the codes of a key with D = 128, the most of those that are read in one go
    AHEAD = 16          # keys between the ones in use and the ones asked for
    FEW_SUMS = 8 * (1 + LANES // 16)  # vectors of sums of several rows: half of the 16, or of AVX-512 32, registers


cdef inline Py_ssize_t few_pad(Py_ssize_t lanes) noexcept nogil:
    """Rows that are computed: 1, 2 or a multiple of 4."""
    return lanes if lanes < 3 else round_up(lanes, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Queries


cdef void few_pack(const Problem* x, const Head* head, Panel* panel) noexcept nogil:
    """The queries of a panel, times scale, as rows of D rounded up to LANES, with 0 beyond."""
    cdef Py_ssize_t r, d, width = round_up(x.D, LANES)
    cdef const char* q
    cdef vf scale = vf_set(x.scale)
    memset(panel.q, 0, few_pad(panel.lanes) * width * sizeof(float))
    for r in range(panel.lanes):
        q = head.q + lane_at(panel, r, x.q_stride[0], x.q_stride[1])
        d = 0
        while d < x.D:
            vf_store(
                panel.q + r * width + d,
                vf_mul(scale, load_part(q, x.q_kind, d, min(<Py_ssize_t> LANES, x.D - d))),
            )
            d += LANES


cdef void few_pack_codes(const Problem* x, const Head* head, Panel* panel) noexcept nogil:
    """The codes of the queries plus 128, as rows of words of four, and the factors of pack_codes(). What there is
    beyond D meets codes of 0."""
    cdef Py_ssize_t r, d, width = round_up(round_up(x.D, 4) // 4, LANES)
    cdef const signed char* q
    cdef unsigned char* row
    cdef double factor
    cdef float sum
    memset(panel.codes, 0, few_pad(panel.lanes) * width * sizeof(int))
    for r in range(LANES):
        panel.factor[r] = panel.shift[r] = 0.0
    for r in range(panel.lanes):
        factor = x.scale * head.q_scale[lane_at(panel, r, x.codes.q_scale_stride[0], x.codes.q_scale_stride[1])]
        panel.factor[r] = <float> (factor if x.codes.k_scale.tokens else factor * head.k_scale[0])
        q = head.q_codes + lane_at(panel, r, x.codes.q_stride[0], x.codes.q_stride[1])
        row = <unsigned char*> (panel.codes + r * width)
        sum = 0.0
        for d in range(x.D):
            row[d] = <unsigned char> (q[d] + 128)
        if head.k_mean != NULL:
            for d in range(x.D):
                sum += <float> q[d] * head.k_mean[d]
            sum *= <float> factor
        if x.softcap != 0.0:
            panel.shift[r] = sum
        else:
            panel.lift[r] = sum


# ---------------------------------------------------------------------------------------------------------------------
# The first product


cdef inline void few_spread(
    float* s, Py_ssize_t pitch, vf sums, Py_ssize_t c, Py_ssize_t end, const int rows
) noexcept nogil:
    """Puts the sums of `rows` rows and LANES // rows keys, from key c on, where scores are kept."""
    cdef float buffer[LANES]
    cdef int r
    cdef Py_ssize_t n = min(<Py_ssize_t> (LANES // rows), end - c)
    if rows == 1:
        vf_store(s + c, sums)
        return
    vf_store(buffer, sums)
    for r in range(rows):
        if n == LANES // rows:
            memcpy(s + r * pitch + c, buffer + r * (LANES // rows), LANES // rows * sizeof(float))
        else:
            memcpy(s + r * pitch + c, buffer + r * (LANES // rows), n * sizeof(float))


cdef inline void ask_rows(const char* first, Py_ssize_t stride, Py_ssize_t n, Py_ssize_t lines) noexcept nogil:
    """Asks for n rows of so many cache lines."""
    cdef Py_ssize_t i, j
    for i in range(n):
        for j in range(lines):
            prefetch(first + j * CACHE_LINE)
        first += stride


cdef inline void few_group(
    const char** at, const char* k, Py_ssize_t stride, Py_ssize_t c, Py_ssize_t end, const int n
) noexcept nogil:
    """Where n keys from c on are; the last of them stands for what comes after it."""
    cdef int i
    k += c * stride
    for i in range(n):
        at[i] = k
        if c + i + 1 < end:
            k += stride


cdef inline void few_add_products(
    vf* acc, const float* q, Py_ssize_t width, const char** at, Py_ssize_t d, Py_ssize_t D, const int rows,
    const int columns, const Kind kind
) noexcept nogil:
    """acc[r * keys + i] += products of row r and key i, `columns` vectors from d on, or what D leaves of one: rows in
    registers, a key read in order."""
    cdef int i, r, j
    cdef const char* key
    cdef vf y
    cdef vf x[2 * FEW_COLUMNS]
    cdef vf sum[4]
    for r in range(rows):
        for j in range(columns):
            x[r * columns + j] = vf_load(q + r * width + d + j * LANES)
    for i in range(LANES // rows):
        key = beyond(at[i], d, kind)
        for r in range(rows):
            sum[r] = acc[r * (LANES // rows) + i]
        for j in range(columns):
            if columns > 1 or d + LANES <= D:
                y = load_floats(beyond(key, j * LANES, kind), kind)
            else:
                y = load_floats_part(key, D - d, kind)
            for r in range(rows):
                sum[r] = vf_fma(x[r * columns + j], y, sum[r])
        for r in range(rows):
            acc[r * (LANES // rows) + i] = sum[r]


cdef inline void few_products(
    vf* acc, const float* q, const char* key, Py_ssize_t stride, const int columns, const Kind kind
) noexcept nogil:
    """acc[i] = the product of one row and key i, where both are `columns` whole vectors."""
    cdef int i, j
    cdef vf x[FEW_COLUMNS]
    cdef vf sum
    for j in range(columns):
        x[j] = vf_load(q + j * LANES)
    for i in range(LANES):
        sum = vf_mul(x[0], load_floats(key, kind))
        for j in range(1, columns):
            sum = vf_fma(x[j], load_floats(beyond(key, j * LANES, kind), kind), sum)
        acc[i] = sum
        key += stride


cdef inline void few_scores_of_rows(
    float* s, Py_ssize_t pitch, const float* q, Py_ssize_t width, const Block* keys, Py_ssize_t piece, Py_ssize_t D,
    Py_ssize_t begin, Py_ssize_t end, Py_ssize_t lanes, const int rows, const int columns, const Kind kind
) noexcept nogil:
    """few_scores() of one piece: `columns` vectors at a time, half as many, then one. k: key 0 of the
    block, were it in this piece."""
    cdef Py_ssize_t row, d, c = begin, stride = keys.few_k.stride
    cdef int i
    cdef const char* k = keys.few_k.at[piece]
    cdef const char* at[LANES]
    cdef vf acc[LANES]
    if rows == 1 and (D == columns * LANES or D == columns // 2 * LANES):
        while c + LANES <= end:
            if kind != FLOAT32:
                ask_rows(k + (c + AHEAD) * stride, stride, LANES, keys.few_k.lines)
            if D == columns * LANES:
                few_products(acc, q, k + c * stride, stride, columns, kind)
            else:
                few_products(acc, q, k + c * stride, stride, columns // 2, kind)
            vf_store(s + c, vf_sums(acc))
            c += LANES
    while c < end:
        if rows > 1 or kind != FLOAT32:
            ask_rows(k + (c + AHEAD) * stride, stride, LANES // rows, keys.few_k.lines)
        few_group(at, k, stride, c, end, LANES // rows)
        row = 0
        while row < lanes:
            for i in range(LANES):
                acc[i] = vf_set(0.0)
            d = 0
            while d + columns * LANES <= D:
                few_add_products(acc, q + row * width, width, at, d, D, rows, columns, kind)
                d += columns * LANES
            if d + columns // 2 * LANES <= D:
                few_add_products(acc, q + row * width, width, at, d, D, rows, columns // 2, kind)
                d += columns // 2 * LANES
            while d < D:
                few_add_products(acc, q + row * width, width, at, d, D, rows, 1, kind)
                d += LANES
            few_spread(s + row * pitch, pitch, vf_sums(acc), c, end, rows)
            row += rows
        c += LANES // rows


cdef inline void few_scores_of_kind(
    float* s, Py_ssize_t pitch, const Panel* panel, const Block* keys, Py_ssize_t D, Py_ssize_t begin,
    Py_ssize_t end, const Kind kind
) noexcept nogil:
    cdef Py_ssize_t i, high, low = begin, width = round_up(D, LANES), lanes = panel.lanes
    for i in range(keys.few_k.n):
        high = min(end, keys.few_k.end[i])
        if low < high:
            if lanes == 1:
                few_scores_of_rows(s, pitch, panel.q, width, keys, i, D, low, high, lanes, 1, FEW_COLUMNS, kind)
            elif lanes == 2:
                few_scores_of_rows(s, pitch, panel.q, width, keys, i, D, low, high, lanes, 2, FEW_COLUMNS // 2, kind)
            else:
                few_scores_of_rows(s, pitch, panel.q, width, keys, i, D, low, high, lanes, 4, FEW_COLUMNS // 2, kind)
            low = high


cdef void few_scores(
    float* s, Py_ssize_t pitch, const Panel* panel, const Block* keys, Py_ssize_t D, Py_ssize_t begin,
    Py_ssize_t end
) noexcept nogil:
    """scores() of few rows: S[r][c] = q[r] . k[c] for begin <= c < end.

    Each sum of D products is made of LANES sums of every LANES-th one.
    """
    if keys.few_k.kind == FLOAT16:
        few_scores_of_kind(s, pitch, panel, keys, D, begin, end, FLOAT16)
    elif keys.few_k.kind == BFLOAT16:
        few_scores_of_kind(s, pitch, panel, keys, D, begin, end, BFLOAT16)
    else:
        few_scores_of_kind(s, pitch, panel, keys, D, begin, end, FLOAT32)


cdef inline void few_add_codes(
    vi* acc, const int* q, Py_ssize_t width, const char** at, Py_ssize_t d, Py_ssize_t words, const int rows,
    const int columns
) noexcept nogil:
    """few_add_products() of words of codes."""
    cdef int i, r, j
    cdef const int* key
    cdef vi y
    cdef vi x[2 * FEW_COLUMNS]
    cdef vi sum[4]
    for r in range(rows):
        for j in range(columns):
            x[r * columns + j] = vi_load(q + r * width + d + j * LANES)
    for i in range(LANES // rows):
        key = <const int*> at[i] + d
        for r in range(rows):
            sum[r] = acc[r * (LANES // rows) + i]
        for j in range(columns):
            if columns > 1 or d + LANES <= words:
                y = vi_load(key + j * LANES)
            else:
                y = vi_load_part(key, words - d)
            for r in range(rows):
                sum[r] = vi_dot_bytes(sum[r], x[r * columns + j], y)
        for r in range(rows):
            acc[r * (LANES // rows) + i] = sum[r]


cdef inline void few_products_of_codes(
    vi* acc, const int* q, const char* key, Py_ssize_t stride, const int columns
) noexcept nogil:
    """few_products() of one row of words of codes."""
    cdef int i, j
    cdef vi x[FEW_WORDS]
    cdef vi sum
    for j in range(columns):
        x[j] = vi_load(q + j * LANES)
    for i in range(LANES):
        sum = vi_set(0)
        for j in range(columns):
            sum = vi_dot_bytes(sum, x[j], vi_load(<const int*> key + j * LANES))
        acc[i] = sum
        key += stride


cdef inline void few_sums_of_codes(
    float* s, Py_ssize_t pitch, const int* q, Py_ssize_t width, const Block* keys, Py_ssize_t piece, Py_ssize_t words,
    Py_ssize_t begin, Py_ssize_t end, Py_ssize_t lanes, const int rows
) noexcept nogil:
    """The sums of products of codes as integers, where scores are kept."""
    cdef Py_ssize_t row, d, c = begin, stride = keys.few_k.stride
    cdef int i
    cdef const char* k = keys.few_k.at[piece]
    cdef const char* at[LANES]
    cdef vi acc[LANES]
    if rows == 1 and (words == FEW_WORDS * LANES or words == FEW_WORDS // 2 * LANES):
        while c + LANES <= end:
            if words == FEW_WORDS // 2 * LANES:
                few_products_of_codes(acc, q, k + c * stride, stride, FEW_WORDS // 2)
            else:
                few_products_of_codes(acc, q, k + c * stride, stride, FEW_WORDS)
            vf_store(s + c, vf_bits(vi_sums(acc)))
            c += LANES
    while c < end:
        if rows > 1:  # and for the values, which begin in the same pages
            ask_rows(k + (c + AHEAD) * stride, stride, LANES // rows, keys.few_k.lines)
            ask_rows(
                keys.few_v.at[min(piece, keys.few_v.n - 1)] + c * keys.few_v.stride, keys.few_v.stride, LANES // rows,
                keys.few_v.lines,
            )
        few_group(at, k, stride, c, end, LANES // rows)
        row = 0
        while row < lanes:
            for i in range(LANES):
                acc[i] = vi_set(0)
            d = 0
            while d + 2 * LANES <= words:
                few_add_codes(acc, q + row * width, width, at, d, words, rows, 2)
                d += 2 * LANES
            while d < words:
                few_add_codes(acc, q + row * width, width, at, d, words, rows, 1)
                d += LANES
            few_spread(s + row * pitch, pitch, vf_bits(vi_sums(acc)), c, end, rows)
            row += rows
        c += LANES // rows


cdef inline void few_scale_sums(
    float* s, vf factor, vf shift, const int* correction, const float* scale, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """Scores of one row from sums of products of codes, in place."""
    cdef Py_ssize_t n, c = begin
    cdef vf x, y
    while c + LANES <= end:
        y = vf_from_int(vi_add(vi_bits(vf_load(s + c)), vi_load(correction + c)))
        x = vf_mul(factor, vf_load(scale + c)) if scale != NULL else factor
        vf_store(s + c, vf_fma(y, x, shift))
        c += LANES
    if c < end:
        n = end - c
        y = vf_from_int(vi_add(vi_bits(vf_load_part(s + c, n)), vi_load_part(correction + c, n)))
        x = vf_mul(factor, vf_load_part(scale + c, n)) if scale != NULL else factor
        vf_store_part(s + c, vf_fma(y, x, shift), n)


cdef void few_scores_of_codes(
    float* s, Py_ssize_t pitch, const Panel* panel, const Block* keys, Py_ssize_t D, Py_ssize_t begin,
    Py_ssize_t end
) noexcept nogil:
    """scores_of_codes() of few rows: the same scores to the bit."""
    cdef Py_ssize_t i, r, high, low = begin, words = round_up(D, 4) // 4, width = round_up(words, LANES)
    cdef Py_ssize_t lanes = panel.lanes
    for i in range(keys.few_k.n):
        high = min(end, keys.few_k.end[i])
        if low < high:
            if lanes == 1:
                few_sums_of_codes(s, pitch, panel.codes, width, keys, i, words, low, high, lanes, 1)
            elif lanes == 2:
                few_sums_of_codes(s, pitch, panel.codes, width, keys, i, words, low, high, lanes, 2)
            else:
                few_sums_of_codes(s, pitch, panel.codes, width, keys, i, words, low, high, lanes, 4)
            low = high
    for r in range(few_pad(panel.lanes)):
        few_scale_sums(
            s + r * pitch, vf_set(panel.factor[r]), vf_set(panel.shift[r]), keys.k_correction, keys.k_scale, begin, end,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The second product


cdef inline float few_factor(const Problem* x, const Block* keys, bint coded) noexcept nogil:
    """What stands for the one scale of a head's values, where they are codes in bfloat16 arithmetic; else 1."""
    if coded and x.codes.product == BFLOAT16 and keys.v_scale != NULL and not x.codes.v_scale.tokens:
        return keys.v_scale[0]
    return 1.0


cdef inline void few_add_values(
    vf* acc, const float* p, const float* hidden, Py_ssize_t pitch, const char* row, Py_ssize_t stride, Py_ssize_t n,
    const int keys, const int rows, const int columns, const bint hides, const Kind kind
) noexcept nogil:
    """acc[r * columns + i] += the sum of p[r][c] value[c] over `keys` keys."""
    cdef int c, i, r
    cdef vf y[FEW_COLUMNS]
    cdef vf w
    for c in range(keys):
        for i in range(columns):
            if i < columns - 1 or n >= columns * LANES:
                y[i] = load_floats(beyond(row, i * LANES, kind), kind)
            else:
                y[i] = load_floats_part(beyond(row, i * LANES, kind), n - i * LANES, kind)
        for r in range(rows):
            if hides and hidden[r * pitch + c] == -INFINITY:
                continue
            w = vf_set(p[r * pitch + c])
            for i in range(columns):
                acc[r * columns + i] = vf_fma(w, y[i], acc[r * columns + i])
        row += stride


cdef inline void few_accumulate_tile(
    float* o, Py_ssize_t width, const float* p, const float* hidden, Py_ssize_t pitch, const Block* keys, Py_ssize_t d,
    Py_ssize_t begin, Py_ssize_t end, const float* alpha, float beta, Py_ssize_t n, const int rows,
    const int columns, const bint hides, const Kind kind
) noexcept nogil:
    """`columns` vectors of a value from d on for `rows` rows; n: the floats of a value in them, of which the last is
    part of one where that is not whole."""
    cdef Py_ssize_t c = begin, piece, high
    cdef int i, r
    cdef const char* row
    cdef vf acc[2 * FEW_COLUMNS]
    cdef float* place
    cdef const Pieces* v = &keys.few_v
    cdef Py_ssize_t stride = v.stride
    for i in range(rows * columns):
        acc[i] = vf_set(0.0)
    for piece in range(v.n):
        row = beyond(v.at[piece] + c * stride, d, kind)
        high = min(end, v.end[piece])
        while c + 4 <= high and n >= columns * LANES:
            if d == 0 and (rows > 1 or kind != FLOAT32):
                ask_rows(row + AHEAD * stride, stride, 4, v.lines)
            few_add_values(acc, p + c, hidden + c, pitch, row, stride, columns * LANES, 4, rows, columns, hides, kind)
            row += 4 * stride
            c += 4
        while c < high:
            few_add_values(acc, p + c, hidden + c, pitch, row, stride, n, 1, rows, columns, hides, kind)
            row += stride
            c += 1
    for r in range(rows):
        for i in range(columns):
            place = o + r * width + i * LANES
            vf_store(place, vf_fma(
                acc[r * columns + i], vf_set(beta), vf_mul(vf_load(place), vf_set(alpha[r])),
            ))


cdef inline void few_accumulate_rows(
    const Panel* panel, const Scratch* scratch, Py_ssize_t pitch, Py_ssize_t row, const Block* keys, Py_ssize_t Dv,
    Py_ssize_t begin, Py_ssize_t end, float beta, const int rows, const int columns, const bint hides, const Kind kind
) noexcept nogil:
    """few_accumulate() of some rows: `columns` vectors at a time, then one at a time."""
    cdef Py_ssize_t d = 0, width = round_up(Dv, LANES)
    cdef float* o = panel.o + row * width
    cdef const float* p = scratch.s + row * pitch
    cdef const float* hidden = scratch.hidden + row * pitch
    cdef const float* alpha = scratch.alpha + row
    while d + (columns - 1) * LANES < Dv:
        few_accumulate_tile(
            o + d, width, p, hidden, pitch, keys, d, begin, end, alpha, beta, Dv - d, rows, columns, hides, kind,
        )
        d += columns * LANES
    while d < Dv:
        few_accumulate_tile(
            o + d, width, p, hidden, pitch, keys, d, begin, end, alpha, beta, Dv - d, rows, 1, hides, kind,
        )
        d += LANES


cdef inline void few_accumulate_kind(
    const Panel* panel, const Scratch* scratch, Py_ssize_t pitch, const Block* keys, Py_ssize_t Dv, Py_ssize_t begin,
    Py_ssize_t end, float beta, bint hides, const Kind kind
) noexcept nogil:
    cdef Py_ssize_t row = 0
    if hides:
        for row in range(panel.lanes):
            few_accumulate_rows(panel, scratch, pitch, row, keys, Dv, begin, end, beta, 1, 1, True, kind)
    elif panel.lanes == 1:
        few_accumulate_rows(panel, scratch, pitch, 0, keys, Dv, begin, end, beta, 1, FEW_COLUMNS, False, kind)
    elif panel.lanes == 2:
        few_accumulate_rows(panel, scratch, pitch, 0, keys, Dv, begin, end, beta, 2, FEW_SUMS // 2, False, kind)
    else:
        while row < panel.lanes:
            few_accumulate_rows(panel, scratch, pitch, row, keys, Dv, begin, end, beta, 4, FEW_SUMS // 4, False, kind)
            row += 4


cdef void few_accumulate(
    const Panel* panel, const Scratch* scratch, Py_ssize_t pitch, const Block* keys, Py_ssize_t Dv, Py_ssize_t begin,
    Py_ssize_t end, float beta, bint hides
) noexcept nogil:
    """accumulate() of few rows: O[r] = alpha[r] O[r] + beta sum over begin <= c < end of P[r][c] V[c], that from zero.

    hides: only keys that scratch.hidden shows to a row count, whatever their values.
    """
    if keys.few_v.kind == FLOAT16:
        few_accumulate_kind(panel, scratch, pitch, keys, Dv, begin, end, beta, hides, FLOAT16)
    elif keys.few_v.kind == BFLOAT16:
        few_accumulate_kind(panel, scratch, pitch, keys, Dv, begin, end, beta, hides, BFLOAT16)
    else:
        few_accumulate_kind(panel, scratch, pitch, keys, Dv, begin, end, beta, hides, FLOAT32)


cdef inline int four_bytes(const unsigned char* p) noexcept nogil:
    cdef int word
    memcpy(&word, p, sizeof(word))
    return word


cdef inline void few_add_codes_of_values(
    vi* acc, const unsigned char* p, Py_ssize_t pitch, const int* group, Py_ssize_t stride, const int groups,
    const int rows, const int columns
) noexcept nogil:
    """acc[r * columns + i] += the sum of p[r][c] value[c] over groups of four keys."""
    cdef int t, i, r
    cdef vi y[FEW_COLUMNS]
    cdef vi w
    for t in range(groups):
        for i in range(columns):
            y[i] = vi_load(group + i * LANES)
        for r in range(rows):
            w = vi_set(four_bytes(p + r * pitch + 4 * t))
            for i in range(columns):
                acc[r * columns + i] = vi_dot_bytes(acc[r * columns + i], w, y[i])
        group += stride


cdef inline void few_accumulate_codes_tile(
    float* o, Py_ssize_t width, const unsigned char* p, Py_ssize_t pitch, const Block* keys, Py_ssize_t d,
    Py_ssize_t begin, Py_ssize_t end, const float* alpha, const float* beta, const int rows, const int columns
) noexcept nogil:
    """few_accumulate_codes() of `rows` rows and `columns` vectors of columns from d on, for groups begin <= t < end."""
    cdef Py_ssize_t t = begin, high, part, piece = 0
    cdef int i, r
    cdef const int* group
    cdef float* place
    cdef vi acc[FEW_SUMS]
    cdef const Pieces* v = &keys.few_v
    cdef Py_ssize_t stride = v.stride  # words between groups
    for r in range(rows):
        for i in range(columns):
            place = o + r * width + i * LANES
            vf_store(place, vf_mul(vf_load(place), vf_set(alpha[r])))
    while t < end:
        part = t * 4 // PART_KEYS
        for i in range(rows * columns):
            acc[i] = vi_set(0)
        while t < min(end, (part + 1) * (PART_KEYS // 4)):
            while t * 4 >= v.end[piece]:
                piece += 1
            high = min(end, (part + 1) * (PART_KEYS // 4), (v.end[piece] + 3) // 4)
            group = <const int*> (v.at[piece] + 4 * t * stride) + d
            while t + 4 <= high:
                if d == 0 and rows > 1:
                    ask_rows(keys.next_k + 4 * t * keys.few_k.stride, keys.few_k.stride, 16, keys.few_k.lines)
                few_add_codes_of_values(acc, p + 4 * t, pitch, group, stride, 4, rows, columns)
                group += 4 * stride
                t += 4
            while t < high:
                few_add_codes_of_values(acc, p + 4 * t, pitch, group, stride, 1, rows, columns)
                group += stride
                t += 1
        for r in range(rows):
            for i in range(columns):
                place = o + r * width + i * LANES
                vf_store(place, vf_fma(
                    vf_set(beta[part * PANEL + r]), vf_from_int(acc[r * columns + i]), vf_load(place),
                ))


cdef inline void few_accumulate_codes_rows(
    const Panel* panel, const Scratch* scratch, Py_ssize_t pitch, Py_ssize_t row, const Block* keys, Py_ssize_t Dv,
    Py_ssize_t begin, Py_ssize_t end, const int rows, const int columns
) noexcept nogil:
    cdef Py_ssize_t d = 0, width = round_up(Dv, LANES)
    cdef float* o = panel.o + row * width
    cdef const unsigned char* p = <const unsigned char*> scratch.p + row * pitch
    cdef const float* alpha = scratch.alpha + row
    cdef const float* beta = scratch.beta + row
    while d + columns * LANES <= width:
        few_accumulate_codes_tile(o + d, width, p, pitch, keys, d, begin, end, alpha, beta, rows, columns)
        d += columns * LANES
    while d < width:
        few_accumulate_codes_tile(o + d, width, p, pitch, keys, d, begin, end, alpha, beta, rows, 1)
        d += LANES


cdef void few_accumulate_codes(
    const Panel* panel, const Scratch* scratch, Py_ssize_t pitch, const Block* keys, Py_ssize_t Dv, Py_ssize_t begin,
    Py_ssize_t end
) noexcept nogil:
    """accumulate_codes() of few rows, from groups of four keys. A key without a weight counts nothing, whatever its
    codes."""
    cdef Py_ssize_t row = 0, first = begin // 4, last = (end + 3) // 4
    if panel.lanes == 1:
        few_accumulate_codes_rows(panel, scratch, pitch, 0, keys, Dv, first, last, 1, FEW_COLUMNS)
    elif panel.lanes == 2:
        few_accumulate_codes_rows(panel, scratch, pitch, 0, keys, Dv, first, last, 2, FEW_SUMS // 2)
    else:
        while row < panel.lanes:
            few_accumulate_codes_rows(panel, scratch, pitch, row, keys, Dv, first, last, 4, FEW_SUMS // 4)
            row += 4


# ---------------------------------------------------------------------------------------------------------------------
# A panel against a block of keys


cdef void few_trace(
    const Head* head, const Panel* panel, Py_ssize_t pitch, Py_ssize_t block, Py_ssize_t begin, Py_ssize_t end,
    const unsigned char* p
) noexcept nogil:
    """write_trace() of few rows."""
    cdef Py_ssize_t r, Lk = head.sequence.Lk
    for r in range(panel.lanes):
        memcpy(
            head.trace + lane_at(panel, r, head.sequence.Lq * Lk, Lk) + block + begin, p + r * pitch + begin,
            end - begin,
        )


cdef void few_fold_block(
    const Problem* x, const Head* head, const Panel* panel, const Block* keys, Py_ssize_t block, Py_ssize_t begin,
    Py_ssize_t end, const Scratch* scratch, bint masked, bint changed, bint precise, bint careful
) noexcept nogil:
    """fold_block() of few rows. masked: the mask hides a part of this block. changed: something changes scores."""
    cdef Py_ssize_t r, c, pitch = few_pitch(x)
    cdef bint coded = x.k.kind == INT8 and not precise, edges = edges_inside(x, head, panel, block + begin, block + end)
    cdef bint hides = careful and changed
    cdef float* s = scratch.s
    if coded:
        few_scores_of_codes(s, pitch, panel, keys, x.D, begin, end)
    else:
        few_scores(s, pitch, panel, keys, x.D, begin, end)
        if head.k_mean != NULL:  # beside scores of codes, which lack q . mean until the end
            for r in range(panel.lanes):
                for c in range(begin, end):
                    s[r * pitch + c] -= panel.lift[r]
    if changed:
        few_change(s, x, head, panel, block, begin, end, x.softcap != 0.0, masked, edges)
    for r in range(few_pad(panel.lanes)):
        surround(s + r * pitch, begin, end)
    if coded and x.codes.product == INT8:
        few_softmax_codes(x, panel, scratch, keys.v_scale, begin, end)
        few_accumulate_codes(panel, scratch, pitch, keys, x.Dv, begin, end)
        if head.trace != NULL:
            few_trace(head, panel, pitch, block, begin, end, <const unsigned char*> scratch.p)
        return
    few_softmax(x, panel, scratch, begin, end)
    if coded and x.codes.product == BFLOAT16:
        few_round_weights(x, panel, s, keys.v_scale, begin, end)
    if hides:
        memset(scratch.hidden, 0, panel.lanes * pitch * sizeof(float))
        few_change(scratch.hidden, x, head, panel, block, begin, end, False, masked, True)
    few_accumulate(panel, scratch, pitch, keys, x.Dv, begin, end, few_factor(x, keys, coded), hides)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


cdef bint few_is_finite(const Panel* panel, Py_ssize_t Dv) noexcept nogil:
    cdef Py_ssize_t r, d, width = round_up(Dv, LANES)
    cdef float o
    for r in range(panel.lanes):
        for d in range(Dv):
            o = panel.o[r * width + d]
            if o - o != 0.0:
                return False
    return True


cdef void few_write_rows(
    const Panel* panel, Py_ssize_t Dv, char* out, Py_ssize_t head_stride, Py_ssize_t row_stride, Kind kind
) noexcept nogil:
    """write_rows() of few rows."""
    cdef Py_ssize_t r, d, width = round_up(Dv, LANES)
    cdef char* place
    for r in range(panel.lanes):
        place = out + lane_at(panel, r, head_stride, row_stride)
        d = 0
        while d < Dv:
            store_part(
                place, kind, d, min(<Py_ssize_t> LANES, Dv - d),
                vf_mul(vf_load(panel.o + r * width + d), vf_set(panel.l[r])),
            )
            d += LANES
