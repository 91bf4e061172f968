"""How far a kernel's int8 attention may lie from its specification, and the comparer that holds it to that.

Integers are exact, so only float32 roundings differ. With eps = 2^-23, the error of a score is

    delta_j = 4 eps |scale s_q s_k (q8 . k8)| + D eps |scale| sum_d |q_d mean_d|
            + 4 eps (|s_j| + |bias_j| + |alibi_j| + |s_j - max s|)

(of a key in float32 the first term is D eps |scale| sum_d |q_d k_jd|; it is lowered by q . mean, as the others are).
Delta = max_j delta_j over the keys that a row has met bounds the error of its running maximum. One block of keys adds

    f_b sum_j p_j v8_j,   f_b = e^(t_b - lse) omega_b / 255

to the output. f_b is off by a factor of at most 1 + off = e^(2 Delta + 8 eps); the sum is exact where the codes p are
the same, and a code can differ only by as much as that factor and the kernel's polynomial for the exponential of codes
(relative error 3.1e-6: exhaustive_exp.py; which the denominator shares, and so does omega where V's scales are per
token, since it need not be that of e^0 then) can move the rounding of 255 w / omega. So

    bound = 2 [ sum_b |f_b sum_j p_j v8_j| (off + roundings)
              + |out| (sum_j P_j (e^delta_j - 1) + roundings) ]       the denominator, of unrounded P
          + sum_b f_b (1 + off) sum_j |change of p_j| |v8_j|                 flipped codes, which the first two lines
                                                                             see as part of the sum and of out
          + what underflow may lose

and with the kernel's own codes for p the third line is gone: it is the bound of a float32 result. Weights in bfloat16
are like codes, but that their sums are rounded, and that the CPU's product takes denormal factors and sums for 0: TINY
times the other factor for each, as in bounds_half.py. Weights in float32 are as in bounds.py.
"""
from typing import NamedTuple

import bounds
import numpy as np
from bounds import EPS, SAFETY, STEPS, SUBNORMAL, TINY

from cyflash import reference, reference_int8
from cyflash.reference_int8 import bf16, encode, exp, part_scores, steps, weights

ARGUMENTS = ("q_scale", "k_scale", "v_scale", "granularity", "smooth_k", "fp32_sinks", "pv", "quant")
CODE_EXP = 3.1e-6    # relative error of the exponential that codes are made of
FLIPPED = 1e-3       # at most this share of codes may differ from the simulation,
CODES_ENOUGH = 5000  # where there are so many that a few ties do not decide


class Report(NamedTuple):
    """How a result that passed compares."""

    worst: float      # max of error / bound over the outputs
    lse_worst: float  # the same for the log-sum-exp
    flipped: float    # share of codes that differ from the simulation (NaN without codes)


class Case:
    """One set of arguments with its expected result and bounds; `check` judges a computed one.

    block_size: keys of a block, as the kernel takes them (`Work.block_size_kv`).
    """

    def __init__(self, q, k, v, *, block_size, **arguments):
        settings = {name: arguments.pop(name) for name in ARGUMENTS if name in arguments}
        self.call = reference_int8.resolve(q, k, v, **settings)
        self.parts = list(self.call.parts(**arguments))
        self.block_size = block_size

    def check(self, out, lse=None, codes=None, few=True):
        """Raise AssertionError unless out, lse and the codes of P (B, H, Lq, Lk) are as they should be.

        With codes given, those may differ only where roundings explain it (and in few places), and out is judged by
        them.
        """
        shape, Lk = self.call.q.values.shape[:-1], self.call.k.codes.shape[2]
        given = [None] * len(self.parts) if codes is None else codes.reshape(len(self.parts), shape[-1], Lk)
        judged = [judge(part, self.call, self.block_size, p) for part, p in zip(self.parts, given, strict=True)]
        flipped = np.nan
        if codes is not None and codes.size:
            flipped = np.mean([x.flipped for x in judged])
            enough = few and codes.size >= CODES_ENOUGH
            assert flipped <= FLIPPED or not enough, f"codes: {flipped:.2%} differ from the simulation"

        def whole(name, shape):
            return np.array([getattr(x, name) for x in judged]).reshape(shape)

        worst, _ = bounds.compare("out", out, whole("out", out.shape), whole("bound", out.shape))
        if lse is None:
            return Report(worst, 0.0, flipped)
        lse_worst, _ = bounds.compare("lse", lse, whole("lse", shape), whole("lse_bound", shape))
        return Report(worst, lse_worst, flipped)


class Judged(NamedTuple):
    """What one query head should be."""

    out: np.ndarray        # (Lq, Dv)
    bound: np.ndarray      # (Lq, Dv)
    lse: np.ndarray        # (Lq,)
    lse_bound: np.ndarray  # (Lq,)
    flipped: float         # share of the given codes that differ from the simulation


def judge(part, call, block_size, given=None):
    """Follow the online softmax of one `Part`, from the given codes of P (Lq, Lk) if there are any."""
    head, sink, Lk = part.head, part.head.sink, len(part.k.codes)
    with np.errstate(invalid="ignore", over="ignore"):
        scores = part_scores(part, call.fp32_sinks)
        seen = scores != -np.inf
        p, lse = reference.softmax(scores, sink)
        top = np.where(np.isfinite(lse), np.maximum(scores.max(axis=1, initial=-np.inf), sink), 0.0)
        delta = np.where(seen, _score_error(part, call.fp32_sinks) + STEPS * EPS * np.abs(scores - top[:, None]), 0.0)
        p_sink = np.exp(sink - np.where(np.isfinite(lse), lse, np.inf))
        sink_error = 0.0 if sink == -np.inf else p_sink * STEPS * EPS * (abs(sink) + np.abs(sink - top))
        coarse = CODE_EXP if call.pv == "int8" else 0.0
        denominator = np.where(seen, p * (np.expm1(delta) + coarse), 0.0).sum(axis=1) + sink_error

        out = np.zeros((len(scores), part.v.codes.shape[1]))
        bound, flipped = np.zeros_like(out), 0
        highest = np.full((len(scores), 1), -np.inf)
        roundings = bounds.roundings(Lk)
        for keys, exact in steps(Lk, block_size, call.fp32_sinks, call.pv):
            coded = call.pv == "int8" and not exact
            block_top = scores[:, keys].max(axis=1, keepdims=True)
            highest = np.maximum(highest, block_top)
            unit = block_top if coded else highest
            e = exp(scores[:, keys], unit)
            off = np.expm1(2 * delta[:, : keys.stop].max(axis=1, keepdims=True) + 8 * EPS)
            w, worth, values = (e, 1.0, head.v[keys]) if exact else weights(e, part.v, keys, call.pv)
            worth = worth * exp(unit, lse[:, None])
            of_exp = (1 + part.v.per_token) * CODE_EXP if coded else 0.0
            w, slack = _rounded(w, off + of_exp, None if exact else call.pv)
            if coded and given is not None:
                flipped += _check_flips(given[:, keys], w, slack, lse)
                w, slack = given[:, keys], np.zeros_like(slack)
            term = worth * reference.weighted_sum(w, seen[:, keys], values)
            size = np.abs(values)
            inexact = 0.0 if coded else worth * (w @ size)
            if exact or call.pv == "fp32":
                inexact_weights = worth * ((w * np.expm1(delta[:, keys])) @ size)
            else:
                inexact_weights = np.abs(term) * off
            out += term
            bound += SAFETY * (inexact_weights + roundings * (np.abs(term) + inexact))
            changed = worth * (slack @ size)
            bound += changed * (1 + off + SAFETY * (off + 2 * roundings + denominator[:, None]))
        bound += SAFETY * np.abs(out) * (denominator[:, None] + roundings)
        size = np.abs(part.v.codes * part.v.scale).sum(axis=0)
        bound += 2 * TINY * size + 255 * 128 * (Lk + 2) * SUBNORMAL
        if call.pv == "bf16":
            in_weights = np.abs(part.v.codes).sum(axis=0) if part.v.per_token else 0.0  # V's scale is in them
            bound += TINY * (Lk + 2 + in_weights)
        lse_bound = SAFETY * (roundings + denominator + EPS * (STEPS * np.abs(top) + np.abs(lse)))
    lse_bound = np.where(np.isfinite(lse), lse_bound, 0.0)
    out = np.where((lse == -np.inf)[:, None], 0.0, out)
    return Judged(out, bound, lse, lse_bound, flipped / max(scores.size, 1))


def _score_error(part, fp32_sinks):
    """Bound on the error of each score, (Lq, Lk), from the operations that made it."""
    head, q, k, _ = part
    integers = (q.codes @ k.codes.T) * q.scale * k.scale.T
    score = head.scale * (integers + (q.codes * q.scale) @ k.mean.T)
    of_means = (head.q.shape[1] + 2) * ((np.abs(q.codes) * q.scale) @ np.abs(k.mean).T)
    error = EPS * abs(head.scale) * (STEPS * np.abs(integers) + of_means)
    if fp32_sinks:
        rows = head.k[:fp32_sinks].T
        score[:, :fp32_sinks] = head.scale * (head.q @ rows)
        size = (len(rows) + 2) * (np.abs(head.q) @ np.abs(rows))
        error[:, :fp32_sinks] = EPS * abs(head.scale) * (size + of_means)
    return bounds.changed_error(head, score, error)


def _rounded(w, off, pv):
    """Weights as the product takes them, and by how much each may differ when w is wrong by a factor of 1 + off."""
    if pv not in ("int8", "bf16"):
        return w, np.zeros_like(w)
    low, high = w * (1 - off), w * (1 + off)
    if pv == "bf16":
        middle, low, high = bf16(w), bf16(np.maximum(low, 0)), bf16(high)
    else:  # 255 w / omega is of float32: 255 is exact, and what underflows is far below half a code
        low, high = np.maximum(low - 1e-6, 0), np.minimum(high + 1e-6, 255)
        middle, low, high = (encode(x).astype(np.float64) for x in (w, low, high))
    return middle, np.where(np.isnan(w), 0.0, np.maximum(high - middle, middle - low))


def _check_flips(codes, expected, slack, lse):
    """Raise unless all codes are within the slack; return how many differ. Rows of NaN have none to speak of."""
    difference = np.where(np.isnan(lse)[:, None], 0.0, np.abs(codes - expected))
    if (difference > slack).any():
        i, j = np.argwhere(difference > slack)[0]
        raise AssertionError(
            f"codes: {np.count_nonzero(difference > slack)} of {codes.size} in a block differ without reason, first "
            f"in row {i}, key {j} of it: {codes[i, j]}, expected {expected[i, j]} +- {slack[i, j]}"
        )
    return np.count_nonzero(difference)
