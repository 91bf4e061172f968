"""Checks that the functions of flash_attn.py share: shapes by the letters of their axes, dtypes, options, lengths."""
import operator
from contextlib import contextmanager

import numpy as np

from cyflash import arrays
from cyflash.plan import checked_dropout, checked_flag


def check_shape(name, x, axes, sizes):
    """Raise unless x is a float array with these axes, such as "B Lq H D". A letter that is in `sizes` must have that
    length, and a number is one; other letters are added to sizes."""
    arrays.require_float(name, x)
    axes = axes.split()
    known = {axis: int(axis) if axis.isdecimal() else sizes.get(axis) for axis in axes}
    if x.ndim != len(axes) or any(known[axis] not in (None, n) for axis, n in zip(axes, x.shape, strict=True)):
        given = ", ".join(f"{axis}={sizes[axis]}" for axis in axes if axis in sizes)
        raise ValueError(f"{name}: expected ({', '.join(axes)}){given and f' with {given}'}, got {x.shape}")
    if x.shape[-1] == 0:
        raise ValueError(f"{name}: expected a head_dim of at least 1, got shape {x.shape}")
    sizes.update(zip(axes, x.shape, strict=True))


def check_heads(name, x, sizes):
    H, Hk = sizes["H"], sizes["Hk"]
    if Hk != H and (Hk == 0 or H % Hk):
        raise ValueError(f"{name}: expected a number of heads that divides q's {H}, got {Hk} in {x.shape}")


def check_dtypes(q, **others):
    """Raise unless the others have q's dtype; None counts as not given."""
    for name, x in others.items():
        if x is not None and x.dtype != q.dtype:
            raise TypeError(
                f"{name}: expected {q.dtype.name} as in q, got {x.dtype.name}; write {name}.astype(q.dtype)"
            )


def checked_index(name, value):
    """An integer of at least 0."""
    if isinstance(value, (bool, np.ndarray)) or not hasattr(type(value), "__index__") or operator.index(value) < 0:
        raise ValueError(f"{name}: expected an integer of at least 0, got {value!r}")
    return operator.index(value)


def checked_integers(name, x, shape, of):
    """x as int64, an array of this shape; of: what the shape is, in words."""
    arrays.require_array(name, x, dtype="np.int32")
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {arrays.dtype_name(x.dtype)}; write {name}.astype(np.int32)")
    if len(shape) != x.ndim or any(n not in (None, m) for n, m in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name}: expected shape {of}, got {x.shape}")
    return x.astype(np.int64)


def check_range(name, x, low, high, why):
    """Raise unless low <= x <= high at every place, the bounds being numbers or arrays that broadcast."""
    wrong = (x < low) | (x > high)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        bounds = " to ".join(str(np.broadcast_to(bound, x.shape)[place]) for bound in (low, high))
        raise ValueError(f"{name}: expected {bounds} ({why}), got {x[place]} at {list(place)}")


def check_longest(name, longest, cu_name, cu_seqlens):
    """Raise unless `longest` is at least the length of each sequence. What is wrong with cu_seqlens itself is found
    where sequences are cut (varlen.Lengths)."""
    longest = checked_index(name, longest)
    lengths = np.diff(checked_integers(cu_name, cu_seqlens, (None,), "(B + 1,)"))
    if (lengths > longest).any() and (lengths >= 0).all():
        raise ValueError(f"{name}: expected at least {lengths.max()}, the longest of {cu_name}, got {longest}")


def as_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic):
    """The options of `cyflash.flash_attention`."""
    checked_dropout(dropout_p, None)
    checked_flag("deterministic", deterministic)
    return {
        "causal": causal, "scale": softmax_scale, "window": window_size, "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }


@contextmanager
def errors_name(**names):
    """Errors within call arguments as they are called here."""
    names |= {"scale": "softmax_scale", "window": "window_size"}
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, said = str(error).partition(":")
        raise type(error)(names.get(name, name) + colon + said) from None
