# From floats to int8 codes, x ~ code * scale + mean: one reading pass for means and greatest sizes, one writing pass.
#
#     find_range()    mean of each channel, and the greatest |x - mean|, of each head of each sequence
#     encode()        codes; scales per token are found on the way, while their rows are in the first-level cache; codes
#                     of keys and values are packed (pack.pxi) there as well
#
#     scale = max(min(greatest |x - mean|, FLT_MAX) / 127, FLT_MIN)        never 0, inf or NaN
#     code  = clip(rint((x - mean) * (1 / scale)), -127, 127)              rounded half to even
#
# A value saturates where that rint is beyond +-127, which only a given scale can do: encode() counts them when asked.
#
# All of it in float32, each operation rounded once: the same codes on every build. Values of 16 bits become float32 as
# they are loaded (floats.pxi), so theirs are the codes of the float32 array. Where nothing is subtracted the mean is 0,
# which changes no bit. The first `skip` rows of a head are used in float32 by the kernels: they count for the mean, but
# not for a scale, and their codes are 0.
#
# Work is cut into runs of RUN rows of one head, whatever the threads, and sums of runs are merged in order: bits depend
# on the head's own rows only. NaN and inf are noticed, not handled: the caller raises.

cdef extern from "simd.h" nogil:
    # clips to -127 .. 127, rounds half to even, stores int8; n: the first n lanes only
    void vf_store_codes(signed char*, vf) noexcept
    void vf_store_codes_part(signed char*, vf, Py_ssize_t n) noexcept

cdef enum:
    RUN = 256     # rows of a task; a multiple of LANES
    COLUMNS = 4   # vectors of channels that are in registers together
    # Rows that are asked for before they are read: where heads lie beside each other, each row is a short piece of a
    # long one, and no hardware prefetcher foresees the next.
    ROWS_AHEAD = 16

# A run is summed in units that keep the sum of RUN of the largest floats finite, with a bit to spare for rounding.
cdef float SUM_UNIT = 1.0 / (2 * RUN)


cdef inline vf load_column(
    const char* p, const int j, const int vectors, Py_ssize_t n, const Kind kind
) noexcept nogil:
    """Vector j of `vectors` that hold n values: only the last can be part of one, with 0 in its other lanes."""
    if j < vectors - 1 or n >= vectors * LANES:
        return load_floats(beyond(p, j * LANES, kind), kind)
    return load_floats_part(beyond(p, j * LANES, kind), n - j * LANES, kind)


cdef inline void store_column(float* p, vf x, const int j, const int vectors, Py_ssize_t n) noexcept nogil:
    if j < vectors - 1 or n >= vectors * LANES:
        vf_store(p + j * LANES, x)
    else:
        vf_store_part(p + j * LANES, x, n - j * LANES)


# ---------------------------------------------------------------------------------------------------------------------
# Reading: the range of each channel


cdef inline void range_of_columns(
    const char* x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t n, float* low, float* high, float* total,
    const int vectors, const Kind kind
) noexcept nogil:
    """range_of_run for n channels, or as many of them as `vectors` hold."""
    cdef vf l[COLUMNS]
    cdef vf h[COLUMNS]
    cdef vf t[COLUMNS]
    cdef vf a, unit = vf_set(SUM_UNIT)
    cdef Py_ssize_t i
    cdef int j
    for j in range(vectors):
        l[j], h[j], t[j] = vf_set(INFINITY), vf_set(-INFINITY), vf_set(0.0)
    for i in range(rows):
        prefetch_rows(x, stride, i + ROWS_AHEAD, min(rows, i + ROWS_AHEAD + 1), vectors * LANES * size_of(kind))
        for j in range(vectors):
            a = load_column(x + i * stride, j, vectors, n, kind)
            l[j] = vf_min(a, l[j])
            h[j] = vf_max(a, h[j])
            t[j] = vf_add(t[j], vf_mul(a, unit))
    for j in range(vectors):
        store_column(low, l[j], j, vectors, n)
        store_column(high, h[j], j, vectors, n)
        store_column(total, t[j], j, vectors, n)


cdef inline void range_of_elements(
    const char* x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t D, float* low, float* high, float* total,
    const Kind kind
) noexcept nogil:
    """range_of_run for one type of values."""
    cdef Py_ssize_t d = 0
    cdef const char* p
    while d < D:
        p = beyond(x, d, kind)
        if D - d > 3 * LANES:
            range_of_columns(p, stride, rows, D - d, low + d, high + d, total + d, 4, kind)
        elif D - d > 2 * LANES:
            range_of_columns(p, stride, rows, D - d, low + d, high + d, total + d, 3, kind)
        elif D - d > LANES:
            range_of_columns(p, stride, rows, D - d, low + d, high + d, total + d, 2, kind)
        else:
            range_of_columns(p, stride, rows, D - d, low + d, high + d, total + d, 1, kind)
        d += COLUMNS * LANES


cdef void range_of_run(
    const char* x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t D, Kind kind, float* low, float* high,
    float* total
) noexcept nogil:
    """Least and greatest value and sum * SUM_UNIT of each channel of some rows.

    x: rows x D, `stride` bytes between rows. low, high, total: D floats each. NaN is left out of low and high; NaN and
    inf make their channel's total NaN or infinite, and nothing else does. No rows: inf, -inf and 0.
    """
    if kind == FLOAT16:
        range_of_elements(x, stride, rows, D, low, high, total, FLOAT16)
    elif kind == BFLOAT16:
        range_of_elements(x, stride, rows, D, low, high, total, BFLOAT16)
    else:
        range_of_elements(x, stride, rows, D, low, high, total, FLOAT32)


cdef bint merge_runs(
    const float* runs, Py_ssize_t n, Py_ssize_t skipped, Py_ssize_t L, Py_ssize_t D, float* mean, bint smooth,
    float* top
) noexcept nogil:
    """What n runs of one head of L rows say together; returns whether all of its values are finite.

    runs: n x 3 x D, what range_of_run gave; the first `skipped` of them count only for the mean. mean: D floats,
    written if `smooth`, else read; NULL for 0. top: the greatest |x - mean|, 0 without rows.
    """
    cdef Py_ssize_t d, r
    cdef float low, high, least, greatest, everylow, everyhigh, centre
    cdef double total
    cdef const float* run
    cdef bint finite = True
    top[0] = 0.0
    for d in range(D):
        total = 0.0
        least = everylow = INFINITY
        greatest = everyhigh = -INFINITY
        for r in range(n):
            run = runs + r * 3 * D + d
            low, high = run[0], run[D]
            total += run[2 * D]
            everylow, everyhigh = min(everylow, low), max(everyhigh, high)
            if r >= skipped:
                least, greatest = min(least, low), max(greatest, high)
        finite &= total - total == 0.0
        if smooth:
            # rounding must not carry the mean out of the channel's range, nor that of the largest floats to infinity
            mean[d] = <float> min(max(total / (<double> SUM_UNIT * L), <double> everylow), <double> everyhigh)
        centre = mean[d] if mean != NULL else 0.0
        if n > skipped:
            top[0] = max(top[0], max(greatest - centre, centre - least))
    return finite


def find_range(
    x not None, Py_ssize_t skip, bint smooth, float[:, :, :] mean,
    float[:, :] top not None, int threads,
):
    """Writes top[b, h], the greatest |x - mean| of rows from `skip` on; returns whether every value of x is finite.

    x: (B, H, L, D) float32, float16 or bfloat16, no axis empty, the last one contiguous. mean: (B, H, D), the last axis
    contiguous: written if `smooth` (the mean of all rows), else read; None for 0. top is infinite where a difference
    is. Nothing written is of use where it returns False. May raise MemoryError before anything is written.
    """
    cdef Py_ssize_t H = x.shape[1], L = x.shape[2], D = x.shape[3], heads = x.shape[0] * H
    cdef Py_ssize_t skipped = (skip + RUN - 1) // RUN
    cdef Py_ssize_t n = skipped + (L - skip + RUN - 1) // RUN
    cdef Py_ssize_t task, head, run, begin, end
    cdef Floats source = floats_of(x)
    cdef bint centre = mean is not None
    cdef Py_ssize_t size = heads * n * 3 * D * <Py_ssize_t> sizeof(float), wrong = 0
    cdef float* runs = <float*> malloc(size)
    cdef float* part
    cdef uint64_t environment
    if runs == NULL:
        raise MemoryError(f"cannot allocate {size} bytes for the ranges of {heads} heads")
    threads = <int> min(<Py_ssize_t> threads, heads * n)
    try:
        for task in prange(heads * n, nogil=True, schedule="dynamic", chunksize=1, num_threads=threads):
            head, run = task // n, task % n
            begin = run * RUN if run < skipped else skip + (run - skipped) * RUN
            end = min(begin + RUN, skip if run < skipped else L)
            part = runs + task * 3 * D
            environment = enter_environment()
            range_of_run(
                at(&source, head // H, head % H, begin), source.stride[2], end - begin, D, source.kind,
                part, part + D, part + 2 * D,
            )
            leave_environment(environment)
        for head in prange(heads, nogil=True, schedule="static", num_threads=threads):
            environment = enter_environment()
            wrong += not merge_runs(
                runs + head * n * 3 * D, n, skipped, L, D,
                &mean[head // H, head % H, 0] if centre else NULL, smooth,
                &top[head // H, head % H],
            )
            leave_environment(environment)
    finally:
        free(runs)
    return wrong == 0


# ---------------------------------------------------------------------------------------------------------------------
# Writing: codes


cdef inline void load_mean(vf* m, const float* mean, Py_ssize_t d, Py_ssize_t D, const int vectors) noexcept nogil:
    """The mean of channels from d on; 0 where `mean` is NULL."""
    cdef int j
    for j in range(vectors):
        m[j] = load_column(<const char*> (mean + d), j, vectors, D - d, FLOAT32) if mean != NULL else vf_set(0.0)


cdef inline void largest_of_columns(
    vf* top, const char* x, Py_ssize_t stride, Py_ssize_t rows, const float* mean, Py_ssize_t d, Py_ssize_t D,
    const int vectors, const Kind kind
) noexcept nogil:
    """largest_of_rows for the channels from d on, as many of them as `vectors` hold."""
    cdef vf m[COLUMNS]
    cdef vf a, highest
    cdef Py_ssize_t i
    cdef int j
    load_mean(m, mean, d, D, vectors)
    for i in range(rows):
        highest = top[i]
        for j in range(vectors):
            a = load_column(beyond(x + i * stride, d, kind), j, vectors, D - d, kind)
            highest = vf_max(vf_abs(vf_sub(a, m[j])), highest)
        top[i] = highest


cdef inline void largest_of_rows(
    vf* top, const char* x, Py_ssize_t stride, Py_ssize_t rows, const float* mean, Py_ssize_t D, const Kind kind
) noexcept nogil:
    """top[i], 0 before: per lane, the greatest |x - mean| of row i. NaN is left out."""
    cdef Py_ssize_t d = 0
    while d + (COLUMNS - 1) * LANES < D:
        largest_of_columns(top, x, stride, rows, mean, d, D, COLUMNS, kind)
        d += COLUMNS * LANES
    while d < D:
        largest_of_columns(top, x, stride, rows, mean, d, D, 1, kind)
        d += LANES


cdef inline vf scales_of(vf* top) noexcept nogil:
    """The scales of LANES rows, one in each lane, from what largest_of_rows says of them."""
    cdef int i
    vf_transpose(top)
    for i in range(1, LANES):
        top[0] = vf_max(top[0], top[i])
    return vf_max(vf_div(vf_min(top[0], vf_set(FLT_MAX)), vf_set(127.0)), vf_set(FLT_MIN))


cdef inline vf encode_columns(
    const char* x, Py_ssize_t x_stride, Py_ssize_t rows, const float* mean, const float* inverse, Py_ssize_t d,
    Py_ssize_t D, signed char* codes, Py_ssize_t codes_stride, vf* saturated, const int vectors, const Kind kind
) noexcept nogil:
    """encode_rows for the channels from d on, as many of them as `vectors` hold."""
    cdef vf m[COLUMNS]
    cdef vf a[COLUMNS]
    cdef vf factor, wrong, any_wrong = vf_set(0.0), limit = vf_set(127.5)  # is rounded to 128
    cdef signed char* row
    cdef Py_ssize_t i
    cdef int j
    load_mean(m, mean, d, D, vectors)
    for i in range(rows):
        wrong = vf_set(0.0)
        factor = vf_set(inverse[i])
        for j in range(vectors):
            a[j] = load_column(beyond(x + i * x_stride, d, kind), j, vectors, D - d, kind)
            wrong = vf_fma(a[j], vf_set(0.0), wrong)
            a[j] = vf_mul(vf_sub(a[j], m[j]), factor)
            if saturated != NULL:
                saturated[0] = vf_add(saturated[0], vf_less(vf_abs(a[j]), limit, vf_set(0.0), vf_set(1.0)))
        row = codes + i * codes_stride + d
        for j in range(vectors):
            if j < vectors - 1 or D - d >= vectors * LANES:
                vf_store_codes(row + j * LANES, a[j])
            else:
                vf_store_codes_part(row + j * LANES, a[j], D - d - j * LANES)
        any_wrong = vf_add(any_wrong, wrong)
    return any_wrong


cdef inline vf encode_rows(
    const char* x, Py_ssize_t x_stride, Py_ssize_t rows, const float* mean, const float* inverse, Py_ssize_t D,
    signed char* codes, Py_ssize_t codes_stride, vf* saturated, const Kind kind
) noexcept nogil:
    """Codes of some rows, `inverse` being 1 / scale of each; returns 0, or NaN in a lane that met NaN or inf.

    saturated: to its lanes are added how many values saturate; the constant NULL where that is not asked.
    """
    cdef Py_ssize_t d = 0
    cdef vf wrong = vf_set(0.0)
    while d + (COLUMNS - 1) * LANES < D:
        wrong = vf_add(wrong, encode_columns(
            x, x_stride, rows, mean, inverse, d, D, codes, codes_stride, saturated, COLUMNS, kind,
        ))
        d += COLUMNS * LANES
    while d < D:
        wrong = vf_add(wrong, encode_columns(
            x, x_stride, rows, mean, inverse, d, D, codes, codes_stride, saturated, 1, kind,
        ))
        d += LANES
    return wrong


cdef inline Py_ssize_t encode_elements(
    const char* x, Py_ssize_t x_stride, const float* mean, const float* given, Py_ssize_t given_stride,
    float* found, Py_ssize_t found_stride, Py_ssize_t skip, Py_ssize_t rows, Py_ssize_t D,
    signed char* codes, Py_ssize_t codes_stride, bint counted, const Kind kind
) noexcept nogil:
    """encode_run for one type of values, LANES rows at a time."""
    cdef vf top[LANES]
    cdef vf scale, wrong = vf_set(0.0), over = vf_set(0.0)
    cdef float scales[LANES]
    cdef float inverse[LANES]
    cdef float lanes[LANES]
    cdef Py_ssize_t first = 0, i, n, skipped, plain, saturated = 0
    cdef int j
    while first < rows:
        n = min(rows - first, <Py_ssize_t> LANES)
        prefetch_rows(x, x_stride, first + n, min(rows, first + n + LANES), D * size_of(kind))
        skipped = min(max(skip - first, <Py_ssize_t> 0), n)
        if given != NULL:
            for i in range(n):
                inverse[i] = <float> 1.0 / given[(first + i) * given_stride]
        else:
            for i in range(LANES):
                top[i] = vf_set(0.0)
            largest_of_rows(
                top + skipped, x + (first + skipped) * x_stride, x_stride, n - skipped, mean, D, kind,
            )
            scale = scales_of(top)
            vf_store(scales, scale)
            vf_store(inverse, vf_div(vf_set(1.0), scale))
            for i in range(n):
                found[(first + i) * found_stride] = scales[i]
        plain = skipped if counted else n
        wrong = vf_add(wrong, encode_rows(
            x + first * x_stride, x_stride, plain, mean, inverse, D, codes + first * codes_stride, codes_stride, NULL,
            kind,
        ))
        if counted:
            wrong = vf_add(wrong, encode_rows(
                x + (first + plain) * x_stride, x_stride, n - plain, mean, inverse + plain, D,
                codes + (first + plain) * codes_stride, codes_stride, &over, kind,
            ))
        for i in range(skipped):
            memset(codes + (first + i) * codes_stride, 0, D)
        first += LANES
    vf_store(lanes, over)
    for j in range(LANES):
        saturated += <Py_ssize_t> lanes[j]
    vf_store(lanes, wrong)
    for j in range(1, LANES):
        lanes[0] += lanes[j]
    return saturated if lanes[0] == 0.0 else -1


cdef Py_ssize_t encode_run(
    const char* x, Py_ssize_t x_stride, Kind kind, const float* mean, const float* given, Py_ssize_t given_stride,
    float* found, Py_ssize_t found_stride, Py_ssize_t skip, Py_ssize_t rows, Py_ssize_t D,
    signed char* codes, Py_ssize_t codes_stride, bint counted
) noexcept nogil:
    """Codes of some rows of one head; returns how many of their values saturate.

    x, codes: rows x D, x_stride in bytes. mean: D floats, or NULL for 0. The scales are `given`, or NULL and then
    written to `found`. Rows before `skip` get codes 0 and, in `found`, the least scale, and are not counted. -1 where a
    value is not finite, whatever its row; 0 unless `counted`, which wants `given`. Exact for D <= 2^24 / RUN.
    """
    if kind == FLOAT16:
        return encode_elements(
            x, x_stride, mean, given, given_stride, found, found_stride, skip, rows, D, codes, codes_stride, counted,
            FLOAT16,
        )
    if kind == BFLOAT16:
        return encode_elements(
            x, x_stride, mean, given, given_stride, found, found_stride, skip, rows, D, codes, codes_stride, counted,
            BFLOAT16,
        )
    return encode_elements(
        x, x_stride, mean, given, given_stride, found, found_stride, skip, rows, D, codes, codes_stride, counted,
        FLOAT32,
    )


cdef enum Packing:
    ROWS_OF_CODES, AS_KEYS, AS_VALUES

PACKINGS = {None: ROWS_OF_CODES, "keys": AS_KEYS, "values": AS_VALUES}


cdef struct Encoding:
    # One array to encode (Encoding of quantized.py): strides along B, H and L, in elements but for `source`'s.
    Floats source
    Py_ssize_t H, L, D, skip, runs, tasks, first_task
    const float* mean
    Py_ssize_t mean_stride[2]
    const float* given
    Py_ssize_t given_stride[3]
    float* found
    Py_ssize_t found_stride[3]
    signed char* codes
    Py_ssize_t codes_stride[3]
    int* correction
    Py_ssize_t correction_stride[2]
    Packing packing
    bint counted


cdef int describe_encoding(Encoding* e, how) except -1:
    """Where the arrays lie, which the caller holds."""
    cdef const float[:, :, :] mean = how.mean
    cdef const float[:, :, :] given = how.given
    cdef float[:, :, :] found = how.found
    cdef int[:, :, :] correction = how.correction
    cdef signed char[:, :, :, :] codes = how.codes.view(np.int8)
    cdef int i
    e.source = floats_of(how.x)
    e.H, e.L, e.D = how.x.shape[1], how.x.shape[2], how.x.shape[3]
    e.skip, e.packing, e.counted = how.skip, PACKINGS[how.packing], how.counted
    e.runs = (e.L + RUN - 1) // RUN
    e.tasks = how.x.shape[0] * e.H * e.runs
    e.codes = &codes[0, 0, 0, 0]
    for i in range(3):
        e.codes_stride[i] = codes.strides[i]
        if given is not None:
            e.given_stride[i] = given.strides[i] // <Py_ssize_t> sizeof(float)
        if found is not None:
            e.found_stride[i] = found.strides[i] // <Py_ssize_t> sizeof(float)
    for i in range(2):
        if mean is not None:
            e.mean_stride[i] = mean.strides[i] // <Py_ssize_t> sizeof(float)
        if correction is not None:
            e.correction_stride[i] = correction.strides[i] // <Py_ssize_t> sizeof(int)
    if mean is not None:
        e.mean = &mean[0, 0, 0]
    if given is not None:
        e.given = &given[0, 0, 0]
    if found is not None:
        e.found = &found[0, 0, 0]
    if correction is not None:
        e.correction = &correction[0, 0, 0]
    return 0


cdef Py_ssize_t encode_task(const Encoding* e, Py_ssize_t task, signed char* room) noexcept nogil:
    """Run number `task`, as encode_run() says it; `room`, RUN x D, is for codes that are packed otherwise than in rows.
    """
    cdef uint64_t environment = enter_environment()
    cdef Py_ssize_t b = task // e.runs // e.H, h = task // e.runs % e.H, begin = task % e.runs * RUN
    cdef Py_ssize_t n = min(e.L - begin, <Py_ssize_t> RUN), stride = e.codes_stride[2], count
    cdef signed char* place = e.codes + b * e.codes_stride[0] + h * e.codes_stride[1]
    cdef signed char* codes = place + begin * stride
    if e.packing == AS_VALUES:
        codes, stride = room, e.D
    count = encode_run(
        at(&e.source, b, h, begin), e.source.stride[2], e.source.kind,
        e.mean + b * e.mean_stride[0] + h * e.mean_stride[1] if e.mean != NULL else NULL,
        e.given + b * e.given_stride[0] + h * e.given_stride[1] + begin * e.given_stride[2]
        if e.given != NULL else NULL, e.given_stride[2],
        e.found + b * e.found_stride[0] + h * e.found_stride[1] + begin * e.found_stride[2]
        if e.found != NULL else NULL, e.found_stride[2],
        e.skip - begin, n, e.D, codes, stride, e.counted,
    )
    if e.packing == AS_KEYS:
        end_key_rows(
            codes, stride, e.correction + b * e.correction_stride[0] + h * e.correction_stride[1] + begin, n, e.D,
        )
    elif e.packing == AS_VALUES:
        pack_value_rows(place, e.codes_stride[2] // 4, begin, room, e.D, n, e.D)
    leave_environment(environment)
    return count


def encode(encodings not None, int threads):
    """Writes the codes of some arrays, each as an Encoding (quantized.py) says. Returns for each how many of its values
    saturate from row `skip` on, 0 where that is not counted, or -1: a value is not finite, and nothing written is of
    use. May raise MemoryError before anything is written."""
    cdef Py_ssize_t n = len(encodings), tasks = 0, widest = 0, i, task
    cdef Encoding* every
    cdef Py_ssize_t* counts = NULL
    cdef signed char* room = NULL
    cdef list totals = []
    if n == 0:
        return totals
    every = <Encoding*> calloc(n, sizeof(Encoding))
    try:
        if every == NULL:
            raise MemoryError(f"cannot allocate what is to be known of {n} arrays")
        for i in range(n):
            describe_encoding(&every[i], encodings[i])
            every[i].first_task = tasks
            tasks += every[i].tasks
            if every[i].packing == AS_VALUES:
                widest = max(widest, every[i].D)
        threads = <int> min(<Py_ssize_t> threads, tasks)
        counts = <Py_ssize_t*> malloc(tasks * sizeof(Py_ssize_t))
        room = <signed char*> malloc(threads * RUN * widest + 1)
        if counts == NULL or room == NULL:
            raise MemoryError(f"cannot allocate {threads * RUN * widest} bytes for codes on {threads} threads")
        for task in prange(tasks, nogil=True, schedule="dynamic", chunksize=1, num_threads=threads):
            counts[task] = encode_one_of(every, n, task, room + omp_get_thread_num() * RUN * widest)
        for i in range(n):
            totals.append(total_of(counts + every[i].first_task, every[i].tasks))
    finally:
        free(room)
        free(counts)
        free(every)
    return totals


cdef Py_ssize_t encode_one_of(const Encoding* every, Py_ssize_t n, Py_ssize_t task, signed char* room) noexcept nogil:
    """Task number `task` of n arrays, of which few are asked for at once."""
    cdef Py_ssize_t i = n - 1
    while every[i].first_task > task:
        i -= 1
    return encode_task(&every[i], task - every[i].first_task, room)


cdef Py_ssize_t total_of(const Py_ssize_t* counts, Py_ssize_t n) noexcept nogil:
    """The sum, or -1 where one of them is."""
    cdef Py_ssize_t i, total = 0
    for i in range(n):
        if counts[i] < 0:
            return -1
        total += counts[i]
    return total
