"""The specification of cyflash: attention written as its textbook formula, in float64 and with plain NumPy.

Every kernel is compared with this file, so it shares no code with them, validation included. It favours reading over
speed: one head at a time, with the whole score matrix of that head in memory.

    positions -> visible keys -> scores -> log-sum-exp -> weights -> output

`attention_int8`, the simulation of int8 attention, is in reference_int8.py.
"""
import math
from typing import NamedTuple

import numpy as np

from cyflash.foreign import any_kind

__all__ = ["attention", "attention_int8"]


@any_kind
def attention(q, k, v, *, causal=False, causal_align="bottom-right", scale=None, window=None, softcap=0.0, bias=None,
              mask=None, alibi_slopes=None, sinks=None, return_lse=False):
    """Attention in float64, by definition.

    With ``p_i = i + Lk - Lq`` the position of query ``i`` (``p_i = i`` when `causal_align` is ``"top-left"``)::

        s_ij = scale * q_i . k_j
        s_ij = softcap * tanh(s_ij / softcap)                     where softcap > 0
        s_ij = s_ij + bias_ij - slope * |p_i - j|
        s_ij = -inf                                               where key j is invisible to query i
        lse_i = log(sum_j exp(s_ij) + exp(sink))
        out_i = sum_j exp(s_ij - lse_i) v_j                       over the visible keys only

    Parameters
    ----------
    q : array_like, shape (Lq, D), (H, Lq, D) or (B, H, Lq, D)
        Queries, of any floating-point dtype; all arithmetic is in float64.
    k : array_like, shape (Lk, D), (Hk, Lk, D) or (B, Hk, Lk, D)
        Keys. ``H`` is a multiple of ``Hk``; query head ``h`` reads key and value head ``h // (H // Hk)``.
    v : array_like, shape (Lk, Dv), (Hk, Lk, Dv) or (B, Hk, Lk, Dv)
        Values. ``Dv`` may differ from ``D``.
    causal : bool, default False
        Key ``j`` is visible to query ``i`` only if ``j <= p_i``.
    causal_align : {"bottom-right", "top-left"}, default "bottom-right"
        Where queries stand when ``Lq != Lk``. Also moves `window` and `alibi_slopes`.
    scale : float, optional
        Multiplies the scores. Default ``1 / sqrt(D)``.
    window : (left, right), optional
        Key ``j`` is visible only if ``p_i - left <= j <= p_i + right``; -1 is unbounded.
    softcap : float, default 0.0
        Limits scores smoothly to ``(-softcap, softcap)``; 0 switches it off.
    bias : array_like of float, optional
        Added to the scores; broadcasts to ``q.shape[:-1] + (Lk,)``. An entry of -inf is exactly a mask.
    mask : array_like of bool, optional
        True keeps a key, False hides it; broadcasts to ``q.shape[:-1] + (Lk,)``.
    alibi_slopes : array_like, shape (H,) or (B, H), optional
        Slope of each head's distance penalty.
    sinks : array_like, shape (H,), optional
        One more logit per head, in natural units (neither scaled nor capped), that takes weight and adds no value.
    return_lse : bool, default False
        Also return the log-sum-exp of each row.

    Returns
    -------
    out : ndarray of float64, shape ``q.shape[:-1] + (Dv,)``
    lse : ndarray of float64, shape ``q.shape[:-1]``, only with `return_lse`
        Natural logarithm; includes the sink.

    Raises
    ------
    TypeError
        An array that is not floating point, a mask that is not boolean.
    ValueError
        Shapes that do not fit together, or an option out of its range.

    Notes
    -----
    A row that sees no key (``Lk = 0`` included) has output 0 and log-sum-exp -inf, or the sink. NaN and infinity in
    keys and values reach only the rows that see them. A row whose visible scores are all -inf counts as seeing none.

    The formula is equation (1) of Vaswani et al., "Attention Is All You Need", 2017, with the options of the libraries
    that followed it: bottom-right causal and windows as in FlashAttention-2, ALiBi of Press et al., 2022, sinks of
    Xiao et al., 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash import reference
    >>> q = np.zeros((1, 2)); k = np.ones((3, 2)); v = np.array([[0.0], [3.0], [6.0]])
    >>> out, lse = reference.attention(q, k, v, return_lse=True)
    >>> out.item(), round(lse.item(), 6)
    (3.0, 1.098612)
    """
    shape, Dv = np.shape(q)[:-1], np.shape(v)[-1:]
    rows, lse = [], []
    for head in heads(q, k, v, causal=causal, causal_align=causal_align, scale=scale, window=window, softcap=softcap,
                      bias=bias, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks):
        scores = np.where(head.visible, head_scores(head), -np.inf)
        weights, row_lse = softmax(scores, head.sink)
        rows.append(weighted_sum(weights, head.visible, head.v))
        lse.append(row_lse)
    out = np.array(rows).reshape(shape + Dv)
    return (out, np.array(lse).reshape(shape)) if return_lse else out


class Head(NamedTuple):
    """What one query head of one sequence is computed from."""

    q: np.ndarray         # (Lq, D)
    k: np.ndarray         # (Lk, D)
    v: np.ndarray         # (Lk, Dv)
    distance: np.ndarray  # (Lq, Lk): p_i - j
    visible: np.ndarray   # (Lq, Lk), bool
    scale: float
    softcap: float        # 0: off
    bias: np.ndarray      # (Lq, Lk), or the number 0
    slope: float          # 0: no ALiBi
    sink: float           # -inf: none


def heads(q, k, v, *, causal=False, causal_align="bottom-right", scale=None, window=None, softcap=0.0, bias=None,
          mask=None, alibi_slopes=None, sinks=None):
    """Check the arguments of `attention`; yield a `Head`, in float64, for every (batch, head)."""
    q, k, v = _float64("q", q), _float64("k", k), _float64("v", v)
    B, H, Lq, Hk, Lk = _sizes(q, k, v)
    shape = (*q.shape[:-1], Lk)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    bias = None if bias is None else _four(_broadcast("bias", _float64("bias", bias), shape))
    mask = None if mask is None else _four(_broadcast("mask", _boolean("mask", mask), shape))
    slopes = np.zeros((B, H)) if alibi_slopes is None else _per_head("alibi_slopes", alibi_slopes, B, H, (H,), (B, H))
    sinks = np.full((B, H), -np.inf) if sinks is None else _per_head("sinks", sinks, B, H, (H,))
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected 0 (off) or a positive finite number, got {softcap}")
    distance = _distance(Lq, Lk, causal_align)
    within = _within(distance, causal, window)
    q, k, v = _four(q), _four(k), _four(v)
    for b, h in np.ndindex(B, H):
        visible, head_bias, kv = within, 0.0, h // (H // Hk)
        if mask is not None:
            visible = visible & mask[b, h]
        if bias is not None:
            visible, head_bias = visible & (bias[b, h] != -np.inf), bias[b, h]
        yield Head(q[b, h], k[b, kv], v[b, kv], distance, visible, scale, softcap, head_bias, slopes[b, h], sinks[b, h])


def head_scores(head, products=None):
    """Scores of one head before masks, (Lq, Lk): scale, then softcap, then bias and ALiBi.

    products: q @ k.T, when it has been computed otherwise.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        scores = head.scale * (head.q @ head.k.T if products is None else products)
        if head.softcap:
            scores = head.softcap * np.tanh(scores / head.softcap)
        return scores + head.bias - head.slope * np.abs(head.distance)


def softmax(scores, sink=-np.inf):
    """Weights (Lq, Lk), exactly 0 where the score is -inf, and the log-sum-exp (Lq,), which includes the sink."""
    from scipy.special import logsumexp

    logits = np.concatenate([scores, np.full((len(scores), 1), sink)], axis=1)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        top = logits.max(axis=1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0.0)  # a row of scores near -1e38 would absorb the log of their number
        rest = logsumexp(logits - top, axis=1, keepdims=True)
        weights = np.exp(scores - top - rest)
    return np.where(scores == -np.inf, 0.0, weights), (top + rest)[:, 0]


def weighted_sum(weights, seen, v):
    """Sum of the seen values, (Lq, Dv): one that is NaN or infinite reaches no other row, though 0 * NaN is NaN."""
    finite = np.isfinite(v)
    with np.errstate(invalid="ignore", over="ignore"):
        out = weights @ np.where(finite, v, 0.0)
        for j in np.flatnonzero(~finite.all(axis=1)):
            out += np.where(seen[:, j, None], weights[:, j, None] * np.where(finite[j], 0.0, v[j]), 0.0)
    return out


def _distance(Lq, Lk, causal_align):
    """p_i - j, (Lq, Lk): how many tokens key j lies before query i."""
    if causal_align not in ("bottom-right", "top-left"):
        raise ValueError(f"causal_align: expected 'bottom-right' or 'top-left', got {causal_align!r}")
    first = Lk - Lq if causal_align == "bottom-right" else 0
    return np.arange(first, first + Lq)[:, None] - np.arange(Lk)[None, :]


def _within(distance, causal, window):
    """Which keys causal and window leave visible, (Lq, Lk)."""
    if window is not None and (np.shape(window) != (2,) or min(window) < -1):
        raise ValueError(f"window: expected (left, right), each at least -1 (unbounded), got {window}")
    left, right = (-1, -1) if window is None else window
    within = np.ones(distance.shape, dtype=bool)
    if causal:
        within &= distance >= 0
    if left != -1:
        within &= distance <= left
    if right != -1:
        within &= -distance <= right
    return within


def _sizes(q, k, v):
    if not (q.ndim == k.ndim == v.ndim and q.ndim in (2, 3, 4)):
        raise ValueError(f"q, k, v: expected the same rank, 2, 3 or 4, got shapes {q.shape}, {k.shape}, {v.shape}")
    (B, H, Lq, D), (Bk, Hk, Lk, Dk), (Bv, Hv, Lv, _) = (_four(x).shape for x in (q, k, v))
    if (Bk, Dk) != (B, D):
        raise ValueError(f"k: expected the batch and the last axis of q {q.shape}, got {k.shape}")
    if (Bv, Hv, Lv) != (Bk, Hk, Lk):
        raise ValueError(f"v: expected the shape of k {k.shape} but for the last axis, got {v.shape}")
    if Hk != H and (Hk == 0 or H % Hk):
        raise ValueError(f"k: expected a number of heads that divides q's {H}, got {Hk}")
    return B, H, Lq, Hk, Lk


def _four(x):
    return x[(None,) * (4 - x.ndim)]


def _float64(name, x):
    x = np.asarray(x)
    if x.dtype.kind != "f" and x.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected a floating-point array, got {x.dtype}")
    return x.astype(np.float64)


def _boolean(name, x):
    x = np.asarray(x)
    if x.dtype != bool:
        raise TypeError(f"{name}: expected bool (True keeps a key), got {x.dtype}; to add to the scores use bias=")
    return x


def _broadcast(name, x, shape):
    try:
        return np.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {x.shape}") from None


def _per_head(name, x, B, H, *shapes):
    x = _float64(name, x)
    if x.shape not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {x.shape}")
    return np.broadcast_to(x, (B, H))


from cyflash.reference_int8 import attention_int8  # noqa: E402 - it is built from the functions above
