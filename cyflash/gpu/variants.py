"""What there is to compile: which kernel takes which arrays and options, with which tiles.

A variant is one source file, one kernel and a set of macros: data types, head_dim rounded up, tile sizes, and a 0 or 1
for each option that would cost something when it is off. Only what a call needs is compiled.
"""
from typing import NamedTuple

FLAGS = ("EDGES", "SOFTCAP", "ALIBI", "BIAS", "MASK")  # EDGES: causal or a window
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
LARGEST_HEAD_DIM = 256


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

    def blocks(self, B, H, Lq):
        """The grid, which has one axis."""
        return B * H * -(-Lq // self.rows) * self.parts


def choose(arch, D, qk, v=None, out=None, *, aligned=True, options=()):
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
    aligned : bool
        Rows of q, k and v begin at multiples of 16 bytes.
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
    flags = (*((name, int(name in options)) for name in FLAGS), ("ALIGNED", int(aligned)))
    if (qk, v, out) == ("float32",) * 3:
        return _ffma(arch, D, flags, bool(set(options) - {"EDGES"}))
    halves = ("float16", "bfloat16")
    if (qk in halves and qk == v == out) or (qk == "int8" and v in ("int8", *halves) and out in ("float32", *halves)):
        return _mma(arch, D, qk, v, out, flags, bool(set(options) - {"EDGES"}))
    raise ValueError(f"expected q, k, v and out in one of the combinations that a kernel takes, got {qk}, {v}, {out}")


def round_up(D, unit):
    """The least multiple of unit that is not below D."""
    return -(-D // unit) * unit


def _ffma(arch, D, flags, busy):
    """float32. Tiles are what fits into the 99 KB of sm_86 and into 255 registers; a busy thread changes its scores in
    more than one way, and has fewer. Bytes, 4 ((Br + 3 Bc) D + Br (Bc + 16)): at D = 64 and 64 x 64 84 KB, at 128 and
    64 x 32 92 KB, at 256 and 32 x 16 84 KB."""
    D = round_up(D, 16)
    Br, Bc = (64, 64) if D <= 64 and not busy else (64, 32) if D <= 128 else (32, 16)
    macros = (("HEAD_DIM", D), ("BLOCK_Q", Br), ("BLOCK_K", Bc), *flags)
    shared_bytes = 4 * ((Br + 3 * Bc) * D + Br * (Bc + 16))
    return Variant("ffma.cu", "cyflash_ffma", macros, arch, 128, shared_bytes, Br)


def _mma(arch, D, qk, v, out, flags, busy):
    """Tensor cores by mma.sync. A block has 4 warps of 16 rows; two blocks share a multiprocessor, so a thread has 255
    registers: O D / 2, S Bc / 2, Q D / 4 or less, and what makes scores of products. int8 v needs as many again of
    sums: beyond 128 channels two blocks compute half of them each; so do busy ones beyond 192. Bytes: 64 KB at D = 128
    in 16 bits."""
    D = round_up(D, 32 if qk == "int8" or D > 192 else 16)
    parts = 2 if (D > 192 and busy) or (D > 128 and v == "int8") else 1
    Br, Bc = 64, 32 if busy or D > 128 else 64
    macros = (("HEAD_DIM", D), ("CHANNELS", D // parts), ("BLOCK_Q", Br), ("BLOCK_K", Bc), ("BLOCKS", 2),
              ("QK_TYPE", TYPES[qk]), ("V_TYPE", TYPES[v]), ("OUT_TYPE", TYPES[out]), *flags)
    shared_bytes = (Br + 2 * Bc) * D * SIZES[qk] + Bc * (D // parts) * SIZES[v]
    if qk == "int8":
        shared_bytes += 2 * Bc * 4 + (Bc * 4 if v == "int8" else 0)
    return Variant("mma.cu", "cyflash_mma", macros, arch, 128, shared_bytes, Br, parts)


# Few query rows: keys are cut into chunks, one kernel takes them, a second one joins what they leave.

# Up to here no kernel reads keys less often than this one does, once for 16 rows of all the heads that share them.
FEW_ROWS = 16
MOST_RING_BYTES = 68 * 1024


class Decode(NamedTuple):
    """Two launches, one after the other, and what `Params` has for both besides what every kernel is told."""

    split: Variant         # first, with split_blocks blocks
    merge: Variant         # then, with merge_blocks blocks
    chunk: int             # keys of a chunk: Params.chunk
    chunks: int            # Params.chunks
    split_blocks: int
    merge_blocks: int
    workspace_floats: int  # Params.workspace: float32, at a multiple of 16 bytes, with any content


def choose_decode(arch, B, H, Hk, Lq, Lk, D, qk, v=None, out=None, *, aligned=True, options=()):
    """What to launch for few query rows, or None where `choose` has the kernel.

    The bits of a row's result depend on Lq, Lk, D, H / Hk, data types and options; not on B, H or the device.

    Parameters
    ----------
    arch, D, qk, v, out, aligned, options
        As of `choose`.
    B, H, Hk, Lq, Lk : int
        Lengths of the axes of q (B, H, Lq, D) and k (B, Hk, Lk, D).

    Returns
    -------
    Decode or None
        None for more than `FEW_ROWS` query rows, and for float32.

    Raises
    ------
    ValueError
        For a combination that no kernel takes.
    """
    choose(arch, D, qk, v, out, aligned=aligned, options=options)
    v, out = v or qk, out or qk
    if Lq > FEW_ROWS or qk == "float32":
        return None
    flags = (*((name, int(name in options)) for name in FLAGS), ("ALIGNED", int(aligned)))
    rounded = round_up(D, 32 if qk == "int8" or D > 128 else 16)
    chunk = keys_of_chunk(Lk, D)
    chunks = max(-(-Lk // chunk), 1)
    merged = ("HEAD_DIM", rounded), ("QK_TYPE", TYPES[qk]), ("OUT_TYPE", TYPES[out]), *flags[:-1]
    tiles = -(-(H // Hk * Lq) // 16)
    return Decode(
        _split(arch, rounded, qk, v, flags), Variant("merge.cu", "cyflash_merge", merged, arch, 128, 128 * 16 + 160, 1),
        chunk, chunks, B * Hk * chunks * tiles, B * H * Lq, B * H * Lq * chunks * (rounded + 2),
    )


def keys_of_chunk(Lk, D):
    """How many keys a block reads: a 64th of them, if that is not too few or too many.

    At least 128 KB of K and V in 16 bits, 1024 keys at most: they take 8 us where a block has its share of 4.3 TB/s,
    one of 2 * 132, and its beginning 1 us, in which the others read. What it leaves, 8 rows of float32 written and
    read, is then a sixteenth of that, of int8 an eighth. At most 16 times as many, so that multiprocessors have many
    chunks each and end at nearly the same time.
    """
    least = 128
    while least * 4 * D < 128 * 1024 and least < 1024:
        least *= 2
    chunk = least
    while chunk * 64 < Lk and chunk < 16 * least:
        chunk *= 2
    return chunk


def _split(arch, D, qk, v, flags):
    """Teams of a block have a ring each, of as many stages of 32 keys as fit into 68 KB together, 4 at most; with Q,
    8 KB at most, that fits into the 99 KB of sm_86, and three times into the 227 KB of sm_90. Up to D = 128 a block has
    four teams of a warp, beyond one of two. Where O is small and scores take little work three blocks have 168
    registers a thread; two have 255."""
    team = 1 if D <= 128 else 2
    warps, teams = (4, 4) if team == 1 else (2, 1)
    busy = any(value for name, value in flags if name not in ("EDGES", "ALIGNED"))
    stage = 32 * D * (SIZES[qk] + SIZES[v]) + 32 * 4 * ((qk == "int8") + (v == "int8"))
    stages = min(max(MOST_RING_BYTES // (teams * stage), 1), 4)
    macros = (("HEAD_DIM", D), ("WARPS", warps), ("TEAM", team), ("STAGES", stages),
              ("BLOCKS", 3 if team == 2 or (D <= 64 and not busy) else 2), ("QK_TYPE", TYPES[qk]), ("V_TYPE", TYPES[v]),
              *flags)
    shared_bytes = 16 * D * SIZES[qk] + teams * (16 * 8 + stages * stage)
    return Variant("decode.cu", "cyflash_decode", macros, arch, 32 * warps, shared_bytes, 16)
