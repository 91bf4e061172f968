"""Arrays as the kernels take them: views of the caller's memory wherever its strides allow, else copies.

dtypes have four names here, those of `kind_of`: "fp32", "fp16", "bf16" and "int8". bfloat16 is that of ml_dtypes, which
is imported only where somebody asks for the dtype by name.
"""
import math
import sys

import numpy as np

from cyflash.gpu.where import on_gpu

FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)
INT8 = np.dtype(np.int8)
NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
FLOATS = ("fp32", "fp16", "bf16")


def require_array(name, x, ndim=None, dtype="np.float32"):
    """`x` if it is a NumPy array (of one of the dimensions `ndim`), else an error that names it."""
    if not isinstance(x, np.ndarray):
        require_host(name, x)
        raise TypeError(
            f"{name}: expected a NumPy array, got {type(x).__name__}; write np.asarray({name}, dtype={dtype})"
        )
    if _is_masked(x):
        raise TypeError(f"{name}: expected a plain array, got a MaskedArray; pass {name}.data, and hide keys by `mask`")
    if ndim is not None and x.ndim not in ndim:
        expected = " or ".join(map(str, ndim))
        raise ValueError(f"{name}: expected {expected} dimensions, got {x.ndim} with shape {x.shape}")
    return x


def require_host(name, x):
    """`x`, if it is no array on a GPU."""
    if on_gpu(x):
        raise NotImplementedError(
            f"{name}: expected an array in the host's memory: of arrays on a GPU only flash_attention and "
            f"flash_attention_int8 are implemented; write cupy.asnumpy({name})"
        )
    return x


def _is_masked(x):
    masked = sys.modules.get("numpy.ma")  # never imported for this: without it there are no masked arrays
    return masked is not None and isinstance(x, masked.MaskedArray)


def require_float32(name, x, ndim=None):
    """`x` if it is a native float32 array, else an error that names it."""
    require_array(name, x, ndim)
    if x.dtype != FLOAT32:
        raise TypeError(
            f"{name}: expected float32, got {dtype_name(x.dtype)}; write {name}.astype(np.float32), "
            "or use cyflash.reference.attention"
        )
    return x


def require_float(name, x, ndim=None):
    """`x` if it is a native float32, float16 or bfloat16 array, else an error that names it."""
    require_array(name, x, ndim)
    if kind_of(x.dtype) not in FLOATS:
        raise TypeError(
            f"{name}: expected float32 (or float16, bfloat16), got {dtype_name(x.dtype)}; write "
            f"{name}.astype(np.float32), or use cyflash.reference.attention"
        )
    return x


def kind_of(dtype):
    """What the kernels call a NumPy dtype: "fp32", "fp16", "bf16" or "int8"; None for any other."""
    if dtype == FLOAT32:
        return "fp32"
    if dtype == FLOAT16:
        return "fp16"
    if dtype == INT8:
        return "int8"
    return "bf16" if dtype.itemsize == 2 and dtype.name == "bfloat16" and dtype.isnative else None


def checked_dtype(name, dtype):
    """The NumPy dtype that a caller means: float32, float16, bfloat16 or int8.

    Parameters
    ----------
    name : str
        What errors call the argument.
    dtype : str, type, or dtype of NumPy, ml_dtypes or torch
        What `np.dtype` takes, "fp32", "fp16", "bf16", "bfloat16", or a torch dtype. torch is not imported; ml_dtypes is
        for "bf16", "bfloat16" and torch.bfloat16.

    Returns
    -------
    dtype

    Raises
    ------
    TypeError
        For anything else.
    ImportError
        For bfloat16 without ml_dtypes.

    Examples
    --------
    >>> from cyflash.arrays import checked_dtype
    >>> checked_dtype("dtype", "fp16")
    dtype('float16')
    """
    word = str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype
    if isinstance(word, str) and NAMES.get(word, word) == "bfloat16":
        return _bfloat16(name, dtype)
    try:
        found = None if word is None else np.dtype(NAMES.get(word, word) if isinstance(word, str) else word)
    except (TypeError, ValueError):
        found = None
    if found is None or kind_of(found) is None:
        got = repr(dtype) if found is None else dtype_name(found)
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or int8, got {got}")
    return found


def _bfloat16(name, asked):
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError(
            f"{name}: {asked!r} needs ml_dtypes; install it with: pip install 'cyflash-attn[bf16]'"
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


class Shape:
    """Stands for an array of which only the shape counts."""

    def __init__(self, shape):
        self.shape, self.ndim = tuple(shape), len(shape)


def dtype_name(dtype):
    return dtype.name if dtype.isnative else f"{dtype.name} in foreign byte order ({dtype.str})"


def four_axes(x):
    """A view of x with shape (B, H, L, D): missing leading axes are 1."""
    return x if x.ndim == 4 else x[(None,) * (4 - x.ndim)]


def rows_in_place(x):
    """x itself if it is aligned and its last axis is contiguous, else a copy that is."""
    if x.flags.aligned and (x.strides[-1] == x.itemsize or x.shape[-1] == 1 or x.size == 0):
        return x
    return _copy(x, x.ndim - 1)


def aligned(x):
    """x itself if it is aligned, else a copy that is."""
    return x if x.flags.aligned else _copy(x, x.ndim)


def finite(x):
    """Where x is neither NaN nor infinite."""
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling NaN
        return np.isfinite(x)


def once(x):
    """A view of x in which axes that were broadcast have length 1."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides)]


def _copy(x, axes):
    """A copy in which what is broadcast along the first `axes` axes stays so: no more memory than x takes."""
    once = x[tuple(slice(0, 1) if n < axes and stride == 0 else slice(None) for n, stride in enumerate(x.strides))]
    copy = np.array(once, order="C")
    return copy if copy.shape == x.shape else np.broadcast_to(copy, x.shape)


def together(others, **wanted):
    """{name: uninitialised array} for {name: (shape, dtype)}, in one allocation.

    others: bytes that the call allocates beside them. The C library (glibc) gives freed memory back to the system where
    it is more than twice the largest piece that was ever freed, and the next call faults it in again, page by page:
    that can double its time. So there is one piece, as large as all of them; the part that nobody touches stays an
    address range.
    """
    begins, end = [], 0
    for shape, dtype in wanted.values():
        begins.append(end)
        end += -(-math.prod(shape) * np.dtype(dtype).itemsize // 64) * 64
    memory = np.empty(end + others, np.uint8)
    return {
        name: np.ndarray(shape, dtype, memory, begin)
        for (name, (shape, dtype)), begin in zip(wanted.items(), begins, strict=True)
    }


def overlap(a, b):
    """Whether two arrays share an element; True as well where that takes too long to find out."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(x):
    """Whether two elements of x share memory: strides smaller than what the axes inside them span."""
    if x.size == 0:
        return False
    reach = x.itemsize
    axes = ((abs(stride), length) for stride, length in zip(x.strides, x.shape, strict=True) if length > 1)
    for stride, length in sorted(axes):
        if stride < reach:
            return True
        reach += stride * (length - 1)
    return False
