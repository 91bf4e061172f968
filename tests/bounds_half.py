"""How far attention of float16 and bfloat16 arrays may lie from the float64 reference, and the comparer.

The inputs are exact in float32, so all of bounds.py holds for the float32 numbers that the kernel ends with: call that
bound b. They are then rounded, half to even, to q's dtype of t significant bits (11 or 8) and least exponent e (-14 or
-126). A number of size y moves by at most half a unit of its last place:

    half(y) = 2^(max(floor(log2 y), e) - t)          bound = b + half(|expected| + b)

It becomes infinite from `limit` on, half a unit beyond the largest number: where |expected| - b >= limit the result has
to be infinite, where |expected| + b < limit it must not be, and between either is right.

Where the CPU multiplies bfloat16 (`native`), and all of q, k and v are in it, the weights are rounded to it as well,
each relative to its own size by at most 2^-8, while the denominator sums those that were not rounded:

    b + 2^-8 sum_j p_j |v_j|          and a hundredth of that for terms of second order

Its sums are float32 of exact products, as in bounds.py, but it takes denormal numbers for 0, whether they are factors,
weights or sums. With T = 2^-126 a product loses at most T times the other factor, and each of D sums T:

    delta_j += |scale| T (sum_d |q_d| + sum_d |k_jd| + D)          b += T (Lk + 2)
"""
import functools

import bounds
import numpy as np
from bounds import RMS_FACTOR, RMS_OUTPUTS, RMS_ROWS, SAFETY, TINY, Report
from halves import exact
from sharing import Shared

from cyflash import reference

BITS = {"float16": 11, "bfloat16": 8}               # of the significand, the hidden one too
LEAST_EXPONENT = {"float16": -14, "bfloat16": -126}
LARGEST_EXPONENT = {"float16": 15, "bfloat16": 127}
WEIGHT = 2.0**-8                                    # relative rounding of a weight to bfloat16


class Case(metaclass=Shared):
    """One set of arguments with its expected result and bounds; `check` judges a computed one.

    q, k, v: float32, float16 or bfloat16, each its own. native: the products are in bfloat16.
    """

    def __init__(self, q, k, v, *, native=False, **options):
        self.dtype, self.native = q.dtype, native
        self.case = bounds.Case(*exact(q, k, v), **options)
        self.expected, self.expected_lse = self.case.expected, self.case.expected_lse

    @functools.cached_property
    def bounds(self):
        """Bounds of the float32 result and of lse, in their shapes."""
        out, lse = self.case.bounds
        if not self.native:
            return out, lse
        case = self.case
        more = [_native_bounds(head) for head in reference.heads(case.q, case.k, case.v, **case.options)]
        if not more:
            return out, lse
        more_out, more_lse = (np.array(x) for x in zip(*more, strict=True))
        return out + more_out.reshape(out.shape), lse + more_lse.reshape(lse.shape)

    @functools.cached_property
    def plain_error(self):
        """Of what a NumPy user would write, rounded to q's dtype; weights in bfloat16 where the kernel's are."""
        case, weights = self.case, round_to_bfloat16 if self.native else None
        with np.errstate(invalid="ignore", over="ignore"):
            out = bounds.plain_float32(case.q, case.k, case.v, **case.options, weights=weights).astype(self.dtype)
            return out.astype(np.float64) - self.expected

    def check(self, out, lse=None, rms=True):
        """Raise AssertionError unless out (and lse) lie within the bounds; return a `bounds.Report`."""
        worst, where = compare("out", out, self.dtype, self.expected, self.bounds[0])
        lse_worst = 0.0 if lse is None else bounds.compare("lse", lse, self.expected_lse, self.bounds[1])[0]
        rms_ratio = max_ratio = np.nan
        seeing = (self.expected != 0).any(axis=-1)
        enough = np.count_nonzero(seeing) * out.shape[-1] >= RMS_OUTPUTS
        if rms and enough and bounds._rows_that_count(self.plain_error) >= RMS_ROWS:
            result = out[seeing].astype(np.float64)
            rms_ratio, max_ratio = bounds.ratios_to_plain(result, self.expected[seeing], self.plain_error[seeing])
            assert not rms_ratio > RMS_FACTOR, f"out: RMS error {rms_ratio:.3g} x that of plain NumPy"
        return Report(worst, where, lse_worst, rms_ratio, max_ratio)


def compare(name, actual, dtype, expected, bound):
    """Raise AssertionError unless `actual` has this dtype and is what a float32 result within `bound` is rounded to.

    Returns the largest error / bound, that of rounding included, and its index.
    """
    assert actual.dtype == dtype, f"{name}: dtype {actual.dtype}, expected {dtype}"
    if dtype == np.float32:
        return bounds.compare(name, actual, expected, bound)
    size, limit = np.abs(expected), infinite_from(dtype)
    with np.errstate(invalid="ignore"):
        actual = actual.astype(np.float32)
        either = np.isfinite(expected) & (size + bound >= limit)  # may be infinite,
        too_large = either & (size - bound >= limit)              # or has to be
    infinite = too_large | (either & np.isinf(actual))
    expected = np.where(infinite, np.copysign(np.inf, expected), expected)
    return bounds.compare(name, actual, expected, bound + half_unit(np.where(infinite, 0.0, size) + bound, dtype))


def half_unit(size, dtype):
    """Half a unit in the last place of numbers of this size."""
    least = LEAST_EXPONENT[dtype.name]
    size = np.maximum(np.where(np.isfinite(size), size, 0.0), 2.0**least)  # below it, all units are the same
    exponent = np.frexp(size)[1] - 1
    return np.ldexp(1.0, exponent - BITS[dtype.name])


def infinite_from(dtype):
    """The least size that is rounded to infinity: a tie, and the largest number is odd."""
    return 2.0 ** LARGEST_EXPONENT[dtype.name] * (2 - 2.0 ** -BITS[dtype.name])


def round_to_bfloat16(x):
    """float32 weights, not NaN, rounded half to even, as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _native_bounds(head):
    """What products in bfloat16 add to the bounds of one head: (Lq, Dv) of the output and (Lq,) of the log-sum-exp."""
    with np.errstate(invalid="ignore", over="ignore"):
        scores = np.where(head.visible, reference.head_scores(head), -np.inf)
        p, lse = reference.softmax(scores, head.sink)
        values = np.abs(np.where(np.isfinite(head.v), head.v, 0.0))
        sums = np.abs(head.q).sum(axis=1)[:, None] + np.abs(head.k).sum(axis=1) + head.q.shape[1]
        lost = np.where(p > 0, abs(head.scale) * TINY * sums, 0.0).max(axis=1, initial=0.0)
        average = p @ values
        out = (1.01 * WEIGHT + 2 * SAFETY * np.expm1(lost)[:, None]) * average + TINY * (len(head.k) + 2)
    seeing = np.isfinite(lse)
    return np.where(seeing[:, None], out, 0.0), np.where(seeing, SAFETY * np.expm1(lost), 0.0)
