"""A few small launches of one kind of kernel, for compute-sanitizer to watch: python tests/gpu_sanitized.py KIND.

Arrays have exactly their bytes, each an allocation of its own, so that a read beyond one is seen.
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import gpu_cases  # noqa: E402
import gpu_on_device  # noqa: E402
import gpu_primitives  # noqa: E402
import gpu_running  # noqa: E402
import numpy as np  # noqa: E402

rng = np.random.default_rng(0)
TAILS = dict(H=2, Lq=70, Lk=133, D=40)
WHOLE = dict(H=2, Lq=128, Lk=256, D=64)
FEW = dict(B=2, H=6, Hk=2, Lq=2, Lk=700, D=64)
EVERYTHING = dict(
    causal=True, window=(60, 0), softcap=2.0, alibi_slopes=np.float32([0.1, 0.2]), sinks=np.float32([1, 2]),
    bias=rng.standard_normal((2, 70, 133)).astype(np.float32), mask=rng.random((1, 1, 133)) < 0.7,
)


def kernels(kinds, few=False):
    """Shapes with tails and without, plain, causal and with everything."""
    for kind in kinds:
        if few:
            gpu_cases.Problem(kind, **FEW).run(few=True, causal=True)
            gpu_cases.Problem(kind, **{**FEW, "D": 160}).run(few=True)
        else:
            gpu_cases.Problem(kind, **WHOLE).run()
            gpu_cases.Problem(kind, **TAILS).run(causal=True)
            gpu_cases.Problem(kind, **TAILS).run(**EVERYTHING)
            gpu_cases.Problem(kind, **{**TAILS, "D": 37}).run()


def primitives(which):
    for name, make in which.items():
        print(name, flush=True)
        one = make()
        one.check(one.run())


def public():
    """Calls from arrays to results, quantisation in them."""
    import cyflash
    from cyflash.gpu import status

    cupy = status.cupy()
    for dtype in (np.float32, np.float16):
        q, k, v = (cupy.asarray(rng.standard_normal((1, 2, L, 64)).astype(dtype)) for L in (70, 133, 133))
        for rows in (70, 2):
            cyflash.flash_attention(q[:, :, :rows], k, v, causal=True)
            cyflash.flash_attention_int8(q[:, :, :rows], k, v, fp32_sinks=4)
    cupy.cuda.runtime.deviceSynchronize()


HALVES = ("float16", "bfloat16")
CODES = ("int8", "int8-float16")
KINDS = {  # name: (whether hopper.cu is taken where it can be, what to do)
    "ffma": (False, lambda: kernels(["float32"])),
    "mma": (False, lambda: kernels(HALVES)),
    "mma of codes": (False, lambda: kernels(CODES)),
    "decode": (False, lambda: kernels(["float16", *CODES], few=True)),
    "hopper": (True, lambda: kernels(HALVES)),
    "hopper of codes": (True, lambda: kernels(CODES)),
    "primitives": (True, lambda: primitives(gpu_primitives.PRIMITIVES)),
    "primitives of hopper": (True, lambda: primitives(gpu_primitives.HOPPER_PRIMITIVES)),
    "public functions": (True, public),
}


def main(kind):
    from cyflash.gpu import status

    status.cupy().cuda.set_allocator(None)
    gpu_on_device.PATIENCE = 300.0  # who is watched is slow
    mapped, work = KINDS[kind]
    gpu_running.where = gpu_on_device.Device(mapped=mapped, exact=True)
    work()
    sources = {variant.source for variant in gpu_running.where.launched}
    print(f"done: {len(gpu_running.where.launched)} launches of {', '.join(sorted(sources)) or 'public functions'}")


if __name__ == "__main__":
    main(sys.argv[1])
