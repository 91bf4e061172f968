"""What tests of varlen calls are made of: sequences one after another in one array, and the loop they must equal."""
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

BATCHES = {  # (queries, keys) of each sequence
    "one": [(40, 50)],
    "mixed": [(40, 50), (1, 1), (17, 130), (70, 70), (3, 200)],
    "decode": [(1, 300), (1, 7), (1, 64), (1, 1)],
    "without queries": [(5, 9), (0, 40), (8, 8)],
    "without keys": [(5, 9), (20, 0), (8, 8)],
    "without either": [(0, 0), (5, 9), (0, 0), (0, 0), (8, 8), (0, 0)],
    "more queries than keys": [(90, 30), (33, 32), (2, 1)],
    "all empty": [(0, 0), (0, 0)],
    "no queries at all": [(0, 12), (0, 5)],
    "no keys at all": [(12, 0), (5, 0)],
    "no sequences": [],
}
H, HK, D, DV = 4, 2, 24, 20


def bounds_of(lengths):
    """cu_seqlens: where each sequence starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def draw(batch, heads=(H, HK), sizes=(D, DV), seed=0):
    """q (total_q, H, D), k (total_k, Hk, D), v (total_k, Hk, Dv), cu_seqlens_q, cu_seqlens_k."""
    r = np.random.default_rng([seed, len(batch), *heads, *sizes])
    cu_q, cu_k = (bounds_of([pair[i] for pair in batch]) for i in (0, 1))
    shapes = ((cu_q[-1], heads[0], sizes[0]), (cu_k[-1], heads[1], sizes[0]), (cu_k[-1], heads[1], sizes[1]))
    return *(r.standard_normal(shape, dtype=np.float32) for shape in shapes), cu_q, cu_k


def options(name, batch, heads=H, seed=0):
    """Arguments that turn an option of `cases.NAMES` on for a batch: bias and mask as one array per sequence."""
    r = np.random.default_rng([seed, len(batch)])

    def each(kind: Callable):
        return [kind(Lq, Lk) for Lq, Lk in batch]

    def floats(*shape):
        return r.standard_normal(shape, dtype=np.float32)

    return {
        "causal": lambda: {"causal": True},
        "causal top-left": lambda: {"causal": True, "causal_align": "top-left"},
        "scale": lambda: {"scale": 0.3},
        "window": lambda: {"window": (20, 6)},
        "window left": lambda: {"window": (9, -1)},
        "window top-left": lambda: {"window": (12, 3), "causal_align": "top-left"},
        "softcap": lambda: {"softcap": 0.7},
        "bias": lambda: {"bias": each(lambda Lq, Lk: floats(heads, Lq, Lk))},
        "bias for all heads": lambda: {"bias": each(lambda Lq, Lk: floats(Lq, Lk))},
        "bias for all rows": lambda: {"bias": each(lambda Lq, Lk: floats(heads, 1, Lk))},
        "bias for some": lambda: {"bias": [floats(heads, Lq, Lk) if i % 2 else None
                                           for i, (Lq, Lk) in enumerate(batch)]},
        "bias for none": lambda: {"bias": [None] * len(batch)},
        "mask": lambda: {"mask": each(lambda Lq, Lk: r.random((heads, Lq, Lk)) < 0.5)},
        "mask padding": lambda: {"mask": each(lambda _, Lk: np.arange(Lk) < Lk // 2)},
        "mask for some": lambda: {"mask": [None if i % 2 else r.random((Lq, Lk)) < 0.5
                                           for i, (Lq, Lk) in enumerate(batch)]},
        "alibi": lambda: {"alibi_slopes": (0.1 * r.random(heads)).astype(np.float32)},
        "alibi batch": lambda: {"alibi_slopes": (0.1 * r.random((len(batch), heads))).astype(np.float32)},
        "sinks": lambda: {"sinks": floats(heads) + np.float32(3)},
    }[name]()


NAMES = ("causal", "causal top-left", "scale", "window", "window left", "window top-left", "softcap", "bias",
         "bias for all heads", "bias for all rows", "bias for some", "bias for none", "mask", "mask padding",
         "mask for some", "alibi", "alibi batch", "sinks")


def all_options(batch, heads=H, seed=0):
    """Everything at once."""
    together = {}
    for name in ("causal", "scale", "window", "softcap", "bias", "mask for some", "alibi batch", "sinks"):
        together |= options(name, batch, heads, seed)
    return together


@st.composite
def calls(draw_one, dtypes=(np.float32,)):
    """((q, k, v, cu_seqlens_q, cu_seqlens_k), options) of any batch."""
    length = st.one_of(st.integers(0, 5), st.integers(0, 150))
    batch = draw_one(st.lists(st.tuples(length, length), max_size=6))
    kv_heads, group = draw_one(st.integers(1, 3)), draw_one(st.integers(1, 5))
    heads, sizes = (kv_heads * group, kv_heads), draw_one(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    *arrays, cu_q, cu_k = draw(batch, heads, sizes, seed=draw_one(st.integers(0, 1000)))
    together = {}
    for name in draw_one(st.lists(st.sampled_from(NAMES), unique=True)):
        together |= options(name, batch, heads[0])
    return (*(x.astype(draw_one(st.sampled_from(dtypes))) for x in arrays), cu_q, cu_k), together


def of_sequence(arguments, i):
    """The arguments as sequence i alone has them."""
    own = dict(arguments)
    for name in ("bias", "mask"):
        if own.get(name) is not None:
            own[name] = own[name][i]
    if np.ndim(own.get("alibi_slopes")) == 2:
        own["alibi_slopes"] = own["alibi_slopes"][i]
    return own


def sequence(q, k, v, cu_q, cu_k, i):
    """q, k, v of sequence i as (H, L, D)."""
    of_q, of_k = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
    return q[of_q].swapaxes(0, 1), k[of_k].swapaxes(0, 1), v[of_k].swapaxes(0, 1)


def loop(attention, q, k, v, cu_q, cu_k, **arguments):
    """(out, lse) in the varlen layout, of one call of `attention` for each sequence."""
    out = np.zeros((len(q), q.shape[1], v.shape[2]), q.dtype if q.dtype != np.int8 else np.float32)
    lse = np.zeros(out.shape[:2], np.float32)
    for i in range(len(cu_q) - 1):
        one = attention(*sequence(q, k, v, cu_q, cu_k, i), **of_sequence(arguments, i), return_lse=True)
        rows = slice(cu_q[i], cu_q[i + 1])
        out[rows], lse[rows] = (x.swapaxes(0, 1) for x in one)
    return out, lse
