"""What tests of int8 attention are made of: one call, compared with its specification."""
from types import SimpleNamespace

import bounds_int8
import numpy as np

from cyflash.quantized import quantize


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


def verify(q, k, v, *, config=None, num_threads=None, few=True, **arguments):
    """Compute, compare out, lse and (pv="int8") the codes of P with the simulation; return the `bounds_int8.Report`.

    few: hold the share of codes that differ to what is promised, which is for scores that float32 resolves.
    """
    how = {"config": config, "num_threads": num_threads}
    quant = arguments.get("quant")
    pv = arguments.get("pv") or (quant.pv if quant is not None else "int8")
    out, lse, codes, block_size = run(q, k, v, trace=pv == "int8", **arguments, **how)
    return case(q, k, v, block_size=block_size, **arguments).check(out, lse, codes, few=few)


def case(q, k, v, *, block_size, **arguments):
    """The `bounds_int8.Case` of a call."""
    return bounds_int8.Case(q, k, v, block_size=block_size, **with_mean(k, v, **arguments))


def with_mean(k, v, **arguments):
    """The arguments with the mean that the call finds and subtracts from k as one that is given.

    Its float32 sum depends on the order (so also on fp32_sinks, whose rows are summed apart), and in its bits the codes
    of K may depend on it: so it is compared here.
    """
    quant = arguments.get("quant") or SimpleNamespace(
        **{name: arguments.get(name) for name in ("q_scale", "k_scale", "v_scale", "pv")}, k_mean=None,
        fp32_sinks=arguments.get("fp32_sinks") or rows_of(v),
    )
    smooth = arguments.get("smooth_k")
    floats = isinstance(k, np.ndarray) and k.dtype == np.float32
    if not floats or quant.k_mean is not None or not (quant.k_scale is None if smooth is None else smooth):
        return arguments
    mean = quantize(k, "token", smooth=True, fp32_sinks=quant.fp32_sinks).mean
    check_mean(k, mean)
    names = ("q_scale", "k_scale", "v_scale", "fp32_sinks", "pv")
    settings = SimpleNamespace(**{name: getattr(quant, name) for name in names}, k_mean=mean)
    rest = {name: x for name, x in arguments.items() if name not in ("q_scale", "k_scale", "v_scale", "smooth_k")}
    return rest | {"quant": settings}


def check_mean(k, mean):
    """Raise unless the mean is as good as float32 sums of some hundred rows can be, whose roundings mostly cancel."""
    assert mean.dtype == np.float32 and mean.shape == (*k.shape[:-2], 1, k.shape[-1])
    if k.shape[-2]:
        exact, size = (x.mean(axis=-2, keepdims=True, dtype=np.float64) for x in (k, np.abs(k)))
        assert (np.abs(mean - exact) <= 2.0**-18 * size + 2.0**-126).all()


def rows_of(x):
    """How many rows in float32 a QuantizedTensor carries."""
    rows = None if isinstance(x, np.ndarray) else x.fp32_rows
    return 0 if rows is None else rows.shape[-2]
