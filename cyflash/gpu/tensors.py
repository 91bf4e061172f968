"""Quantised arrays that live on a GPU: what `quantize` and `QuantizedTensor` do there."""
import numpy as np

from cyflash import quantized
from cyflash.arrays import FLOATS
from cyflash.gpu import arrays, quantise, status
from cyflash.gpu.arrays import as_cupy, look
from cyflash.gpu.where import on_gpu


def quantize(x, granularity, *, scale, smooth, skip):
    """`cyflash.quantize` of an array on a GPU. Waits for it once: values that are not finite raise, as on the CPU."""
    seen = look("x", x)
    shape = seen.shadow.shape
    if seen.kind not in FLOATS:
        raise TypeError(f"x: expected float32 (or float16, bfloat16), got {seen.shadow.dtype.name}")
    if len(shape) not in (2, 3, 4) or shape[-1] == 0:
        raise ValueError(f"x: expected 2 or 3 or 4 dimensions and a head_dim of at least 1, got shape {shape}")
    skip = quantized.checked_sinks(skip, shape)
    if scale is not None:
        scale = quantized.checked_scale("scale", scale, shape)
        if on_gpu(scale):
            arrays.require_one_device({"x": seen, "scale": look("scale", scale)})
        asked = None if granularity == "tensor" else granularity
        granularity = quantized.checked_against(_shaped(scale), asked, shape)
    with arrays.current_stream(seen):
        values = quantise.floats(seen.four_axes())
        if not bool(status.cupy().isfinite(values).all()):
            raise ValueError("x: expected finite values, got NaN or infinity; they count for the scale: put 0 there")
        mean = quantise.token_mean(values) if smooth else None
        codes, found, _ = quantise.encode(
            values, "array" if granularity == "tensor" else granularity,
            scale=None if scale is None else on_device(scale), mean=mean, skip=skip,
        )
        if scale is None:
            shapes = {"tensor": (), "head": (*shape[:-2], 1, 1), "token": (*shape[:-1], 1)}
            scale = arrays.handed_out(seen, found.reshape(shapes[granularity]))
        rows = values[:, :, :skip].reshape(*shape[:-2], skip, shape[-1]).copy() if skip else None
        return quantized.QuantizedTensor(
            arrays.handed_out(seen, codes.reshape(shape)),
            scale,
            None if mean is None else arrays.handed_out(seen, mean.reshape(*shape[:-2], 1, shape[-1])),
            None if rows is None else arrays.handed_out(seen, rows),
            granularity,
        )


def checked(tensor):
    """The granularity of a QuantizedTensor on a GPU, after checking its dtypes and shapes."""
    data = look("data", tensor.data)
    shape = data.shadow.shape
    if data.kind != "int8":
        raise TypeError(f"data: expected int8, got {data.shadow.dtype.name}; cyflash.quantize(x) takes floats")
    if len(shape) not in (2, 3, 4) or shape[-1] == 0:
        raise ValueError(f"data: expected 2 or 3 or 4 dimensions and a head_dim of at least 1, got shape {shape}")
    scale = quantized.checked_scale("scale", tensor.scale, shape)
    object.__setattr__(tensor, "scale", scale)
    if on_gpu(scale):
        arrays.require_one_device({"data": data, "scale": look("scale", scale)})
    for name, rows in (("mean", 1), ("fp32_rows", None)):
        x = getattr(tensor, name)
        if x is None:
            continue
        found = look(name, x)
        arrays.require_one_device({"data": data, name: found})
        if found.kind != "fp32":
            raise TypeError(f"{name}: expected float32, got {found.shadow.dtype.name}")
        expected = (*shape[:-2], min(found.shadow.shape[-2], shape[-2]) if rows is None else rows, shape[-1])
        if found.shadow.shape != expected:
            raise ValueError(f"{name}: expected shape {expected} beside data {shape}, got {found.shadow.shape}")
    given = None if tensor.granularity is None else quantized.checked_granularity(tensor.granularity)
    return quantized.checked_against(_shaped(scale), given, shape)


def dequantize(tensor):
    """`QuantizedTensor.dequantize` on the GPU."""
    cupy, seen = status.cupy(), look("data", tensor.data)
    limit = np.float32(quantized.FLOAT32_MAX)
    with arrays.current_stream(seen):
        x = as_cupy(seen.four_axes()).astype(np.float32) * on_device(tensor.scale)
        x = cupy.clip(x, -limit, limit)
        if tensor.mean is not None:
            x = cupy.clip(x + on_device(tensor.mean), -limit, limit)
        if tensor.fp32_rows is not None:
            rows = on_device(tensor.fp32_rows)
            x[:, :, : rows.shape[2]] = rows
        return arrays.handed_out(seen, x.reshape(seen.shadow.shape))


def on_device(x):
    """An array of NumPy or of a GPU library, as an array of CuPy with four axes."""
    x = as_cupy(look("x", x)) if on_gpu(x) else status.cupy().asarray(x)
    return x[(None,) * (4 - x.ndim)]


def _shaped(x):
    """What tells the shape of a scale."""
    return look("scale", x).shadow if on_gpu(x) else x
