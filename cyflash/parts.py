"""Planned layers: parts of the heads that differ in how they are computed, each a call of attention of its own.

    quant.parts -> split(): Part -> its heads of q, k, v and the options -> a call -> its heads of out and lse

Heads that are evenly spaced are views of the caller's arrays, others are copied.
"""
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import numpy as np

from cyflash import arrays
from cyflash.quantized import LayerScales


def are_in(quant):
    """Whether `quant` is a planned layer."""
    return isinstance(quant, LayerScales) and quant.parts is not None


def require_alone(q, k, v, how):
    """Raise unless q, k and v are floats and nothing of `how`, the arguments that say how to quantise, is given."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, np.ndarray) or arrays.kind_of(x.dtype) not in arrays.FLOATS:
            got = arrays.dtype_name(x.dtype) if isinstance(x, np.ndarray) else type(x).__name__
            raise TypeError(
                f"{name}: expected an array of float32 (or float16, bfloat16) beside a planned layer (quant.parts), "
                f"got {got}"
            )
        arrays.require_float(name, x, (2, 3, 4))
    require_no_more(how)


def require_no_more(how):
    """Raise where anything of `how`, the arguments that say how to quantise, is given."""
    for name, value in how.items():
        if value is not None:
            raise ValueError(
                f"{name}: expected None beside a planned layer, whose quant.parts say how to compute their heads"
            )


class Part(NamedTuple):
    """One call: what it computes, and where that belongs."""

    name: str
    quant: LayerScales | None  # None: in float32
    qkv: tuple
    options: dict
    heads: tuple[int, ...]  # of the whole call's query heads
    out: np.ndarray  # of all heads, as is lse
    lse: np.ndarray | None

    def write(self, out, lse):
        """Put the call's results where they belong, unless they are there."""
        if _spacing(self.heads) is None:
            self.out[..., list(self.heads), :, :] = out
        if self.lse is not None:
            self.lse[..., list(self.heads), :] = lse

    def named_in_errors(self):
        """Errors within say which part they are of."""
        return named_in_errors(self.name)


@contextmanager
def named_in_errors(name):
    """Errors within say which part they are of."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} (in {name}; its heads are counted from 0)") from None


def require_all_heads(quant, plan, k):
    """Raise unless the parts hold the kv heads of k."""
    planned = sum(len(kv_heads) for kv_heads, _ in quant.parts)
    if planned != plan.Hk:
        raise ValueError(f"quant.parts: expected the {plan.Hk} kv heads of k {k.shape}, got a plan of {planned}")


def split(quant, q, k, v, out, lse, plan, options):
    """The `Part`s of a call that was checked: its plan, the arrays it writes, and its options as they were given.

    They share the memory for what they have to copy: each is done with before the next is asked for.
    """
    require_all_heads(quant, plan, k)
    group = plan.H // plan.Hk
    q, k, v, out = (x if x.ndim > 2 else x[None] for x in (q, k, v, out))
    lse = lse if lse is None or lse.ndim > 1 else lse[None]
    heads_of = [tuple(range(kv * group, (kv + 1) * group)) for kv in range(plan.Hk)]
    room = _room(quant.parts, heads_of, q=q, k=k, v=v, out=out)
    for i, (kv_heads, layer) in enumerate(quant.parts):
        heads = tuple(chain.from_iterable(heads_of[kv] for kv in kv_heads))
        yield Part(
            f"quant.parts[{i}], kv heads {', '.join(map(str, kv_heads))}",
            layer,
            (_gathered(q, heads, room["q"]), _gathered(k, kv_heads, room["k"]), _gathered(v, kv_heads, room["v"])),
            options | {
                "bias": _of_heads(options.get("bias"), heads),
                "mask": _of_heads(options.get("mask"), heads),
                "alibi_slopes": None if plan.alibi_slopes is None else plan.alibi_slopes[:, list(heads)],
                "sinks": None if plan.sinks is None else plan.sinks[list(heads)],
                "out": _placed(out, heads, room["out"]),
            },
            heads,
            out,
            lse,
        )


def _room(parts, heads_of, **arrays_of_all):
    """{name: memory for the largest part whose heads are copied}, in one piece for the reason in `arrays.together`."""
    copied = [kv_heads for kv_heads, _ in parts if _spacing(tuple(chain(*(heads_of[kv] for kv in kv_heads)))) is None]
    share = max(map(len, copied), default=0) / len(heads_of)
    return arrays.together(0, **{
        name: ((*x.shape[:-3], round(share * x.shape[-3]), *x.shape[-2:]), x.dtype)
        for name, x in arrays_of_all.items()
    })


def _placed(x, heads, room):
    """x[..., heads, :, :] to write to: a view, or `room` for heads that are not evenly spaced."""
    where = _spacing(heads)
    return room[..., : len(heads), :, :] if where is None else x[..., where, :, :]


def _gathered(x, heads, room):
    """x[..., heads, :, :] to read: a view, or a copy in `room`."""
    placed = _placed(x, heads, room)
    if _spacing(heads) is None:
        for i, head in enumerate(heads):
            placed[..., i, :, :] = x[..., head, :, :]
    return placed


def _of_heads(x, heads):
    """These heads of a bias or a mask: a view if they are evenly spaced, else a copy. What is broadcast stays so."""
    if x is None or x.ndim < 3 or x.shape[-3] == 1:
        return x
    where = slice(len(heads)) if x.strides[-3] == 0 else _spacing(heads)
    if where is not None:
        return x[..., where, :, :]
    once = arrays.once(x)
    copy = np.stack([once[..., head, :, :] for head in heads], axis=-3)
    return np.broadcast_to(copy, (*x.shape[:-3], len(heads), *x.shape[-2:]))


def _spacing(heads):
    """The slice that selects `heads`, or None where they are not evenly spaced."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    evenly = tuple(range(heads[0], heads[-1] + 1, step)) == heads
    return slice(heads[0], heads[-1] + 1, step) if evenly else None
