"""Tensor maps: how q, k and v lie in memory, for the copy engine of compute capability 9.0 (struct Maps of hopper.cuh).

A kernel that takes them copies boxes: some rows of one head, 128 or 64 bytes of each, swizzled, and zeros for what lies
outside the array. CuPy 14 has no call that encodes them; the driver's is called through ctypes.
"""
import ctypes
import functools
from typing import NamedTuple

import numpy as np

from cyflash.gpu.status import GPUUnavailableError

MAP_BYTES = 128
MOST_KEPT = 256  # encoded maps, of 1 KB with what they are of: a model's calls repeat their addresses
LARGEST_STRIDE = 2**40  # in bytes; the driver takes less
# Of cuda.h: CUtensorMapDataType, CUtensorMapSwizzle by the bytes of a box's row, CU_TENSOR_MAP_L2_PROMOTION_L2_256B.
DATA_TYPES = {1: 0, 2: 6}  # copies only ask for the size, and what is filled in is 0: bfloat16 goes as float16
SWIZZLES = {128: 3, 64: 2}
PROMOTION = 3


class Box(NamedTuple):
    """One tensor map before it is encoded."""

    address: int
    size: int        # bytes of an element
    shape: tuple     # columns, rows, heads, batches
    strides: tuple   # of rows, heads, batches, in bytes
    box: tuple       # columns, rows of one copy


def can_map(*arrays):
    """Whether tensor maps can describe arrays (B, H, L, D).

    They begin at multiples of 16 bytes, as all their rows do; no axis that is longer than 1 is broadcast or backward,
    and no row overlaps the next one.
    Arrays are NumPy's or shadows of a GPU's; nothing is read.
    """
    return all(
        x.__array_interface__["data"][0] % 16 == 0
        and all(
            n <= 1 or (stride % 16 == 0 and 0 < stride < LARGEST_STRIDE)
            for n, stride in zip(x.shape[:3], x.strides[:3], strict=True)
        )
        and (x.shape[2] <= 1 or x.strides[2] >= x.shape[3] * x.itemsize)
        for x in arrays
    )


def box(x, rows, row_bytes=128):
    """The `Box` of an array (B, H, L, D) of which copies take `rows` rows. Axes of an empty one count 1."""
    if not can_map(x):
        raise ValueError(f"expected an array that can_map() takes, got strides {x.strides} for shape {x.shape}")
    batches, heads, length, columns = (max(n, 1) for n in x.shape)
    whole_row = -(-columns * x.itemsize // 16) * 16  # for an axis that has no other
    strides = tuple(stride if n > 1 else whole_row for n, stride in zip(x.shape[:3], x.strides[:3], strict=True))
    return Box(x.__array_interface__["data"][0], x.itemsize, (columns, length, heads, batches), strides[::-1],
               (row_bytes // x.itemsize, rows))


def boxes(variant, q, k, v):
    """The boxes that a variant with `boxes` takes, in the order of struct Maps."""
    return tuple(box(x, *how) for x, how in zip((q, k, v), variant.boxes, strict=False))


def encoded(boxes, encode=None):
    """An array with one element of 128 bytes for each box, to be passed by value as struct Maps.

    encode: cuTensorMapEncodeTiled, by default the driver's. The same boxes give the same array, not to be written to.

    Raises
    ------
    RuntimeError
        Where the driver refuses a box.
    GPUUnavailableError
        Where the driver has no such function.
    """
    return _encoded(tuple(boxes), encode or _encoder())


@functools.lru_cache(MOST_KEPT)
def _encoded(boxes, encode):
    room = np.zeros(MAP_BYTES * len(boxes) + 64, np.uint8)
    start = -room.ctypes.data % 64  # where the driver writes has to be aligned
    maps = room[start : start + MAP_BYTES * len(boxes)]
    for i, one in enumerate(boxes):
        axes = len(one.shape)
        error = encode(
            ctypes.c_void_p(maps.ctypes.data + i * MAP_BYTES), ctypes.c_int(DATA_TYPES[one.size]),
            ctypes.c_uint32(axes), ctypes.c_void_p(one.address), (ctypes.c_uint64 * axes)(*one.shape),
            (ctypes.c_uint64 * (axes - 1))(*one.strides), (ctypes.c_uint32 * axes)(*one.box, *(1,) * (axes - 2)),
            (ctypes.c_uint32 * axes)(*(1,) * axes), ctypes.c_int(0),
            ctypes.c_int(SWIZZLES[one.box[0] * one.size]), ctypes.c_int(PROMOTION), ctypes.c_int(0),
        )
        if error:
            raise RuntimeError(f"cuTensorMapEncodeTiled returned error {error} for {one}")
    return maps.view(np.dtype([("opaque", np.uint8, (maps.size,))]))


@functools.cache
def _encoder():
    """cuTensorMapEncodeTiled of the driver."""
    try:
        return _driver().cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise GPUUnavailableError(
            "the NVIDIA driver has no cuTensorMapEncodeTiled, which kernels for compute capability 9.0 need "
            f"({error}); install a driver of CUDA 12 or later"
        ) from error


def _driver():
    return ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")
