"""Arrays on a GPU as the kernels take them: the caller's memory in place, and results of the caller's kind.

Checks are those of the CPU path, which look at shapes, strides, dtypes and addresses only: they are given a *shadow*, a
NumPy array that says where the GPU's memory is. Nothing may read a shadow: its memory is not this processor's, and a
read would end the process.
"""
import sys
from typing import NamedTuple

import numpy as np

from cyflash.arrays import checked_dtype, kind_of
from cyflash.gpu import status
from cyflash.gpu.where import on_gpu

BF16 = "bfloat16"


class Shadow(np.ndarray):
    """Where an array on a GPU is. Showing one, as a debugger does, reads nothing."""

    def __repr__(self):
        return f"Shadow(shape={self.shape}, strides={self.strides}, dtype={self.dtype})"

    __str__ = __repr__


class GPUArray(NamedTuple):
    """A caller's array: where it is, and what keeps it there."""

    shadow: Shadow  # bfloat16 as uint16, which NumPy has of its own
    kind: str | None  # as `cyflash.arrays.kind_of`
    device: int
    owner: object

    @property
    def address(self):
        return self.shadow.__array_interface__["data"][0]

    @property
    def strides(self):
        """In elements."""
        return tuple(stride // self.shadow.itemsize for stride in self.shadow.strides)

    def four_axes(self):
        """The same memory with shape (B, H, L, D)."""
        return self._replace(shadow=self.shadow[(None,) * (4 - self.shadow.ndim)])

    def rows(self, n):
        """The first n rows of each head."""
        return self._replace(shadow=self.shadow[..., :n, :])


def look(name, x):
    """The caller's GPU array `x`, seen and not touched; TypeError where it is none."""
    if type(x) is GPUArray:
        return x
    library = library_of(x)
    if library == "cupy":
        return _seen(name, x.data.ptr, x.shape, x.strides, x.dtype, x.device.id, x)
    if library == "torch":
        return _tensor(name, x)
    if hasattr(x, "__cuda_array_interface__"):
        return _interface(name, x)
    if hasattr(x, "__dlpack__") and on_gpu(x):
        view = status.cupy().from_dlpack(x)  # the producer makes CuPy's current stream wait for its own
        return look(name, view)._replace(owner=x)
    raise TypeError(f"{name}: expected an array on a GPU, got {type(x).__name__}")


def require_one_device(seen):
    """ValueError unless all of {name: GPUArray} are on the device of the first one."""
    first, like = next(iter(seen.items()))
    for name, x in seen.items():
        if x.device != like.device:
            raise ValueError(
                f"{name}: expected an array on cuda:{like.device} as {first} is, got one on cuda:{x.device}; copy it "
                "there first"
            )


def library_of(x):
    """The top-level module of x's type."""
    return type(x).__module__.partition(".")[0]


def _tensor(name, x):
    word = str(x.dtype).removeprefix("torch.")
    try:
        dtype = np.dtype(np.uint16 if word == BF16 else word)
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in "fiubc":  # others ml_dtypes may have made known to NumPy
        raise TypeError(f"{name}: expected a dtype that NumPy has, or bfloat16, got {x.dtype}")
    if x.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise ValueError(f"{name}: expected a tensor without gradient, which is not computed; pass {name}.detach()")
    strides = tuple(stride * dtype.itemsize for stride in x.stride())
    found = _seen(name, x.data_ptr(), tuple(x.shape), strides, dtype, x.get_device(), x)
    return found._replace(kind="bf16") if word == BF16 else found


def _interface(name, x):
    """Of the CUDA array interface, version 2 and 3. Where the producer names a stream, ours waits for it: no host does.
    """
    described = x.__cuda_array_interface__
    if described.get("mask") is not None:
        raise TypeError(f"{name}: expected a plain array, got one with a mask; hide keys by `mask`")
    address, dtype = described["data"][0], np.dtype(described["typestr"])
    cupy = status.cupy()
    device = cupy.cuda.runtime.pointerGetAttributes(address).device if address else cupy.cuda.Device().id
    if described.get("stream") is not None:
        with cupy.cuda.Device(device):
            event = cupy.cuda.ExternalStream(described["stream"]).record()
            cupy.cuda.get_current_stream().wait_event(event)
    found = _seen(name, address, tuple(described["shape"]), described.get("strides"), dtype, device, x)
    if described["data"][1]:
        found.shadow.flags.writeable = False
    return found


def _seen(name, address, shape, strides, dtype, device, owner):
    kind = kind_of(dtype)
    dtype = np.dtype(np.uint16) if kind == "bf16" else dtype
    size = dtype.itemsize
    if address % size or any(stride % size for stride in strides or ()):
        raise ValueError(
            f"{name}: expected elements at multiples of {size} bytes, got address {address:#x} and strides {strides}"
        )
    return GPUArray(_shadow(address, shape, strides, dtype), kind, device, owner)


class _Memory:
    """What NumPy takes for an array at an address."""

    def __init__(self, address, shape, strides, dtype):
        self.__array_interface__ = {
            "version": 3, "data": (address, False), "shape": shape, "strides": strides, "typestr": dtype.str,
        }


def _shadow(address, shape, strides, dtype):
    found = np.empty(shape, dtype) if 0 in shape else np.asarray(_Memory(address, shape, strides, dtype))
    return found.view(Shadow)


def as_cupy(x):
    """A GPUArray as an array of CuPy, bfloat16 as uint16: the same memory."""
    cupy, shadow = status.cupy(), x.shadow
    if _is_owners(x):
        return x.owner
    if not shadow.size:
        with cupy.cuda.Device(x.device):
            return cupy.empty(shadow.shape, shadow.dtype)
    reach = [stride * (length - 1) for stride, length in zip(shadow.strides, shadow.shape, strict=True)]
    below = -sum(step for step in reach if step < 0)
    size = below + sum(step for step in reach if step > 0) + shadow.itemsize
    memory = cupy.cuda.UnownedMemory(x.address - below, size, x.owner, x.device)
    pointer = cupy.cuda.MemoryPointer(memory, below)
    return cupy.ndarray(shadow.shape, shadow.dtype, pointer, shadow.strides)


def _is_owners(x):
    """Whether the caller's array is CuPy's and the whole of what x sees."""
    owner, shadow = x.owner, x.shadow
    return library_of(owner) == "cupy" and (owner.data.ptr, owner.shape, owner.strides, owner.dtype) == (
        x.address, shadow.shape, shadow.strides, shadow.dtype
    )


def empty(like, shape, dtype=None):
    """A new array of `like`'s library, which is the caller's own or CuPy's.

    like: GPUArray. dtype: of NumPy; default like's own.
    """
    owner = like.owner
    if library_of(owner) == "torch":
        torch = sys.modules["torch"]
        kind = owner.dtype if dtype is None else getattr(torch, np.dtype(dtype).name)
        return torch.empty(shape, dtype=kind, device=owner.device)
    if dtype is None and library_of(owner) == "cupy":
        dtype = owner.dtype
    elif dtype is None:
        dtype = checked_dtype("q", like.kind)  # bfloat16 too
    cupy = status.cupy()
    with cupy.cuda.Device(like.device):
        return cupy.empty(shape, dtype)


def handed_out(like, x):
    """A result, as an array of `like`'s library: CuPy, torch, one with Python's array API, or Numba; else CuPy's."""
    owner = like.owner
    if library_of(owner) == library_of(x):
        return x
    if library_of(owner) == "torch":
        return sys.modules["torch"].from_dlpack(x)
    if hasattr(owner, "__array_namespace__"):
        return owner.__array_namespace__().from_dlpack(x)
    if library_of(owner) == "numba":
        return sys.modules["numba.cuda"].as_cuda_array(x)
    return x


def current_stream(like):
    """A context in which CuPy works on the device and the current stream of `like`'s library."""
    cupy = status.cupy()
    device = cupy.cuda.Device(like.device)
    if library_of(like.owner) != "torch":
        return _Context(device)
    stream = sys.modules["torch"].cuda.current_stream(like.device)
    return _Context(device, cupy.cuda.ExternalStream(stream.cuda_stream, like.device))


class _Context:
    """Contexts entered one after another and left in the opposite order, with less ceremony than ExitStack."""

    def __init__(self, *contexts):
        self.contexts = contexts

    def __enter__(self):
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error):
        for context in reversed(self.contexts):
            context.__exit__(*error)


def to_host(x):
    """A NumPy array with the elements of a GPU array of any library, which waits for the GPU."""
    seen = look("x", x)
    with current_stream(seen):
        return status.cupy().asnumpy(as_cupy(seen))
