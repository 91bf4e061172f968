"""FlashAttention-2 in Triton, for comparison: what its users write. 16 bits, D a power of two; the fastest tiles.

Each program has BLOCK_M query rows of one head. Causal programs make the tiles that every row sees without a mask, then
those on the diagonal with it.
"""
import math

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def _tiles(
    acc, top, total, q, k, v, k_row, v_row, first, last, Lk, rows, shift, unit,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """O, row maxima and sums after keys first <= j < last. EDGE: some of these keys are hidden from some rows."""
    channels = tl.arange(0, D)
    for begin in range(first, last, BLOCK_N):
        keys = begin + tl.arange(0, BLOCK_N)
        inside = keys[:, None] < Lk
        at = keys[:, None].to(tl.int64)
        k_tile = tl.load(k + at * k_row + channels[None, :], mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k_tile))
        if EDGE:
            seen = keys[None, :] < Lk
            if CAUSAL:
                seen = seen & (keys[None, :] <= rows[:, None] + shift)
            s = tl.where(seen, s, -1.0e30)
        higher = tl.maximum(top, tl.max(s, 1) * unit)
        p = tl.math.exp2(s * unit - higher[:, None])
        scale = tl.math.exp2(top - higher)
        total = total * scale + tl.sum(p, 1)
        v_tile = tl.load(v + at * v_row + channels[None, :], mask=inside, other=0.0)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * scale[:, None])
        top = higher
    return acc, top, total


@triton.jit
def _kernel(
    q, k, v, out, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    H, group, Lq, Lk, unit, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1)
    if CAUSAL:  # those with most keys first
        block = tl.num_programs(0) - 1 - block
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q += b * q_batch + h * q_head
    k += b * k_batch + h // group * k_head
    v += b * v_batch + h // group * v_head
    out += b * o_batch + h * o_head
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, D)
    there = rows[:, None] < Lq
    at = rows[:, None].to(tl.int64)
    q_tile = tl.load(q + at * q_row + channels[None, :], mask=there, other=0.0)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    shift = Lk - Lq
    if CAUSAL:
        whole = tl.maximum(tl.minimum(block * BLOCK_M + shift + 1, Lk), 0) // BLOCK_N * BLOCK_N
        last = tl.minimum(block * BLOCK_M + BLOCK_M + shift, Lk)
    else:
        whole = Lk // BLOCK_N * BLOCK_N
        last = Lk
    acc, top, total = _tiles(acc, top, total, q_tile, k, v, k_row, v_row, 0, whole, Lk, rows, shift, unit,
                             CAUSAL, False, D, BLOCK_N)
    acc, top, total = _tiles(acc, top, total, q_tile, k, v, k_row, v_row, whole, last, Lk, rows, shift, unit,
                             CAUSAL, True, D, BLOCK_N)
    acc = acc / total[:, None]
    tl.store(out + at * o_row + channels[None, :], acc.to(out.dtype.element_ty), mask=there)


TILES = [
    triton.Config({"BLOCK_M": rows, "BLOCK_N": keys}, num_warps=warps, num_stages=stages)
    for rows, keys, warps in ((128, 64, 4), (128, 64, 8), (128, 128, 8)) for stages in (2, 3)
]
_chosen = triton.autotune(TILES, key=["Lq", "Lk", "D", "CAUSAL"])(_kernel)


def attention(q, k, v, *, causal=False, tiles=None):
    """Of torch tensors (B, H, L, D), float16 or bfloat16. tiles: {"BLOCK_M", "BLOCK_N"} instead of the fastest ones."""
    B, H, Lq, D = q.shape
    Hk, Lk = k.shape[1:3]
    out = torch.empty_like(q)

    def grid(meta):
        return triton.cdiv(Lq, meta["BLOCK_M"]), B * H

    kernel = _chosen if tiles is None else _kernel
    kernel[grid](
        q, k, v, out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], H, H // Hk, Lq, Lk,
        LOG2E / math.sqrt(D), CAUSAL=causal, D=D, **(tiles or {}),
    )
    return out
