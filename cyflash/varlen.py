"""Sequences of unlike lengths, one after another in arrays without padding: (total, H, D), cut by cu_seqlens.

    cu_seqlens -> Lengths (checked) -> sequences and pages, as one call of the kernels reads them

Each sequence gets the bits of a call of its own.
"""
import math
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from cyflash import arrays, attention, operands, parts, quantized
from cyflash.foreign import as_numpy, same_kind
from cyflash.operands import Codes
from cyflash.plan import broadcast_bias, broadcast_mask
from cyflash.quantized import quantise_call
from cyflash.stored import KEYS_UNIT, Stored


@same_kind
def flash_attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, *, causal=None, causal_align="bottom-right", scale=None, window=None,
    softcap=0.0, bias=None, mask=None, alibi_slopes=None, sinks=None, return_lse=False, out=None, config=None,
    num_threads=None,
):
    """`flash_attention` of many sequences of unlike lengths in one call, without padding.

    Parameters
    ----------
    q : ndarray of float32, float16 or bfloat16, shape (total_q, H, D)
        Queries of all sequences, one after another.
    k : ndarray of float32, float16 or bfloat16, shape (total_k, Hk, D)
        Keys.
    v : ndarray of float32, float16 or bfloat16, shape (total_k, Hk, Dv)
        Values.
    cu_seqlens_q, cu_seqlens_k : array-like of int, shape (n + 1,)
        Sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1]. They start at 0 and do not decrease: a sequence may be
        empty. Query rows after the last sequence give 0, and an LSE of -inf.
    bias, mask : sequence of ndarray or None, length n, optional
        One for each sequence, which broadcasts to (H, Lq, Lk) of that sequence.
    alibi_slopes : ndarray of float32 or list of float, shape (H,) or (n, H), optional
        As in `flash_attention`.
    out : ndarray of q's dtype, shape (total_q, H, Dv), optional
        Where to write the output.
    causal, causal_align, scale, window, softcap, sinks, return_lse, config, num_threads
        As in `flash_attention`; positions are those within a sequence.

    Returns
    -------
    out : ndarray of q's dtype, shape (total_q, H, Dv)
    lse : ndarray of float32, shape (total_q, H)
        Natural logarithm. Only with return_lse.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, MemoryError
        As `flash_attention`; for cu_seqlens that start elsewhere, decrease, or exceed the arrays.

    Notes
    -----
    A sequence gives the same bits as a call of its own. Sequences are cut into tasks of some query rows each, the
    longest first, which threads take in turn.

    Examples
    --------
    >>> import numpy as np, cyflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((50, 4, 64), dtype=np.float32) for _ in range(3))
    >>> out = cyflash.flash_attention_varlen(q, k, v, [0, 30, 50], [0, 30, 50], causal=True)
    >>> first = cyflash.flash_attention(*(x[:30].swapaxes(0, 1) for x in (q, k, v)), causal=True)
    >>> bool((out[:30].swapaxes(0, 1) == first).all())
    True
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        arrays.require_float(name, x, (3,))
    lengths = Lengths.of(cu_seqlens_q, cu_seqlens_k, q, k)
    kinds = attention.kinds_of(k, v)
    call = _describe(
        q, k, v, lengths, config, kinds, causal=causal, causal_align=causal_align, scale=scale,
        window=window, softcap=softcap, bias=bias, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks,
        return_lse=return_lse, out=out, num_threads=num_threads,
    )
    q, k, v = (_heads_first(arrays.rows_in_place(x)) for x in (q, k, v))
    out, lse = _run(call, lengths, q, attention.floats(k, v, kinds), None, lengths.begin_k)
    return (out, lse) if return_lse else out


@same_kind
def flash_attention_int8_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, *, q_scale=None, k_scale=None, v_scale=None, granularity=None, smooth_k=None,
    fp32_sinks=None, pv=None, quant=None, causal=None, causal_align="bottom-right", scale=None, window=None,
    softcap=0.0, bias=None, mask=None, alibi_slopes=None, sinks=None, return_lse=False, out=None, config=None,
    num_threads=None,
):
    """`flash_attention_int8` of many sequences of unlike lengths in one call, without padding.

    Parameters
    ----------
    q, k, v : ndarray of float32, float16, bfloat16 or int8
        As in `flash_attention_varlen`. A QuantizedTensor has another layout: pass its codes and its scale.
    cu_seqlens_q, cu_seqlens_k
        As in `flash_attention_varlen`.
    q_scale, k_scale, v_scale : float or array-like, optional
        x ~ code * scale: a number, or an array that broadcasts to x's shape as in NumPy, (H, 1) per head or
        (total, H, 1) per token. Otherwise as in `flash_attention_int8`.
    granularity, smooth_k, fp32_sinks, pv, quant
        As in `flash_attention_int8`, sequence by sequence: so are scales and means that are found in the call, and the
        first keys of `fp32_sinks`, which are all where a sequence has fewer. A planned `quant` runs each sequence in
        calls of its own.
    causal, causal_align, scale, window, softcap, bias, mask, alibi_slopes, sinks, return_lse, out, config, num_threads
        As in `flash_attention_varlen`.

    Returns
    -------
    out : ndarray of q's dtype, or float32 where q is int8, shape (total_q, H, Dv)
    lse : ndarray of float32, shape (total_q, H)
        Natural logarithm. Only with return_lse.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, MemoryError
        As `flash_attention_int8` and `flash_attention_varlen`.

    Notes
    -----
    A sequence gives the same bits as a call of its own.

    Examples
    --------
    >>> import numpy as np, cyflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((50, 4, 64), dtype=np.float32) for _ in range(3))
    >>> out = cyflash.flash_attention_int8_varlen(q, k, v, [0, 30, 50], [0, 30, 50])
    >>> first = cyflash.flash_attention_int8(*(x[:30].swapaxes(0, 1) for x in (q, k, v)))
    >>> bool((out[:30].swapaxes(0, 1) == first).all())
    True
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, quantized.QuantizedTensor):
            raise TypeError(
                f"{name}: expected an array (total, heads, head_dim), got a QuantizedTensor, which is (H, L, D); pass "
                f"its codes, {name}.data.swapaxes(0, 1), and {name}_scale"
            )
        operands.require_operand(name, x)
        arrays.require_array(name, x, (3,))
    lengths = Lengths.of(cu_seqlens_q, cu_seqlens_k, q, k)
    options = {
        "causal": causal, "causal_align": causal_align, "scale": scale, "window": window, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "num_threads": num_threads,
    }  # fmt: skip
    of_call = getattr(quant, "pv", None) if pv is None else pv
    call = _describe(
        q, k, v, lengths, config, ("int8", "int8"), pv=of_call, bias=bias, mask=mask, return_lse=return_lse, out=out,
        **options,
    )
    given = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    how = {"granularity": granularity, "smooth_k": smooth_k, "fp32_sinks": fp32_sinks, "pv": pv, "quant": quant}
    if parts.are_in(quant):
        _run_planned(call, lengths, q, k, v, bias, mask, config, given | how | options)
    else:
        scales = {name: _scale_heads_first(name, given[name], x) for name, x in zip(given, (q, k, v), strict=True)}
        settings = operands.settle(*(x.swapaxes(0, 1) for x in (q, k, v)), **scales, **how, ragged=True)
        _run(call, lengths, *_prepare(call, lengths, q, k, v, settings))
    return (call.out, call.lse) if return_lse else call.out


class Lengths(NamedTuple):
    """Where sequences begin, and how long they are; arrays of int."""

    begin_q: np.ndarray
    Lq: np.ndarray
    begin_k: np.ndarray
    Lk: np.ndarray

    @classmethod
    def of(cls, cu_seqlens_q, cu_seqlens_k, q, k=None):
        """Those that cu_seqlens say, within the rows of q and k; without k, of keys that lie elsewhere."""
        cu_q = _checked_offsets("cu_seqlens_q", cu_seqlens_q, "q", q)
        cu_k = _checked_offsets("cu_seqlens_k", cu_seqlens_k, "k", k)
        if len(cu_q) != len(cu_k):
            raise ValueError(
                f"cu_seqlens_k: expected {len(cu_q)} entries as in cu_seqlens_q, one more than sequences, "
                f"got {len(cu_k)}"
            )
        return cls(cu_q[:-1], np.diff(cu_q), cu_k[:-1], np.diff(cu_k))

    def of_sequence(self, i):
        """The rows of one sequence: (slice of q, slice of k)."""
        return (
            slice(self.begin_q[i], self.begin_q[i] + self.Lq[i]), slice(self.begin_k[i], self.begin_k[i] + self.Lk[i])
        )


def _checked_offsets(name, offsets, of, x):
    """cu_seqlens as an array of int, within the rows of the array x, which is called `of`, unless that is None."""
    given, offsets = offsets, np.asarray(arrays.require_host(name, offsets))
    if offsets.dtype.kind not in "iu":
        got = f"dtype {offsets.dtype.name}" if isinstance(given, np.ndarray) else repr(given)
        raise TypeError(f"{name}: expected integers, got {got}")
    if offsets.ndim != 1 or not offsets.size:
        raise ValueError(f"{name}: expected one axis, with one entry more than sequences, got shape {offsets.shape}")
    offsets = offsets.astype(np.intp)
    if offsets[0] != 0:
        raise ValueError(f"{name}: expected to start at 0, got {offsets[0]}")
    if (np.diff(offsets) < 0).any():
        i = int(np.argmax(np.diff(offsets) < 0))
        raise ValueError(f"{name}: expected entries that do not decrease, got {offsets[i]} and then {offsets[i + 1]}")
    if x is not None and offsets[-1] > len(x):
        raise ValueError(f"{name}: expected at most the {len(x)} rows of {of} {x.shape}, got {offsets[-1]} at the end")
    return offsets


def _heads_first(x):
    """(total, H, D) as a view (1, H, total, D)."""
    return x.swapaxes(0, 1)[None]


def _scale_heads_first(name, scale, x):
    """A scale that broadcasts to (total, H, D), as one for (H, total, D)."""
    if scale is None or np.ndim(scale) == 0:
        return scale
    shape = np.shape(scale)
    wide = (1,) * (3 - len(shape)) + shape
    if len(wide) != 3 or wide[2] != 1 or wide[1] not in (1, x.shape[1]) or wide[0] not in (1, len(x)):
        total, H, _ = x.shape
        raise ValueError(
            f"{name}: expected a number, (H, 1) = ({H}, 1) per head or (total, H, 1) = ({total}, {H}, 1) per token, "
            f"got shape {shape}"
        )
    scale = np.reshape(scale, wide).swapaxes(0, 1)
    return scale if scale.size > 1 else scale.item()


def _describe(q, k, v, lengths, config, kinds, *, bias, mask, out, **options):
    """The checked call, its plan with one bias and mask for each sequence."""
    n, (_, H, D) = len(lengths.Lq), q.shape
    longest_q, longest_k = int(lengths.Lq.max(initial=0)), int(lengths.Lk.max(initial=0))
    if len(v) != len(k):
        raise ValueError(f"v: expected the {len(k)} rows of k {k.shape}, got {v.shape}")
    if k.shape[2] != D or not k.shape[1] or H % k.shape[1]:
        raise ValueError(
            f"k: expected (total_k, Hk, D) with D={D} and an Hk that divides H={H}, as in q {q.shape}, got {k.shape}"
        )
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v: expected (total_k, Hk, Dv) with Hk={k.shape[1]} as in k {k.shape}, got {v.shape}")
    shapes = ((n, H, longest_q, D), (n, k.shape[1], longest_k, D), (n, v.shape[1], longest_k, v.shape[2]))
    call = attention.describe(
        *map(arrays.Shape, shapes), (q, k, v), config, kinds=kinds, dtype=attention.output_dtype(q),
        out_shape=(*q.shape[:-1], v.shape[2]), out=out, pairs=int((lengths.Lq * lengths.Lk).sum()), **options,
    )
    rows = [(H, int(Lq), int(Lk)) for Lq, Lk in zip(lengths.Lq, lengths.Lk, strict=True)]
    plan = call.plan._replace(
        bias=_of_sequences("bias", bias, broadcast_bias, rows, out),
        mask=_of_sequences("mask", mask, broadcast_mask, rows, out),
    )
    return call._replace(plan=plan)


def _of_sequences(name, given, broadcast, rows, out):
    """A list of None and (H, Lq, Lk), or None."""
    if given is None:
        return None
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name}: expected a list with an array or None for each sequence, got {type(given).__name__}")
    if len(given) != len(rows):
        raise ValueError(f"{name}: expected {len(rows)} entries, one for each sequence, got {len(given)}")
    given = [as_numpy(f"{name}[{i}]", x) for i, x in enumerate(given)]
    for i, x in enumerate(given):
        if out is not None and isinstance(x, np.ndarray) and arrays.overlap(out, x):
            raise ValueError(f"out: expected memory of its own, got an array that overlaps {name}[{i}]; pass a copy")
    return [
        None if x is None else broadcast(f"{name}[{i}]", x, shape)[0]
        for i, (x, shape) in enumerate(zip(given, rows, strict=True))
    ]


def _run(call, lengths, q, stored, codes, begin_k):
    """One kernel call; begin_k: where the keys of each sequence begin in `stored`."""
    n = len(lengths.Lq)
    sequences = np.empty((n, 5), np.intp)
    sequences[:, 0] = np.arange(n)
    sequences[:, 1], sequences[:, 2], sequences[:, 3] = lengths.begin_q, lengths.Lq, lengths.Lk
    sequences[:, 4] = 0 if call.top_left else lengths.Lk - lengths.Lq
    order = np.argsort(-(lengths.Lk * np.minimum(lengths.Lq, call.Br)), kind="stable")
    end = int(lengths.begin_q[-1] + lengths.Lq[-1]) if n else 0
    call.out[end:] = 0
    lse = call.lse
    if lse is not None:
        lse[end:] = -np.inf
    direct = arrays.rows_in_place(call.out)
    ragged = call._replace(out=_heads_first(direct), lse=None if lse is None else lse.T[None])
    attention.run(
        ragged, q, stored, codes, sequences=sequences[order], pages=np.ascontiguousarray(begin_k[order][:, None]),
        ragged=True,
    )
    if direct is not call.out:
        call.out[...] = direct
    return call.out, call.lse


def _prepare(call, lengths, q, k, v, settings):
    """(queries in floats or None, Stored, Codes, where keys begin): operands.prepare(), sequence by sequence."""
    q, k, v = (_heads_first(arrays.rows_in_place(x)) for x in (q, k, v))
    (_, Hk, total, D), Dv = k.shape, v.shape[3]
    packs_v = operands.packs_v(v[0], settings)
    # Values are packed in groups, so a sequence begins with one; keys lie as values do.
    padded = -(-lengths.Lk // KEYS_UNIT) * KEYS_UNIT
    begin = np.concatenate([[0], np.cumsum(padded)[:-1]]) if packs_v and len(padded) else lengths.begin_k
    room = (int(padded.sum()) if packs_v else total) + KEYS_UNIT
    room = -(-room // KEYS_UNIT) * KEYS_UNIT
    counts = {}

    of_q, of_k = (lengths.begin_q, lengths.Lq, lengths.begin_q, q.shape[2]), (lengths.begin_k, lengths.Lk, begin, room)
    q_codes, q_scale, _ = _quantised("q", q, *of_q, call, settings, counts)
    k_codes, k_scale, k_mean = _quantised("k", k, *of_k, call, settings, counts)
    where = np.zeros((1, 1), np.intp), np.zeros(1, np.intp), np.array([room])
    packed = np.empty((1, Hk, room, -(-D // 4) * 4), np.int8)
    correction = np.empty((1, Hk, room), np.int32)
    with call.threads as count:
        call.build.pack_keys(k_codes, packed, correction, *where, count)
    v_scale, values, v_kind = None, v, arrays.kind_of(v.dtype)
    if packs_v:
        v_codes, v_scale, _ = _quantised("v", v, *of_k, call, settings, counts)
        values, v_kind = np.empty((1, Hk, room // 4, -(-Dv // 16) * 16), np.int32), "int8"
        with call.threads as count:
            call.build.pack_values(v_codes, values, *where, count)
    else:
        operands.require_finite("v", v[0].swapaxes(0, 1))
    for tell in quantized.watched.get(settings.quant, ()):
        tell(counts)
    float_q = float_k = float_v = None
    if settings.fp32_sinks:
        float_q = operands.float_queries(q[0], settings)[None]
        float_k, float_v = (_first_rows(x, lengths, settings.fp32_sinks) for x in (k, v))
    stored = Stored(
        "int8", None, packed, values, D, Dv, v_kind, k_correction=correction, k_scale=k_scale, v_scale=v_scale,
        k_mean=k_mean, fp32_sinks=settings.fp32_sinks, float_k=float_k, float_v=float_v,
    )
    return float_q, stored, Codes(q_codes, q_scale, settings.pv), begin


def _first_rows(x, lengths, most):
    """float32 (n, Hk, most, D): the first rows of each sequence of x (1, Hk, total, D)."""
    rows = np.zeros((len(lengths.Lk), x.shape[1], most, x.shape[3]), np.float32)
    for i, (begin, L) in enumerate(zip(lengths.begin_k, np.minimum(lengths.Lk, most), strict=True)):
        rows[i, :, :L] = x[0, :, begin : begin + L]
    return rows


def _quantised(name, x, begins, lengths, places, room, call, settings, counts):
    """(codes (1, H, room, D), scales, means (n, H, D) or None) of x (1, H, total, D), whose sequences go to `places`.

    Scales: of queries (1, H, room); of keys and values that, or (n or 1, H, 1) where each head of a sequence has one.
    """
    H, D = x.shape[1], x.shape[3]
    n, given, sinks = len(begins), settings.scales[name], 0 if name == "q" else settings.fp32_sinks
    given = None if given is None else arrays.four_axes(given)
    mean = settings.k_mean if name == "k" else None
    smooth = name == "k" and settings.smooth
    means = np.zeros((n, H, D), np.float32) if smooth or mean is not None else None
    codes = np.zeros((1, H, room, D), np.int8)
    scales = np.ones((1, H, room), np.float32)
    tokens = name == "q" or (settings.granularity[name] == "token" if given is None else given.shape[2] > 1)
    if not tokens:
        scales = np.ones((n, H, 1), np.float32)
    for i, (begin, L, place) in enumerate(zip(begins, lengths, places, strict=True)):
        if not L:
            continue
        rows, to = slice(begin, begin + L), slice(place, place + L)
        scale = given if given is None or given.shape[2] == 1 else given[:, :, rows]
        skip = min(sinks, int(L))
        if x.dtype == np.int8:
            codes[:, :, to] = x[:, :, rows]
        else:
            saturated = None if scale is None else np.zeros(1, np.intp)
            with _places_in_the_whole(name, x):
                _, scale, found = quantise_call(
                    name, x[:, :, rows], settings.granularity[name], scale=scale,
                    mean=None if mean is None else arrays.four_axes(mean), smooth=smooth, fp32_sinks=skip,
                    threads=call.threads, build=call.build, codes=codes[:, :, to], saturated=saturated,
                )
            if saturated is not None:
                before = counts.get(name, (0, 0))
                counts[name] = before[0] + int(saturated[0]), before[1] + int(L - skip) * H * D
            if found is not None and skip < L:  # else no key is a code, and none is centred
                means[i] = found[0, :, 0]
        if tokens:
            scales[:, :, to] = np.broadcast_to(scale[..., 0], (1, H, L))
        else:
            scales[i] = np.broadcast_to(scale[0, :, 0], (H, 1))
    return codes, scales, means


@contextmanager
def _places_in_the_whole(name, x):
    """Errors about numbers of a sequence show their place in the caller's array, of which x is (1, H, total, D)."""
    try:
        yield
    except ValueError:
        operands.require_finite(name, x[0].swapaxes(0, 1))
        raise


def _run_planned(call, lengths, q, k, v, bias, mask, config, options):
    """Each sequence in calls of its own, into its rows of the output."""
    end = 0
    slopes = options.pop("alibi_slopes")
    for i in range(len(lengths.Lq)):
        of_q, of_k = lengths.of_sequence(i)
        end = of_q.stop
        _, lse, _ = attention.attend_int8(
            *(x[rows].swapaxes(0, 1) for x, rows in ((q, of_q), (k, of_k), (v, of_k))), **options,
            bias=None if bias is None else bias[i], mask=None if mask is None else mask[i], config=config,
            alibi_slopes=None if slopes is None else call.plan.alibi_slopes[i],
            return_lse=call.lse is not None, out=call.out[of_q].swapaxes(0, 1),
        )
        if lse is not None:
            call.lse[of_q] = lse.T
    call.out[end:] = 0
    if call.lse is not None:
        call.lse[end:] = -math.inf
