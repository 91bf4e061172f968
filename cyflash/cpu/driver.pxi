# Cuts a call into tasks and threads. A task is a block of query rows of one head of one sequence; it never shares a sum
# with another task, so a row's bits depend neither on threads nor on what else is in the batch.

from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport prange
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc

from statistics import median
from time import perf_counter

import numpy as np

include "kernel.pxi"
include "pack.pxi"

cdef extern from "openmp.h" nogil:
    int omp_get_thread_num()

# Threads meet this often, so that Python can answer Ctrl-C.
cdef double SECONDS_BETWEEN_SIGNALS = 0.06


# ---------------------------------------------------------------------------------------------------------------------
# Scratch of one thread, in floats (an int is as long):
#
#     s, hidden         2 x Bc x PANEL        one tile of scores, and of what is hidden from them or their codes
#     top, alpha, beta  (2 x parts + 1) x PANEL   see Scratch
#     then for each panel of the Br rows:
#         q             D x PANEL             where keys are computed in float32
#         codes         groups of D x PANEL   where they are computed from codes
#         o             Dv (rounded up to LANES) x PANEL
#         m, l, factor, shift, lift  5 x PANEL
#     panels            the Panel structures
#
# Every piece but the panels is a multiple of LANES floats, so all of them keep the alignment of the whole.

cdef Py_ssize_t parts(const Problem* x) noexcept nogil:
    """Of a block of keys."""
    return (x.Bc + PART_KEYS - 1) // PART_KEYS


cdef Py_ssize_t panel_floats(const Problem* x) noexcept nogil:
    cdef Py_ssize_t queries = 0
    if x.precise > 0:
        queries += x.D
    if x.precise < x.Lk:
        queries += (x.D + GROUP - 1) // GROUP
    return PANEL * (queries + (x.Dv + LANES - 1) // LANES * LANES + 5)


cdef Py_ssize_t scratch_floats(const Problem* x) noexcept nogil:
    cdef Py_ssize_t structure = (sizeof(Panel) + 63) // 64 * 64 // sizeof(float)
    return PANEL * (2 * x.Bc + 2 * parts(x) + 1) + (x.Br // PANEL) * (panel_floats(x) + structure)


cdef void place_panel(const Problem* x, Panel* panel, Py_ssize_t first, Py_ssize_t last, float* state) noexcept nogil:
    """Gives a panel its rows first <= i < last, the keys that they may see, and its share of the scratch."""
    panel.row = first
    panel.rows = last - first
    panel.vectors = <int> ((last - first + LANES - 1) // LANES)
    panel.first_key = max(<Py_ssize_t> 0, first + x.offset - x.left)
    panel.last_key = min(x.Lk - 1, last - 1 + x.offset + x.right)
    panel.m = state
    panel.l = panel.m + PANEL
    panel.factor = panel.l + PANEL
    panel.shift = panel.factor + PANEL
    panel.lift = panel.shift + PANEL
    panel.o = panel.lift + PANEL
    panel.q = panel.o + (x.Dv + LANES - 1) // LANES * LANES * PANEL
    panel.codes = <int*> (panel.q + (x.D * PANEL if x.precise > 0 else 0))


cdef void fold_blocks(
    const Problem* x, const Head* head, Panel* panels, Py_ssize_t n, const Scratch* scratch, bint careful
) noexcept nogil:
    """Folds every block of keys that one of n panels sees: a block is read once for all of them. The keys of a block
    that are computed in float32 come first, on their own."""
    cdef Py_ssize_t i, block, begin, end, middle
    cdef Py_ssize_t first_key = panels[0].first_key, last_key = panels[n - 1].last_key
    if last_key < first_key:
        return
    for block in range(first_key // x.Bc, last_key // x.Bc + 1):
        for i in range(n):
            begin = max(<Py_ssize_t> 0, panels[i].first_key - block * x.Bc)
            end = min(x.Bc, panels[i].last_key + 1 - block * x.Bc)
            middle = min(end, x.precise - block * x.Bc)
            fold_block(x, head, &panels[i], block * x.Bc, begin, middle, scratch, careful)
            fold_block(x, head, &panels[i], block * x.Bc, max(begin, middle), end, scratch, careful)


cdef void attend_rows(
    const Problem* x, const Head* head, Py_ssize_t first, Py_ssize_t last, float* memory
) noexcept nogil:
    """Query rows first <= i < last of one head, against every block of keys that one of them sees.

    Runs on the assumption that hidden values are finite. Where an output is not, its panel is run once more with
    hidden values kept out of the products: calls without NaN or inf pay nothing for it, nor do codes, which have none.
    """
    cdef Scratch scratch
    scratch.s = memory
    scratch.hidden = scratch.s + x.Bc * PANEL
    scratch.p = <int*> scratch.hidden
    scratch.top = scratch.hidden + x.Bc * PANEL
    scratch.alpha = scratch.top + parts(x) * PANEL
    scratch.beta = scratch.alpha + PANEL
    cdef float* state = scratch.beta + parts(x) * PANEL
    cdef Panel* panels = <Panel*> (state + x.Br // PANEL * panel_floats(x))
    cdef Py_ssize_t vectors = (last - first + LANES - 1) // LANES
    cdef Py_ssize_t i, n = (vectors + VECTORS - 1) // VECTORS
    cdef bint hides = x.mask != NULL or x.bias != NULL or x.left < x.Lk + x.Lq or x.right < x.Lk + x.Lq
    hides = hides and x.precise >= x.Lk
    for i in range(n):
        place_panel(
            x, &panels[i], first + i * vectors // n * LANES, min(last, first + (i + 1) * vectors // n * LANES),
            state + i * panel_floats(x),
        )
        begin_panel(x, head, &panels[i])
    fold_blocks(x, head, panels, n, &scratch, False)
    for i in range(n):
        if hides and not panel_is_finite(x, &panels[i]):
            begin_panel(x, head, &panels[i])
            fold_blocks(x, head, &panels[i], 1, &scratch, True)
        end_panel(x, head, &panels[i])


cdef void run_task(const Problem* x, Py_ssize_t task, float* scratch) noexcept nogil:
    """Task number `task`: heads that share keys and values are neighbours."""
    cdef Head head
    cdef Py_ssize_t vectors = (x.Lq + LANES - 1) // LANES, per_task = x.Br // LANES
    cdef Py_ssize_t blocks = (vectors + per_task - 1) // per_task
    cdef Py_ssize_t n = task % blocks
    cdef Py_ssize_t h = task // blocks % x.H, b = task // blocks // x.H
    cdef Py_ssize_t hk = h // x.group
    memset(&head, 0, sizeof(head))
    head.out = x.out + b * x.out_stride[0] + h * x.out_stride[1]
    head.lse = x.lse + b * x.lse_stride[0] + h * x.lse_stride[1] if x.lse != NULL else NULL
    head.sink = x.sinks + h * x.sinks_stride if x.sinks != NULL else NULL
    head.bias = x.bias + b * x.bias_stride[0] + h * x.bias_stride[1] if x.bias != NULL else NULL
    head.mask = x.mask + b * x.mask_stride[0] + h * x.mask_stride[1] if x.mask != NULL else NULL
    head.slope = x.slopes[b * x.slopes_stride[0] + h * x.slopes_stride[1]] if x.slopes != NULL else 0.0
    if x.q != NULL:
        head.q = x.q + b * x.q_stride[0] + h * x.q_stride[1]
        head.k = x.k + b * x.k_stride[0] + hk * x.k_stride[1]
    if x.v != NULL:
        head.v = x.v + b * x.v_stride[0] + hk * x.v_stride[1]
    if x.precise < x.Lk:
        place_codes(x, &head, b, h, b * (x.H // x.group) + hk)
    attend_rows(
        x, &head, n * vectors // blocks * LANES, min(x.Lq, (n + 1) * vectors // blocks * LANES), scratch,
    )


cdef void place_codes(
    const Problem* x, Head* head, Py_ssize_t b, Py_ssize_t h, Py_ssize_t kv_head
) noexcept nogil:
    """The codes and scales of query head (b, h), whose keys and values are number kv_head of the packed ones."""
    cdef const Codes* codes = &x.codes
    cdef Py_ssize_t group, columns = (x.Dv + ROWS - 1) // ROWS * ROWS
    head.q_codes = codes.q + b * codes.q_stride[0] + h * codes.q_stride[1]
    head.q_scale = codes.q_scale + b * codes.q_scale_stride[0] + h * codes.q_scale_stride[1]
    head.k_codes = codes.k + kv_head * ((x.Lk + ROWS - 1) // ROWS * ROWS) * (1 + (x.D + GROUP - 1) // GROUP)
    head.k_scale = codes.k_scale + kv_head * codes.k_scale_length
    head.k_mean = codes.k_mean + kv_head * x.D if codes.k_mean != NULL else NULL
    if codes.product != FLOAT32:
        group = GROUP if codes.product == INT8 else BF16_GROUP
        head.v_codes = codes.v + kv_head * ((x.Lk + group - 1) // group) * columns
        head.v_scale = codes.v_scale + kv_head * codes.v_scale_length
    if codes.trace != NULL:
        head.trace = codes.trace + (b * x.H + h) * x.Lq * x.Lk


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


cdef int describe(
    Problem* x, float[:, :, :, :] out, float[:, :, :] lse, const float[:, :, :, :] bias,
    const unsigned char[:, :, :, :] mask, const float[:, :] slopes, const float[:] sinks,
    double scale, double softcap, Py_ssize_t offset, Py_ssize_t left, Py_ssize_t right, Py_ssize_t Br, Py_ssize_t Bc,
) except -1:
    """Everything of a problem but its queries, keys and values."""
    cdef Py_ssize_t i
    memset(x, 0, sizeof(x[0]))
    x.B, x.H, x.Lq, x.Dv = out.shape[0], out.shape[1], out.shape[2], out.shape[3]
    x.out = &out[0, 0, 0, 0]
    x.lse = &lse[0, 0, 0] if lse is not None else NULL
    x.bias = &bias[0, 0, 0, 0] if bias is not None else NULL
    x.mask = &mask[0, 0, 0, 0] if mask is not None else NULL
    x.slopes = &slopes[0, 0] if slopes is not None else NULL
    x.sinks = &sinks[0] if sinks is not None else NULL
    for i in range(3):
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
    return 0


cdef int describe_floats(
    Problem* x, const float[:, :, :, :] q, const float[:, :, :, :] k, const float[:, :, :, :] v
) except -1:
    """Queries, keys and values in float32, each where it is given."""
    cdef Py_ssize_t i
    if q is not None:
        x.q = &q[0, 0, 0, 0]
    if k is not None and k.shape[2]:
        x.k = &k[0, 0, 0, 0]
    if v is not None and v.shape[2]:
        x.v = &v[0, 0, 0, 0]
    for i in range(3):
        x.q_stride[i] = q.strides[i] // <Py_ssize_t> sizeof(float) if q is not None else 0
        x.k_stride[i] = k.strides[i] // <Py_ssize_t> sizeof(float) if k is not None else 0
        x.v_stride[i] = v.strides[i] // <Py_ssize_t> sizeof(float) if v is not None else 0
    return 0


cdef int run(const Problem* x, int threads) except -1:
    """All tasks of a problem. May raise MemoryError before anything is written, and KeyboardInterrupt between tasks."""
    cdef Py_ssize_t tasks, begin, end, chunk, size, total, vectors, per_task
    cdef float* scratch
    cdef void* memory
    cdef double started = 0.0, elapsed, task_flops
    vectors = (x.Lq + LANES - 1) // LANES
    per_task = x.Br // LANES
    tasks = x.B * x.H * ((vectors + per_task - 1) // per_task)
    threads = <int> min(<Py_ssize_t> threads, tasks)
    size = scratch_floats(x)
    total = threads * size * <Py_ssize_t> sizeof(float) + 64
    memory = malloc(total)
    if memory == NULL:
        raise MemoryError(f"cannot allocate {total} bytes of tiles for {threads} threads")
    scratch = <float*> ((<uintptr_t> memory + 63) // 64 * 64)

    # The first chunk is sized for a slow machine (10 GFLOP/s a thread), the next ones by what was measured.
    task_flops = 2.0 * x.Br * x.Lk * (x.D + x.Dv) + 1.0
    chunk = max(<Py_ssize_t> threads, <Py_ssize_t> (threads * SECONDS_BETWEEN_SIGNALS * 1e10 / task_flops))
    begin = 0
    try:
        while begin < tasks:
            end = min(tasks, begin + chunk)
            if end < tasks:
                started = perf_counter()
            with nogil:
                run_tasks(x, begin, end, scratch, size, threads)
            if end < tasks:
                PyErr_CheckSignals()
                elapsed = perf_counter() - started + 1e-9
                chunk = max(<Py_ssize_t> threads, <Py_ssize_t> ((end - begin) * SECONDS_BETWEEN_SIGNALS / elapsed))
            begin = end
    finally:
        free(memory)
    return 0


def tile_bytes(Py_ssize_t Br, Py_ssize_t Bc, Py_ssize_t D, Py_ssize_t Dv, Py_ssize_t Lk=1, Py_ssize_t precise=1):
    """Bytes of scratch that one thread allocates for tasks of Br query rows and blocks of Bc keys; of Lk keys those
    before `precise` are computed in float32."""
    cdef Problem x
    x.Br, x.Bc, x.D, x.Dv, x.Lk, x.precise = Br, Bc, D, Dv, Lk, precise
    return scratch_floats(&x) * sizeof(float)


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
    describe(&x, out, lse, bias, mask, slopes, sinks, scale, softcap, offset, left, right, Br, Bc)
    describe_floats(&x, q, k, v)
    x.D, x.Lk, x.group = q.shape[3], k.shape[2], q.shape[1] // k.shape[1]
    x.precise = x.Lk
    run(&x, threads)


def forward_codes(
    const signed char[:, :, :, :] q not None, const float[:, :, :] q_scale not None,
    const int[:, :, :, ::1] k not None, Py_ssize_t Lk,
    const float[:, :, ::1] k_scale not None, const float[:, :, ::1] k_mean,
    const int[:, :, :, ::1] v, const float[:, :, ::1] v_scale, str product not None, Py_ssize_t precise,
    const float[:, :, :, :] float_q, const float[:, :, :, :] float_k, const float[:, :, :, :] float_v,
    unsigned char[:, :, :, ::1] trace,
    float[:, :, :, :] out not None, float[:, :, :] lse, const float[:, :, :, :] bias,
    const unsigned char[:, :, :, :] mask, const float[:, :] slopes, const float[:] sinks,
    double scale, double softcap, Py_ssize_t offset, Py_ssize_t left, Py_ssize_t right,
    Py_ssize_t Br, Py_ssize_t Bc, int threads,
):
    """Attention of quantised operands (operands.py): forward() with the arrays of Codes, the Lk keys and the values as
    packed by pack_keys() and pack_values() or pack_values_bf16().

    product: "int8", "bf16" or "fp32" (then v is None and float_v has every value). precise: keys that are computed in
    float32, for which float_q is the queries and float_k and float_v have at least these rows. Scales for each token
    have Lk rounded up to ROWS, else one number for each head.
    """
    cdef Problem x
    cdef Codes* codes = &x.codes
    cdef Py_ssize_t i
    describe(&x, out, lse, bias, mask, slopes, sinks, scale, softcap, offset, left, right, Br, Bc)
    describe_floats(&x, float_q, float_k, float_v)
    x.D, x.Lk, x.group = q.shape[3], Lk, q.shape[1] // k.shape[1]
    x.precise = precise
    codes.q, codes.q_scale = &q[0, 0, 0, 0], &q_scale[0, 0, 0]
    for i in range(3):
        codes.q_stride[i] = q.strides[i]
        codes.q_scale_stride[i] = q_scale.strides[i] // <Py_ssize_t> sizeof(float)
    codes.k, codes.k_scale, codes.k_scale_length = &k[0, 0, 0, 0], &k_scale[0, 0, 0], k_scale.shape[2]
    codes.k_mean = &k_mean[0, 0, 0] if k_mean is not None else NULL
    codes.k_tokens = codes.k_scale_length > 1
    codes.product = {"int8": INT8, "bf16": BFLOAT16, "fp32": FLOAT32}[product]
    if codes.product != FLOAT32:
        codes.v, codes.v_scale, codes.v_scale_length = &v[0, 0, 0, 0], &v_scale[0, 0, 0], v_scale.shape[2]
        codes.v_tokens = codes.v_scale_length > 1
    codes.trace = &trace[0, 0, 0, 0] if trace is not None else NULL
    run(&x, threads)


include "inspect.pxi"

SHAPE = {
    "LANES": LANES, "VECTORS": VECTORS, "ROWS": ROWS, "PANEL": PANEL, "PART_KEYS": PART_KEYS, "GROUP": GROUP,
    "BF16_GROUP": BF16_GROUP,
}

include "quantise.pxi"
