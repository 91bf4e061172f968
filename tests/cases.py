"""Random arguments for the tests: arrays, and every option by name."""
import numpy as np


def arrays(B=1, H=1, Hk=None, Lq=64, Lk=None, D=32, Dv=None, seed=0):
    """q, k, v as float32, (B, H, L, D)."""
    Hk, Lk, Dv = H if Hk is None else Hk, Lq if Lk is None else Lk, D if Dv is None else Dv
    r = np.random.default_rng([seed, B, H, Hk, Lq, Lk, D, Dv])
    return tuple(r.standard_normal(s, dtype=np.float32) for s in ((B, H, Lq, D), (B, Hk, Lk, D), (B, Hk, Lk, Dv)))


def options(name, B, H, Lq, Lk, seed=0):
    """Arguments that turn the option `name` of `NAMES` on, for arrays of these sizes."""
    r = np.random.default_rng([seed, B, H, Lq, Lk])
    return _OPTIONS[name](r, B, H, Lq, Lk)


def _float(r, *shape):
    return r.standard_normal(shape, dtype=np.float32)


def _some_infinite(r, *shape):
    return np.where(r.random(shape) < 0.5, np.float32(-np.inf), _float(r, *shape))


_OPTIONS = {  # r, B, H, Lq, Lk: the generator and the sizes
    "causal": lambda r, B, H, Lq, Lk: {"causal": True},
    "causal top-left": lambda r, B, H, Lq, Lk: {"causal": True, "causal_align": "top-left"},
    "scale": lambda r, B, H, Lq, Lk: {"scale": 0.3},
    "scale negative": lambda r, B, H, Lq, Lk: {"scale": -0.2},
    "window": lambda r, B, H, Lq, Lk: {"window": (Lk // 3, Lk // 5)},
    "window left": lambda r, B, H, Lq, Lk: {"window": (Lk // 4, -1)},
    "window right": lambda r, B, H, Lq, Lk: {"window": (-1, Lk // 4)},
    "window top-left": lambda r, B, H, Lq, Lk: {"window": (Lk // 4, 1), "causal_align": "top-left"},
    "softcap": lambda r, B, H, Lq, Lk: {"softcap": 0.7},
    "bias": lambda r, B, H, Lq, Lk: {"bias": _float(r, B, H, Lq, Lk)},
    "bias for all rows": lambda r, B, H, Lq, Lk: {"bias": _float(r, 1, H, 1, Lk)},
    "bias for all heads": lambda r, B, H, Lq, Lk: {"bias": _float(r, B, 1, Lq, Lk)},
    "bias -inf": lambda r, B, H, Lq, Lk: {"bias": _some_infinite(r, Lq, Lk)},
    "mask": lambda r, B, H, Lq, Lk: {"mask": r.random((B, H, Lq, Lk)) < 0.5},
    "mask padding": lambda r, B, H, Lq, Lk: {"mask": np.arange(Lk) < r.integers(1, Lk, size=(B, 1, 1, 1))},
    "mask rows": lambda r, B, H, Lq, Lk: {"mask": r.random((B, 1, Lq, 1)) < 0.8},
    "alibi": lambda r, B, H, Lq, Lk: {"alibi_slopes": (0.1 * r.random(H)).astype(np.float32)},
    "alibi batch": lambda r, B, H, Lq, Lk: {"alibi_slopes": (0.1 * r.random((B, H))).astype(np.float32)},
    "sinks": lambda r, B, H, Lq, Lk: {"sinks": _float(r, H) + np.float32(np.log(Lk + 1))},
}
NAMES = tuple(_OPTIONS)


def all_options(B, H, Lq, Lk, seed=0):
    """Everything at once."""
    together = {}
    for name in ("causal", "scale", "window", "softcap", "bias", "mask", "alibi", "sinks"):
        together |= options(name, B, H, Lq, Lk, seed)
    return together | {"window": (Lk // 2, Lk // 5)}
