"""Cases of flash_attention_int8: floats of every kind, codes, QuantizedTensors, LayerScales, in all that they allow."""
import bounds
import bounds_half
import bounds_int8
import cases_int8
import numpy as np

from cyflash import LayerScales, QuantizedTensor, flash_attention_int8, quantize
from cyflash.attention import attend_int8
from fuzz import options as drawn
from fuzz.dense import ARRAYS, leading, qkv, sizes
from fuzz.memory import Memory, contiguous, same_bits

GRANULARITIES = ("tensor", "head", "token")
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


def granularity(draw):
    """None, one, or one for each of q, k and v."""
    x = draw.random()
    if x < 0.4:
        return None
    return draw.choice(GRANULARITIES) if x < 0.7 else tuple(draw.choice(GRANULARITIES) for _ in "qkv")


def scale_for(draw, x):
    """A static scale for floats, under which most values fit: a number, per head or per token."""
    top = float(np.max(np.abs(x.astype(np.float32)), initial=0.0)) or 1.0
    shapes = [(), (*x.shape[:-2], 1, 1), (*x.shape[:-1], 1)]
    scale = top / 127 * draw.choice((0.5, 1.0, 2.0)) * draw.numbers.uniform(0.7, 1.4, draw.choice(shapes))
    return np.maximum(scale, SMALLEST_SCALE).astype(np.float32)


def scale_of_codes(draw, x):
    shapes = [(), (*x.shape[:-2], 1, 1), (*x.shape[:-1], 1)]
    return np.float32(0.02) * draw.numbers.uniform(0.3, 1.5, draw.choice(shapes)).astype(np.float32)


def codes(draw, shape):
    return draw.numbers.integers(-128, 128, shape, np.int8)


def arguments(draw, q, k, v):
    """(q, k, v, settings): operands that are floats, codes or tensors, and what may be said beside them."""
    Lk, settings = k.shape[-2], {}
    n = draw.choice((0, 0, 0, 1, min(5, Lk), draw.randint(0, Lk))) if Lk else 0
    if draw.chance(0.5):
        settings["pv"] = draw.choice(("int8", "bf16", "fp32"))
    form = draw.choice(("floats", "floats", "codes", "tensors", "quant"))
    if form == "floats":
        if draw.chance(0.3):
            settings["smooth_k"] = draw.chance(0.5)
        if n or draw.chance(0.2):
            settings["fp32_sinks"] = n
        for name, x in zip("qkv", (q, k, v), strict=True):
            if draw.chance(0.15):
                settings[f"{name}_scale"] = scale_for(draw, x)
        settings["granularity"] = granularity(draw)
    elif form == "codes":
        operands = [q, k, v]
        for i, name in enumerate("qkv"):
            if draw.chance(0.7):
                operands[i] = codes(draw, operands[i].shape)
                settings[f"{name}_scale"] = scale_of_codes(draw, operands[i])
        q, k, v = operands
        settings["granularity"] = granularity(draw)
    elif form == "tensors":
        k = quantize(k, draw.choice(GRANULARITIES), smooth=draw.chance(0.5), fp32_sinks=n)
        v = quantize(v, draw.choice(GRANULARITIES), fp32_sinks=n) if draw.chance(0.8) else v
        q = quantize(q, draw.choice(GRANULARITIES)) if draw.chance(0.5) else q
        if draw.chance(0.3):
            settings["fp32_sinks"] = n
    else:
        given = {f"{name}_scale": scale_for(draw, x) if draw.chance(0.6) else None
                 for name, x in zip("qkv", (q, k, v), strict=True)}
        if draw.chance(0.5):
            given["k_mean"] = draw.numbers.standard_normal((*k.shape[:-2], 1, k.shape[-1]), np.float32)
        settings["quant"] = LayerScales(**given, fp32_sinks=n, pv=settings.pop("pv", "int8"))
    return q, k, v, {name: x for name, x in settings.items() if x is not None}


def placed(memory, x):
    """x, or the arrays of a QuantizedTensor, in places of their own."""
    if isinstance(x, np.ndarray):
        return memory.place(x)
    if isinstance(x, QuantizedTensor):
        return QuantizedTensor(memory.place(x.data), x.scale, x.mean, x.fp32_rows)
    return x


def as_float32(x):
    return x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype != np.int8 else x


class Expected:
    """What int8 attention of three operands should give, by the simulation; computed once for builds that agree."""

    def __init__(self, q, k, v, settings, options):
        self.operands, self.settings, self.options = [as_float32(x) for x in (q, k, v)], settings, options
        self.cases, self.found = {}, {}

    def check(self, tally, name, block_size, out, lse, trace=None):
        """Hold out, lse and the codes of P, where there are any, to it. block_size: keys of a block of the call."""
        arguments = cases_int8.with_mean(*self.operands[1:], **self.settings, **self.options)
        mean = getattr(arguments.get("quant"), "k_mean", None)
        key = block_size, None if mean is None else mean.tobytes()  # whose last bits the build decides
        if key not in self.cases:
            self.cases[key] = bounds_int8.Case(*self.operands, block_size=block_size, **arguments)
        case = self.cases[key]
        if trace is not None or key not in self.found:
            Lk = case.call.k.codes.shape[2]
            given = [None] * len(case.parts) if trace is None else trace.reshape(len(case.parts), lse.shape[-1], Lk)
            judged = [bounds_int8.judge(part, case.call, block_size, codes)
                      for part, codes in zip(case.parts, given, strict=True)]
            whole = {field: np.array([getattr(x, field) for x in judged]) for field in judged[0]._fields}
            if trace is None:
                self.found[key] = whole
        else:
            whole = self.found[key]
        expected, bound = (whole[field].reshape(out.shape) for field in ("out", "bound"))
        ratio, _ = bounds_half.compare("out", out, out.dtype, expected, bound)
        bounds.compare("lse", lse, whole["lse"].reshape(lse.shape), whole["lse_bound"].reshape(lse.shape))
        tally.add(name, out, lse, bound, case.call.v.values, ratio)


class Int8:
    """flash_attention_int8 with its codes of P, and the same numbers elsewhere, on other threads."""

    def __init__(self, draw):
        B, H, Hk, Lq, Lk, D, Dv = sizes(draw)
        rank = draw.choice((2, 3, 4, 4)) if B == 1 else 4
        if rank == 2:
            H = Hk = 1
        lead, kv_lead = leading(rank, B, H, Hk)
        *self.operands, self.settings = arguments(draw, *qkv(draw, lead, kv_lead, Lq, Lk, D, Dv, special=False))
        self.options = drawn.options(draw, B, H, Lq, Lk, lead)
        self.config = drawn.config(draw, D, H)
        quant = self.settings.get("quant")
        pv = self.settings.get("pv") or (quant.pv if quant is not None else "int8")
        # of one key, whose scale may be a token's or a head's, there may be two codes
        self.trace = (B, H, Lq, Lk) if pv == "int8" and Lk != 1 else None
        self.Dv = Dv
        self.expected = Expected(*self.operands, self.settings, drawn.with_config(self.options, self.config))

    def check(self, draw, tally, build):
        q, settings, options, config = self.operands[0], self.settings, self.options, drawn.tiles(draw, self.config)
        trace = np.zeros(self.trace, np.uint8) if self.trace and draw.chance(0.4) else None
        memory = Memory(draw)
        operands = [placed(memory, x) for x in self.operands]
        given = {name: memory.place(x) if name in ARRAYS else x for name, x in options.items()}
        dtype = q.dtype if isinstance(q, np.ndarray) and q.dtype != np.int8 else np.dtype(np.float32)
        to = memory.place(np.zeros((*q.shape[:-1], self.Dv), dtype), output=True) if draw.chance(0.5) else None
        out, lse, work = attend_int8(
            *operands, **settings, **given, num_threads=drawn.threads(draw), config=config, out=to, return_lse=True,
            codes=trace,
        )
        assert to is None or out is to
        out = out.copy()
        memory.check()
        self.expected.check(tally, "int8", work.block_size_kv, out, lse, trace)
        again = {name: contiguous(x) for name, x in options.items()}
        other = flash_attention_int8(*(contiguous(x) for x in self.operands), **settings, **again, config=config,
                                     num_threads=drawn.threads(draw), return_lse=True)
        same_bits("elsewhere", other, (out, lse))
        tally["same bits"] += 1
