"""Inputs of each data type and each option for the GPU kernels, with their judge."""
import bounds_gpu
import bounds_int8
import gpu_running
import ml_dtypes
import numpy as np
import pytest

from cyflash import reference_int8

KINDS = {  # name: (q and k, v, out)
    "float32": ("float32",) * 3,
    "float16": ("float16",) * 3,
    "bfloat16": ("bfloat16",) * 3,
    "int8": ("int8", "int8", "float32"),
    "int8-float16": ("int8", "float16", "float16"),
    "int8-bfloat16": ("int8", "bfloat16", "float32"),
}


CODED = [kind for kind in KINDS if "int8" in kind]


def pairs(kinds, sizes, first=0):
    """Parameters: every kind with every size, each second pair of them among the slow tests.

    Each pair is a kernel of its own to compile. How columns are cut depends on the size and on the bytes of an element,
    so a fault in a tail shows in the neighbouring kind as well.
    """
    return [
        pytest.param(kind, size, marks=[pytest.mark.slow] * ((i + j + first) % 2))
        for i, kind in enumerate(kinds) for j, size in enumerate(sizes)
    ]  # fmt: skip


def dtype(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


class Problem:
    """q, k, v of one kind and what belongs to them; `run` runs a kernel, `check` judges."""

    def __init__(self, kind, B=1, H=1, Hk=1, Lq=64, Lk=64, D=64, granularity="token", seed=0):
        rng = np.random.default_rng(seed)
        self.kind, self.names = kind, KINDS[kind]
        self.qk, self.pv, self.out = map(dtype, self.names)
        floats = [rng.standard_normal((B, h, L, D)).astype(np.float32) for h, L in ((H, Lq), (Hk, Lk), (Hk, Lk))]
        self.scales, self.arrays = {}, []
        for name, x, t in zip("qkv", floats, (self.qk, self.qk, self.pv), strict=True):
            if t == np.int8:
                x, scale = reference_int8.quantise(x, granularity)
                self.scales[f"{name}_scale"] = np.broadcast_to(scale.astype(np.float32), (*x.shape[:3], 1))
            self.arrays.append(x.astype(t))

    def floats(self):
        """What the arrays stand for, in float64."""
        return [x.astype(np.float64) * self.scales.get(f"{name}_scale", 1.0)
                for name, x in zip("qkv", self.arrays, strict=True)]

    def run(self, **arguments):
        scales = {name: x[..., 0] for name, x in self.scales.items()}
        return gpu_running.run(*self.arrays, out_dtype=self.out, **scales, **arguments)

    def judge(self, Bc=64, **options):
        """A function of a result that raises AssertionError where it is wrong."""
        if self.kind == "int8":
            case = bounds_int8.Case(*self.arrays, **self.scales, block_size=Bc, **options)
        else:
            case = bounds_gpu.Case(*self.floats(), self.pv.name, **options)
        return lambda result: case.check(result.out, result.lse)

    def check(self, schedules=(gpu_running.EARLY, gpu_running.LATE), changes=(), **options):
        """Run under each schedule and judge."""
        results = [self.run(schedule=schedule, changes=changes, **options) for schedule in schedules]
        judge = self.judge(results[0].Bc, **options)
        for result in results:
            judge(result)
            assert result.conflicts == 0, f"{result.conflicts} of {result.matrix_reads} reads have bank conflicts"
        return results[0]

    def check_option(self, arguments, without, schedules=(gpu_running.EARLY,), **how):
        """`check`; and a kernel that took these arguments for `without` would be found out."""
        result = self.check(schedules, **arguments, **how)
        self.differs(result, **without)

    def differs(self, result, **options):
        """Raise unless the result is wrong for these options."""
        try:
            self.judge(result.Bc, **options)(result)
        except AssertionError:
            return
        raise AssertionError(f"right for {list(options)} as well")


def options(B, H, Lq, Lk):
    """{name: (arguments, the same without the option)} of everything that changes scores, for these lengths."""
    rng = np.random.default_rng(7)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def hides(share, *shape):
        return np.where(rng.random(shape) < share, -np.inf, 0).astype(np.float32)

    slopes = rng.uniform(0.01, 0.3, (B, H)).astype(np.float32)
    sparse, keys = hides(0.4, Lq, Lk), rng.random((B, 1, 1, Lk)) < 0.6
    sparse[:, -1], keys[..., -1] = 0, True  # which causal hides
    left = Lk // 6
    return {
        "causal": (dict(causal=True), {}),
        "top-left": (dict(causal=True, causal_align="top-left"), dict(causal=True)),
        "window": (dict(window=(left, 9)), {}),
        "window left": (dict(window=(left, -1)), {}),
        "window right": (dict(window=(-1, 3), causal_align="top-left"), dict(causal_align="top-left")),
        "causal window": (dict(causal=True, window=(left, 50)), dict(causal=True)),
        "window of much": (dict(window=(Lk * 6 // 7, -1)), {}),
        "softcap": (dict(softcap=1.5), {}),
        "alibi": (dict(alibi_slopes=slopes), {}),
        "alibi of heads": (dict(alibi_slopes=slopes[0]), {}),
        "bias": (dict(bias=normal(B, H, Lq, Lk)), {}),
        "bias of heads": (dict(bias=normal(H, 1, Lk)), {}),
        "bias of rows": (dict(bias=hides(0.3, B, 1, Lq, 1) + 1), {}),
        "bias -inf": (dict(bias=sparse), {}),
        "mask": (dict(mask=rng.random((B, H, Lq, Lk)) < 0.6), {}),
        "mask of keys": (dict(mask=keys), {}),
        "sinks": (dict(sinks=np.resize(np.float32([0.5, 3, -2, 9, 4, 1]), H)), {}),
        "scale": (dict(scale=0.4), {}),
        "scale negative": (dict(scale=-0.3), {}),
        "scale zero": (dict(scale=0.0), {}),
        "scale negative causal": (dict(scale=-0.3, causal=True), dict(scale=0.3, causal=True)),
    }


OPTIONS = tuple(options(1, 1, 1, 1))


def everything(B, H, Lq, Lk):
    """All options together, and {name: the same without one of them}."""
    one = {name: arguments for name, (arguments, _) in options(B, H, Lq, Lk).items()}
    bias = one["bias"]["bias"] + one["bias -inf"]["bias"]
    every = dict(causal=True, window=(Lk * 6 // 7, 0), softcap=2.0, bias=bias, scale=0.3, **one["alibi"],
                 **one["sinks"], **one["mask of keys"])
    others = {name: {key: x for key, x in every.items() if key != name} for name in every}
    others["causal"]["window"] = (every["window"][0], 20)
    return every, others


def mean_and_shift(problem, group, scale):
    """What smoothing takes from K (B, Hk, 1, D), and what that makes of each row's scores (B, H, Lq)."""
    q, k, _ = problem.floats()
    mean = np.random.default_rng(1).standard_normal((*k.shape[:2], 1, k.shape[3]))
    shift = scale * q @ np.repeat(mean, group, axis=1).swapaxes(2, 3)
    return mean, np.ascontiguousarray(shift[..., 0], np.float32)


def check_shift(problem, result, mean, **options):
    """Raise unless the result is that of keys with their mean, and is not that without it."""
    q, k, v = problem.floats()

    def judge(k):
        case = bounds_gpu.Case(q, k, v, problem.pv.name, **options)
        out, lse = case.bounds
        case.bounds = out + 1e-5, lse + 1e-5  # shift itself is rounded to float32
        case.check(result.out, result.lse)

    judge(k + mean)
    try:
        judge(k)
    except AssertionError:
        return
    raise AssertionError("right without the mean as well")
