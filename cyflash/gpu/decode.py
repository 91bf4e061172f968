"""Few query rows: keys are cut into chunks, one kernel takes them (decode.cu), a second one joins what they leave
(merge.cu)."""
from typing import NamedTuple

from cyflash.gpu.variants import FLAGS, SIZES, TYPES, Variant, choose, round_up

# Up to here no kernel reads keys less often than this one does, once for 16 rows of all the heads that share them.
FEW_ROWS = 16
KEYS = 32  # of a tile, as in decode.cu
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
    stage = KEYS * D * (SIZES[qk] + SIZES[v]) + KEYS * 4 * ((qk == "int8") + (v == "int8"))
    stages = min(max(MOST_RING_BYTES // (teams * stage), 1), 4)
    macros = (("HEAD_DIM", D), ("WARPS", warps), ("TEAM", team), ("STAGES", stages),
              ("BLOCKS", 3 if team == 2 or (D <= 64 and not busy) else 2), ("QK_TYPE", TYPES[qk]), ("V_TYPE", TYPES[v]),
              *flags)
    shared_bytes = 16 * D * SIZES[qk] + teams * (16 * 8 + stages * stage)
    return Variant("decode.cu", "cyflash_decode", macros, arch, 32 * warps, shared_bytes, 16)
