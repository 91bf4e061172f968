"""`flash_attention` and `flash_attention_int8` for arrays on a GPU: check, plan, quantise, launch.

Checks, plans and errors are those of the CPU path, which get shadows of the arrays (arrays.py).

    call = described(...)      shapes and options in order, the output allocated
    _attended(call, pieces)     pieces of the keys, each by a kernel; two are merged by their log-sum-exps
"""
from typing import NamedTuple

import numpy as np

from cyflash import operands, parts, plan
from cyflash import quantized as quant_rules
from cyflash.arrays import FLOATS, NAMES
from cyflash.gpu import arrays, decode, kernels, launch, planned, quantise, status
from cyflash.gpu.arrays import GPUArray, as_cupy, look
from cyflash.gpu.tensors import on_device
from cyflash.gpu.where import on_gpu
from cyflash.quantized import QuantizedTensor

LARGEST_HEAD_DIM = 256
LONGEST = 2**30  # of Lq, Lk and the offset: positions and their differences are 32-bit integers in kernels
OPTIONAL = ("bias", "mask", "alibi_slopes", "sinks")


def attend(q, k, v, *, config=None, **options):
    """(out, lse or None, Work): `cyflash.attention.attend` for arrays on a GPU."""
    seen = looked_at({"q": q, "k": k, "v": v}, FLOATS, "float32 (or float16, bfloat16)")
    with arrays.current_stream(seen["q"]):
        call = described(seen, seen["q"].kind, config, **options)
        return _attended(call, [_floats(call, *seen.values())])


def attend_int8(
    q, k, v, *, q_scale=None, k_scale=None, v_scale=None, granularity=None, smooth_k=None, fp32_sinks=None, pv=None,
    quant=None, config=None, **options,
):
    """(out, lse or None, Work): `cyflash.attention.attend_int8` for arrays on a GPU."""
    if parts.are_in(quant):
        how = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale, "granularity": granularity}
        how |= {"smooth_k": smooth_k, "fp32_sinks": fp32_sinks, "pv": pv}
        return planned.attend(q, k, v, quant, how, config, **options)
    given = {"q": q, "k": k, "v": v}
    seen = looked_at(
        {name: operands.memory_of(x) for name, x in given.items()}, (*FLOATS, "int8"),
        "float32 (or float16, bfloat16), int8 or a QuantizedTensor",
    )
    with arrays.current_stream(seen["q"]):
        kind = "fp32" if seen["q"].kind == "int8" else seen["q"].kind
        call = described(seen, kind, config, **options)
        settings = operands.settle(
            *(_stand_in(given[name], seen[name]) for name in "qkv"), q_scale=q_scale, k_scale=k_scale, v_scale=v_scale,
            granularity=granularity, smooth_k=smooth_k, fp32_sinks=fp32_sinks, pv=pv, quant=quant,
            gpu=True,
        )
        prefix = "" if quant is None else "quant."
        scales = {f"{prefix}{name}_scale": scale for name, scale in settings.scales.items() if on_gpu(scale)}
        arrays.require_one_device(seen | {name: look(name, scale) for name, scale in scales.items()})
        return _attended(call, _pieces(call, given, seen, settings))


# Checks


def looked_at(named, kinds, expected):
    """{name: GPUArray}, all of these kinds, on one device, with rows in place."""
    seen = {}
    for name, x in named.items():
        seen[name] = found = look(name, x)
        if found.shadow.ndim not in (2, 3, 4):
            raise ValueError(
                f"{name}: expected 2 or 3 or 4 dimensions, got {found.shadow.ndim} with shape {found.shadow.shape}"
            )
        if found.kind not in kinds:
            raise TypeError(f"{name}: expected {expected}, got {_dtype_name(found)}; convert it to float32")
        _require_rows(name, found)
    arrays.require_one_device(seen)
    return seen


def _require_rows(name, x):
    if x.shadow.size and x.shadow.shape[-1] > 1 and x.strides[-1] != 1:
        raise ValueError(
            f"{name}: expected a contiguous last axis on the GPU, got strides {x.strides} (in elements) for shape "
            f"{x.shadow.shape}; write cupy.ascontiguousarray({name}), or {name}.contiguous() with torch"
        )


def _dtype_name(x):
    return NAMES.get(x.kind) or x.shadow.dtype.name


class _Call(NamedTuple):
    """A checked call: what the plan does not hold."""

    plan: plan.Plan  # its arrays are shadows
    device: int
    kind: str  # of the output
    like: GPUArray  # whose library the results are of
    out: GPUArray  # with four axes
    lse: GPUArray | None
    results: tuple  # out and lse as the caller gets them
    keep: tuple  # what must live until kernels are queued


def described(
    seen, kind, config, *, causal=None, scale=None, return_lse=False, out=None, num_threads=None, dropout_p=None,
    seed=None, **options,
):
    """Check the options that all precisions share, and allocate the output."""
    if num_threads is not None:
        raise ValueError(f"num_threads: expected None with arrays on a GPU, got {num_threads!r}: it is of the CPU path")
    q, k, v = (seen[name].shadow for name in "qkv")
    causal, scale = plan.with_config(config, q, causal, scale, dropout_p, seed)
    extra = {name: _optional(name, options[name], seen["q"]) for name in OPTIONAL if options.get(name) is not None}
    if out is not None:
        extra["out"] = look("out", out)
    arrays.require_one_device(seen | extra)
    shadows = options | {name: x.shadow for name, x in extra.items() if name != "out"}
    made = plan.make_plan(q, k, v, causal=False if causal is None else causal, scale=scale, **shadows)
    _require_limits(made, seen)
    launch.capability(seen["q"].device)

    shape = (*q.shape[:-1], made.Dv)
    if out is None:
        out = arrays.empty(seen["q"], shape, np.float32 if seen["q"].kind == "int8" else None)
        own, result = look("out", out), arrays.handed_out(seen["q"], out)
    else:
        own, result = extra["out"], out
        _check_out(own, kind, shape, seen, shadows)
    lse = arrays.empty(seen["q"], shape[:-1], np.float32) if return_lse else None
    seen_lse = None if lse is None else look("lse", lse)
    return _Call(
        made, seen["q"].device, kind, seen["q"], own.four_axes(), seen_lse,
        (result, None if lse is None else arrays.handed_out(seen["q"], lse)), (out, lse, extra),
    )


def _optional(name, x, like):
    """An array of an option; a list of numbers is sent to the GPU."""
    if isinstance(x, (list, tuple)) and type(x) is not GPUArray:
        x = status.cupy().asarray(plan.numbers_of(name, x))
    found = look(name, x)
    if found.kind == "bf16":
        raise TypeError(f"{name}: expected {'bool' if name == 'mask' else 'float32'}, got bfloat16")
    if name == "sinks" and found.kind == "fp32" and not found.shadow.flags.c_contiguous:  # kernels read them in order
        found = look(name, status.cupy().ascontiguousarray(as_cupy(found)))
    return found


def _require_limits(made, seen):
    """What the kernels cannot do is said here."""
    if made.D > LARGEST_HEAD_DIM:
        raise NotImplementedError(
            f"q: a head_dim of at most {LARGEST_HEAD_DIM} is implemented on a GPU, got {made.D}; the CPU takes any"
        )
    if made.Dv != made.D:
        raise NotImplementedError(
            f"v: a head_dim other than q's is not implemented on a GPU, got {made.Dv} and {made.D}; the CPU has it"
        )
    for name, length in (("q", made.Lq), ("k", made.Lk)):
        if length >= LONGEST:
            raise ValueError(f"{name}: expected fewer than {LONGEST} rows on the GPU, got {seen[name].shadow.shape}")


def _check_out(out, kind, shape, seen, shadows):
    from cyflash.attention import _check_out as check_out

    if out.kind != kind:
        raise TypeError(f"out: expected {NAMES[kind]}, got {_dtype_name(out)}")
    check_out(out.shadow, shape, out.shadow.dtype, [seen[name].shadow for name in "qkv"], shadows)
    _require_rows("out", out)


def _stand_in(given, seen):
    """What operands.settle looks at in place of an operand: the shadow, or a QuantizedTensor whose data is one."""
    if not isinstance(given, QuantizedTensor):
        return seen.shadow
    stand_in = object.__new__(QuantizedTensor)
    for name, value in vars(given).items():
        object.__setattr__(stand_in, name, seen.shadow if name == "data" else value)
    return stand_in


# Pieces of a call


class _Piece(NamedTuple):
    """What a kernel computes: keys from `first` on, as many as k has."""

    first: int
    kind: str  # of both products' first operands: "fp32", "fp16", "bf16", "int8"
    pv: str  # of the second product
    arrays: dict  # {name of a pointer of params.py: GPUArray with four axes}
    keep: tuple = ()


def _floats(call, q, k, v, first=0):
    """The piece of an exact call. Arrays of unlike kinds are converted to float32."""
    operands = {"q": q, "k": k, "v": v}
    kinds = {x.kind for x in operands.values()}
    kind = kinds.pop() if len(kinds) == 1 else "fp32"
    taken = {name: x.four_axes() if x.kind == kind else _of_cupy(quantise.floats(x.four_axes()))
             for name, x in operands.items()}
    return _Piece(first, kind, kind, taken)


def _of_cupy(x, kind=None):
    """A GPUArray of an array of CuPy; kind: of one whose dtype does not say it."""
    found = look("x", x)
    return found if kind is None else found._replace(kind=kind)


def _pieces(call, given, seen, settings):
    """The pieces of a call on codes: the keys of fp32_sinks in float32, then the others."""
    n, Lk = settings.fp32_sinks, call.plan.Lk
    pieces = []
    if n:
        pieces.append(_sink_piece(call, given, seen, settings))
    if n < Lk or not Lk:
        pieces.append(_coded_piece(call, given, seen, settings))
    return pieces


def _sink_piece(call, given, seen, settings):
    """Keys and values of fp32_sinks as they are in float32, and queries in float32."""
    n = settings.fp32_sinks
    q = seen["q"].four_axes()
    codes = q.kind == "int8"
    q32 = as_cupy(q).astype(np.float32) * on_device(settings.scales["q"]) if codes else quantise.floats(q)
    rows = {
        name: on_device(given[name].fp32_rows) if isinstance(given[name], QuantizedTensor)
        else quantise.floats(seen[name].four_axes().rows(n))
        for name in ("k", "v")
    }
    taken = {"q": q32, **rows}
    return _Piece(0, "fp32", "fp32", {name: _of_cupy(x) for name, x in taken.items()})


class _Codes(NamedTuple):
    """An operand as codes, on the device."""

    codes: GPUArray  # int8, four axes
    scale: object  # cupy, broadcasts to (B, H, L, 1)
    marked: object  # the same with NaN for tokens that are not finite
    mean: object  # cupy (B, H, 1, D), or None


def _coded_piece(call, given, seen, settings):
    """The keys that fp32_sinks leaves. Their shift goes into the scores, so softcap, sinks and the LSE need nothing."""
    watchers = quant_rules.watched.get(getattr(settings.quant, "watched_as", settings.quant), ())
    counts = {} if watchers else None
    q = _codes("q", seen, settings, counts)
    k = _codes("k", seen, settings, counts)
    v = _codes("v", seen, settings, counts) if _packs_v(seen["v"], settings) else None
    for tell in watchers:
        tell(counts)
    first = settings.fp32_sinks
    if settings.pv == "fp32":
        return _dequantised_piece(seen, q, k, v, first)
    taken = {
        "q": q.codes, "k": k.codes, "q_scale": _spread(q.marked, q.codes), "k_scale": _spread(k.marked, k.codes),
    }
    if settings.pv == "int8":
        taken |= {"v": v.codes, "v_scale": _spread(v.marked, v.codes)}
        pv = "int8"
    else:
        taken["v"] = values = _half(seen["v"], v)
        pv = values.kind
    if k.mean is not None:
        taken["shift"] = _of_cupy(quantise.shift(as_cupy(q.codes), q.scale, k.mean, call.plan.scale))
    return _Piece(first, "int8", pv, {name: _from(x, first) if name[0] in "kv" else x for name, x in taken.items()})


def _packs_v(v, settings):
    return v.kind == "int8" or settings.scales["v"] is not None or settings.pv == "int8"


def _codes(name, seen, settings, counts):
    """One operand. counts: receives what saturates, for whoever watches, which waits for the GPU; or None."""
    x, scale = seen[name].four_axes(), settings.scales[name]
    scale = None if scale is None else on_device(scale)
    mean = settings.k_mean if name == "k" else None
    mean = None if mean is None else on_device(mean)
    heads = (*x.shadow.shape[:2], 1, x.shadow.shape[3])
    if x.kind == "int8":
        return _Codes(x, scale, scale, _broadcast(mean, heads))
    values = quantise.floats(x)
    if name == "k" and settings.smooth:
        mean = quantise.token_mean(values)
    skip = settings.fp32_sinks if name != "q" else 0
    if scale is not None and counts is not None:
        counts[name] = quantise.saturated(values, scale, mean, skip), values[:, :, skip:].size
    codes, scale, marked = quantise.encode(values, settings.granularity[name], scale=scale, mean=mean, skip=skip)
    return _Codes(_of_cupy(codes), scale, marked, _broadcast(mean, heads))


def _dequantised_piece(seen, q, k, v, first):
    """pv="fp32": the numbers that the codes stand for, through the kernel of float32. Products of codes are integers
    there that float32 holds, so only the scales' roundings differ from an integer product."""
    keys = _numbers(k)
    if k.mean is not None:
        keys = keys + k.mean
    values = quantise.floats(seen["v"].four_axes()) if v is None else _numbers(v)
    taken = {"q": _numbers(q), "k": keys[:, :, first:], "v": values[:, :, first:]}
    return _Piece(first, "fp32", "fp32", {name: _of_cupy(x) for name, x in taken.items()})


def _numbers(operand):
    return as_cupy(operand.codes).astype(np.float32) * operand.marked


def _half(v, codes):
    """pv="bf16": values of 16 bits as they are, others rounded to bfloat16; codes as the numbers they stand for."""
    if codes is None and v.kind in ("fp16", "bf16"):
        return v.four_axes()
    return _of_cupy(quantise.bf16(quantise.floats(v.four_axes()) if codes is None else _numbers(codes)), "bf16")


def _broadcast(x, shape):
    return None if x is None else status.cupy().broadcast_to(x, shape)


def _spread(scale, codes):
    """A scale for each token of `codes`, (B, H, L): strides are 0 where it is shared."""
    found = _of_cupy(scale)
    return found._replace(shadow=np.broadcast_to(found.shadow, (*codes.shadow.shape[:3], 1), subok=True))


def _from(x, first):
    """The tokens from `first` on."""
    return x._replace(shadow=x.shadow[:, :, first:])


# Launches


def _attended(call, pieces):
    """Launch every piece; (out, lse or None, Work)."""
    from cyflash.attention import Work, visible_flops

    out, lse = call.results
    flops = visible_flops(call.plan)
    if not call.out.shadow.size:
        return out, lse, Work(flops, 0, 0, 0, "gpu")
    if len(pieces) == 1:
        ran = [_run(call, pieces[0], call.plan, call.kind, call.out, call.lse)]
    else:
        ran = _merge_pieces(call, pieces)
    largest = ran[-1]
    keys = dict(largest.macros).get("BLOCK_K", decode.KEYS)
    names = ", ".join(f"{variant.kernel} {variant.arch}" for variant in ran)
    return out, lse, Work(flops, largest.shared_bytes, largest.rows, keys, names)


def _merge_pieces(call, pieces):
    """Two pieces of the keys, each into float32 of its own; the sinks go with the last. Their kernels' Variants."""
    cupy, shape = status.cupy(), call.out.shadow.shape
    parts, ran = [], []
    for piece in pieces:
        out, lse = cupy.empty(shape, np.float32), cupy.empty(shape[:3], np.float32)
        last = piece is pieces[-1]
        ran.append(_run(call, piece, _of_keys(call.plan, piece, last), "fp32", _of_cupy(out), _of_cupy(lse)))
        parts.append((out, lse))
    out, lse = _merged(*parts[0], *parts[1])
    write(out, call.out)
    if call.lse is not None:
        write(lse, call.lse.four_axes()._replace(shadow=call.lse.shadow.reshape(shape[:3])))
    return ran


def _of_keys(made, piece, last):
    """The plan of a piece: its keys, at the distances they have in the whole."""
    n = piece.arrays["k"].shadow.shape[2]
    keys = slice(piece.first, piece.first + n)
    return made._replace(
        Lk=n,
        offset=made.offset - piece.first,
        bias=None if made.bias is None else made.bias[..., keys],
        mask=None if made.mask is None else made.mask[..., keys],
        sinks=made.sinks if last else None,
    )


def _merged(out_a, lse_a, out_b, lse_b):
    """As `cyflash.merge_states`, in float32."""
    cupy = status.cupy()
    top = cupy.maximum(lse_a, lse_b)
    base = cupy.where(cupy.isinf(top), np.float32(0), top)  # a row without a key; inf - inf would be NaN
    a, b = cupy.exp(lse_a - base), cupy.exp(lse_b - base)
    total = a + b
    scale = np.float32(1) / cupy.where(total == 0, np.float32(1), total)
    out = (a * scale)[..., None] * out_a + (b * scale)[..., None] * out_b
    return out, base + cupy.log(total)


def write(x, target):
    """Write an array of float32, CuPy's or another library's, where the caller wants it, in the caller's kind."""
    x = as_cupy(look("x", x))
    if target.kind == "bf16":
        x = quantise.bf16(x)
    as_cupy(target)[...] = x


def _run(call, piece, made, kind, out, lse):
    """One piece's kernel; its Variant. kind: of what `out` holds."""
    if max(made.Lk, abs(made.offset)) >= LONGEST:
        raise ValueError(f"k: expected fewer than {LONGEST} keys and rows between q and k on the GPU, got {made.Lk}")
    optional = {"bias": made.bias, "mask": made.mask, "slopes": made.alibi_slopes, "sinks": made.sinks}
    pointers = piece.arrays | {
        name: GPUArray(shadow, None, call.device, None) for name, shadow in optional.items() if shadow is not None
    }
    pointers["out"] = out
    if lse is not None:
        pointers["lse"] = lse
    written = "fp32" if piece.kind == "fp32" else kind  # the kernel of float32 writes no other
    if written != kind:
        pointers["out"] = _of_cupy(status.cupy().empty(out.shadow.shape, np.float32))
    variant = kernels.queue(call.device, made, tuple(NAMES[one] for one in (piece.kind, piece.pv, written)), pointers)
    if written != kind:
        write(pointers["out"].owner, out)
    return variant
