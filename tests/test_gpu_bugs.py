"""Bugs planted in the GPU kernels' source: the machine of gpu_shim/ must catch every one, under some schedule."""
import pytest
from gpu_cases import Problem

SHAPE = dict(H=2, Lq=70, Lk=250, D=64)
CAUSAL = dict(causal=True)
BUGS = {  # name: (kind, shape, options, (file, old, new)...)
    "no barrier after K": ("float16", SHAPE, {}, ("mma.cu", "barrier();  // K is there", "// K is there")),
    "no barrier after V": ("float16", SHAPE, {}, ("mma.cu", "barrier();  // V is there", "// V is there")),
    "a warp skips a barrier": ("float16", SHAPE, {}, ("mma.cu", "barrier();  // V", "if (warp) barrier();  // V")),
    "K is not waited for": ("float16", SHAPE, {}, ("mma.cu", "copy_wait<0>();", "copy_wait<1>();")),
    "V is not waited for": ("bfloat16", SHAPE, {}, ("mma.cu", "copy_wait<1>();", "copy_wait<2>();")),
    "K goes to the buffer in use": ("float16", SHAPE, {}, ("mma.cu", "j + 1, 1 - buffer", "j + 1, buffer")),
    "K is read from the other buffer": (
        "int8", SHAPE, {}, ("mma.cu", "QK_PITCH, AT_K + buffer", "QK_PITCH, AT_K + (1 - buffer)")),
    "scales go to one buffer": (
        "int8", SHAPE, {}, ("mma.cu", "copy_scales(AT_K_SCALE + buffer * Bc * 4", "copy_scales(AT_K_SCALE")),
    "no swizzle": ("float16", SHAPE, {}, ("tiles.cuh", "mask = (1 << n) - 1", "mask = 0")),
    "weak swizzle": ("float16", SHAPE, {}, ("tiles.cuh", "PITCH % 128 == 0 ? 3 :", "PITCH % 128 == 0 ? 2 :")),
    "address moved by a sum": ("float16", SHAPE, {}, ("tiles.cuh", "(at ^ ((chunks", "(at + ((chunks")),
    "keys after the last one": ("float16", SHAPE, {}, ("options.cuh", "key >= p.Lk", "key > p.Lk")),
    "rows after the last one": (
        "float16", SHAPE, {}, ("tiles.cuh", "first + i < rows - row", "first + i <= rows - row")),
    "columns after the last one": (
        "float16", {**SHAPE, "D": 40}, {}, ("tiles.cuh", "max(columns - (chunk + c) * EACH, 0)", "EACH")),
    "causal by one": ("float16", SHAPE, CAUSAL, ("options.cuh", "key - i > head.high", "key - i > head.high + 1")),
    "a tile too few": (
        "float16", SHAPE, CAUSAL, ("options.cuh", "high = last_key(p, last_row)", "high = last_key(p, last_row) - Bc")),
    "an edge taken for whole": (
        "float16", SHAPE, CAUSAL, ("options.cuh", "Bc + Bc - 1 > work.whole_to", "Bc > work.whole_to")),
    "a tile beyond shared memory": (
        "float16", SHAPE, {}, ("mma.cu", "AT_V = AT_K + 2 * K_BYTES", "AT_V = AT_K + 3 * K_BYTES")),
    "half of a row's maximum": (
        "float16", SHAPE, dict(scale=3.0), ("weights.cuh", "return fmaxf(x, shuffle_xor(x, 2))", "return x")),
    "half of a row's sum": ("float16", SHAPE, {}, ("weights.cuh", "return x + shuffle_xor(x, 2)", "return x")),
    "a shuffle without some lanes": (
        "float16", SHAPE, {}, ("weights.cuh", "top = row_max(top);", "if (key % 8) top = row_max(top);")),
    "no rescaling": ("float16", SHAPE, {}, ("mma.cu", "o[i][n] *= rows[i].alpha[n / 2 % 2];", ";")),
    "codes in another order": (
        "int8", SHAPE, {}, ("warp_products.cuh", "bytes(b[0], b[1], 0x6420)", "bytes(b[0], b[1], 0x6240)")),
    "weights of a block in units of the row": (
        "int8", SHAPE, {}, ("weights.cuh", "CODED_P ? top : highest", "highest")),
    "the wrong head's K": ("float16", {**SHAPE, "Hk": 2}, {}, ("options.cuh", "work.h / (p.H / p.Hk)", "0")),
    "float32: no barrier after K": ("float32", SHAPE, {}, ("ffma.cu", "barrier();  // K is there", "// K is there")),
    "float32: no barrier after V": ("float32", SHAPE, {}, ("ffma.cu", "barrier();  // V is there", "// V is there")),
    "float32: V is not waited for": ("float32", SHAPE, {}, ("ffma.cu", "copy_wait<1>();", "copy_wait<2>();")),
    "float32: K in the buffer in use": ("float32", SHAPE, {}, ("ffma.cu", "AT_K + K_BYTES - at", "AT_K + at")),
    "float32: a row's maximum of eight lanes": (
        "float32", SHAPE, {}, ("ffma.cu", "lanes < 16; lanes *= 2) highest", "lanes < 8; lanes *= 2) highest")),
}


@pytest.mark.parametrize("bug", BUGS)
def test_is_caught(bug):
    kind, shape, options, *changes = BUGS[bug]
    with pytest.raises(AssertionError):
        Problem(kind, **shape).check(changes=tuple(changes), **options)
