"""How far a float32 result may lie from the float64 reference, and the comparer that holds it to that.

The bound of one output element, derived by following the roundings (eps = 2^-23):

    delta_j = D eps |scale| sum_d |q_d k_jd|          one rounding per term of the dot product
            + 4 eps (|s_j| + |bias_j| + |alibi_j| + |s_j - max s|)      and four of what comes after it
    w_j     = exp(delta_j) - 1                        relative error of the weight p_j
    bound   = 2 [ roundings sum_j p_j |v_j|           exp and the sums over keys: see `roundings`
                + sum_j p_j w_j |v_j|                 errors of the numerator's weights
                + |out| (sum_j p_j w_j + p_sink w_sink) ]               and of the denominator's
            + what underflow may lose

Softcap is monotone, so it maps the interval s_j +- delta_j onto the interval it can reach.
"""
import functools
from typing import NamedTuple

import numpy as np
from sharing import Shared

from cyflash import reference

EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)
SUBNORMAL = float(np.finfo(np.float32).smallest_subnormal)
STEPS = 4           # roundings of a score after its dot product
SAFETY = 2          # second-order terms
KEYS_PER_BLOCK = 64  # at least
KEYS_PER_SUM = 128   # keys that are added one after another, unless the caller asks for larger blocks
RMS_FACTOR = 1.5
RMS_OUTPUTS = 4096  # fewer outputs make no stable statistic,
RMS_ROWS = 50       # nor do fewer rows that carry the error: with huge scores a handful of near ties carry it all


class Report(NamedTuple):
    """How a result that passed compares: ratios, so that below 1 is inside the bound."""

    worst: float      # max of error / bound over the outputs
    where: tuple      # its index
    lse_worst: float  # the same for the log-sum-exp
    rms_ratio: float  # RMS error over that of plain float32 NumPy (NaN when not measured)
    max_ratio: float  # largest error over that of plain float32 NumPy (NaN when not measured)


class Case(metaclass=Shared):
    """One set of arguments with its expected result and bounds; `check` judges a computed one."""

    def __init__(self, q, k, v, **options):
        self.q, self.k, self.v, self.options = q, k, v, options
        self.expected, self.expected_lse = reference.attention(q, k, v, **options, return_lse=True)

    @functools.cached_property
    def bounds(self):
        """Bounds of out and of lse, in their shapes."""
        per_head = [_head_bounds(head) for head in reference.heads(self.q, self.k, self.v, **self.options)]
        out, lse = zip(*per_head, strict=True) if per_head else ((), ())
        return np.array(out).reshape(self.expected.shape), np.array(lse).reshape(self.expected_lse.shape)

    @functools.cached_property
    def plain_error(self):
        with np.errstate(invalid="ignore"):
            return plain_float32(self.q, self.k, self.v, **self.options) - self.expected

    def check(self, out, lse=None, rms=True):
        """Raise AssertionError unless out (and lse) lie within the bounds; return a `Report`.

        rms: hold the RMS error against plain NumPy's, where there are enough outputs for it.
        """
        worst, where = compare("out", out, self.expected, self.bounds[0])
        lse_worst = 0.0 if lse is None else compare("lse", lse, self.expected_lse, self.bounds[1])[0]
        rms_ratio = max_ratio = np.nan
        seeing = (self.expected != 0).any(axis=-1)  # rows without a key are exactly 0
        enough = np.count_nonzero(seeing) * out.shape[-1] >= RMS_OUTPUTS
        if rms and enough and _rows_that_count(self.plain_error) >= RMS_ROWS:
            rms_ratio, max_ratio = ratios_to_plain(out[seeing], self.expected[seeing], self.plain_error[seeing])
            assert not rms_ratio > RMS_FACTOR, f"out: RMS error {rms_ratio:.3g} x that of plain float32 NumPy"
        return Report(worst, where, lse_worst, rms_ratio, max_ratio)

    def distance_to(self, other):
        """Largest difference between two expected outputs in units of this case's bound: how visible an option is."""
        with np.errstate(invalid="ignore", divide="ignore"):
            gap = np.abs(self.expected - other.expected) / self.bounds[0]
        return float(np.nanmax(gap))


def roundings(Lk):
    """Relative error of a row's sums over keys: four of exp and the division, half of eps for each addition within a
    block, as all may be off in one direction (where weights and values are the same for every key), and one for each
    block that is added to those before."""
    return (4 + min(Lk, KEYS_PER_SUM) / 2 + -(-Lk // KEYS_PER_BLOCK)) * EPS


def compare(name, actual, expected, bound):
    """Raise AssertionError unless `actual` is float32, NaN and infinite where expected, and elsewhere within `bound`.

    Returns the largest error / bound and its index.
    """
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == np.float32, f"{name}: dtype {actual.dtype}, expected float32"
    _same_places(f"{name}: NaN", np.isnan(actual), np.isnan(expected))
    for infinity in (np.inf, -np.inf):
        _same_places(f"{name}: {infinity}", actual == infinity, expected == infinity)
    finite = np.isfinite(expected)
    if not finite.any():
        return 0.0, ()
    assert np.isfinite(bound[finite]).all(), f"{name}: the bound overflows, so it cannot judge"
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(np.where(finite, actual, 0.0) - np.where(finite, expected, 0.0))
        ratio = np.where(error > 0, error / bound, 0.0)
    ratio[~finite] = 0.0
    where = tuple(int(i) for i in np.unravel_index(np.argmax(ratio), ratio.shape))
    assert ratio[where] <= 1, (
        f"{name}: {np.count_nonzero(ratio > 1)} of {ratio.size} outside the bound, worst {ratio[where]:.3g} x "
        f"at {where}: {actual[where]}, expected {expected[where]} +- {bound[where]:.3g}"
    )
    return float(ratio[where]), where


def ratios_to_plain(out, expected, plain_error):
    """RMS and largest error of `out`, each over that of plain float32 NumPy.

    A correctly rounded result has a relative RMS error of about 0.15 eps: plain errors below that count as that.
    """
    finite = np.isfinite(expected) & np.isfinite(plain_error)  # plain NumPy lets hidden NaN leak
    error, plain = out[finite] - expected[finite], plain_error[finite]
    floor = 0.15 * EPS * _rms(expected[finite]) if finite.any() else 0.0
    if floor == 0:
        return np.nan, np.nan
    largest = float(np.abs(error).max() / max(np.abs(plain).max(), floor))
    return _rms(error) / max(_rms(plain), floor), largest


def _rows_that_count(error):
    """How many rows carry the squared error: their number if all carry the same, 1 if one carries all."""
    row = np.nan_to_num(error * error, nan=0.0, posinf=0.0).sum(axis=-1)
    return row.sum() ** 2 / max((row * row).sum(), np.finfo(np.float64).tiny)


def _rms(x):
    return float(np.sqrt(np.mean(x * x)))


def _same_places(what, actual, expected):
    if not np.array_equal(actual, expected):
        where = tuple(int(i) for i in np.argwhere(actual != expected)[0])
        raise AssertionError(f"{what} at {actual.sum()} places, expected {expected.sum()}; first difference at {where}")


def _head_bounds(head):
    """Bounds of one head: (Lq, Dv) of the output and (Lq,) of the log-sum-exp."""
    with np.errstate(invalid="ignore", over="ignore"):
        scores = np.where(head.visible, reference.head_scores(head), -np.inf)
        seen = scores != -np.inf
        p, lse = reference.softmax(scores, head.sink)
        top = np.where(np.isfinite(lse), np.maximum(scores.max(axis=1, initial=-np.inf), head.sink), 0.0)
        delta = np.where(seen, _score_error(head) + STEPS * EPS * np.abs(scores - top[:, None]), 0.0)
        weight_error = np.where(seen, p * np.expm1(delta), 0.0)
        p_sink = np.exp(head.sink - np.where(np.isfinite(lse), lse, np.inf))
        sink_error = 0.0 if head.sink == -np.inf else p_sink * STEPS * EPS * (abs(head.sink) + np.abs(head.sink - top))

        size = np.abs(np.where(np.isfinite(head.v), head.v, 0.0))
        out = np.abs(reference.weighted_sum(p, head.visible, head.v))
        denominator = weight_error.sum(axis=1) + sink_error
        of_sums = roundings(len(head.k))
        bound = SAFETY * (of_sums * (p @ size) + weight_error @ size + denominator[:, None] * out)
        underflow = TINY * (seen @ size) + (len(head.k) + 2) * SUBNORMAL
        lse_bound = SAFETY * (of_sums + denominator + EPS * (STEPS * np.abs(top) + np.abs(lse)))
    return bound + underflow, np.where(np.isfinite(lse), lse_bound, 0.0)


def _score_error(head):
    """Bound on the error of each score, (Lq, Lk), as `reference.head_scores` orders the operations."""
    D = head.q.shape[1]
    return changed_error(
        head, head.scale * (head.q @ head.k.T), D * EPS * abs(head.scale) * (np.abs(head.q) @ np.abs(head.k).T)
    )


def changed_error(head, score, error):
    """The error of scores after softcap, bias and ALiBi, from that before."""
    alibi = head.slope * np.abs(head.distance)
    bias = np.where(np.isfinite(head.bias), np.abs(head.bias), 0.0)
    if head.softcap:
        low, middle, high = (head.softcap * np.tanh(x / head.softcap) for x in (score - error, score, score + error))
        error, score = np.maximum(high - middle, middle - low), middle
    return error + STEPS * EPS * (np.abs(score) + bias + np.abs(alibi))


def products_in_order(q, k):
    """q @ k.T in float32, one fused multiply-add after another, as the kernels of a BLAS for large matrices take them.

    Some kernels for small matrices (OpenBLAS on AVX-512) add sixteen partial sums: what "plain NumPy" errs would depend
    on the machine's BLAS. Large matrices are left to it.
    """
    if len(q) * len(k) > 1 << 18:
        return q @ k.T
    total = np.zeros((len(q), len(k)), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for a, b in zip(q.T.astype(np.float64), k.T.astype(np.float64), strict=True):
            total = (total + a[:, None] * b).astype(np.float32)
    return total


def plain_float32(q, k, v, *, weights=None, **options):
    """What a NumPy user would write: the whole score matrix, in float32. weights: a function for the numerator's."""
    rows = []
    for head in reference.heads(q, k, v, **options):
        single = {name: np.float32(getattr(head, name)) for name in ("q", "k", "v", "distance", "bias", "slope")}
        scores = reference.head_scores(head._replace(**single), products_in_order(single["q"], single["k"]))
        scores = np.where(head.visible, scores, np.float32(-np.inf))
        with np.errstate(invalid="ignore", over="ignore"):
            top = np.maximum(scores.max(axis=1, initial=-np.inf, keepdims=True), np.float32(head.sink))
            top = np.where(top == -np.inf, np.float32(0), top)
            p = np.exp(scores - top)
            total = p.sum(axis=1, keepdims=True) + np.exp(np.float32(head.sink) - top)
            p = p if weights is None else weights(p)
            rows.append((p @ single["v"]) / np.where(total == 0, np.float32(1), total))
    return np.array(rows, dtype=np.float32).reshape(q.shape[:-1] + v.shape[-1:])
