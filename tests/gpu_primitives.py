"""Inputs of the primitives in gpu_primitives.cu, from a seed, and what must come out by NumPy alone.

Where arithmetic is exact that is every bit, of NaN that it is NaN; where a GPU approximates, so many units in the last
place. Products get small integers, whose sums float32 holds exactly in any order.
"""
import itertools
from collections.abc import Callable
from typing import NamedTuple

import gpu_on_device
import gpu_running
import ml_dtypes
import numpy as np

from cyflash.gpu import tensor_maps
from cyflash.gpu.variants import Variant

MOST_SHARED = 224 * 1024  # of a block on compute capability 9.0, or nearly
SOURCE, KERNEL = "gpu_primitives.cu", "cyflash_primitive"
EVERY = slice(None)


class Part(NamedTuple):
    """Results of one primitive among those of a kernel."""

    name: str
    where: object         # index into the results
    kind: str = "u4"      # dtype that its 32 bits are read as
    units: float = 0      # in the last place that it may be off


class Primitive(NamedTuple):
    """One kernel of gpu_primitives.cu, with what it is given."""

    macros: tuple
    threads: int
    shared: int
    q: np.ndarray
    expected: np.ndarray         # uint32, as the results lie
    parts: tuple = (Part("all", EVERY),)
    k: np.ndarray | None = None
    box: tuple = ()              # of the map of q: rows, bytes of a row
    params: tuple = ()           # of (name, value)
    hopper: bool = False

    def variant(self, arch="sm_90a"):
        more = (("WARPGROUPS", 1),) if self.hopper else ()
        return Variant(SOURCE, KERNEL, (*more, *self.macros), arch, self.threads, self.shared, 1)

    def run(self, schedule=gpu_running.EARLY, **params):
        """The results, uint32, of gpu_running.where."""
        where = gpu_running.where
        out = np.full(self.expected.shape, 0x77777777, np.uint32)
        try:
            placed = [None if x is None else where.place(x) for x in (self.q, self.k, out)]
            struct = gpu_running.Params(**dict(zip(("q", "k", "out"), map(address, placed), strict=True)),
                                        **dict(self.params), **params)
            readable = [end for x in placed if x is not None for end in np.lib.array_utils.byte_bounds(x)]
            boxes = ()
            if self.hopper:
                x = placed[0] if self.box else placed[0].view(np.uint16).reshape(1, 1, 1, -1)[..., :64]
                boxes = (tensor_maps.box(x, *(self.box or (1, 128))),) * 3
            arch = where.arch("sm_90a" if self.hopper else "sm_80")
            where.launch(self.variant(arch), 1, struct, int(schedule), 1, readable, (), boxes)
            where.fetch(placed[2], out)
        finally:
            where.release()
        return out

    def check(self, found):
        """Raise AssertionError with every part that is wrong, and what it looks like."""
        wrong = [text for part in self.parts if (text := difference(part, found, self.expected))]
        assert not wrong, "\n".join(wrong)


def address(x):
    return None if x is None else x.ctypes.data


def difference(part, found, expected):
    """What is wrong, or an empty text."""
    found, expected = (np.ascontiguousarray(x[part.where]).ravel() for x in (found, expected))
    same = found == expected
    if part.kind != "u4":
        x, y = found.view(part.kind), expected.view(part.kind)
        same |= np.isnan(x) & np.isnan(y)
        if part.units:
            with np.errstate(all="ignore"):
                distance = np.abs(x.astype(np.float64) - y.astype(np.float64)) / np.spacing(np.abs(y)).astype(float)
            same |= distance <= part.units
    if same.all():
        return ""
    at = np.flatnonzero(~same)
    shown = "; ".join(f"[{i}] {show(found[i], part)}, expected {show(expected[i], part)}" for i in at[:6])
    return f"{part.name}: {at.size} of {same.size} differ: {shown}"


def show(bits, part):
    return f"{bits:#010x}" if part.kind == "u4" else f"{np.array([bits]).view(part.kind)[0]!r} ({bits:#010x})"


def bits(x):
    """32-bit numbers, or smaller ones side by side, as uint32."""
    return np.ascontiguousarray(x).ravel().view(np.uint32)


def rng():
    return np.random.default_rng(6)


# Of every device


def exchange():
    x = rng().standard_normal((5, 2, 32)).astype(np.float32)
    x[:, 1] -= 10  # none above one half in the second warp
    shuffled = np.stack([x[n][:, np.arange(32) ^ (1 << n)] for n in range(5)])
    any_ = np.broadcast_to((x > 0.5).any(axis=-1, keepdims=True), x.shape).astype(np.float32)
    parts = Part("shuffle_xor", slice(0, 320)), Part("warp_any", slice(320, 640))
    return Primitive((("TEST_EXCHANGE", 1),), 64, 0, x, bits(np.stack([shuffled, any_])), parts)


SPECIAL = np.float32([
    0.0, -0.0, 1, -1, 0.5, 1.5, 2.5, 3.5, 254.5, 255.4999, 255.5, 256, 1e6, -3.5, np.inf, -np.inf, np.nan, 65504,
    65519.9, 65520, 1e38, -1e38, 2.0**-14, 2.0**-15, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-126, -126.5, 127.9,
    128, -149, -1e-39, 1e-40, 1.00390625, 1.01171875, 1 + 2.0**-11, 1 + 3 * 2.0**-11,
])  # fmt: skip


def numbers():
    """exp2_fast: ex2.approx has a relative error of 2^-22 at most, 4 units below a power of two, and 0 for results
    below 2^-126; reciprocal: 1 unit, and denormal numbers count as 0 on both sides."""
    more = rng().standard_normal(4 * 512).astype(np.float32) * np.float32(40)
    x = np.concatenate([SPECIAL, np.roll(SPECIAL, 7), np.roll(SPECIAL, 13), np.roll(SPECIAL, 22), more]).reshape(-1, 4)
    a, b, _, _ = x.T
    with np.errstate(all="ignore"):
        power = np.exp2(a.astype(np.float64))
        power = np.where(power < 2.0**-126, 0, power).astype(np.float32)
        flushed = np.where(np.abs(a) < 2.0**-126, np.copysign(np.float32(0), a), a)
        inverse = (1 / flushed.astype(np.float64)).astype(np.float32)
        inverse = np.where(np.abs(inverse) < 2.0**-126, np.copysign(np.float32(0), inverse), inverse)
        codes = np.where(x > 0, np.minimum(np.rint(x), 255), 0)
    largest = np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), np.maximum(a, b))
    half = bits(a).astype(np.uint16).view(np.float16).astype(np.float32)
    # +inf and what an int32 does not hold is outside what pack_u8 says
    codes[x >= 2.0**31] = 0
    chosen = [choose(x[:, i], x[:, i + 1], which) for i, which in ((0, 0x6420), (2, 0x7531))]
    expected = np.stack([
        bits(power), bits(inverse), bits(largest), two(a, b, np.float16), two(a, b, ml_dtypes.bfloat16), bits(half),
        bits(codes.astype(np.uint8)), chosen[0] ^ chosen[1],
    ], axis=1)
    names = ("exp2_fast", "f4", 4), ("reciprocal", "f4", 1), ("max_nan", "f4", 0), ("pack_f16", "u4", 0)
    names += ("pack_bf16", "u4", 0), ("from_f16", "f4", 0), ("pack_u8", "u4", 0), ("choose_bytes", "u4", 0)
    tame = ~(x >= 2.0**31).any(axis=1)
    rows = {"pack_u8": tame}
    parts = tuple(Part(name, (rows.get(name, EVERY), i), kind, n) for i, (name, kind, n) in enumerate(names))
    macros = (("TEST_NUMBERS", 1),)
    return Primitive(macros, 128, 0, x, expected, parts, params=(("Lk", len(x)),))


def two(low, high, dtype):
    """Two numbers of 16 bits in a word; NaN is 0x7fff."""
    with np.errstate(all="ignore"):
        words = [np.where(np.isnan(x), 0x7FFF, x.astype(dtype).view(np.uint16)).astype(np.uint32) for x in (low, high)]
    return words[0] | words[1] << 16


def choose(low, high, which):
    eight = np.stack([bits(low), bits(high)], axis=1).view(np.uint8)
    return bits(eight[:, [which >> 4 * i & 7 for i in range(4)]])


def matrices():
    x = rng().integers(0, 2**16, (256, 8), dtype=np.uint16)  # rows of 16 bytes
    place = rng().permutation(256)[:32].astype(np.uint32)    # of rows, of four matrices
    four = x[place].reshape(4, 8, 8)
    plain = [np.ascontiguousarray(m).view(np.uint32).reshape(32) for m in four]
    turned = [np.ascontiguousarray(m.T).view(np.uint32).reshape(32) for m in four]
    parts = Part("load_matrices", (EVERY, slice(0, 4))), Part("load_matrices_transposed", (EVERY, slice(4, 8)))
    expected = np.stack([*plain, *turned], axis=1)
    return Primitive((("TEST_MATRICES", 1),), 32, 4096, x, expected, parts, k=place * np.uint32(16))


NUMBERS = {"f16": (np.float16,) * 2, "bf16": (ml_dtypes.bfloat16,) * 2, "s8": (np.int8,) * 2,
           "u8_s8": (np.uint8, np.int8)}


def small(dtype, shape, seed):
    """Numbers whose products add up without rounding."""
    random = np.random.default_rng(seed)
    if np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)
        return random.integers(info.min, info.max, shape, endpoint=True).astype(dtype)
    return random.integers(-8, 8, shape, endpoint=True).astype(np.float32).astype(dtype)


def left_words(a):
    """(32, 4) words of 16 rows of 32 bytes, as a warp's lanes have them."""
    word = np.ascontiguousarray(a).view(np.uint32).reshape(16, 8)
    g, t = np.arange(32) // 4, np.arange(32) % 4
    return np.stack([word[g, t], word[g + 8, t], word[g, t + 4], word[g + 8, t + 4]], axis=1)


def product(name):
    """mma.sync: several 16 x 8 sums."""
    left, right = NUMBERS[name]
    Sum = np.int32 if np.dtype(right).kind == "i" else np.float32
    words, expected = [], []
    for n in range(8):
        K = 32 // np.dtype(left).itemsize
        a, b, d = small(left, (16, K), 3 * n), small(right, (K, 8), 3 * n + 1), small(np.int8, (16, 8), 3 * n + 2)
        columns = np.ascontiguousarray(b.T).view(np.uint32).reshape(8, 8)
        g, t = np.arange(32) // 4, np.arange(32) % 4
        lanes = [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]
        start = np.stack([d[at].astype(Sum) for at in lanes], axis=1)
        right_words = columns[g, t][:, None], columns[g, t + 4][:, None]
        words.append(np.hstack([left_words(a), *right_words, start.view(np.uint32)]))
        total = a.astype(np.int64) @ b.astype(np.int64) + d
        expected.append(np.stack([total[at].astype(Sum) for at in lanes], axis=1).view(np.uint32))
    types = {np.int32: "int", np.float32: "float"}
    macros = (("TEST_PRODUCT", 1), ("OF_WARPS", f"mma_{name}"), ("SUM_TYPE", types[Sum]))
    kind = "i4" if Sum is np.int32 else "f4"
    parts = (Part(f"mma_{name}", EVERY, "u4" if kind == "i4" else kind),)
    return Primitive(macros, 32, 0, np.stack(words), np.stack(expected), parts, params=(("Lk", 8),))


def copies():
    x = rng().integers(0, 256, 1024, dtype=np.uint8)
    first, second = np.arange(32) % 17, np.arange(32) % 5
    expected = np.full(1024, 255, np.uint8)
    for at, size, counts in ((0, 16, first), (512, 4, second)):
        for lane, n in enumerate(counts):
            begin = at + lane * size
            expected[begin : begin + size] = 0
            expected[begin : begin + n] = x[begin : begin + n]
    parts = (Part("copy16, copy_wait<1>", slice(0, 128)), Part("copy4, copy_wait<0>", slice(128, 160)),
             Part("copy4 beyond its 4 bytes", slice(160, 256)))
    counts = np.concatenate([first, second]).astype(np.uint32)
    return Primitive((("TEST_COPIES", 1),), 32, 1024, x, bits(expected), parts, k=counts)


def memory():
    x = rng().integers(0, 2**32, 128, dtype=np.uint32)
    lanes, four = np.arange(32), x.reshape(32, 4)
    back = four[:, ::-1]
    out = np.zeros((32, 20), np.uint32)
    out[:, 0], out[:, 1], out[:, 2] = x.view(np.uint8)[:32], x.view(np.uint16)[:32], x[:32]
    out[:, 3], out[:, 4:8], out[:, 8:12] = x[:32] ^ 0x55555555, four, four[lanes ^ 1]
    out[:, 12:14], out[:, 14] = back[lanes ^ 2][:, 2:], back[lanes ^ 4][:, 1]
    names = {"load_bits<1>": 0, "load_bits<2>": 1, "load_bits<4>": 2, "store2": 3, "load4, store4": slice(4, 8),
             "shared_load<4>": slice(8, 12), "shared_load<2>": slice(12, 14), "shared_load<1>": 14,
             "end": slice(15, 20)}
    parts = tuple(Part(name, (EVERY, at)) for name, at in names.items())
    return Primitive((("TEST_MEMORY", 1),), 32, 1024, x, out, parts)


# Of compute capability 9.0


def mbarriers():
    x = rng().standard_normal((9, 32)).astype(np.float32)
    expected = x[:, np.arange(32) ^ 5]
    parts = (Part("mbarrier_arrive, mbarrier_wait", EVERY),)
    return Primitive((("TEST_MBARRIERS", 1),), 64, 1024, x, bits(expected), parts, hopper=True)


def barriers():
    x = rng().standard_normal((9, 128)).astype(np.float32)
    flags = x[3:].reshape(3, 2, 128)
    flags[0, 0], flags[1] = 0, 0
    flags[2] = 0
    flags[2, 1, 77] = 1
    any_ = np.broadcast_to((flags > 0.5).any(axis=-1, keepdims=True), flags.shape).astype(np.float32)
    expected = np.concatenate([bits(x[:3, ::-1]), bits(any_)])
    parts = Part("named_barrier, named_barrier_arrive", slice(0, 384)), Part("warpgroup_any", slice(384, 1152))
    return Primitive((("TEST_BARRIERS", 1),), 256, 512, x, expected, parts, hopper=True)


def registers():
    x = rng().integers(-100, 100, 384).astype(np.float32)
    expected = x.copy()
    expected[128:] = [x[(i + np.arange(160)) % 384].sum() for i in range(128, 384)]
    parts = Part("registers_down", slice(0, 128), "f4"), Part("registers_up", slice(128, 384), "f4")
    params = (("Lk", 3),)
    return Primitive((("TEST_REGISTERS", 1),), 384, 0, x, bits(expected), parts, params=params, hopper=True)


def swizzled(at, pitch):
    return at ^ (at >> 7 & (7 if pitch == 128 else 3)) << 4


def image(rows, pitch):
    """Rows of `pitch` bytes as tensor copies leave them in shared memory, and products take them."""
    out = np.zeros(rows.size, np.uint8)
    out[swizzled(np.arange(rows.size), pitch)] = rows.ravel()
    return out


# name: (bytes of an element; columns and rows of a box; its first column, row, head and batch; the array's columns)
COPIED = {
    "128 bytes": (2, 64, 64, (0, 8, 1, 1), 128),
    "128 bytes, second panel": (2, 64, 128, (64, 0, 2, 0), 128),
    "128 bytes, rows beyond the last": (2, 64, 64, (0, 70, 2, 1), 64),
    "128 bytes, columns beyond the last": (2, 64, 64, (64, 3, 0, 1), 104),
    "128 bytes, nothing inside": (2, 64, 64, (0, 128, 0, 0), 64),
    "128 bytes of codes": (1, 128, 128, (0, 5, 1, 0), 112),
    "64 bytes of codes": (1, 64, 128, (0, 0, 1, 1), 64),
    "64 bytes of codes, beyond both": (1, 64, 64, (16, 77, 2, 1), 64),
    "64 bytes of codes, channels of V": (1, 64, 64, (64, 0, 0, 0), 96),
    "rows before the first": (2, 64, 64, (0, -3, 1, 0), 64),
}


def tensor_copy(name):
    size, columns, rows, (column, row, head, batch), width = COPIED[name]
    dtype = np.uint16 if size == 2 else np.uint8
    x = rng().integers(0, np.iinfo(dtype).max, (2, 3, 100, width), dtype=dtype, endpoint=True)
    box = np.zeros((rows, columns), dtype)
    begin, end = max(row, 0), min(row + rows, 100)
    inside = x[batch, head, begin:end, column : column + columns] if begin < end else box[:0]
    box[max(-row, 0) : max(-row, 0) + len(inside), : inside.shape[1]] = inside
    pitch = columns * size
    params = dict(Lk=box.nbytes, B=column, H=row, Hk=head, Lq=batch)
    parts = (Part(f"tensor_copy, {name}", EVERY),)
    return Primitive((("TEST_TENSOR_COPY", 1),), 128, box.nbytes + 64, x, bits(image(box.view(np.uint8), pitch)), parts,
                     box=(rows, pitch), params=tuple(params.items()), hopper=True)


class Wide(NamedTuple):
    """A product of a warpgroup, as hopper.cu has it."""

    name: str        # of the primitive
    columns: int     # N
    depth: int       # K, in elements
    pitch: int       # bytes of a row of an operand
    stays: bool      # a is in registers
    turned: bool = False

    def title(self):
        where = "registers" if self.stays else f"rows of {self.pitch} bytes"
        what = "transposed b, " if self.turned else ""
        return f"{self.name} m64n{self.columns}, a in {where}, b {what}rows of {self.pitch} bytes, K={self.depth}"


WIDE = [
    *(Wide(name, N, K, 128, False) for name in ("f16", "bf16") for N in (64, 128) for K in (64, 128)),
    Wide("f16", 64, 256, 128, False),
    *(Wide("s8", N, 64, 64, False) for N in (64, 128)),
    *(Wide("s8", N, K, 128, False) for N in (64, 128) for K in (128, 256)),
    *(Wide(name, N, K, 128, True, True) for name in ("f16", "bf16") for N in (64, 128, 256) for K in (64, 128)),
    Wide("u8_s8", 64, 64, 64, True),
    Wide("u8_s8", 64, 128, 128, True),
]


def panels(rows, pitch):
    """(R, bytes) as panels of `pitch` bytes of each row, one after another."""
    return np.concatenate([image(np.ascontiguousarray(rows[:, at : at + pitch]), pitch)
                           for at in range(0, rows.shape[1], pitch)])


def raw(x):
    return np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)


def wide(case):
    left, right = NUMBERS[case.name]
    a, b = small(left, (64, case.depth), 1), small(right, (case.depth, case.columns), 2)
    size = np.dtype(right).itemsize
    steps, a_panel = case.depth * size // 32, 64 * case.pitch
    b_image = panels(raw(b) if case.turned else raw(b.T), case.pitch)
    b_panel = (case.depth if case.turned else case.columns) * case.pitch
    a_image = np.zeros(0, np.uint8) if case.stays else panels(raw(a), case.pitch)
    of_a = None
    if case.stays:  # step, warp, lane, word
        words = a.reshape(4, 16, steps, -1).transpose(2, 0, 1, 3)
        of_a = np.stack([[left_words(x) for x in step] for step in words])
    begin = -(-a_image.size // 1024) * 1024
    memory = np.zeros(begin + b_image.size, np.uint8)
    memory[: a_image.size], memory[begin:] = a_image, b_image
    integer = np.dtype(right).kind == "i"
    sums = case.columns // 2
    warp, lane, i = np.ogrid[:4, :32, :sums]
    total = (a.astype(np.int64) @ b.astype(np.int64)).astype(np.int32 if integer else np.float32)
    expected = total[warp * 16 + lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2]
    macros = dict(
        TEST_WGMMA=1, OF_GROUPS=f"wgmma_{case.name}", SUM_TYPE="int" if integer else "float", SUMS=sums,
        ROW_BYTES=case.pitch, K_STEPS=steps, PANEL_STEPS=case.pitch // 32, B_BEGINS=begin, A_PANEL=a_panel,
        B_PANEL=b_panel, TURNED=int(case.turned), A_STAYS=int(case.stays),
    )
    parts = (Part(f"wgmma_{case.title()}", EVERY, "u4" if integer else "f4"),)
    return Primitive(tuple(macros.items()), 128, memory.size, memory, bits(expected), parts, k=of_a,
                     params=(("Lk", memory.size),), hopper=True)


def descriptors(case):
    """{words: upper bits} of an operand's descriptor: what it might have to be instead, for looking."""
    eight, panel = 8 * case.pitch, (case.depth if case.turned else case.columns) * case.pitch
    lengths = sorted({0, 16, case.pitch, eight, 2 * eight, panel, panel // 2, 2 * panel})
    swizzles = {"none": 0, "128 bytes": 1, "64 bytes": 2, "32 bytes": 3}
    pieces = case.columns // (64 if case.turned else 8)  # of a product's columns; its K has two

    def reach(x, y):
        return max(pieces * x + 2 * y, pieces * y + 2 * x)

    room = MOST_SHARED - wide(case).shared
    return {
        f"leading {leading}, stride {stride}, swizzle {swizzle}":
            (leading >> 4 & 0x3FFF) << 16 | (stride >> 4 & 0x3FFF) << 32 | code << 62
        for (swizzle, code), leading, stride in itertools.product(swizzles.items(), lengths, lengths)
        if reach(leading, stride) <= room  # what is read has to be there
    }


def descriptors_that_work(case):
    """Names of the descriptors with which a product comes out right on gpu_running.where; b's, or both operands'."""
    one, found = wide(case)._replace(shared=MOST_SHARED), []
    for name, upper in descriptors(case).items():
        number = upper - 2**64 if upper >= 2**63 else upper
        for chunks in (1,) if case.stays else (1, 2):
            try:
                one.check(one.run(chunks=chunks, left=number))
            except AssertionError:
                if gpu_on_device.Device.broken:
                    return [*found, f"looking was cut short: {name} left the GPU broken"]
                continue
            found.append(name + (" for both operands" if chunks == 2 else ""))
    return found


PRIMITIVES: dict[str, Callable] = {
    "exchange": exchange, "numbers": numbers, "matrices": matrices, "copies": copies, "memory": memory,
    **{f"mma_{name}": lambda name=name: product(name) for name in NUMBERS},
}
HOPPER_PRIMITIVES: dict[str, Callable] = {
    "mbarriers": mbarriers, "barriers": barriers, "registers": registers,
    **{f"tensor_copy {name}": lambda name=name: tensor_copy(name) for name in COPIED},
    **{f"wgmma_{case.title()}": lambda case=case: wide(case) for case in WIDE},
}
