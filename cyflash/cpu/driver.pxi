# Cuts a call into tasks and threads. A task is a block of query rows of one head of one sequence, or where these are
# few, a chunk of the keys of some heads. Chunks are merged in their order; otherwise no task shares a sum with another
# one, so a row's bits depend neither on threads nor on what else is in the batch.

from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport prange
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free, malloc

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
#     s, hidden         2 x Bc x PANEL        one tile of scores, and of what is hidden from them or their codes; or
#                       2 x FEW_KEYS x FEW    the same of few rows, if that is more
#     top, alpha, beta  (2 x parts + 1) x PANEL   see Scratch
#     k, v              a block each          where the products cannot read them in place, see block.pxi
#     k_correction, k_scale, v_scale  3 x Bc  the same
#     then for each panel of the Br rows:
#         q             D x PANEL             where keys are computed in float32
#         codes         groups of D x PANEL   where they are computed from codes or bfloat16
#         o             Dv x PANEL
#         m, l, factor, shift, lift, step, slope  7 x PANEL
#     panels            the Panel structures
#
# D, its groups and Dv are rounded up to LANES. Every piece but the panels is a multiple of LANES floats, so all of them
# keep the alignment of the whole.

cdef enum:
    # Keys of a chunk, where a sequence has so few query rows that keys are what threads can share. Some ten
    # microseconds of codes, some tens of floats; what a chunk leaves, Dv + 3 floats for each row, is a thousandth of
    # what it reads.
    CHUNK_KEYS = 1024


cdef Py_ssize_t parts(const Problem* x) noexcept nogil:
    """Of a block of keys."""
    return (keys_of_block(x, True) + PART_KEYS - 1) // PART_KEYS


cdef Py_ssize_t tile_floats(const Problem* x) noexcept nogil:
    """A block's scores."""
    return max(x.Bc * PANEL, few_pitch(x) * FEW)


cdef Py_ssize_t panel_floats(const Problem* x) noexcept nogil:
    return PANEL * (floats_of_queries(x) + words_of_queries(x) + round_up(x.Dv, LANES) + 7)


cdef Py_ssize_t floats_of_queries(const Problem* x) noexcept nogil:
    return round_up(x.D, LANES) if x.k.kind != INT8 or x.precise > 0 else 0


cdef Py_ssize_t words_of_queries(const Problem* x) noexcept nogil:
    return round_up((x.D + 1) // 2, LANES) if x.k.kind == INT8 or x.native else 0


cdef Py_ssize_t scratch_floats(const Problem* x) noexcept nogil:
    cdef Py_ssize_t structure = (sizeof(Panel) + 63) // 64 * 64 // sizeof(float)
    return (
        2 * tile_floats(x) + PANEL * (2 * parts(x) + 1) + keys_room(x) + values_room(x) + 3 * few_pitch(x)
        + (x.Br // PANEL) * (panel_floats(x) + structure)
    )


cdef float* place_scratch(const Problem* x, Scratch* scratch, float* memory) noexcept nogil:
    """Gives a thread's scratch its places; returns where panels begin."""
    scratch.s = memory
    scratch.hidden = scratch.s + tile_floats(x)
    scratch.p = <int*> scratch.hidden
    scratch.top = scratch.hidden + tile_floats(x)
    scratch.alpha = scratch.top + parts(x) * PANEL
    scratch.beta = scratch.alpha + PANEL
    scratch.k = <char*> (scratch.beta + parts(x) * PANEL)
    scratch.v = scratch.k + keys_room(x) * <Py_ssize_t> sizeof(float)
    scratch.k_correction = <int*> (scratch.v + values_room(x) * <Py_ssize_t> sizeof(float))
    scratch.k_scale = <float*> scratch.k_correction + few_pitch(x)
    scratch.v_scale = scratch.k_scale + few_pitch(x)
    return scratch.v_scale + few_pitch(x)


cdef void place_panel(
    const Problem* x, const Sequence* sequence, Panel* panel, Py_ssize_t first, Py_ssize_t last, Py_ssize_t heads,
    float* state
) noexcept nogil:
    """Gives a panel its rows first <= i < last of each of some heads, the keys that they may see, and its scratch."""
    panel.row = first
    panel.rows = last - first
    panel.heads = heads
    panel.lanes = panel.rows * heads
    panel.vectors = vectors_of(panel.lanes)
    panel.few = sequence.short and panel.lanes <= FEW
    panel.first_key = max(<Py_ssize_t> 0, first + sequence.offset - x.left)
    panel.last_key = min(sequence.Lk - 1, last - 1 + sequence.offset + x.right)
    panel.m = state
    panel.l = panel.m + PANEL
    panel.factor = panel.l + PANEL
    panel.shift = panel.factor + PANEL
    panel.lift = panel.shift + PANEL
    panel.step = panel.lift + PANEL
    panel.slope = panel.step + PANEL
    panel.o = panel.slope + PANEL
    panel.q = panel.o + round_up(x.Dv, LANES) * PANEL
    panel.codes = <int*> (panel.q + floats_of_queries(x) * PANEL)


# ---------------------------------------------------------------------------------------------------------------------
# One task


cdef void fold_keys(
    const Problem* x, const Head* head, Panel* panels, Py_ssize_t n, Py_ssize_t block, Py_ssize_t low, Py_ssize_t high,
    bint precise, const Scratch* scratch, bint careful
) noexcept nogil:
    """Folds keys low <= c < high of the block that starts at key `block` into n panels: they are loaded once."""
    cdef Block keys
    cdef Py_ssize_t i, begin = high, end = low
    for i in range(n):
        begin = min(begin, max(low, panels[i].first_key - block))
        end = max(end, min(high, panels[i].last_key + 1 - block))
    if begin >= end:
        return
    load_keys(x, head, block, begin, end, precise, panels[0].few, scratch, &keys)
    load_values(x, head, block, begin, end, precise, panels[0].few, scratch, &keys)
    for i in range(n):
        fold_block(
            x, head, &panels[i], &keys, block, max(low, panels[i].first_key - block),
            min(high, panels[i].last_key + 1 - block), scratch, careful,
        )


cdef void fold_blocks(
    const Problem* x, const Head* head, Panel* panels, Py_ssize_t n, Py_ssize_t begin, Py_ssize_t end,
    const Scratch* scratch, bint careful
) noexcept nogil:
    """Folds every block of keys begin <= j < end (multiples of Bc, or the last key) that one of n panels sees. The keys
    of a block that are computed in float32 though others are codes come first, on their own."""
    cdef Py_ssize_t block, high, middle, number, Bc = keys_of_block(x, panels[0].few)
    cdef Py_ssize_t first_key = max(begin, panels[0].first_key), last_key = min(end - 1, panels[n - 1].last_key)
    if last_key < first_key:
        return
    for number in range(first_key // Bc, last_key // Bc + 1):
        block = number * Bc
        high = min(Bc, last_key + 1 - block)
        middle = 0
        if x.k.kind == INT8:
            middle = max(<Py_ssize_t> 0, min(high, x.precise - block))
            fold_keys(x, head, panels, n, block, 0, middle, True, scratch, careful)
        fold_keys(x, head, panels, n, block, middle, high, False, scratch, careful)


cdef bint may_hide(const Problem* x, const Head* head) noexcept nogil:
    """Whether some row may not see a key whose value could be NaN or inf; codes are neither."""
    cdef Py_ssize_t length = head.sequence.Lk + head.sequence.Lq
    return x.k.kind != INT8 and (head.mask != NULL or head.bias != NULL or x.left < length or x.right < length)


cdef void attend_panels(
    const Problem* x, const Head* head, Panel* panels, Py_ssize_t n, Py_ssize_t begin, Py_ssize_t end,
    const Scratch* scratch
) noexcept nogil:
    """Runs n panels against keys begin <= j < end.

    On the assumption that hidden values are finite. Where an output is not, its panel is run once more with hidden
    values kept out of the products: calls without NaN or inf pay nothing for it.
    """
    cdef Py_ssize_t i
    cdef bint hides = may_hide(x, head)
    for i in range(n):
        begin_panel(x, head, &panels[i])
    fold_blocks(x, head, panels, n, begin, end, scratch, False)
    for i in range(n):
        if hides and not panel_is_finite(x, &panels[i]):
            begin_panel(x, head, &panels[i])
            fold_blocks(x, head, &panels[i], 1, begin, end, scratch, True)


cdef void attend_rows(
    const Problem* x, const Head* head, Py_ssize_t first, Py_ssize_t last, float* memory
) noexcept nogil:
    """Query rows first <= i < last of one head, against every block of keys that one of them sees."""
    cdef Scratch scratch
    cdef float* state = place_scratch(x, &scratch, memory)
    cdef Panel* panels = <Panel*> (state + x.Br // PANEL * panel_floats(x))
    cdef Py_ssize_t vectors = (last - first + LANES - 1) // LANES
    cdef Py_ssize_t i, n = (vectors + VECTORS - 1) // VECTORS
    for i in range(n):
        place_panel(
            x, head.sequence, &panels[i], first + i * vectors // n * LANES,
            min(last, first + (i + 1) * vectors // n * LANES), 1, state + i * panel_floats(x),
        )
    attend_panels(x, head, panels, n, 0, head.sequence.Lk, &scratch)
    for i in range(n):
        end_panel(x, head, &panels[i])


cdef void attend_chunk(
    const Problem* x, const Head* head, Py_ssize_t heads, Py_ssize_t piece, float* memory
) noexcept nogil:
    """All query rows of some heads that share a kv head, against piece number `piece` of the keys that they see: the
    whole answer where there is one piece, else what merge_row() needs of it."""
    cdef Scratch scratch
    cdef Panel panel
    cdef const Sequence* sequence = head.sequence
    cdef Py_ssize_t chunk = chunk_keys(x), begin = (sequence.first_piece + piece) * chunk, r, size = partial_floats(x)
    cdef float* state = place_scratch(x, &scratch, memory)
    cdef float* place
    if sequence.pieces == 1:
        begin, chunk = 0, sequence.Lk
    place_panel(x, sequence, &panel, 0, sequence.Lq, heads, state)
    attend_panels(x, head, &panel, 1, begin, min(sequence.Lk, begin + chunk), &scratch)
    if sequence.pieces == 1:
        end_panel(x, head, &panel)
        return
    place = partial_of(x, head, 0) + piece * size
    for r in range(panel.lanes):
        place[r * sequence.pieces * size] = panel.m[r]
        place[r * sequence.pieces * size + 1] = panel.l[r]
        place[r * sequence.pieces * size + 2] = panel.lift[r]
        panel.l[r] = 1.0
    write_rows(
        &panel, x.Dv, <char*> (place + 3), sequence.Lq * sequence.pieces * size * <Py_ssize_t> sizeof(float),
        sequence.pieces * size * <Py_ssize_t> sizeof(float), FLOAT32,
    )


cdef Py_ssize_t partial_floats(const Problem* x) noexcept nogil:
    """What a chunk leaves of a row: maximum, denominator, lift and running output."""
    return 3 + x.Dv


cdef float* partial_of(const Problem* x, const Head* head, Py_ssize_t row) noexcept nogil:
    """What the chunks leave of a row of a query head, one after another."""
    cdef const Sequence* sequence = head.sequence
    return sequence.partial + (head.h * sequence.Lq + row) * sequence.pieces * partial_floats(x)


cdef Py_ssize_t partial_total(const Problem* x, const Sequence* sequence) noexcept nogil:
    """What they leave of a whole sequence; nothing where there is one chunk."""
    if not sequence.short or sequence.pieces == 1:
        return 0
    return x.H * sequence.Lq * sequence.pieces * partial_floats(x)


cdef Py_ssize_t chunk_keys(const Problem* x) noexcept nogil:
    """Keys of a chunk: whole blocks, of few rows and of more."""
    cdef Py_ssize_t Bc = keys_of_block(x, True)
    return max(<Py_ssize_t> 1, CHUNK_KEYS // Bc) * Bc


cdef void merge_row(const Problem* x, const Head* head, Py_ssize_t row) noexcept nogil:
    """One row's output from those of its chunks, in their order."""
    cdef const Sequence* sequence = head.sequence
    cdef Py_ssize_t piece, d, n, size = partial_floats(x)
    cdef float* first = partial_of(x, head, row)
    cdef float* part
    cdef double m = -INFINITY, l = 0.0
    cdef float factor
    cdef vf sum
    for piece in range(sequence.pieces):
        m = max(m, <double> first[piece * size])
    for piece in range(sequence.pieces):
        part = first + piece * size
        # the weight takes the place of the maximum; what is NaN is so in the denominator, whatever the weight
        part[0] = <float> exp(part[0] - m) if part[0] != -INFINITY else 0.0
        l += <double> part[0] * part[1]
    factor = finish_row(
        m, first[2], l, head.sinks, NULL if head.lse == NULL else head.lse + row * x.lse_stride[1],
    )
    d = 0
    while d < x.Dv:
        n = min(<Py_ssize_t> LANES, x.Dv - d)
        sum = vf_set(0.0)
        for piece in range(sequence.pieces):
            part = first + piece * size
            if part[1] != 0.0:  # the row sees something there
                sum = vf_fma(vf_set(part[0]), vf_load_part(part + 3 + d, n), sum)
        store_part(head.out + row * x.out_stride[1], x.out_kind, d, n, vf_mul(sum, vf_set(factor)))
        d += LANES


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


cdef void place_head(const Problem* x, const Sequence* sequence, Py_ssize_t h, Head* head) noexcept nogil:
    """Where the arrays of query head h and its kv head begin."""
    cdef const Codes* codes = &x.codes
    memset(head, 0, sizeof(head[0]))
    head.sequence = sequence
    head.kv, head.h = h // x.group, h
    head.out = sequence.out + h * x.out_stride[0]
    head.lse = sequence.lse + h * x.lse_stride[0] if sequence.lse != NULL else NULL
    head.sinks = x.sinks + h * x.sinks_stride if x.sinks != NULL else NULL
    head.bias = sequence.bias + h * sequence.bias_stride[0] if sequence.bias != NULL else NULL
    head.mask = sequence.mask + h * sequence.mask_stride[0] if sequence.mask != NULL else NULL
    head.slopes = sequence.slopes + h * x.slopes_stride if sequence.slopes != NULL else NULL
    head.q = sequence.q + h * x.q_stride[0] if sequence.q != NULL else NULL
    if x.k.kind == INT8:
        head.q_codes = sequence.q_codes + h * codes.q_stride[0]
        head.q_scale = sequence.q_scale + h * codes.q_scale_stride[0]
        head.k_scale = codes.k_scale.data + sequence.number * codes.k_scale.sequence + head.kv * codes.k_scale.head
        head.v_scale = codes.v_scale.data + sequence.number * codes.v_scale.sequence + head.kv * codes.v_scale.head
        if codes.k_mean != NULL:
            head.k_mean = codes.k_mean + sequence.number * codes.k_mean_stride[0] + head.kv * codes.k_mean_stride[1]
        if codes.trace != NULL:
            head.trace = codes.trace + (sequence.number * x.H + h) * sequence.Lq * sequence.Lk


cdef Py_ssize_t plan_sequence(const Problem* x, Sequence* sequence, Py_ssize_t first_task) noexcept nogil:
    """Cuts a sequence into tasks, the first of which is number `first_task`; returns how many.

    Rows are cut into blocks. Where they are few enough for one, heads that share a kv head share panels, and keys are
    cut into chunks, on a grid that starts at key 0: what a row's bits depend on is its own keys.
    """
    cdef Py_ssize_t vectors = (sequence.Lq + LANES - 1) // LANES, per_task = x.Br // LANES
    cdef Py_ssize_t chunk = chunk_keys(x), first, last, per_panel
    sequence.first_task = first_task
    sequence.short = sequence.Lq <= PANEL
    if sequence.Lq == 0:
        sequence.units, sequence.pieces = 0, 1
    elif sequence.short:
        per_panel = min(x.group, PANEL // sequence.Lq)
        sequence.units = x.H // x.group * ((x.group + per_panel - 1) // per_panel)
        first = max(<Py_ssize_t> 0, sequence.offset - x.left)
        last = min(sequence.Lk - 1, sequence.Lq - 1 + sequence.offset + x.right)
        sequence.first_piece = first // chunk
        sequence.pieces = last // chunk - first // chunk + 1 if last >= first else 1
    else:
        sequence.units, sequence.pieces = x.H, (vectors + per_task - 1) // per_task
    sequence.tasks = sequence.units * sequence.pieces
    return sequence.tasks


cdef Py_ssize_t keys_met(const Problem* x) noexcept nogil:
    """Keys of a block of the sequence with the most query rows."""
    cdef const Sequence* longest = NULL
    cdef Py_ssize_t s, panels, heads
    for s in range(x.n):
        if longest == NULL or x.sequences[s].Lq > longest.Lq:
            longest = &x.sequences[s]
    if longest == NULL or longest.units == 0 or not longest.short:
        return x.Bc
    panels = longest.units // (x.H // x.group)
    heads = (x.group + panels - 1) // panels
    return min(keys_of_block(x, longest.Lq * heads <= FEW), max(x.Bc, round_up(longest.Lk, ROWS)))


cdef const Sequence* sequence_of(const Problem* x, Py_ssize_t task) noexcept nogil:
    """The sequence that a task belongs to, by bisection."""
    cdef Py_ssize_t low = 0, high = x.n, middle
    while high - low > 1:
        middle = (low + high) // 2
        if x.sequences[middle].first_task <= task:
            low = middle
        else:
            high = middle
    return &x.sequences[low]


cdef void run_task(const Problem* x, Py_ssize_t task, float* scratch) noexcept nogil:
    """Task number `task`: heads that share keys and values are neighbours."""
    cdef Head head
    cdef const Sequence* sequence = sequence_of(x, task)
    cdef Py_ssize_t unit = (task - sequence.first_task) // sequence.pieces
    cdef Py_ssize_t piece = (task - sequence.first_task) % sequence.pieces, panels, p, first, last
    cdef Py_ssize_t vectors = (sequence.Lq + LANES - 1) // LANES
    cdef uint64_t environment = enter_environment()
    if sequence.short:
        panels = sequence.units // (x.H // x.group)
        p = unit % panels
        first, last = p * x.group // panels, (p + 1) * x.group // panels
        place_head(x, sequence, unit // panels * x.group + first, &head)
        attend_chunk(x, &head, last - first, piece, scratch)
    else:
        place_head(x, sequence, unit, &head)
        attend_rows(
            x, &head, piece * vectors // sequence.pieces * LANES,
            min(sequence.Lq, (piece + 1) * vectors // sequence.pieces * LANES), scratch,
        )
    leave_environment(environment)


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


cdef void merge_head(const Problem* x, Py_ssize_t number) noexcept nogil:
    """Outputs of query head number % H of a sequence, if its keys were cut into chunks."""
    cdef const Sequence* sequence = &x.sequences[number // x.H]
    cdef Py_ssize_t i
    cdef Head head
    cdef uint64_t environment = enter_environment()
    if sequence.partial != NULL:
        place_head(x, sequence, number % x.H, &head)
        for i in range(sequence.Lq):
            merge_row(x, &head, i)
    leave_environment(environment)


cdef void merge_heads(const Problem* x, int threads) noexcept nogil:
    cdef Py_ssize_t number
    if threads == 1:
        for number in range(x.n * x.H):
            merge_head(x, number)
    else:
        for number in prange(x.n * x.H, schedule="static", num_threads=threads):
            merge_head(x, number)


# ---------------------------------------------------------------------------------------------------------------------
# From Python's arrays to a Problem


cdef int describe_pages(Pages* pages, array, str kind, bint ragged, Py_ssize_t keys_of_row) except -1:
    """Keys or values. ragged: pages are numbered by their first row. keys_of_row: keys that a row of x holds."""
    cdef const unsigned char[:, :, :, :] x = array.view(np.uint8)
    pages.kind = KINDS[kind]
    pages.data = <const char*> &x[0, 0, 0, 0] if x.shape[0] and x.shape[1] and x.shape[2] else NULL
    pages.head = x.strides[1]
    pages.row = x.strides[2] // keys_of_row
    pages.page = pages.row if ragged else x.strides[0]
    return 0


cdef int describe_scales(Scales* scales, const float[:, :, :] x, bint ragged) except -1:
    """(pages, Hk, page_size), of tokens; or one of each head, (sequences or 1, Hk, 1)."""
    scales.tokens = x.shape[2] > 1
    scales.data = &x[0, 0, 0] if x.shape[0] and x.shape[2] else NULL
    scales.head = x.strides[1] // <Py_ssize_t> sizeof(float)
    scales.page = 1 if ragged else x.strides[0] // <Py_ssize_t> sizeof(float)
    scales.sequence = 0 if x.shape[0] == 1 else x.strides[0] // <Py_ssize_t> sizeof(float)
    return 0


cdef int describe_options(Problem* x, options) except -1:
    """Everything that is a number or belongs to no sequence. options: those of plan.py."""
    cdef const float[:] sinks = options.sinks
    cdef double softcap = options.softcap, scale = options.scale
    cdef uint64_t environment = enter_environment()
    x.left, x.right, x.scale = options.left, options.right, scale
    # any cap within the normal floats: one that rounds to 0 would be none, and its inverse must be finite
    x.softcap = min(max(softcap, <double> FLT_MIN), <double> FLT_MAX) if softcap > 0.0 else 0.0
    leave_environment(environment)
    if sinks is not None:
        x.sinks = &sinks[0] if sinks.shape[0] else NULL
        x.sinks_stride = sinks.strides[0] // <Py_ssize_t> sizeof(float)
    return 0


cdef int describe_bias(Sequence* sequence, const float[:, :, :] bias) except -1:
    cdef Py_ssize_t i
    if bias is not None:
        sequence.bias = &bias[0, 0, 0] if bias.shape[0] and bias.shape[1] and bias.shape[2] else NULL
        for i in range(3):
            sequence.bias_stride[i] = bias.strides[i] // <Py_ssize_t> sizeof(float)
    return 0


cdef int describe_mask(Sequence* sequence, const unsigned char[:, :, :] mask) except -1:
    cdef Py_ssize_t i
    if mask is not None:
        sequence.mask = &mask[0, 0, 0] if mask.shape[0] and mask.shape[1] and mask.shape[2] else NULL
        for i in range(3):
            sequence.mask_stride[i] = mask.strides[i]
    return 0


cdef int run(Problem* x, int threads) except -1:
    """All tasks of a problem. May raise MemoryError before anything is written, and KeyboardInterrupt between tasks."""
    cdef Py_ssize_t tasks = 0, begin, end, chunk, size, total, partial = 0, s, most = 1
    cdef float* scratch
    cdef float* place
    cdef void* memory
    cdef double started = 0.0, elapsed, task_flops = 1.0
    for s in range(x.n):
        tasks += plan_sequence(x, &x.sequences[s], tasks)
        partial += partial_total(x, &x.sequences[s])
        if x.sequences[s].tasks:
            most = max(most, x.sequences[s].Lk)
    if tasks == 0:
        return 0
    threads = <int> min(<Py_ssize_t> threads, tasks)
    size = scratch_floats(x)
    total = (threads * size + partial) * <Py_ssize_t> sizeof(float) + 64
    memory = malloc(total)
    if memory == NULL:
        raise MemoryError(f"cannot allocate {total} bytes of tiles for {threads} threads")
    scratch = <float*> ((<uintptr_t> memory + 63) // 64 * 64)
    place = scratch + threads * size
    for s in range(x.n):
        if partial_total(x, &x.sequences[s]):
            x.sequences[s].partial = place
            place += partial_total(x, &x.sequences[s])

    # The first chunk is sized for a slow machine (10 GFLOP/s a thread), the next ones by what was measured.
    task_flops += 2.0 * x.Br * most * (x.D + x.Dv)
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
        if partial:
            with nogil:
                merge_heads(x, threads)
    finally:
        free(memory)
    return 0


def tile_bytes(
    Py_ssize_t Br, Py_ssize_t Bc, Py_ssize_t D, Py_ssize_t Dv, str k_kind="fp32", str v_kind="fp32", str product="fp32",
    Py_ssize_t precise=0, bint native=False, page_size=None
):
    """Bytes of scratch that one thread allocates for tasks of Br query rows and blocks of Bc keys; arguments as in
    forward()."""
    cdef Problem x
    memset(&x, 0, sizeof(x))
    x.Br, x.Bc, x.D, x.Dv, x.precise, x.native = Br, Bc, D, Dv, precise, native
    x.page_size = UNPAGED if page_size is None else page_size
    x.k.kind, x.v.kind, x.codes.product = KINDS[k_kind], KINDS[v_kind], KINDS[product]
    return scratch_floats(&x) * sizeof(float)


def forward(
    q, str q_kind not None, stored not None, const Py_ssize_t[:, ::1] sequences not None,
    const Py_ssize_t[:, ::1] pages not None, codes, out not None, str out_kind not None, float[:, :, :] lse,
    options not None, bint ragged, bint native, Py_ssize_t Br, Py_ssize_t Bc, int threads,
):
    """Attention of checked arrays (attention.py). Writes out and, unless None, lse; returns the bytes of scratch of one
    thread and the keys of a block, as they were.

    q: (B, H, Lq, D), of kind q_kind; None where codes are enough. out, lse: (B, H, Lq, Dv), (B, H, Lq). stored: a
    Stored (stored.py). sequences: (n, 5) of number, index along B, Lq, Lk, offset.
    pages: (n, P), page numbers. ragged: B is 1 everywhere, sequences lie one after another along L, and an index or a
    page number is that of the first token. codes: an operands.Codes, or None where stored is floats. options: a Plan
    (plan.py), its bias and mask by number of the sequence. native: q, k and v are bfloat16, and so are the products.

    The last axes of q, k, v and out are contiguous. Br and Bc are multiples of PANEL and ROWS. May raise MemoryError
    before anything is written, and KeyboardInterrupt between two tasks.
    """
    cdef Problem x
    cdef const unsigned char[:, :, :, :] q_bytes = None if q is None else q.view(np.uint8)
    cdef unsigned char[:, :, :, :] out_bytes = out.view(np.uint8)
    cdef const float[:, :] slopes = options.alibi_slopes
    cdef Py_ssize_t s, number, first, axis = 2 if ragged else 0
    cdef Sequence* sequence
    bias, mask = options.bias, options.mask
    memset(&x, 0, sizeof(x))
    x.n, x.H, x.group = sequences.shape[0], out_bytes.shape[1], out_bytes.shape[1] // stored.k.shape[1]
    x.D, x.Dv, x.Br, x.Bc, x.native = stored.D, stored.Dv, Br, Bc, native
    x.page_size = UNPAGED if stored.page_size is None else stored.page_size
    describe_options(&x, options)
    describe_pages(&x.k, stored.k, stored.kind, ragged, 1)
    describe_pages(&x.v, stored.v, stored.v_kind, ragged, 4 if stored.v_kind == "int8" else 1)
    x.q_kind, x.out_kind = KINDS[q_kind], KINDS[out_kind]
    x.out_stride[0], x.out_stride[1] = out_bytes.strides[1], out_bytes.strides[2]
    if q is not None:
        x.q_stride[0], x.q_stride[1] = q_bytes.strides[1], q_bytes.strides[2]
    if lse is not None:
        x.lse_stride[0] = lse.strides[1] // <Py_ssize_t> sizeof(float)
        x.lse_stride[1] = lse.strides[2] // <Py_ssize_t> sizeof(float)
    if slopes is not None:
        x.slopes_stride = slopes.strides[1] // <Py_ssize_t> sizeof(float)
    if codes is not None:
        describe_codes(&x, stored, codes, ragged)
    x.sequences = <Sequence*> calloc(x.n, sizeof(Sequence))
    if x.sequences == NULL:
        raise MemoryError(f"cannot allocate what is to be known of {x.n} sequences")
    try:
        for s in range(x.n):
            sequence = &x.sequences[s]
            number, first = sequences[s, 0], sequences[s, 1]
            sequence.number, sequence.Lq, sequence.Lk = number, sequences[s, 2], sequences[s, 3]
            sequence.offset = sequences[s, 4]
            sequence.pages = &pages[s, 0]
            sequence.out = <char*> &out_bytes[0, 0, 0, 0] + first * out_bytes.strides[axis]
            if q is not None:
                sequence.q = <const char*> &q_bytes[0, 0, 0, 0] + first * q_bytes.strides[axis]
            if lse is not None:
                sequence.lse = &lse[0, 0, 0] + first * (lse.strides[axis] // <Py_ssize_t> sizeof(float))
            if slopes is not None:
                sequence.slopes = &slopes[number, 0]
            if bias is not None:
                describe_bias(sequence, bias[number])
            if mask is not None:
                describe_mask(sequence, mask[number])
            if codes is not None:
                describe_coded_queries(sequence, codes, first, axis)
        run(&x, threads)
        return scratch_floats(&x) * sizeof(float), keys_met(&x)
    finally:
        free(x.sequences)


cdef int describe_codes(Problem* x, stored, codes, bint ragged) except -1:
    """The operands of quantised attention (operands.py) but for the queries of each sequence."""
    cdef const int[:, :, :] correction = stored.k_correction
    cdef const float[:, :, :] mean = stored.k_mean
    cdef const signed char[:, :, :, :] q = codes.q
    cdef const float[:, :, :] q_scale = codes.q_scale
    cdef unsigned char[:, :, :, ::1] trace = codes.trace
    cdef Py_ssize_t i
    x.precise = stored.fp32_sinks
    x.codes.product = KINDS[codes.pv]
    for i in range(2):
        x.codes.q_stride[i] = q.strides[i + 1]
        x.codes.q_scale_stride[i] = q_scale.strides[i + 1] // <Py_ssize_t> sizeof(float)
    x.codes.k_correction = &correction[0, 0, 0] if correction.shape[0] and correction.shape[2] else NULL
    x.codes.k_correction_page = 1 if ragged else correction.strides[0] // <Py_ssize_t> sizeof(int)
    x.codes.k_correction_head = correction.strides[1] // <Py_ssize_t> sizeof(int)
    describe_scales(&x.codes.k_scale, stored.k_scale, ragged)
    if stored.v_scale is not None:
        describe_scales(&x.codes.v_scale, stored.v_scale, ragged)
    if mean is not None:
        x.codes.k_mean = &mean[0, 0, 0]
        x.codes.k_mean_stride[0] = 0 if mean.shape[0] == 1 else mean.strides[0] // <Py_ssize_t> sizeof(float)
        x.codes.k_mean_stride[1] = mean.strides[1] // <Py_ssize_t> sizeof(float)
    if x.precise:
        describe_pages(&x.first_k, stored.float_k, "fp32", False, 1)
        describe_pages(&x.first_v, stored.float_v, "fp32", False, 1)
    x.codes.trace = &trace[0, 0, 0, 0] if trace is not None else NULL
    return 0


cdef int describe_coded_queries(Sequence* sequence, codes, Py_ssize_t first, Py_ssize_t axis) except -1:
    cdef const signed char[:, :, :, :] q = codes.q
    cdef const float[:, :, :] q_scale = codes.q_scale
    sequence.q_codes = &q[0, 0, 0, 0] + first * q.strides[axis]
    sequence.q_scale = &q_scale[0, 0, 0] + first * (q_scale.strides[axis] // <Py_ssize_t> sizeof(float))
    return 0


include "inspect.pxi"

SHAPE = {
    "LANES": LANES, "VECTORS": VECTORS, "ROWS": ROWS, "PANEL": PANEL, "PART_KEYS": PART_KEYS, "GROUP": GROUP,
    "BF16_GROUP": BF16_GROUP,
}

include "quantise.pxi"
include "store.pxi"
