"""Merging: attention over two sets of keys, from attention over each and the log-sum-exp of its rows."""
import math

import numpy as np

from cyflash import arrays
from cyflash.foreign import same_kind


@same_kind
def merge_states(out_a, lse_a, out_b, lse_b, *, lse_base="e"):
    """Attention over the keys of two parts together, from the outputs and log-sum-exps of each.

    Splitting keys and merging gives what one call over all of them gives, up to rounding: a shared prefix can be
    computed once, or a long context piece by piece. Any number of parts is merged two at a time, in any order.

    Parameters
    ----------
    out_a, out_b : ndarray of float32, float16 or bfloat16, shape (..., Lq, Dv)
        Outputs of the same queries over different keys. Of one dtype; (total, H, Dv) of ragged batches as well.
    lse_a, lse_b : ndarray of float32, shape out_a.shape[:-1]
        Log-sum-exp of each row's scores. A part whose row saw no key has -inf there and no weight, whatever its
        output holds.
    lse_base : {"e", 2}
        Base of lse_a, lse_b and the lse returned: "e" for the natural logarithm, as cyflash and FlashAttention have
        it; 2 as FlashInfer has it.

    Returns
    -------
    out : ndarray, shape and dtype of out_a
        Computed in float32. 0 in rows that no part saw a key in.
    lse : ndarray of float32, shape of lse_a
        In the same base; -inf in rows that no part saw a key in.

    Raises
    ------
    TypeError
        For a dtype.
    ValueError
        For a shape, or another lse_base.

    Notes
    -----
    ``lse = log(exp(lse_a) + exp(lse_b))`` and ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``, from the
    difference of the two LSEs alone, so that nothing overflows. NaN and infinity go through as in this formula. With
    `sinks`, exactly one part may carry them: each part that does adds them to the denominator. Merging partial softmax
    results so is from Rabe and Staats (2021, arXiv:2112.05682).

    Examples
    --------
    >>> import numpy as np, cyflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((8, 96, 64), dtype=np.float32) for _ in range(3))
    >>> a = cyflash.flash_attention(q, k[:, :40], v[:, :40], return_lse=True)
    >>> b = cyflash.flash_attention(q, k[:, 40:], v[:, 40:], return_lse=True)
    >>> out, lse = cyflash.merge_states(*a, *b)
    >>> bool(np.abs(out - cyflash.flash_attention(q, k, v)).max() < 1e-6)
    True
    """
    _check(out_a, lse_a, out_b, lse_b)
    if not isinstance(lse_base, (str, int)) or isinstance(lse_base, bool) or lse_base not in ("e", 2):
        raise ValueError(f'lse_base: expected "e" or 2, got {lse_base!r}')
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        # Equal ones, infinities too, differ by 0: inf - inf would be NaN.
        gap = np.abs(np.where(lse_a == lse_b, np.float32(0), lse_a - lse_b))
        smaller = np.exp(-gap) if lse_base == "e" else np.exp2(-gap)  # weight of the smaller, the larger having 1
        logarithm = np.log1p(smaller)
        lse = np.maximum(lse_a, lse_b) + (logarithm if lse_base == "e" else logarithm * np.float32(1 / math.log(2)))
        larger, smaller = 1 / (1 + smaller), smaller / (1 + smaller)
        a_is_larger = lse_a >= lse_b
        out = _weighted(out_a, np.where(a_is_larger, larger, smaller), lse_a)
        out += _weighted(out_b, np.where(a_is_larger, smaller, larger), lse_b)
        return out.astype(out_a.dtype, copy=False), lse


def _weighted(out, weight, lse):
    """weight * out in float32, 0 in rows without a key."""
    product = out.astype(np.float32, copy=False) * weight[..., None]
    product[lse == -np.inf] = 0
    return product


def _check(out_a, lse_a, out_b, lse_b):
    for name, x in (("out_a", out_a), ("out_b", out_b)):
        arrays.require_float(name, x)
    if out_a.ndim < 2:
        raise ValueError(f"out_a: expected (..., Lq, Dv), got shape {out_a.shape}")
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b: expected the shape of out_a {out_a.shape}, got {out_b.shape}")
    if out_b.dtype != out_a.dtype:
        raise TypeError(
            f"out_b: expected {out_a.dtype.name} as out_a has, got {out_b.dtype.name}; write out_b.astype(out_a.dtype)"
        )
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        arrays.require_array(name, lse)
        if lse.dtype != arrays.FLOAT32:
            raise TypeError(
                f"{name}: expected float32, got {arrays.dtype_name(lse.dtype)}; write {name}.astype(np.float32)"
            )
        if lse.shape != out_a.shape[:-1]:
            raise ValueError(
                f"{name}: expected shape out_a.shape[:-1] = {out_a.shape[:-1]}, "
                f"got {lse.shape}{_hint(name, lse, out_a)}"
            )


def _hint(name, lse, out):
    """The way out for the LSE of other libraries, which have the heads first."""
    if lse.ndim == out.ndim - 1 >= 2 and lse.swapaxes(-1, -2).shape == out.shape[:-1]:
        return f"; write {name}.swapaxes(-1, -2)"
    return ""
