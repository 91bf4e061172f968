"""What tests of int8 attention are made of: one call, compared with its specification."""
from types import SimpleNamespace

import bounds_int8
import numpy as np

import cyflash


def run(q, k, v, *, trace=False, **arguments):
    """(out, lse, codes of P or None, keys of a block) of one call."""
    from cyflash.attention import attend_int8

    codes = None
    if trace:
        shape = (*q.shape[:-1], k.shape[-2])
        codes = np.zeros((1,) * (4 - len(shape)) + shape, np.uint8)
        arguments["codes"] = codes
    out, lse, work = attend_int8(q, k, v, **arguments, return_lse=True)
    return out, lse, codes, work.block_size_kv


def verify(q, k, v, *, config=None, num_threads=None, trace=True, **arguments):
    """Compute, compare out, lse and (pv="int8") the codes of P with the simulation; return the `bounds_int8.Report`."""
    how = {"config": config, "num_threads": num_threads}
    quant = arguments.get("quant")
    pv = arguments.get("pv") or (quant.pv if quant is not None else "int8")
    out, lse, codes, block_size = run(q, k, v, trace=trace and pv == "int8", **arguments, **how)
    return case(q, k, v, block_size=block_size, **arguments).check(out, lse, codes)


def case(q, k, v, *, block_size, **arguments):
    """The `bounds_int8.Case` of a call. Where it subtracts a mean that it finds itself, it is that one's bits that count."""
    return bounds_int8.Case(q, k, v, block_size=block_size, **with_mean(k, **arguments))


def with_mean(k, **arguments):
    """The arguments with the mean that the call would subtract from k, checked, as one that is given."""
    quant, smooth = arguments.get("quant"), arguments.get("smooth_k")
    static = quant.k_scale if quant is not None else arguments.get("k_scale")
    given = quant is not None and quant.k_mean is not None
    dynamic = isinstance(k, np.ndarray) and k.dtype == np.float32 and not given
    if not (dynamic and (static is None if smooth is None else smooth)):
        return arguments
    mean = cyflash.quantize(k, "token", smooth=True).mean
    exact = k.mean(axis=-2, keepdims=True, dtype=np.float64) if k.shape[-2] else np.zeros(mean.shape)
    size = np.abs(k).mean(axis=-2, keepdims=True, dtype=np.float64) if k.shape[-2] else 0
    assert mean.dtype == np.float32 and (np.abs(mean - exact) <= 2.0**-21 * size + 2.0**-126).all()
    rest = {name: value for name, value in arguments.items() if name not in ("quant", "smooth_k")}
    source = arguments if quant is None else vars_of(quant)
    settings = {name: rest.pop(name, None) if quant is None else source[name] for name in ("q_scale", "k_scale", "v_scale")}
    settings["fp32_sinks"] = (arguments.get("fp32_sinks") or 0) if quant is None else quant.fp32_sinks
    settings["pv"] = "int8" if quant is None else quant.pv
    return rest | {"quant": SimpleNamespace(**settings, k_mean=mean)}
