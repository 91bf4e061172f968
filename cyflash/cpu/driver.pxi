# Cuts a call into tasks and threads. A task is a block of query rows of one head of one sequence; it never shares a sum
# with another task, so a row's bits depend neither on threads nor on what else is in the batch.

from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport prange
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc

from statistics import median
from time import perf_counter

include "kernel.pxi"

cdef extern from "openmp.h" nogil:
    int omp_get_thread_num()

# Threads meet this often, so that Python can answer Ctrl-C.
cdef double SECONDS_BETWEEN_SIGNALS = 0.06


# ---------------------------------------------------------------------------------------------------------------------
# Scratch of one thread, in floats:
#
#     s, hidden   2 x Bc x PANEL        one tile of scores, and of what is hidden from them
#     top, alpha  2 x PANEL             the greatest score of each row of a tile; e^(m - m')
#     then for each panel of the Br rows:
#         q       D x PANEL
#         o       Dv (rounded up to LANES) x PANEL
#         m, l    2 x PANEL
#     panels      the Panel structures
#
# Every part but the last is a multiple of LANES floats, so all of them keep the alignment of the whole.

cdef Py_ssize_t panel_floats(Py_ssize_t D, Py_ssize_t Dv) noexcept nogil:
    return PANEL * (D + (Dv + LANES - 1) // LANES * LANES + 2)


cdef Py_ssize_t scratch_floats(Py_ssize_t Br, Py_ssize_t Bc, Py_ssize_t D, Py_ssize_t Dv) noexcept nogil:
    cdef Py_ssize_t structure = (sizeof(Panel) + 63) // 64 * 64 // sizeof(float)
    return PANEL * (2 * Bc + 2) + (Br // PANEL) * (panel_floats(D, Dv) + structure)


cdef void place_panel(const Problem* x, Panel* panel, Py_ssize_t first, Py_ssize_t last, float* state) noexcept nogil:
    """Gives a panel its rows first <= i < last, the keys that they may see, and its share of the scratch."""
    panel.row = first
    panel.rows = last - first
    panel.vectors = <int> ((last - first + LANES - 1) // LANES)
    panel.first_key = max(<Py_ssize_t> 0, first + x.offset - x.left)
    panel.last_key = min(x.Lk - 1, last - 1 + x.offset + x.right)
    panel.q = state
    panel.o = panel.q + x.D * PANEL
    panel.m = panel.o + (x.Dv + LANES - 1) // LANES * LANES * PANEL
    panel.l = panel.m + PANEL


cdef void fold_blocks(
    const Problem* x, const Head* head, Panel* panels, Py_ssize_t n, float* s, float* hidden, float* top, float* alpha,
    bint careful
) noexcept nogil:
    """Folds every block of keys that one of n panels sees: a block is read once for all of them."""
    cdef Py_ssize_t i, block, first_key = panels[0].first_key, last_key = panels[n - 1].last_key
    if last_key < first_key:
        return
    for block in range(first_key // x.Bc, last_key // x.Bc + 1):
        for i in range(n):
            fold_block(x, head, &panels[i], block * x.Bc, s, hidden, top, alpha, careful)


cdef void attend_rows(
    const Problem* x, const Head* head, Py_ssize_t first, Py_ssize_t last, float* scratch
) noexcept nogil:
    """Query rows first <= i < last of one head, against every block of keys that one of them sees.

    Runs on the assumption that hidden values are finite. Where an output is not, its panel is run once more with
    hidden values kept out of the products: calls without NaN or inf pay nothing for it.
    """
    cdef float* s = scratch
    cdef float* hidden = s + x.Bc * PANEL
    cdef float* top = hidden + x.Bc * PANEL
    cdef float* alpha = top + PANEL
    cdef float* state = alpha + PANEL
    cdef Panel* panels = <Panel*> (state + x.Br // PANEL * panel_floats(x.D, x.Dv))
    cdef Py_ssize_t vectors = (last - first + LANES - 1) // LANES
    cdef Py_ssize_t i, n = (vectors + VECTORS - 1) // VECTORS
    cdef bint hides = x.mask != NULL or x.bias != NULL or x.left < x.Lk + x.Lq or x.right < x.Lk + x.Lq
    for i in range(n):
        place_panel(
            x, &panels[i], first + i * vectors // n * LANES, min(last, first + (i + 1) * vectors // n * LANES),
            state + i * panel_floats(x.D, x.Dv),
        )
        begin_panel(x, head, &panels[i])
    fold_blocks(x, head, panels, n, s, hidden, top, alpha, False)
    for i in range(n):
        if hides and not panel_is_finite(x, &panels[i]):
            begin_panel(x, head, &panels[i])
            fold_blocks(x, head, &panels[i], 1, s, hidden, top, alpha, True)
        end_panel(x, head, &panels[i])


cdef void run_task(const Problem* x, Py_ssize_t task, float* scratch) noexcept nogil:
    """Task number `task`: heads that share keys and values are neighbours."""
    cdef Head head
    cdef Py_ssize_t vectors = (x.Lq + LANES - 1) // LANES, per_task = x.Br // LANES
    cdef Py_ssize_t blocks = (vectors + per_task - 1) // per_task
    cdef Py_ssize_t n = task % blocks
    cdef Py_ssize_t h = task // blocks % x.H, b = task // blocks // x.H
    cdef Py_ssize_t hk = h // x.group
    head.q = x.q + b * x.q_stride[0] + h * x.q_stride[1]
    head.out = x.out + b * x.out_stride[0] + h * x.out_stride[1]
    head.lse = x.lse + b * x.lse_stride[0] + h * x.lse_stride[1] if x.lse != NULL else NULL
    head.sink = x.sinks + h * x.sinks_stride if x.sinks != NULL else NULL
    head.k = x.k + b * x.k_stride[0] + hk * x.k_stride[1]
    head.v = x.v + b * x.v_stride[0] + hk * x.v_stride[1]
    head.bias = x.bias + b * x.bias_stride[0] + h * x.bias_stride[1] if x.bias != NULL else NULL
    head.mask = x.mask + b * x.mask_stride[0] + h * x.mask_stride[1] if x.mask != NULL else NULL
    head.slope = x.slopes[b * x.slopes_stride[0] + h * x.slopes_stride[1]] if x.slopes != NULL else 0.0
    attend_rows(
        x, &head, n * vectors // blocks * LANES, min(x.Lq, (n + 1) * vectors // blocks * LANES), scratch,
    )


cdef void run_tasks(
    const Problem* x, Py_ssize_t begin, Py_ssize_t end, float* scratch, Py_ssize_t size, int threads
) noexcept nogil:
    """Tasks begin <= t < end on `threads` threads, each with its own `size` floats of scratch."""
    cdef Py_ssize_t t
    if threads == 1:
        for t in range(begin, end):
            run_task(x, t, scratch)
    else:
        for t in prange(begin, end, schedule="dynamic", chunksize=1, num_threads=threads):
            run_task(x, t, scratch + omp_get_thread_num() * size)


def tile_bytes(Py_ssize_t Br, Py_ssize_t Bc, Py_ssize_t D, Py_ssize_t Dv):
    """Bytes of scratch that one thread allocates for tasks of Br query rows and blocks of Bc keys."""
    return scratch_floats(Br, Bc, D, Dv) * sizeof(float)


def forward(
    const float[:, :, :, :] q not None, const float[:, :, :, :] k not None, const float[:, :, :, :] v not None,
    float[:, :, :, :] out not None, float[:, :, :] lse, const float[:, :, :, :] bias,
    const unsigned char[:, :, :, :] mask, const float[:, :] slopes, const float[:] sinks,
    double scale, double softcap, Py_ssize_t offset, Py_ssize_t left, Py_ssize_t right,
    Py_ssize_t Br, Py_ssize_t Bc, int threads,
):
    """Attention of validated arrays (attention.py); shapes and strides as in Problem. Writes out and, unless None, lse.

    The last axes of q, k, v and out are contiguous. Br and Bc are multiples of PANEL and ROWS. May raise MemoryError
    before anything is written, and KeyboardInterrupt between two tasks.
    """
    cdef Problem x
    cdef Py_ssize_t i, tasks, begin, end, chunk, size, total, vectors, per_task
    cdef float* scratch
    cdef void* memory
    cdef double started = 0.0, elapsed, task_flops
    x.B, x.H, x.Lq, x.D = q.shape[0], q.shape[1], q.shape[2], q.shape[3]
    x.Lk, x.Dv, x.group = k.shape[2], v.shape[3], q.shape[1] // k.shape[1]
    x.q, x.k, x.v, x.out = &q[0, 0, 0, 0], &k[0, 0, 0, 0], &v[0, 0, 0, 0], &out[0, 0, 0, 0]
    x.lse = &lse[0, 0, 0] if lse is not None else NULL
    x.bias = &bias[0, 0, 0, 0] if bias is not None else NULL
    x.mask = &mask[0, 0, 0, 0] if mask is not None else NULL
    x.slopes = &slopes[0, 0] if slopes is not None else NULL
    x.sinks = &sinks[0] if sinks is not None else NULL
    for i in range(3):
        x.q_stride[i] = q.strides[i] // <Py_ssize_t> sizeof(float)
        x.k_stride[i] = k.strides[i] // <Py_ssize_t> sizeof(float)
        x.v_stride[i] = v.strides[i] // <Py_ssize_t> sizeof(float)
        x.out_stride[i] = out.strides[i] // <Py_ssize_t> sizeof(float)
        x.lse_stride[i] = lse.strides[i] // <Py_ssize_t> sizeof(float) if lse is not None else 0
    for i in range(4):
        x.bias_stride[i] = bias.strides[i] // <Py_ssize_t> sizeof(float) if bias is not None else 0
        x.mask_stride[i] = mask.strides[i] if mask is not None else 0
    for i in range(2):
        x.slopes_stride[i] = slopes.strides[i] // <Py_ssize_t> sizeof(float) if slopes is not None else 0
    x.sinks_stride = sinks.strides[0] // <Py_ssize_t> sizeof(float) if sinks is not None else 0
    x.offset, x.left, x.right = offset, left, right
    x.scale = scale
    # any cap within the normal floats: one that rounds to 0 would be none, and its inverse must be finite
    x.softcap = min(max(softcap, <double> FLT_MIN), <double> FLT_MAX) if softcap > 0.0 else 0.0
    x.Br, x.Bc = Br, Bc

    vectors = (x.Lq + LANES - 1) // LANES
    per_task = Br // LANES
    tasks = x.B * x.H * ((vectors + per_task - 1) // per_task)
    threads = <int> min(<Py_ssize_t> threads, tasks)
    size = scratch_floats(Br, Bc, x.D, x.Dv)
    total = threads * size * <Py_ssize_t> sizeof(float) + 64
    memory = malloc(total)
    if memory == NULL:
        raise MemoryError(f"cannot allocate {total} bytes of tiles for {threads} threads")
    scratch = <float*> ((<uintptr_t> memory + 63) // 64 * 64)

    # The first chunk is sized for a slow machine (10 GFLOP/s a thread), the next ones by what was measured.
    task_flops = 2.0 * Br * x.Lk * (x.D + x.Dv) + 1.0
    chunk = max(<Py_ssize_t> threads, <Py_ssize_t> (threads * SECONDS_BETWEEN_SIGNALS * 1e10 / task_flops))
    begin = 0
    try:
        while begin < tasks:
            end = min(tasks, begin + chunk)
            if end < tasks:
                started = perf_counter()
            with nogil:
                run_tasks(&x, begin, end, scratch, size, threads)
            if end < tasks:
                PyErr_CheckSignals()
                elapsed = perf_counter() - started + 1e-9
                chunk = max(<Py_ssize_t> threads, <Py_ssize_t> ((end - begin) * SECONDS_BETWEEN_SIGNALS / elapsed))
            begin = end
    finally:
        free(memory)


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


SHAPE = {"LANES": LANES, "VECTORS": VECTORS, "ROWS": ROWS, "PANEL": PANEL}

include "quantise.pxi"
