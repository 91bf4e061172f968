"""A GPU that is not there: the part of CuPy that cyflash.gpu uses, over NumPy's memory, and kernels that obey Params.

    device(monkeypatch)   CuPy is this one in a test; what is launched is recorded, and computed in float64 from the
                          struct, pointers and strides alone. What a launch is told is so shown to be the whole call.
"""
import itertools
import sys
import types
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import numpy as np

from cyflash.gpu import variants

UNARY = ("abs", "rint", "isfinite", "isnan", "isinf", "exp", "log", "ascontiguousarray")
OTHERS = ("minimum", "maximum", "clip", "where", "broadcast_to")


class FakeArray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array "on a GPU". As CuPy's, it takes part in no operation with an array of NumPy."""

    def __init__(self, host, device=0):
        self.host, self.number = host, device

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        target = {} if out is None else {"out": tuple(map(bare, out))}
        with np.errstate(all="ignore"):
            return dressed(getattr(ufunc, method)(*map(bare, inputs), **kwargs, **target), self.number)

    def __getitem__(self, index):
        return FakeArray(self.host[index], self.number)

    def __setitem__(self, index, value):
        self.host[index] = bare(value)

    def __int__(self):
        return int(self.host)

    def __bool__(self):
        return bool(self.host)

    def __dlpack_device__(self):
        return 2, self.number

    @property
    def __cuda_array_interface__(self):
        return {**self.host.__array_interface__, "version": 3, "stream": None}

    @property
    def data(self):
        return SimpleNamespace(ptr=self.host.__array_interface__["data"][0])

    @property
    def device(self):
        return SimpleNamespace(id=self.number)

    @property
    def T(self):
        return FakeArray(self.host.T, self.number)


def _passes_on(name):
    def method(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            return dressed(getattr(self.host, name)(*map(bare, args), **kwargs), self.number)

    return method


for _name in ("astype", "view", "reshape", "transpose", "swapaxes", "sum", "max", "all", "copy"):
    setattr(FakeArray, _name, _passes_on(_name))
for _name in ("shape", "strides", "dtype", "size", "ndim", "flags", "nbytes", "itemsize"):
    setattr(FakeArray, _name, property(lambda self, name=_name: getattr(self.host, name)))
FakeArray.__module__, FakeArray.__name__ = "cupy", "ndarray"


def bare(x):
    """An argument as NumPy takes it; an array of NumPy's is refused, as CuPy does."""
    if isinstance(x, FakeArray):
        return x.host
    if isinstance(x, np.ndarray) and x.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return x


def dressed(x, device=0):
    return FakeArray(np.asarray(x), device) if isinstance(x, (np.ndarray, np.generic)) else x


class Context:
    """A device or a stream: entered and left; `entered` is what is entered now, innermost last."""

    entered: ClassVar = []

    def __init__(self, id=0, device=None):
        self.id, self.ptr = id, id

    def __enter__(self):
        Context.entered.append(self)

    def __exit__(self, *error):
        assert Context.entered.pop() is self

    compute_capability = "90"

    def record(self):
        return self

    def wait_event(self, event):
        Context.waited = event


class Stream(Context):
    pass


class Event:
    """A clock that goes one millisecond further at each look."""

    now = 0.0

    def record(self):
        Event.now += 1.0
        self.time = Event.now

    def synchronize(self):
        pass


class Launch(NamedTuple):
    variant: object
    grid: tuple
    block: tuple
    shared: int
    params: np.void
    streams: tuple  # that were entered


COMBINATIONS = {  # that kernels take: queries and keys, values, output
    *((x, x, x) for x in ("float32", "float16", "bfloat16")),
    *(("int8", v, out) for v in ("int8", "float16", "bfloat16") for out in ("float32", "float16", "bfloat16")),
}


def choose(arch, D, qk, v=None, out=None, *, aligned=True, options=()):
    """As variants.choose: the request itself, whatever kernels there are."""
    kinds = qk, v or qk, out or qk
    assert kinds in COMBINATIONS
    flags = {name: int(name in options) for name in variants.FLAGS} | {"ALIGNED": int(aligned)}
    macros = (*flags.items(), ("HEAD_DIM", D), ("BLOCK_K", 32), ("KINDS", kinds))
    return variants.Variant("x.cu", "_".join(kinds), macros, arch, 128, 50_000, 64)


class Device:
    """What a test looks at: launches, the modules that were loaded, and how arrays are made."""

    def __init__(self):
        self.launches, self.loaded, self.variants = [], [], {}

    def array(self, x, device=0):
        return FakeArray(np.array(x) if isinstance(x, list) else x, device)

    def raw_module(self, path):
        self.loaded.append(path)
        variant = self.variants[path]

        class Kernel:
            max_dynamic_shared_size_bytes = 0

            def __call__(kernel, grid, block, args, shared_mem=0):
                assert shared_mem <= max(49152, kernel.max_dynamic_shared_size_bytes)
                (params,) = args
                assert params.size == 1 and type(params) is np.ndarray
                streams = tuple(one for one in Context.entered if isinstance(one, Stream))
                self.launches.append(Launch(variant, grid, block, shared_mem, params[0].copy(), streams))
                compute(params[0], variant)

        return types.SimpleNamespace(get_function=lambda name: Kernel())


def device(monkeypatch, real_variants=False):
    """Make CuPy a fake one for a test."""
    from cyflash.gpu import attention, cubins, launch

    fake = Device()
    paths = itertools.count()

    def path_of(variant):
        path = f"{next(paths)}.cubin"
        fake.variants[path] = variant
        return path

    monkeypatch.setitem(sys.modules, "cupy", module(fake))
    monkeypatch.setattr(cubins, "path_of", path_of)
    if not real_variants:
        monkeypatch.setattr(attention.variants, "choose", choose)
    monkeypatch.setattr(launch, "_loaded", {})
    launch.capability.cache_clear()
    return fake


def module(fake):
    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.2.0"
    cupy.ndarray = _made
    for name in (*UNARY, *OTHERS):
        setattr(cupy, name, _function(getattr(np, name)))
    cupy.asarray = lambda x: x if isinstance(x, FakeArray) else FakeArray(np.array(x))
    cupy.asnumpy = lambda x: x.host.copy()
    cupy.empty = lambda shape, dtype=float: FakeArray(_poisoned(shape, dtype), _current())
    cupy.full = lambda shape, value, dtype: FakeArray(np.full(shape, value, dtype), _current())
    cupy.from_dlpack = lambda x: x.of_dlpack()
    cupy.RawModule = lambda path: fake.raw_module(path)
    cupy.cuda = types.SimpleNamespace(
        Device=Context, ExternalStream=Stream, get_current_stream=lambda: Stream(0), Event=Event,
        get_elapsed_time=lambda begin, end: end.time - begin.time,
        UnownedMemory=lambda address, size, owner, device: (address, size, owner, device),
        MemoryPointer=lambda memory, offset: (memory, offset),
        runtime=types.SimpleNamespace(
            getDeviceCount=lambda: 1, getDeviceProperties=lambda device: {"name": b"Fake"},
            pointerGetAttributes=lambda address: types.SimpleNamespace(device=0),
        ),
        nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)),
    )  # fmt: skip
    return cupy


def _current():
    return next((one.id for one in reversed(Context.entered) if type(one) is Context), 0)


def _poisoned(shape, dtype):
    """Memory that nobody wrote is NaN."""
    return np.frombuffer(bytearray(b"\xff" * (int(np.prod(shape)) * np.dtype(dtype).itemsize)), dtype).reshape(shape)


def _function(function):
    def call(*args, **kwargs):
        with np.errstate(all="ignore"):
            return dressed(function(*map(bare, args), **kwargs))

    return call


def _made(shape, dtype, pointer, strides):
    (address, size, _, number), offset = pointer
    assert 0 <= offset < size
    return FakeArray(at(address + offset, shape, dtype, strides), number)


class _Memory:
    def __init__(self, **interface):
        self.__array_interface__ = {"version": 3, **interface}


def at(address, shape, dtype, strides=None):
    """The array at an address; strides in bytes."""
    if 0 in shape:
        return np.empty(shape, dtype)
    dtype = np.dtype(dtype)
    return np.asarray(_Memory(data=(int(address), False), shape=tuple(map(int, shape)), typestr=dtype.str,
                              strides=None if strides is None else tuple(map(int, strides))))


# What a kernel computes, from Params

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}


def compute(p, variant):
    """Attention in float64 of what a struct of params.h says."""
    flags = dict(variant.macros)
    kind, pv, written = flags["KINDS"]
    B, H, Hk, Lq, Lk, D = (int(p[name]) for name in ("B", "H", "Hk", "Lq", "Lk", "D"))
    q, k = _read(p, "q", (B, H, Lq, D), kind), _read(p, "k", (B, Hk, Lk, D), kind)
    v = _read(p, "v", (B, Hk, Lk, D), pv)
    if kind == "int8":
        q = q * _read(p, "q_scale", (B, H, Lq))[..., None]
        k = k * _read(p, "k_scale", (B, Hk, Lk))[..., None]
    if pv == "int8":
        v = v * _read(p, "v_scale", (B, Hk, Lk))[..., None]
    k, v = (np.repeat(x, H // Hk, axis=1) for x in (k, v))
    distance = np.arange(Lq)[:, None] + int(p["offset"]) - np.arange(Lk)
    with np.errstate(all="ignore"):
        s = float(p["scale"]) * (q @ k.swapaxes(-1, -2))
        if p["shift"]:
            s = s + at(p["shift"], (B, H, Lq, 1), np.float32).astype(float)
        if flags["SOFTCAP"]:
            s = float(p["softcap"]) * np.tanh(s / float(p["softcap"]))
        if flags["ALIBI"]:
            s = s - _read(p, "slopes", (B, H))[..., None, None] * abs(distance)
        if flags["BIAS"]:
            s = s + _read(p, "bias", (B, H, Lq, Lk))
        if flags["MASK"]:
            s = np.where(_read(p, "mask", (B, H, Lq, Lk), dtype=np.uint8) != 0, s, -np.inf)
        if flags["EDGES"]:
            s = np.where((distance <= int(p["left"])) & (-distance <= int(p["right"])), s, -np.inf)
        sink = np.full((H, 1, 1), -np.inf) if not p["sinks"] else at(p["sinks"], (H, 1, 1), np.float32).astype(float)
        top = np.maximum(s.max(axis=-1, keepdims=True, initial=-np.inf), sink)
        top = np.where(np.isneginf(top), 0, top)
        w = np.exp(s - top)
        total = w.sum(axis=-1, keepdims=True) + np.exp(sink - top)
        out = np.where(w == 0, 0, w / np.where(total == 0, 1, total)) @ v
        lse = (top + np.log(total))[..., 0]
    if p["lse"]:
        at(p["lse"], (B, H, Lq), np.float32)[...] = lse
    _place(p, "out", (B, H, Lq, D), written)[...] = _bits(out) if written == "bfloat16" else out


def _place(p, name, shape, kind=None, dtype=np.float32):
    dtype = np.dtype(dtype if kind is None else DTYPES[kind])
    return at(p[name], shape, dtype, np.concatenate([
        p[f"{name}_stride"] * dtype.itemsize, [dtype.itemsize] * (len(shape) - len(p[f"{name}_stride"]))
    ]))


def _read(p, name, shape, kind=None, dtype=np.float32):
    x = _place(p, name, shape, kind, dtype)
    return floats(x) if kind == "bfloat16" else x.astype(np.float64)


def floats(bits):
    """bfloat16, as uint16, in float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _bits(x):
    import ml_dtypes

    return x.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
