"""What q, k and v of `flash_attention_int8` are, and how they become the codes that the kernels read.

    arguments -> settle(): Settings (every conflict raises) -> prepare(): Stored and Codes (packed; scales; float rows)

Each of q, k and v is on its own: a float array, which is quantised here; int8 codes with their scale; or a
QuantizedTensor, which carries it.
"""
from typing import NamedTuple

import numpy as np

from cyflash import arrays, quantized
from cyflash.quantized import (
    LayerScales,
    QuantizedTensor,
    checked_granularity,
    checked_product,
    checked_scale,
    quantise_call,
)
from cyflash.stored import KEYS_UNIT, Stored

PACKINGS = {"q": None, "k": "keys", "v": "values"}  # of the kernels' `encode`


class Settings(NamedTuple):
    """How a call quantises, all defaults filled in and all conflicts ruled out."""

    scales: dict  # {"q", "k", "v"}: float32 array that broadcasts to the operand's shape; None where dynamic
    granularity: dict  # {"q", "k", "v"}: of the dynamic ones
    smooth: bool  # subtract the mean of float keys over their tokens
    k_mean: np.ndarray | None  # subtract, or was subtracted, this one
    fp32_sinks: int
    pv: str
    quant: LayerScales | None


class Codes(NamedTuple):
    """Quantised queries, and how the kernels multiply; keys and values are in a `Stored` (stored.py)."""

    q: np.ndarray  # int8 (B, H, Lq, D), the last axis contiguous
    q_scale: np.ndarray  # float32 (B, H, Lq)
    pv: str
    trace: np.ndarray | None = None  # uint8 (B, H, Lq, Lk): receives the codes of P


def require_operand(name, x):
    """`x` if it is a float32 or int8 array or a QuantizedTensor of 2 to 4 dimensions, else an error that names it."""
    if isinstance(x, QuantizedTensor):
        return x
    arrays.require_array(name, x, (2, 3, 4))
    if arrays.kind_of(x.dtype) is None:
        raise TypeError(
            f"{name}: expected float32 (or float16, bfloat16), int8 or a QuantizedTensor, got "
            f"{arrays.dtype_name(x.dtype)}; write {name}.astype(np.float32), or use cyflash.reference.attention"
        )
    return x


def memory_of(x):
    """The array that an operand reads."""
    return x.data if isinstance(x, QuantizedTensor) else x


# Settings


def settle(q, k, v, *, q_scale=None, k_scale=None, v_scale=None, granularity=None, smooth_k=None, fp32_sinks=None,
           pv=None, quant=None, gpu=False, ragged=False):
    """Check the quantisation arguments against each other and the operands. gpu: scales may be there. ragged: the keys
    are those of many sequences, of which any may have fewer than fp32_sinks."""
    operands = {"q": q, "k": k, "v": v}
    given = {"q": q_scale, "k": k_scale, "v": v_scale}
    k_mean = None
    if quant is not None:
        if not isinstance(quant, LayerScales):
            raise TypeError(f"quant: expected a LayerScales, got {type(quant).__name__}")
        for name, scale in given.items():
            if scale is not None:
                raise ValueError(f"{name}_scale: expected None beside quant, which has its own; pass one of the two")
        given = {"q": quant.q_scale, "k": quant.k_scale, "v": quant.v_scale}
        k_mean = None if quant.k_mean is None else _checked_mean(quant.k_mean, k)
    scales = {name: _scale(name, operands[name], given[name], quant is not None) for name in operands}
    if not gpu:
        for name, scale in scales.items():
            arrays.require_host(f"{'' if quant is None else 'quant.'}{name}_scale", scale)
    smooth, k_mean = _smoothing(k, scales["k"], smooth_k, k_mean, quant is not None)
    for name in ("q", "v"):
        if isinstance(operands[name], QuantizedTensor) and operands[name].mean is not None:
            raise ValueError(f"{name}: expected a QuantizedTensor without a mean (smooth is for k), got one with it")
    if pv is None:
        pv = "int8" if quant is None else quant.pv
    checked_product(pv)
    sinks = _sinks(q, k, v, fp32_sinks, quant, ragged)
    return Settings(scales, _granularity(granularity), smooth, k_mean, sinks, str(pv), quant)


def _scale(name, x, scale, of_quant):
    """The scale of an operand as float32, or None where it is dynamic."""
    argument = f"quant.{name}_scale" if of_quant else f"{name}_scale"
    if isinstance(x, QuantizedTensor):
        own = checked_scale(f"{name}.scale", x.scale, x.shape)
        if scale is None:
            return own
        if not of_quant:
            raise ValueError(f"{argument}: expected None, since {name} is a QuantizedTensor with its own scale")
        if not _same(own, checked_scale(argument, scale, x.shape)):
            raise ValueError(f"quant: expected the scale that {name} was quantised with, got another {argument}")
        return own
    if scale is None:
        if x.dtype == np.int8:
            given = f"LayerScales({name}_scale=...)" if of_quant else f"{name}_scale=..."
            raise ValueError(
                f"{argument}: expected the scale of the int8 array {name}, got None; write {given}, "
                f"or pass {name} in float32 or as a QuantizedTensor"
            )
        return None
    return checked_scale(argument, scale, x.shape)


def _smoothing(k, k_scale, smooth_k, k_mean, of_quant):
    """(whether to subtract the keys' own mean, the mean that is given)."""
    if smooth_k is not None and not isinstance(smooth_k, (bool, np.bool_)):
        raise ValueError(f"smooth_k: expected True, False or None, got {smooth_k!r}")
    source = "quant"
    if isinstance(k, QuantizedTensor):
        if k_mean is not None and (k.mean is None or not _same(k.mean, k_mean)):
            raise ValueError("quant: expected the k_mean that k was quantised with, got another one")
        k_mean, source = k.mean, "k"
        if smooth_k and k_mean is None:
            raise ValueError("smooth_k: expected a k that was quantised with smooth=True, got one without a mean")
    if k_mean is not None:
        if smooth_k is False:
            raise ValueError(f"smooth_k: expected True or None, since {source} carries a mean of k, got False")
        return False, k_mean
    if of_quant and smooth_k and k_scale is not None:
        raise ValueError("smooth_k: expected a quant with k_mean, got True and a quant whose k_mean is None")
    if memory_of(k).dtype == np.int8:
        if smooth_k:
            raise ValueError(
                "smooth_k: an int8 k says nothing of the mean that was subtracted; pass "
                "cyflash.quant.quantize(k, smooth=True), or k in float32"
            )
        return False, None
    return k_scale is None if smooth_k is None else bool(smooth_k), None


def _same(a, b):
    """Whether two scales or means are equal. Those on a GPU are waited for."""
    return np.array_equal(*np.broadcast_arrays(quantized.on_host(a), quantized.on_host(b)))


def _checked_mean(mean, k):
    expected = (*k.shape[:-2], 1, k.shape[-1])
    if k.ndim == 2 and mean.ndim == 3 and len(mean) == 1:  # that of the only head
        mean = mean[0]
    try:
        return np.broadcast_to(np.asarray(mean, np.float32), expected)
    except ValueError:
        raise ValueError(
            f"quant.k_mean: expected a shape that broadcasts to {expected} (k {k.shape}), got {np.shape(mean)}"
        ) from None


def _granularity(granularity):
    names = ("q", "k", "v")
    if granularity is None:
        return dict.fromkeys(names, "token")
    if isinstance(granularity, (tuple, list)):
        if len(granularity) != 3:
            raise ValueError(f"granularity: expected one or three for (q, k, v), got {granularity!r}")
        return {name: checked_granularity(one) for name, one in zip(names, granularity, strict=True)}
    return dict.fromkeys(names, checked_granularity(granularity))


def _sinks(q, k, v, fp32_sinks, quant, ragged):
    """How many keys are computed in float32: given, or what quant or the QuantizedTensors were made for."""
    n = fp32_sinks
    if n is not None and (isinstance(n, (bool, np.bool_)) or not isinstance(n, (int, np.integer)) or n < 0):
        raise ValueError(f"fp32_sinks: expected an integer of at least 0, got {n!r}")
    if quant is not None:
        if n is not None and n != quant.fp32_sinks:
            raise ValueError(f"fp32_sinks: expected quant's {quant.fp32_sinks} or None, got {n}")
        n = min(quant.fp32_sinks, k.shape[-2])  # made for sequences of any length
    if isinstance(q, QuantizedTensor) and q.fp32_rows is not None:
        raise ValueError("q: expected a QuantizedTensor without fp32_rows (they are for k and v)")
    rows = {name: _rows_of(x) for name, x in (("k", k), ("v", v)) if isinstance(x, QuantizedTensor)}
    n = int(max(rows.values(), default=0) if n is None else n)
    for name, count in rows.items():
        if count != n:
            raise ValueError(
                f"fp32_sinks: {name} was quantised with fp32_sinks={count}, got {n} of this call (or of the other "
                f"operand); quantise k and v with the same number"
            )
    if ragged:
        n = min(n, k.shape[-2])
    elif n > k.shape[-2]:
        raise ValueError(f"fp32_sinks: expected at most the {k.shape[-2]} keys of k {k.shape}, got {n}")
    for name, x in (("k", k), ("v", v)):
        if n and not isinstance(x, QuantizedTensor) and x.dtype == np.int8:
            raise ValueError(
                f"fp32_sinks: the first {n} rows of {name} are needed in float32, got int8; pass "
                f"cyflash.quant.quantize({name}, fp32_sinks={n}) or {name} in float32"
            )
    return n


def _rows_of(x):
    """How many rows in float32 a QuantizedTensor carries."""
    return 0 if x.fp32_rows is None else x.fp32_rows.shape[-2]


# Codes


def prepare(q, k, v, settings, build, threads, others=0):
    """Quantise what is float, pack keys and values: (queries in floats or None, Stored, Codes).

    others: as in `arrays.together`.
    """
    operands = {name: arrays.four_axes(memory_of(x)) for name, x in (("q", q), ("k", k), ("v", v))}
    B, Hk, Lk, D = operands["k"].shape
    Dv = operands["v"].shape[3]
    padded = -(-Lk // KEYS_UNIT) * KEYS_UNIT
    packed_v = packs_v(v, settings)
    wanted = {"k": ((B, Hk, padded, -(-D // 4) * 4), np.int8), "correction": ((B, Hk, padded), np.int32)}
    if operands["q"].dtype != np.int8:
        wanted["q"] = operands["q"].shape, np.int8
    if packed_v:
        wanted["v"] = (B, Hk, padded // 4, -(-Dv // 16) * 16), np.int32
    else:
        del operands["v"]
    room = arrays.together(others, **wanted)
    room["correction"][:, :, Lk:] = 0

    watchers = quantized.watched.get(settings.quant, ())
    scales, mean, counts = _encode(operands, settings, build, threads, room, q.ndim, bool(watchers))
    where = np.arange(B)[:, None], np.zeros(B, np.intp), np.full(B, Lk)
    if operands["k"].dtype == np.int8:
        with threads as n:
            build.pack_keys(arrays.rows_in_place(operands["k"]), room["k"], room["correction"], *where, n)
    if not packed_v:
        require_finite("v", v)
    elif operands["v"].dtype == np.int8:
        with threads as n:
            build.pack_values(arrays.rows_in_place(operands["v"]), room["v"], *where, n)
    for tell in watchers:
        tell(counts)
    floats = float_operands(q, k, v, settings) if settings.fp32_sinks else (None, None, None)
    values = room["v"] if packed_v else arrays.four_axes(arrays.rows_in_place(v))
    stored = Stored(
        "int8", None, room["k"], values, D, Dv, "int8" if packed_v else arrays.kind_of(values.dtype),
        k_correction=room["correction"], k_scale=scales["k"], v_scale=scales.get("v"), k_mean=mean,
        fp32_sinks=settings.fp32_sinks, float_k=floats[1], float_v=floats[2],
    )
    q_codes = room["q"] if "q" in room else arrays.rows_in_place(operands["q"])
    return floats[0], stored, Codes(q_codes, scales["q"], settings.pv)


def _encode(operands, settings, build, threads, room, ndim, counted):
    """Write the codes of all floats among `operands` to `room`, as they are read.

    Returns ({name: scales}, mean of the keys, counts): scales of queries are (B, H, Lq), others and the mean as in a
    Stored; counts {name: (values that saturate, values)} are of static scales, if `counted`. Errors show an operand
    with its last `ndim` axes.
    """
    threads = quantized.team_for(sum(x.size for x in operands.values()), threads)
    scales, encodings, mean, finite = {}, {}, None, True
    for name, x in operands.items():
        scale, centre = settings.scales[name], settings.k_mean if name == "k" else None
        scale, centre = (None if y is None else arrays.four_axes(y) for y in (scale, centre))
        skip = settings.fp32_sinks if name != "q" else 0
        if x.dtype != np.int8:
            operands[name] = x = arrays.rows_in_place(x)
            scale, centre, fine = quantized.ranged(
                x, quantized.POOLED[settings.granularity[name]], scale=scale, mean=centre,
                smooth=settings.smooth and name == "k", skip=skip, threads=threads, build=build,
            )
            finite = finite and fine
        scales[name] = _scales(scale, x.shape, x.shape[2] if name == "q" else room["k"].shape[2], name == "q")
        if centre is not None:
            mean = _of_heads(centre, x.shape) if x.dtype == np.int8 else centre[:, :, 0]
        if x.dtype != np.int8 and x.size:
            encodings[name] = quantized.Encoding(
                x, room[name], None if centre is None else centre[:, :, 0],
                quantized.by_row(scale, x.shape), scales[name][:, :, : x.shape[2]] if scale is None else None, skip,
                counted and settings.scales[name] is not None, PACKINGS[name],
                room["correction"] if name == "k" else None,
            )
    saturated = [-1]
    if finite:
        with threads as n:
            saturated = build.encode(list(encodings.values()), n)
    if min(saturated, default=0) < 0:
        _raise_not_finite(operands, ndim)
    counts = {}
    for (name, encoding), count in zip(encodings.items(), saturated, strict=True):
        if encoding.counted:
            counts[name] = count, encoding.x[:, :, encoding.skip :].size
    return scales, mean, counts


def _raise_not_finite(operands, ndim):
    for name, x in operands.items():
        if x.dtype != np.int8 and not arrays.finite(x).all():
            raise ValueError(quantized.not_finite(name, x, ndim))


def prepare_queries(q, scale, pv, build, threads):
    """The `Codes` of float queries (B, H, Lq, D) for keys that are codes already: with a scale for each token, or a
    given one."""
    scale = None if scale is None else arrays.four_axes(checked_scale("q_scale", scale, q.shape))
    codes, scale, _ = quantise_call("q", q, "token", scale=scale, threads=threads, build=build)
    return Codes(codes, _spread(scale, q.shape[:3]), pv)


def packs_v(v, settings):
    """Whether the second product takes codes of v: else it takes the floats themselves."""
    return memory_of(v).dtype == np.int8 or settings.scales["v"] is not None or settings.pv == "int8"


def float_operands(q, k, v, settings):
    """(q, k, v) as floats with four axes: of k and v at least the rows of fp32_sinks, in float32 unless all are
    computed so; codes of q are dequantised."""
    floats = (float_queries(q, settings), _float_rows(k, settings.fp32_sinks), _float_rows(v, settings.fp32_sinks))
    for name, x in zip("qkv", floats, strict=True):
        require_finite(name, x)
    return tuple(arrays.four_axes(arrays.rows_in_place(x)) for x in floats)


def float_queries(q, settings):
    """q as floats."""
    codes = memory_of(q)
    return QuantizedTensor(codes, settings.scales["q"]).dequantize() if codes.dtype == np.int8 else q


def _float_rows(x, n):
    if memory_of(x).dtype == np.int8:
        return x.fp32_rows if n else np.zeros((*x.shape[:-2], 0, x.shape[-1]), np.float32)
    return x if x.dtype == np.float32 else x[..., :n, :].astype(np.float32)


def require_finite(name, x):
    """Raise where x, an array of floats, has NaN or inf."""
    finite = arrays.finite(x)
    if not finite.all():
        place = tuple(int(i) for i in np.unravel_index(np.argmin(finite), x.shape))
        raise ValueError(f"{name}: expected finite values, got {x[place]} at {place}")


def _spread(scale, shape):
    """A scale with four axes, the last of which is 1, as an array of `shape` without it."""
    if scale.size == 1:
        return np.full(shape, scale.item(), np.float32)
    return np.broadcast_to(scale[..., 0], shape)


def _scales(scale, shape, length, by_row):
    """One for each of `length` tokens, those beyond an array of `shape` being 1, or where one is enough and not by_row
    (B, H, 1). scale: with four axes, or None: to be written."""
    B, H, L, _ = shape
    if scale is not None and (by_row or scale.shape[2] == 1):
        return _spread(scale, (B, H, L if by_row else 1))
    room = np.empty((B, H, length), np.float32)
    room[:, :, L:] = 1
    if scale is not None:
        room[:, :, :L] = scale[..., 0]
    return room


def _of_heads(mean, shape):
    B, Hk, _, D = shape
    return np.ascontiguousarray(np.broadcast_to(mean, (B, Hk, 1, D))[:, :, 0])
