"""Runs the kernels on a GPU from the tests' NumPy arrays: `gpu_running.where` in tests with a GPU.

    place    a copy in the GPU's memory with the same strides, NaN around it
    launch   compiled as in a call, or from the tests' own source; waits, but never for long
"""
import ctypes
import tempfile
import time
from pathlib import Path

import gpu_running
import numpy as np

import cyflash
from cyflash.gpu import build, launch, params, status, tensor_maps
from cyflash.gpu.arrays import Shadow

PATIENCE = 20.0  # seconds until a kernel that has not ended is taken for one that never will
AROUND = 512     # bytes before and behind an array that are NaN
READY, NOT_READY = 0, 600  # of cudaError_t, what cudaEventQuery returns
TO_DEVICE, TO_HOST = 1, 2  # of cudaMemcpyKind


class Device:
    """Where kernels run: on CuPy's current device.

    mapped: whether kernels that take tensor maps are chosen where they can be. exact: arrays without anything around
    them, so that whoever watches memory sees each read beyond.
    """

    broken = None  # why no later call of this process can succeed

    def __init__(self, mapped=True, exact=False):
        self.cupy, self.mapped, self.around = status.cupy(), mapped, 0 if exact else AROUND
        self.number = self.cupy.cuda.Device().id
        self.kept, self.launched = [], []

    def arch(self, asked=None):
        return launch.architecture(self.number)

    def takes_maps(self, arch):
        return self.mapped and arch == "sm_90a"

    def place(self, x):
        runtime, around = self.cupy.cuda.runtime, self.around
        low, high = np.lib.array_utils.byte_bounds(x) if x.size else (x.ctypes.data, x.ctypes.data)
        before = around + low % 16
        room = before + (high - low) + around
        memory = self.cupy.cuda.alloc(max(room, 16))
        if around:
            runtime.memset(memory.ptr, 0xFF, room)
        if high > low:
            runtime.memcpy(memory.ptr + before, low, high - low, TO_DEVICE)
        self.kept.append(memory)
        return at(memory.ptr + before + x.ctypes.data - low, x)

    def fetch(self, placed, x):
        if x.size:
            self.cupy.cuda.runtime.memcpy(x.ctypes.data, placed.ctypes.data, x.nbytes, TO_HOST)

    def release(self):
        self.kept.clear()

    def launch(self, variant, blocks, one, schedule=None, seed=None, readable=(), changes=(), boxes=()):
        if changes:
            raise ValueError("a changed source runs on the machine of gpu_shim/ only: it may never end on a GPU")
        if Device.broken:
            raise gpu_running.KernelError(f"not run, since the GPU was left broken by {Device.broken}")
        self.launched.append(variant)
        maps = (tensor_maps.encoded(boxes),) if boxes else ()
        kernel = self.kernel(variant)
        try:
            kernel((blocks,), (variant.threads,), (struct(one), *maps), shared_mem=variant.shared_bytes)
            self.wait()
        except Exception as error:
            Device.broken = f"{variant.kernel} of {variant.source}, {dict(variant.macros)}"
            raise gpu_running.KernelError(f"{Device.broken}, {blocks} blocks: {error}") from error
        return 0, 0, 0

    def kernel(self, variant):
        if (build.FOLDER / variant.source).exists():
            return launch.load(self.number, variant)
        return own_kernel(variant)

    def wait(self):
        """Until all that was queued has ended, or an error."""
        runtime, event = self.cupy.cuda.runtime, self.cupy.cuda.Event()
        event.record()
        end = time.monotonic() + PATIENCE
        while (found := state_of(runtime, event)) == NOT_READY:
            if time.monotonic() > end:
                raise gpu_running.KernelError(f"has not ended after {PATIENCE:.0f} s: it waits for what never comes")
            time.sleep(0)
        if found != READY:
            raise gpu_running.KernelError(f"CUDA error {found}, {error_name(runtime, found)}")


def state_of(runtime, event):
    try:
        return runtime.eventQuery(event.ptr)
    except runtime.CUDARuntimeError as error:
        return error.status


def error_name(runtime, number):
    try:
        return str(runtime.CUDARuntimeError(number))
    except Exception:
        return "which CuPy has no name for"


def at(address, x):
    """A shadow of what lies at a GPU's address as x lies in the host's memory. bfloat16, too, which NumPy lacks."""
    plain = np.dtype(f"u{x.itemsize}")
    memory = type("Memory", (), {"__array_interface__": {
        "version": 3, "data": (address, False), "shape": x.shape, "strides": x.strides, "typestr": plain.str}})
    return np.asarray(memory()).view(x.dtype).view(Shadow)


def struct(one):
    """ctypes' Params as the launcher's, to be passed by value."""
    assert ctypes.sizeof(one) == params.PARAMS.itemsize
    return np.frombuffer(bytes(one), params.PARAMS).copy()  # may be written to, as any argument


_own = {}


def own_kernel(variant):
    """A kernel of the tests, beside the kernels' headers."""
    if variant not in _own:
        _own[variant] = load_own(variant)
    return _own[variant]


def load_own(variant):
    cubin = build.build(variant, own_texts(variant)).cubin
    with tempfile.TemporaryDirectory(prefix="cyflash-") as place:
        path = Path(place) / "kernel.cubin"
        path.write_bytes(cubin)
        kernel = status.cupy().RawModule(path=str(path)).get_function(variant.kernel)
        if variant.shared_bytes > launch.SHARED_WITHOUT_ASKING:
            kernel.max_dynamic_shared_size_bytes = variant.shared_bytes
        _ = kernel.num_regs  # loads it, while the file is there
    return kernel


def own_texts(variant):
    """{file name: text}, the source of the tests first."""
    source = gpu_running.SHIM.parent / variant.source
    headers = {path.name: path.read_text() for path in sorted(build.FOLDER.iterdir()) if path.suffix in (".h", ".cuh")}
    return {source.name: source.read_text(), **headers}


def require(capability=None):
    """Skips the test where it cannot run. capability: "9.0", the only one that it is of."""
    import pytest

    found = cyflash.gpu_status()
    if not found.available:
        pytest.skip(found.reason)
    if capability and found.compute_capability != capability:
        pytest.skip(f"{found.device} has compute capability {found.compute_capability}; this is of {capability}")
    if Device.broken:
        pytest.skip(f"the GPU was left broken by {Device.broken}")


def use(monkeypatch, **how):
    """In a test: kernels run on the GPU. how: arguments of Device."""
    require()
    device = Device(**how)
    monkeypatch.setattr(gpu_running, "where", device)
    return device
