"""Attention as it is written in plain NumPy, float32: what cyflash is measured against.

It is written well: all heads in one call, grouped heads without copies, one score array that every step reuses.
"""

import math

import numpy as np

__all__ = ["plain_attention"]


def plain_attention(
    q, k, v, *, causal=False, causal_align="bottom-right", scale=None, window=None, softcap=0.0, bias=None, mask=None,
    alibi_slopes=None, sinks=None,
):  # fmt: skip
    """Attention with the whole score array in memory.

    Parameters
    ----------
    q : ndarray of float32, shape (Lq, D), (H, Lq, D) or (B, H, Lq, D)
    k : ndarray of float32, shape (Lk, D), (Hk, Lk, D) or (B, Hk, Lk, D); H is a multiple of Hk
    v : ndarray of float32, shape (Lk, Dv), (Hk, Lk, Dv) or (B, Hk, Lk, Dv)
    causal, causal_align, scale, window, softcap, bias, mask, alibi_slopes, sinks
        As in `cyflash.flash_attention`.

    Returns
    -------
    ndarray of float32, shape q.shape[:-1] + (Dv,)

    Notes
    -----
    Not validated, and of use for comparisons only: `cyflash.flash_attention` gives the same in less time and memory.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.plain import plain_attention
    >>> q = np.zeros((2, 4), np.float32)
    >>> plain_attention(q, np.ones((3, 4), np.float32), np.array([[0.0], [3.0], [6.0]], np.float32))
    array([[3.],
           [3.]], dtype=float32)
    """
    shape, Dv = q.shape[:-1], v.shape[-1]
    D = q.shape[-1]
    q, k, v = _grouped(q, k, v)
    scale = 1 / math.sqrt(D) if scale is None else scale

    scores = np.matmul(q * np.float32(scale), k.swapaxes(-1, -2))  # (B, Hk, H // Hk, Lq, Lk)
    if softcap:
        scores /= np.float32(softcap)
        np.tanh(scores, out=scores)
        scores *= np.float32(softcap)
    if bias is not None:
        scores += _per_score(bias, scores, shape)
    if causal or window is not None or alibi_slopes is not None:
        distance = _distance(q.shape[-2], k.shape[-2], causal_align)
        if alibi_slopes is not None:
            scores -= _per_head(alibi_slopes, scores) * np.abs(distance).astype(np.float32)
        np.copyto(scores, -np.inf, where=_hidden(distance, causal, window))
    if mask is not None:
        np.copyto(scores, -np.inf, where=~_per_score(mask, scores, shape))

    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        sinks = _per_head(sinks, scores)
        largest = np.maximum(largest, sinks)
    largest[np.isneginf(largest)] = 0.0  # a row that sees no key
    scores -= largest
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks - largest)
    out = np.matmul(scores, v)
    out /= np.where(total == 0.0, np.float32(1.0), total)
    return out.reshape(*shape, Dv)


def _grouped(q, k, v):
    """Views with a group axis: q (B, Hk, H // Hk, Lq, D); k and v (B, Hk, 1, Lk, D), which broadcast over the group."""
    q, k, v = (x[(None,) * (4 - x.ndim)] for x in (q, k, v))
    B, H, Lq, D = q.shape
    Hk = k.shape[1]
    return q.reshape(B, Hk, H // Hk, Lq, D), k[:, :, None], v[:, :, None]


def _per_head(x, scores):
    """(H,) or (B, H) -> (1 or B, Hk, H // Hk, 1, 1), as `scores` needs it."""
    x = np.asarray(x, np.float32)
    return x.reshape(-1, *scores.shape[1:3], 1, 1)


def _per_score(x, scores, rows):
    """A view of what broadcasts to rows + (Lk,) in the shape of `scores`."""
    return np.broadcast_to(x, (*rows, scores.shape[-1])).reshape(scores.shape)


def _distance(Lq, Lk, causal_align):
    """p_i - j of every query and key, (Lq, Lk)."""
    offset = Lk - Lq if causal_align == "bottom-right" else 0
    return (np.arange(Lq) + offset)[:, None] - np.arange(Lk)


def _hidden(distance, causal, window):
    """True where query i does not see key j."""
    left, right = (-1, -1) if window is None else window
    right = 0 if causal else right
    hidden = np.zeros(distance.shape, bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= distance < -right
    return hidden
