"""The public attention functions: validate -> plan -> allocate -> route to a kernel."""
from typing import NamedTuple

import numpy as np

from cyflash import arrays, cpu
from cyflash.cpu import threads
from cyflash.flops import attention_flops
from cyflash.plan import UNBOUNDED, checked_dropout, make_plan

# Waking a thread costs some microseconds: each should have about as much work, here 10 us at 200 GFLOP/s.
FLOPS_PER_THREAD = 2e6


class Work(NamedTuple):
    """What a call did: visible FLOPs, bytes of scratch of one thread, the tile sizes and the SIMD build used."""

    flops: int
    tile_bytes: int
    block_size_q: int
    block_size_kv: int
    implementation: str


def flash_attention(
    q, k, v, *, causal=None, causal_align="bottom-right", scale=None, window=None, softcap=0.0, bias=None, mask=None,
    alibi_slopes=None, sinks=None, dropout_p=None, seed=None, return_lse=False, out=None, config=None, num_threads=None,
):
    """Exact softmax attention in float32, tile by tile, without the (Lq, Lk) score matrix.

    Scores are ``scale * q @ k.T``, then softcap, then bias and ALiBi, then masks; all options combine. A row that sees
    no key gives 0 (and an LSE of -inf, or the sink).

    Parameters
    ----------
    q : ndarray of float32, shape (Lq, D), (H, Lq, D) or (B, H, Lq, D)
        Queries. Any strides; used in place when the last axis is contiguous, as are k, v and out.
    k : ndarray of float32, shape (Lk, D), (Hk, Lk, D) or (B, Hk, Lk, D)
        Keys. Hk must divide H: query head h reads kv head h // (H // Hk).
    v : ndarray of float32, shape (Lk, Dv), (Hk, Lk, Dv) or (B, Hk, Lk, Dv)
        Values. Dv may differ from D.
    causal : bool, optional
        Hide keys j > i + offset from query i. Default: config's, else False.
    causal_align : {"bottom-right", "top-left"}
        Query i stands at key position i + offset, where offset is Lk - Lq or 0. It counts for causal, window and ALiBi.
    scale : float, optional
        Default: config's, else 1 / sqrt(D).
    window : (int, int), optional
        (left, right): only keys from position - left to position + right are visible; -1 is unbounded. A window of W
        tokens that includes the query's own is (W - 1, 0).
    softcap : float
        cap * tanh(score / cap); 0 for none.
    bias : ndarray of float32, optional
        Added to the scores; broadcasts by NumPy's rules to q.shape[:-1] + (Lk,) and is never expanded. -inf hides.
    mask : ndarray of bool, optional
        True keeps. Broadcasts like bias.
    alibi_slopes : ndarray of float32 or list of float, shape (H,) or (B, H), optional
        Adds -slope * abs(position - j) to the scores (Press et al. 2022).
    sinks : ndarray of float32 or list of float, shape (H,), optional
        One extra logit per head in the softmax's denominator, without a value; neither scaled nor softcapped.
    dropout_p : float, optional
        Only 0 is implemented. Default: config's, else 0.
    seed : int, optional
        For dropout; has no effect without it.
    return_lse : bool
        Also return the log-sum-exp of each row's scores.
    out : ndarray of float32, shape q.shape[:-1] + (Dv,), optional
        Where to write the output. It must not overlap an input.
    config : FlashAttentionConfig, optional
        Tile sizes and defaults. An argument that is given wins over it. Its head_dim must be q's.
    num_threads : int, optional
        Default: `set_num_threads`, CYFLASH_NUM_THREADS, or what this process may use. Bits do not depend on it.

    Returns
    -------
    out : ndarray of float32, shape q.shape[:-1] + (Dv,)
    lse : ndarray of float32, shape q.shape[:-1]
        Natural logarithm. Only with return_lse.

    Raises
    ------
    TypeError
        For a dtype. Use `cyflash.reference.attention` for float64.
    ValueError
        For a shape or an option.
    NotImplementedError
        For dropout.
    MemoryError
        When the output or the tiles cannot be allocated.

    Notes
    -----
    The algorithm is FlashAttention-2 (Dao 2023, arXiv:2307.08691) with the online softmax of Milakov and Gimelshein
    (2018, arXiv:1805.02867). Memory beyond inputs and output is a few hundred kilobytes for each thread, whatever the
    lengths.

    Examples
    --------
    >>> import numpy as np, cyflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 8, 128, 64), dtype=np.float32) for _ in range(3))
    >>> cyflash.flash_attention(q, k, v, causal=True).shape
    (2, 8, 128, 64)
    """
    out, lse, _ = attend(
        q, k, v, causal=causal, causal_align=causal_align, scale=scale, window=window, softcap=softcap, bias=bias,
        mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p, seed=seed, return_lse=return_lse,
        out=out, config=config, num_threads=num_threads,
    )
    return (out, lse) if return_lse else out


def attend(
    q, k, v, *, causal=None, scale=None, dropout_p=None, seed=None, return_lse=False, out=None, config=None,
    num_threads=None, **options,
):
    """(out, lse or None, Work): what `flash_attention` and the engine of config.py share."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        arrays.require_float32(name, x, (2, 3, 4))
    block_size_q = block_size_kv = None
    if config is not None:
        _check_config(config, q)
        causal = config.causal if causal is None else causal
        scale = config.scale if scale is None else scale
        dropout_p = config.dropout_p if dropout_p is None else dropout_p
        block_size_q, block_size_kv = config.block_size_q, config.block_size_kv
    if dropout_p is not None or seed is not None:
        checked_dropout(0.0 if dropout_p is None else dropout_p, seed)
    plan = make_plan(q, k, v, causal=False if causal is None else causal, scale=scale, **options)

    shape = (*q.shape[:-1], plan.Dv)
    if out is None:
        out = np.empty(shape, np.float32)
    else:
        _check_out(out, shape, q=q, k=k, v=v, **options)
    lse = np.empty(shape[:-1], np.float32) if return_lse else None
    flops = _visible_flops(plan)
    work = _run(plan, flops, q, k, v, out, lse, block_size_q, block_size_kv, num_threads)
    return out, lse, work


def _run(plan, flops, q, k, v, out, lse, block_size_q, block_size_kv, num_threads):
    """One kernel call. Tile sizes are cut to the problem's, which changes no bit, so that small calls stay small."""
    build = cpu.active()
    Br, Bc = cpu.tile_sizes_of(build, block_size_q, block_size_kv)
    panel, rows = build.SHAPE["PANEL"], build.SHAPE["ROWS"]
    Br = min(Br, -(-plan.Lq // panel) * panel) or panel
    Bc = min(Bc, -(-plan.Lk // rows) * rows) or rows
    count = threads.for_call(1 + int(flops / FLOPS_PER_THREAD), num_threads)
    direct = arrays.rows_in_place(out)  # out itself, unless its last axis is strided
    if out.size:
        build.forward(
            *(arrays.four_axes(arrays.rows_in_place(x)) for x in (q, k, v)),
            arrays.four_axes(direct),
            None if lse is None else arrays.four_axes(lse[..., None])[..., 0],
            plan.bias, plan.mask, plan.alibi_slopes, plan.sinks,
            plan.scale, plan.softcap, plan.offset, plan.left, plan.right, Br, Bc, count,
        )
    if direct is not out:
        out[...] = direct
    return Work(flops, build.tile_bytes(Br, Bc, plan.D, plan.Dv), Br, Bc, cpu.name_of(build))


def _visible_flops(plan):
    window = tuple(-1 if side >= UNBOUNDED else side for side in (plan.left, plan.right))
    return attention_flops(
        plan.B, plan.H, plan.Lq, plan.Lk, plan.D, plan.Dv,
        causal_align="bottom-right" if plan.offset == plan.Lk - plan.Lq else "top-left",
        window=None if window == (-1, -1) else window,
    )


def _check_config(config, q):
    from cyflash.config import FlashAttentionConfig

    if not isinstance(config, FlashAttentionConfig):
        raise TypeError(f"config: expected a FlashAttentionConfig, got {type(config).__name__}")
    if config.head_dim != q.shape[-1]:
        raise ValueError(f"config: expected head_dim {q.shape[-1]} as in q {q.shape}, got {config.head_dim}")


def _check_out(out, shape, **inputs):
    arrays.require_float32("out", out)
    if out.shape != shape:
        raise ValueError(f"out: expected shape q.shape[:-1] + (Dv,) = {shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writable array, got a read-only one")
    if arrays.overlaps_itself(out):
        raise ValueError(f"out: expected elements that do not overlap, got strides {out.strides} for shape {out.shape}")
    for name, x in inputs.items():
        if isinstance(x, np.ndarray) and arrays.overlap(out, x):
            raise ValueError(f"out: expected memory of its own, got an array that overlaps {name}; pass {name}.copy()")
