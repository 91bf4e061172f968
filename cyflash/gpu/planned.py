"""Planned layers on the GPU: heads that differ in how they are computed, as `cyflash.parts` has them on the CPU.

A part is a call for each run of kv heads that lie beside each other, on views of the caller's arrays without a copy.
Scales that are found in such a call are of tokens, so runs change none.
"""
from dataclasses import replace
from itertools import groupby

from cyflash import parts
from cyflash.gpu.arrays import GPUArray


def attend(q, k, v, quant, how, config, **options):
    """(out, lse or None, Work) of a planned layer."""
    from cyflash.attention import Work
    from cyflash.gpu import arrays, attention

    seen = attention.looked_at({"q": q, "k": k, "v": v}, attention.FLOATS, "float32 (or float16, bfloat16)")
    parts.require_no_more(how)
    with arrays.current_stream(seen["q"]):
        call = attention.described(seen, seen["q"].kind, config, **options)
        plan = call.plan
        parts.require_all_heads(quant, plan, seen["k"].shadow)
        works = []
        for number, (kv_heads, layer) in enumerate(quant.parts):
            name = f"quant.parts[{number}], kv heads {', '.join(map(str, kv_heads))}"
            for places in _runs(kv_heads):
                with parts.named_in_errors(name):
                    works.append(_attend_run(call, seen, kv_heads, places, layer, config, options))
    flops, *largest, kernels = zip(*works, strict=True)
    names = dict.fromkeys(name for run in kernels for name in run.split(", "))  # each once, in order
    return *call.results, Work(sum(flops), *map(max, largest), ", ".join(names))


def _runs(kv_heads):
    """Slices of the places in `kv_heads` whose heads lie beside each other."""
    for _, run in groupby(enumerate(kv_heads), key=lambda place: place[1] - place[0]):
        first, *others = (place for place, _ in run)
        yield slice(first, (others[-1] if others else first) + 1)


def _attend_run(call, seen, kv_heads, places, layer, config, options):
    """The call of one run, into its heads of the output."""
    from cyflash.gpu import attention

    plan, group = call.plan, call.plan.H // call.plan.Hk
    kv = slice(kv_heads[places.start], kv_heads[places.stop - 1] + 1)
    heads = slice(kv.start * group, kv.stop * group)
    q, k, v = (_heads(seen[name].four_axes(), kv if name in "kv" else heads) for name in "qkv")
    mask = None if plan.mask is None else plan.mask.view(bool)
    extra = {"bias": plan.bias, "mask": mask, "alibi_slopes": plan.alibi_slopes}
    given = {name: GPUArray(x[:, heads], None, call.device, None) for name, x in extra.items() if x is not None}
    if plan.sinks is not None:
        given["sinks"] = GPUArray(plan.sinks[heads], "fp32", call.device, None)
    same = {name: x for name, x in options.items() if name not in (*attention.OPTIONAL, "out")}
    out = _heads(call.out, heads)
    if layer is None:
        _, lse, work = attention.attend(q, k, v, **same, **given, out=out, config=config)
    else:
        layer = _of_run(layer, len(kv_heads), places)
        _, lse, work = attention.attend_int8(q, k, v, quant=layer, **same, **given, out=out, config=config)
    if lse is not None:
        target = call.lse._replace(shadow=call.lse.shadow.reshape(plan.B, plan.H, plan.Lq)[:, heads])
        attention.write(lse, target)
    return work


def _heads(x, heads):
    return x._replace(shadow=x.shadow[:, heads])


def _of_run(layer, n, places):
    """The layer of n kv heads, for those at `places` only. `cyflash.quant.watch` counts it as the whole one."""
    if places == slice(0, n):
        return layer
    fields = {}
    for name in ("q_scale", "k_scale", "v_scale", "k_mean"):
        x = getattr(layer, name)
        if x is not None and x.ndim >= 3 and x.shape[-3] > 1:
            each = x.shape[-3] // n  # query heads of a kv head
            x = x[..., places.start * each : places.stop * each, :, :]
        fields[name] = x
    run = replace(layer, **fields)
    object.__setattr__(run, "watched_as", layer)
    return run
