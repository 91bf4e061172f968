"""The schemes that are compared: plain NumPy, cyflash in fp32, and cyflash in int8 in several ways.

    SCHEMES -> select("int8*")               {name: Scheme}: what `cyflash compare` and `cyflash.quant.evaluate` measure
    save_call -> prepare_call                a layer and its schemes on the way to the processes that are measured
"""

import fnmatch
import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from cyflash import arrays
from cyflash.attention import flash_attention, flash_attention_int8
from cyflash.cpu import cpu_info, set_implementation
from cyflash.measure import blas_threads
from cyflash.plain import plain_attention

__all__ = ["FP32", "NUMPY", "OPTIONS", "SCHEMES", "Scheme", "int8_schemes", "prepare_call", "save_call", "select"]


class Scheme(NamedTuple):
    """One way to compute attention: a function of (q, k, v, *, num_threads, ...), and its own options."""

    attend: Callable
    options: dict = {}  # noqa: RUF012 - never written

    def __call__(self, layer, options, num_threads):
        return self.attend(*layer, num_threads=num_threads, **self.options, **options)


def _plain(q, k, v, *, num_threads, **options):
    """NumPy's threads are those of its BLAS: `blas_threads`, around the call."""
    with np.errstate(invalid="ignore", over="ignore"):  # inputs may be what they like: the comparison tells
        return plain_attention(q, k, v, **options)


NUMPY, FP32 = "numpy fp32", "cyflash fp32"  # what the ratios of all others are to
SCHEMES = {
    NUMPY: Scheme(_plain),
    FP32: Scheme(flash_attention),
    "int8 tensor": Scheme(flash_attention_int8, {"granularity": "tensor", "smooth_k": False}),
    "int8 head": Scheme(flash_attention_int8, {"granularity": ("head", "head", "token"), "smooth_k": True}),
    "int8 token": Scheme(flash_attention_int8),
    "int8 token, bf16 PV": Scheme(flash_attention_int8, {"pv": "bf16"}),
    "int8 token, fp32 PV": Scheme(flash_attention_int8, {"pv": "fp32"}),
}


def _names(function):
    return [name for name, x in inspect.signature(function).parameters.items() if x.kind is x.KEYWORD_ONLY]


# The options that all schemes share, as the reference does; and those of int8 alone.
OPTIONS = tuple(_names(plain_attention))
INT8_OPTIONS = tuple(name for name in _names(flash_attention_int8) if name not in _names(flash_attention))


def select(patterns):
    """Those of SCHEMES whose names fit.

    Parameters
    ----------
    patterns : iterable of str
        Names, or patterns as of file names: ``int8*``.

    Returns
    -------
    dict of str to Scheme
        In the order of SCHEMES.

    Raises
    ------
    ValueError
        A pattern that fits none.
    """
    fitting = set()
    for pattern in patterns:
        found = fnmatch.filter(SCHEMES, pattern)
        if not found:
            raise ValueError(f"schemes: expected names of {', '.join(map(repr, SCHEMES))}; got {pattern!r}")
        fitting.update(found)
    if not fitting:
        raise ValueError("schemes: expected at least one, got none")
    return {name: scheme for name, scheme in SCHEMES.items() if name in fitting}


def int8_schemes(labelled):
    """Schemes of one's own: {label: options of `flash_attention_int8` alone} -> {label: Scheme}; checks the names."""
    for label, options in labelled.items():
        if label in (NUMPY, FP32):
            raise ValueError(f"schemes: {label!r} is what the others are set against; choose another label")
        if not isinstance(options, Mapping):
            raise TypeError(f"schemes: {label!r}: expected a dict of options, got {type(options).__name__}")
        if unknown := [name for name in options if name not in INT8_OPTIONS]:
            hint = "; those of the attention are arguments of evaluate" if set(unknown) & set(OPTIONS) else ""
            expected = ", ".join(INT8_OPTIONS)
            raise TypeError(f"schemes: {label!r}: expected options of {expected}; got {unknown[0]}{hint}")
    if not labelled:
        raise ValueError("schemes: expected at least one, got none")
    return {label: Scheme(flash_attention_int8, dict(options)) for label, options in labelled.items()}


# To the processes that are measured (measure.CallProcess)


def save_call(path, layer, options, schemes):
    """Write what `prepare_call` reads: arrays keep the order of their axes in memory, and broadcast ones stay small."""
    with open(path, "wb") as file:
        _Pickler(file, pickle.HIGHEST_PROTOCOL).dump((tuple(layer), options, schemes, cpu_info()["implementation"]))


def prepare_call(path, scheme, num_threads):
    """In a process of its own: everything but the call itself, which is returned."""
    with open(path, "rb") as file:
        layer, options, schemes, implementation = pickle.load(file)
    set_implementation(implementation)
    blas_threads(num_threads)  # both for as long as the process lives
    return lambda: schemes[scheme](layer, options, num_threads)


class _Pickler(pickle.Pickler):
    def reducer_override(self, x):
        if type(x) is not np.ndarray or x.flags.c_contiguous:
            return NotImplemented
        once = arrays.once(x)
        order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
        return _restored, (np.ascontiguousarray(once.transpose(order)), order, x.shape)


def _restored(x, order, shape):
    return np.broadcast_to(x.transpose(np.argsort(order)), shape)
