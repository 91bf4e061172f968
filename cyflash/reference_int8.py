"""The specification of int8 attention: what the kernels compute, number by number, in plain NumPy.

Integers are exact (int64), quantisation is in float32 as in the kernels, everything else is in float64. So a kernel
differs from this file by float32 roundings only, and by a code of P where such a rounding crosses a half.

    q, k, v -> Operand: codes, scale, mean -> products (exact integers) -> scores (reference.head_scores)
            -> parts of 64 keys: codes of P, their sums with V's codes -> log-sum-exp, output
"""
from typing import NamedTuple

import numpy as np

from cyflash import reference
from cyflash.foreign import any_kind

__all__ = ["attention_int8"]

F32 = np.finfo(np.float32)
AXES = {"tensor": (1, 2, 3), "head": (2, 3), "token": (3,)}  # of (B, H, L, D), that share one scale
BF16_MAX = float.fromhex("0x1.fep127")
PART = 64  # keys, at most, whose codes of P share a row scale
SMALLEST_WEIGHT = 256 / 255 * float(F32.tiny)  # of w in floats: kernels divide 255 by 255 omega, which must be finite


@any_kind
def attention_int8(q, k, v, *, q_scale=None, k_scale=None, v_scale=None, granularity=None, smooth_k=None,
                   fp32_sinks=None, pv=None, quant=None, block_size=256, return_lse=False, return_codes=False,
                   **options):
    """Attention with int8 queries, keys, values and weights: the integer-exact simulation.

    With the codes ``q8, k8, v8`` of the operands, their scales ``s`` and K's mean (0 without smoothing)::

        q_id = s_q[i] q8_id                                              the queries that the integers stand for
        s_ij = scale * (s_q[i] s_k[j] sum_d q8_id k8_jd + q_i . mean)
        s_ij = softcap, bias, ALiBi, masks of `attention`

    and over parts of 64 keys (those of each block of `block_size`, anchored at key 0), the online softmax::

        t_i  = max_j s_ij,  m' = max(m, t)                               over the visible keys of the part
        e_ij = exp(s_ij - t_i), 0 where hidden
        w_ij = e_ij s_v[j],  omega_i = max(max_j w_ij, 1.2e-38)          V's scale per token; else e_ij and 1
        p_ij = rint(255 w_ij / omega_i)                                  the codes of P: 0..255
        l    = l exp(m - m') + exp(t - m') sum_j e_ij                    from the unrounded weights
        O    = O exp(m - m') + exp(t - m') omega_i / 255 sum_j p_ij v8_j   times s_v, where that is not per token

    Parameters
    ----------
    q, k, v : ndarray of float32, float16, bfloat16 or int8, or an object with `data`, `scale`, `mean` and `fp32_rows`
        Each for itself, in the shapes of `attention`. Float arrays are quantised here, as float32. An int8 array needs
        its scale. An object is a `cyflash.quant.QuantizedTensor`: int8 `data` ~ (numbers - mean) / scale, whose first
        rows may be kept as `fp32_rows`.
    q_scale, k_scale, v_scale : float or array_like of float, optional
        Units of one code: of an int8 array, or a static scale for a float array, whose numbers beyond 127 scales
        saturate. Broadcasts to the operand's shape but for the last axis, which is 1.
    granularity : {"tensor", "head", "token"} or a triple of these for (q, k, v), default "token"
        How much of a float array without a scale shares one: a sequence, a head of it, or a token of that.
    smooth_k : bool, optional
        Subtract K's mean over the tokens of each (sequence, kv head) before quantising. Default: where a float k has
        no static scale.
    fp32_sinks : int, optional
        The first keys and values that are not quantised, and so no part of scales. Default: `quant`'s, the number of
        rows that k or v carries, or 0.
    pv : {"int8", "bf16", "fp32"}, optional
        The product of weights and values: as above; weights (and a float v) rounded to bfloat16; or not rounded. The
        latter two take a float v without a scale as it is. Default: `quant`'s, or "int8".
    quant : object with q_scale, k_scale, v_scale, k_mean, fp32_sinks and pv, optional
        A `cyflash.quant.LayerScales` without parts; a scale of None there is dynamic.
    block_size : int, default 256
        Keys of a block: parts do not reach across its end.
    return_lse : bool, default False
        Also return the log-sum-exp of each row.
    return_codes : bool, default False
        Also return the codes of P; only with ``pv="int8"``.
    **options
        `causal`, `causal_align`, `scale`, `window`, `softcap`, `bias`, `mask`, `alibi_slopes`, `sinks`, as in
        `attention`.

    Returns
    -------
    out : ndarray of float64, shape ``q.shape[:-1] + (Dv,)``
    lse : ndarray of float64, shape ``q.shape[:-1]``, only with `return_lse`
    codes : ndarray of uint8, shape ``q.shape[:-1] + (Lk,)``, only with `return_codes`
        0 for hidden keys and for those of `fp32_sinks`.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        As `attention`; NaN or infinity to be quantised; an int8 array without its scale; a scale that is not finite or
        below 1.18e-38, that does not broadcast, or that an operand already has; smoothing or float32 rows that an int8
        operand lacks; arguments that contradict `quant`.
    NotImplementedError
        For a planned layer: simulate each part with its own heads.

    Notes
    -----
    Per-token scales and smoothed keys are SageAttention's (Zhang et al., 2024). That the weights' scale is local to a
    few keys, and that V's scale per token is folded into them before they are rounded, is what makes eight bits enough
    for P: small weights beside a large one keep their digits.

    With ``pv="bf16"`` and ``"fp32"`` the online softmax takes whole blocks, weights are ``exp(s_ij - m')``, and ``w``
    is rounded to bfloat16, or not at all, instead of coded. The keys of `fp32_sinks` take a step of their own, before
    the rest of their block, with the caller's float32 numbers (an int8 q as ``s_q q8``). Where query rows are few the
    kernels cut more than 1024 keys or so into chunks that they merge in the end: weights are then rounded to bfloat16
    beside the greatest of their own chunk, which is not simulated.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash import reference
    >>> q = np.zeros((1, 2), np.float32); k = np.ones((3, 2), np.float32); v = np.float32([[0.0], [3.0], [6.0]])
    >>> out, codes = reference.attention_int8(q, k, v, return_codes=True)
    >>> codes.tolist()
    [[0, 128, 255]]
    >>> float(out[0, 0].round(3))
    3.004
    """
    call = resolve(q, k, v, q_scale, k_scale, v_scale, granularity, smooth_k, fp32_sinks, pv, quant)
    if return_codes and call.pv != "int8":
        raise ValueError(f"return_codes: expected pv='int8', whose weights are coded, got pv={call.pv!r}")
    if block_size < 1:
        raise ValueError(f"block_size: expected a positive number of keys, got {block_size}")
    parts = [attend(part, call.fp32_sinks, call.pv, block_size) for part in call.parts(**options)]
    out, lse, codes = zip(*parts, strict=True) if parts else ((), (), ())
    shape = call.q.values.shape[:-1]
    results = [np.array(out).reshape((*shape, call.v.codes.shape[-1]))]
    if return_lse:
        results.append(np.array(lse).reshape(shape))
    if return_codes:
        results.append(np.array(codes, np.uint8).reshape((*shape, call.k.codes.shape[-2])))
    return tuple(results) if len(results) > 1 else results[0]


# One head


class Part(NamedTuple):
    """What one query head of one sequence is computed from."""

    head: reference.Head  # the options, and the caller's numbers
    q: "Operand"
    k: "Operand"
    v: "Operand"


def part_scores(part, fp32_sinks):
    """Scores (Lq, Lk), -inf where hidden: of exact sums of integers, but for the keys of fp32_sinks."""
    head, q, k, _ = part
    products = (q.codes @ k.codes.T) * q.scale * k.scale.T + (q.codes * q.scale) @ k.mean.T
    products[:, :fp32_sinks] = head.q @ head.k[:fp32_sinks].T
    return np.where(head.visible, reference.head_scores(head, products), -np.inf)


def attend(part, fp32_sinks, pv, block_size):
    """Softmax and values, step by step: output (Lq, Dv), log-sum-exp (Lq,), codes of P (Lq, Lk)."""
    head, v, scores = part.head, part.v, part_scores(part, fp32_sinks)
    Lq, Lk = scores.shape
    codes = np.zeros((Lq, Lk), np.uint8)
    top = np.full((Lq, 1), -np.inf)         # m, the running maximum
    total = np.zeros((Lq, 1))               # l, in units of exp(m)
    out = np.zeros((Lq, v.codes.shape[1]))  # O, in units of exp(m)
    for keys, exact in steps(Lk, block_size, fp32_sinks, pv):
        coded = pv == "int8" and not exact
        highest = scores[:, keys].max(axis=1, keepdims=True)
        new_top = np.maximum(top, highest)
        unit = highest if coded else new_top
        e = exp(scores[:, keys], unit)
        w, worth, values = (e, 1.0, head.v[keys]) if exact else weights(e, v, keys, pv)
        if coded:
            w = codes[:, keys] = encode(w)
        elif pv == "bf16" and not exact:
            w = bf16(w)
        value = worth * reference.weighted_sum(w, head.visible[:, keys], values)
        old, new = exp(top, new_top), exp(unit, new_top)
        total = total * old + e.sum(axis=1, keepdims=True) * new
        out = out * old + value * new
        top = new_top
    empty = top == -np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.logaddexp(np.log(total), head.sink - top)
        out, lse = np.where(empty, 0.0, out * np.exp(-rest)), np.where(empty, head.sink, top + rest)
    return out, lse[:, 0], codes


def steps(Lk, block_size, fp32_sinks, pv):
    """(keys, exact) of each step: the float32 keys of a block, then its others, in parts where they are coded."""
    for start in range(0, Lk, block_size):
        stop = min(start + block_size, Lk)
        middle = min(max(start, fp32_sinks), stop)
        if start < middle:
            yield slice(start, middle), True
        ends = (*range(start + PART, stop, PART), stop) if pv == "int8" else (stop,)
        for end in ends:
            if middle < end:
                yield slice(middle, end), False
                middle = end


def weights(e, v, keys, pv):
    """P before it is rounded (Lq, n), what 1 of it is worth (Lq or 1, 1), and the values that it weighs (n, Dv)."""
    w, worth = (e * v.scale[keys].T, 1.0) if v.per_token else (e, v.scale[keys][:1])
    if pv == "int8":
        omega = np.maximum(w.max(axis=1, keepdims=True), SMALLEST_WEIGHT) if v.per_token else 1.0
        w, worth = 255 * w / omega, worth * omega / 255
    return w, worth, v.codes[keys]


def encode(w):
    """Codes of P: half to even; 0 for NaN, which the row's denominator shows."""
    return np.rint(np.where(np.isnan(w), 0.0, w)).astype(np.uint8)


def exp(x, top):
    """exp(x - top); 0 where x is -inf, whatever top is."""
    with np.errstate(invalid="ignore"):
        return np.where(x == -np.inf, 0.0, np.exp(x - top))


def bf16(x):
    """Rounded to the nearest bfloat16, half to even; float64."""
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.nan, rounded.view(np.float32).astype(np.float64))


# Operands


class Operand(NamedTuple):
    """One of q, k, v: numbers ~ codes * scale + mean."""

    values: np.ndarray  # (..., L, D), float64: the caller's numbers, or what the caller's codes stand for
    codes: np.ndarray   # (B, H, L, D), int64; of a v that is not quantised its numbers, of scale 1
    scale: np.ndarray   # (B, H, L, 1), float64
    mean: np.ndarray    # (B, H, 1, D), float64; 0 where nothing was subtracted
    per_token: bool     # whether tokens differ in their scales

    def of_head(self, b, h, H):
        """The part that query head h of H reads."""
        kv = h // (H // self.codes.shape[1])
        return self._replace(codes=self.codes[b, kv], scale=self.scale[b, kv], mean=self.mean[b, kv])


def quantise(x, granularity, scale=None, mean=None, fp32_sinks=0):
    """Codes (B, H, L, D) and scale of a float32 array of that shape: every operation rounds to float32.

    Without a given scale one is chosen so that the largest number that shares it has the code 127. Rows before
    `fp32_sinks` take no part: their codes are 0, and their own scales the smallest.
    """
    with np.errstate(over="ignore"):
        centred = x if mean is None else x - mean
    if scale is None:
        size = np.abs(centred)
        size[:, :, :fp32_sinks] = 0
        largest = np.minimum(size.max(axis=AXES[granularity], keepdims=True, initial=0), F32.max)
        scale = np.maximum(largest / np.float32(127), F32.tiny)
    with np.errstate(over="ignore"):
        codes = np.clip(np.rint(centred * (np.float32(1) / scale)), -127, 127)
    codes[:, :, :fp32_sinks] = 0
    return codes, scale


def token_mean(x):
    """Mean of (B, H, L, D) over its tokens, (B, H, 1, D): in float64, then rounded to float32."""
    return (x.sum(axis=2, keepdims=True, dtype=np.float64) / max(x.shape[2], 1)).astype(np.float32)


class Call(NamedTuple):
    """The operands, and what int8 adds to the options."""

    q: Operand
    k: Operand
    v: Operand
    fp32_sinks: int
    pv: str

    def parts(self, **options):
        """A `Part` for every (batch, head)."""
        B, H = self.q.codes.shape[:2]
        heads = reference.heads(*(x.values for x in self[:3]), **options)
        for (b, h), head in zip(np.ndindex(B, H), heads, strict=True):
            yield Part(head, *(x.of_head(b, h, H) for x in self[:3]))


def resolve(q, k, v, q_scale=None, k_scale=None, v_scale=None, granularity=None, smooth_k=None, fp32_sinks=None,
            pv=None, quant=None):
    """Check the arguments of `attention_int8` that int8 adds; quantise."""
    scales, k_mean, fp32_sinks, pv = _settings(q, k, v, (q_scale, k_scale, v_scale), smooth_k, fp32_sinks, pv, quant)
    of_q, of_k, of_v = _granularities(granularity)
    taken_as_it_is = pv != "int8" and scales[2] is None and _data(v).dtype == np.float32
    return Call(
        q=_operand("q", q, of_q, scales[0]),
        k=_operand("k", k, of_k, scales[1], k_mean, smooth_k, fp32_sinks),
        v=_unquantised(v, pv) if taken_as_it_is else _operand("v", v, of_v, scales[2], fp32_sinks=fp32_sinks),
        fp32_sinks=fp32_sinks,
        pv=pv,
    )


def _settings(q, k, v, scales, smooth_k, fp32_sinks, pv, quant):
    """scales of (q, k, v), K's given mean, fp32_sinks and pv, with what `quant` and the operands say about them."""
    k_mean = None
    if quant is not None:
        if getattr(quant, "parts", None) is not None:
            raise NotImplementedError("quant: a planned layer (parts) is one call for each part, on its own heads")
        if any(scale is not None for scale in scales):
            raise ValueError("q_scale, k_scale, v_scale: quant has the scales; give one or the other")
        if fp32_sinks not in (None, quant.fp32_sinks):
            raise ValueError(f"fp32_sinks: {fp32_sinks} contradicts quant, which has {quant.fp32_sinks}")
        fp32_sinks, pv = quant.fp32_sinks, quant.pv if pv is None else pv
        given = list(zip((q, k, v), (quant.q_scale, quant.k_scale, quant.v_scale), strict=True))
        for x, scale in given:
            if _is_quantized(x) and scale is not None and not _same(x.scale, scale):
                raise ValueError("quant: contradicts the scale that an operand was quantised with")
        if _is_quantized(k) and quant.k_mean is not None and (k.mean is None or not _same(k.mean, quant.k_mean)):
            raise ValueError("quant: contradicts the mean that k was quantised with")
        scales = tuple(None if _is_quantized(x) else scale for x, scale in given)
        if smooth_k and quant.k_mean is None and quant.k_scale is not None:
            raise ValueError("smooth_k: True contradicts quant, which has a k_scale and no k_mean")
        k_mean = None if _is_quantized(k) else quant.k_mean
    if fp32_sinks is None:
        fp32_sinks = max(_carried_rows(k), _carried_rows(v))
    if not 0 <= fp32_sinks <= _data(k).shape[-2]:
        raise ValueError(f"fp32_sinks: expected 0 to the {_data(k).shape[-2]} keys, got {fp32_sinks}")
    if pv not in (None, "int8", "bf16", "fp32"):
        raise ValueError(f"pv: expected 'int8', 'bf16' or 'fp32', got {pv!r}")
    return scales, k_mean, int(fp32_sinks), pv or "int8"


def _same(a, b):
    return np.array_equal(*np.broadcast_arrays(np.asarray(a, F32), np.asarray(b, F32)))


def _granularities(granularity):
    """One for each of q, k, v."""
    granularity = "token" if granularity is None else granularity
    kinds = (granularity,) * 3 if isinstance(granularity, str) else tuple(granularity)
    if len(kinds) != 3 or not set(kinds) <= set(AXES):
        raise ValueError(f"granularity: expected 'tensor', 'head', 'token' or three of them, got {granularity!r}")
    return kinds


def _operand(name, x, granularity, scale, mean=None, smooth=None, fp32_sinks=0):
    """x as an `Operand`: quantised here, or the codes and scales that it came with."""
    data = _data(x)
    if scale is not None:
        scale = _checked_scale(name, scale, data)
    mean = None if mean is None else _four(np.asarray(mean, np.float32))
    if data.dtype == np.float32:
        if smooth is None:
            smooth = mean is not None or (name == "k" and scale is None)
        if not smooth and mean is not None:
            raise ValueError("smooth_k: False contradicts quant, which has a k_mean")
        if smooth and mean is None:
            mean = token_mean(_four(data))
        if not np.isfinite(data).all():
            raise ValueError(f"{name}: expected finite numbers to quantise, got {data[~np.isfinite(data)][0]}")
        codes, scale = quantise(_four(data), granularity, scale, mean, fp32_sinks)
        return _made(codes, scale, mean)._replace(values=data.astype(np.float64))

    rows = None
    if _is_quantized(x):
        if scale is not None:
            raise ValueError(f"{name}_scale: {name} has a scale already")
        scale, mean, rows = _checked_scale(name, x.scale, data), x.mean, x.fp32_rows
        mean = None if mean is None else _four(mean)
    if scale is None:
        raise ValueError(f"{name}: expected {name}_scale beside an int8 array, the unit of its codes")
    if mean is not None and name != "k":
        raise ValueError(f"{name}: expected no mean; only k is smoothed")
    if smooth is not None and smooth != (mean is not None):
        raise ValueError(f"smooth_k: {smooth}, but k comes quantised {'with' if smooth is False else 'without'} a mean")
    if fp32_sinks != (0 if rows is None else rows.shape[-2]) and name != "q":
        raise ValueError(f"fp32_sinks: expected {name} with {fp32_sinks} fp32_rows, or as float32")
    operand = _made(_four(data), scale, mean)
    values = operand.codes * operand.scale + operand.mean
    if rows is not None:
        values[:, :, : rows.shape[-2]] = _four(rows)
    return operand._replace(values=values.reshape(data.shape))


def _made(codes, scale, mean):
    """An `Operand` but for its values: scale and mean expanded."""
    B, H, L, D = codes.shape
    mean = np.zeros(1) if mean is None else mean.astype(np.float64)
    return Operand(
        values=None,
        codes=codes.astype(np.int64),
        scale=np.broadcast_to(scale.astype(np.float64), (B, H, L, 1)),
        mean=np.broadcast_to(mean, (B, H, 1, D)),
        per_token=scale.shape[2] > 1,
    )


def _unquantised(x, pv):
    """A float v as it is, or rounded to bfloat16 (what is finite stays finite)."""
    values = x.astype(np.float64)
    codes = _four(bf16(np.clip(values, -BF16_MAX, BF16_MAX)) if pv == "bf16" else values)
    B, H, L, D = codes.shape
    return Operand(values, codes, np.ones((B, H, L, 1)), np.zeros((B, H, 1, D)), False)


def _is_quantized(x):
    return hasattr(x, "scale")


def _data(x):
    """The array that q, k or v is or holds: float32 or int8; floats of 16 bits as float32."""
    data = x.data if _is_quantized(x) else np.asarray(x)
    if data.dtype.name in ("float16", "bfloat16") and data.dtype.isnative:
        data = data.astype(np.float32)
    if data.dtype not in ((np.int8,) if _is_quantized(x) else (np.int8, np.float32)):
        raise TypeError(f"q, k, v: expected float32 (or float16, bfloat16) or int8 arrays, got {data.dtype}")
    if data.ndim not in (2, 3, 4):
        raise ValueError(f"q, k, v: expected 2, 3 or 4 axes, got shape {data.shape}")
    return data


def _carried_rows(x):
    rows = x.fp32_rows if _is_quantized(x) else None
    return 0 if rows is None else rows.shape[-2]


def _checked_scale(name, scale, data):
    scale = np.asarray(scale, np.float32)
    try:
        if scale.ndim == 1 and data.ndim > 2:
            raise ValueError
        np.broadcast_to(scale, (*data.shape[:-1], 1))
    except ValueError:
        raise ValueError(f"{name}_scale: expected a shape that broadcasts to {(*data.shape[:-1], 1)}, got {scale.shape}"
                         ) from None
    if not (np.isfinite(scale) & (scale >= F32.tiny)).all():
        raise ValueError(f"{name}_scale: expected finite numbers of at least {F32.tiny}, got {scale.min()}")
    return _four(scale)


def _four(x):
    return x[(None,) * (4 - x.ndim)]
