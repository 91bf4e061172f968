"""How far the GPU kernels may lie from the float64 reference: the bounds of float32, and what weights in 16 bits add.

Sums are float32 of exact products, as bounds.py has it. Weights are relative to the running maximum, so at most 1;
rounded to t significant bits each is off by at most 2^-t of itself, or in float16, below 2^-14, by 2^-25:

    2^-t sum_j p_j |v_j| + 2^-25 sum_j |v_j|          and a hundredth of the first for terms of second order

int8 with int8 weights is judged by bounds_int8.py, of its codes.
"""
import functools

import bounds
import bounds_half
import numpy as np
from bounds import SAFETY

from cyflash import reference

ROUNDING = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 0.0), "float32": (0.0, 0.0)}


class Case:
    """Arguments in float64 with the expected result and bounds; `check` judges a computed one.

    weights: dtype that P is rounded to.
    """

    def __init__(self, q, k, v, weights, **options):
        self.case = bounds.Case(*(np.asarray(x, np.float64) for x in (q, k, v)), **options)
        self.weights = weights

    @functools.cached_property
    def bounds(self):
        out, lse = self.case.bounds
        relative, absolute = ROUNDING[self.weights]
        case, more = self.case, []
        for head in reference.heads(case.q, case.k, case.v, **case.options):
            scores = np.where(head.visible, reference.head_scores(head), -np.inf)
            p, _ = reference.softmax(scores, head.sink)
            size = np.abs(np.where(np.isfinite(head.v), head.v, 0.0))
            more.append(SAFETY * (1.01 * relative * (p @ size) + absolute * ((scores != -np.inf) @ size)))
        return out + np.array(more).reshape(out.shape), lse

    def check(self, out, lse):
        """Raise AssertionError unless out and lse lie within the bounds."""
        bounds_half.compare("out", out, out.dtype, self.case.expected, self.bounds[0])
        bounds.compare("lse", lse, self.case.expected_lse, self.bounds[1])
