# The exponential, and one step of the online softmax.

cdef inline void exponentials(vf* x, const int n) noexcept nogil:
    """x[i] = e^x[i] for i < n and x[i] <= 0, NaN for NaN, exactly 1 for 0 and 0 for -inf: with y = x log2(e),
    2^floor(y) times a polynomial in the fraction of y.

    The polynomial is the minimax (relative error 8.3e-8) of degree 5 for 2^f on [0, 1) with constant term 1, fitted
    by linear programming; with the rounding of its evaluation the relative error is at most 3.1 2^-24, so 3.1 units in
    the last place just below a power of two. Degree 6 would make calls at D = 64 one per cent slower and the RMS error
    of outputs at most two per cent smaller. Rounding y, and log2(e), adds a relative error of up to 1.23 |x| 2^-24,
    about what rounding the score itself does. (All floats were tried: tests/exhaustive_exp.py.) Each step is taken for
    all n before the next one: a chain of ten dependent instructions at a time would fill the CPU's schedulers with
    waiting ones.
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
