"""Float arrays to int8 codes on the GPU, with CuPy's operations, by the rules of `cyflash.quantized`.

Everything here is an array of CuPy with four axes (B, H, L, D). Nothing waits for the GPU, so values cannot raise: a
token with NaN or infinity gets the scale NaN, and what is computed from it becomes NaN.
"""
import numpy as np

from cyflash.gpu import status
from cyflash.gpu.arrays import as_cupy
from cyflash.quantized import FLOAT32_MAX, LARGEST_CODE, SMALLEST_SCALE

# That share one dynamic scale. "tensor" is of a sequence, as in calls; "array" of all.
AXES = {"array": (0, 1, 2, 3), "tensor": (1, 2, 3), "head": (2, 3), "token": (3,)}

BF16_MAX = np.float32(float.fromhex("0x1.fep127"))


def floats(x):
    """The numbers of a GPUArray of any kind, or of an array of CuPy, in float32."""
    values, bits = (as_cupy(x), x.kind == "bf16") if hasattr(x, "shadow") else (x, False)
    if bits:  # bfloat16 is the upper half of a float32
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def bf16(x):
    """float32 rounded to bfloat16, half to even, as uint16; NaN stays NaN, and what is finite stays finite."""
    cupy = status.cupy()
    x = cupy.ascontiguousarray(cupy.where(cupy.isinf(x), x, cupy.clip(x, -BF16_MAX, BF16_MAX)))
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return cupy.where(cupy.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def token_mean(x):
    """The mean over tokens of each channel, (B, H, 1, D): summed in float64, rounded to float32."""
    return (x.sum(axis=2, keepdims=True, dtype=np.float64) / max(x.shape[2], 1)).astype(np.float32)


def encode(x, granularity, *, scale=None, mean=None, skip=0):
    """Codes and scales of an array of float32.

    Parameters
    ----------
    x : cupy.ndarray of float32, shape (B, H, L, D)
    granularity : str
        A key of AXES, for dynamic scales.
    scale : cupy.ndarray of float32, optional
        A static scale, which broadcasts to (B, H, L, 1).
    mean : cupy.ndarray of float32, optional
        Subtracted first; broadcasts to (B, H, 1, D).
    skip : int
        So many of the first tokens have codes 0 and no part in dynamic scales.

    Returns
    -------
    codes : cupy.ndarray of int8, shape (B, H, L, D)
    scale : cupy.ndarray of float32
        The scale, which broadcasts to (B, H, L, 1), before tokens that are not finite are marked.
    marked : cupy.ndarray of float32, shape (B, H, L, 1)
        The same with NaN for those tokens: what kernels are given.
    """
    cupy = status.cupy()
    finite = cupy.isfinite(x).all(axis=3, keepdims=True)
    finite[:, :, :skip] = True
    centred = x if mean is None else x - mean
    if scale is None:
        scale = _scale_of(centred, AXES[granularity], skip)
    codes = cupy.clip(cupy.rint(centred * (np.float32(1) / scale)), -127, 127)
    codes = cupy.where(finite, codes, np.float32(0)).astype(np.int8)
    codes[:, :, :skip] = 0
    return codes, scale, cupy.where(finite, scale, np.float32(np.nan))


def _scale_of(x, axes, skip):
    """The dynamic scale of x, shared along `axes`; NaN where x has NaN."""
    cupy = status.cupy()
    if not x.size:
        shape = tuple(1 if axis in axes else length for axis, length in enumerate(x.shape))
        return cupy.full(shape, SMALLEST_SCALE, np.float32)
    size = cupy.abs(x)
    size[:, :, :skip] = 0
    largest = cupy.minimum(size.max(axis=axes, keepdims=True), np.float32(FLOAT32_MAX))
    return cupy.maximum(largest / LARGEST_CODE, np.float32(SMALLEST_SCALE))


def saturated(x, scale, mean, skip):
    """How many values of the tokens from `skip` on a static scale cuts off: an int, which waits for the GPU."""
    cupy = status.cupy()
    centred = x if mean is None else x - mean
    return int((cupy.abs(cupy.rint(centred * (np.float32(1) / scale)))[:, :, skip:] > 127).sum())


def shift(codes, scale, mean, factor):
    """What smoothing took from each row's scores, (B, H, Lq): factor * q_i . mean, where q_i = scale * codes.

    codes: int8 (B, H, Lq, D). scale: broadcasts to (B, H, Lq, 1). mean: float32 (B, Hk, 1, D).
    """
    cupy = status.cupy()
    B, H, Lq, D = codes.shape
    Hk = mean.shape[1]
    grouped = codes.reshape(B, Hk, H // Hk, Lq, D)
    dots = (grouped.astype(np.float32) * mean[:, :, None]).sum(axis=4).reshape(B, H, Lq, 1)
    return cupy.ascontiguousarray((dots * scale * np.float32(factor))[..., 0])
