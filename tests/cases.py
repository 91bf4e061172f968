"""What kernel tests are made of: random arguments, every option and memory layout by name, two ways to judge."""
import bounds
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
ARGUMENTS = ("causal", "causal_align", "scale", "window", "softcap", "bias", "mask", "alibi_slopes", "sinks")


def all_options(B, H, Lq, Lk, seed=0):
    """Everything at once."""
    together = {}
    for name in ("causal", "scale", "window", "softcap", "bias", "mask", "alibi", "sinks"):
        together |= options(name, B, H, Lq, Lk, seed)
    return together | {"window": (Lk // 2, Lk // 5)}


def verify(q, k, v, *, num_threads=None, config=None, **options):
    """Compute, compare out and lse with the reference, and return the `bounds.Report`."""
    from cyflash import flash_attention

    out, lse = flash_attention(q, k, v, **options, num_threads=num_threads, config=config, return_lse=True)
    return bounds.Case(q, k, v, **options).check(out, lse)


def assert_same_bits(actual, expected):
    """Equal bit for bit, NaN and the sign of zero included."""
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == np.float32
        a, b = (np.ascontiguousarray(x).view(np.uint32) for x in (a, b))
        assert np.array_equal(a, b), f"{np.count_nonzero(a != b)} of {a.size} differ in their bits"


def _inside(x, shape, where, order="C"):
    """x as a view into a larger array whose other entries are NaN (True in a mask)."""
    around = np.full(shape, True if x.dtype == bool else np.nan, x.dtype, order=order)
    around[where] = x
    return around[where]


def _at_byte(x, offset):
    memory = np.zeros(x.nbytes + 64 + offset, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    view = memory[start : start + x.nbytes].view(np.uint8)
    y = np.ndarray(x.shape, x.dtype, buffer=view.data)
    y[...] = x
    return y


def _read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def _swapped(x, a, b):
    return np.ascontiguousarray(x.swapaxes(a, b)).swapaxes(a, b)


def _reversed(x, axis):
    return np.flip(np.ascontiguousarray(np.flip(x, axis)), axis)


LAYOUTS = {  # each returns an array equal to x, (..., L, D)
    "length before heads": lambda x: _swapped(x, -3, -2),
    "batch last but one": lambda x: _swapped(x, 0, -2),
    "columns first": lambda x: _swapped(x, -2, -1),
    "fortran": np.asfortranarray,
    "reversed rows": lambda x: _reversed(x, -2),
    "reversed heads": lambda x: _reversed(x, -3),
    "reversed columns": lambda x: _reversed(x, -1),
    "padded rows": lambda x: _inside(x, (*x.shape[:-1], x.shape[-1] + 3), np.s_[..., 1 : x.shape[-1] + 1]),
    "every other row": lambda x: _inside(x, (*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), np.s_[..., ::2, :]),
    "every other column": lambda x: _inside(x, (*x.shape[:-1], 2 * x.shape[-1]), np.s_[..., ::2]),
    "off by 4 bytes": lambda x: _at_byte(x, 4),
    "off by 1 byte": lambda x: _at_byte(x, 1),
    "read-only": _read_only,
}
