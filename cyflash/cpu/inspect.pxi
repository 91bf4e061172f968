# Windows into the kernels for tests and benchmarks: sums of codes and elementary functions as the tiles compute them,
# rates of the products.


def integer_scores(const signed char[:, ::1] q not None, const signed char[:, ::1] k not None, bint few=False):
    """float32 (Lq, Lk): the sums q k^T as scores_of_codes() makes them, exact below 2^24; few: those of few.pxi."""
    cdef Py_ssize_t Lq = q.shape[0], Lk = k.shape[0], r, c, rows = round_up(Lk, 16)
    cdef Py_ssize_t words = round_up(q.shape[1], 4) // 4, step = FEW if few else PANEL, first_page = 0
    cdef Problem x
    cdef Head head
    cdef Sequence sequence
    cdef Scratch scratch
    cdef Block keys
    cdef Panel panel
    cdef float one = 1.0
    memset(&x, 0, sizeof(x))
    memset(&keys, 0, sizeof(keys))
    memset(&head, 0, sizeof(head))
    memset(&panel, 0, sizeof(panel))
    memset(&sequence, 0, sizeof(sequence))
    cdef signed char[:, :, :, ::1] packed = np.zeros((1, 1, rows, 4 * words), np.int8)
    cdef int[:, :, ::1] correction = np.zeros((1, 1, rows), np.int32)
    cdef int[::1] codes = np.empty(round_up((q.shape[1] + 1) // 2, LANES) * PANEL, np.int32)
    cdef float[:, ::1] s = np.zeros((rows, PANEL), np.float32)
    cdef float[:, ::1] rest = np.zeros((4, PANEL), np.float32)
    cdef int[::1] room = np.empty(rows * 4 * words, np.int32)
    sums = np.empty((Lq, Lk), np.float32)
    cdef float[:, ::1] to = sums
    zero, count = np.zeros((1, 1), np.intp), np.array([Lk], np.intp)
    pack_keys(np.asarray(k)[None, None], packed, correction, zero, zero[0], count, 1)
    x.D, x.scale, x.codes.q_stride[1], x.page_size = q.shape[1], 1.0, q.shape[1], UNPAGED
    x.k.kind, x.k.data, x.k.row = INT8, <const char*> &packed[0, 0, 0, 0], 4 * words
    x.codes.k_correction = &correction[0, 0, 0]
    sequence.pages = &first_page
    head.sequence, head.q_codes, head.q_scale, head.k_scale = &sequence, &q[0, 0], &one, &one
    scratch.k = <char*> &room[0]
    x.Bc = Lk
    load_keys(&x, &head, 0, 0, Lk, False, few, &scratch, &keys)
    keys.few_v = keys.few_k  # values are asked for beside the keys, and here are none
    panel.codes, panel.factor, panel.shift, panel.lift = &codes[0], &rest[0, 0], &rest[1, 0], &rest[3, 0]
    panel.heads, panel.few = 1, few
    while panel.row < Lq:
        panel.rows = panel.lanes = min(step, Lq - panel.row)
        panel.vectors = vectors_of(panel.rows)
        if few:
            few_pack_codes(&x, &head, &panel)
            few_scores_of_codes(&s[0, 0], rows, &panel, &keys, x.D, 0, Lk)
        else:
            pack_codes(&x, &head, &panel)
            scores_of_codes(&s[0, 0], &rest[2, 0], &panel, &keys, (x.D + GROUP - 1) // GROUP, 0, Lk)
        for r in range(panel.rows):
            for c in range(Lk):
                to[panel.row + r, c] = (&s[0, 0])[r * rows + c] if few else s[c, r]
        panel.row += step
    return sums


def integer_values(const unsigned char[:, ::1] p not None, const signed char[:, ::1] v not None, bint few=False):
    """float32 (Lq, Dv): the sums p v as accumulate_codes() makes them, exact below 2^24; few: those of few.pxi."""
    cdef Py_ssize_t Lq = p.shape[0], Lk = p.shape[1], Dv = v.shape[1], rows = round_up(Lk, 16)
    cdef Py_ssize_t columns = round_up(Dv, 16), row = 0, n, r, c, d, step = FEW if few else PANEL, first_page = 0
    cdef Problem x
    cdef Head head
    cdef Sequence sequence
    cdef Scratch scratch
    cdef Block keys
    cdef Panel panel
    memset(&x, 0, sizeof(x))
    memset(&keys, 0, sizeof(keys))
    memset(&head, 0, sizeof(head))
    memset(&panel, 0, sizeof(panel))
    memset(&sequence, 0, sizeof(sequence))
    cdef int[:, :, :, ::1] packed = np.zeros((1, 1, rows // 4, columns), np.int32)
    cdef int[:, ::1] codes = np.empty((rows, PANEL), np.int32)
    cdef float[:, ::1] o = np.empty((columns, PANEL), np.float32)
    cdef float[::1] zero = np.zeros(PANEL, np.float32)
    cdef float[:, ::1] one = np.ones(((Lk + PART_KEYS - 1) // PART_KEYS, PANEL), np.float32)
    cdef int[::1] room = np.empty(rows * columns, np.int32)
    sums = np.empty((Lq, Dv), np.float32)
    cdef float[:, ::1] to = sums
    zeros, count = np.zeros((1, 1), np.intp), np.array([Lk], np.intp)
    pack_values(np.asarray(v)[None, None], packed, zeros, zeros[0], count, 1)
    x.Dv, x.page_size, x.Bc, x.codes.product = Dv, UNPAGED, Lk, INT8
    x.k.kind = x.v.kind = INT8
    x.v.data, x.v.row = <const char*> &packed[0, 0, 0, 0], columns
    sequence.pages = &first_page
    head.sequence = &sequence
    scratch.v, scratch.p, scratch.alpha, scratch.beta = <char*> &room[0], &codes[0, 0], &zero[0], &one[0, 0]
    load_values(&x, &head, 0, 0, Lk, False, few, &scratch, &keys)
    panel.o, panel.few = &o[0, 0], few
    while row < Lq:
        n = panel.lanes = min(step, Lq - row)
        codes[:, :] = 0
        o[:, :] = 0.0
        for r in range(n):
            for c in range(Lk):
                if few:
                    (<unsigned char*> scratch.p)[r * rows + c] = p[row + r, c]
                else:
                    (<code*> &codes[c // GROUP, r])[c % GROUP] = <code> (p[row + r, c] - WEIGHT_OFFSET)
        if few:
            few_accumulate_codes(&panel, &scratch, rows, &keys, Dv, 0, Lk)
        else:
            accumulate_codes(
                panel.o, scratch.p, keys.v_words, keys.v_pitch, round_up(Dv, ROWS), scratch.alpha, scratch.beta, 0,
                (Lk + GROUP - 1) // GROUP, vectors_of(n),
            )
        for r in range(n):
            for d in range(Dv):
                to[row + r, d] = panel.o[r * round_up(Dv, LANES) + d] if few else o[d, r]
        row += step
    return sums


def load_bits(const unsigned short[::1] x not None, float[::1] out not None, str kind not None):
    """out = the values of x, of kind "fp16" or "bf16", whole vectors and then a part of one."""
    cdef Py_ssize_t i = 0, n = x.shape[0]
    cdef bint half = kind == "fp16"
    while i + LANES <= n:
        vf_store(&out[i], vf_load_half(&x[i]) if half else vf_load_bf16(&x[i]))
        i += LANES
    if i < n:
        vf_store_part(&out[i], vf_load_half_part(&x[i], n - i) if half else vf_load_bf16_part(&x[i], n - i), n - i)


def store_bits(const float[::1] x not None, unsigned short[::1] out not None, str kind not None):
    """The reverse."""
    cdef Py_ssize_t i = 0, n = x.shape[0]
    cdef bint half = kind == "fp16"
    cdef vf a
    while i < n:
        a = vf_load(&x[i]) if i + LANES <= n else vf_load_part(&x[i], n - i)
        if i + LANES <= n and half:
            vf_store_half(&out[i], a)
        elif i + LANES <= n:
            vf_store_bf16(&out[i], a)
        elif half:
            vf_store_half_part(&out[i], a, n - i)
        else:
            vf_store_bf16_part(&out[i], a, n - i)
        i += LANES


def elementary(str name not None, const float[::1] x not None, float[::1] out not None):
    """out = e^x ("exp"), 255 e^x ("codes") or tanh(x) ("tanh") by the functions that the tiles call.

    The length is a multiple of ROWS * LANES: what a tile takes at once, as here.
    """
    cdef int which = ("exp", "codes", "tanh").index(name), i
    cdef Py_ssize_t begin = 0, n = x.shape[0]
    cdef vf values[ROWS]
    if n % (ROWS * LANES) or out.shape[0] != n:
        raise ValueError(f"x, out: expected one length, a multiple of {ROWS * LANES}, got {n} and {out.shape[0]}")
    while begin < n:
        for i in range(ROWS):
            values[i] = vf_load(&x[begin + i * LANES])
        if which == 0:
            exponentials(values, ROWS)
        elif which == 1:
            code_exponentials(values, vf_set(0.0), ROWS)
        else:
            for i in range(ROWS):
                values[i] = tanhv(values[i])
        for i in range(ROWS):
            vf_store(&out[begin + i * LANES], values[i])
        begin += ROWS * LANES


cdef float fma_chains(Py_ssize_t n, float a, float b) noexcept nogil:
    """n steps of x = x * a + x on as many independent vectors as a product tile has accumulators; their sum. What is
    added is what is replaced: AArch64 has no other multiply-add."""
    cdef vf acc[ROWS * VECTORS]
    cdef vf x = vf_set(a)
    cdef float lanes[LANES]
    cdef vf total = vf_set(0.0)
    cdef Py_ssize_t t
    cdef int i, j
    for i in range(ROWS):
        for j in range(VECTORS):
            acc[i * VECTORS + j] = vf_set(b + <float> (i * VECTORS + j))  # all unlike, or they would be one
    for t in range(n):
        for i in range(ROWS):
            for j in range(VECTORS):
                acc[i * VECTORS + j] = vf_fma(acc[i * VECTORS + j], x, acc[i * VECTORS + j])
    for i in range(ROWS):
        for j in range(VECTORS):
            total = vf_add(total, acc[i * VECTORS + j])
    vf_store(lanes, total)
    return lanes[0]


def fma_rate(double seconds):
    """The FMA peak of one thread of this build, in FLOP/s: the median over windows of about 1 ms for `seconds`.

    A multiply-add counts as two, also where it is two instructions.
    """
    cdef Py_ssize_t n = 100_000
    cdef double started, stop = perf_counter() + seconds
    cdef float result = 0.0
    windows = []
    while True:
        started = perf_counter()
        with nogil:
            result = fma_chains(n, 1e-9, 1e-9 * result)
        if result != result:  # each window starts from the last one's result, and it is used: none can be left out
            raise FloatingPointError("the chains of multiply-adds did not stay finite")
        windows.append(perf_counter() - started)
        if started > stop:
            return 2.0 * n * ROWS * VECTORS * LANES / median(windows)


cdef float dot_chains(Py_ssize_t n, int a, int b) noexcept nogil:
    """n dot products on as many independent vectors as a product tile has accumulators; their sum."""
    cdef vi acc[ROWS * VECTORS]
    cdef vi x = vi_set(a), y = vi_set(b)
    cdef float lanes[LANES]
    cdef vf total = vf_set(0.0)
    cdef Py_ssize_t t
    cdef int i, j
    for i in range(ROWS):
        for j in range(VECTORS):
            acc[i * VECTORS + j] = vi_set(i * VECTORS + j)
    for t in range(n):
        for i in range(ROWS):
            for j in range(VECTORS):
                acc[i * VECTORS + j] = vi_dot(acc[i * VECTORS + j], x, y)
    for i in range(ROWS):
        for j in range(VECTORS):
            total = vf_add(total, vf_from_int(acc[i * VECTORS + j]))
    vf_store(lanes, total)
    return lanes[0]


def dot_rate(double seconds):
    """The peak of one thread of this build in dot products of codes, in OP/s, as fma_rate() measures its own.

    A product and its addition count as two, whatever the instructions.
    """
    cdef Py_ssize_t n = 100_000
    cdef double started, stop = perf_counter() + seconds
    cdef float result = 0.0
    windows = []
    while True:
        started = perf_counter()
        with nogil:
            result = dot_chains(n, 0x01010101, 0x01010101 + (result > 0.0))
        if result != result:  # never; but a result that nothing looks at would not be computed
            raise FloatingPointError("a sum of integers is NaN")
        windows.append(perf_counter() - started)
        if started > stop:
            return 2.0 * GROUP * n * ROWS * VECTORS * LANES / median(windows)


cdef enum:
    LOADS = 8  # vectors that are on their way at once; more do not read faster


cdef int sum_of_words(const int* x, Py_ssize_t n) noexcept nogil:
    """Of n words, modulo 2^32."""
    cdef vi acc[LOADS]
    cdef int lanes[LANES]
    cdef Py_ssize_t t = 0
    cdef unsigned int total = 0
    cdef int i
    for i in range(LOADS):
        acc[i] = vi_set(0)
    while t + LOADS * LANES <= n:
        for i in range(LOADS):
            acc[i] = vi_add(acc[i], vi_load(x + t + i * LANES))
        t += LOADS * LANES
    for i in range(1, LOADS):
        acc[0] = vi_add(acc[0], acc[i])
    memcpy(lanes, &acc[0], sizeof(lanes))
    for i in range(LANES):
        total += <unsigned int> lanes[i]
    while t < n:
        total += <unsigned int> x[t]
        t += 1
    return <int> total


def read_words(const int[::1] x not None, int threads):
    """Reads an array as fast as vectors can, each thread one part of it: the sum of its words modulo 2^32.

    How long that takes is what memory allows a kernel that has to read the same.
    """
    cdef Py_ssize_t n = x.shape[0], part = round_up((n + threads - 1) // threads, LOADS * LANES), t, begin
    cdef unsigned int total = 0
    if n == 0:
        return 0
    for t in prange(threads, nogil=True, schedule="static", num_threads=threads):
        begin = min(n, t * part)
        total += <unsigned int> sum_of_words(&x[0] + begin, min(n - begin, part))
    return total
