# Windows into the kernels for tests and benchmarks: sums of codes as the tiles compute them, rates of the products.


def integer_scores(const signed char[:, ::1] q not None, const signed char[:, ::1] k not None):
    """float32 (Lq, Lk): the sums q k^T as scores_of_codes() makes them, exact below 2^24."""
    cdef Py_ssize_t Lq = q.shape[0], Lk = k.shape[0], r, c, rows = (Lk + ROWS - 1) // ROWS * ROWS
    cdef Problem x
    cdef Head head
    cdef Panel panel
    cdef float one = 1.0
    memset(&x, 0, sizeof(x))
    memset(&head, 0, sizeof(head))
    x.D, x.scale, x.codes.q_stride[2] = q.shape[1], 1.0, q.shape[1]
    head.q_codes, head.q_scale, head.k_scale = &q[0, 0], &one, &one
    cdef int[:, :, :, ::1] packed = np.empty((1, 1, rows, 1 + (q.shape[1] + GROUP - 1) // GROUP), np.int32)
    cdef int[::1] codes = np.empty((x.D + GROUP - 1) // GROUP * PANEL, np.int32)
    cdef float[:, ::1] s = np.empty((rows, PANEL), np.float32)
    cdef float[:, ::1] rest = np.empty((4, PANEL), np.float32)
    sums = np.empty((Lq, Lk), np.float32)
    cdef float[:, ::1] to = sums
    pack_keys(np.asarray(k)[None, None], packed, 1)
    panel.codes, panel.factor, panel.shift, panel.lift = &codes[0], &rest[0, 0], &rest[1, 0], &rest[3, 0]
    panel.row = 0
    while panel.row < Lq:
        panel.rows = min(<Py_ssize_t> PANEL, Lq - panel.row)
        panel.vectors = <int> ((panel.rows + LANES - 1) // LANES)
        pack_codes(&x, &head, &panel)
        scores_of_codes(&s[0, 0], &rest[2, 0], &panel, &packed[0, 0, 0, 0], NULL, (x.D + GROUP - 1) // GROUP, 0, Lk)
        for r in range(panel.rows):
            for c in range(Lk):
                to[panel.row + r, c] = s[c, r]
        panel.row += PANEL
    return sums


def integer_values(const unsigned char[:, ::1] p not None, const signed char[:, ::1] v not None):
    """float32 (Lq, Dv): the sums p v as accumulate_codes() makes them, exact below 2^24."""
    cdef Py_ssize_t Lq = p.shape[0], Lk = p.shape[1], Dv = v.shape[1], groups = (Lk + GROUP - 1) // GROUP
    cdef Py_ssize_t row = 0, rows, r, c, d
    cdef int[:, :, :, ::1] packed = np.empty((1, 1, groups, (Dv + ROWS - 1) // ROWS * ROWS), np.int32)
    cdef int[:, ::1] codes = np.empty((groups, PANEL), np.int32)
    cdef float[:, ::1] o = np.empty(((Dv + LANES - 1) // LANES * LANES, PANEL), np.float32)
    cdef float[::1] zero = np.zeros(PANEL, np.float32)
    cdef float[:, ::1] one = np.ones(((Lk + PART_KEYS - 1) // PART_KEYS, PANEL), np.float32)
    cdef code* group
    sums = np.empty((Lq, Dv), np.float32)
    cdef float[:, ::1] to = sums
    pack_values(np.asarray(v)[None, None], packed, 1)
    while row < Lq:
        rows = min(<Py_ssize_t> PANEL, Lq - row)
        codes[:, :] = 0
        o[:, :] = 0.0
        for r in range(rows):
            for c in range(Lk):
                group = <code*> &codes[c // GROUP, r]
                group[c % GROUP] = <code> p[row + r, c]
        accumulate_codes(
            &o[0, 0], &codes[0, 0], &packed[0, 0, 0, 0], packed.shape[3], &zero[0], &one[0, 0], 0, groups,
            <int> ((rows + LANES - 1) // LANES),
        )
        for r in range(rows):
            for d in range(Dv):
                to[row + r, d] = o[d, r]
        row += PANEL
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


cdef float fma_chains(Py_ssize_t n, float a, float b) noexcept nogil:
    """n steps of x = x * a + b on as many independent vectors as a product tile has accumulators; their sum."""
    cdef vf acc[ROWS * VECTORS]
    cdef vf x = vf_set(a), y = vf_set(b)
    cdef float lanes[LANES]
    cdef vf total = vf_set(0.0)
    cdef Py_ssize_t t
    cdef int i, j
    for i in range(ROWS):
        for j in range(VECTORS):
            acc[i * VECTORS + j] = vf_set(<float> (i * VECTORS + j))  # all unlike, or they would be one
    for t in range(n):
        for i in range(ROWS):
            for j in range(VECTORS):
                acc[i * VECTORS + j] = vf_fma(acc[i * VECTORS + j], x, y)
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
            result = fma_chains(n, 0.999, 0.001 * result)
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
