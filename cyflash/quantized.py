"""Arrays as int8 codes with scales: x ~ data * scale (+ mean).

    quantize(x, ...) -> QuantizedTensor                        an array on its own, to keep, save and pass around
    quantise_call(name, x, ...) -> (codes, scale, mean)        what one call of attention uses for one float argument
    LayerScales                                                static scales of one layer, found beforehand

The arithmetic is in cpu/quantise.pxi; here are shapes, checks and what is kept. Codes are symmetric, -127..127, rounded
half to even: nothing saturates unless a scale is given.
"""
import math
import numbers
import operator
from dataclasses import KW_ONLY, dataclass, fields
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cyflash import arrays, cpu
from cyflash.cpu import threads
from cyflash.cpu.team import Team
from cyflash.files import read_safetensors, replacing, safetensors_path
from cyflash.foreign import HOLDERS, as_numpy, maker, same_kind
from cyflash.gpu.where import on_gpu
from cyflash.plan import checked_flag

__all__ = ["LayerScales", "QuantizedTensor", "checked_granularity", "checked_scale", "quantise_call", "quantize"]

GRANULARITIES = ("tensor", "head", "token")
PRODUCTS = ("int8", "bf16", "fp32")

# Axes of (B, H) along which a call's dynamic scales are shared; None: each token has one.
POOLED = {"tensor": (1,), "head": (), "token": None}

FLOAT32_MAX = float(np.finfo(np.float32).max)
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # its inverse is finite, that of a denormal need not be
LARGEST_CODE = np.float32(127)

FORMAT = "cyflash.QuantizedTensor"  # what a file says that it holds

# {LayerScales: functions}, told {"q", "k", "v": (values that saturated, values in all)} of the float operands of each
# call with this `quant` that have static scales; cyflash.quant.watch sets it. Replaced, never changed: a call reads it
# once, without a lock.
watched: dict = {}

# Some 7 us of a thread's time: below that, waking another one does not pay.
ELEMENTS_PER_THREAD = 1 << 16


@same_kind
def quantize(x, granularity="tensor", *, scale=None, smooth=False, fp32_sinks=0):
    """Quantise an array of floats to int8 codes.

    Parameters
    ----------
    x : ndarray of float32, float16 or bfloat16, shape (L, D), (H, L, D) or (B, H, L, D)
        Any strides. All values finite, also those that a mask hides later: they count for the scale. 16 bits give what
        the same values in float32 do. An array on a GPU is quantised there.
    granularity : {"tensor", "head", "token"}, default "tensor"
        One scale for the whole array, for each head of each sequence, or for each token of each head. Beside `scale`,
        "head" and "token" say what shape it must have.
    scale : float or array-like of float, optional
        A static scale, which broadcasts to x's shape: a number, (H, 1, 1) or (B, H, 1, 1) per head, (H, L, 1) or
        (B, H, L, 1) per token. Values beyond 127 * scale become -127 or 127. Default: from the greatest absolute value,
        so that nothing saturates.
    smooth : bool, default False
        Subtract the mean over tokens of each channel of each head first, and keep it: for keys, whose common part has
        no effect on the softmax but costs precision.
    fp32_sinks : int, default 0
        Keep the first tokens in float32 (`fp32_rows`); they are left out of the scale, and their codes are 0.

    Returns
    -------
    QuantizedTensor
        Its data has x's shape and order of strides; its arrays are of x's library.

    Raises
    ------
    TypeError
        For another dtype.
    ValueError
        For NaN or inf, with the position; for a shape or an option.

    Notes
    -----
    In float32: scale = max(min(amax, FLT_MAX) / 127, FLT_MIN), where amax is the greatest abs(x - mean), so it is never
    0, inf or NaN; code = clip(rint((x - mean) * (1 / scale)), -127, 127), half to even. Smoothing is that of
    SageAttention (Zhang et al. 2024, arXiv:2410.02367).

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.quant import quantize
    >>> x = np.random.default_rng(0).standard_normal((8, 128, 64), dtype=np.float32)
    >>> k = quantize(x, "token", smooth=True)
    >>> k.data.dtype, k.scale.shape, k.mean.shape
    (dtype('int8'), (8, 128, 1), (8, 1, 64))
    >>> bool((abs(k.dequantize() - x) <= 0.501 * k.scale).all())
    True
    """
    granularity = checked_granularity(granularity)
    if on_gpu(x):
        from cyflash.gpu import tensors

        return tensors.quantize(x, granularity, scale=scale, smooth=checked_flag("smooth", smooth), skip=fp32_sinks)
    arrays.require_float("x", x, (2, 3, 4))
    if x.shape[-1] == 0:
        raise ValueError(f"x: expected a head_dim of at least 1, got shape {x.shape}")
    smooth = checked_flag("smooth", smooth)
    skip = checked_sinks(fp32_sinks, x.shape)
    if scale is not None:
        scale = checked_scale("scale", arrays.require_host("scale", scale), x.shape)
        granularity = checked_against(scale, None if granularity == "tensor" else granularity, x.shape)

    data = np.empty_like(x, np.int8, subok=False)
    direct = arrays.rows_in_place(data)  # data itself, unless its last axis is strided
    found, mean = _encode(
        "x", arrays.four_axes(arrays.rows_in_place(x)), arrays.four_axes(direct),
        (0, 1) if granularity == "tensor" else POOLED[granularity],
        scale=None if scale is None else arrays.four_axes(scale), smooth=bool(smooth), skip=skip,
        threads=threads.for_call(1 + x.size // ELEMENTS_PER_THREAD), build=cpu.active(), ndim=x.ndim,
    )
    if direct is not data:
        data[...] = direct
    if scale is None:
        shapes = {"tensor": (), "head": (*x.shape[:-2], 1, 1), "token": (*x.shape[:-1], 1)}
        scale = found.reshape(shapes[granularity])
    return QuantizedTensor(
        data,
        scale,
        None if mean is None else mean.reshape(*x.shape[:-2], 1, x.shape[-1]),
        x[..., :skip, :].astype(np.float32, copy=False) if skip else None,
        granularity,
    )


def quantise_call(
    name, x, granularity, *, scale=None, mean=None, smooth=False, fp32_sinks=0, threads=None, build=None, ndim=4,
    codes=None, saturated=None,
):
    """What a call of attention uses for one float argument: `quantize`, but with one scale per sequence for "tensor".

    Parameters
    ----------
    name : str
        What errors call x.
    x : ndarray of float32, float16 or bfloat16, shape (B, H, L, D), D at least 1
    granularity : {"tensor", "head", "token"}
        Of dynamic scales.
    scale : ndarray of float32 with four axes, optional
        A static scale, of `checked_scale`.
    mean : ndarray of float32, optional
        Subtract this; it broadcasts to (B, H, 1, D).
    smooth : bool
        Subtract the mean over tokens.
    fp32_sinks : int
        How many of the first tokens have codes 0 and no part in dynamic scales; at most L.
    threads : Team, optional
        At most so many; bits do not depend on it. Default: one.
    build : module, optional
        The SIMD build; default `cpu.active()`.
    ndim : int
        How many axes the caller's array has: errors show a position in these.
    codes : ndarray of int8, shape (B, H, L, D), C order, optional
        Where to write the codes.
    saturated : ndarray of intp, shape (1,), optional
        Beside a static scale: receives how many values saturate, those of fp32_sinks left out.

    Returns
    -------
    codes : ndarray of int8, shape (B, H, L, D), C order
    scale : ndarray of float32
        The static one, or shape (B, 1, 1, 1), (B, H, 1, 1) or (B, H, L, 1).
    mean : ndarray of float32, shape (B, H, 1, D), or None
        What was subtracted.

    Raises
    ------
    ValueError
        For NaN or inf, with the position.
    """
    codes = np.empty(x.shape, np.int8) if codes is None else codes
    found, mean = _encode(
        name, arrays.rows_in_place(x), codes, POOLED[granularity],
        scale=scale, mean=mean, smooth=smooth, skip=fp32_sinks, threads=team_for(x.size, threads or Team(1)),
        build=cpu.active() if build is None else build, ndim=ndim, saturated=saturated,
    )
    return codes, found, mean


def team_for(size, team):
    """The part of a Team that is worth its while for so many numbers."""
    return team.at_most(1 + size // ELEMENTS_PER_THREAD)


class Encoding(NamedTuple):
    """What the kernels' `encode` does with one array of floats, no axis of which is empty."""

    x: np.ndarray  # (B, H, L, D), the last axis contiguous
    # int8 (B, H, at least L, at least D), the last axis contiguous; to be packed: `k` or `v` of a Stored
    codes: np.ndarray
    mean: np.ndarray | None  # float32 (B, H, D) to subtract, the last axis contiguous
    given: np.ndarray | None  # float32 (B, H, L) scales, finite, at least SMALLEST_SCALE; None: each token's own ...
    found: np.ndarray | None = None  # ... which is written here, (B, H, L)
    skip: int = 0  # so many first rows get codes 0, and do not count
    counted: bool = False  # count what saturates; wants `given`
    packing: str | None = None  # "keys", "values", or None for rows
    correction: np.ndarray | None = None  # int32 (B, H, at least L), the last axis contiguous: of keys, see Stored


def _encode(
    name, x, codes, pooled, *, scale=None, mean=None, smooth=False, skip=0, threads, build, ndim, saturated=None
):
    """Write the codes of x (B, H, L, D); return (scale, mean), four axes each. x and codes: last axes contiguous."""
    B, H, L, _ = x.shape
    scale, mean, finite = ranged(
        x, pooled, scale=scale, mean=mean, smooth=smooth, skip=skip, threads=threads, build=build
    )
    given = scale
    if given is None:
        scale = np.empty((B, H, L, 1), np.float32)
    if x.size and finite:
        encoding = Encoding(
            x, codes, None if mean is None else mean[:, :, 0], by_row(given, x.shape), scale[..., 0], skip,
            saturated is not None,
        )
        with threads as n:
            (count,) = build.encode([encoding], n)
        finite = count >= 0
        if saturated is not None:
            saturated[0] = count
    if not finite:
        raise ValueError(not_finite(name, x, ndim))
    return scale, mean


def by_row(scale, shape):
    """A scale with four axes as (B, H, L) for an array of `shape`."""
    return None if scale is None else np.broadcast_to(scale, (*shape[:3], 1))[..., 0]


def ranged(x, pooled, *, scale, mean, smooth, skip, threads, build):
    """What codes of x (B, H, L, D) depend on: (scale, mean, whether all is finite, as far as was looked).

    pooled: the axes of (B, H) along which a dynamic scale is shared; None for a scale per token, which is found while
    encoding: the scale is None then. mean: (B, H, 1, D) in C order, or None.
    """
    B, H, _, D = x.shape
    if mean is not None:
        mean = np.array(np.broadcast_to(mean, (B, H, 1, D)), np.float32, order="C")
    elif smooth:
        mean = np.zeros((B, H, 1, D), np.float32)
    finite, wanted = True, scale is None and pooled is not None
    if smooth or wanted:
        top = np.zeros((B, H), np.float32)
        if x.size:
            with threads as n:
                finite = build.find_range(x, skip, smooth, None if mean is None else mean[:, :, 0], top, n)
        if wanted:
            scale = scale_of(top.max(pooled, keepdims=True, initial=0.0))[:, :, None, None]
    return scale, mean, finite


def scale_of(top):
    return np.maximum(np.minimum(top, FLOAT32_MAX) / LARGEST_CODE, SMALLEST_SCALE)


def not_finite(name, x, ndim):
    """What an error says of an array (B, H, L, D), shown with its last `ndim` axes."""
    place = np.unravel_index(np.argmin(arrays.finite(x)), x.shape)
    shown = tuple(int(i) for i in place[4 - ndim :])
    return (
        f"{name}: expected finite values, got {x[place]} at {shown}; they count for the scale also where a mask hides "
        "them: put 0 there"
    )


# What is kept


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """An array as int8 codes: x ~ data * scale (+ mean), its first tokens possibly in float32.

    Parameters
    ----------
    data : ndarray of int8, shape (L, D), (H, L, D) or (B, H, L, D)
        The codes; any strides. -128 is allowed. Of another library (torch, JAX): scale, mean and fp32_rows become
        arrays of that one, and `dequantize` gives one. On a GPU, mean and fp32_rows must be there too, and scale
        may be; they are kept as they are then, and their numbers are not checked.
    scale : float or array-like of float
        Broadcasts to data's shape, constant along the last axis. Kept as float32.
    mean : ndarray of float32, shape data.shape[:-2] + (1, D), optional
        What was subtracted before quantising. Copied, as scale and fp32_rows are.
    fp32_rows : ndarray of float32, shape data.shape[:-2] + (n, D), optional
        The first n tokens, unquantised, mean included.
    granularity : {"tensor", "head", "token"}, optional
        Default: what the scale's shape says.

    Attributes
    ----------
    shape, ndim
        Those of data.
    nbytes : int
        Of all that is kept: data, scale, mean and fp32_rows.

    Raises
    ------
    TypeError, ValueError
        For dtypes, for shapes that do not fit, for a scale that is not finite or below 1.18e-38.

    Examples
    --------
    >>> import numpy as np
    >>> from cyflash.quant import QuantizedTensor
    >>> x = QuantizedTensor(np.array([[127, -64]], np.int8), 0.5)
    >>> x
    QuantizedTensor(shape=(1, 2), granularity='tensor', nbytes=6)
    >>> x.dequantize()
    array([[ 63.5, -32. ]], dtype=float32)
    """

    data: np.ndarray
    scale: np.ndarray
    mean: np.ndarray | None = None
    fp32_rows: np.ndarray | None = None
    granularity: str | None = None

    def __post_init__(self):
        if on_gpu(self.data):
            from cyflash.gpu import tensors

            object.__setattr__(self, "granularity", tensors.checked(self))
            return
        given = self.data
        if type(given) is not np.ndarray:
            object.__setattr__(self, "data", as_numpy("data", given))
        self._check()
        if self.data is not given:
            make = maker(given)
            for name, x in self._arrays().items():
                object.__setattr__(self, name, make(x))

    def _check(self):
        arrays.require_array("data", self.data, (2, 3, 4), dtype="np.int8")
        if self.data.dtype != np.int8:
            raise TypeError(
                f"data: expected int8, got {self.data.dtype.name}; to quantise floats write cyflash.quant.quantize(x)"
            )
        if self.data.shape[-1] == 0:
            raise ValueError(f"data: expected a head_dim of at least 1, got shape {self.data.shape}")
        scale = checked_scale("scale", arrays.require_host("scale", self.scale), self.shape)
        granularity = None if self.granularity is None else checked_granularity(self.granularity)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "granularity", checked_against(scale, granularity, self.shape))
        heads, (L, D) = self.shape[:-2], self.shape[-2:]
        if self.mean is not None:
            self._keep("mean", self.mean, (*heads, 1, D))
        if self.fp32_rows is not None:
            fp32_rows = as_numpy("fp32_rows", self.fp32_rows)
            rows = fp32_rows.shape[-2] if getattr(fp32_rows, "ndim", 0) >= 2 else 0
            self._keep("fp32_rows", fp32_rows, (*heads, min(rows, L), D))

    def _keep(self, name, x, shape):
        """A copy of x, after checking it: an output written over the caller's array does not change it."""
        x = arrays.require_float32(name, as_numpy(name, x))
        if x.shape != shape:
            raise ValueError(f"{name}: expected shape {shape} beside data {self.shape}, got {x.shape}")
        if not np.isfinite(x).all():
            raise ValueError(not_finite(name, arrays.four_axes(x), x.ndim))
        object.__setattr__(self, name, np.array(x, order="C", subok=False))

    def mapped(self, function):
        """A copy with a function applied to each array; nothing is checked."""
        made = object.__new__(QuantizedTensor)
        made.__dict__.update(self.__dict__, **{name: function(x) for name, x in self._arrays().items()})
        return made

    def __repr__(self):
        mean = "" if self.mean is None else ", with mean"
        sinks = "" if self.fp32_rows is None else f", fp32_rows={self.fp32_rows.shape[-2]}"
        return (
            f"QuantizedTensor(shape={self.shape}, granularity={self.granularity!r}{mean}{sinks}, nbytes={self.nbytes})"
        )

    @property
    def shape(self):
        return tuple(self.data.shape)

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def nbytes(self):
        return sum(as_numpy(name, x).nbytes for name, x in self._arrays().items())

    def _arrays(self):
        held = {"data": self.data, "scale": self.scale, "mean": self.mean, "fp32_rows": self.fp32_rows}
        return {name: x for name, x in held.items() if x is not None}

    def dequantize(self):
        """The array that the codes stand for: data * scale (+ mean), with fp32_rows in its first rows.

        Returns
        -------
        ndarray of float32, shape data.shape
            Of data's library, in data's order of strides; values beyond float32 become its largest.
        """
        if on_gpu(self.data):
            from cyflash.gpu import tensors

            return tensors.dequantize(self)
        if not isinstance(self.data, np.ndarray):
            return maker(self.data)(as_numpy("self", self).dequantize())
        with np.errstate(over="ignore"):
            x = np.clip(np.multiply(self.data, self.scale, dtype=np.float32), -FLOAT32_MAX, FLOAT32_MAX)
            if self.mean is not None:
                x = np.clip(x + self.mean, -FLOAT32_MAX, FLOAT32_MAX)
        if self.fp32_rows is not None:
            x[..., : self.fp32_rows.shape[-2], :] = self.fp32_rows
        return x

    def save(self, path):
        """Write to a `.safetensors` file, which appears only when it is complete.

        Parameters
        ----------
        path : str or path

        Returns
        -------
        Path
            The file written.

        Raises
        ------
        ValueError
            For another suffix.
        OSError
            Where it cannot be written.
        """
        import safetensors.numpy

        path = safetensors_path(path)
        held = {name: np.array(on_host(x), order="C") for name, x in self._arrays().items()}
        metadata = {"format": FORMAT, "granularity": self.granularity}
        with replacing(path) as temporary:
            safetensors.numpy.save_file(held, temporary, metadata=metadata)
        return path

    @classmethod
    def load(cls, path):
        """Read a file that `save` wrote. Codes come back in C order.

        Parameters
        ----------
        path : str or path

        Returns
        -------
        QuantizedTensor

        Raises
        ------
        FileNotFoundError
            No such file.
        ValueError
            For another suffix, or a file that holds something else.
        """
        metadata, held = read_safetensors(path, FORMAT, "QuantizedTensor.save")
        try:
            return cls(**held, granularity=metadata.get("granularity"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


HOLDERS.add(QuantizedTensor)


@dataclass(frozen=True, eq=False)
class LayerScales:
    """Static scales of one attention layer, and how to run it: `flash_attention_int8(q, k, v, quant=...)`.

    Parameters
    ----------
    q_scale, k_scale, v_scale : float or array-like of float, optional
        A scale that broadcasts to the array's shape, as in `quantize`; kept as float32. Without one that array is
        quantised dynamically.
    k_mean : array-like of float, optional
        Subtracted from the keys before they are quantised; broadcasts to k.shape[:-2] + (1, D). Kept as float32.
    fp32_sinks : int, default 0
        So many of the first keys and values are used in float32; all, where there are fewer.
    pv : {"int8", "bf16", "fp32"}, default "int8"
        The arithmetic of the second product.
    parts : sequence of (kv_heads, LayerScales or None), optional
        A planned layer, whose heads differ in more than numbers: each kv head, with its group of query heads, is in
        exactly one part. kv_heads are integers in ascending order, from 0 to the layer's last over all parts. None runs
        these heads as `flash_attention` does. Scales and means of a part have the shapes of its own heads, so (n, 1, 1)
        for n kv heads and (n * group, 1, 1) for their query heads. Beside parts all other fields stay at their
        defaults, the arrays of the call must be of floats, and a part has no parts.

    Raises
    ------
    TypeError, ValueError
        For what is no finite positive number, and for other values; for parts that do not hold each kv head once.
        Shapes are checked against the arrays by the call.

    Notes
    -----
    A planned layer is one call of the kernels for each part. Heads that are evenly spaced are used in place, others
    are copied. The result has the bits of a call of its own for each part.

    Examples
    --------
    >>> from cyflash.quant import LayerScales
    >>> LayerScales(0.02, 0.03, 0.01, fp32_sinks=4).k_scale
    array(0.03, dtype=float32)

    Four kv heads, of which the third is run in float32:

    >>> planned = LayerScales(parts=[([0, 1, 3], LayerScales(0.02, 0.03, 0.01)), ([2], None)])
    >>> planned.parts[1]
    ((2,), None)
    """

    q_scale: np.ndarray | None = None
    k_scale: np.ndarray | None = None
    v_scale: np.ndarray | None = None
    _: KW_ONLY
    k_mean: np.ndarray | None = None
    fp32_sinks: int = 0
    pv: str = "int8"
    parts: tuple | None = None

    def __post_init__(self):
        for name in ("q_scale", "k_scale", "v_scale"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else checked_scale(name, value))
        if self.k_mean is not None:
            object.__setattr__(self, "k_mean", _checked_mean("k_mean", self.k_mean))
        object.__setattr__(self, "fp32_sinks", checked_sinks(self.fp32_sinks))
        checked_product(self.pv)
        if self.parts is not None:
            for field in fields(self):
                if field.name != "parts" and not np.array_equal(getattr(self, field.name), field.default):
                    raise ValueError(f"{field.name}: expected its default beside parts, each of which has its own")
            object.__setattr__(self, "parts", _checked_parts(self.parts))


# Checks


def checked_product(pv):
    """`pv` if it is an arithmetic of the second product, else ValueError."""
    if not isinstance(pv, str) or pv not in PRODUCTS:
        raise ValueError(f"pv: expected one of {', '.join(map(repr, PRODUCTS))}, got {pv!r}")
    return pv


def checked_granularity(granularity):
    """`granularity` if it is one, else ValueError."""
    if not isinstance(granularity, str) or granularity not in GRANULARITIES:
        expected = ", ".join(map(repr, GRANULARITIES))
        raise ValueError(f"granularity: expected one of {expected}, got {granularity!r}")
    return granularity


def checked_scale(name, scale, shape=None):
    """A scale as float32, after checking its numbers and that it fits an array of `shape`.

    Parameters
    ----------
    name : str
        What errors call it.
    scale : float, list or ndarray of float32 or float64, or array of float32 on a GPU
    shape : tuple of int, optional
        Of the array, which ends in (..., tokens, channels). None: not known yet.

    Returns
    -------
    ndarray of float32
        In the scale's own shape, which broadcasts to `shape`.

    Raises
    ------
    TypeError
        For what is no number, or an array of another dtype.
    ValueError
        For a number that is not finite or below 1.18e-38, and for a shape that does not fit.
    """
    if type(scale) is float and SMALLEST_SCALE <= scale <= FLOAT32_MAX:  # the usual case, without ceremony
        return np.array(scale, np.float32)
    if on_gpu(scale):
        return _checked_gpu_scale(name, scale, shape)
    scale = as_numpy(name, scale)
    if isinstance(scale, np.ndarray) and scale.dtype == np.float32 and scale.ndim > 1:
        array = numbers = arrays.require_array(name, scale).copy()
    else:
        numbers = _floats(name, scale)
        with np.errstate(over="ignore", under="ignore"):
            array = numbers.astype(np.float32)
    good = (array >= SMALLEST_SCALE) & (array <= FLOAT32_MAX)
    if not good.all():
        place = np.unravel_index(np.argmin(good), good.shape)
        where = f" at {tuple(map(int, place))}" if place else ""
        raise ValueError(
            f"{name}: expected positive finite float32 numbers (at least {SMALLEST_SCALE:.3g}), "
            f"got {numbers[place]}{where}"
        )
    _check_fit(name, array.shape, shape)
    return array


def on_host(x):
    """x, as an array of NumPy; a GPU is waited for."""
    if not on_gpu(x):
        return as_numpy("x", x)
    from cyflash.gpu.arrays import to_host

    return to_host(x)


def _checked_gpu_scale(name, scale, shape):
    """A scale on a GPU, of which only dtype and shape are checked: its numbers stay there."""
    from cyflash.gpu import arrays as gpu

    seen = gpu.look(name, scale)
    if seen.kind != "fp32":
        got = seen.shadow.dtype.name
        raise TypeError(f"{name}: expected float32 on a GPU, got {got}; write {name}.astype(np.float32)")
    _check_fit(name, seen.shadow.shape, shape)
    return scale


def _check_fit(name, got, shape):
    """Raise unless a scale of shape `got` fits an array of `shape`, of which None says nothing."""
    per_head = {3: "(H, 1, 1) per head", 4: "(H, 1, 1) or (B, H, 1, 1) per head"}
    per_token = {2: "(L, 1) per token", 3: "(H, L, 1) per token", 4: "(B, H, L, 1) per token"}
    ndim = 3 if shape is None else len(shape)
    forms = [form[ndim] for form in (per_head, per_token) if ndim in form]
    expected = f"{name}: expected a number, {' or '.join(forms)}{'' if shape is None else f' for an array {shape}'}"
    if len(got) == 1 and (got[0] != 1 or (shape is not None and ndim > 2)):
        tokens = shape is not None and got[0] == shape[-2] and (ndim == 2 or got[0] != shape[-3])
        axes = "-1, 1" if tokens else "-1, 1, 1"
        raise ValueError(f"{expected}, got shape {got}; write np.reshape({name}, ({axes}))")
    if got and got[-1] != 1:
        raise ValueError(f"{expected}, got shape {got}: a scale must be the same for all channels (the last axis)")
    if shape is not None:
        try:
            fits = np.broadcast_shapes(got, shape) == tuple(shape)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"{expected}, got shape {got}, which does not broadcast to it")


def checked_against(scale, granularity, shape):
    """The granularity of a static scale for an array of `shape`; ValueError where a given one contradicts it."""
    tokens = scale.shape[-2] if scale.ndim >= 2 else 1
    own = "token" if tokens > 1 else "head" if scale.size > 1 else "tensor"
    heads = math.prod(shape[:-2])
    fits = {
        None: True,
        "tensor": scale.size == 1,
        "head": tokens == 1 and (scale.size > 1 or heads <= 1),
        "token": tokens == shape[-2],
    }
    if not fits[granularity]:
        wanted = {"tensor": (), "head": (*shape[:-2], 1, 1), "token": (*shape[:-1], 1)}[granularity]
        raise ValueError(
            f"scale: expected one that broadcasts to {wanted} for granularity {granularity!r} of an array {shape}, "
            f"got shape {scale.shape}, which is per {own}"
        )
    return own if granularity is None else granularity


def checked_sinks(value, shape=None):
    """`value` as an int of at least 0, and at most the tokens of an array of `shape`."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(type(value), "__index__"):
        raise ValueError(f"fp32_sinks: expected an integer of at least 0, got {value!r}")
    n = operator.index(value)
    if n < 0:
        raise ValueError(f"fp32_sinks: expected an integer of at least 0, got {n}")
    if shape is not None and n > shape[-2]:
        raise ValueError(f"fp32_sinks: expected at most the {shape[-2]} tokens of the array {shape}, got {n}")
    return n


def _checked_parts(parts):
    """`parts` as a tuple of ((kv head, ...), LayerScales or None), after checking that they hold each kv head once."""
    expected = "parts: expected a sequence of (kv_heads, LayerScales or None)"
    if not isinstance(parts, (list, tuple)) or not parts:
        raise TypeError(f"{expected}, got {parts!r}")
    checked, seen = [], {}
    for i, part in enumerate(parts):
        if not isinstance(part, (list, tuple)) or len(part) != 2:
            raise TypeError(f"{expected}, got {part!r} as parts[{i}]")
        heads, layer = _checked_heads(f"parts[{i}]", part[0]), part[1]
        if layer is not None and not isinstance(layer, LayerScales):
            raise TypeError(f"parts[{i}]: expected a LayerScales or None for kv heads {heads}, got {layer!r}")
        for head in heads:
            if (first := seen.setdefault(head, i)) != i:
                raise ValueError(f"parts[{i}]: expected each kv head in one part, got {head} also in parts[{first}]")
        if layer is not None:
            _check_part(f"parts[{i}]", layer, len(heads))
        checked.append((heads, layer))
    if len(seen) <= max(seen):
        missing = next(head for head in range(len(seen) + 1) if head not in seen)
        raise ValueError(f"parts: expected every kv head from 0 to {max(seen)}, got none with {missing}")
    return tuple(checked)


def _checked_heads(name, heads):
    """kv heads as a tuple of int: ascending, at least one."""
    expected = f"{name}: expected kv heads as integers of at least 0 in ascending order"
    if not isinstance(heads, (list, tuple, range, np.ndarray)):
        raise TypeError(f"{expected}, got {heads!r}")
    if any(isinstance(head, (bool, np.bool_)) or not isinstance(head, (int, np.integer)) for head in heads):
        raise TypeError(f"{expected}, got {heads!r}")
    heads = tuple(map(int, heads))
    if not heads or heads[0] < 0 or any(a >= b for a, b in pairwise(heads)):
        raise ValueError(f"{expected}, got {heads}")
    return heads


def _check_part(name, layer, n):
    """Raise unless `layer` can be that of n kv heads."""
    if layer.parts is not None:
        raise ValueError(f"{name}: expected a LayerScales without parts of its own")
    for field in ("q_scale", "k_scale", "v_scale", "k_mean"):
        array = getattr(layer, field)
        heads = 1 if array is None or array.ndim < 3 else array.shape[-3]
        if heads != 1 and (heads % n if field == "q_scale" else heads != n):
            kind = f"a multiple of {n} query heads" if field == "q_scale" else f"{n} kv heads"
            raise ValueError(f"{name}: expected a {field} of this part's heads, for {kind}, got shape {array.shape}")


def _checked_mean(name, mean):
    mean = _floats(name, mean).astype(np.float32)
    if not np.isfinite(mean).all():
        raise ValueError(f"{name}: expected finite float32 numbers, got {mean[~np.isfinite(mean)][0]}")
    if mean.ndim == 0 or (mean.ndim >= 2 and mean.shape[-2] != 1):
        raise ValueError(f"{name}: expected a shape that broadcasts to k.shape[:-2] + (1, D), got {mean.shape}")
    return mean


def _floats(name, x):
    """A number, a list of numbers, or an array of float32 or float64, as an array."""
    wanted = f"{name}: expected a number, or an array of float32 or float64"
    x = as_numpy(name, x)
    if isinstance(x, np.ndarray):
        arrays.require_array(name, x)
        if x.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise TypeError(f"{wanted}, got dtype {x.dtype.str}; write {name}.astype(np.float32)")
        return x
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, (numbers.Real, list, tuple)):
        raise TypeError(f"{wanted}, got {x!r}")
    try:
        array = np.array(x)
    except ValueError:  # of uneven lengths
        array = np.array(None)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{wanted}, got {x!r}")
    return array.astype(np.float64)
