"""torch.nn.functional.scaled_dot_product_attention on NumPy arrays: its signature, its shapes, its masks.

    query, key, value -> leading axes broadcast (views) -> (B, H, L, D), joined where strides allow -> flash_attention
"""
import math
from itertools import pairwise

import numpy as np

from cyflash import arrays
from cyflash.attention import attend
from cyflash.foreign import same_kind
from cyflash.plan import checked_dropout, checked_flag


@same_kind
def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Attention with the signature and the semantics of `torch.nn.functional.scaled_dot_product_attention`.

    Parameters
    ----------
    query : ndarray of float32, float16 or bfloat16, shape (..., Lq, D)
        Two axes or more. Leading axes of query, key and value broadcast by NumPy's rules, as in torch; nothing is
        copied for that.
    key : ndarray of query's dtype, shape (..., Lk, D)
        Keys.
    value : ndarray of query's dtype, shape (..., Lk, Dv)
        Values.
    attn_mask : ndarray of bool, float32 or query's dtype, optional
        Broadcasts to the scores, (..., Lq, Lk). Of bool: True takes part. Else it is added to the scores, -inf hides.
    dropout_p : float
        Only 0 is implemented.
    is_causal : bool
        Hide keys j > i from query i: *top-left*, also where Lq != Lk. (`flash_attention` is bottom-right by default.)
        Not together with attn_mask.
    scale : float, optional
        Default: 1 / sqrt(D).
    enable_gqa : bool
        Let key and value have fewer heads (the axis before the last two) than query: their number must divide query's,
        and query head h reads head h // (H // Hk). Without it, numbers of heads must be equal or 1, as for every
        leading axis: one head of keys and values is broadcast to all of query's even so.

    Returns
    -------
    out : ndarray of query's dtype, shape (..., Lq, Dv)
        C order. Rows that see no key are 0, as those of torch are on the CPU.

    Raises
    ------
    TypeError
        For a dtype. Use `cyflash.reference.attention` for float64.
    ValueError
        For a shape, and for attn_mask together with is_causal.
    NotImplementedError
        For dropout.

    Notes
    -----
    Keys and values of unlike length, and attn_mask with is_causal, are refused here as torch documents it, though some
    of its implementations let them pass.

    Examples
    --------
    >>> import numpy as np, cyflash
    >>> rng = np.random.default_rng(0)
    >>> query = rng.standard_normal((2, 8, 128, 64), dtype=np.float32)
    >>> key, value = (rng.standard_normal((2, 2, 128, 64), dtype=np.float32) for _ in range(2))
    >>> cyflash.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).shape
    (2, 8, 128, 64)
    """
    return attended(attend, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def attended(attend, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """`scaled_dot_product_attention` by this function for what is left of it: `attention.attend`, or one like it."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        arrays.require_float(name, x)
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: expected {query.dtype.name} as query has, got {x.dtype.name}")
        if x.ndim < 2:
            raise ValueError(f"{name}: expected at least 2 dimensions (..., L, D), got shape {x.shape}")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        checked_flag(name, flag)
    checked_dropout(dropout_p, None)
    _check_lengths(query, key, value)
    lead, kv_lead = _leading_axes(query, key, value, enable_gqa)
    mask = {} if attn_mask is None else _mask(attn_mask, query, (*lead, query.shape[-2], key.shape[-2]), is_causal)
    out = np.empty((*lead, query.shape[-2], value.shape[-1]), query.dtype)
    ones = (None,) * (2 - len(lead))  # four axes at least: one path serves all
    _attend(
        attend, _spread(query, lead)[ones], _spread(key, kv_lead)[ones], _spread(value, kv_lead)[ones], out[ones],
        {name: x[ones] for name, x in mask.items()}, bool(is_causal), scale,
    )
    return out


def _spread(x, lead):
    """A view of x with these leading axes: the stride of what is broadcast is 0."""
    return np.broadcast_to(x, (*lead, *x.shape[-2:]))


def _attend(attend, q, k, v, out, mask, is_causal, scale):
    """Write out, (..., H, Lq, Dv). Axes before the last three are one batch where all are evenly spaced in memory; else
    there is a call for each of the first axis: the same bits, since no sequence depends on its neighbours."""
    if all(map(_evenly_spaced, (q, k, v, *mask.values()))):
        mask = {name: _joined(x) for name, x in mask.items()}
        attend(
            _joined(q), _joined(k), _joined(v), **mask, out=_joined(out), causal=is_causal, causal_align="top-left",
            scale=scale,
        )
        return
    for i in range(len(q)):
        _attend(attend, q[i], k[i], v[i], out[i], {name: x[i] for name, x in mask.items()}, is_causal, scale)


def _evenly_spaced(x):
    """Whether the axes before the last three can be joined without a copy."""
    axes = [(length, stride) for length, stride in zip(x.shape[:-3], x.strides[:-3], strict=True) if length != 1]
    return all(outer == length * stride for (_, outer), (length, stride) in pairwise(axes))


def _joined(x):
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _check_lengths(query, key, value):
    D, Lk = query.shape[-1], key.shape[-2]
    if D == 0:
        raise ValueError(f"query: expected a head_dim of at least 1, got shape {query.shape}")
    if key.shape[-1] != D:
        raise ValueError(f"key: expected (..., Lk, {D}) as in query {query.shape}, got {key.shape}")
    if value.shape[-2] != Lk or value.shape[-1] == 0:
        raise ValueError(
            f"value: expected (..., {Lk}, Dv) with Dv of at least 1 for key {key.shape}, got {value.shape}"
        )


def _leading_axes(query, key, value, enable_gqa):
    """(leading axes of the scores and the output, those of key and value): they differ in the number of heads at most.
    """
    shapes = [x.shape[:-2] for x in (query, key, value)]
    if not enable_gqa:
        lead = _broadcast_shapes(query, key, value, *shapes)
        shared = all(shape[-1:] in ((), (1,)) for shape in shapes[1:])  # one head of keys and values is read, not H
        return lead, (*lead[:-1], 1) if lead and shared else lead
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3:
            raise ValueError(f"{name}: expected (..., H, L, D) with enable_gqa=True, got shape {x.shape}")
    H, Hk, Hv = (shape[-1] for shape in shapes)
    if Hv != Hk:
        raise ValueError(f"value: expected {Hk} heads as in key {key.shape}, got {Hv} in {value.shape}")
    if Hk == 0 or H % Hk:
        raise ValueError(
            f"key: expected a number of heads that divides query's {H} (query {query.shape}), got {Hk} in {key.shape}"
        )
    lead = _broadcast_shapes(query, key, value, *(shape[:-1] for shape in shapes))
    return (*lead, H), (*lead, Hk)


def _broadcast_shapes(query, key, value, *shapes):
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(
            f"query, key, value: expected leading axes that broadcast, got shapes {query.shape}, {key.shape} and "
            f"{value.shape}; for key and value with fewer heads than query pass enable_gqa=True"
        ) from None


def _mask(attn_mask, query, scores, is_causal):
    """attn_mask as an option of `flash_attention`."""
    arrays.require_array("attn_mask", attn_mask, dtype="bool")
    if is_causal:
        raise ValueError(
            "attn_mask: expected None with is_causal=True, as in torch; cyflash.flash_attention takes causal=True, "
            'causal_align="top-left" and mask or bias together'
        )
    name = "mask" if attn_mask.dtype == np.bool_ else "bias"
    if name == "bias" and attn_mask.dtype not in (arrays.FLOAT32, query.dtype):
        raise TypeError(
            f"attn_mask: expected bool (True takes part), float32 or query's {query.dtype.name} (added to the scores), "
            f"got {arrays.dtype_name(attn_mask.dtype)}; write attn_mask.astype(bool) or attn_mask.astype(np.float32)"
        )
    if name == "bias":
        attn_mask = attn_mask.astype(np.float32, copy=False)
    try:
        return {name: np.broadcast_to(attn_mask, scores)}
    except ValueError:
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to (..., Lq, Lk) = {scores}, got {attn_mask.shape}"
        ) from None
