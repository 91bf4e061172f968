"""From a call's arguments to one immutable plan: every shape and option checked, every default filled in.

Nothing here computes attention or allocates arrays. Errors name the argument, what was expected, what came, and the
way out.
"""
import math
import numbers
import operator
from typing import NamedTuple

import numpy as np

from cyflash import arrays

# Stands for "no bound" of a window: beyond any key, yet far from overflow when positions are added to it.
UNBOUNDED = 1 << 61

FLOAT32_MAX = float(np.finfo(np.float32).max)


class Plan(NamedTuple):
    """What the kernels need to know of a call, besides the arrays."""

    B: int
    H: int
    Hk: int
    Lq: int
    Lk: int
    D: int
    Dv: int
    scale: float
    softcap: float
    offset: int  # query i stands at key position i + offset
    left: int  # keys from position - left ...
    right: int  # ... to position + right are visible
    bias: np.ndarray | None  # (B, H, Lq, Lk) view, stride 0 where it was broadcast
    mask: np.ndarray | None  # the same, as bytes
    alibi_slopes: np.ndarray | None  # (B, H)
    sinks: np.ndarray | None  # (H,)


def make_plan(
    q, k, v, *, causal=False, causal_align="bottom-right", scale=None, window=None, softcap=0.0, bias=None, mask=None,
    alibi_slopes=None, sinks=None, offset=None,
):
    """Check arrays q, k, v (of checked dtypes) and the options of `flash_attention` against each other.

    offset: an integer wins over causal_align: k and v are then a piece of longer ones, at any place before or after q.
    """
    B, H, Lq, D = (1,) * (4 - q.ndim) + q.shape
    Hk, Lk, Dv = _key_value_shape(q, k, v)
    if not isinstance(causal_align, str) or causal_align not in ("bottom-right", "top-left"):
        raise ValueError(f"causal_align: expected 'bottom-right' or 'top-left', got {causal_align!r}")
    left, right = checked_window(window)
    if checked_flag("causal", causal):
        right = 0
    rows = (*q.shape[:-1], Lk)
    return Plan(
        B, H, Hk, Lq, Lk, D, Dv,
        scale=1.0 / math.sqrt(D) if scale is None else _scale(scale),
        softcap=_softcap(softcap),
        offset=offset if offset is not None else Lk - Lq if causal_align == "bottom-right" else 0,
        left=left,
        right=right,
        bias=None if bias is None else broadcast_bias("bias", bias, rows),
        mask=None if mask is None else broadcast_mask("mask", mask, rows),
        alibi_slopes=None if alibi_slopes is None else _per_head("alibi_slopes", alibi_slopes, ((H,), (B, H)), (B, H)),
        sinks=None if sinks is None else _per_head("sinks", sinks, ((H,),), (H,)),
    )


def with_config(config, q, causal, scale, dropout_p, seed):
    """(causal, scale) of a call, where what was not given is config's; dropout, given or config's, must be off."""
    if config is not None:
        from cyflash.config import FlashAttentionConfig

        if not isinstance(config, FlashAttentionConfig):
            raise TypeError(f"config: expected a FlashAttentionConfig, got {type(config).__name__}")
        if config.head_dim != q.shape[-1]:
            raise ValueError(f"config: expected head_dim {q.shape[-1]} as in q {q.shape}, got {config.head_dim}")
        causal = config.causal if causal is None else causal
        scale = config.scale if scale is None else scale
        dropout_p = config.dropout_p if dropout_p is None else dropout_p
    if dropout_p is not None or seed is not None:
        checked_dropout(0.0 if dropout_p is None else dropout_p, seed)
    return causal, scale


def checked_dropout(dropout_p, seed):
    """Raises unless dropout is off; `seed` must be an int or None all the same."""
    if seed is not None and not _is_index(seed):
        raise ValueError(f"seed: expected an integer or None, got {seed!r}")
    p = _real("dropout_p", dropout_p)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p!r}")
    if p > 0.0:
        raise NotImplementedError(f"dropout_p: dropout is not implemented, got {dropout_p!r}; pass dropout_p=0")


def _key_value_shape(q, k, v):
    """(Hk, Lk, Dv), after checking that k and v fit q."""
    names = {2: "(L, D)", 3: "(H, L, D)", 4: "(B, H, L, D)"}
    for name, x in (("k", k), ("v", v)):
        if x.ndim != q.ndim:
            raise ValueError(
                f"{name}: expected {q.ndim} dimensions {names[q.ndim]} as in q {q.shape}, "
                f"got {x.ndim} with shape {x.shape}"
            )
    B, H, _, D = (1,) * (4 - q.ndim) + q.shape
    kB, Hk, Lk, kD = (1,) * (4 - k.ndim) + k.shape
    vB, vH, vL, Dv = (1,) * (4 - v.ndim) + v.shape
    expected = {2: "(Lk, D)", 3: "(Hk, Lk, D)", 4: "(B, Hk, Lk, D)"}[q.ndim]
    sizes = f"B={B}, D={D}" if q.ndim == 4 else f"D={D}"
    if D == 0:
        raise ValueError(f"q: expected a head_dim of at least 1, got shape {q.shape}")
    if (kB, kD) != (B, D):
        raise ValueError(f"k: expected {expected} with {sizes} as in q {q.shape}, got {k.shape}{_layout_hint(q)}")
    if Hk != H and (Hk == 0 or H % Hk):
        raise ValueError(
            f"k: expected a number of heads that divides q's {H} (q {q.shape}), "
            f"got {Hk} in {k.shape}{_layout_hint(q)}"
        )
    if (vB, vH, vL) != (kB, Hk, Lk):
        raise ValueError(
            f"v: expected {expected[:-1].replace(', D', ', Dv')}) with k's shape {k.shape} but for Dv, got {v.shape}"
        )
    if Dv == 0:
        raise ValueError(f"v: expected a head_dim of at least 1, got shape {v.shape}")
    return Hk, Lk, Dv


def _layout_hint(q):
    if q.ndim < 3:
        return ""
    order = "(B, L, H, D)" if q.ndim == 4 else "(L, H, D)"
    axes = "0, 2, 1, 3" if q.ndim == 4 else "1, 0, 2"
    return f"; if your arrays are {order}, pass x.transpose({axes}) (no copy is made)"


def checked_flag(name, value):
    """`value` as a bool, else ValueError."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def _is_index(value):
    return hasattr(type(value), "__index__") and not isinstance(value, (bool, np.ndarray))


def _real(name, value):
    """`value` as a finite float."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:  # an integer or a fraction beyond float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return number


def _scale(value):
    scale = _real("scale", value)
    if abs(scale) > FLOAT32_MAX:
        raise ValueError(
            f"scale: expected at most {FLOAT32_MAX:.3g}, the largest float32, got {value!r}; scale q or k instead"
        )
    return scale


def _softcap(value):
    cap = _real("softcap", value)
    if cap < 0.0:
        raise ValueError(f"softcap: expected a number above 0, or 0 for none, got {value!r}")
    return cap


def checked_window(window):
    """(left, right) with UNBOUNDED for -1."""
    if window is None:
        return UNBOUNDED, UNBOUNDED
    if _is_index(window):
        W = operator.index(window)
        raise ValueError(
            f"window: expected (left, right), got the integer {W}; a window of W tokens that includes the query's own "
            f"is (W-1, 0){f', here ({W - 1}, 0)' if W > 0 else ''}"
        )
    if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(_is_index(side) for side in window):
        raise ValueError(f"window: expected two integers (left, right), got {window!r}")
    sides = [operator.index(side) for side in window]
    if min(sides) < -1:
        raise ValueError(f"window: expected entries of at least 0, or -1 for unbounded, got {tuple(window)}")
    return tuple(UNBOUNDED if side == -1 else min(side, UNBOUNDED) for side in sides)


def _broadcast(name, x, rows):
    """x broadcast by NumPy's rules to `rows`, q.shape[:-1] + (Lk,), as a (B, H, Lq, Lk) view."""
    try:
        return arrays.four_axes(np.broadcast_to(arrays.aligned(x), rows, subok=True))
    except ValueError:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to q.shape[:-1] + (Lk,) = {rows}, got {x.shape}"
        ) from None


def broadcast_bias(name, bias, rows):
    """A bias as a float32 (B, H, Lq, Lk) view."""
    arrays.require_array(name, bias)
    if bias.dtype == np.bool_:
        raise TypeError(f"{name}: expected float32, got bool; a boolean array that keeps where True is `mask`")
    return _broadcast(name, arrays.require_float32(name, bias), rows)


def broadcast_mask(name, mask, rows):
    """A mask as a (B, H, Lq, Lk) view of bytes."""
    arrays.require_array(name, mask, dtype="bool")
    if mask.dtype != np.bool_:
        way_out = (
            "an array that is added to the scores is `bias`" if mask.dtype.kind in "fV" else "write mask.astype(bool)"
        )
        raise TypeError(f"{name}: expected bool (True keeps), got {mask.dtype.name}; {way_out}")
    return _broadcast(name, mask.view(np.uint8), rows)


def numbers_of(name, x):
    """A list of numbers, nested or not, as float32."""
    try:
        array = np.array(x)
    except ValueError:  # of uneven lengths
        array = np.array(None)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: expected an array or a list of numbers, got {x!r}")
    return array.astype(np.float32)


def _per_head(name, x, shapes, wanted):
    """A small float32 array of one of `shapes`, broadcast to `wanted`. Lists of numbers are taken too."""
    if isinstance(x, (list, tuple)):
        x = numbers_of(name, x)
    arrays.require_float32(name, x)
    if x.shape not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))} for q's heads, got {x.shape}")
    return np.broadcast_to(arrays.aligned(x), wanted, subok=True)
