"""A GPU that is pretended, for rehearsals of tests with a GPU: `install()`, or as a plugin of pytest, `-p gpu_pretend`.

CuPy is the fake one, in the host's memory; kernels, "compiled" to a file that names them, are run by the machine of
gpu_shim/. So everything that tests with a GPU do is done, but by a slow machine: small cases only.
"""
import ctypes
import os
import pickle
import sys
import tempfile
import types

import gpu_fake
import gpu_running
import numpy as np

MAGIC = b"a pretended kernel: "
EVERYWHERE = (0, 2**63 - 1)  # what kernels may read: who knows


class Runtime:
    """Of cupy.cuda.runtime, what gpu_on_device uses."""

    class CUDARuntimeError(RuntimeError):
        def __init__(self, status):
            super().__init__(f"pretended error {status}")
            self.status = status

    getDeviceCount = staticmethod(lambda: 1)
    getDeviceProperties = staticmethod(lambda device: {"name": b"pretended GPU", "totalGlobalMem": 2**30})
    pointerGetAttributes = staticmethod(lambda address: types.SimpleNamespace(device=0))
    eventQuery = staticmethod(lambda event: 0)
    deviceSynchronize = staticmethod(lambda: None)
    driverGetVersion = runtimeGetVersion = staticmethod(lambda: 13000)

    @staticmethod
    def memcpy(to, source, size, kind):
        ctypes.memmove(to, source, size)

    @staticmethod
    def memset(to, value, size):
        ctypes.memset(to, value, size)


class Memory:
    """Of cupy.cuda.alloc, at a multiple of 512 bytes as a GPU's is."""

    def __init__(self, size):
        self.room = np.full(size + 512, 0xFF, np.uint8)
        self.ptr = self.room.ctypes.data + -self.room.ctypes.data % 512


class Kernel:
    """What RawModule(path=...).get_function(...) returns."""

    max_dynamic_shared_size_bytes = 48 * 1024
    num_regs = 0

    def __init__(self, variant):
        self.variant = variant

    def __call__(self, grid, block, args, shared_mem=0):
        assert shared_mem <= self.max_dynamic_shared_size_bytes and block == (self.variant.threads,)
        one, *more = args
        params = gpu_running.Params.from_buffer_copy(one.tobytes())
        loaded = gpu_running.library(self.variant.source, self.variant.macros, ())
        maps = maps_of(more[0]) if more else (gpu_running.TensorMap * 0)()
        ranges = (ctypes.c_void_p * 2)(*EVERYWHERE)
        error = loaded.run(ctypes.byref(params), maps, grid[0], block[0], shared_mem, gpu_running.EARLY, 1, ranges, 1)
        if error:
            raise Runtime.CUDARuntimeError(error.decode())


def maps_of(encoded):
    parts = encoded.tobytes()
    return (gpu_running.TensorMap * (len(parts) // 128))(
        *(gpu_running.TensorMap.from_buffer_copy(parts[at : at + 128]) for at in range(0, len(parts), 128)))


class Driver:
    """Of the driver, cuTensorMapEncodeTiled: the map as gpu_shim/ has it."""

    @staticmethod
    def cuTensorMapEncodeTiled(to, kind, axes, address, shape, strides, box, *others):
        size = {0: 1, 6: 2}[kind.value]
        one = gpu_running.TensorMap(address.value, size, *shape, *list(box)[:2], *strides)
        ctypes.memmove(to, ctypes.byref(one), ctypes.sizeof(one))
        return 0


def build(variant, texts=None):
    from cyflash.gpu.build import Built

    return Built(MAGIC + pickle.dumps(variant), "pretended")


def raw_module(path):
    with open(path, "rb") as file:
        text = file.read()
    assert text.startswith(MAGIC)
    variant = pickle.loads(text[len(MAGIC):])
    return types.SimpleNamespace(get_function=lambda name: Kernel(variant))


def install():
    """From now on this process has a GPU, of compute capability 9.0. Compiled kernels go to a folder of their own."""
    from cyflash.gpu import build as builder
    from cyflash.gpu import tensor_maps

    folder = tempfile.TemporaryDirectory(prefix="cyflash-pretended-")
    install.keep = folder
    os.environ["CYFLASH_CACHE_DIR"] = folder.name
    cupy = gpu_fake.module(types.SimpleNamespace(raw_module=raw_module))
    cupy.cuda.runtime = Runtime
    cupy.cuda.alloc, cupy.cuda.set_allocator = Memory, lambda allocator: None
    gpu_fake.Event.ptr = 0
    cupy.zeros = lambda shape, dtype=float: cupy.full(shape, 0, dtype)
    cupy.arange = lambda n, dtype: gpu_fake.FakeArray(np.arange(n, dtype=dtype))
    gpu_fake.Context.attributes = {"MultiProcessorCount": 1, "ClockRate": 1_000_000}
    sys.modules |= {"cupy": cupy, "cupy.cuda": cupy.cuda}
    builder.build = build
    tensor_maps._driver = Driver


if "PYTEST_VERSION" in os.environ or "pytest" in sys.modules:
    install()
