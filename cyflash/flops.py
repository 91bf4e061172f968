"""How much work a call is: the (query, key) pairs that causal and window leave visible, and the FLOPs they cost.

The engine reports this count and `cyflash bench` divides by it, so that skipped tiles and padding never raise a rate.
Bias, masks, softcap and sinks add no FLOPs: they change scores, not products.
"""


def visible_pairs(Lq, Lk, causal=False, causal_align="bottom-right", window=None):
    """Count the pairs (i, j) that causal and window leave visible, exactly, in constant time.

    Query i stands at p = i + off, with off = Lk - Lq ("bottom-right") or 0 ("top-left"). Key j is visible when j <= p
    (causal) and p - left <= j <= p + right (window); causal caps right at 0.

    Parameters
    ----------
    Lq, Lk : int
        Number of queries and of keys.
    causal : bool, default False
    causal_align : {"bottom-right", "top-left"}
    window : (int, int), optional
        (left, right) reach in keys, -1 for unbounded.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        For another `causal_align`.

    Examples
    --------
    >>> visible_pairs(4, 4)
    16
    >>> visible_pairs(4, 4, causal=True)
    10
    >>> visible_pairs(4, 4, window=(1, 0))
    7
    """
    if causal_align not in ("bottom-right", "top-left"):
        raise ValueError(f"causal_align: expected 'bottom-right' or 'top-left', got {causal_align!r}")
    left, right = (-1, -1) if window is None else window
    return pairs_at(Lk - Lq if causal_align == "bottom-right" else 0, Lq, Lk, left, 0 if causal else right)


def pairs_at(off, Lq, Lk, left, right):
    """Count the pairs (i, j) with i + off - left <= j <= i + off + right, where -1 is unbounded."""
    pairs = Lq * Lk if right < 0 else _pairs_up_to(off + right, Lq, Lk)
    if left >= 0:
        pairs -= _pairs_up_to(off - left - 1, Lq, Lk)
    return pairs


def attention_flops(B, H, Lq, Lk, D, Dv, causal=False, causal_align="bottom-right", window=None):
    """Count the FLOPs of Q K^T and P V over the visible pairs: 2 (D + Dv) each, for B sequences of H query heads.

    Parameters
    ----------
    B, H, Lq, Lk, D, Dv : int
        Batch, query heads, queries, keys, head_dim of q and k, head_dim of v.
    causal, causal_align, window
        As in `visible_pairs`.

    Returns
    -------
    int

    Examples
    --------
    >>> attention_flops(1, 8, 2048, 2048, 64, 64) == 4 * 64 * 2048**2 * 8
    True
    """
    return 2 * (D + Dv) * visible_pairs(Lq, Lk, causal, causal_align, window) * B * H


def _pairs_up_to(diagonal, Lq, Lk):
    """Count the pairs of an Lq x Lk grid with j <= i + diagonal: the sum over i of clip(i + diagonal + 1, 0, Lk)."""
    # clip(x, 0, Lk) = max(x, 0) - max(x - Lk, 0), and each max sums to a difference of two triangles.
    return _triangle(diagonal + Lq) - _triangle(diagonal) - _triangle(diagonal + Lq - Lk) + _triangle(diagonal - Lk)


def _triangle(n):
    return n * (n + 1) // 2 if n > 0 else 0
