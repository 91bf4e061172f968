"""Arrays beside inaccessible memory: a kernel that touches what it must not dies, whatever the instructions it uses.

Run as `python guarded.py SCENARIO BUILD...` by test_skipping.py, for each build in a process of its own: it may die.
"""
import ctypes
import itertools
import mmap
import os
import sys
import traceback
from contextlib import contextmanager
from unittest import mock

import cases
import halves
import numpy as np

import cyflash
from cyflash import FlashAttentionConfig, arrays, flash_attention, flash_attention_int8, operands, quantize
from cyflash.attention import attend_stored
from cyflash.cpu import observe
from cyflash.quant import histogram
from cyflash.quantized import Encoding

PAGE = mmap.PAGESIZE
PROT_NONE, PROT_ALL = 0, mmap.PROT_READ | mmap.PROT_WRITE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def protect(address, size, access=PROT_NONE):
    """Set the access of whole pages."""
    assert address % PAGE == 0 and size % PAGE == 0
    if _libc.mprotect(address, size, access):
        raise OSError(ctypes.get_errno(), "mprotect")


def forbid(x, start, stop):
    """Make the whole pages within rows start..stop of a C-contiguous 2-D array inaccessible; return how many rows."""
    base, row = x.ctypes.data, x.strides[0]
    first, last = -(-(base + start * row) // PAGE) * PAGE, (base + stop * row) // PAGE * PAGE
    if last > first:
        protect(first, last - first)
    return max(0, last - first) // row


def allow(x):
    """Undo every `forbid` in x."""
    first = x.ctypes.data // PAGE * PAGE
    protect(first, -(-(x.ctypes.data + x.nbytes - first) // PAGE) * PAGE, PROT_ALL)


def pages(x):
    """A copy of x that starts on a page of its own."""
    memory = mmap.mmap(-1, -(-x.nbytes // PAGE) * PAGE)
    copy = np.frombuffer(memory, x.dtype, x.size).reshape(x.shape)
    copy[...] = x
    return copy


class Fence:
    """Room for one array between two inaccessible pages."""

    def __init__(self, size):
        self.size = -(-size // PAGE) * PAGE
        self.memory = mmap.mmap(-1, self.size + 2 * PAGE)
        address = np.frombuffer(self.memory, np.uint8).ctypes.data
        protect(address, PAGE)
        protect(address + PAGE + self.size, PAGE)

    def put(self, x, at_end=True):
        """A copy of x that ends, or starts, right at the fence."""
        offset = PAGE + (self.size - x.nbytes if at_end else 0)
        copy = np.frombuffer(self.memory, x.dtype, x.size, offset).reshape(x.shape)
        copy[...] = x
        return copy


def _never_reads_keys(start, stop, Lq, Lk, **options):
    """The whole tiles within rows start..stop of K and V, with small tiles and with the build's own."""
    D = 64
    q, k, v = (pages(x[0, 0]) for x in cases.arrays(Lq=Lq, Lk=Lk, D=D))
    small = FlashAttentionConfig(head_dim=D, num_heads=1, block_size_q=32, block_size_kv=64)
    for how, (_, Bc) in [({"config": small}, cyflash.cpu.tile_sizes(32, 64)), ({}, cyflash.cpu.tile_sizes())]:
        for threads in (1, 2):
            expected = flash_attention(q, k, v, **options, **how, num_threads=threads, return_lse=True)
            first, last = -(-start // Bc) * Bc, (stop // Bc * Bc if stop < Lk else Lk)
            count = [forbid(x, first, last) for x in (k, v)]
            assert min(count) > 100, "nothing was made inaccessible"
            result = flash_attention(q, k, v, **options, **how, num_threads=threads, return_lse=True)
            allow(k), allow(v)
            cases.assert_same_bits(result, expected)


def causal():
    _never_reads_keys(96, 2048, 96, 2048, causal=True, causal_align="top-left")


def window():
    """The last queries see only the last keys."""
    _never_reads_keys(0, 2048 - 96 - 40, 96, 2048, window=(40, -1))


def window_right():
    _never_reads_keys(96 + 30, 2048, 96, 2048, window=(-1, 30), causal_align="top-left")


def causal_window():
    _never_reads_keys(0, 2048 - 96 - 40, 96, 2048, causal=True, window=(40, 0))


def mask_block():
    """A hole in the middle that every row has."""
    mask = np.random.default_rng(0).random((96, 2048)) < 0.5
    mask[:, 512:1536] = False
    _never_reads_keys(512, 1536, 96, 2048, mask=mask)


def mask_padding():
    """One row of mask for all queries, as padded batches have it."""
    _never_reads_keys(700, 2048, 96, 2048, mask=np.arange(2048) < 700)


def mask_rows():
    """All queries masked: no key is read at all."""
    _never_reads_keys(0, 2048, 96, 2048, mask=np.zeros((96, 1), bool))


def mask_with_options():
    mask = np.arange(2048) < 700
    _never_reads_keys(700, 2048, 96, 2048, mask=mask, softcap=5.0, window=(2000, 2000),
                                     alibi_slopes=np.array([0.1], np.float32), sinks=np.array([0.1], np.float32))


def one_query():
    """A single row over many keys skips too."""
    _never_reads_keys(0, 60000, 1, 65536, window=(5000, 0))


def bias_of_skipped_tiles():
    """Bias is not read where causal leaves nothing."""
    Lq, Lk, D = 64, 8192, 16
    q, k, v = (x[0, 0] for x in cases.arrays(Lq=Lq, Lk=Lk, D=D))
    bias = pages(np.random.default_rng(0).standard_normal((Lq, Lk), dtype=np.float32))
    Bc = cyflash.cpu.tile_sizes()[1]
    first = -(-max(Lq, Bc) // 1024) * 1024
    expected = flash_attention(q, k, v, bias=bias, causal=True, causal_align="top-left", return_lse=True)
    for i in range(Lq):
        assert forbid(bias.reshape(-1, 1), i * Lk + first, (i + 1) * Lk) >= 4096
    result = flash_attention(q, k, v, bias=bias, causal=True, causal_align="top-left", return_lse=True)
    cases.assert_same_bits(result, expected)


def beyond_the_ends():
    """No argument is read, and out not written, one byte before its start or after its end."""
    fences = [Fence(1 << 17) for _ in range(8)]
    dims = [(1, 1), (3, 2), (7, 9), (15, 17), (16, 16), (17, 1), (33, 31), (64, 64), (65, 127), (1, 70), (130, 3)]
    for D, Dv in dims:
        for Lq in (1, 5, 16, 47, 49):
            for Lk in (1, 7, 8, 9, 33, 66):
                q, k, v = (x[0] for x in cases.arrays(1, 2, 1, Lq, Lk, D, Dv))
                for options in ({}, cases.all_options(1, 2, Lq, Lk)):
                    options = {key: x[0] if key in ("bias", "mask") else x for key, x in options.items()}
                    expected = flash_attention(q, k, v, **options, return_lse=True)
                    for at_end in (True, False):
                        put = iter(fences)
                        arrays = [next(put).put(x, at_end) for x in (q, k, v)]
                        beside = {key: next(put).put(x, at_end) if isinstance(x, np.ndarray) else x
                                  for key, x in options.items()}
                        out = next(put).put(np.full_like(expected[0], np.nan), at_end)
                        result = flash_attention(*arrays, **beside, out=out, return_lse=True)
                        cases.assert_same_bits(result, expected)


def beyond_the_ends_of_halves():
    """The same for float16 and bfloat16, where an odd number of them ends in the middle of a word."""
    fences = [Fence(1 << 16) for _ in range(4)]
    dims = [(1, 1), (3, 2), (7, 9), (15, 17), (16, 16), (17, 1), (33, 31), (64, 64), (65, 127)]
    for dtype in halves.installed():
        for D, Dv in dims:
            for Lq, Lk in itertools.product((1, 5, 16, 49), (1, 7, 8, 33, 66)):
                qkv = [x[0].astype(dtype) for x in cases.arrays(1, 2, 1, Lq, Lk, D, Dv)]
                for options in ({}, {"mask": np.arange(Lk) != Lk // 2}):
                    expected = flash_attention(*qkv, **options)
                    for at_end in (True, False):
                        put = iter(fences)
                        fenced = [next(put).put(x, at_end) for x in qkv]
                        out = next(put).put(np.full_like(expected, np.nan), at_end)
                        flash_attention(*fenced, **options, out=out)
                        halves.assert_same_bits(out, expected)


def observing():
    """The passes of calibration."""
    fence = Fence(PAGE)
    for D in (1, 3, 4, 5, 8, 17, 64):
        x = cases.arrays(1, 1, Lq=3, D=D)[0][0]
        for at_end, dtype in itertools.product((True, False), (np.float32, *halves.installed())):
            y = fence.put(x.astype(dtype), at_end)
            observe.fingerprints(y, None, np.zeros(1, np.uint64), 1)
            observe.sum_channels(y, None, 1.0, np.zeros((1, D), np.int64), 1)
            histogram.Counts.zeros(1).observe(y)


def beyond_the_ends_int8():
    """The same for codes and scales; nor is what a call makes of them touched outside: codes, packed groups, scales."""
    call_fences, made_fences = ([Fence(1 << 17) for _ in range(16)] for _ in range(2))
    dims = [(1, 1), (3, 2), (7, 9), (15, 17), (16, 16), (17, 1), (33, 31), (64, 64), (65, 127), (1, 70), (130, 3)]
    kinds = itertools.cycle(itertools.product(("float", "codes", "tensors"), ("int8", "bf16", "fp32"), (0, 1, 9)))
    for D, Dv in dims:
        for Lq in (1, 5, 16, 47, 49):
            for Lk in (1, 7, 8, 9, 33, 66, 129):
                for options in ({}, cases.all_options(1, 2, Lq, Lk)):
                    kind, pv, n = next(kinds)
                    call = _operands(kind, min(n, Lk), *(x[0] for x in cases.arrays(1, 2, 1, Lq, Lk, D, Dv)))
                    options = {key: x[0] if key in ("bias", "mask") else x for key, x in options.items()}
                    call |= options | {"pv": pv, "return_lse": True}
                    expected = flash_attention_int8(**call)
                    for at_end in (True, False):
                        put = iter(call_fences)
                        fenced = {key: _fenced(put, x, at_end) for key, x in call.items()}
                        out = next(put).put(np.full_like(expected[0], np.nan), at_end)
                        with _fencing_what_is_made(made_fences, at_end):
                            result = flash_attention_int8(**fenced, out=out)
                        cases.assert_same_bits(result, expected)


def _operands(kind, n, q, k, v):
    """Arguments of a call: operands of one kind, n keys in float32 where that can be."""
    if kind == "codes":
        tensors = dict(zip("qkv", (quantize(x, "token") for x in (q, k, v)), strict=True))
        scales = {f"{name}_scale": x.scale for name, x in tensors.items()}
        return {name: x.data for name, x in tensors.items()} | scales
    if kind == "tensors":
        k, v = quantize(k, "head", smooth=True, fp32_sinks=n), quantize(v, "token", fp32_sinks=n)
    return {"q": q, "k": k, "v": v, "fp32_sinks": n}


def _fenced(put, x, at_end):
    """x, or a QuantizedTensor's arrays, each at a fence."""
    if isinstance(x, np.ndarray):
        return next(put).put(x, at_end)
    if isinstance(x, cyflash.QuantizedTensor):
        parts = (x.data, x.scale, x.mean, x.fp32_rows)
        return cyflash.QuantizedTensor(*(None if part is None else _fenced(put, part, at_end) for part in parts))
    return x


@contextmanager
def _fencing_what_is_made(fences, at_end):
    """Inside, all arrays that a call of int8 attention makes for the kernels lie at fences."""
    put, prepare = iter(fences), operands.prepare

    def together(others, **wanted):
        return {name: next(put).put(np.empty(*how), at_end) for name, how in wanted.items()}

    def fenced(operands):
        return operands._replace(**{
            name: _fenced(put, x, at_end)
            for name, x in operands._asdict().items() if isinstance(x, np.ndarray)
        })

    def prepared(*arguments):
        floats, stored, codes = prepare(*arguments)
        return floats, fenced(stored), fenced(codes)

    with mock.patch.object(arrays, "together", together), mock.patch.object(operands, "prepare", prepared):
        yield


def _apart(stored):
    """`stored` with every page at the end of accessible memory of its own; a function that forbids page i."""
    n, starts = len(stored.k), []

    def moved(x):
        if x is None or len(x) != n or x.shape[2] not in (stored.page_size, stored.page_size // 4):
            return x
        x = np.ascontiguousarray(x)
        room = -(-x[0].nbytes // PAGE) * PAGE
        memory = mmap.mmap(-1, PAGE + n * (room + PAGE))
        first = np.frombuffer(memory, np.uint8).ctypes.data
        copy = np.ndarray(x.shape, x.dtype, memory, PAGE + room - x[0].nbytes, (room + PAGE, *x.strides[1:]))
        copy[...] = x
        for i in range(n + 1):
            protect(first + i * (room + PAGE), PAGE)
        starts.append((first + PAGE, room))
        return copy

    names = ("k", "v", "k_correction", "k_scale", "v_scale")
    apart = stored._replace(**{name: moved(getattr(stored, name)) for name in names})
    return apart, lambda i: [protect(first + i * (room + PAGE), room) for first, room in starts]


def pages_of_a_cache():
    """Neither pages of other rows, nor those before a window, nor a byte beyond a page."""
    for dtype in ("fp32", "fp16", "bf16", "int8"):
        for page_size, left in ((16, None), (48, None), (64, 100), (256, 700)):
            cache = cyflash.PagedKVCache(4096 // page_size, page_size, 2, 24, dtype, v_head_dim=20)
            rows = [cache.add(), cache.add()]
            _, k, v = cases.arrays(2, 2, Lq=1900, D=24, Dv=20)
            for start in range(0, 1900, 100):
                now = np.s_[:, :, start : start + 100]
                cache.append(k[now], v[now], rows=rows, lengths=[100, 30])
            for Lq, threads in ((1, 1), (1, 3), (5, 2), (60, 1)):
                q = cases.arrays(1, 4, 2, Lq, 1, 24)[0]
                options = {"causal": True, "window": None if left is None else (left, 0), "return_lse": True}
                options["num_threads"] = threads
                stored, table, keys = cache._stored(np.array(rows[:1]))
                expected = attend_stored(q, stored, table, keys, **options)
                apart, forbid_page = _apart(stored)
                first = 0 if left is None else (1900 - Lq - left) // 512 * 512 // page_size
                assert left is None or first > 0
                needed = table[0, first : -(-1900 // page_size)]
                for i in set(range(len(stored.k))) - set(needed.tolist()):
                    forbid_page(i)
                table = np.array(table)
                table[0, :first] = -1
                cases.assert_same_bits(attend_stored(q, apart, table, keys, **options), expected)


def quantising():
    """The passes that quantise: neither inputs nor outputs are touched outside, whatever the tails."""
    build = cyflash.cpu.active()
    fences = [Fence(1 << 15) for _ in range(9)]
    for D in (1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 67, 100):
        for L in (1, 4, 15, 17, 40):
            x = cases.arrays(1, 2, Lq=L, D=D)[0]
            zeros = [np.zeros(shape, np.float32) for shape in ((1, 2, D), (1, 2), (1, 2, L))]
            kinds = [x, *(x.astype(dtype) for dtype in halves.installed())]
            for at_end, x in itertools.product((True, False), kinds):
                put = iter(fences)
                x, mean, top, found = (next(put).put(y, at_end) for y in (x, *zeros))
                given = next(put).put(np.ones_like(found), at_end)
                codes = next(put).put(np.zeros(x.shape, np.int8), at_end)
                k = next(put).put(np.zeros((1, 2, L, -(-D // 4) * 4), np.int8), at_end)
                v = next(put).put(np.zeros((1, 2, -(-L // 4), -(-D // 16) * 16), np.int32), at_end)
                correction = next(put).put(np.zeros((1, 2, L), np.int32), at_end)
                for skip in (0, 1):
                    assert build.find_range(x, skip, True, mean, top, 1)
                    for how in (
                        Encoding(x, codes, mean, None, found, skip), Encoding(x, codes, None, given, None, skip, True),
                        Encoding(x, k, mean, None, found, skip, False, "keys", correction),
                        Encoding(x, v, None, given, None, skip, False, "values"),
                    ):
                        assert build.encode([how], 1)[0] >= 0


def converting():
    """Loads and stores of 16-bit floats, with every tail."""
    build = cyflash.cpu.active()
    fences = [Fence(PAGE) for _ in range(4)]
    for n in range(1, 40):
        for at_end in (True, False):
            floats, bits = fences[0].put(np.ones(n, np.float32), at_end), fences[1].put(np.ones(n, np.uint16), at_end)
            to_floats, to_bits = fences[2].put(floats, at_end), fences[3].put(bits, at_end)
            for kind in ("fp16", "bf16"):
                build.load_bits(bits, to_floats, kind)
                build.store_bits(floats, to_bits, kind)


def control():
    """Reads what is forbidden: must die, or the others prove nothing."""
    x = pages(np.ones((1024, 64), np.float32))
    assert forbid(x, 512, 1024) == 512
    print("alive", flush=True)
    print(x[600, 0])


def control_fence():
    x = Fence(PAGE).put(np.ones(5, np.float32))
    print("alive", flush=True)
    print(np.lib.stride_tricks.as_strided(x, (6,))[5])


def control_skipping():
    """Without causal the same keys are visible, so the kernel itself must die."""
    print("alive", flush=True)
    _never_reads_keys(96, 2048, 96, 2048)


SCENARIOS = (
    causal, window, window_right, causal_window, mask_block, mask_padding, mask_rows, mask_with_options, one_query,
    bias_of_skipped_tiles, pages_of_a_cache, beyond_the_ends, beyond_the_ends_int8, quantising,
    converting, observing, beyond_the_ends_of_halves,
)
CONTROLS = (control, control_fence, control_skipping)



def in_a_child(scenario, build):
    """The exit status of a process forked for it, which need not import everything again; no thread is started yet."""
    sys.stdout.flush()
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        with cyflash.set_implementation(build):
            scenario()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    for build in sys.argv[2:]:
        print(build, in_a_child(globals()[sys.argv[1]], build))
