"""A GPU that is not there: the part of CuPy that cyflash.gpu uses, over NumPy's memory, and kernels that obey Params.

    device(monkeypatch)   CuPy is this one in a test; what is launched is recorded, and computed in float64
                          (gpu_model.py) from what it is told alone, which is so shown to be the whole call.
"""
import ctypes
import itertools
import math
import sys
import types
import weakref
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import gpu_model
import numpy as np
from gpu_model import at, floats

from cyflash.gpu import tensor_maps, variants

__all__ = ["at", "floats"]  # from there, for tests
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
    maps: tuple     # of Box: what was encoded
    streams: tuple  # that were entered

    @property
    def source(self):
        return self.variant.source

    @property
    def kinds(self):
        """Names of the dtypes of q and k, of v, and of out, with _ between them."""
        return "_".join(gpu_model.kinds_of(self.variant))


def choose(*arguments, **options):
    """As variants.choose, with a name that says what was asked for."""
    variant = chosen(*arguments, **options)
    return variant._replace(kernel="_".join(gpu_model.kinds_of(variant)))


chosen = variants.choose


def encode(to, size, axes, address, shape, strides, box, steps, interleaved, swizzle, promotion, fill):
    """cuTensorMapEncodeTiled: the arguments themselves, in the 128 bytes that it has for them."""
    assert (axes.value, list(steps), interleaved.value, fill.value) == (4, [1] * 4, 0, 0) and to.value % 64 == 0
    assert list(box)[2:] == [1, 1] and promotion.value == 3
    row_bytes = box[0] * {0: 1, 6: 2}[size.value]
    assert row_bytes == {3: 128, 2: 64}[swizzle.value] and max(box) <= 256
    assert address.value % 16 == 0 and all(stride % 16 == 0 and 0 < stride < 2**40 for stride in strides)
    assert all(0 < n <= 2**32 for n in shape)
    words = np.zeros(16, np.uint64)
    words[:11] = address.value, size.value, *shape, *strides, *box[:2]
    ctypes.memmove(to.value, words.ctypes.data, 128)
    return 0


def decoded(maps):
    """The boxes that were encoded as struct Maps."""
    assert maps.size == 1 and maps.itemsize == 3 * 128
    found = []
    for words in maps.view(np.uint64).reshape(3, 16).tolist():
        address, size, *more = words[:11]
        found.append(tensor_maps.Box(address, {0: 1, 6: 2}[size], tuple(more[:4]), tuple(more[4:7]), tuple(more[7:])))
    return tuple(found)


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
                params, *maps = args
                assert params.size == 1 and type(params) is np.ndarray and bool(maps) == bool(variant.boxes)
                streams = tuple(one for one in Context.entered if isinstance(one, Stream))
                maps = decoded(*maps) if maps else ()
                one = Launch(variant, grid, block, shared_mem, params[0].copy(), maps, streams)
                self.launches.append(one)
                compute(one)

        return types.SimpleNamespace(get_function=lambda name: Kernel())


def compute(launch):
    """What a launch does. A test may have another way."""
    if launch.source == "hopper.cu" and launch.kinds.split("_")[1] == "int8":
        room(launch.maps[2].address)  # the transposed v is still there
    if launch.params["workspace"]:
        gpu_model.compute(launch, room(launch.params["workspace"]))
    else:
        gpu_model.compute(launch)


_memory = []  # what CuPy has allocated, by weak references


def room(address):
    """How many bytes of one allocation are there from an address on; an error where it was given back."""
    for found in _memory:
        host = found()
        begin = None if host is None else host.ctypes.data
        if begin is not None and begin <= address < begin + host.nbytes:
            return begin + host.nbytes - int(address)
    raise AssertionError(f"{address:#x} is in no memory of CuPy's")


def device(monkeypatch, real_variants=False, capability="90"):
    """Make CuPy a fake one for a test. real_variants: with the kernels' own names."""
    from cyflash.gpu import cubins, launch

    fake = Device()
    paths = itertools.count()

    def path_of(variant):
        path = f"{next(paths)}.cubin"
        fake.variants[path] = variant
        return path

    monkeypatch.setitem(sys.modules, "cupy", module(fake))
    monkeypatch.setattr(cubins, "path_of", path_of)
    if not real_variants:
        monkeypatch.setattr(variants, "choose", choose)
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(tensor_maps, "_encoder", lambda: encode)
    monkeypatch.setattr(Context, "compute_capability", capability)
    _memory.clear()
    launch.capability.cache_clear()
    launch.architecture.cache_clear()
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
        nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0), getSupportedArchs=lambda: (75, 80, 86, 89, 90, 120)),
    )  # fmt: skip
    return cupy


def _current():
    return next((one.id for one in reversed(Context.entered) if type(one) is Context), 0)


def _poisoned(shape, dtype):
    """Memory that nobody wrote is NaN."""
    shape = shape if isinstance(shape, tuple) else (shape,)
    host = np.empty(math.prod(shape) * np.dtype(dtype).itemsize + 16, np.uint8)
    host = host[-host.ctypes.data % 16 :][: host.size - 16]
    host[...] = 0xFF
    host = host.view(dtype).reshape(shape)
    _memory.append(weakref.ref(host))
    return host


def _function(function):
    def call(*args, **kwargs):
        with np.errstate(all="ignore"):
            return dressed(function(*map(bare, args), **kwargs))

    return call


def _made(shape, dtype, pointer, strides):
    (address, size, _, number), offset = pointer
    assert 0 <= offset < size
    return FakeArray(at(address + offset, shape, dtype, strides), number)
