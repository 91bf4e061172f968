"""Cases of flash_attention, of the engine over it, of torch's signature, and of merge_states."""
import math

import bounds
import bounds_half
import numpy as np

from cyflash import FlashAttention, flash_attention, merge_states, scaled_dot_product_attention
from fuzz import options as drawn
from fuzz.draw import VALUES
from fuzz.memory import Memory, contiguous, same_bits

ARRAYS = ("bias", "mask", "alibi_slopes", "sinks")


def is_native(build, q, k, v):
    """Whether both products may be in bfloat16."""
    return build == "avx512_bf16" and all(x.dtype.name == "bfloat16" for x in (q, k, v))


def qkv(draw, lead, kv_lead, Lq, Lk, D, Dv, special=True):
    """Three arrays, each of a kind and a distribution of its own; the latter of q and k is one."""
    of_scores, of_values = draw.choice(VALUES), draw.choice(VALUES)
    if special and draw.chance(0.04):  # only where float32 overflows and underflows as float64 does not
        of_scores, of_values = draw.choice((("special", "normal"), ("normal", "special")))
    kinds = [draw.kind()] * 3 if draw.chance(0.7) else [draw.kind() for _ in "qkv"]
    shapes = ((*lead, Lq, D), (*kv_lead, Lk, D), (*kv_lead, Lk, Dv))
    kinds = dict(zip("qkv", kinds, strict=True))
    arrays = [draw.values(shape, kinds[name], how) for name, shape, how in
              zip("qkv", shapes, (of_scores, of_scores, of_values), strict=True)]
    for i, x in enumerate(arrays):
        if x.size and draw.chance(0.05):
            axis = draw.randrange(x.ndim)
            arrays[i] = np.broadcast_to(x[tuple(slice(0, 1) if a == axis else slice(None) for a in range(x.ndim))],
                                        x.shape)
    return arrays


def sizes(draw):
    """(B, H, Hk, Lq, Lk, D, Dv) of a case, most of them with few heads: Python's time goes by heads."""
    (H, Hk), (Lq, Lk), D = draw.heads(), draw.lengths(), draw.head_dim()
    Dv = D if draw.chance(0.6) else draw.head_dim()
    return draw.choice((1, 1, 1, 1, 1, 1, 2, 3)), H, Hk, Lq, Lk, D, Dv


class Expected:
    """What attention of q, k and v should give; computed once for all builds."""

    def __init__(self, q, k, v, options):
        self.values, self.options = (q, k, v), options
        self.native = {}

    def case(self, build):
        native = is_native(build, *self.values)
        if native not in self.native:
            case = bounds_half.Case(*self.values, native=native, **self.options)
            if self.native:
                case.case = self.native[not native].case
            self.native[native] = case
        return self.native[native]

    def check(self, tally, name, build, out, lse=None):
        """Hold out and lse to the reference."""
        case = self.case(build)
        if lse is not None:  # where a score is infinite the formula's is too, that of a running maximum is NaN
            endless = np.isposinf(case.expected_lse) & np.isnan(case.expected).all(axis=-1)
            lse = np.where(endless & np.isnan(lse), np.float32(np.inf), lse)
        report = case.check(out, lse, rms=False)
        v = self.values[2].astype(np.float32, copy=False)
        tally.add(name, out, case.expected_lse, case.bounds[0], v, report.worst)


class Attention:
    """flash_attention, and the same numbers elsewhere, on other threads, at times by the engine."""

    def __init__(self, draw):
        B, H, Hk, Lq, Lk, D, Dv = sizes(draw)
        self.rank = draw.choice((2, 3, 4, 4)) if B == 1 else 4
        if self.rank == 2:
            H = Hk = 1
        lead, kv_lead = leading(self.rank, B, H, Hk)
        self.qkv = q, k, _ = qkv(draw, lead, kv_lead, Lq, Lk, D, Dv)
        self.options = drawn.options(draw, B, H, Lq, Lk, lead)
        if not all(np.isfinite(x).all() for x in (q, k)):  # softcap makes infinite scores finite, the bound is not
            self.options.pop("softcap", None)
        self.config = drawn.config(draw, D, H)
        self.expected = Expected(*self.qkv, drawn.with_config(self.options, self.config))
        self.whole = all(np.ndim(x) < 4 or len(x) == 1 for x in self.options.values())  # no part is of a sequence
        self.whole = self.whole and np.ndim(self.options.get("alibi_slopes")) < 2

    def check(self, draw, tally, build):
        (q, k, v), options, config = self.qkv, self.options, drawn.tiles(draw, self.config)
        memory = Memory(draw)
        placed = [memory.place(x) for x in (q, k, v)]
        given = {name: memory.place(x) if name in ARRAYS else x for name, x in options.items()}
        shape = *q.shape[:-1], v.shape[-1]
        to = memory.place(np.zeros(shape, q.dtype), output=True) if draw.chance(0.5) else None
        out, lse = flash_attention(*placed, **given, num_threads=drawn.threads(draw), config=config, out=to,
                                   return_lse=True)
        assert to is None or out is to
        out = out.copy()
        memory.check()
        self.expected.check(tally, "attention", build, out, lse)

        qkv_again, again = [contiguous(x) for x in (q, k, v)], {name: contiguous(x) for name, x in options.items()}
        if config is not None and draw.chance(0.5):
            engine = FlashAttention(config)
            forward = engine.forward if self.rank == 2 else engine.forward_multi_head
            result = forward(*qkv_again, **again)
            other = result.output, result.logsumexp
        else:
            other = flash_attention(*qkv_again, **again, num_threads=drawn.threads(draw), config=config,
                                    return_lse=True)
        same_bits("elsewhere", other, (out, lse))
        tally["same bits"] += 1
        if self.rank == 4 and len(q) > 1 and self.whole:
            b = draw.randrange(len(q))
            alone = flash_attention(*(x[b : b + 1] for x in qkv_again), **again, config=config, return_lse=True)
            same_bits("a sequence alone", alone, (out[b : b + 1], lse[b : b + 1]))
            tally["same bits"] += 1


def leading(rank, B, H, Hk):
    """The axes before the last two, of q and of k and v."""
    return ((B, H), (B, Hk)) if rank == 4 else ((H,), (Hk,)) if rank == 3 else ((), ())


class Sdpa:
    """scaled_dot_product_attention: leading axes that broadcast, top-left, one mask."""

    def __init__(self, draw):
        lead = tuple(draw.choice((1, 1, 2, 3)) for _ in range(draw.randint(0, 3)))
        (Lq, Lk), D = draw.lengths(), draw.head_dim()
        Dv = D if draw.chance(0.6) else draw.head_dim()
        gqa = len(lead) > 0 and draw.chance(0.2)
        leads = [tuple(1 if draw.chance(0.2) else n for n in lead) for _ in "qkv"]
        whole = np.broadcast_shapes(*leads)
        if gqa:
            Hk = draw.choice((1, 2))
            whole = (*whole[:-1], Hk * draw.choice((1, 2, 3)))
            leads = [(*leads[0][:-1], whole[-1]), (*leads[1][:-1], Hk), (*leads[2][:-1], Hk)]
        elif draw.chance(0.2):
            leads = [one[draw.randint(0, len(one)) :] for one in leads]
            whole = np.broadcast_shapes(*leads)
        dtype, how = draw.kind(), draw.choice(VALUES)
        q, k, v = (draw.values((*one, L, d), dtype, x) for one, L, d, x in
                   zip(leads, (Lq, Lk, Lk), (D, D, Dv), (how, how, draw.choice(VALUES)), strict=True))
        given, options = {}, {"causal_align": "top-left"}
        if draw.chance(0.3):
            given["scale"] = options["scale"] = draw.uniform(-0.5, 0.5)
        if draw.chance(0.3):
            given["is_causal"] = options["causal"] = True
        elif draw.chance(0.5):
            shape = drawn.part_of(draw, (*whole, Lq, Lk))
            if draw.chance(0.5):
                given["attn_mask"] = np.asarray(draw.numbers.random(shape) < 0.7)
            else:
                given["attn_mask"] = drawn.bias(draw, shape).astype(draw.choice((dtype, np.dtype(np.float32))))
        if "attn_mask" in given:
            mask, n = given["attn_mask"], math.prod(whole)
            options["mask" if mask.dtype == bool else "bias"] = np.broadcast_to(
                mask if mask.dtype == bool else mask.astype(np.float32), (*whole, Lq, Lk)).reshape(n, 1, Lq, Lk)
        self.arrays, self.given, self.gqa, self.shape = (q, k, v), given, gqa, (*whole, Lq, Dv)
        group = whole[-1] // leads[1][-1] if gqa else 1
        k, v = (np.repeat(x, group, axis=-3) if gqa else x for x in (k, v))
        q, k, v = (np.broadcast_to(x, (*whole, *x.shape[-2:])).reshape(math.prod(whole), 1, *x.shape[-2:])
                   for x in (q, k, v))
        self.expected = Expected(q, k, v, options)

    def check(self, draw, tally, build):
        memory = Memory(draw)
        placed = [memory.place(x) for x in self.arrays]
        given = {name: memory.place(x) if name == "attn_mask" else x for name, x in self.given.items()}
        out = scaled_dot_product_attention(*placed, **given, enable_gqa=self.gqa)
        memory.check()
        assert out.shape == self.shape and out.dtype == self.arrays[0].dtype
        self.expected.check(tally, "sdpa", build, out.reshape(math.prod(self.shape[:-2]), 1, *self.shape[-2:]))


class Merge:
    """Two calls over parts of the keys, merged, against one reference over all of them.

    With w = 1 / (1 + e^-g), g = |lse_a - lse_b|, a weight moves by at most w (1 - w) times what g is off by, so what
    each part may err (b and l are their bounds) adds up to

        w_a b_a + w_b b_b + w_a w_b (l_a + l_b + eps (g + 8)) (|out_a| + |out_b|) + 4 eps (w_a |out_a| + w_b |out_b|)
    """

    def __init__(self, draw):
        B, H, Hk, Lq, Lk, D, Dv = sizes(draw)
        self.qkv = tuple(x.astype(np.float32) for x in qkv(draw, (B, H), (B, Hk), Lq, Lk, D, Dv, special=False))
        self.options = drawn.options(draw, B, H, Lq, Lk, align=False)
        for name in ("causal", "window", "alibi_slopes"):  # of positions, which a part does not know
            self.options.pop(name, None)
        self.whole = bounds.Case(*self.qkv, **self.options)

    def check(self, draw, tally, build):
        (q, k, v), options = self.qkv, self.options
        Lk = k.shape[2]
        cut = draw.randint(0, Lk)
        states, cases = [], []
        for part in (slice(0, cut), slice(cut, Lk)):
            own = {name: x[..., part] if name in ("bias", "mask") and np.shape(x)[-1:] == (Lk,) and Lk > 1 else x
                   for name, x in options.items()}
            if states:  # one part has the sinks, whether it has keys or not
                own.pop("sinks", None)
            arrays = q, k[:, :, part], v[:, :, part]
            states.append(flash_attention(*arrays, **own, return_lse=True))
            cases.append(bounds.Case(*arrays, **own))
        base = draw.choice(("e", 2))
        if base == 2:
            states = [(out, (lse / np.log(2)).astype(np.float32)) for out, lse in states]
        memory = Memory(draw)
        placed = [memory.place(x) for state in (states if draw.chance(0.5) else states[::-1]) for x in state]
        out, lse = merge_states(*placed, lse_base=base)
        memory.check()
        if base == 2:
            lse = (lse * np.log(2)).astype(np.float32)
        (b_a, l_a), (b_b, l_b) = (case.bounds for case in cases)
        out_a, out_b = (case.expected for case in cases)
        lse_a, lse_b = (case.expected_lse for case in cases)
        with np.errstate(invalid="ignore", over="ignore"):
            gap = np.where(lse_a == lse_b, 0.0, lse_a - lse_b)
            w_a, top = 1 / (1 + np.exp(-gap)), np.maximum(np.abs(lse_a), np.abs(lse_b))
            w_b = 1 / (1 + np.exp(gap))
            top = np.where(np.isfinite(top), top, np.where(np.isfinite(lse_a), np.abs(lse_a), np.abs(lse_b)))
            top = np.where(np.isfinite(top), top, 0.0)
            off = l_a + l_b + bounds.EPS * (4 * top + 8)
            moved = np.where(np.isfinite(gap), np.minimum(w_a * w_b * np.expm1(np.minimum(off, 50.0)), 1.0), 0.0)
            moved = moved[..., None]
            w_a, w_b = w_a[..., None], w_b[..., None]
            bound = w_a * b_a + w_b * b_b + moved * (np.abs(out_a) + np.abs(out_b))
            bound += 4 * bounds.EPS * (w_a * np.abs(out_a) + w_b * np.abs(out_b)) + 4 * bounds.TINY
        lse_bound = np.maximum(l_a, l_b) + bounds.EPS * (8 * top + 8)
        if not (np.isfinite(bound) | ~np.isfinite(self.whole.expected)).all():  # of parts with huge scores
            tally["loose cases"] += 1
            return
        ratio, _ = bounds.compare("out", out, self.whole.expected, bound)
        bounds.compare("lse", lse, self.whole.expected_lse, lse_bound)
        tally.add("merge", out, lse, bound, v, ratio)
