"""Inputs of each data type for the GPU kernels, with their judge."""
import bounds_gpu
import bounds_int8
import gpu_running
import ml_dtypes
import numpy as np

from cyflash import reference_int8

KINDS = {  # name: (q and k, v, out)
    "float32": ("float32",) * 3,
    "float16": ("float16",) * 3,
    "bfloat16": ("bfloat16",) * 3,
    "int8": ("int8", "int8", "float32"),
    "int8-float16": ("int8", "float16", "float16"),
    "int8-bfloat16": ("int8", "bfloat16", "float32"),
}



def dtype(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


class Problem:
    """q, k, v of one kind and what belongs to them; `run` runs a kernel, `check` judges."""

    def __init__(self, kind, B=1, H=1, Hk=1, Lq=64, Lk=64, D=64, granularity="token", seed=0):
        rng = np.random.default_rng(seed)
        self.kind, (self.qk, self.pv, self.out) = kind, map(dtype, KINDS[kind])
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
