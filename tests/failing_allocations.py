"""Every allocation of a call fails once: MemoryError, nothing leaked, nothing changed, and the next call is right.

Run as `python failing_allocations.py BUILD [NAME]` by test_allocations.py, in a process with the allocator of
allocator.py. Prints a line of JSON for each kind of call.

That is every request by our modules, and those of at least LEAST bytes by NumPy and Python: of arrays, but for the
smallest. NumPy 2.4 itself ends with SIGSEGV where some iterators get no memory, as in `x * y[:, None]`, and raises
SystemError in other places: what merges arrays in NumPy is made to fail where only arrays are as large.
"""
import ctypes
import gc
import itertools
import json
import sys
import traceback
from array import array

import allocator
import cases
import numpy as np

import cyflash
from cyflash.quant import Calibrator

REPEATS = 4  # of one failure; what leaks does so each time, what a cache of Python or NumPy keeps does not
MOST = 5000  # allocations of a call, far above what any makes
LEAST, LEAST_IN_NUMPY = 8192, 1 << 17


def _qkv(B=1, H=4, Lq=90, Lk=70, **how):
    return cases.arrays(B, H, 1, Lq, Lk, 24, **how)


def attention():
    q, k, v = _qkv()
    options = cases.all_options(1, 4, 90, 70)
    return None, lambda _: cyflash.flash_attention(q, k, v, **options, return_lse=True)


def attention_of_strided():
    """Arrays that are copied first, and an output that is copied afterwards."""
    q, k, v = (np.repeat(x, 2, axis=-1)[..., ::2] for x in _qkv())
    out = np.zeros((*q.shape, 2), np.float32)[..., 0]
    return None, lambda _: (cyflash.flash_attention(q, k, v, out=out),)


def few_rows_of_many_keys():
    """What chunks of keys leave is a part of the scratch."""
    q, k, v = _qkv(Lq=1, Lk=3000)
    return None, lambda _: (cyflash.flash_attention(q, k, v),)


def int8():
    q, k, v = _qkv()
    return None, lambda _: cyflash.flash_attention_int8(q, k, v, fp32_sinks=2, return_lse=True)


def int8_static():
    q, k, v = _qkv()
    given = {f"{name}_scale": 0.03 for name in "qkv"}
    return None, lambda _: (cyflash.flash_attention_int8(q, k, v, **given, pv="bf16"),)


def int8_of_codes():
    tensors = [cyflash.quantize(x, "token") for x in _qkv()]
    return None, lambda _: cyflash.flash_attention_int8(*tensors, return_lse=True)


def varlen():
    q, k, v = (np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in _qkv(Lq=70))
    ends = np.array([0, 3, 3, 70], np.int32)
    return None, lambda _: (cyflash.flash_attention_varlen(q, k, v, ends, ends),)


def int8_varlen():
    q, k, v = (np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in _qkv(Lq=70))
    ends = np.array([0, 3, 3, 70], np.int32)
    return None, lambda _: (cyflash.flash_attention_int8_varlen(q, k, v, ends, ends),)


def quantize():
    x = _qkv()[1]

    def call(_):
        result = cyflash.quantize(x, "token", smooth=True, fp32_sinks=2)
        return result.data.astype(np.float32), result.scale, result.mean, result.fp32_rows

    return None, call


def merge():
    q, k, v = _qkv(Lq=400)
    first = cyflash.flash_attention(q, k[:, :, :30], v[:, :, :30], return_lse=True)
    second = cyflash.flash_attention(q, k[:, :, 30:], v[:, :, 30:], return_lse=True)
    return None, lambda _: cyflash.merge_states(*first, *second)


def _cached(cache, dtype, rows=None):
    """A call appends and attends: after a failure the tokens are in the cache, or nothing is changed."""
    _, k, v = _qkv(B=2, Lq=40, Lk=40)
    q = _qkv(B=2, Lq=3)[0]
    more = [x[:, :, :12] for x in _qkv(B=2, Lq=40, Lk=40, seed=1)[1:]]

    def state():
        made, numbers = cache(dtype)
        made.append(k, v, **numbers)
        return made, numbers

    def call(state):
        made, numbers = state
        return cyflash.flash_attention_with_kvcache(q, made, *more, **numbers, return_lse=True)

    def held(state):
        made, numbers = state
        lengths = set(np.asarray(made.lengths)[:2].tolist())
        assert lengths in ({40}, {52}), lengths
        return lengths == {52}, cyflash.flash_attention_with_kvcache(q, made, **numbers, return_lse=True)

    return state, call, held


def _grown(dtype):
    return cyflash.KVCache(2, 1, 24, 41, dtype, grow=True), {}


def _windowed(dtype):
    return cyflash.KVCache(2, 1, 24, 60, dtype, window=(20, 0)), {}


def _paged(dtype):
    cache = cyflash.PagedKVCache(24, 16, 1, 24, dtype)
    return cache, {"rows": [cache.add(), cache.add()]}


def _append_only(cache, dtype):
    state, _, held = _cached(cache, dtype)
    _, k, v = _qkv(B=2, Lq=12, Lk=12, seed=1)

    def call(state):
        made, numbers = state
        made.append(k, v, **numbers)
        return (np.asarray(made.lengths, np.float32),)

    return state, call, held


def many_rows():
    """Tables of pages that are arrays of some size themselves; and pages that are given up."""
    rows = 1100
    k, v = (cases.arrays(rows, 1, Lq=9, D=2, seed=seed)[0] for seed in (0, 1))

    def state():
        cache = cyflash.KVCache(rows, 1, 2, 60, window=(8, 0))
        cache.append(k, v)
        cache.append(k[:, :, :7], v[:, :, :7])
        return cache

    def call(cache):
        cache.append(k[:, :, :8], v[:, :, :8])
        return (np.zeros(1, np.float32),)

    def held(cache):
        assert set(cache.lengths.tolist()) == {16}, cache.lengths
        return False, (cyflash.flash_attention_with_kvcache(k[:, :, :1], cache),)

    return state, call, held


def observe():
    """What a failure leaves of a calibrator is what it was."""
    first, second = _qkv(Lq=50), _qkv(Lq=50, seed=1)

    def state():
        calibrator = Calibrator()
        calibrator.observe("layer", *first)
        return calibrator

    def call(calibrator):
        calibrator.observe("layer", *second)
        return (np.zeros(1, np.float32),)

    def held(calibrator):
        calibrator.observe("layer", *second)
        assert calibrator.summary()[0]["observations"] == 2
        scales = calibrator.compute("max")["layer"]
        return False, tuple(np.asarray(x, np.float32) for x in (scales.q_scale, scales.k_scale, scales.v_scale))

    return state, call, held


CALLS = {
    "flash_attention": attention, "flash_attention, copies": attention_of_strided,
    "flash_attention, chunks": few_rows_of_many_keys, "flash_attention_int8": int8,
    "flash_attention_int8, static": int8_static, "flash_attention_int8, codes": int8_of_codes,
    "flash_attention_varlen": varlen, "flash_attention_int8_varlen": int8_varlen, "quantize": quantize,
    "merge_states": merge,
    "append, growing": lambda: _append_only(_grown, "fp32"),
    "append, int8, growing": lambda: _append_only(_grown, "int8"),
    "append, int8, window": lambda: _append_only(_windowed, "int8"),
    "append, pages": lambda: _append_only(_paged, "int8"),
    "append, many rows": many_rows,
    "with_kvcache, growing": lambda: _cached(_grown, "fp32"), "with_kvcache, int8": lambda: _cached(_windowed, "int8"),
    "with_kvcache, pages": lambda: _cached(_paged, "bf16"), "observe": observe,
}


def _is_of_numpy(error):
    """Whether a function that Python code called raised a SystemError: Python code of ours never does."""
    if not isinstance(error, SystemError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename.endswith(".py")


def every_allocation_fails(allocator, name, repeats=REPEATS):
    """{"allocations": of one call, "wrong": what was not as promised}."""
    least = LEAST_IN_NUMPY if name == "merge_states" else LEAST
    allocator.watch({"cyflash/cpu/": 0, "_multiarray_umath": least, "python3": least})
    state, call, held = (*CALLS[name](), None)[:3]
    state = state or (lambda: None)
    for _ in range(3):  # what is imported, compiled or remembered at first
        expected = call(state())
        before = held(state())[1] if held else None
    wrong, n, failed, lives = [], 0, True, array("q", [0] * repeats)
    gc.collect()
    gc.freeze()  # collections look only at what the calls below make
    while failed and n < MOST:
        n += 1
        for repeat in range(repeats):
            at, result, error = state(), None, None
            allocator.fail(n)
            try:
                result = call(at)
            except BaseException as raised:
                error = raised
            try:
                failed = allocator.has_failed()
            except (MemoryError, ctypes.ArgumentError):
                failed = False
            if error is not None and not isinstance(error, MemoryError) and not _is_of_numpy(error):
                wrong.append(f"allocation {n}: {error!r}")
            error = None
            try:
                if result is not None:
                    cases.assert_same_bits(result, expected)
                else:
                    done = False
                    if held:
                        done, bits = held(at)
                        cases.assert_same_bits(bits, expected if done else before)
                    if not done:
                        cases.assert_same_bits(call(at), expected)
            except Exception as problem:
                wrong.append(f"after allocation {n} failed: {problem!r}")
            at = result = bits = None
            gc.collect()
            lives[repeat] = allocator.live()
        more = [b - a for a, b in itertools.pairwise(lives)]
        if min(more) > 0:
            wrong.append(f"allocation {n}: {more} blocks more alive")
    return {"call": name, "allocations": n - 1, "wrong": wrong}


def main(build, *names):
    with cyflash.set_implementation(build):
        cyflash.cpu.active()
        steered = allocator.Allocator()
        cyflash.set_num_threads(1)
        for name in names or CALLS:
            print(json.dumps(every_allocation_fails(steered, name)), flush=True)


if __name__ == "__main__":
    gc.disable()
    main(*sys.argv[1:])
