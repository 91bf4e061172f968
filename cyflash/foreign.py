"""Arrays of other libraries: views of their memory in, results of the same library out.

    @same_kind          makes a function of NumPy arrays one of arrays of any library (@any_kind: with NumPy's results)
      arguments         as_numpy: of torch and JAX on the CPU, of whatever has DLPack or __array__; nothing is copied
      results           maker: arrays of the library that the first array among the arguments is of

Arrays on a GPU pass as they are, to functions that have a path for them, or say that they have none. No library is
imported: where there is an array, its library is there already.
"""
import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import numpy as np

from cyflash.gpu.where import on_gpu, require_all_on_gpu

CPU = 1, 3  # DLPack's names of the host's memory, and of such that is pinned for CUDA

# Types that are no arrays of other libraries: of these no more is asked. Types that come are added.
PLAIN = {np.ndarray, type(None), bool, int, float, str, tuple, list}
# Classes whose objects hold arrays, all of one kind, the first as `data`; a method `mapped` returns a copy with a
# function applied to each. They add themselves.
HOLDERS: set[type] = set()
READERS: dict[type, Callable[[str, Any], Any]] = {}  # {type: function of (name, x) that returns NumPy's view}

WRITTEN = "out", "k_cache", "v_cache"  # arguments that are written: torch is told, for gradients that need old values

_hidden = None  # _call, as torch.compile does not see it

Function = TypeVar("Function", bound=Callable[..., Any])


def same_kind(function: Function) -> Function:
    """A function that takes NumPy arrays, as one that takes arrays of any library, and returns arrays of that.

    function: without *args. Of what it returns, NumPy arrays (also in a tuple, or in objects with `mapped`) become
    arrays of the library of its first argument that is an array; an `out` that was given is returned as it is.
    """
    return _taking_any(function)


def same_kind_or_gpu(function: Function) -> Function:
    """As `same_kind`, for a function that takes a call whose arrays are on a GPU, all of them, as it is."""
    return _taking_any(function, on_gpu_too=True)


def any_kind(function: Function) -> Function:
    """As `same_kind`, but what is returned stays as it is."""
    return _taking_any(function, hand_back=False)


def _taking_any(function, hand_back=True, on_gpu_too=False):
    plain, caller = PLAIN, _caller

    def with_any_arrays(*args, **options):
        for x in args:  # the usual case, without ceremony: loops that end here cost a tenth of a microsecond
            if type(x) not in plain:
                return caller()(function, hand_back, on_gpu_too, args, options)
        for x in options.values():
            if type(x) not in plain:
                return caller()(function, hand_back, on_gpu_too, args, options)
        return function(*args, **options)

    # Of the function's own module: doctest passes over functions whose globals are another's.
    own = FunctionType(with_any_arrays.__code__, function.__globals__, closure=with_any_arrays.__closure__)
    own._torchdynamo_disable = True  # what torch.compiler.disable sets, without importing torch
    return functools.update_wrapper(own, function)


def _caller():
    """_call; where torch.compile may be on, such that it does not look inside: it would trace NumPy's functions."""
    global _hidden
    if "torch._dynamo" not in sys.modules:
        return _call
    if _hidden is None:
        _hidden = sys.modules["torch"].compiler.disable(_call)
    return _hidden


def _call(function, hand_back, on_gpu_too, args, options):
    if not (_any_foreign(args) or _any_foreign(options.values())):
        return function(*args, **options)
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    named = dict(zip(names, args, strict=False)) | options
    readers = {name: reader for name, x in named.items() if (reader := _reader(type(x))) is not None}
    there = [name for name in readers if on_gpu(named[name])]
    if there and on_gpu_too:
        require_all_on_gpu(named)
        return function(*args, **options)
    seen = {name: reader(name, named[name]) for name, reader in readers.items() if name not in there}
    result = function(
        *(seen.get(name, x) for name, x in zip(names, args, strict=False)), *args[len(names) :],
        **{name: seen.get(name, x) for name, x in options.items()},
    )
    for name in WRITTEN:
        if name in seen and _is_of("torch", "Tensor", type(named[name])) and not named[name].is_inference():
            sys.modules["torch"].autograd.graph.increment_version(named[name])
    first = next((named[name] for name in names if name in seen or isinstance(named.get(name), np.ndarray)), None)
    if not hand_back or there or isinstance(first, np.ndarray):
        return result
    return _handed_back(result, maker(first), (options | seen).get("out"), options.get("out"))


def _any_foreign(values):
    for x in values:
        kind = type(x)
        if kind not in PLAIN and not (kind in HOLDERS and type(x.data) is np.ndarray):
            return True
    return False


def _handed_back(x, make, out, given):
    if out is not None and x is out:
        return given
    if type(x) is np.ndarray:
        return make(x)
    if type(x) is tuple:
        return tuple(_handed_back(one, make, out, given) for one in x)
    return x.mapped(make) if hasattr(x, "mapped") else x


def as_numpy(name, x):
    """A view of x as a NumPy array, if x is an array of another library in the host's memory; else x itself.

    Parameters
    ----------
    name : str
        What errors call x.
    x
        Anything. Of torch's tensors and JAX's arrays bfloat16 becomes that of ml_dtypes.

    Raises
    ------
    TypeError, ValueError
        For an array that has no memory of numbers here: of another device, sparse, traced, with a gradient.
    ImportError
        For torch's bfloat16 without ml_dtypes.
    """
    if type(x) in PLAIN or (reader := _reader(type(x))) is None or on_gpu(x):
        return x
    return reader(name, x)


def maker(x):
    """A function that returns a NumPy array as an array of x's library, without a copy where the library can."""
    kind = type(x)
    if hasattr(kind, "mapped"):
        return maker(x.data)
    if _is_of("torch", "Tensor", kind):
        return _tensor
    if _is_of("jax", "Array", kind):
        return functools.partial(sys.modules["jax"].device_put, device=next(iter(x.devices())))
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__().from_dlpack
    return np.asarray


def _reader(kind):
    """What reads objects of this type; None where they are no arrays of other libraries."""
    if kind in PLAIN:
        return None
    if kind in HOLDERS:
        return _of_holders
    if kind not in READERS:
        shows_memory = hasattr(kind, "__dlpack__") or hasattr(kind, "__array__")
        if not shows_memory or issubclass(kind, (np.ndarray, np.generic)):
            PLAIN.add(kind)
            return None
        of_jax = kind.__module__.partition(".")[0] in ("jax", "jaxlib")  # tracers are no subclasses of jax.Array
        READERS[kind] = _of_torch if _is_of("torch", "Tensor", kind) else _of_jax if of_jax else _of_others
    return READERS[kind]


def _is_of(library, name, kind):
    """Whether a type is the class `name` of a library, or derived from it."""
    base = getattr(sys.modules.get(library), name, None)
    return base is not None and issubclass(kind, base)


def _of_holders(name, x):
    return x if type(x.data) is np.ndarray else x.mapped(functools.partial(as_numpy, name))


# torch


def _of_torch(name, x):
    torch = sys.modules["torch"]
    if x.requires_grad:
        if torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor without gradient, which is not computed; pass {name}.detach(), or call "
                "within torch.no_grad()"
            )
        x = x.detach()
    try:
        if x.dtype is torch.bfloat16:
            return x.view(torch.int16).numpy().view(_bfloat16(name))
        return x.numpy()
    except (RuntimeError, TypeError, ValueError) as error:  # the usual case asks nothing more
        raise _why_no_view(name, x, error) from None


def _bfloat16(name):
    from cyflash.arrays import checked_dtype

    return checked_dtype(name, "bfloat16")


def _why_no_view(name, x, error):
    """What keeps a tensor from being read as a NumPy array."""
    torch = sys.modules["torch"]
    expected = f"{name}: expected a tensor in the host's memory"
    if x.is_nested:
        return TypeError(
            f"{name}: expected a dense tensor, got a nested one; pass {name}.to_padded_tensor(0.0) and a mask, or "
            f"{name}.values() to flash_attention_varlen, with {name}.offsets() as cu_seqlens"
        )
    if x.layout is not torch.strided:
        return TypeError(f"{name}: expected a dense tensor, got layout {x.layout}; pass {name}.to_dense()")
    if x.device.type == "meta":
        return TypeError(f"{expected}, got one on the device meta, which has no values that {name}.cpu() could bring")
    if x.device.type != "cpu":
        return TypeError(f"{expected}, got one on {x.device}; pass {name}.cpu()")
    if x.is_quantized:
        return TypeError(
            f"{name}: expected a plain tensor, got a quantised one, {x.dtype}; pass {name}.dequantize(), or "
            f"{name}.int_repr() and its scale to flash_attention_int8"
        )
    if x.is_conj():
        return TypeError(f"{name}: expected a plain tensor, got a conjugate view; pass {name}.resolve_conj()")
    if x.is_neg():
        return TypeError(f"{name}: expected a plain tensor, got a negative view; pass {name}.resolve_neg()")
    return TypeError(f"{name}: expected a tensor that NumPy can see, got {type(x).__name__} of {x.dtype}: {error}")


def _tensor(x):
    torch = sys.modules["torch"]
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


# JAX


def _of_jax(name, x):
    if isinstance(x, sys.modules["jax"].core.Tracer):
        raise TypeError(
            f"{name}: expected an array with values, got {type(x).__name__}, as jax.jit, vmap and grad pass them; call "
            "outside of these, or by jax.pure_callback"
        )
    devices = x.devices()
    if len(devices) != 1 or next(iter(devices)).platform != "cpu":
        raise TypeError(
            f"{name}: expected an array on one CPU device, got one on {', '.join(sorted(map(str, devices)))}; pass "
            f"jax.device_put({name}, jax.devices('cpu')[0])"
        )
    return np.asarray(x)


# Others


def _of_others(name, x):
    kind = type(x)
    if hasattr(kind, "__dlpack_device__") and (device := int(x.__dlpack_device__()[0])) not in CPU:
        raise TypeError(
            f"{name}: expected an array in the host's memory, got {kind.__name__} on a device that DLPack numbers "
            f"{device}; copy it to the CPU"
        )
    if hasattr(kind, "__dlpack__"):
        try:
            return np.from_dlpack(x)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:  # of dtypes that DLPack or NumPy has not
            if not hasattr(kind, "__array__"):
                raise TypeError(f"{name}: expected an array that NumPy can see, got {kind.__name__}: {error}") from None
    return np.asarray(x)
