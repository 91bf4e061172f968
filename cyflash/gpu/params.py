"""What a kernel is told: struct Params of params.h as a NumPy dtype of the same layout, passed by value."""
import numpy as np

from cyflash.plan import UNBOUNDED as PLANS_UNBOUNDED

UNBOUNDED = 1 << 62  # of a window, in kernels

POINTERS = (
    "q", "k", "v", "out", "lse", "bias", "mask", "slopes", "sinks", "q_scale", "k_scale", "v_scale", "shift",
    "workspace",
)  # fmt: skip
# Each array's strides, in elements, and how many there are.
STRIDES = {
    "q": 3, "k": 3, "v": 3, "out": 3, "bias": 4, "mask": 4, "q_scale": 3, "k_scale": 3, "v_scale": 3, "slopes": 2,
}  # fmt: skip

PARAMS = np.dtype(
    [
        *((name, np.uint64) for name in POINTERS),
        *((f"{name}_stride", np.int64, (n,)) for name, n in STRIDES.items()),
        *((name, np.int64) for name in ("offset", "left", "right")),
        *((name, np.int32) for name in ("B", "H", "Hk", "Lq", "Lk", "D")),
        *((name, np.float32) for name in ("scale", "softcap")),
        *((name, np.int32) for name in ("chunk", "chunks")),
    ],
    align=True,
)


def filled(plan, arrays, chunk=0, chunks=0):
    """The struct of one launch, as an array with one element.

    plan: of plan.py. arrays: {name of a pointer: GPUArray, with as many leading axes as it has strides}; those that are
    left out are 0. chunk, chunks: of decode.py.
    """
    params = np.zeros(1, PARAMS)
    one = params[0]
    for name, x in arrays.items():
        one[name] = x.address
        if name in STRIDES:
            one[f"{name}_stride"] = x.strides[: STRIDES[name]]
    one["offset"] = plan.offset
    for name in ("left", "right"):
        side = getattr(plan, name)
        one[name] = UNBOUNDED if side >= PLANS_UNBOUNDED else side
    for name in ("B", "H", "Hk", "Lq", "Lk", "D", "scale", "softcap"):
        one[name] = getattr(plan, name)
    one["chunk"], one["chunks"] = chunk, chunks
    return params
