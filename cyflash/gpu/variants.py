"""What there is to compile: which kernel takes which arrays and options, with which tiles.

A variant is one source file, one kernel and a set of macros: data types, head_dim rounded up, tile sizes, and a 0 or 1
for each option that would cost something when it is off. Only what a call needs is compiled.
"""
from typing import NamedTuple

FLAGS = ("EDGES", "SOFTCAP", "ALIBI", "BIAS", "MASK")  # EDGES: causal or a window
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
# Sources that `choose` takes no kernel of where another one will do: measurements and tests compare kernels by it.
passed_over: set[str] = set()
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
LARGEST_HEAD_DIM = 256
LONG = 1 << 30
SMALL = ("sm_86", "sm_89", "sm_120", "sm_121")  # whose multiprocessors have 100 KB of shared memory


class Variant(NamedTuple):
    """One kernel to compile, and how it is launched."""

    source: str        # file of this folder
    kernel: str        # its name there
    macros: tuple      # of (name, value)
    arch: str          # "sm_80"
    threads: int       # of a block
    shared_bytes: int  # dynamic shared memory of a block
    rows: int          # query rows of a block
    parts: int = 1     # blocks that share query rows
    boxes: tuple = ()  # of kernels that take struct Maps: rows, bytes of a row of the copies of q, k and v

    def blocks(self, B, H, Lq):
        """The grid, which has one axis."""
        return B * H * -(-Lq // self.rows) * self.parts


def choose(arch, D, qk, v=None, out=None, *, Lq=LONG, aligned=True, mapped=False, options=()):
    """The variant for arrays of these data types.

    Parameters
    ----------
    arch : str
        As NVRTC names it: "sm_80", "sm_90a".
    D : int
        head_dim of q, k and v, 1 to 256.
    qk, v, out : str
        Names of dtypes. float32 for all three; float16 or bfloat16 for all three; or int8 q and k, v of int8, float16
        or bfloat16, and out of float32, float16 or bfloat16. v and out are as qk where they are not given.
    Lq : int
        Query rows of a head: blocks have fewer rows where there are not so many.
    aligned : bool
        Rows of q, k and v begin at multiples of 16 bytes.
    mapped : bool
        `tensor_maps.can_map(q, k, v)`. On sm_90a such arrays take hopper.cu, but for what `_hopper_takes` names; others
        take mma.cu, as on other devices.
    options : set of str
        Which of `FLAGS` are on.

    Returns
    -------
    Variant

    Raises
    ------
    ValueError
        For a combination that no kernel takes.
    """
    v, out = v or qk, out or qk
    if not 1 <= D <= LARGEST_HEAD_DIM:
        raise ValueError(f"D: expected 1 to {LARGEST_HEAD_DIM}, got {D}")
    if not set(options) <= set(FLAGS):
        raise ValueError(f"options: expected some of {', '.join(FLAGS)}, got {', '.join(map(str, options))}")
    busy = bool(set(options) - {"EDGES"}) or not aligned
    flags = (*((name, int(name in options)) for name in FLAGS), ("ALIGNED", int(aligned)))
    if (qk, v, out) == ("float32",) * 3:
        return _ffma(arch, D, flags, busy)
    halves = ("float16", "bfloat16")
    if (qk in halves and qk == v == out) or (qk == "int8" and v in ("int8", *halves) and out in ("float32", *halves)):
        if arch == "sm_90a" and mapped and "hopper.cu" not in passed_over and _hopper_takes(D, qk, v, options):
            return _hopper(D, qk, v, out, flags[:-1], options)
        return _mma(arch, D, qk, v, out, flags, busy, Lq)
    raise ValueError(f"expected q, k, v and out in one of the combinations that a kernel takes, got {qk}, {v}, {out}")


def round_up(D, unit):
    """The least multiple of unit that is not below D."""
    return -(-D // unit) * unit


def _ffma(arch, D, flags, busy):
    """float32. Tiles are what fits into the 99 KB of sm_86 and into 255 registers; a busy thread changes its scores in
    more ways than one, or gathers what it copies, and has smaller ones. Bytes, 4 ((Br + 3 Bc) D + Br (Bc + 16)): at
    D = 64 and 64 x 64 84 KB, at 128 and 64 x 32 92 KB, at 256 and 32 x 16 84 KB."""
    D = round_up(D, 16)
    Br, Bc = (64, 64) if D <= 64 and not busy else (64, 32) if D <= 128 else (32, 16)
    macros = (("HEAD_DIM", D), ("BLOCK_Q", Br), ("BLOCK_K", Bc), *flags)
    shared_bytes = 4 * ((Br + 3 * Bc) * D + Br * (Bc + 16))
    return Variant("ffma.cu", "cyflash_ffma", macros, arch, 128, shared_bytes, Br)


def _mma(arch, D, qk, v, out, flags, busy, Lq):
    """Tensor cores by mma.sync. A block has 4 warps; two blocks share a multiprocessor, so a thread has 255 registers.

    A warp has 32 rows if they fit: what it reads of K and V then serves twice as many products, and shared memory does
    not hold them up. In 16 bits at D = 128 and Bc = 32 O is 128 registers and S 32, at 64 and 64 they are 64 and 64; of
    codes, whose sums and scales need more, D = 64 fits. Otherwise 16 rows: O D / 2, S Bc / 2, Q D / 4 or less. int8 v
    needs as many again of sums, and busy threads need more: beyond 128 channels two blocks compute half of them each.
    Where a multiprocessor has 100 KB, two blocks of 64 x 32 fit up to D = 128 and no larger ones.
    Weights of int8 v are codes of 64 keys, as the reference has them, but where that does not fit. Bytes: 56 or 64 KB
    at D = 128 in 16 bits."""
    D = round_up(D, 32 if qk == "int8" or D > 128 else 16)
    parts = 2 if D > 128 and (busy or v == "int8") else 1
    small = arch in SMALL and D > 64 and v != "int8"
    pairs = not busy and not small and Lq > 64 and (D <= 64 or (D <= 128 and qk != "int8"))
    narrow = busy or D > 128 or small or (pairs and v != "int8" and (D > 64 or qk == "int8"))
    Br, Bc = 128 if pairs else 64, 32 if narrow else 64
    macros = (("HEAD_DIM", D), ("CHANNELS", D // parts), ("BLOCK_Q", Br), ("BLOCK_K", Bc), ("BLOCKS", 2),
              ("QK_TYPE", TYPES[qk]), ("V_TYPE", TYPES[v]), ("OUT_TYPE", TYPES[out]), *flags)
    shared_bytes = (Br + 2 * Bc) * D * SIZES[qk] + Bc * (D // parts) * SIZES[v]
    if qk == "int8":
        shared_bytes += 2 * Bc * 4 + (Bc * 4 if v == "int8" else 0)
    return Variant("mma.cu", "cyflash_mma", macros, arch, 128, shared_bytes, Br, parts)


def _hopper_takes(D, qk, v, options):
    """Whether the variant of hopper.cu has registers enough; others take mma.cu. What an element of a score needs costs
    most with masks, biases, and several options at once; codes of P need sums beside those of O."""
    busy = set(options) - {"EDGES"}
    if v == "int8":
        return D <= 128 and not busy & {"BIAS", "MASK"} and len(busy) <= 1
    return len(busy) <= 1 and not (D > 128 and ("MASK" in busy or (qk == "int8" and "BIAS" in busy)))


def _hopper(D, qk, v, out, flags, options):
    """Tensor copies and wgmma: two consumers of 64 rows each and a producer.

    A block starts with 168 registers a thread, the largest multiple of 8 that 384 threads can have of 65536, and its
    three warpgroups share 3 * 168 = 504 as 2 * 240 + 24, or 2 * 232 + 40 where the producer brings scales. A consumer
    holds O D / 2, S Bc / 2, P Bc / 4: at D = 128 and Bc = 128 160, at 256 and 64 176; of int8 v O D / 2, its sums as
    many, S 32 and P 8: at D = 128 168. Where an element of S needs more beside it, its scales and another option or the
    address of a mask or bias, Bc is 64: at D = 128 112. Bytes, 16 bits, 2 (Br + 4 Bc) D: at D = 64 80 KB, at 128 160,
    at 256 192 of 227. Codes of P are of 64 keys, as the reference has them."""
    codes = qk == "int8"
    D = 64 if D <= 64 else 128 if D <= 128 else 256
    busy = set(options) - {"EDGES"}
    crowded = busy if codes else busy & {"BIAS", "MASK"}
    Br, Bc, stages = 128, 64 if D > 128 or v == "int8" or crowded else 128, 2
    producer, consumer = (40, 232) if codes else (24, 240)
    macros = (("HEAD_DIM", D), ("BLOCK_Q", Br), ("BLOCK_K", Bc), ("STAGES", stages), ("PRODUCER_REGISTERS", producer),
              ("CONSUMER_REGISTERS", consumer), ("QK_TYPE", TYPES[qk]), ("V_TYPE", TYPES[v]), ("OUT_TYPE", TYPES[out]),
              *flags)
    scales = 4 * Bc * (2 if v == "int8" else 1) if codes else 0
    shared_bytes = Br * D * SIZES[qk] + stages * (Bc * D * (SIZES[qk] + SIZES[v]) + scales + 4 * 8) + 8
    row_bytes = min(128, D * SIZES[qk])
    v_box = (D, Bc) if v == "int8" else (Bc, 128)
    return Variant("hopper.cu", "cyflash_hopper", macros, "sm_90a", (Br // 64 + 1) * 128, shared_bytes, Br,
                   boxes=((Br, row_bytes), (Bc, row_bytes), v_box))


def turn(arch="sm_90a"):
    """The kernel that transposes int8 v for `_hopper`, to (B, Hk, D, `turned_keys(Lk)`); its grid is `turn_blocks`."""
    return Variant("turned.cu", "cyflash_turn", (), arch, 128, 0, 0)


def turned_keys(Lk):
    """Keys of a row of transposed v."""
    return round_up(Lk, 16)


def turn_blocks(B, Hk, Lk, D):
    """The grid of `turn`."""
    return -(-B * Hk * (turned_keys(Lk) // 16) * D // 128)
